"""What each study contributes to the report, chosen by `config.study`.

A renderer takes the finished runs of one study, and all finished runs, and returns a `Section`: the
template that prints it and the data the template needs. To add a study, write a renderer and enter
it in `SECTIONS`; a study without one gets `generic_section`, which prints the tables that its runs
wrote.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports import (
    allocation,
    efficiency,
    figures,
    kernels,
    normality,
    recorded_gpu,
    sensitivity,
    tables,
)
from reports.aggregate import KID_UNBIASED_SINCE, Group, Row, group_runs, stem
from reports.loading import RunData
from reports.pictures import BUDGET_BYTES, sample_grids
from reports.published import published_table, published_values, rivals_table
from reports.settings import ALLOCATED, AMPN, allocated, section
from reports.story import plain_words
from reports.tables import Column, Table, header_cell, text_cell
from reports.text import NOT_RUN, significant

MAX_GENERIC_ROWS = 200


@dataclass(frozen=True)
class Section:
    """`parts` are (anchor, title) of what the section holds, for the table of contents."""

    template: str
    parts: Sequence[tuple[str, str]]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocations:
    """Allocation and sensitivity of one plan: one chart per training seed.

    `of` says whose bits: "activation" or "weight".
    """

    row: Row
    of: str
    charts: Sequence[tuple[RunData, str]]
    by_type: Table | None
    sensitivity: str | None
    sensitivity_note: str


def train_and_eval_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """Results, samples, training, bits and cost of every protocol, and the published numbers."""
    groups = group_runs(every)
    budget = BUDGET_BYTES // max(1, len(groups))
    views = [
        {
            "group": group,
            "summary": tables.summary_table(group),
            "plans": tables.plans_table(group),
            "words": plain_words(group),
            "values": tables.values_table(group),
            "fid_chart": figures.fid_chart(group),
            "grids": sample_grids(group, budget),
            "loss_chart": figures.loss_chart(group.rows, group.title),
            "has_other_bits": any(row.family == ALLOCATED for row in group.rows),
            "allocations": _allocations(group),
            "accounting": tables.accounting_table(group),
            "packing": tables.packing_table(group),
        }
        for group in groups
    ]
    return Section(
        "train_and_eval.html",
        (
            ("results", "Results"),
            ("samples", "Samples"),
            ("training", "Training"),
            ("allocation", "Bits per layer"),
            ("cost", "Cost"),
            ("published", "Published numbers"),
        ),
        {
            "views": views,
            "has_low_kid": any(_has_low_kid(group) for group in groups),
            "timing": tables.timing_table(runs),
            "published": published_table(groups),
            "rivals": rivals_table(),
        },
    )


def _has_low_kid(group: Group) -> bool:
    return group.version < KID_UNBIASED_SINCE and "kid" in map(stem, group.metrics)


def train_teacher_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """Loss curves of the full-precision teachers, and what else their runs recorded."""
    chart = figures.run_loss_chart(runs, "teachers")
    return _study_section("train-teacher", "Teacher training", runs, chart)


def normality_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """Are activations normal after a Hadamard transform: answer, verdicts, evidence, caveats."""
    views = normality.normality_views(runs)
    if not views:
        return generic_section(runs, every)
    return Section(normality.TEMPLATE, normality.PARTS, {"views": views})


def sensitivity_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """Do sensitivities measured before training mislead: answer, agreement, evidence, caveats."""
    views = sensitivity.sensitivity_views(runs)
    if not views:
        return generic_section(runs, every)
    return Section(sensitivity.TEMPLATE, sensitivity.PARTS, {"views": views})


def allocation_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """What mixed precision is worth: answer, candidates, solvers, caveats."""
    views = allocation.allocation_views(runs)
    if not views:
        return generic_section(runs, every)
    return Section(allocation.TEMPLATE, allocation.PARTS, {"views": views})


def kernels_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """Are the kernels right, and how near to the hardware: targets, times, checks, roofline."""
    views = kernels.kernel_views(runs)
    if not views:
        return generic_section(runs, every)
    return Section(kernels.TEMPLATE, kernels.PARTS, {"views": views})


def efficiency_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """What the packed model saves: the paper's factors, file, memory and time by baseline."""
    views = efficiency.efficiency_views(runs)
    if not views:
        return generic_section(runs, every)
    return Section(efficiency.TEMPLATE, efficiency.PARTS, {"views": views})


