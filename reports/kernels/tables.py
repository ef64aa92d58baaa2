"""Tables of the kernels section: checks, targets, modelled least times, timings, peers."""

from __future__ import annotations

import math

from reports.claims import FAILS, HOLDS
from reports.kernels.data import (
    BASELINE,
    MEDIAN,
    OURS,
    SHARE,
    SPEEDUP,
    Check,
    checks,
    device,
    has_no_time,
    is_timed,
    is_unstable,
    models,
    ours,
    outcomes,
    peaks,
    products,
)
from reports.kernels.story import (
    MODEL_MARK,
    RULE,
    microseconds,
    outcome_text,
    percent,
)
from reports.study_tables import Row, StudyRun, group, number_cell, three, two, value
from reports.tables import MISSING, Cell, Column, Table, header_cell, text_cell
from reports.text import Phrase, listing, plural, significant

_WORDS = {HOLDS: "met", FAILS: "not met"}
_ABSENT = text_cell("–", tone="missing")
_NOT_INSTALLED = "not installed"
_MOST_WRONG = 6


def target_table(study: StudyRun) -> Table:
    """The project's targets: met, not met, undecided or not run."""
    columns = [Column("target on DiT-XL/2", False), Column("here", False), Column("measured")]
    table = Table(f"The project’s targets for an H100: {study.title}", columns)
    for outcome in outcomes(study):
        tone = "verdict " + outcome.verdict.replace(" ", "-")
        measured: Cell = text_cell(outcome_text(outcome), tone="missing")
        if outcome.row is not None:
            measured = text_cell(outcome_text(outcome), study.href)
        verdict = text_cell(_WORDS.get(outcome.verdict, outcome.verdict), tone=tone)
        table.rows.append([header_cell(outcome.target.text), verdict, measured])
    table.note = RULE
    if device(study):
        table.note += f" Measured on {device(study)}."
    return table


def check_table(study: StudyRun) -> Table:
    """Kernel and layer × model: largest deviation in units of its limit, and where it ran."""
    found: dict[tuple[str, str], dict[str, list[Check]]] = {}
    for check in checks(study):
        by_model = found.setdefault((check.kernel, check.layer), {})
        by_model.setdefault(check.model, []).append(check)
    columns = [Column("layer", False), Column("kernel", False)]
    columns += [Column(f"DiT-{model}") for model in models(study)]
    columns += [Column("where it ran", False)]
    table = Table(f"Largest deviation over what is allowed: {study.title}", columns)
    for (kernel, layer), by_model in found.items():
        cells = [header_cell(layer), text_cell(kernel)]
        cells += [_check_cell(by_model.get(model, []), study.href) for model in models(study)]
        rows = sorted({check.rows for group in by_model.values() for check in group})
        where = "the device" if is_timed(study) else "Triton’s interpreter"
        table.rows.append([*cells, text_cell(where, sub=_row_words(rows))])
    table.note = (
        "At most 1 passes: every output against plain PyTorch on the same random inputs, memory "
        "filled with NaN beforehand. 0 means equal, or only deviations that are allowed as such."
    )
    failed = [check for check in checks(study) if not check.correct]
    # One kernel fails alike at many shapes.
    wrong = list(dict.fromkeys(f"{c.kernel}, {c.layer}, DiT-{c.model}: {c.status}" for c in failed))
    if wrong:
        more = f"; and {len(wrong) - _MOST_WRONG} more" if len(wrong) > _MOST_WRONG else ""
        table.note += f" Failed: {'; '.join(wrong[:_MOST_WRONG])}{more}."
    return table


def least_table(study: StudyRun, model: str) -> Table | None:
    """Layer × images: least time in bf16 over that of the ternary kernel, by data-sheet peaks."""
    sheets = peaks(study)
    rows = products(study, sheets[0].device, model) if sheets else []
    if not rows:
        return None
    counts = sorted({int(row["images"]) for row in rows})
    columns = [Column("layer", False)]
    columns += [Column(plural(count, "image")) for count in counts]
    title = f"DiT-{model}/2 on {sheets[0].device}: least bf16 time over least ternary time, a model"
    table = Table(title, columns)
    for (layer,), own in group(rows, "layer").items():
        by_count = {int(row["images"]): row for row in own}
        cells: list[Cell] = [header_cell(layer)]
        for count in counts:
            row = by_count.get(count)
            ratio = None if row is None else value(row, "bf16_over_ternary")
            sub = "" if row is None else f"{_least(row)}, {row['limit']}"
            cells.append(number_cell(ratio, lambda v: f"{two(v)}×", study.href, sub))
        table.rows.append(cells)
    table.note = (
        f"{MODEL_MARK[0].upper()}{MODEL_MARK[1:]}. Below each ratio: the least time of the ternary "
        "kernel and what sets it. No kernel can gain more than this on such a device."
    )
    return table


