"""Tables of the allocation section: candidates, verdicts, bits by layer type, solvers."""

from __future__ import annotations

from collections.abc import Sequence

from reports.allocation.data import (
    against_uniform,
    budgets,
    candidates,
    column,
    difference,
    measured,
    printed,
    same_bits,
    targets,
    type_means,
)
from reports.allocation.story import JUDGED, RULE, UNIFORM
from reports.claims import LAYER_TYPES
from reports.published import published_values
from reports.study_tables import Row, StudyRun, number_cell, three, two, value
from reports.tables import MISSING, Cell, Column, Table, header_cell, text_cell
from reports.text import seconds_text

CANDIDATE_WORDS = {
    "uniform": "the same bits everywhere",
    "random": "random bits at the budget",
    "ptq": "change of the noise prediction, before training",
    "qat": "change of the noise prediction, after training: AMPN",
    "qat-teacher": "error against the teacher, after training",
    "output-mse": "error of the layer’s own output, before training",
    "fisher": "Fisher, before training",
    "resolved": "solved again during training",
}


def candidate_table(study: StudyRun, budget: str) -> Table:
    """Mean [min–max] of every target, and the difference to uniform paired by seed."""
    names = targets(study)
    columns = [Column("candidate", False), Column("mean bits")]
    for target in names:
        columns += [
            Column(column(study, target), note="↓ mean [min–max]"),
            Column("Δ", note="to uniform"),
        ]
    title = f"Candidates at a mean of {float(budget):g} bits: {study.title}"
    table = Table(title, [*columns, Column("seeds")])
    for row in study.of("candidates", budget=budget):
        candidate = row["candidate"]
        words = CANDIDATE_WORDS.get(candidate, "")
        same = [c for c in _before(study, candidate) if same_bits(study, c, candidate, budget)]
        head = header_cell(candidate, sub=f"{words}; the bits of {same[0]}" if same else words)
        cells = [head, _mean_bits(study, candidate, budget)]
        for target in names:
            cells += [_target_cell(study, row, target), _difference_cell(row, target)]
        table.rows.append([*cells, text_cell(row.get("seeds") or "0")])
    table.note = (
        "Δ: mean over training seeds of the difference to uniform with the same seed; "
        "below 0 is better. All networks start alike and train the same number of steps."
    )
    return table


def verdict_table(study: StudyRun) -> Table | None:
    """Candidate × budget and target: the verdict and the ratio of means."""
    if not study.tables.get("verdicts"):
        return None
    places = [
        (budget, target)
        for budget in budgets(study)
        for target in JUDGED
        if study.of("verdicts", budget=budget, target=target)
    ]
    columns = [Column("beats uniform?", False)]
    columns += [
        Column(column(study, target) or target, False, f"mean of {float(budget):g} bits")
        for budget, target in places
    ]
    table = Table(f"Which candidates beat uniform: {study.title}", columns)
    for candidate in study.distinct("verdicts", "candidate"):
        cells: list[Cell] = [header_cell(candidate)]
        for budget, target in places:
            rows = study.of("verdicts", budget=budget, candidate=candidate, target=target)
            cells.append(_verdict_cell(rows))
        table.rows.append(cells)
    table.note = RULE + " ×: ratio of the means, below 1 is better than uniform."
    return table


def type_table(study: StudyRun) -> Table | None:
    """Mean bits per layer type of every candidate and budget beside the paper's."""
    if not study.tables.get("allocations"):
        return None
    kinds = [k for k in LAYER_TYPES if k in study.distinct("allocations", "layer_type")]
    kinds += [k for k in sorted(study.distinct("allocations", "layer_type")) if k not in kinds]
    columns = [Column("bits of", False), Column("budget"), *(Column(kind) for kind in kinds)]
    table = Table(f"Mean activation bits per layer type: {study.title}", columns)
    published = published_values()
    for budget in study.distinct("allocations", "budget"):
        mean = f"{float(budget):g}"
        paper = [published.get(f"bits-a{mean}-{kind}") for kind in kinds]
        if any(bits is not None for bits in paper):
            cells = [number_cell(bits, two) for bits in paper]
            table.rows.append([header_cell("the paper", sub="DiT-XL/2"), text_cell(mean), *cells])
        for candidate in study.distinct("allocations", "candidate"):
            means = type_means(study, candidate, budget)
            if means and candidate != UNIFORM:
                cells = [number_cell(means.get(kind), two, study.href) for kind in kinds]
                table.rows.append([header_cell(candidate), text_cell(mean), *cells])
    table.note = (
        "Means over layers, as in the paper; the budget is a mean weighted by MACs. Candidates "
        "that chose anew with every training seed are averaged over seeds."
    )
    return table


