"""Rows of the tables of `study kernels`."""

from __future__ import annotations

from typing import Any

from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.measuring.roofline import DATA_SHEETS, least_seconds
from robuq_bench.measuring.statistics import (
    Timing,
    compare,
    median_interval,
    speedup_interval,
)
from studies.kernels.cases import OURS, Case
from studies.kernels.checks import Check
from studies.kernels.peers import BASELINE

MODEL = "model, not measured"


def settings_of(case: Case, options: Any) -> str:
    """The batches of the config that this shape belongs to, e.g. "batch 32 guided, 64"."""
    if case.images == 0:
        return "any batch"
    found = []
    if "on" in options.guidance:
        found += [f"{b} guided" for b in options.batches if 2 * b == case.images]
    if "off" in options.guidance:
        found += [str(b) for b in options.batches if b == case.images]
    return f"batch {', '.join(found)}"


def roofline_rows(case: Case) -> list[dict[str, Any]]:
    """Least times on the devices of the data sheets, beside those of the layer in bf16."""
    rows = []
    for peaks in DATA_SHEETS:
        seconds, limit = _least_seconds(case, peaks.bytes_s, peaks.int8, peaks.bf16)
        row: dict[str, Any] = {
            "basis": MODEL,
            "device": peaks.name,
            "peaks": f"{peaks.bytes_s / 1e12:g} TB/s, bf16 {peaks.bf16 / 1e12:g}, "
            f"int8 {peaks.int8 / 1e12:g} TOPS",
            "source": peaks.source,
            **case.facts,
            "bytes": case.moved_bytes,
            "operations": case.operations or None,
            "branch_operations": case.branch_operations or None,
            "least_us": seconds * 1e6,
            "limit": limit,
            "bf16_least_us": None,
            "bf16_over_ternary": None,
        }
        if case.is_product:
            dense, _ = least_seconds(
                case.product.full_precision_bytes, case.operations, peaks.bytes_s, peaks.bf16
            )
            row |= {"bf16_least_us": dense * 1e6, "bf16_over_ternary": dense / seconds}
        rows.append(row)
    return rows


def _least_seconds(case: Case, bytes_s: float, int8: float, bf16: float) -> tuple[float, str]:
    """`least_seconds` with the low-rank branch, whose 16-bit operations count as 8-bit ones."""
    operations = case.operations + case.branch_operations * int8 / bf16
    return least_seconds(case.moved_bytes, operations, bytes_s, int8)


def rows_of(
    case: Case,
    found: Check,
    status: dict[str, str],
    times: dict[str, Timing],
    ceilings: Ceilings,
    variant: str | None = None,
) -> list[dict[str, Any]]:
    """One row per implementation; numbers only where it was timed."""
    rows = []
    baseline = times.get(BASELINE)
    for name, state in status.items():
        is_ours = name == OURS
        row: dict[str, Any] = {
            **case.facts,
            "implementation": name,
            "status": state,
            "correct": found.correct if is_ours else (True if name in times else None),
            "max_error": found.max_error if is_ours else None,
            "variant": variant if is_ours else None,
        }
        timing = times.get(name)
        if timing is not None and not (is_ours and not found.correct):
            row |= timing.summary("us")
            row |= achieved(case, name, timing, ceilings)
            if baseline is not None and name != BASELINE:
                verdict = compare(timing.samples_s, baseline.samples_s)
                low, high = speedup_interval(timing, baseline, interleaved=True)
                row |= {
                    "speedup_over_cublas_bf16": verdict.speedup,
                    "speedup_over_cublas_bf16_low": low,
                    "speedup_over_cublas_bf16_high": high,
                    "p_value": verdict.p_value,
                    "verdict": verdict.verdict,
                }
        rows.append(row)
    return rows


def achieved(case: Case, name: str, timing: Timing, ceilings: Ceilings) -> dict[str, Any]:
    """Bandwidth and rate, and the least time by the measured ceilings over the median."""
    is_bf16 = name == BASELINE
    moved = case.product.full_precision_bytes if is_bf16 else case.moved_bytes
    fast_s, slow_s = median_interval(timing)
    result: dict[str, Any] = {
        **ceilings.row(),
        "median_us_low": fast_s * 1e6,
        "median_us_high": slow_s * 1e6,
        "gb_s": moved / timing.median_s / 1e9 if name in (OURS, BASELINE) else None,
        "tflop_s": case.operations / timing.median_s / 1e12 if case.operations else None,
        "limit": None,
        "share_of_ceiling": None,
        "share_of_ceiling_low": None,
        "share_of_ceiling_high": None,
    }
    # Without an 8-bit product nothing runs at the 8-bit rate.
    rate = ceilings.bf16_ops_s if is_bf16 or not case.operations else ceilings.int8_ops_s
    if rate is not None and name in (OURS, BASELINE):
        if is_bf16:
            least, limit = least_seconds(moved, case.operations, ceilings.copy_bytes_s, rate)
        else:
            least, limit = _least_seconds(case, ceilings.copy_bytes_s, rate, ceilings.bf16_ops_s)
        result |= {
            "limit": limit,
            "share_of_ceiling": least / timing.median_s,
            "share_of_ceiling_low": least / slow_s,
            "share_of_ceiling_high": least / fast_s,
        }
    return result


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are printed."""
    columns = ("kernel", "model", "layer", "settings", "status", "median_us", "p20_us", "p80_us",
               "stability", "gb_s", "tflop_s", "limit", "share_of_ceiling",
               "speedup_over_cublas_bf16", "verdict")  # fmt: skip
    return {name: row.get(name) for name in columns}
