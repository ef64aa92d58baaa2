"""Recorded GPU results, written by `robuq_bench.measuring.record` from made-up runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report, recorded_gpu
from robuq_bench.config import resolve
from robuq_bench.errors import CheckpointError
from robuq_bench.measuring import record
from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs import provenance
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.kernels.cases import OURS, QUANTIZE, cases_of
from studies.kernels.checks import Check
from studies.kernels.tables import roofline_rows, rows_of
from studies.kernels.verdicts import TARGETS, verdicts

Row = dict[str, Any]
GPU = {"name": "NVIDIA H100 80GB HBM3", "cuda": "12.8", "driver": "570.00", "cudnn": 91000}
CEILINGS = Ceilings(3.0e12, 700e12, 1300e12)
CASE = next(c for c in cases_of("XL", 128) if (c.kernel, c.layer) == (QUANTIZE, "fc2 input"))
TITLE = f"Recorded on {GPU['name']}: Kernels"


def tables() -> dict[str, list[Row]]:
    """One kernel of DiT-XL/2 at 32,768 rows, at 83 % of the copy bandwidth."""
    seconds = CASE.moved_bytes / CEILINGS.copy_bytes_s / 0.83
    times = {OURS: Timing(((seconds,) * 5,) * 3, "CUDA-graph replay")}
    rows = rows_of(CASE, Check(True, 0.5), {OURS: "ok"}, times, CEILINGS)
    rows = [{"device_name": GPU["name"], "settings": "batch 64 guided", **row} for row in rows]
    roofline = [row for case in cases_of("XL", 128) for row in roofline_rows(case)]
    judged = verdicts(rows, roofline, str(GPU["name"]))
    return {"kernels": rows, "roofline": roofline, "verdicts": verdict_rows(judged, "By rounds.")}


def make_run(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    study: str,
    found: dict[str, list[Row]],
    gpu: dict[str, Any] | None = GPU,
    plan: str = "a4",
) -> Run:
    real = provenance.collect
    made_up = {"gpu": gpu, "packages": {"torch": "2.11.0", "triton": "3.6.0"}}
    with monkeypatch.context() as patched:
        patched.setattr(provenance, "collect", lambda *a: {**real(*a), **made_up})
        with Run.open(root, resolve(study, "1", plan, "digits", 0, []), []) as run:
            for name, rows in found.items():
                run.write_table(name, rows)
            run.append("some/item", kind="item")
            run.finish()
    return run


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records that the report reads instead of the project's own."""
    folder = tmp_path / "recorded"
    monkeypatch.setattr(recorded_gpu, "FOLDER", folder)
    make_run(tmp_path / "gpu", monkeypatch, "kernels", tables())
    steps = {"step_time": [{"plan": "a4", "median_s": 0.125, "ratio": None}]}
    make_run(tmp_path / "gpu", monkeypatch, "step-time", steps)
    record.record_runs(tmp_path / "gpu", folder)
    return folder


def test_a_record_is_shown_by_the_section_of_its_study(
    tmp_path: Path, recorded: Path, fabricate: Any, parse_page: Callable[[Path], Any]
) -> None:
    fabricate.run("a4")
    html = build_report([fabricate.root], tmp_path / "report.html")
    page = parse_page(html)
    (path,) = recorded.glob("*/kernels-*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    known = (document["finished"], document["run"], "driver: 570.00", "cuda: 12.8", "torch: 2.11.0")
    for text in known:
        assert text in page.text
    claims = next(table for table in page.tables if table.caption == TITLE)
    met = next(row for row in claims.rows if row[0].text == TARGETS[1].claim)
    assert met[1].text == "holds"
    assert "share of the measured ceiling 0.830" in met[2].text
    assert met[2].href.removeprefix("#") in page.ids
    assert page.table("Times of our kernels").cell("fc2 input", "rows").text == "32768"
    assert page.table("step_time of").rows[0][1].text == "0.125"
    assert page.table("step_time of").rows[0][2].text == "–"
    assert len(page.ids) == len(set(page.ids))
    again = build_report([fabricate.root], tmp_path / "again.html")
    assert html.read_bytes() == again.read_bytes()


def test_records_are_apart_from_the_runs_at_hand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: Path,
    parse_page: Callable[[Path], Any],
) -> None:
    checks = [CASE.reduced(16, 16).facts | {"correct": True, "max_error": 0.5, "status": "ok"}]
    found = {"kernel_checks": checks, "roofline": tables()["roofline"]}
    own = make_run(tmp_path / "cpu", monkeypatch, "kernels", found, gpu=None, plan="a2")
    page = parse_page(build_report([tmp_path / "cpu"], tmp_path / "report.html"))
    lead = page.text.split("Kernels and their checks")[0]
    assert "1 of 1 kernel call of DiT-XL/2 agree with plain PyTorch in Triton" in lead
    assert len([t for t in page.tables if t.caption.startswith("Kernels and their checks")]) == 2
    assert len(page.ids) == len(set(page.ids))
    for name in ("kernels-roofline", "kernels-kernel_checks"):
        written = pd.read_csv(tmp_path / f"report-{name}.csv")
        assert set(written["run"]) == {own.id}
    assert not (tmp_path / "report-kernels-kernels.csv").exists()
    claims = pd.read_csv(tmp_path / "report-claims.csv")
    assert set(claims["subject"].dropna()) == {QUANTIZE}
    headings = [a["id"] for tag, a in page.tags if tag == "section" and "id" in a]
    assert headings[0] == "kernels"
    assert sum(name.startswith("recorded-") for name in headings) == 2


def test_a_record_of_a_run_at_hand_is_left_out(
    tmp_path: Path, recorded: Path, parse_page: Callable[[Path], Any]
) -> None:
    page = parse_page(build_report([tmp_path / "gpu"], tmp_path / "report.html"))
    assert not any(name.startswith("recorded-") for name in page.ids)
    assert "Recorded on" not in page.text
    claims = next(table for table in page.tables if table.caption == "Kernels")
    assert claims.rows[0][1].text == "holds"


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"study": "kernels", "config": {}}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some-gpu" / "kernels-1.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"kernels-1\.json is not a recorded GPU result"):
        recorded_gpu.read_records(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("kernels", [{"kernel": 1}]),  # no column that the section reads
        ("kernels", []),
        ("verdicts", [{"claim": "fast", "verdict": "perhaps"}]),
    ],
)
def test_a_record_that_its_section_cannot_show_is_named(
    tmp_path: Path, recorded: Path, fabricate: Any, name: str, rows: list[Row]
) -> None:
    fabricate.run("a4")
    (path,) = recorded.glob("*/kernels-*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    if name == "verdicts":
        rows = [{**document["tables"][name][0], **rows[0]}]
    document["tables"][name] = rows
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{path.name} is not a recorded GPU result"):
        build_report([fabricate.root], tmp_path / "report.html")


def test_tables_read_as_those_of_the_run(recorded: Path, tmp_path: Path) -> None:
    found = {run.study: run for run in recorded_gpu.read_records()}
    for name in ("kernels", "roofline", "verdicts"):
        (path,) = tmp_path.glob(f"gpu/kernels/*/tables/{name}.csv")
        written = pd.read_csv(path, keep_default_na=False, na_values=[""])
        pd.testing.assert_frame_equal(found["kernels"].table(name), written)