def solver_table(study: StudyRun) -> Table | None:
    """Objective above the optimum and seconds of every solver, at every budget."""
    rows = study.tables.get("solvers", [])
    if not rows:
        return None
    found = study.distinct("solvers", "budget")
    columns = [Column("solver", False)]
    for budget in found:
        note = f"mean of {float(budget):g} bits"
        columns += [Column("above optimum", note=note), Column("time", note=note)]
    layers = ", ".join(study.distinct("solvers", "layers"))
    table = Table(f"Solvers on the same sensitivities, {layers} layers: {study.title}", columns)
    for solver in study.distinct("solvers", "solver"):
        cells: list[Cell] = [header_cell(solver)]
        for budget in found:
            own = study.of("solvers", solver=solver, budget=budget)
            above = value(own[0], "above_optimum") if own else None
            seconds = value(own[0], "seconds") if own else None
            objective = value(own[0], "objective") if own else None
            sub = "" if objective is None else f"objective {three(objective)}"
            cells += [number_cell(above, _percent, study.href, sub)]
            cells += [number_cell(seconds, seconds_text)]
        table.rows.append(cells)
    table.note = "Times are of one solve each, with whatever else the machine did."
    return table


def timestep_table(study: StudyRun) -> Table | None:
    """Predicted objective with bits per timestep bucket beside one allocation for all."""
    rows = study.tables.get("timestep_aware", [])
    if not rows:
        return None
    columns = [
        Column("budget", False),
        Column("buckets"),
        Column("one allocation", note="predicted objective"),
        Column("by bucket", note="predicted objective"),
        Column("ratio"),
        Column("mean bits by bucket"),
    ]
    table = Table(f"Bits per timestep bucket, predicted only: {study.title}", columns)
    for row in rows:
        numbers = [
            number_cell(value(row, name), show)
            for name, show in (
                ("objective_single", three),
                ("objective_by_bucket", three),
                ("ratio", two),
                ("mean_bits_by_bucket", two),
            )
        ]
        head = header_cell(f"{float(row['budget']):g} bits")
        table.rows.append([head, text_cell(row["buckets"]), *numbers])
    return table


def _before(study: StudyRun, candidate: str) -> list[str]:
    """Candidates that the run names before this one."""
    names = candidates(study)
    return names[: names.index(candidate)] if candidate in names else []


def _mean_bits(study: StudyRun, candidate: str, budget: str) -> Cell:
    rows = study.of("trials", candidate=candidate, budget=budget)
    found = [v for row in rows if (v := value(row, "mean_bits")) is not None]
    return number_cell(sum(found) / len(found) if found else None, two)


def _target_cell(study: StudyRun, row: Row, target: str) -> Cell:
    ends = [value(row, f"{target}_{end}") for end in ("min", "max")]
    spread = "–".join(printed(target, end) for end in ends if end is not None)
    several = measured(study, row["candidate"], row["budget"], target)
    sub = f"[{spread}]" if spread and several and len(several.by_seed) > 1 else ""
    return number_cell(value(row, target), lambda v: printed(target, v), study.href, sub)


def _difference_cell(row: Row, target: str) -> Cell:
    if row["candidate"] == UNIFORM:
        return text_cell("–")
    return number_cell(value(row, f"{target}_vs_uniform"), lambda v: difference(target, v))


def _verdict_cell(rows: Sequence[Row]) -> Cell:
    if not rows:
        return MISSING
    verdict, ratio = against_uniform(rows[0]), value(rows[0], "ratio_of_means")
    tone = "verdict " + verdict.replace(" ", "-")
    return text_cell(verdict, tone=tone, sub="" if ratio is None else f"×{two(ratio)}")


def _percent(share: float) -> str:
    # A solver that sums in another order is a rounding error below the optimum.
    return "0 %" if abs(share) < 1e-12 else f"{three(100 * share)} %"
