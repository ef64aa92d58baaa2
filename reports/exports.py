"""The tidy tables that stand beside a report as CSV: every number of the runs at full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reports.loading import RunData
from reports.protocols import Group
from reports.settings import allocated, flatten
from reports.text import NOT_RUN

Lines = Iterable[Mapping[str, Any]]


def exports(groups: Sequence[Group], runs: Sequence[RunData]) -> dict[str, pd.DataFrame]:
    """Name -> table: metrics and summary of the protocols, and what each run recorded."""
    return {
        "metrics": pd.concat([_metrics(group) for group in groups]),
        "summary": pd.concat([_summary(group) for group in groups]),
        "allocation": _of_runs(runs, _allocation, "layer activation_bits macs"),
        "sensitivity": _of_runs(runs, _sensitivity, "layer activation_bits mse"),
        "training": training(runs),
        "accounting": _of_runs(runs, _accounting, "quantity value"),
        "real_images": _real_images(runs),
    }


def _real_images(runs: Sequence[RunData]) -> pd.DataFrame:
    """What real images scored in place of samples, as each run cites it."""
    skipped = ("key", "kind")
    lines = [
        {"run": run.id, **{k: v for k, v in record.items() if k not in skipped}}
        for run in runs
        for record in run.of_kind("floor")
    ]
    return pd.DataFrame(lines, columns=None if lines else ["run", "draw", "images", "num_images"])


def training(runs: Sequence[RunData]) -> pd.DataFrame:
    """Every logged training step of the runs."""
    columns = "step phase loss distillation_loss denoising_loss learning_rate grad_norm"
    return _of_runs(runs, lambda run: run.of_kind("train"), columns)


def _metrics(group: Group) -> pd.DataFrame:
    """`Group.values` with the protocol, in the order of the summary."""
    places = pd.MultiIndex.from_frame(group.values[["plan", "metric"]])
    protocol = {n: group.evaluation.get(n) for n in ("sampler", "sampling_steps", "cfg_scale")}
    frame = group.values.assign(workload=group.title, num_samples=group.num_samples, **protocol)
    frame = frame.iloc[group.summary.index.get_indexer(places).argsort(kind="stable")]
    columns = ["workload", *protocol, "num_samples", "plan", "subject", "seed", "seed_range"]
    return frame[[*columns, "metric", "value", "is_rank_deficient", "run"]]


def _summary(group: Group) -> pd.DataFrame:
    """Every plan and metric; `mean` says "not run" where there is none."""
    names = [[row.label for row in group.all_rows], group.metrics]
    every = pd.MultiIndex.from_product(names, names=["plan", "metric"])
    frame = group.summary.reindex(every).reset_index()
    frame["mean"] = frame["mean"].astype(object).where(frame["mean"].notna(), NOT_RUN)
    frame = frame.fillna({"values": 0, "training_seeds": 0})
    frame = frame.astype({"values": int, "training_seeds": int})
    frame = frame.assign(workload=group.title, num_samples=group.num_samples)
    columns = ["workload", "num_samples", "plan", "metric", "mean", "min", "max"]
    return frame[[*columns, "values", "training_seeds"]]


def _of_runs(
    runs: Sequence[RunData], lines: Callable[[RunData], Lines], columns: str
) -> pd.DataFrame:
    """One table of what all runs recorded; weight bits have a column where a run allocates them."""
    found = [
        {"run": run.id, "plan": run.plan_name, "seed": run.seed, **line}
        for run in runs
        for line in lines(run)
    ]
    extra = ["weight_bits"] * any("weight_bits" in line for line in found)
    return pd.DataFrame(found, columns=["run", "plan", "seed", *columns.split(), *extra])


def _allocation(run: RunData) -> Lines:
    record = run.first("allocation")
    for layer, bits in record.get("bits_by_layer", {}).items():
        macs = record.get("macs", {}).get(layer)
        yield {"layer": layer, f"{allocated(run.plan)}_bits": bits, "macs": macs}


def _sensitivity(run: RunData) -> Lines:
    for record in run.of_kind("sensitivity"):
        yield {**record, f"{allocated(run.plan)}_bits": record.get("bits")}


def _accounting(run: RunData) -> Lines:
    record = {k: v for k, v in run.first("accounting").items() if k not in ("key", "kind")}
    for scheme in record.pop("packing_table", []):
        record[f"packing.{scheme.get('packing')}.total_bytes"] = int(scheme["total_bytes"])
    for quantity, value in flatten(record).items():
        if isinstance(value, int | float | str):
            yield {"quantity": quantity, "value": value}
