"""What a run of `study kernels` says of the kernels on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robuq_bench.statistics.verdicts import Verdict
from studies.kernels.cases import MATMUL, QUANTIZE
from studies.kernels.cpu_tables import COMPILED, INT_MM
from studies.kernels.peers import BF16, FP32
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
    frame = pd.DataFrame(rows)
    ours = frame[frame["implementation"].str.startswith((COMPILED, INT_MM))]
    found = []
    for name, label in ((COMPILED, "compiled"), (INT_MM, INT_MM)):
        own = ours[ours["implementation"].str.startswith(name) & ours["correct"].notna()]
        found += [
            of_kernel(str(kernel), calls, f"on {device} ({label})")
            for kernel, calls in own.groupby("kernel", sort=False)
        ]
    return [*found, *(of_cpu_target(target, frame) for target in TARGETS)]


def of_cpu_target(target: CpuTarget, frame: pd.DataFrame) -> Verdict:
    """A target judged on the call whose interval decides: every call that it names must meet it."""
    named = frame[
        (frame["kernel"] == target.kernel)
        & (frame["model"] == "XL")
        & frame["layer"].isin(target.layers)
        & (frame["threads"] == 1)
    ]
    calls = named[named["implementation"].str.startswith(COMPILED)]
    calls = calls[calls["implementation"] == calls["implementation"].iloc[:1].squeeze()]
    if target.column not in calls or set(calls["layer"]) != {*target.layers}:
        return _verdict(target, "not judged", None, "DiT-XL/2 was not timed on one thread")
    if calls[f"{target.column}_low"].isna().any():
        missing = calls[calls[f"{target.column}_low"].isna()].iloc[0]
        return _verdict(target, "not judged", None, f"{missing['layer']}: {missing['status']}")
    low, high = calls[f"{target.column}_low"], calls[f"{target.column}_high"]
    if (high < target.bound).any():
        return _verdict(target, "does not hold", calls.loc[high.idxmin()])
    word = "holds" if (low >= target.bound).all() else "undecided"
    return _verdict(target, word, calls.loc[low.idxmin()])


def _verdict(target: CpuTarget, word: str, row: Any, note: str = "") -> Verdict:
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
