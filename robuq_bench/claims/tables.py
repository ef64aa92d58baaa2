"""Judged claims as tables: the committed CSV, and the curves over budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from robuq_bench.claims.history import last_commit
from robuq_bench.claims.judged import NEAR_TEACHER, Judged
from robuq_bench.claims.judging import Runs, shares_images
from robuq_bench.claims.measured import TEACHER, Measured
from robuq_bench.claims.planning import Cell
from robuq_bench.config import training_steps
from robuq_bench.files import sha256_file
from robuq_bench.statistics.comparisons import judge_contrast
from robuq_bench.statistics.metrics import find_metric, lower_is_better

_BASELINE = "its teacher"  # which is the name of no arm


def claims_rows(judged: Iterable[Judged], path: Path) -> list[dict[str, Any]]:
    """One row per claim, workload and budget: what README and documents quote.

    `claims_sha256` is of the file of claims, and `claims_commit` the commit that last changed it.
    """
    digest, commit = sha256_file(path), last_commit(path)
    return [
        {
            "claim": one.key,
            "text": one.text,
            "workload": one.workload,
            "steps": one.steps or None,
            "family": one.family,
            "metric": one.metric,
            "contrast": one.contrast,
            "effect": one.verdict.effect,
            "low": one.verdict.low,
            "high": one.verdict.high,
            "confidence": one.verdict.confidence,
            "n": one.verdict.n,
            "n_of": one.verdict.n_of,
            "verdict": one.verdict.verdict,
            "expected": one.expect,
            "holds": one.holds,
            "p_value": one.verdict.p_value,
            "p_adjusted": one.verdict.p_adjusted,
            "detectable": one.verdict.detectable,
            "test": one.verdict.test,
            "note": one.verdict.note,
            "cpu_hours": None if one.cpu_hours is None else round(one.cpu_hours, 4),
            "runs": " ".join(one.runs),
            "code_commits": " ".join(one.commits),
            "declared": one.declared,
            "claims_sha256": digest,
            "claims_commit": commit,
        }
        for one in judged
    ]


def teacher_curves(runs: Runs) -> pd.DataFrame:
    """Arm beside its teacher at every budget of the claims that have several.

    Columns workload, arm, metric, steps, ratio (of geometric means, arm ÷ teacher), low and high
    (its interval over training seeds; absent of one seed), seeds.
    """
    declared = runs.planner.declared
    places = {
        (workload, arm, claim.metric): None
        for claim in declared.claims.values()
        if len(claim.budgets) > 1 and claim.difference_margin is None
        for workload in claim.workloads
        for arm in claim.weights
    }
    rows = []
    for workload, arm, asked in places:
        cells = {
            Cell(workload, arm, steps, seed)
            for claim in declared.claims.values()
            if arm in claim.weights and workload in claim.workloads and claim.metric == asked
            for steps in claim.budgets
            for seed in claim.seeds
        }
        by_steps: dict[int, dict[Cell, Measured]] = {}
        for cell in sorted(cells, key=dataclasses.astuple):
            run = runs.of(cell)
            config = runs.planner.config(cell)
            if run is not None and not config.plan.is_full_precision:
                by_steps.setdefault(training_steps(config), {})[cell] = run
        for steps, measured in sorted(by_steps.items()):
            shared = shares_images(map(runs.planner.config, measured))
            row = _beside_teacher(arm, asked, measured, shared)
            if row is not None:
                rows.append({"workload": workload, "arm": arm, **row, "steps": steps})
    columns = ["workload", "arm", "metric", "steps", "ratio", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _beside_teacher(
    arm: str, asked: str, measured: dict[Cell, Measured], shared_ranges: bool
) -> dict[str, Any] | None:
    """Ratio and interval of one budget; None where the runs hold none, as of values below 0."""
    metric = find_metric(asked, next(iter(measured.values())).metrics())
    lines = [
        (_BASELINE if who == TEACHER else arm, cell.seed, image_range, value)
        for cell, run in measured.items()
        for who, image_range, name, value in run.lines
        if name == metric
    ]
    values = pd.DataFrame(lines, columns=["plan", "seed", "image_range", "value"])
    if metric is None or _BASELINE not in set(values["plan"]):
        return None
    if not (values["value"] > 0).all():
        return None
    found = judge_contrast(
        values,
        {arm: 1.0, _BASELINE: -1.0},
        metric,
        lower_is_better=lower_is_better(metric),
        shared_ranges=shared_ranges,
    )
    numbers = {"ratio": found.effect, "low": found.low, "high": found.high}
    return {"metric": metric, **numbers, "seeds": found.n}


def steps_to_teacher(curves: pd.DataFrame, within: float = NEAR_TEACHER) -> pd.DataFrame:
    """Steps at which each arm's ratio to its teacher first falls to `within`.

    Between two budgets the logarithm of the ratio is taken for linear in that of the steps.
    Columns workload, arm, metric, steps, and relation: "about" between budgets, "at most" where the
    least budget is within already, "more than" where the greatest is not.
    """
    rows = []
    keys = ["workload", "arm", "metric"]
    for key, own in curves.groupby(keys, sort=False):
        points = own.sort_values("steps")[["steps", "ratio"]].to_numpy(float).tolist()
        relation, steps = _crossing(points, within)
        rows.append({**dict(zip(keys, key, strict=True)), "relation": relation, "steps": steps})
    return pd.DataFrame(rows, columns=[*keys, "relation", "steps"])


def _crossing(points: Sequence[Sequence[float]], within: float) -> tuple[str, float]:
    if points[0][1] <= within:
        return "at most", points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= within:
            share = math.log(high / within) / math.log(high / low)
            return "about", before * (after / before) ** share
    return "more than", points[-1][0]
