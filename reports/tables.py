"""Tables of the report: one small model that the template prints, and the functions that fill it.

A cell never computes: it holds the text to print and the anchor of the run or row it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.aggregate import Group, Row, Summary, Value, higher_is_better
from reports.claims import Claim, mean_bits_by_type
from reports.loading import LeftOut, RunData
from reports.settings import FULL_PRECISION, recipe, section
from reports.text import (
    NOT_RUN,
    Phrase,
    bytes_text,
    count_text,
    joined,
    listing,
    number,
    seconds_text,
    signed,
    significant,
    spread,
)
from robuq_bench.runs.lock import status_of

_DAGGER = "†"
_TYPE_ORDER = ("proj", "qkv", "fc1", "fc2")


@dataclass(frozen=True)
class Cell:
    """Printed parts, a second line in small print, and a tone (a CSS class, "" for none)."""

    parts: Sequence[Phrase]
    sub: str | Sequence[Phrase] = ""
    tone: str = ""
    is_header: bool = False
    anchor: str = ""


@dataclass(frozen=True)
class Column:
    """A column head; `note` is a hint such as the direction that is better."""

    label: str
    is_number: bool = True
    note: str = ""


@dataclass
class Table:
    """A captioned table; `note` is printed below it."""

    caption: str
    columns: Sequence[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""


def text_cell(text: str, href: str = "", *, sub: str = "", tone: str = "") -> Cell:
    return Cell([Phrase(text, href)], sub, tone)


def header_cell(text: str, *, sub: str = "", anchor: str = "") -> Cell:
    return Cell([Phrase(text)], sub, is_header=True, anchor=anchor)


def plan_cell(row: Row, anchor: str = "") -> Cell:
    """The head of a plan's line, with its notes in small print."""
    return header_cell(row.name, sub=row.notes, anchor=anchor)


MISSING = text_cell(NOT_RUN, tone="missing")


def metric_column(metric: str) -> Column:
    better = "↑ is better" if higher_is_better(metric) else "↓ is better"
    return Column(metric, note=better)


def summary_table(group: Group) -> Table:
    """Plans × metrics: mean and [min–max] over training seeds and seed ranges."""
    fid = group.fid
    columns = [Column("plan", is_number=False)]
    for metric in group.metrics:
        columns.append(metric_column(metric))
        if metric == fid:
            columns.append(Column("÷ teacher", note="ratio of means"))
    table = Table(f"Plans and metrics on {group.title}: mean [min–max]", columns)
    teacher_fid = group.teacher.summary(fid) if fid else None
    for row in group.all_rows:
        cells = [_summary_head(row, row is group.teacher)]
        for metric in group.metrics:
            cells.append(summary_cell(row, metric))
            if metric == fid:
                cells.append(_ratio_cell(row, row.summary(metric), teacher_fid))
        table.rows.append(cells)
    table.note = (
        f"Protocol: {group.protocol}. Each mean is over all training seeds and seed ranges of the "
        "row; the brackets hold the least and the greatest of those values. Every plan is sampled "
        "from the same image seeds as the teacher. Losses are means over fixed validation batches."
    )
    if any(row.is_rank_deficient(metric) for row in group.all_rows for metric in group.metrics):
        table.note += (
            f" {_DAGGER} Too few images for the number of features, so the covariance is "
            "rank-deficient and the value biased."
        )
    return table


def summary_cell(row: Row, metric: str) -> Cell:
    summary = row.summary(metric)
    if summary is None:
        return MISSING
    mark = _DAGGER if row.is_rank_deficient(metric) else ""
    text = number(metric, summary.mean) + mark
    return text_cell(text, f"#{row.anchor}", sub=spread(metric, summary))


def values_table(group: Group) -> Table:
    """Every value behind the summary: one line per run and seed range, each linked to its run."""
    metrics = group.metrics
    columns = [Column("plan", is_number=False), Column("training seed"), Column("seed range")]
    table = Table(
        f"Every measured value on {group.title}", columns + [Column(name) for name in metrics]
    )
    for row in group.all_rows:
        lines: dict[tuple[int, int, str], dict[str, Value]] = {}
        for name, values in row.values.items():
            for value in values:
                place = -1 if value.seed_range is None else value.seed_range
                lines.setdefault((value.run.seed, place, value.run.id), {})[name] = value
        for index, ((seed, place, _), found) in enumerate(sorted(lines.items())):
            anchor = row.anchor if index == 0 else ""
            cells = [
                plan_cell(row, anchor),
                text_cell("none" if row is group.teacher else str(seed)),
                text_cell("validation" if place < 0 else str(place)),
            ]
            cells += [_value_cell(name, found.get(name)) for name in metrics]
            table.rows.append(cells)
    table.note = (
        "A dash marks what is measured on another line: losses on validation batches, the other "
        "metrics on samples. Each number links to its run."
    )
    return table


