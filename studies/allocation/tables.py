"""Tables of `study allocation`: solvers, fronts, trained candidates, verdicts."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any

import numpy as np
import pandas as pd

from robuq_bench.allocation import (
    SOLVERS,
    Allocation,
    TableTooLargeError,
    allocation_problem,
    allocation_table,
    expand_over_buckets,
    mac_cost,
    mean_bits_by_type,
    save_allocation,
    sensitivities_sha256,
    solve,
)
from robuq_bench.config import Config
from robuq_bench.files import make_folder
from robuq_bench.normality.summaries import block_of
from robuq_bench.quantization.convert import layer_type
from robuq_bench.runs.run import Run
from robuq_bench.statistics.comparisons import compare_plans, judge_family
from robuq_bench.statistics.verdicts import Verdict, no_verdict, verdict_rows
from robuq_bench.trials import TARGETS, metric_key
from studies.allocation.settings import CANDIDATES, Settings

#: Candidate -> (metric, whether it is measured after the warm-up).
SOURCES = {
    "ptq": ("epsilon_mse", False),
    "qat": ("epsilon_mse", True),
    "qat-teacher": ("epsilon_mse_teacher", True),
    "output-mse": ("output_mse", False),
    "fisher": ("fisher", False),
}
logger = logging.getLogger(__name__)

JUDGED = ("distillation_loss", "fid")

Table = dict[str, dict[int, float]]
Gains = dict[tuple[str, float], float | None]


def write_allocations(
    run: Run,
    chosen: dict[tuple[str, float], Allocation],
    tables: dict[str, Table],
    trials: list[dict[str, Any]],
) -> None:
    """Allocation files that any plan can load, and one table of all bits."""
    make_folder(run.path / "allocations")
    rows = []
    for (candidate, budget), allocation in chosen.items():
        metric = SOURCES[candidate][0] if candidate in SOURCES else "none"
        save_allocation(
            run.path / "allocations" / f"{candidate}-{budget:g}.toml",
            allocation,
            metric=metric,
            solver=str(allocation.solver),
            sensitivities_sha256=sensitivities_sha256(tables.get(candidate, tables["qat"])),
        )
        rows += _bit_rows(candidate, budget, "all", allocation.bits_by_layer)
    for trial in trials:
        if trial["candidate"] == "resolved":
            rows += _bit_rows("resolved", trial["budget"], trial["seed"], trial["bits_by_layer"])
    run.write_table("allocations", rows)
    by_type = []
    for (candidate, budget), allocation in chosen.items():
        means = mean_bits_by_type(allocation.bits_by_layer)
        by_type.append({"candidate": candidate, "budget": budget, **means})
    run.write_table("by_type", by_type)


def _bit_rows(
    candidate: str, budget: float, seed: int | str, bits: dict[str, int]
) -> list[dict[str, Any]]:
    return [
        {
            "candidate": candidate,
            "budget": budget,
            "seed": seed,
            "layer": layer,
            "layer_type": layer_type(layer),
            "block": block_of(layer),
            "bits": value,
        }
        for layer, value in bits.items()
    ]


def solver_rows(
    config: Config, tables: dict[str, Table], macs: dict[str, int]
) -> list[dict[str, Any]]:
    """Every solver on the `qat` sensitivities: objective, gap to the optimum, seconds."""
    options = config.settings_of(Settings)
    rows = []
    for budget in options.budgets:
        problem = allocation_problem(tables["qat"], macs, [mac_cost(macs, budget)])
        best = solve(problem, "exact").objective
        for name in SOLVERS:
            start = time.perf_counter()
            found = solve(problem, name, seed=config.seed)
            if found.solver != name:
                continue  # the one that took its place has its own row
            rows.append(
                {
                    "budget": budget,
                    "solver": name,
                    "objective": found.objective,
                    "above_optimum": found.objective / best - 1 if best > 0 else 0.0,
                    "mean_bits": found.mean_bits,
                    "layers": len(macs),
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def front_rows(
    config: Config, tables: dict[str, Table], macs: dict[str, int]
) -> list[dict[str, Any]]:
    """The whole Pareto front of every source; of a table too large, its points at the budgets."""
    options = config.settings_of(Settings)
    rows = []
    for name, table in tables.items():
        try:
            means, objectives = allocation_table(table, macs, options.choices).pareto()
        except TableTooLargeError as error:
            logger.warning("%s. The front of %s has the study's budgets alone", error, name)
            found = [
                solve(allocation_problem(table, macs, [mac_cost(macs, budget)]), "milp")
                for budget in options.budgets
            ]
            means = np.array([allocation.mean_bits for allocation in found])
            objectives = np.array([allocation.objective for allocation in found])
        for mean, objective in zip(means, objectives, strict=True):
            rows.append({"source": name, "mean_bits": float(mean), "objective": float(objective)})
    return rows


def bucket_rows(
    config: Config, buckets: dict[str, Table], macs: dict[str, int]
) -> list[dict[str, Any]]:
    """Predicted objective with bits per timestep bucket beside one allocation for all."""
    options = config.settings_of(Settings)
    steps = dict.fromkeys(buckets, 1)
    mean: Table = {
        layer: {
            bits: float(np.mean([table[layer][bits] for table in buckets.values()]))
            for bits in options.choices
        }
        for layer in macs
    }
    rows = []
    for budget in options.budgets:
        single = solve(allocation_problem(mean, macs, [mac_cost(macs, budget)]), "exact")
        expanded = expand_over_buckets(buckets, macs, [mac_cost(macs, budget)], steps)
        aware = solve(allocation_problem(*expanded), "exact")
        rows.append(
            {
                "budget": budget,
                "buckets": len(buckets),
                "objective_single": single.objective,
                "objective_by_bucket": aware.objective,
                "ratio": aware.objective / single.objective if single.objective > 0 else None,
                "mean_bits_by_bucket": aware.mean_bits,
            }
        )
    return rows


def write_comparison(
    run: Run, trials: list[dict[str, Any]], gains: Gains, rule: str
) -> list[dict[str, Any]]:
    """Write the trained networks, the candidates' summary and the verdicts; return the summary.

    `gains` are headrooms by candidate and budget, `rule` is what verdicts are given by, as text.
    """
    # Shards finish in any order.
    trials = sorted(
        trials, key=lambda t: (t["budget"], CANDIDATES.index(t["candidate"]), t["seed"])
    )
    run.write_table("trials", trial_rows(trials))
    summary = candidate_rows(trials, gains)
    run.write_table("candidates", summary)
    verdicts = judge(trials, summary)
    if verdicts:
        run.write_table("verdicts", verdict_rows(verdicts, rule))
    return summary


def judge(trials: list[dict[str, Any]], summary: list[dict[str, Any]]) -> list[Verdict]:
    """Compare candidates with uniform, and AMPN with bits chosen before training, as one family.

    AMPN beside uniform comes first; `subject` is "candidate over baseline, budget bits, metric".
    Notes hold the candidate's headroom and regret from `summary`.
    """
    notes: dict[tuple[Any, Any], str] = {
        (row["candidate"], row["budget"]): _gain_note(row) for row in summary
    }
    metrics = [name for target in JUDGED if (name := metric_key(trials[0], target))]
    frame = pd.DataFrame(trials).rename(columns={"candidate": "plan"}).assign(image_range=0)
    names = sorted(frame["plan"].unique(), key=CANDIDATES.index)
    pairs = [(name, "uniform") for name in names if name != "uniform"]
    pairs.sort(key=lambda pair: pair[0] != "qat")
    if {"qat", "ptq"} <= {*names}:
        pairs.append(("qat", "ptq"))
    return judge_family(
        [
            _noted(
                _compare(own.assign(value=own[metric]), candidate, baseline, metric),
                notes[candidate, budget],
                claim=f"{metric} of {candidate} differs from that of {baseline} at a mean of "
                f"{budget:g} bits",
                subject=f"{candidate} over {baseline}, {budget:g} bits, {metric}",
            )
            for candidate, baseline in pairs
            for budget, own in frame.groupby("budget")
            for metric in metrics
        ]
    )


def _noted(verdict: Verdict, note: str, **fields: Any) -> Verdict:
    """The verdict with other fields, its note followed by `note`."""
    notes = "; ".join(filter(None, [verdict.note, note]))
    return dataclasses.replace(verdict, **fields, note=notes)


def _gain_note(row: dict[str, Any]) -> str:
    """A candidate's headroom and regret in words."""
    found = {"headroom": row.get("headroom"), "regret": row.get(f"{JUDGED[0]}_regret")}
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None)


