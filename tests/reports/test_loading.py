"""Run folders as the report reads them: what is refused, and that the message names the file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest

from reports import build_report
from reports.loading import find_runs
from robuq_bench.errors import CheckpointError, UsageError


def test_a_folder_of_runs_and_its_run_folders_give_the_same_runs(fabricate):
    paths = [fabricate.run("a4"), fabricate.run("a2")]
    from_root = find_runs([fabricate.root]).runs
    assert [run.plan_name for run in from_root] == ["a2", "a4"]
    again = find_runs([*paths, fabricate.root]).runs
    assert [run.id for run in again] == [run.id for run in from_root]
    assert {run.id for run in from_root} == {f"train-and-eval/{path.name}" for path in paths}


def test_no_runs_is_a_usage_error_that_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"no runs in .*train-and-eval --plan a2"):
        build_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UsageError, match="no runs"):
        build_report([], tmp_path / "report.html")
    with pytest.raises(UsageError, match=r"no such run folder: .*nowhere"):
        build_report([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_folder_is_refused(fabricate, tmp_path):
    fabricate.run("a4")
    with pytest.raises(UsageError, match="is a folder"):
        build_report([fabricate.root], tmp_path)


@pytest.mark.parametrize(
    "name", ["results.jsonl", "manifest.json", "config.toml", "samples/grid-student.png", "DONE"]
)
def test_a_flipped_bit_in_a_finished_run_is_an_error_that_names_the_file(fabricate, tmp_path, name):
    file = fabricate.run("a4") / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    # DONE holds the manifest's checksum, so a flip there condemns the manifest.
    named = r"(DONE|manifest\.json)" if name == "DONE" else Path(name).name
    with pytest.raises(CheckpointError, match=named):
        build_report([fabricate.root], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["results.jsonl", "config.toml", "samples/grid-student.png"])
def test_a_missing_file_of_a_finished_run_is_an_error_that_names_it(fabricate, tmp_path, name):
    (fabricate.run("a4") / name).unlink()
    with pytest.raises(CheckpointError, match=Path(name).name):
        build_report([fabricate.root], tmp_path / "report.html")


def test_a_damaged_line_of_an_unfinished_run_is_named_with_its_number(fabricate):
    file = fabricate.run("a4", finish=False) / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1][:-8] + "\n", *lines[2:]]))
    found = find_runs([fabricate.root])
    assert not found.runs
    assert re.search(r"results\.jsonl.*line 2", found.left_out[0].reason)


def test_a_torn_last_line_of_an_unfinished_run_is_left_out_and_said(fabricate):
    file = fabricate.run("a4", finish=False) / "results.jsonl"
    whole = len(find_runs([fabricate.root]).runs[0].records)
    file.write_bytes(file.read_bytes()[:-9])
    run = find_runs([fabricate.root]).runs[0]
    assert run.torn
    assert len(run.records) == whole - 1


def test_a_picture_that_is_no_png_is_refused(fabricate, tmp_path):
    path = fabricate.run("a4", finish=False)
    (path / "samples").mkdir()
    (path / "samples/grid-student.png").write_bytes(b"GIF89a")
    run = find_runs([path]).runs[0]
    with pytest.raises(CheckpointError, match=r"grid-student\.png is not a PNG"):
        run.read_png("samples/grid-student.png")


def test_runs_that_were_moved_aside_are_not_read(fabricate):
    path = fabricate.run("a4")
    shutil.copytree(path, path.with_name(path.name + ".replaced-1"))
    assert len(find_runs([fabricate.root]).runs) == 1


def test_a_copy_of_a_run_counts_once_but_other_results_under_its_name_are_refused(
    fabricate, tmp_path
):
    path = fabricate.run("a4")
    copy = shutil.copytree(path, tmp_path / "elsewhere" / path.name)
    assert len(find_runs([path, copy]).runs) == 1
    fabricate.root = tmp_path / "other"
    other = fabricate.run("a4", fid=99.0)
    with pytest.raises(UsageError, match="same run with different results"):
        find_runs([path, other])
    unfinished = tmp_path / "half" / path.name
    shutil.copytree(other, unfinished)
    (unfinished / "DONE").unlink()
    assert find_runs([unfinished, path]).runs[0].finished


def test_damaged_runs_are_left_out_and_named_and_the_others_are_shown(
    fabricate, parse_page, tmp_path, caplog
):
    fabricate.run("a4")
    damaged = {}
    names = ("config.toml", "manifest.json", "results.jsonl", "samples/grid-student.png")
    for seed, name in enumerate(names):
        run = fabricate.run("a2", seed)
        if name == "config.toml":
            (run / name).unlink()
        else:
            (run / name).write_bytes(b"{}")
        damaged[str(run)] = name
    with caplog.at_level(logging.WARNING):
        page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    reasons = {row[0].text: row[1].text for row in page.table("Runs left out").rows}
    assert reasons.keys() == damaged.keys()
    for run, name in damaged.items():
        assert Path(name).name in reasons[run]
        assert f"{run} is left out of the report" in caplog.text
    assert [line[0].text for line in page.table("Plans and metrics").rows] == ["teacher", "a4"]
    assert "1 finished run, 0 unfinished, 4 left out" in page.text
    assert all("a2" not in path.read_text() for path in tmp_path.glob("report-*.csv"))


def rewrite(path, kind, **fields):
    """Change every record of a kind in a finished run, with checksums that agree."""
    lines = map(json.loads, (path / "results.jsonl").read_text().splitlines())
    changed = [{**line, **fields} if line["kind"] == kind else line for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in changed)
    (path / "results.jsonl").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["outputs"]["results.jsonl"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    sealed = json.dumps(manifest)
    (path / "manifest.json").write_text(sealed)
    (path / "DONE").write_text(f"{hashlib.sha256(sealed.encode()).hexdigest()}  manifest.json\n")


MISTYPED = [
    ("metrics", {"fid_digits": "low"}),
    ("metrics", {"recall_digits": None}),
    ("validation", {"distillation_loss": [0.1]}),
    ("metrics", {"seed_start": "first"}),
    ("metrics", {"seed_range": [0]}),
    ("metrics", {"num_samples": {}}),
    ("sensitivity", {"bits": None}),
    ("sensitivity", {"mse": "small"}),
    ("allocation", {"bits_by_layer": ["qkv"]}),
    ("allocation", {"bits_by_layer": {"blocks.0.attn.qkv": "two"}}),
    ("train", {"loss": "low"}),
    ("accounting", {"packing_table": [{"packing": "base3", "total_bytes": "many"}]}),
    ("accounting", {"packing_table": [7]}),
]


def test_runs_whose_sound_records_are_mistyped_are_left_out(fabricate, parse_page, tmp_path):
    fabricate.pictures = False
    fabricate.run("a4")
    wrong = []
    for seed, (kind, fields) in enumerate(MISTYPED):
        wrong.append(fabricate.run("a2", seed))
        rewrite(wrong[-1], kind, **fields)
        with pytest.raises(CheckpointError, match=r"no run is sound: .* of another kind"):
            build_report([wrong[-1]], tmp_path / "alone.html")
        assert not (tmp_path / "alone.html").exists()
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    reasons = {row[0].text: row[1].text for row in page.table("Runs left out").rows}
    assert reasons.keys() == {str(run) for run in wrong}
    for run, case in zip(wrong, MISTYPED, strict=True):
        assert "of another kind" in reasons[str(run)], case
    assert [line[0].text for line in page.table("Plans and metrics").rows] == ["teacher", "a4"]
