"""Rows and figure of what `study kernels` measures on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robuq_bench.measuring.cpu import CpuPeaks, CpuTiming
from robuq_bench.measuring.roofline import TOKEN_BYTES
from robuq_bench.measuring.statistics import median_interval, speedup_interval
from studies.kernels.cases import BF16, COMPILED, FP32, PLAIN, Case


def moved_bytes(case: Case) -> int:
    """Least bytes of a rotation with quantization of float32 tokens: in, codes, facts, branch."""
    per_row = 4 * case.width + case.width + TOKEN_BYTES + 4 * case.rank
    return case.rows * per_row + 4 * case.rank * case.width


def cpu_rows(
    case: Case,
    states: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, CpuTiming],
    peaks: CpuPeaks,
) -> list[dict[str, Any]]:
    """One row per implementation of `states`; numbers only of those that were timed."""
    baseline = FP32 if case.is_product else PLAIN
    rows = []
    for name, state in states.items():
        row: dict[str, Any] = {
            **case.facts,
            "threads": peaks.threads,
            "implementation": name,
            **state,
        }
        if name in times:
            row |= _numbers(case, name, times[name], peaks)
            if baseline in times and name != baseline:
                row |= {"baseline": baseline, **_speedup(times[name], times[baseline])}
            if BF16 in times and name != BF16:
                row |= _over_bf16(times[name], times[BF16])
        rows.append(row)
    return rows


def _numbers(case: Case, name: str, timing: CpuTiming, peaks: CpuPeaks) -> dict[str, Any]:
    fast_s, slow_s = median_interval(timing.wall)
    median_s = timing.wall.median_s
    row = {
        **timing.wall.summary("ms"),
        "median_ms_low": fast_s * 1e3,
        "median_ms_high": slow_s * 1e3,
        "processor_ms": timing.processor.median_s * 1e3,
    }
    if case.is_product:
        peak = _peak(name, peaks)
        work, unit = case.operations, "gop_s"
    else:
        peak, work, unit = peaks.copy_bytes_s, moved_bytes(case), "gb_s"
    row |= {unit: work / median_s / 1e9}
    if peak is not None:
        row |= {
            f"peak_{unit}": peak / 1e9,
            "share_of_peak": work / median_s / peak,
            "share_of_peak_low": work / slow_s / peak,
            "share_of_peak_high": work / fast_s / peak,
        }
    return row


def _peak(name: str, peaks: CpuPeaks) -> float | None:
    """Of what an implementation multiplies with; unknown for `_int_mm`, which chooses itself."""
    if name.startswith(COMPILED):
        return peaks.integer_ops_s[name.removeprefix(COMPILED)]
    return {FP32: peaks.fp32_ops_s, BF16: peaks.bf16_ops_s}.get(name)


def _over_bf16(timing: CpuTiming, baseline: CpuTiming) -> dict[str, float]:
    found = _speedup(timing, baseline)
    return {f"speedup_over_bf16{end}": found[f"speedup{end}"] for end in ("", "_low", "_high")}


def _speedup(timing: CpuTiming, baseline: CpuTiming) -> dict[str, float]:
    low, high = speedup_interval(timing.wall, baseline.wall, interleaved=True)
    return {
        "speedup": baseline.wall.median_s / timing.wall.median_s,
        "speedup_low": low,
        "speedup_high": high,
        "speedup_in_processor_time": baseline.processor.median_s / timing.processor.median_s,
    }


def cpu_summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are printed."""
    unit = "Gop/s" if "gop_s" in row else "GB/s" if "gb_s" in row else ""
    shown = {"rate": row.get("gop_s", row.get("gb_s")), "unit": unit, "over": row.get("baseline")}
    columns = ("model", "layer", "images", "threads", "implementation", "status", "median_ms",
               "rate", "unit", "share_of_peak", "speedup", "over", "stability")  # fmt: skip
    return {name: shown.get(name, row.get(name)) for name in columns}


def medians(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median milliseconds, a column for each implementation; only those that are right have one."""
    frame = pd.DataFrame([row for row in rows if "median_ms" in row])
    if frame.empty:
        return []
    wide = frame.pivot_table(
        "median_ms", ["layer", "model", "images", "threads"], "implementation", sort=False
    )
    records = wide.reset_index().to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in records]


def answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the compiled products with the best instruction set, on the fewest threads."""
    ours = [row for row in rows if row["implementation"].startswith(COMPILED) and "speedup" in row]
    ours = [row for row in ours if "gop_s" in row]
    if not ours:
        return "The compiled kernels were not timed on a CPU."
    best, threads = ours[0]["implementation"], ours[0]["threads"]
    instructions = best.removeprefix(COMPILED)
    own = pd.DataFrame(
        [row for row in ours if (row["implementation"], row["threads"]) == (best, threads)]
    )
    speed, share = own["speedup"], own["share_of_peak"]
    return (
        f"On {ours[0]['device_name']} with {threads} thread{'s' if threads > 1 else ''}, compiled "
        f"products ({instructions}) are {speed.min():.2f}× to {speed.max():.2f}× (median "
        f"{speed.median():.2f}×) as fast as {FP32} and reach {share.min():.0%} to "
        f"{share.max():.0%} of the measured peak."
    ).replace("%", " %")