def _compare(values: pd.DataFrame, candidate: str, baseline: str, metric: str) -> Verdict:
    """`compare_plans`; not judged where training diverged, which leaving out would hide."""
    own = values[values["plan"].isin([candidate, baseline])]
    is_sound = np.isfinite(own["value"]) & (own["value"] > 0)
    if is_sound.all():
        return compare_plans(values, candidate, baseline, metric)
    bad = [f"{row.plan} seed {row.seed}" for row in own[~is_sound].itertuples()]
    name, note = f"ratio of geometric means of {metric}", f"not a number above 0: {', '.join(bad)}"
    return no_verdict("", "", name, note, n=own["seed"].nunique())


def trial_rows(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per trained network."""
    rows = []
    for trial in trials:
        row = {name: trial[name] for name in ("candidate", "budget", "seed", "mean_bits")}
        for target in TARGETS:
            name = metric_key(trial, target)
            if name is not None:
                row[name] = trial[name]
        rows.append(row)
    return rows


def candidate_rows(trials: list[dict[str, Any]], gains: Gains) -> list[dict[str, Any]]:
    """Mean and range over seeds of every candidate, and the mean paired difference to uniform.

    `headroom` is what the candidate's sensitivities predict of uniform bits over its own, and
    `<target>_regret` its mean over the least mean of any candidate at the budget.
    """
    rows: list[dict[str, Any]] = []
    for budget in dict.fromkeys(trial["budget"] for trial in trials):
        for candidate in dict.fromkeys(trial["candidate"] for trial in trials):
            row: dict[str, Any] = {"budget": budget, "candidate": candidate}
            row["headroom"] = gains.get((candidate, budget))
            for target in TARGETS:
                own = _values(trials, candidate, budget, target)
                base = _values(trials, "uniform", budget, target)
                if not own:
                    continue
                row["seeds"] = len(own)
                row[target] = float(np.mean(list(own.values())))
                row[f"{target}_min"] = min(own.values())
                row[f"{target}_max"] = max(own.values())
                paired = [own[seed] - base[seed] for seed in own if seed in base]
                if paired and candidate != "uniform":
                    row[f"{target}_vs_uniform"] = float(np.mean(paired))
            rows.append(row)
    for row in rows:
        for target in JUDGED:
            means = [r[target] for r in rows if r["budget"] == row["budget"] and target in r]
            least = min(filter(math.isfinite, means), default=0.0)
            if least > 0 and math.isfinite(row.get(target, math.nan)):
                row[f"{target}_regret"] = row[target] / least
    return rows


def _values(
    trials: list[dict[str, Any]], candidate: str, budget: float, target: str
) -> dict[int, float]:
    """{seed: value} of one candidate at one budget."""
    found = {}
    for trial in trials:
        if trial["candidate"] == candidate and trial["budget"] == budget:
            name = metric_key(trial, target)
            if name is not None:
                found[trial["seed"]] = trial[name]
    return found
