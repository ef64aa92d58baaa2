"""Run folders: addressed by content, complete when done, intact when a write fails."""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config, config_from_toml, config_hash, resolve
from robuq_bench.errors import CheckpointError, ConfigError, RobuqError
from robuq_bench.files import sha256_file
from robuq_bench.runs import run as runs
from robuq_bench.runs.run import Run, open_existing, run_folder, verify_run

ROOT = Path(__file__).resolve().parents[1]
ARGV = ["bench.py", "train-and-eval", "--plan", "a2"]


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve("train-and-eval", "1", "a2", "digits")


def finished(root: Path, config: Config) -> Path:
    with Run.open(root, config, ARGV) as run:
        run.append("train/000100", kind="train", loss=0.25)
        run.append("metrics/student/0", kind="metrics", fid_digits=12.5)
        run.write_table("metrics", [{"plan": "a2", "fid_digits": 12.5}])
        run.write_bytes("samples/grid-student.png", b"png")
        CheckpointStore(run.checkpoint_folder).save(1, {}, {})
        run.finish()
    return run.path


def manifest_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return content


def test_folder_is_addressed_by_content(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        name = f"a2-digits-{config_hash(config)[:12]}"
        assert run.path == tmp_path / "train-and-eval" / name == run_folder(tmp_path, config)
        assert run.id == f"train-and-eval/{name}"
    others = [
        resolve("train-and-eval", "2", "a2", "digits"),
        resolve("train-and-eval", "1", "a2", "digits", 1),
        resolve("train-and-eval", "1", "a2", "digits", 0, ["training.steps=700"]),
        resolve("sensitivity", "1", "a2", "digits"),
    ]
    assert len({run_folder(tmp_path, other) for other in [config, *others]}) == 5


def test_finished_run_holds_everything(tmp_path: Path, config: Config) -> None:
    path = finished(tmp_path, config)
    manifest = manifest_of(path)
    assert config_from_toml((path / "config.toml").read_text(), "config.toml") == config
    assert set(manifest["outputs"]) == {
        "config.toml",
        "results.jsonl",
        "tables/metrics.csv",
        "samples/grid-student.png",
        "checkpoints/step-00000001.safetensors",
        "checkpoints/step-00000001.safetensors.sha256",
    }
    assert (path / "DONE").read_text().split() == [
        sha256_file(path / "manifest.json"),
        "manifest.json",
    ]
    (session,) = manifest["sessions"]
    assert session["argv"] == ARGV
    assert session["status"] == "finished"
    assert session["start"] <= session["end"]
    assert session["provenance"]["device"] == "cpu"
    assert session["provenance"]["packages"]["torch"]
    assert verify_run(path) == []
    assert not [entry for entry in path.rglob("*") if entry.name.startswith(".")]


def test_second_identical_command_computes_and_writes_nothing(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path, config)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    monkeypatch.setattr(runs, "acquire_lock", None)
    with Run.open(tmp_path, config, ARGV) as run:
        assert run.is_done
        assert run.get("metrics/student/0")["fid_digits"] == 12.5  # type: ignore[index]
        for change in (
            lambda: run.append("more", value=1),
            lambda: run.write_text("a.txt", "x"),
            lambda: run.figure_path("a"),
            lambda: run.add_input_digest("a", "0" * 64),
            run.finish,
        ):
            with pytest.raises(RobuqError, match=r"is finished.*--force"):
                change()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert path == run.path


def test_records_read_back_as_a_resumed_run_sees_them(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        run.append("b", by_bits={2: 0.1}, pair=(1, 2), text="é\n")
        run.append("a", value=np.float32(0.5), count=np.int64(3))
        here = run.results()
        run.results()[0]["key"] = "changed"
    assert here == open_existing(run.path).results()
    assert here[0] == {"key": "b", "by_bits": {"2": 0.1}, "pair": [1, 2], "text": "é\n"}
    assert here[1] == {"key": "a", "value": 0.5, "count": 3}
    assert run.has("a")
    assert not run.has("c")
    assert run.get("c") is None


def test_newest_record_of_a_key_counts_and_equal_ones_are_not_repeated(
    tmp_path: Path, config: Config
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        for key, value in (("a", 1), ("b", 2), ("a", 1), ("a", 3)):
            run.append(key, value=value)
    assert (run.path / "results.jsonl").read_text().count("\n") == 3
    assert open_existing(run.path).results() == [{"key": "a", "value": 3}, {"key": "b", "value": 2}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), np.zeros(2)])
def test_values_that_json_cannot_hold(tmp_path: Path, config: Config, value: object) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        with pytest.raises(RobuqError, match="result 'a' of run train-and-eval/a2-digits"):
            run.append("a", value=value)
        assert run.results() == []


def test_tables_are_what_csv_reads(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        rows = [{"plan": 'a,"2"', "fid": 0.1 + 0.2}, {"plan": "é", "note": "x\ny"}]
        path = run.write_table("metrics", rows)
        assert path == run.path / "tables" / "metrics.csv"
        assert run.write_table("metrics.csv", rows) == path
        with pytest.raises(RobuqError, match=r"'empty'.*no rows"):
            run.write_table("empty", [])
    with path.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert float(read[0]["fid"]) == 0.1 + 0.2
    assert read[0]["plan"] == 'a,"2"'
    assert read[1] == {"plan": "é", "fid": "", "note": "x\ny"}


def test_outputs_stay_inside_the_run(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        assert run.figure_path("loss") == run.path / "figures" / "loss.svg"
        assert run.figure_path("grid.png").parent.is_dir()
        for name in ("../a", "/a", "a/../../b", ".hidden", "", "DONE", "results.jsonl"):
            with pytest.raises(RobuqError, match="no place for an output"):
                run.write_text(name, "x")
    with pytest.raises(RobuqError, match="reading only"):
        open_existing(run.path).write_text("a", "x")


def test_inputs_are_recorded_and_must_not_change(tmp_path: Path, config: Config) -> None:
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"weights")
    with Run.open(tmp_path / "runs", config, ARGV) as run:
        digest = run.add_input(teacher, name="teacher")
        assert digest == sha256_file(teacher)
        run.add_input_digest("data", "1" * 64, source="digits")
    with Run.open(tmp_path / "runs", config, ARGV) as run:
        run.add_input(teacher, name="teacher")
        with pytest.raises(CheckpointError, match="input data changed"):
            run.add_input_digest("data", "2" * 64)
        with pytest.raises(CheckpointError, match=r"nothing\.bin cannot be read"):
            run.add_input(tmp_path / "nothing.bin")
        run.finish()
    assert manifest_of(run.path)["inputs"] == {
        "teacher": {"sha256": digest, "path": str(teacher)},
        "data": {"sha256": "1" * 64, "source": "digits"},
    }
    teacher.write_bytes(b"other weights")
    assert verify_run(run.path) == ["input teacher: changed since the run"]
    teacher.unlink()
    assert verify_run(run.path) == []


def test_run_of_an_older_version_can_still_be_read(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        run.append("a", value=1)
    assert open_existing(run.path).config == config
    source = run.path / "config.toml"
    source.write_text("retired_key = 1\n" + source.read_text())
    old = open_existing(run.path)
    assert old.has("a")
    with pytest.raises(ConfigError, match="retired_key"):
        _ = old.config


def test_full_disk_keeps_what_was_there(tmp_path: Path, config: Config) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run.open(tmp_path, config, ARGV) as run:
        run.append("a", value=1)
        run.write_text("notes.txt", "old")
        before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        try:
            for change in (
                lambda: run.append("b", value="x" * 4_000),
                lambda: run.write_text("notes.txt", "x" * 4_000),
                lambda: run.add_input_digest("x" * 4_000, "0" * 64),
                run.finish,
            ):
                with pytest.raises(RobuqError, match=rf"folder {run.path}.*free some space"):
                    change()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        assert not run.has("b")
        assert not run.is_done
        assert manifest_of(run.path)["inputs"] == run.manifest["inputs"] == {}
        run.append("b", value=2)  # space was freed: the same session goes on
        run.finish()
    assert verify_run(run.path) == []
    assert [record["key"] for record in open_existing(run.path).results()] == ["a", "b"]


def test_error_in_the_block_is_not_hidden_by_a_full_disk(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def fail() -> None:
        with Run.open(tmp_path, config, ARGV):
            monkeypatch.setattr(os, "fsync", full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    monkeypatch.undo()
    with Run.open(tmp_path, config, ARGV) as run:  # and the lock was let go of
        run.finish()


@pytest.mark.parametrize("plan", ["a2", "fp"])
def test_existing_run_opens_fast_and_without_torch(tmp_path: Path, plan: str) -> None:
    path = finished(tmp_path, resolve("train-and-eval", "1", plan, "digits"))
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from robuq_bench.runs.run import list_runs, open_existing, verify_run\n"
        "start = time.process_time()\n"
        "run = open_existing(Path(sys.argv[1]))\n"
        "assert run.is_done and run.manifest['plan'] == sys.argv[2] and not verify_run(run.path)\n"
        "assert [run.path] == [summary.path for summary in list_runs(run.path.parents[1])]\n"
        "if sys.argv[2] == 'fp':  # methods that a plan names are imported with its config\n"
        "    assert run.config.plan.name == 'fp'\n"
        "assert time.process_time() - start < 0.5\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), plan], cwd=ROOT, check=True)


def test_a_path_that_is_not_utf8_can_be_recorded(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ["bench.py", "\udcff", "é"]) as run:
        run.add_input_digest("data", "0" * 64, path="/d\udcff")
    text = (run.path / "manifest.json").read_text("utf-8")
    assert "\\udcff" in text
    assert "é" in text
    assert open_existing(run.path).manifest == run.manifest
