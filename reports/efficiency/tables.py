"""Tables of the efficiency section: factors, targets, sizes, memory, times, the model."""

from __future__ import annotations

from collections.abc import Sequence

from reports.claims import FAILS, HOLDS
from reports.efficiency.data import (
    CHECKPOINT,
    EXACT,
    MEASURED,
    MEMORY,
    MEMORY_PARTS,
    PARTS,
    PEAK,
    SPEED,
    Factor,
    aims,
    batches,
    device,
    factors,
    is_measured,
    items,
    model_name,
    of_kind,
    span,
    times,
    variants,
)
from reports.efficiency.story import MODEL_MARK, reached_words
from reports.study_tables import Row, StudyRun, number_cell, three, value
from reports.tables import MISSING, Cell, Column, Table, header_cell, text_cell
from reports.text import NOT_RUN, Phrase, bytes_text

_WORDS = {HOLDS: "met", FAILS: "not met"}
_SILENT = text_cell("–", tone="missing")
_PART_WORDS = {"low_rank": "low-rank branch", "signs": "signs", "rest": "kept in full precision"}
_CLAIM_WORDS = {
    CHECKPOINT: "smaller checkpoint",
    MEMORY: "less GPU memory",
    SPEED: "faster",
}


def part_words(part: str) -> str:
    return _PART_WORDS.get(part, part)


def factor_table(study: StudyRun) -> Table:
    """The paper's factors, each beside ours, one line per baseline."""
    columns = [
        Column("the paper", False),
        Column("ours"),
        Column("of", False),
        Column("against", False),
        Column("beside the paper’s", False),
        Column("the model expects", note="not measured"),
    ]
    table = Table(f"The paper’s factors beside ours: {study.title}", columns)
    found: dict[tuple[str, str, str, str], list[Factor]] = {}
    for factor in factors(study):
        ours = factor.ours if factor.claim == CHECKPOINT else ""
        key = (factor.claim, factor.kind, factor.baseline, ours)
        if not is_measured(study) and factor.amount is None and factor.modelled is None:
            key = (factor.claim, factor.kind, "", "")
        found.setdefault(key, []).append(factor)
    partly = {key[:2] for key in found if key[2]}
    places = {key[:2]: None for key in found}
    keys = sorted(found, key=lambda key: (list(places).index(key[:2]), key[2] == ""))
    for key in keys:
        claim, kind, baseline, _ = key
        if not baseline:
            baseline = "every other baseline" if (claim, kind) in partly else "every baseline"
        own = found[key]
        table.rows.append(_factor_row(study, claim, kind, baseline, own))
    table.note = (
        "Ranges are over packed variants and batches. Exact numbers count bytes and need no GPU. "
        f"What the model expects of a step on an H100 is {MODEL_MARK}."
    )
    return table


def target_table(study: StudyRun) -> Table:
    """The project's targets: met, not met, undecided or not run."""
    columns = [Column("target", False), Column("here", False), Column("value", False)]
    table = Table(f"The project’s targets: {study.title}", columns)
    for aim in aims(study):
        tone = "verdict " + aim.verdict.replace(" ", "-")
        verdict = text_cell(_WORDS.get(aim.verdict, aim.verdict), tone=tone)
        table.rows.append([header_cell(aim.text), verdict, text_cell(aim.measured)])
    table.note = f"Set for DiT-XL/2 on an H100; this run is of {model_name(study)}" + (
        f" on {device(study)}." if is_measured(study) else ", without a GPU."
    )
    return table


def checkpoint_table(study: StudyRun) -> Table:
    """Packing × part: bytes, total and factor, and what the paper printed."""
    columns = [Column("packing", False, "codes / low-rank branch / rest")]
    columns += [Column(part_words(part), note="MiB") for part in PARTS]
    columns += [Column("total", note="MiB"), Column("smaller", note="than FP32"), Column("paper")]
    rank = study.tables["checkpoints"][0]["rank"]
    title = f"Bytes of a checkpoint by part, rank {rank}: {study.title}"
    table = Table(title, columns)
    for row in study.tables["checkpoints"]:
        paper = value(row, "published")
        cells: list[Cell] = [header_cell(row["packing"], sub=row["reading"])]
        cells += [number_cell(value(row, f"{part}_bytes"), _mib) for part in PARTS]
        cells += [
            number_cell(value(row, "total_bytes"), _mib, study.href),
            number_cell(value(row, "size_reduction"), times, study.href),
            _SILENT if paper is None else text_cell(f"{paper:g}×"),
        ]
        table.rows.append(cells)
    table.note = (
        "Exact. “ideal”, “reading” and “bound” are no files: an entropy bound, what the paper may "
        "have counted, and the most that two bits a code can give."
    )
    return table