def plans_table(group: Group) -> Table:
    """What each plan does, read from its settings; parts that few have only where one does."""
    recipes = [(row, recipe(row.plan)) for row in group.rows]
    absent = {"scaling": "none", "other layers": FULL_PRECISION}
    used = {k for _, parts in recipes for k, text in parts.items() if text != absent.get(k)}
    names = [name for name in (recipes[0][1] if recipes else ()) if name in used]
    columns = [Column(name, is_number=False) for name in ("plan", *names, "QAT steps")]
    table = Table(f"What each plan on {group.title} does", columns)
    for row, parts in recipes:
        steps = "not recorded" if row.qat_steps is None else str(row.qat_steps)
        texts = [*(parts[name] for name in names), "0 (PTQ)" if row.is_ptq else steps]
        table.rows.append([plan_cell(row), *(text_cell(text) for text in texts)])
    return table


def claims_table(claims: Iterable[Claim], caption: str) -> Table:
    columns = [Column("claim", False), Column("here", False), Column("evidence", False)]
    table = Table(caption, columns)
    for claim in claims:
        tone = "verdict " + claim.verdict.replace(" ", "-")
        table.rows.append(
            [header_cell(claim.claim), text_cell(claim.verdict, tone=tone), Cell(claim.evidence)]
        )
    return table


def layer_type_table(group: Group, bits: float, published: Mapping[str, float]) -> Table | None:
    """Mean bits per layer type that AMPN chose, beside the paper's; None without such a run."""
    found = mean_bits_by_type(group, bits)
    if found is None:
        return None
    row, by_type = found
    columns = [
        Column("layer type", is_number=False),
        Column("here", note="mean [min–max] over training seeds"),
        Column("paper", note="DiT-XL/2"),
        Column("difference"),
    ]
    table = Table(f"Mean activation bits per layer type: {row.label} on {group.title}", columns)
    names = sorted(by_type, key=lambda name: ([*_TYPE_ORDER, name].index(name), name))
    for name in names:
        values = by_type[name]
        mean = math.fsum(values) / len(values)
        limits = f"[{min(values):.2f}–{max(values):.2f}]" if max(values) > min(values) else ""
        paper = published.get(f"bits-a{bits:g}-{name}")
        table.rows.append(
            [
                header_cell(name),
                text_cell(f"{mean:.2f}", f"#{row.runs[0].anchor}", sub=limits),
                text_cell(NOT_RUN, tone="missing") if paper is None else text_cell(f"{paper:.2f}"),
                text_cell("no paper value", tone="missing")
                if paper is None
                else text_cell(signed(mean - paper)),
            ]
        )
    listed = listing(f"seed {run.seed}" for run in row.runs)
    table.note = f"Training {listed}. The mean counts layers equally."
    return table


def accounting_table(group: Group) -> Table:
    """Cost of each plan: bits, operations and bytes, with reductions against full precision."""
    columns = [
        Column("plan", is_number=False),
        Column("weight bits", note="with scales below"),
        Column("activation bits", note="mean, weighted by MACs; with scales below"),
        Column("BitOPs", note="per image and step"),
        Column("effective FLOPs", note="BitOPs / 64 + full-precision MACs"),
        Column("less compute", note="with the rotation’s additions below"),
        Column("packed size", note="packing below"),
        Column("smaller", note="than FP32"),
    ]
    table = Table(f"What each plan costs on {group.title}", columns)
    for row in group.rows:
        run = next((run for run in row.runs if run.first("accounting")), None)
        cells = [plan_cell(row)]
        if run is None:
            table.rows.append(cells + [MISSING] * (len(columns) - 1))
            continue
        record, href = run.first("accounting"), f"#{run.anchor}"
        with_rotation = _ratio(record.get("compute_reduction_with_rotation"))
        blocks = section(section(record, "bits_by_kind"), "block")  # not in older records
        exact = {name: significant(float(v), 3) for name, v in blocks.items()}
        weight, inputs = (exact.get(f"effective_{x}_bits", "") for x in ("weight", "activation"))
        # Where layers differ there are no bits of all, but a mean.
        record = {**blocks, **{key: v for key, v in record.items() if v is not None}}
        for name, render, sub in (
            ("weight_bits", lambda v: significant(v, 3), weight),
            ("mean_activation_bits", lambda v: significant(v, 4), inputs),
            ("bit_ops", count_text, ""),
            ("effective_flops", count_text, ""),
            ("compute_reduction", lambda v: f"{significant(v, 3)}×", with_rotation),
            ("packed_bytes", bytes_text, str(record.get("packing", ""))),
            ("size_reduction", lambda v: f"{significant(v, 3)}×", ""),
        ):
            cells.append(_optional_cell(record.get(name), render, href, sub))
        table.rows.append(cells)
    table.note = (
        "The paper’s 13.2× (theory) and 15.2× (checkpoint) are for DiT-XL/2, where the layers kept "
        "in full precision weigh less than in a small model. Effective FLOPs count one MAC as one."
    )
    return table


def packing_table(group: Group) -> Table | None:
    """Size of one plan under every packing scheme of its accounting record."""
    for row in reversed(group.rows):
        for run in row.runs:
            schemes = run.first("accounting").get("packing_table")
            if isinstance(schemes, list) and schemes:
                return _packing_table(row, run, schemes)
    return None


