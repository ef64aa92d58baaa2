"""Rows and figure of what `study efficiency` measures on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robuq_bench.cpu_figures import LIMITS, model_name
from robuq_bench.measuring.cpu import CpuTiming
from robuq_bench.measuring.statistics import median_interval, speedup_interval

Row = dict[str, Any]


def times_of(rows: Sequence[Row], times: Mapping[str, CpuTiming]) -> list[Row]:
    """`rows` with the columns of those that were timed."""
    found = []
    for row in rows:
        timing = times.get(row["implementation"])
        if timing is not None:
            low, high = median_interval(timing.wall)
            row = row | timing.wall.summary("ms")
            row |= {"median_ms_low": low * 1e3, "median_ms_high": high * 1e3}
            row |= {"processor_ms": timing.processor.median_s * 1e3}
        found.append(row)
    return found


def factors_of(facts: Row, rows: Sequence[Row], times: Mapping[str, CpuTiming]) -> list[Row]:
    """How many times as fast each packed model is as each other variant of its item."""
    packed = [row for row in rows if row["variant"].startswith("w1.58")]
    others = [row for row in rows if not row["variant"].startswith("w1.58")]
    return [
        facts
        | {"ours": ours["variant"], "instructions": ours["instructions"],
           "against": base["variant"]}
        | _factor(times[ours["implementation"]], times[base["implementation"]])
        for ours in packed
        for base in others
        if {ours["implementation"], base["implementation"]} <= times.keys()
    ]  # fmt: skip


def _factor(ours: CpuTiming, base: CpuTiming) -> Row:
    low, high = speedup_interval(ours.wall, base.wall, interleaved=True)
    return {
        "factor": base.wall.median_s / ours.wall.median_s,
        "factor_low": low,
        "factor_high": high,
        "factor_in_processor_time": base.processor.median_s / ours.processor.median_s,
        "rounds": len(ours.wall.rounds_s),
    }


def speeds(factors: Sequence[Row]) -> list[Row]:
    """Times as fast as each baseline, a column for each."""
    if not factors:
        return []
    rows = ["scope", "model", "batch", "threads", "ours", "instructions"]
    wide = pd.DataFrame(factors).pivot_table("factor", rows, "against", sort=False)
    records = wide.reset_index().to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in records]


def answer(factors: Sequence[Row]) -> str:
    """A sentence on the packed steps of the last model: the range beside each baseline."""
    steps = [row for row in factors if row["scope"] == "step"]
    if not steps:
        return "No packed step was timed on a CPU."
    frame = pd.DataFrame([row for row in steps if row["model"] == steps[-1]["model"]])
    ranges = frame.groupby("against", sort=False)["factor"].agg(["min", "max"])
    parts = [
        f"{low:.2f}× to {high:.2f}× as fast as {name}" for name, low, high in ranges.itertuples()
    ]
    device, model = steps[0]["device_name"], model_name(steps[-1]["model"])
    return f"On {device}, a step of {model} packed as W1.58 is {', '.join(parts)}."


def cpu_shown(factors: Sequence[Row]) -> list[Row]:
    """What is printed: steps, with the columns that a screen has room for."""
    columns = ("model", "batch", "threads", "ours", "instructions", "against", *LIMITS)
    steps = [row for row in factors if row["scope"] == "step"]
    return [{name: row[name] for name in columns} for row in steps]
