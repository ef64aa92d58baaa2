"""What a run of `study kernels` says of the kernels on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robuq_bench.statistics.verdicts import Verdict
from studies.kernels.cases import BF16, COMPILED, FP32, INT_MM, MATMUL, QUANTIZE
from studies.kernels.verdicts import of_kernel

Row = dict[str, Any]
WORK = ("qkv", "proj", "fc1", "fc2")
CPU_RULE = (
    "On a CPU a kernel holds where every call agrees with plain PyTorch in float32. Targets there "
    "are of DiT-XL/2 on one thread, with the best instruction set of the run: at least twice as "
    "fast as float32, as fast as bfloat16, and half of the peak measured in the same session. They "
    "are judged by 95 % t intervals over rounds in which all take turns: a target holds where the "
    "whole interval of every call that it names meets it, does not hold where one call’s lies "
    "wholly beyond, and is undecided otherwise."
)


@dataclass(frozen=True)
class CpuTarget:
    """What the compiled kernels are to reach for DiT-XL/2 on one thread: `column` ≥ `bound`."""

    claim: str
    kernel: str
    layers: tuple[str, ...]
    column: str
    bound: float
    name: str


_CALLS = "qkv, proj, fc1 and fc2 of DiT-XL/2 on one thread"
TARGETS = (
    CpuTarget(f"{_CALLS}: at least twice as fast as {FP32}", MATMUL, WORK,
              "speedup", 2.0, f"speed over {FP32}"),
    CpuTarget(f"{_CALLS}: at least as fast as {BF16}", MATMUL, WORK,
              "speedup_over_bf16", 1.0, f"speed over {BF16}"),
    CpuTarget(f"{_CALLS}: at least half of the instruction set’s peak", MATMUL, WORK,
              "share_of_peak", 0.5, "share of the measured peak"),
    CpuTarget("Hadamard(4608) + quantize on one thread: at least half of copy bandwidth", QUANTIZE,
              ("fc2 input",), "share_of_peak", 0.5, "share of the measured copy bandwidth"),
)  # fmt: skip


def cpu_verdicts(rows: Sequence[Row], device: str) -> list[Verdict]:
    """Whether each kernel is right here, then every target; none of a run without times.

    Args:
        rows: of the table `cpu_kernels`.
        device: the CPU.
    """
    if not rows:
        return []
    found = []
    for name, label in ((COMPILED, "compiled"), (INT_MM, INT_MM)):
        own = [r for r in rows if r["implementation"].startswith(name) and r["correct"] is not None]
        by_kernel = pd.DataFrame(own).groupby("kernel", sort=False) if own else ()
        found += [of_kernel(str(kernel), c, f"on {device} ({label})") for kernel, c in by_kernel]
    return [*found, *(of_cpu_target(target, rows) for target in TARGETS)]


def of_cpu_target(target: CpuTarget, rows: Sequence[Row]) -> Verdict:
    """A target judged on the call whose interval decides: every call that it names must meet it."""
    ours = [row for row in rows if row["implementation"].startswith(COMPILED)]
    best = ours[0]["implementation"] if ours else ""  # sets come best first
    calls = [
        row
        for row in ours
        if (row["implementation"], row["kernel"], row["model"], row["threads"])
        == (best, target.kernel, "XL", 1)
        and row["layer"] in target.layers
    ]
    if {row["layer"] for row in calls} != {*target.layers}:
        return _verdict(target, "not judged", None, "DiT-XL/2 was not timed on one thread")
    low, high = f"{target.column}_low", f"{target.column}_high"
    for row in calls:
        if row.get(low) is None:
            why = "its baseline has no time" if row["status"] == "ok" else row["status"]
            return _verdict(target, "not judged", None, f"{row['layer']}: {why}")
    missing = min(calls, key=lambda row: row[high])
    if missing[high] < target.bound:
        return _verdict(target, "does not hold", missing)
    doubtful = min(calls, key=lambda row: row[low])
    return _verdict(target, "holds" if doubtful[low] >= target.bound else "undecided", doubtful)


def _verdict(target: CpuTarget, word: str, row: Row | None, note: str = "") -> Verdict:
    if row is not None:
        note = f"{row['layer']}, {row['rows']:,} rows, {row['implementation']}"
    return Verdict(
        claim=target.claim,
        subject=target.kernel,
        verdict=word,
        effect=None if row is None else float(row[target.column]),
        effect_name=target.name,
        low=None if row is None else float(row[f"{target.column}_low"]),
        high=None if row is None else float(row[f"{target.column}_high"]),
        n=0 if row is None else int(row["rounds"]),
        n_of="rounds in turns",
        test="none" if row is None else "t interval over rounds",
        p_value=None,
        note=note,
    )
