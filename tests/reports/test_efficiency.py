"""The section on `study efficiency`: sizes are exact; times and memory made up, not measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report
from robuq_bench.accounting.account import packing_table
from robuq_bench.config import Config, resolve
from robuq_bench.measuring.memory import split_peak
from robuq_bench.measuring.roofline import Transformer, end_to_end_rows
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.efficiency.claims import claims
from studies.efficiency.settings import Settings
from studies.efficiency.study import RULE, columns, weight_rows
from studies.efficiency.variants import VARIANTS, packed_plan
from studies.efficiency.verdicts import verdicts

Row = dict[str, Any]
GPU = "NVIDIA H100 80GB HBM3"
BATCHES = (1, 8)
#: Milliseconds of a step at batch 1.
STEPS = {"fp32": 17.0, "tf32": 4.5, "bf16": 3.0, "bf16-compile": 2.4, "bf16-graph": 1.9,
         "w1.58a8": 1.0, "w1.58a4": 1.01, "w1.58a2": 1.02}  # fmt: skip
FACTORS = "The paper’s factors beside ours"


def configure() -> Config:
    given = ["efficiency.batches=[1,8]", "efficiency.sampling_batches=[1]"]
    return resolve("efficiency", "1", "a2", "imagenet256", 0, given)


@cache
def exact() -> dict[str, list[Row]]:
    """Tables that need no GPU, by the study's own functions."""
    config = configure()
    model, plan = config.workload.model, packed_plan("a8", 16)
    facts = {"basis": "exact", "plan": "a8", "rank": 16}
    modelled = end_to_end_rows(Transformer(1152, 28), [2 * batch for batch in BATCHES])
    return {
        "checkpoints": [facts | row for row in packing_table(model, plan)],
        "weights": weight_rows(config, plan, list(VARIANTS.values())),
        "end_to_end_model": [r | {"batch": b} for r, b in zip(modelled, BATCHES, strict=True)],
    }


def item(kind: str, name: str, batch: int) -> Row:
    """What the study appends of one variant and batch."""
    found: Row = {"device_name": GPU, "variant": name, "batch": batch, "measured": kind,
                  "description": VARIANTS[name].label, "images": 2 * batch}  # fmt: skip
    if VARIANTS[name].peer:
        return found | {"status": "not run: not there"}
    seconds = STEPS[name] * 1e-3 * batch * (50 if kind == "sampling" else 1)
    rounds = tuple(tuple(seconds * f * g for f in (0.99, 1.0, 1.01)) for g in (0.999, 1, 1.001))
    timing = Timing(rounds, "CUDA-graph replay")
    found |= {"status": "ok", "rounds_s": [list(r) for r in rounds], **timing.summary("ms")}
    if kind == "step":
        weights = next(r for r in exact()["weights"] if r["variant"] == name)["weight_bytes"]
        peak = weights + batch * 100 * 2**20
        found |= split_peak(
            weights=weights, resident_before=0, peak=peak, workspace=0, reserved=peak
        )
    return found


def items() -> list[Row]:
    return [
        item(kind, name, batch)
        for name in VARIANTS
        for batch in BATCHES
        for kind in ("step", "sampling")
        if kind == "step" or batch == 1
    ]


def make_run(root: Path, found: Sequence[Row] = (), *, judged: bool = True) -> Run:
    config, tables = configure(), dict(exact())
    if found:
        tables["end_to_end"] = [columns(row) for row in found]
    given = (tables["checkpoints"], tables["weights"], tables["end_to_end_model"])
    tables["claims"] = claims(config.settings_of(Settings), *given, list(found))
    if judged:
        rows = verdicts(True, tables["checkpoints"], tables["claims"])
        tables["verdicts"] = verdict_rows(rows, RULE)
    with Run.open(root, config, ["bench.py", "study", "efficiency"]) as run:
        for name, rows_ in tables.items():
            run.write_table(name, rows_)
        run.finish()
    return run


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("gpu") / "runs", items())


@pytest.fixture(scope="module")
def page(gpu_run: Run, parse_page: Callable[[Path], Any]) -> Any:
    return parse_page(build_report([gpu_run.path], gpu_run.path.parents[1] / "report.html"))


@pytest.fixture(scope="module")
def cpu_page(tmp_path_factory: pytest.TempPathFactory, parse_page: Callable[[Path], Any]) -> Any:
    folder = tmp_path_factory.mktemp("cpu")
    make_run(folder / "runs")
    return parse_page(build_report([folder / "runs"], folder / "report.html"))


def alt(page: Any, start: str) -> str:
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    return str(next(label for label in labels if label.startswith(start)))


def factor_rows(page: Any) -> dict[tuple[str, str, str], list[Any]]:
    rows = page.table(FACTORS).rows
    return {(row[0].text, row[2].text, row[2].small): row for row in rows}