def generic_section(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """The tables that runs of a study without a renderer of its own wrote to tables/*.csv."""
    study = runs[0].study
    return _study_section(study, f"Study: {study}", runs, None)


Renderer = Callable[[Sequence[RunData], Sequence[RunData]], Section]

SECTIONS: dict[str, Renderer] = {
    "train-and-eval": train_and_eval_section,
    "normality": normality_section,
    "sensitivity": sensitivity_section,
    "allocation": allocation_section,
    "kernels": kernels_section,
    "efficiency": efficiency_section,
    "train-teacher": train_teacher_section,
}
_ORDER = tuple(SECTIONS)
# Its numbers are the teacher rows of train-and-eval, which cites the run.
_SHOWN_ELSEWHERE = frozenset({"teacher-eval"})


def build_sections(runs: Sequence[RunData]) -> list[Section]:
    """One section per study among the finished runs, the main job first; then what is recorded."""
    by_study: dict[str, list[RunData]] = {}
    every = [run for run in runs if run.finished]
    for run in every:
        by_study.setdefault(run.study, []).append(run)
    if "train-and-eval" in by_study:
        for study in _SHOWN_ELSEWHERE & by_study.keys():
            del by_study[study]
    ordered = sorted(by_study, key=lambda s: (_ORDER.index(s) if s in _ORDER else len(_ORDER), s))
    found = [SECTIONS.get(study, generic_section)(by_study[study], every) for study in ordered]
    recorded = recorded_gpu.recorded_views(every)
    if recorded:
        found.append(Section(recorded_gpu.TEMPLATE, recorded_gpu.PARTS, {"views": recorded}))
    return found


def _allocations(group: Group) -> list[Allocations]:
    published = published_values()
    found = []
    for row in group.rows:
        if not section(row.plan, "bits"):
            continue
        charts: list[tuple[RunData, str]] = []
        sensitivity, note = None, ""
        for run in row.runs:
            bits = run.first("allocation").get("bits_by_layer", {})
            chart = figures.allocation_chart(bits, run.anchor, allocated(row.plan))
            if chart:
                charts.append((run, chart))
            measured = {
                (str(record["layer"]), int(record["bits"])): float(record["mse"])
                for record in run.of_kind("sensitivity")
            }
            # One chart shows the pattern; the CSV file has those of every training seed.
            if measured and sensitivity is None:
                sensitivity = figures.sensitivity_chart(measured, run.anchor)
                low, high = min(measured.values()), max(measured.values())
                note = (
                    f"training seed {run.seed}, from {significant(low, 2)} (faint) to "
                    f"{significant(high, 2)} (strong), logarithmic"
                )
        table = None
        if row.family == AMPN and row.bits is not None:
            table = tables.layer_type_table(group, row.bits, published)
        found.append(Allocations(row, allocated(row.plan), charts, table, sensitivity, note))
    return found


def _study_section(study: str, title: str, runs: Sequence[RunData], chart: str | None) -> Section:
    anchor = f"study-{study}"
    found = [table for run in runs for table in _written_tables(run)]
    return Section(
        "study.html",
        ((anchor, title),),
        {"anchor": anchor, "title": title, "runs": runs, "chart": chart, "tables": found},
    )


def _written_tables(run: RunData) -> list[Table]:
    names = sorted(name for name in run.manifest.get("outputs", {}) if name.startswith("tables/"))
    return [table for name in names if (table := _csv_table(run, name)) is not None]


def _csv_table(run: RunData, name: str) -> Table | None:
    data = run.read_output(name)
    if data is None or not name.endswith(".csv"):
        return None
    lines = list(csv.reader(io.StringIO(data.decode("utf-8"))))
    if len(lines) < 2:
        return None
    head, body = lines[0], lines[1:]
    columns = [Column(label, is_number=_is_number(body[0], i)) for i, label in enumerate(head)]
    table = Table(f"{run.id}: {name}", columns)
    for line in body[:MAX_GENERIC_ROWS]:
        first, *rest = [_csv_text(value) for value in line]
        table.rows.append([header_cell(first), *(text_cell(value) for value in rest)])
    if len(body) > MAX_GENERIC_ROWS:
        table.note = f"The first {MAX_GENERIC_ROWS} of {len(body)} rows; the run has them all."
    return table


def _csv_text(value: str) -> str:
    if value == "":
        return NOT_RUN
    try:
        return significant(float(value), 6)
    except ValueError:
        return value


def _is_number(line: Sequence[str], index: int) -> bool:
    try:
        float(line[index])
    except (IndexError, ValueError):
        return False
    return True
