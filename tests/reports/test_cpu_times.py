"""What `study kernels` and `study efficiency` measured on a CPU, in a report; times made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report
from robuq_bench.accounting.account import packing_table
from robuq_bench.config import Config, resolve
from robuq_bench.cpu_figures import step_speeds, throughput
from robuq_bench.measuring.cpu import CpuPeaks, CpuTiming
from robuq_bench.measuring.roofline import Transformer, end_to_end_rows
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.efficiency import cpu_tables as efficiency_tables
from studies.efficiency import cpu_verdicts as efficiency_verdicts
from studies.efficiency.claims import claims
from studies.efficiency.settings import Settings
from studies.efficiency.study import weight_rows
from studies.efficiency.variants import VARIANTS, packed_plan
from studies.kernels import cpu_tables as kernel_tables
from studies.kernels import cpu_verdicts as kernel_verdicts
from studies.kernels.cases import BF16, COMPILED, FP32, cases_of
from studies.kernels.tables import roofline_rows

CPU = "Some CPU, 2 cores"
MACHINE = {"device_name": CPU, "instruction_sets": "avx2", "torch": "2", "compiler": "c++"}


def timing(seconds: float) -> CpuTiming:
    rounds = tuple((seconds * f, seconds * f) for f in (0.999, 1.0, 1.001))
    return CpuTiming(Timing(rounds, "made up"), Timing(rounds, "made up"))


def save(root: Path, config: Config, tables: dict[str, Any], picture: Any) -> Run:
    with Run.open(root, config, ["bench.py"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        picture.save(run.figure_path("cpu"))
        run.finish()
    return run


def kernel_run(root: Path) -> Run:
    """fc1 of DiT-XL/2 at 1,000 GOP/s, float32 at 400 and bf16 at 800, with a peak of 2,000."""
    every = cases_of("XL", 2)
    (fc1,) = [case for case in every if case.layer == "fc1"]
    rates = {f"{COMPILED}avx2": 1000e9, FP32: 400e9, BF16: 800e9}
    times = {name: timing(fc1.operations / rate) for name, rate in rates.items()}
    states = {name: {"status": "ok", "correct": True, "max_error": 0.5} for name in rates}
    peaks = CpuPeaks(1, {"avx2": 2000e9}, 500e9, 900e9, 10e9)
    rows = [{"device_name": CPU, **r} for r in kernel_tables.cpu_rows(fc1, states, times, peaks)]
    checks = [fc1.reduced(4, 8).facts | {"correct": True, "max_error": 0.3, "status": "ok"}]
    judged = kernel_verdicts.cpu_verdicts(rows, CPU)
    tables = {
        "kernel_checks": checks,
        "roofline": [row for case in every for row in roofline_rows(case)],
        "cpu_kernels": rows,
        "cpu_summary": kernel_tables.medians(rows),
        "cpu_machine": [MACHINE | {"answer": kernel_tables.answer(rows)}],
        "verdicts": verdict_rows(judged, "a rule"),
    }
    picture = throughput(rows)
    assert picture is not None
    assert "compiled, avx2 1e+03 to 1e+03" in picture.alt
    return save(root, resolve("kernels", "1", "a4", "digits"), tables, picture)


def efficiency_run(root: Path) -> Run:
    """W1.58A4 three times as fast as fp32 at batch 1, and twice at batch 2."""
    config = resolve("efficiency", "1", "a2", "imagenet256")
    factors: list[dict[str, Any]] = []
    for batch, fp32_s in ((1, 3.0), (2, 2.0)):
        rows = [
            {"variant": name.partition(",")[0], "implementation": name, "instructions": "avx2"}
            for name in ("fp32", "w1.58a4, avx2")
        ]
        times = {"fp32": timing(fp32_s), "w1.58a4, avx2": timing(1.0)}
        facts = {"model": "XL", "scope": "step", "batch": batch, "threads": 1}
        factors += efficiency_tables.factors_of(facts, rows, times)
    model, plan = config.workload.model, packed_plan("a8", 16)
    modelled = end_to_end_rows(Transformer(1152, 28), [2, 16, 64])
    for row, batch in zip(modelled, (1, 8, 32), strict=True):
        row["batch"] = batch
    files = [{"basis": "exact", "rank": 16, **row} for row in packing_table(model, plan)]
    weights = weight_rows(config, plan, list(VARIANTS.values()))
    factors = [{"device_name": CPU} | row for row in factors]
    judged = efficiency_verdicts.cpu_verdicts(factors, ())
    tables = {
        "checkpoints": files,
        "weights": weights,
        "end_to_end_model": modelled,
        "claims": claims(config.settings_of(Settings), files, weights, modelled, []),
        "cpu_factors": factors,
        "cpu_summary": efficiency_tables.speeds(factors),
        "cpu_machine": [MACHINE | {"answer": efficiency_tables.answer(factors)}],
        "verdicts": verdict_rows(judged, "a rule"),
    }
    picture = step_speeds(factors)
    assert picture is not None
    assert "w1.58a4 2.00× as fast as fp32" in picture.alt
    return save(root, config, tables, picture)


@pytest.mark.parametrize(
    ("make", "sentence", "table", "cells", "export", "picture"),
    [
        (
            kernel_run,
            f"On {CPU} with 1 thread, compiled products (avx2) are 2.50× to 2.50× (median 2.50×) "
            "as fast as F.linear fp32 and reach 50 % to 50 % of the measured peak.",
            "Timed on a CPU",
            {"layer": "fc1", f"{COMPILED}avx2": "5.44", FP32: "13.6"},
            "cpu_kernels",
            "compiled, avx2 1e+03 to 1e+03",
        ),
        (
            efficiency_run,
            f"On {CPU}, a step of DiT-XL/2 packed as W1.58 is 2.00× to 3.00× as fast as fp32.",
            "Timed on a CPU",
            {"ours": "w1.58a4", "fp32": "3"},
            "cpu_factors",
            "w1.58a4 2.00× as fast as fp32",
        ),
    ],
)
def test_a_report_says_what_a_cpu_did(
    make: Callable[[Path], Run],
    sentence: str,
    table: str,
    cells: dict[str, str],
    export: str,
    picture: str,
    tmp_path: Path,
    parse_page: Callable[[Path], Any],
) -> None:
    run = make(tmp_path / "runs")
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert sentence in " ".join(page.text.split())
    shown = page.table(table)
    first = dict(
        zip((cell.text for cell in shown.head), (cell.text for cell in shown.rows[0]), strict=True)
    )
    assert cells.items() <= first.items()
    labels = [attributes.get("aria-label", "") for tag, attributes in page.tags if tag == "svg"]
    assert any(picture in label for label in labels)
    study = run.config.study
    written = pd.read_csv(tmp_path / f"report-{study}-{export}.csv")
    own = pd.read_csv(run.path / "tables" / f"{export}.csv")
    pd.testing.assert_frame_equal(written.drop(columns="run"), own)
