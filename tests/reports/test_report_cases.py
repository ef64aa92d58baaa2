"""Reports of small and unusual sets of runs; and that the same runs give the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reports import build_report
from reports.train_and_eval import EXPORTS
from robuq_bench.errors import RobuqError

ROOT = Path(__file__).resolve().parents[2]


def test_the_same_runs_give_the_same_bytes(fabricate, tmp_path):
    runs = [fabricate.run(plan) for plan in ("a2", "baseline-a2", "fp")]
    first = build_report([fabricate.root], tmp_path / "report.html")
    again = build_report(list(reversed(runs)), tmp_path / "again" / "report.html")
    code = (
        "import sys; from pathlib import Path; from reports import build_report;"
        "build_report([Path(sys.argv[1])], Path(sys.argv[2]))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(fabricate.root), "far/report.html"]
    own = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "ROBUQ_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **own}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    names = sorted(file.name for file in tmp_path.glob("report*"))
    of_plans = {f"report-{name}" for name in EXPORTS}
    assert set(names) == {"report.html", "report-claims.csv"} | of_plans
    for name in names:
        expected = (first.parent / name).read_bytes()
        assert (again.parent / name).read_bytes() == expected
        assert (tmp_path / "far" / name).read_bytes() == expected


def test_a_missing_metric_says_not_run_and_no_cell_is_blank(fabricate, tmp_path, parse_page):
    source = fabricate.run("a4", finish=False)
    lines = [json.loads(line) for line in (source / "results.jsonl").read_text().splitlines()]
    for record in lines:
        if record.get("subject") == "student":
            del record["recall_digits"]
    kept = [r for r in lines if r["kind"] not in ("validation", "accounting", "timing")]
    fabricate.run("a4", 1, records=kept)
    fabricate.run("a3")
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    table = page.table("Plans and metrics on digits")
    assert table.cell("a4", "recall_digits").text == "not run"
    losses = page.table("Losses on digits")
    assert losses.cell("a4", "distillation_loss").text == "not run"
    assert table.cell("a3", "recall_digits").text != "not run"
    assert page.table("What each plan costs").cell("a4", "BitOPs").text == "not run"
    assert all(cell.text.strip() for t in page.tables for row in t.rows for cell in row)


def test_hostile_text_is_escaped(fabricate, tmp_path, parse_page):
    attack = "<script>alert(1)</script>\"'&amp;"
    fabricate.run("a4", argv=["bench.py", attack])
    fabricate.run("a4", 1, overrides=[f"data.path={attack}"])
    path = fabricate.run("a4", study="other", finish=False, records=[])
    (path / "tables").mkdir()
    (path / "tables/x.csv").write_text(f"name,{attack.replace(chr(34), '')}\n<b>,<i>1</i>\n")
    fabricate.run("a4", study="other", records=[])
    report = build_report([fabricate.root], tmp_path / "report.html")
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<i>1" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    page = parse_page(report)
    assert attack in page.text
    assert page.table("x of a4 on digits").rows[0][1].text == "<i>1</i>"


def test_unfinished_runs_are_named_and_never_shown_as_results(fabricate, tmp_path, parse_page):
    fabricate.run("a4")
    left = fabricate.run("a2", fid=1.0, finish=False)
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert [row[0].text for row in page.table("Plans and metrics").rows] == ["teacher", "a4"]
    (row,) = page.table("Unfinished runs").rows
    assert row[0].text == f"train-and-eval/{left.name}"
    assert row[3].text.startswith("unfinished")
    assert sum(left.name in cell.text for t in page.tables for r in t.rows for cell in r) == 1
    assert left.name not in (tmp_path / "report-metrics.csv").read_text()


def test_without_any_finished_run_the_page_says_so(fabricate, tmp_path, parse_page):
    fabricate.run("a2", finish=False)
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert "every result is “not run”" in page.text
    assert page.table("Unfinished runs").rows


def test_two_protocols_have_tables_of_their_own(fabricate, tmp_path, parse_page):
    fabricate.run("a2")
    fabricate.run("a2-uniform")
    fabricate.run("a2", overrides=["evaluation.num_samples=64"])
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    tables = [t for t in page.tables if t.caption.startswith("Plans and metrics")]
    assert [len(t.rows) for t in tables] == [3, 2]
    assert "num_samples = 64" in tables[1].caption
    # 64 images cannot fill a covariance of 112 features: marked, and only there.
    assert tables[1].cell("a2", "sfid_digits").small.endswith("†")
    assert not tables[1].cell("a2", "fid_digits").small.endswith("†")
    assert not tables[0].cell("a2", "sfid_digits").small.endswith("†")
    assert page.text.count("rank-deficient") == 1
    assert len(page.ids) == len(set(page.ids))


def test_other_studies_get_their_own_section(fabricate, tmp_path, parse_page):
    train = [{"key": f"train/{i}", "kind": "train", "step": i, "loss": 1 / i} for i in (1, 2, 3)]
    fabricate.pictures = False
    fabricate.run("fp", study="train-teacher", records=train)
    fabricate.run("fp", study="brand-new", records=[])
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert {"train-teacher", "study-brand-new"} <= set(page.ids)
    assert "1 run, without a verdict" in page.text
    assert "ends after 3 steps at a loss of 0.333" in page.text
    labels = [a.get("aria-label", "") for tag, a in page.tags if tag == "svg"]
    assert any("Training loss" in label and "0.333" in label for label in labels)


def test_an_unwritable_folder_is_a_clear_error(fabricate, tmp_path):
    fabricate.run("a4")
    (tmp_path / "file").write_text("")
    with pytest.raises(RobuqError, match="cannot"):
        build_report([fabricate.root], tmp_path / "file" / "report.html")
