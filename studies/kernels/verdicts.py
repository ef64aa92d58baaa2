"""What a run of `study kernels` says of each kernel, and of this project's targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robuq_bench.statistics.verdicts import Verdict
from studies.kernels.cases import GROUPED, MATMUL, OURS, QUANTIZE

Row = dict[str, Any]
SHARE, SPEEDUP, MEDIAN = "share_of_ceiling", "speedup_over_cublas_bf16", "median_us"
NAMES = {
    SHARE: "share of the measured ceiling",
    SPEEDUP: "speed over cuBLAS bf16",
    MEDIAN: "median time in µs",
}
NEEDS_GPU = "needs a CUDA device"
INTERPRETED = "in Triton’s interpreter"


@dataclass(frozen=True)
class Target:
    """What this project set itself for DiT-XL/2; the paper states nothing per kernel.

    `tokens`: of exactly so many rows, or of any number where None. `width`: of this, or any.
    """

    claim: str
    kernel: str
    layers: tuple[str, ...]
    column: str
    bound: float
    tokens: int | None = None
    width: int | None = None

    @property
    def is_upper(self) -> bool:
        """Whether the value must not exceed the bound."""
        return self.column == MEDIAN


TARGETS = (
    Target(
        "LayerNorm + modulate + Hadamard(1152) + quantize: at least 80 % of copy bandwidth",
        QUANTIZE, ("qkv and fc1 input",), SHARE, 0.80, 32768, 1152,
    ),
    Target(
        "Hadamard(4608) + quantize: at least 75 % of copy bandwidth",
        QUANTIZE, ("fc2 input",), SHARE, 0.75, 32768, 4608,
    ),
    Target(
        "fc1 and fc2 at 32,768 tokens: at least 1.7 times as fast as cuBLAS bf16",
        MATMUL, ("fc1", "fc2"), SPEEDUP, 1.7, 32768,
    ),
    Target(
        "fc1 and fc2 at 512 tokens: at least 1.5 times as fast as cuBLAS bf16",
        MATMUL, ("fc1", "fc2"), SPEEDUP, 1.5, 512,
    ),
    Target(
        "adaLN of all blocks in one call: at most 25 µs",
        GROUPED, ("adaLN of all blocks",), MEDIAN, 25.0, None, 1152,
    ),
)  # fmt: skip


def verdicts(rows: Sequence[Row], roofline: Sequence[Row], device: str = "") -> list[Verdict]:
    """Every kernel's, then every target's.

    Args:
        rows: of the table `kernels`, or of `kernel_checks` without a device.
        roofline: of the table of that name; says which batches can meet a target at all.
        device: what the times are of.
    """
    ours = [row for row in rows if row.get("implementation", OURS) == OURS]
    where = f"on {device}" if device else INTERPRETED
    found = pd.DataFrame(ours).groupby("kernel", sort=False)
    correct = [of_kernel(str(kernel), own, where) for kernel, own in found]
    return [*correct, *(of_target(target, ours, roofline, device) for target in TARGETS)]


def of_kernel(kernel: str, calls: pd.DataFrame, where: str) -> Verdict:
    """Whether all calls of a kernel (rows of `correct`, `max_error`, `status`) are right."""
    wrong = calls[~calls["correct"].astype(bool)]
    errors = (calls if wrong.empty else wrong)["max_error"].dropna().astype(float)
    note = f"{len(wrong)} calls fail; the first: {wrong['status'].iloc[0]}" if len(wrong) else ""
    return Verdict(
        claim=f"{kernel} agrees with plain PyTorch {where}",
        subject=kernel,
        verdict="does not hold" if len(wrong) else "holds",
        effect=None if errors.empty else float(errors.max()),
        effect_name="largest deviation over what is allowed",
        low=None,
        high=None,
        n=len(calls),
        n_of="calls",
        test="comparison with plain PyTorch on the same inputs",
        p_value=None,
        note=note,
    )


def of_target(target: Target, ours: Sequence[Row], roofline: Sequence[Row], device: str) -> Verdict:
    """A target judged on the call whose interval decides: every call that it names must meet it."""
    if not device:
        return _verdict(target, "not judged", None, NEEDS_GPU)
    calls = [row for row in ours if _is_named(target, row, roofline)]
    reason = _not_judged(target, calls, device)
    if reason:
        return _verdict(target, "not judged", None, reason)
    low, high = f"{target.column}_low", f"{target.column}_high"
    if target.is_upper:
        doubtful = max(calls, key=lambda row: row[high])
        missing = max(calls, key=lambda row: row[low])
        is_met, is_missed = doubtful[high] <= target.bound, missing[low] > target.bound
    else:
        doubtful = min(calls, key=lambda row: row[low])
        missing = min(calls, key=lambda row: row[high])
        is_met, is_missed = doubtful[low] >= target.bound, missing[high] < target.bound
    if any(row["stability"] == "unstable" for row in calls):
        return _verdict(target, "undecided", doubtful, "unstable timing")
    if is_missed:
        return _verdict(target, "does not hold", missing)
    return _verdict(target, "holds" if is_met else "undecided", doubtful)


def _is_named(target: Target, row: Row, roofline: Sequence[Row]) -> bool:
    """Whether a call is the target's; of times, where the peaks of an H100 allow them at all."""
    same = ("kernel", "model", "layer", "images")
    least = [
        sheet["least_us"]
        for sheet in roofline
        if sheet["device"].startswith("H100") and all(sheet[name] == row[name] for name in same)
    ]
    return (
        row["kernel"] == target.kernel
        and row["model"] == "XL"
        and row["layer"] in target.layers
        and target.tokens in (None, row["rows"])
        and target.width in (None, row["width"])
        and not (target.is_upper and any(time > target.bound for time in least))
    )


def _not_judged(target: Target, calls: Sequence[Row], device: str) -> str:
    """Why a target cannot be judged, "" where it can."""
    if {row["layer"] for row in calls} != set(target.layers):
        return "DiT-XL/2 was not timed at these sizes"
    if target.is_upper and "H100" not in device:
        return f"set for an H100; this is {device}"
    for row in calls:
        if row["status"] != "ok":
            return f"{row['layer']}: {row['status']}"
        if row.get(target.column) is None:
            return f"{row['layer']}: its baseline or ceiling has no time"
        if row.get(f"{target.column}_low") is None:
            return f"{row['layer']}: measured by older code, without an interval"
    return ""


def _verdict(target: Target, word: str, row: Row | None, note: str = "") -> Verdict:
    if row is not None:
        note = "; ".join(filter(None, [f"{row['layer']}, {row['rows']:,} rows", note]))
    return Verdict(
        claim=target.claim,
        subject=target.kernel,
        verdict=word,
        effect=None if row is None else row[target.column],
        effect_name=NAMES[target.column],
        low=None if row is None else row[f"{target.column}_low"],
        high=None if row is None else row[f"{target.column}_high"],
        n=0 if row is None else row["rounds"],
        n_of="interleaved rounds",
        test="none" if row is None else "t interval over rounds",
        p_value=None,
        note=note,
    )