def timing_table(study: StudyRun, model: str) -> Table:
    """Every call of ours on one model: median [p20 to p80], rates, share of ceiling, speed-up."""
    columns = [
        Column("layer", False),
        Column("rows"),
        Column("median", note="[p20 to p80]"),
        Column("GB/s"),
        Column("TOP/s"),
        Column("share of ceiling", note="set by"),
        Column("over cuBLAS bf16"),
    ]
    table = Table(f"DiT-{model}/2 on {device(study)}: times of our kernels", columns)
    for row in ours(study):
        if row["model"] != model:
            continue
        head = header_cell(row["layer"], sub=f"{row['kernel']}, {row['settings']}")
        cells: list[Cell] = [head, text_cell(f"{int(row['rows']):,}")]
        if why := has_no_time(row):
            cells += [text_cell(why, tone="missing"), *[_ABSENT] * 4]
            table.rows.append(cells)
            continue
        operations = value(row, "tflop_s")
        ratio = value(row, SPEEDUP)
        cells += [
            _median_cell(row, study.href),
            number_cell(value(row, "gb_s"), _whole),
            _ABSENT if operations is None else text_cell(three(operations)),
            number_cell(value(row, SHARE), percent, sub=row.get("limit", "")),
            _ABSENT
            if ratio is None
            else text_cell(f"{two(ratio)}×", study.href, sub=row["verdict"]),
        ]
        table.rows.append(cells)
    table.note = (
        "Medians over all replays of a CUDA graph in at least three rounds. “faster” and “slower” "
        "need p < .002 (Mann-Whitney) and 5 %; “unstable”: the interquartile range exceeds 10 % of "
        "the median. A call whose check failed has no time. Only products have a rate in TOP/s and "
        "a cuBLAS baseline."
    )
    return table


def peer_table(study: StudyRun, model: str) -> Table | None:
    """Layer and rows × implementation: medians of ours and of every peer that was there."""
    rows = study.of("kernels", model=model)
    by_case = group(rows, "kernel", "layer", "rows")
    by_case = {case: own for case, own in by_case.items() if len(own) > 1}
    if not by_case:
        return None
    absent = _absent(rows)
    names = [n for n in dict.fromkeys(row["implementation"] for row in rows) if n not in absent]
    columns = [Column("layer", False), Column("rows")]
    columns += [Column("ours" if name == OURS else name) for name in names]
    table = Table(f"DiT-{model}/2 on {device(study)}: ours beside peers, median times", columns)
    order = list(dict.fromkeys(case[:2] for case in by_case))
    for case in sorted(by_case, key=lambda case: order.index(case[:2])):
        (kernel, layer, count), own = case, by_case[case]
        found = {row["implementation"]: row for row in own}
        if set(found) <= {OURS, *absent}:
            continue
        cells: list[Cell] = [header_cell(layer, sub=kernel), text_cell(f"{int(count):,}")]
        cells += [_peer_cell(found.get(name)) for name in names]
        table.rows.append(cells)
    table.note = (
        f"Small print: speed-up over {BASELINE} and its verdict. Every peer’s result was checked "
        "before it was timed; a plain product with bias is less work than ours does."
    )
    return table


def absent_words(study: StudyRun, model: str) -> str:
    """Which peers have no time because they were not installed, "" where all were."""
    names = _absent(study.of("kernels", model=model))
    return f"Peers that were not installed, so not run: {listing(names)}." if names else ""


def _check_cell(found: list[Check], href: str) -> Cell:
    """The worst of a kernel's checks on one model."""
    if not found:
        return MISSING
    wrong = sum(not check.correct for check in found)
    widths = f"width {listing(dict.fromkeys(check.width for check in found))}"
    if wrong:
        of = f"{wrong} of {len(found)}, {widths}" if len(found) > 1 else widths
        return text_cell("fails", href, tone="verdict does-not-hold", sub=of)
    # A check that passed has a deviation.
    worst = max(check.error if check.error is not None else math.inf for check in found)
    return text_cell(significant(worst, 2), href, sub=widths)


def _row_words(rows: list[int]) -> str:
    count = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
    return f"{count} rows"


def _median_cell(row: Row, href: str) -> Cell:
    median = value(row, MEDIAN)
    assert median is not None
    low, high = value(row, "p20_us"), value(row, "p80_us")
    sub = "" if low is None or high is None else f"[{three(low)} to {three(high)}]"
    if is_unstable(row):
        sub += " unstable"
    return Cell([Phrase(microseconds(median), href)], sub.strip())


def _peer_cell(row: Row | None) -> Cell:
    if row is None:
        return _ABSENT
    median = value(row, MEDIAN)
    if median is None:
        why = has_no_time(row) if row["implementation"] == OURS else row["status"]
        return text_cell(why, tone="missing")
    ratio = value(row, SPEEDUP)
    sub = "" if ratio is None else f"{two(ratio)}×, {row['verdict']}"
    if is_unstable(row):
        sub = f"{sub}, unstable".lstrip(", ")
    return text_cell(microseconds(median), sub=sub)


def _absent(rows: list[Row]) -> list[str]:
    """Implementations that are "not installed" in every row."""
    by_name = group(rows, "implementation")
    return [
        name for (name,), own in by_name.items() if all(r["status"] == _NOT_INSTALLED for r in own)
    ]


def _least(row: Row) -> str:
    least = value(row, "least_us")
    return "not run" if least is None else microseconds(least)


def _whole(number: float) -> str:
    return f"{number:,.0f}"