def test_without_a_gpu_sizes_are_exact_and_the_rest_is_not_run(cpu_page: Any) -> None:
    lead = cpu_page.text.split(FACTORS)[0]
    sizes = {row["packing"]: row["size_reduction"] for row in exact()["checkpoints"]}
    best = sizes["base3/fp16/fp16"]
    assert f"DiT-XL/2 is a file {best:.2f}× smaller than FP32 (base3/fp16/fp16; the" in lead
    assert "speed (the paper: 3.5×) needs a GPU: not run" in lead
    rows = factor_rows(cpu_page)
    for packing in ("base3/fp32/fp32", "base3/fp16/fp16", "2bit/fp32/fp32", "2bit/fp16/fp16"):
        row = rows["15.2× smaller checkpoint", "fp32 file", packing]
        assert (row[1].text, row[1].small) == (f"{sizes[packing]:.2f}×", "exact")
    weights = {row["variant"]: row["weight_bytes"] for row in exact()["weights"]}
    for base in ("fp32", "bf16"):
        ratio = weights[base] / weights["w1.58a8"]
        assert rows["7.1× less GPU memory", f"{base}, weights alone", ""][1].text == (
            f"{ratio:.2f}×"
        )
    assert rows["3.5× faster", "tf32, step", ""][1].text == "not run"
    modelled = [row["ratio_to_tf32"] for row in exact()["end_to_end_model"]]
    expected = f"{min(modelled):.2f}× to {max(modelled):.2f}×"
    assert rows["3.5× faster", "tf32, step", ""][3].text == expected
    assert alt(cpu_page, "Speed of a step, a model, not measured").count("against") == 3
    claims_table = next(t for t in cpu_page.tables if t.caption == "Efficiency")
    assert [row[1].text for row in claims_table.rows] == [
        *("holds", "holds", "holds", "does not hold", "not judged", "not judged")
    ]


def test_bytes_of_a_checkpoint_print_the_run(cpu_page: Any) -> None:
    table = cpu_page.table("Bytes of a checkpoint by part, rank 16")
    for row, line in zip(exact()["checkpoints"], table.rows, strict=True):
        parts = ("codes", "scales", "low_rank", "signs", "rest", "total")
        printed = [float(cell.text) for cell in line[1:7]]
        wanted = [row[f"{part}_bytes"] / 2**20 for part in parts]
        assert printed == pytest.approx(wanted, abs=0.005)
    words = alt(cpu_page, "Bytes of a checkpoint of DiT-XL/2")
    files = [r for r in exact()["checkpoints"] if r["packing"].startswith(("base3/", "2bit/"))]
    assert words.count("smaller") == len(files)


def test_measured_factors_are_those_of_the_run(page: Any, gpu_run: Run) -> None:
    table = pd.read_csv(gpu_run.path / "tables" / "claims.csv")
    rows = factor_rows(page)
    for against, claim, name in (
        ("tf32, step", "speed", "3.5× faster"),
        ("bf16-graph, step", "speed", "3.5× faster"),
        ("fp32, peak of a step", "GPU memory", "7.1× less GPU memory"),
    ):
        own = table[(table["claim"] == claim) & (table["against"] == against)]["factor"]
        row = rows[name, against, ""]
        assert row[1].text.split("× to ") == [f"{own.min():.2f}", f"{own.max():.2f}×"] or (
            row[1].text == f"{own.min():.2f}×"
        )
        assert row[1].small == "measured"
    step = table[table["against"] == "bf16-graph, step"]["factor"]
    told = re.search(r"a step is ([\d.]+)× to ([\d.]+)× as fast as bf16-graph", page.text)
    assert told is not None
    assert [float(x) for x in told.groups()] == pytest.approx([step.min(), step.max()], abs=0.005)
    assert f"on {GPU}" in page.text
    assert "against tf32" in alt(page, f"Speed of a step, measured on {GPU}")
    assert "against fp32" in alt(page, f"Peak memory of a step, measured on {GPU}")


def test_speeds_are_judged_against_each_baseline(page: Any) -> None:
    claims_table = next(t for t in page.tables if t.caption == "Efficiency")
    words = {row[0].text: row[1].text for row in claims_table.rows}
    assert words["DiT-XL/2 runs 3.5× faster than fp32, step"] == "holds"
    assert words["DiT-XL/2 runs 3.5× faster than tf32, step"] == "holds"  # 4.41 to 4.5
    assert words["DiT-XL/2 runs 3.5× faster than bf16-graph, step"] == "does not hold"
    assert not any("torchao" in claim for claim in words)


def test_a_run_from_before_verdicts_is_shown_unjudged(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    make_run(tmp_path / "runs", judged=False)
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    claims_table = next(t for t in page.tables if t.caption == "Efficiency")
    assert {row[1].text for row in claims_table.rows} == {"not judged"}
    assert any("factor 15.8" in row[2].text for row in claims_table.rows)


def test_exports_hold_every_row(page: Any, gpu_run: Run) -> None:
    folder = gpu_run.path.parents[1]
    for name in ("claims", "checkpoints", "weights", "end_to_end", "end_to_end_model"):
        written = pd.read_csv(folder / f"report-efficiency-{name}.csv")
        own = pd.read_csv(gpu_run.path / "tables" / f"{name}.csv")
        pd.testing.assert_frame_equal(written.drop(columns="run"), own)
        assert set(written["run"]) == {gpu_run.id}
    assert "15.2" in (folder / "report-efficiency.tex").read_text(encoding="utf-8")


def test_a_run_without_its_tables_does_not_break(tmp_path: Path) -> None:
    with Run.open(tmp_path / "runs", configure(), []) as run:
        run.finish()
    assert build_report([tmp_path / "runs"], tmp_path / "report.html").is_file()