def timing_table(runs: Sequence[RunData]) -> Table | None:
    """Seconds of each part of a run; machines differ, so each line names its own."""
    timed = [(run, run.first("timing")) for run in runs if run.first("timing")]
    names = sorted(
        {name for _, record in timed for name in record if name.endswith("_s")},
        key=lambda name: (name == "total_s", name),
    )
    if not names:
        return None
    columns = [Column("run", False)] + [Column(name.removesuffix("_s")) for name in names]
    columns += [Column("sessions"), Column("machine", False), Column("threads")]
    table = Table("Time", columns)
    for run, record in timed:
        cells = [
            Cell([Phrase(f"{run.plan_name} seed {run.seed}", f"#{run.anchor}")], is_header=True)
        ]
        for name in names:
            cells.append(_optional_cell(record.get(name), seconds_text))
        origin = provenance(run)
        cells.append(text_cell(str(len(run.manifest.get("sessions", [])))))
        cells.append(text_cell(hardware(origin)))
        cells.append(text_cell(str(origin.get("threads", "not recorded"))))
        table.rows.append(cells)
    table.note = "Of a run that was continued after a stop, `total` covers its last session only."
    return table


def unfinished_table(runs: Sequence[RunData]) -> Table | None:
    waiting = [run for run in runs if not run.finished]
    if not waiting:
        return None
    columns = [Column("run", False), Column("seed"), Column("stored items"), Column("state", False)]
    table = Table("Unfinished runs: nothing of theirs is shown as a result", columns)
    for run in waiting:
        sessions = run.manifest.get("sessions", [])
        status = status_of(run.path, sessions[-1]) if sessions else "not started"
        torn = ", last line cut off" if run.torn else ""
        table.rows.append(
            [
                header_cell(run.id, anchor=run.anchor),
                text_cell(str(run.seed)),
                text_cell(str(len(run.records))),
                text_cell(f"unfinished ({status}{torn})"),
            ]
        )
    return table


def left_out_table(left_out: Sequence[LeftOut]) -> Table | None:
    if not left_out:
        return None
    columns = [Column("folder", False), Column("why", False)]
    table = Table("Runs left out: nothing of theirs is in this report", columns)
    for path, reason in left_out:
        table.rows.append([header_cell(str(path)), text_cell(reason)])
    return table


def provenance(run: RunData) -> Mapping[str, Any]:
    """Machine, packages and code of a run's last session."""
    sessions = run.manifest.get("sessions", [])
    return section(sessions[-1], "provenance") if sessions else {}


def hardware(origin: Mapping[str, Any]) -> str:
    """The device that computed, in words."""
    gpu, cpu = section(origin, "gpu"), section(origin, "cpu")
    if gpu:
        return str(gpu.get("name", "GPU"))
    return str(cpu.get("model", "not recorded"))


def _ratio_cell(row: Row, own: Summary | None, teacher: Summary | None) -> Cell:
    if own is None or teacher is None:
        return MISSING
    if teacher.mean <= 0:
        return text_cell("undefined", tone="missing")
    return text_cell(significant(own.mean / teacher.mean, 3), f"#{row.anchor}")


def _summary_head(row: Row, is_teacher: bool) -> Cell:
    """Name of a plan and, below, links to its runs."""
    links = [Phrase(str(run.seed), f"#{run.anchor}") for run in row.runs]
    if is_teacher:
        links = [Phrase("its run", links[0].href)] if links else []
    else:
        links = [Phrase("seeds " if len(links) > 1 else "seed "), *joined(links, ", ")]
    if row.notes:
        links.append(Phrase(f"; {row.notes}"))
    return Cell([Phrase(row.name)], links, is_header=True)


def _value_cell(metric: str, value: Value | None) -> Cell:
    if value is None:
        return text_cell("–", tone="missing")
    mark = _DAGGER if value.is_rank_deficient else ""
    return text_cell(number(metric, value.value) + mark, f"#{value.run.anchor}")


def _packing_table(row: Row, run: RunData, schemes: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("packing", is_number=False),
        Column("what it assumes", is_number=False),
        Column("size"),
        Column("smaller", note="than FP32"),
        Column("paper", note="DiT-XL/2"),
    ]
    table = Table(f"Packing schemes: {row.label}, seed {run.seed}", columns)
    for scheme in schemes:
        paper = scheme.get("published")
        table.rows.append(
            [
                header_cell(str(scheme.get("packing", ""))),
                text_cell(str(scheme.get("reading", ""))),
                text_cell(bytes_text(float(scheme["total_bytes"])), f"#{run.anchor}"),
                text_cell(f"{significant(float(scheme['size_reduction']), 3)}×"),
                text_cell("other model", tone="missing")
                if paper is None
                else text_cell(f"{significant(float(paper), 3)}×"),
            ]
        )
    return table


def _optional_cell(
    value: object, render: Callable[[float], str], href: str = "", sub: str = ""
) -> Cell:
    return text_cell(render(value), href, sub=sub) if isinstance(value, int | float) else MISSING


def _ratio(value: object) -> str:
    return f"{significant(float(value), 3)}×" if isinstance(value, int | float) else ""
