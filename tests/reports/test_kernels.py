"""The section on `study kernels`: every number is made up, none was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report
from robuq_bench.config import resolve
from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.kernels.cases import MATMUL, OURS, QUANTIZE, Case, cases_of, weight_cases_of
from studies.kernels.checks import Check
from studies.kernels.peers import BASELINE, peers_of
from studies.kernels.study import RULE
from studies.kernels.tables import roofline_rows, rows_of
from studies.kernels.verdicts import TARGETS, verdicts

Row = dict[str, Any]
Tables = dict[str, list[Row]]
GPU = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(3.0e12, 700e12, 1300e12)


def cases() -> list[Case]:
    return [
        case
        for model in ("XL", "S")
        for case in [*weight_cases_of(model), *(c for n in (1, 2, 128) for c in cases_of(model, n))]
    ]


def checked(wrong: Sequence[tuple[str, str]] = ()) -> Tables:
    """The tables that the study writes without a GPU."""
    every = cases()
    rows = []
    largest = {(c.kernel, c.model, c.layer): c for c in every}
    for number, case in enumerate(largest.values()):
        is_right = (case.kernel, case.layer) not in wrong
        row = case.reduced(16, 160).facts | {"correct": is_right}
        row["max_error"] = 0.3 + number / 100 if is_right else 7.0
        row["status"] = "ok" if is_right else "scale is 7 times what is allowed"
        rows.append(row)
    return {"kernel_checks": rows, "roofline": [r for c in every for r in roofline_rows(c)]}


def timed(wrong: Sequence[tuple[str, str]] = ()) -> Tables:
    """The tables that the study writes on a CUDA device, by its own functions."""
    every = cases()
    rows = []
    for case in every:
        is_right = (case.kernel, case.layer) not in wrong
        found = Check(is_right, 0.25 if is_right else 3.0, "" if is_right else "scale is 3 times")
        status = {OURS: found.failure or "ok"}
        least = max(case.moved_bytes / 3.0e12, case.operations / 1300e12)
        times = {OURS: steady(least / 0.84)} if is_right else {}
        for name in peers_of(case):
            status[name] = "not installed" if name != BASELINE else "ok"
        if case.is_product:
            product = case.product
            dense = max(product.full_precision_bytes / 3.0e12, product.operations / 700e12)
            times[BASELINE] = steady(dense / 0.9)
        extra = {"device_name": GPU, "settings": "batch 64"}
        rows += [extra | row for row in rows_of(case, found, status, times, CEILINGS)]
    roofline = [row for case in every for row in roofline_rows(case)]
    judged = verdict_rows(verdicts(rows, roofline, GPU), RULE)
    return {"kernels": rows, "roofline": roofline, "verdicts": judged}


def steady(median_s: float) -> Timing:
    spread = (0.99, 0.995, 1.0, 1.005, 1.01)
    return Timing((tuple(median_s * factor for factor in spread),) * 3, "CUDA-graph replay")


def make_run(root: Path, tables: Tables) -> Run:
    config = resolve("kernels", "1", "a4", "digits", 0, [])
    with Run.open(root, config, ["bench.py", "study", "kernels"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.finish()
    return run


def page_of(tmp_path: Path, parse_page: Callable[[Path], Any], tables: Tables) -> Any:
    make_run(tmp_path / "runs", tables)
    return parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))


def alt(page: Any, start: str) -> str:
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    return str(next(label for label in labels if label.startswith(start)))


def test_without_a_gpu_checks_are_shown_and_nothing_is_timed(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    tables = checked()
    page = page_of(tmp_path, parse_page, tables)
    checks = pd.DataFrame(tables["kernel_checks"])
    worst = checks["max_error"].max()
    lead = page.text.split("Kernels and their checks")[0]
    assert f"{len(checks)} of {len(checks)} kernel calls of DiT-XL/2 and DiT-S/2" in lead
    assert f"with at most {worst:.2f} of the deviation that is allowed" in lead
    assert "timings need a GPU: not run" in lead
    table = page.table("Kernels and their checks")
    for kernel, own in checks.groupby("kernel"):
        assert table.cell(kernel, "calls").text == table.cell(kernel, "passed").text
        assert table.cell(kernel, "passed").text == str(len(own))
        shown = float(table.cell(kernel, "largest deviation").text)
        assert shown == pytest.approx(own["max_error"].max(), abs=0.005)
    # A run from before verdicts had one form: its checks are the verdicts.
    claims = next(t for t in page.tables if t.caption == "Kernels")
    assert {row[1].text for row in claims.rows} == {"holds"}
    assert "a model" in alt(page, "Least bf16 time")


def test_the_roofline_is_that_of_the_data_sheet(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    page = page_of(tmp_path, parse_page, checked())
    products = [
        (case.operations, case.branch_operations, case.moved_bytes) for case in cases()
        if case.model == "XL" and case.kernel == MATMUL
    ]  # fmt: skip
    rates = [
        ops / max(ops / 1978.9 + branch / 989.4, moved / 3.35) for ops, branch, moved in products
    ]
    words = alt(page, "Roofline of DiT-XL")
    low, high = (f"{rate:.0f}" for rate in (min(rates), max(rates)))
    assert f"ternary {low} to {high} TOP/s" in words


def test_a_failed_check_is_named_and_does_not_hold(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    page = page_of(tmp_path, parse_page, checked(wrong=[(MATMUL, "fc2")]))
    table = page.table("Kernels and their checks")
    calls, passed = (int(table.cell(MATMUL, name).text) for name in ("calls", "passed"))
    assert calls - passed == 2  # of both models
    assert f"{MATMUL}, fc2, DiT-XL: scale is 7 times what is allowed" in page.text
    claims = next(t for t in page.tables if t.caption == "Kernels")
    words = {row[0].text.split()[0]: row[1].text for row in claims.rows}
    assert words[MATMUL] == "does not hold"
    assert words[QUANTIZE] == "holds"
    rows = page.table("Failed checks and the largest deviations").rows
    assert [cell.text for cell in rows[0][:3]] == [MATMUL, "XL", "fc2"]
    states = [row[-1].text for row in rows]
    assert states == ["scale is 7 times what is allowed"] * 2 + ["ok"] * (len(rows) - 2)


def test_times_on_a_gpu_are_those_of_the_run(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    tables = timed(wrong=[(QUANTIZE, "proj input")])
    page = page_of(tmp_path, parse_page, tables)
    ours = [row for row in tables["kernels"] if row["implementation"] == OURS]
    ratios = [r["speedup_over_cublas_bf16"] for r in ours if "speedup_over_cublas_bf16" in r]
    told = re.search(r"products of ternary weights are ([\d.]+)× to ([\d.]+)×", page.text)
    assert told is not None
    assert [float(amount) for amount in told.groups()] == (
        pytest.approx([min(ratios), max(ratios)], rel=5e-3)
    )
    assert f"on {GPU}" in page.text.split("Kernels and their checks")[0]
    shown = page.table("Times of our kernels")
    assert len(shown.rows) == len(ours)
    heads = [head.text for head in shown.head]
    for row, line in zip(ours, shown.rows, strict=True):
        cells = dict(zip(heads, line, strict=True))
        assert cells["layer"].text == row["layer"]
        if not row["correct"]:
            texts = [cells[name].text for name in ("median_us", "status")]
            assert texts == ["–", "scale is 3 times"]
            continue
        assert float(cells["median_us"].text) == pytest.approx(row["median_us"], rel=5e-3)
        share = float(cells["share_of_ceiling"].text.removesuffix(" %")) / 100
        assert share == pytest.approx(row["share_of_ceiling"], rel=5e-3)
    targets = page.table("Targets")
    words = {row[0].text.split(" at ")[0]: row[1].text for row in targets.rows}
    assert len(words) == len(TARGETS) - 1  # two are of fc1 and fc2
    judged = [row["verdict"] for row in tables["verdicts"][-len(TARGETS) :]]
    assert [row[1].text for row in targets.rows] == judged
    assert "holds" in judged


def test_a_run_without_products_or_tables_does_not_break(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    tables = {
        name: [row for row in rows if row["kernel"] == QUANTIZE]
        for name, rows in checked().items()
    }  # fmt: skip
    page = page_of(tmp_path, parse_page, tables)
    assert [row[0].text for row in page.table("Kernels and their checks").rows] == [QUANTIZE]
    make_run(tmp_path / "bare", {})
    assert build_report([tmp_path / "bare"], tmp_path / "bare.html").is_file()


def test_exports_hold_every_row(tmp_path: Path) -> None:
    tables = checked()
    run = make_run(tmp_path / "runs", tables)
    build_report([tmp_path / "runs"], tmp_path / "report.html")
    written = pd.read_csv(tmp_path / "report-kernels-roofline.csv")
    assert list(written["least_us"]) == [row["least_us"] for row in tables["roofline"]]
    assert set(written["run"]) == {run.id}
    assert not (tmp_path / "report-kernels-kernels.csv").exists()
    tex = (tmp_path / "report-kernels.tex").read_text(encoding="utf-8")
    assert MATMUL.replace("_", r"\_") in tex