def weight_table(study: StudyRun) -> Table:
    """Bytes of parameters and buffers in memory, exact for all but peers."""
    columns = [
        Column("variant", False),
        Column("weights in memory"),
        Column("smaller", note="than fp32"),
    ]
    table = Table(f"Weights in memory: {study.title}", columns)
    for row in study.tables["weights"]:
        table.rows.append(
            [
                header_cell(row["variant"], sub=row["description"]),
                number_cell(value(row, "weight_bytes"), bytes_text, study.href),
                number_cell(value(row, "reduction_from_fp32"), times),
            ]
        )
    table.note = "Exact: parameters and buffers, counted without a GPU."
    return table


def memory_table(study: StudyRun) -> Table | None:
    """Variant and batch: peak of a step and its parts; None where nothing was measured."""
    rows = items(study, "step")
    if not rows:
        return None
    columns = [Column("variant", False), Column("batch")]
    columns += [Column(part) for part in MEMORY_PARTS] + [Column("peak of a step")]
    table = Table(f"GPU memory of a step on {device(study)}: {model_name(study)}", columns)
    for row in rows:
        cells: list[Cell] = [header_cell(row["variant"]), text_cell(row["batch"])]
        if value(row, "peak_bytes") is None:
            cells += [_status_cell(row), *[_SILENT] * len(MEMORY_PARTS)]
        else:
            cells += [number_cell(value(row, f"{p}_bytes"), bytes_text) for p in MEMORY_PARTS]
            cells.append(number_cell(value(row, "peak_bytes"), bytes_text, study.href))
        table.rows.append(cells)
    table.note = (
        "Peak of the allocator. Workspace is cuBLAS’s; activations are the rest, a CUDA graph’s "
        "own tensors included. Memory held unused, and the CUDA context, are left out."
    )
    return table


def time_table(study: StudyRun, kind: str) -> Table | None:
    """Variant × batch: median [p20 to p80], and of a step the model's prediction below."""
    rows = items(study, kind)
    if not rows:
        return None
    found = batches(rows)
    by_place = {(row["variant"], int(row["batch"])): row for row in rows}
    steps = rows[0]["steps"]
    what = "One step" if kind == "step" else f"Sampling of {steps} steps"
    columns = [Column("variant", False)]
    columns += [Column(f"batch {b}", note="ms, median [p20 to p80]") for b in found]
    table = Table(f"{what} on {device(study)}: {model_name(study)}", columns)
    for name, description in variants(study).items():
        own = [by_place.get((name, batch)) for batch in found]
        cells: list[Cell] = [header_cell(name, sub=description)]
        cells += [_time_cell(row, study.href) for row in own]
        table.rows.append(cells)
    if kind == "step":
        table.rows += _model_rows(study, found)
    table.note = (
        "“unstable”: the interquartile range exceeds 10 % of the median. Eager and compiled "
        "variants are timed with their launches."
    )
    if kind == "step":
        table.note += f" The last lines are {MODEL_MARK}, of an H100."
    if rows[0].get("guidance") == "True":
        table.note += " With guidance: the network sees twice the batch."
    return table


def ratio_table(study: StudyRun, kind: str) -> Table | None:
    """Packed variant and baseline × batch: the factor and its verdict; None if nothing is."""
    claim = MEMORY if kind == PEAK else SPEED
    found = of_kind(study, claim, kind)
    if not any(f.amount is not None for f in found):
        return None
    counts = sorted({int(f.batch) for f in found})
    by_place = {(f.ours, f.baseline, int(f.batch)): f for f in found}
    columns = [Column("packed", False), Column("against", False)]
    columns += [Column(f"batch {count}") for count in counts]
    words = {PEAK: "Peak memory of a step", "step": "Speed of a step", "sampling": "Sampling"}
    table = Table(f"{words[kind]}, ours against every baseline: {study.title}", columns)
    for ours, baseline in dict.fromkeys((f.ours, f.baseline) for f in found):
        cells: list[Cell] = [header_cell(ours), text_cell(baseline)]
        for count in counts:
            factor = by_place.get((ours, baseline, count))
            amount = None if factor is None else factor.amount
            sub = "" if factor is None else factor.verdict
            cells.append(number_cell(amount, times, study.href, sub))
        table.rows.append(cells)
    table.note = f"Above 1 is better. The paper prints {found[0].paper:g}×."
    return table


