"""Recorded GPU results, written by `robuq_bench.measuring.record` from made-up runs."""

from __future__ import annotations

import csv
import json

import pytest

from reports import build_report, recorded_gpu
from robuq_bench.config import resolve
from robuq_bench.errors import CheckpointError
from robuq_bench.measuring import record
from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs import provenance
from robuq_bench.runs.run import Run
from studies.kernels.cases import QUANTIZE, cases_of
from studies.kernels.checks import Check
from studies.kernels.tables import OURS, roofline_rows, rows_of

GPU = {"name": "NVIDIA H100 80GB HBM3", "cuda": "12.8", "driver": "570.00", "cudnn": 91000}
CEILINGS = Ceilings(3.0e12, 700e12, 1300e12)
CAPTION = "Recorded: claims judged with DiT-XL, NVIDIA H100 80GB HBM3 (kernels)"
MET = "LayerNorm + modulate + Hadamard(1152) + quantize: at least 80 % of copy bandwidth"


def tables():
    """One kernel of DiT-XL/2 at 32,768 rows, at 83 % of the copy bandwidth."""
    cases = [
        c for c in cases_of("XL", 128) if (c.kernel, c.layer) == (QUANTIZE, "qkv and fc1 input")
    ]
    case = cases[0]
    seconds = case.moved_bytes / CEILINGS.copy_bytes_s / 0.83
    times = {OURS: Timing(((seconds,) * 5,) * 3, "CUDA-graph replay")}
    rows = rows_of(case, Check(True, 0.5), {OURS: "ok"}, times, CEILINGS)
    extra = {"device_name": GPU["name"], "settings": "batch 64 guided"}
    ceilings = [{"key": "ceilings/1", "device_name": GPU["name"], **CEILINGS.row()}]
    return {
        "kernels": [extra | row for row in rows],
        "ceilings": ceilings,
        "roofline": [row for case in cases_of("XL", 128) for row in roofline_rows(case)],
    }


def make_run(root, monkeypatch, study, found, gpu=GPU, plan="a4"):
    real = provenance.collect
    packages = {"torch": "2.11.0", "triton": "3.6.0"}
    with monkeypatch.context() as patched:
        made_up = {"gpu": gpu, "packages": packages}
        patched.setattr(provenance, "collect", lambda *a: {**real(*a), **made_up})
        with Run.open(root, resolve(study, "1", plan, "digits", 0, []), []) as run:
            for name, rows in found.items():
                run.write_table(name, rows)
            run.append("some/item", kind="item")
            run.finish()
    return run.path


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder of records that the report reads instead of the project's own."""
    folder = tmp_path / "recorded"
    monkeypatch.setattr(recorded_gpu, "FOLDER", folder)
    make_run(tmp_path / "gpu", monkeypatch, "kernels", tables())
    steps = {"step_time": [{"plan": "a4", "median_s": 0.125, "ratio": None}]}
    make_run(tmp_path / "gpu", monkeypatch, "step-time", steps)
    record.record_runs(tmp_path / "gpu", folder)
    return folder


def test_records_show_hardware_versions_and_numbers(
    tmp_path, monkeypatch, recorded, fabricate, parse_page
):
    fabricate.run("a4")
    html = build_report([fabricate.root], tmp_path / "report.html")
    page = parse_page(html)
    for text in ("NVIDIA H100 80GB HBM3", "570.00", "12.8", "2.11.0", "3.6.0"):
        assert text in page.text
    (path,) = recorded.glob("*/kernels-*.json")
    document = json.loads(path.read_text())
    assert document["finished"] in page.text
    assert document["run"] in page.text
    claims = {row[0].text: row for row in page.table(CAPTION).rows}
    assert claims[MET][1].text == "holds"
    assert claims[MET][2].text == "83.0 % (qkv and fc1 input, 32,768 rows)"
    assert claims[MET][2].href == "#" + next(i for i in page.ids if i.startswith("recorded-kern"))
    steps = page.table("Recorded: step_time")
    assert [cell.text for cell in steps.rows[0]] == ["a4", "0.125000", "not run"]
    assert "://" not in html.read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids))
    again = build_report([fabricate.root], tmp_path / "again.html")
    assert html.read_bytes() == again.read_bytes()


def test_records_are_apart_from_the_run_at_hand(tmp_path, monkeypatch, recorded, parse_page):
    found = {"kernel_checks": check_rows(), "roofline": tables()["roofline"]}
    make_run(tmp_path / "cpu", monkeypatch, "kernels", found, gpu=None, plan="a2")
    html = build_report([tmp_path / "cpu"], tmp_path / "report.html")
    page = parse_page(html)
    own = page.table("Kernels, judged with DiT-XL, without a GPU")
    assert [row[1].text for row in own.rows] == ["holds", "not run", "not run"]
    assert "83.0 %" not in page.text.split("Recorded on GPUs")[1].split("Results that the")[0]
    # With a run of the same study at hand, times are shown too.
    assert page.table(f"DiT-XL/2 on {GPU['name']}: times of our kernels")
    assert len(page.ids) == len(set(page.ids))
    listed = html.with_name("report-claims.csv").read_text(encoding="utf-8")
    assert "83.0" not in listed


def check_rows():
    row = {k: v for k, v in tables()["kernels"][0].items() if not k.endswith(("_us", "_s"))}
    return [row | {"where": "Triton's interpreter, at 16 rows", "rows": 16}]


def test_a_recorded_run_that_is_at_hand_is_shown_once(tmp_path, recorded, parse_page):
    page = parse_page(build_report([tmp_path / "gpu"], tmp_path / "report.html"))
    assert not any(table.caption.startswith("Recorded") for table in page.tables)
    assert "recorded-gpu" not in page.ids
    assert page.table("Kernels, judged with DiT-XL, NVIDIA H100").rows[0][1].text == "holds"


def test_without_records_there_is_no_section(tmp_path, monkeypatch, fabricate, parse_page):
    monkeypatch.setattr(recorded_gpu, "FOLDER", tmp_path / "none")
    fabricate.run("a4")
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert "recorded-gpu" not in page.ids


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"study": "kernels", "config": {}}'])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "some-gpu" / "kernels-1.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"kernels-1\.json is not a recorded GPU result"):
        recorded_gpu.read_recorded(tmp_path)


def test_cells_read_as_in_the_run(recorded, tmp_path):
    studies = {study.run.study: study for study in recorded_gpu.read_recorded()}
    (row,) = studies["kernels"].tables["kernels"]
    (path,) = tmp_path.glob("gpu/kernels/*/tables/kernels.csv")
    with path.open(newline="", encoding="utf-8") as stream:
        (written,) = list(csv.DictReader(stream))
    assert row == written