def model_table(study: StudyRun) -> Table | None:
    """The end-to-end model by part, and its ratios; every number marked as a model."""
    rows = study.tables.get("end_to_end_model", [])
    if not rows:
        return None
    parts = ("products", "elementwise", "attention", "modulation", "total")
    columns = [Column("batch", False), Column("precision", False)]
    columns += [Column(part, note="ms") for part in parts]
    columns += [Column("bf16 ÷ W1.58"), Column("TF32 ÷ W1.58"), Column("FP32 ÷ W1.58")]
    table = Table(f"A step of {model_name(study)} on an H100, {MODEL_MARK}", columns)
    for row in rows:
        for name, label in (("bf16", "bf16 compiled"), ("w1.58a8", "W1.58A8")):
            first = name == "bf16"
            sub = f"{row['images']} images" if first else ""
            cells = [header_cell(f"batch {row['batch']}", sub=sub), text_cell(label)]
            cells += [number_cell(value(row, f"{name}_{part}_ms"), three) for part in parts]
            if first:
                cells += [_SILENT] * 3
            else:
                ratios = ("ratio_to_bf16", "ratio_to_tf32", "ratio_to_fp32")
                cells += [number_cell(value(row, ratio), times, study.href) for ratio in ratios]
            table.rows.append(cells)
    table.note = f"Assumed rates, {rows[0]['assumptions']}."
    return table


def _factor_row(
    study: StudyRun, claim: str, kind: str, baseline: str, own: Sequence[Factor]
) -> list[Cell]:
    amounts = [f.amount for f in own if f.amount is not None]
    modelled = [f.modelled for f in own if f.modelled is not None]
    head = header_cell(f"{own[0].paper:g}× {_CLAIM_WORDS.get(claim, claim)}")
    basis = EXACT if own[0].basis == EXACT else MEASURED
    ours = MISSING if not amounts else text_cell(span(amounts), study.href, sub=basis)
    against = baseline if kind == "file" else f"{baseline}, {kind}"
    names = list(dict.fromkeys(f.ours for f in own))
    of = names[0] if len(names) == 1 else "all packed"
    words = reached_words(own)
    return [
        head,
        ours,
        text_cell(of),
        text_cell(against),
        text_cell(words, tone="missing" if words == NOT_RUN else ""),
        _SILENT if not modelled else text_cell(span(modelled), study.href),
    ]


def _model_rows(study: StudyRun, found: Sequence[int]) -> list[list[Cell]]:
    rows = {int(row["batch"]): row for row in study.tables.get("end_to_end_model", [])}
    if not rows:
        return []
    lines = []
    for name, label in (("bf16", "bf16 compiled"), ("w1.58a8", "W1.58A8")):
        cells: list[Cell] = [header_cell(f"model: {label}", sub=f"{MODEL_MARK}; H100")]
        for batch in found:
            amount = value(rows[batch], f"{name}_total_ms") if batch in rows else None
            shown = _SILENT if amount is None else text_cell(three(amount), sub="model")
            cells.append(shown)
        lines.append(cells)
    return lines


def _time_cell(row: Row | None, href: str) -> Cell:
    if row is None:
        return MISSING
    median = value(row, "median_ms")
    if median is None:
        return _status_cell(row)
    low, high = value(row, "p20_ms"), value(row, "p80_ms")
    sub = "" if low is None or high is None else f"[{three(low)} to {three(high)}]"
    if row["stability"] == "unstable":
        sub += " unstable"
    return Cell([Phrase(three(median), href)], sub.strip())


def _status_cell(row: Row) -> Cell:
    """Why there is no number, in the run's words."""
    status = row["status"]
    if status.startswith("check failed"):
        return text_cell("no time: check failed", tone="missing", sub=status)
    text = status if status.startswith(NOT_RUN) else f"{NOT_RUN}: {status}"
    return text_cell(NOT_RUN, tone="missing", sub=text.removeprefix(NOT_RUN).lstrip(": "))


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f}"
