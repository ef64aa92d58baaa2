"""Reading run folders: what a kill tore is dropped, any other damage is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config, resolve
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.runs.run import Run, list_runs, open_existing, verify_run

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


@pytest.mark.parametrize(
    "torn", [b'{"key": "c", "va', b'{"key": "c", "value": 3}', b"\0\0\0\n", b"{}\n", b"\xff\n"]
)
def test_torn_last_line_is_dropped(
    tmp_path: Path, config: Config, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        run.append("a", value=1)
        run.append("b", value=2)
    results = run.path / "results.jsonl"
    sound = results.read_bytes()
    results.write_bytes(sound + torn)
    caplog.set_level(logging.WARNING)
    assert [record["key"] for record in open_existing(run.path).results()] == ["a", "b"]
    assert results.read_bytes() == sound + torn  # reading changes nothing
    assert verify_run(run.path) == ["the run is not finished", f"{results}: line 3 is torn"]
    with Run.open(tmp_path, config, ARGV) as run:
        assert results.read_bytes() == sound
        run.append("c", value=3)
    assert [record["key"] for record in open_existing(run.path).results()] == ["a", "b", "c"]
    assert "line 3 is torn" in caplog.text


@pytest.mark.parametrize(
    ("line", "damaged"), [(1, b'{"key": "a", "val'), (2, b"\xff\xfe"), (2, b""), (1, b"[1]")]
)
def test_damaged_middle_line_is_named(
    tmp_path: Path, config: Config, line: int, damaged: bytes
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        for key in "abc":
            run.append(key, value=1)
    results = run.path / "results.jsonl"
    lines = results.read_bytes().split(b"\n")
    lines[line - 1] = damaged
    results.write_bytes(b"\n".join(lines))
    for opening in (lambda: open_existing(run.path), lambda: Run.open(tmp_path, config, ARGV)):
        with pytest.raises(CheckpointError, match=rf"results\.jsonl: line {line} is damaged"):
            opening()
    assert results.read_bytes() == b"\n".join(lines)
    assert list_runs(tmp_path)[0].state == "damaged"
    with Run.open(tmp_path, config, ARGV, force=True) as run:  # the lock was let go of
        assert run.results() == []


@pytest.mark.parametrize(
    "name", ["results.jsonl", "tables/metrics.csv", "config.toml", "manifest.json", "DONE"]
)
def test_verify_finds_every_flipped_bit(tmp_path: Path, config: Config, name: str) -> None:
    path = finished(tmp_path, config)
    data = bytearray((path / name).read_bytes())
    position = data.index(b"12.5") + 1 if b"12.5" in data else 10
    data[position] ^= 1
    (path / name).write_bytes(data)
    problems = verify_run(path)
    assert any(name in problem or problem.startswith("manifest") for problem in problems)
    if name in ("results.jsonl", "manifest.json", "DONE"):  # what a number is read from
        for opening in (lambda: open_existing(path), lambda: Run.open(tmp_path, config, ARGV)):
            with pytest.raises(CheckpointError, match=rf"{name}|manifest\.json"):
                opening()
        assert list_runs(tmp_path)[0].state == "damaged"


def test_verify_finds_files_that_came_or_went(tmp_path: Path, config: Config) -> None:
    path = finished(tmp_path, config)
    (path / "samples" / "grid-student.png").unlink()
    (path / "samples" / "more.png").write_bytes(b"")
    assert verify_run(path) == [
        "samples/grid-student.png: missing",
        "samples/more.png: not in the manifest",
    ]


def test_verify_of_an_unfinished_run_checks_its_checkpoints(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        store = CheckpointStore(run.checkpoint_folder / "training")
        store.save(1, {}, {"a": "b"})
    assert verify_run(run.path) == ["the run is not finished"]
    data = bytearray(store.path(1).read_bytes())
    data[-2] ^= 1
    store.path(1).write_bytes(data)
    assert "step-00000001.safetensors is damaged" in verify_run(run.path)[1]


def test_no_run_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=f"no run in {path}"):
            open_existing(path)
        with pytest.raises(UsageError, match=f"no run in {path}"):
            verify_run(path)
        assert list_runs(path) == []


def test_runs_are_listed(tmp_path: Path, config: Config) -> None:
    other = resolve("train-and-eval", "1", "fp", "digits", 3)
    with Run.open(tmp_path, other, ARGV) as run:
        run.append("a", value=1)
    finished(tmp_path, config)
    done, stopped = list_runs(tmp_path)
    assert (done.plan, done.workload, done.seed, done.state, done.items) == (
        "a2", "digits", 0, "done", 2,
    )  # fmt: skip
    assert (stopped.id, stopped.seed, stopped.state) == (run.id, 3, "stopped")
    assert str(done.started) <= str(done.ended)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs", None), ("inputs", {"data": "abc"}), ("inputs", {"data": {}}), ("outputs", []),
        ("outputs", {"a": {"sha256": 3}}), ("sessions", {}), ("sessions", [None]),
        ("sessions", [{"status": "running"}]), ("config_sha256", 1), ("plan", 1), ("seed", "0"),
        ("workload", []), ("inputs", {"data": {"sha256": "", "path": 1}}),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_damaged(
    tmp_path: Path, config: Config, field: str, value: object
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        pass
    change_manifest(run.path, field, value)
    assert_refused(tmp_path, config, run.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", 1), ("end", 1), ("status", None), ("host", 1), ("pid", "1"), ("argv", "bench.py"),
        ("argv", [1]), ("pid_started", 1), ("provenance", []), ("provenance", {"device": "cpu"}),
    ],
)  # fmt: skip
def test_a_session_of_another_shape_is_damage(
    tmp_path: Path, config: Config, field: str, value: object
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        pass
    (session,) = run.manifest["sessions"]
    change_manifest(run.path, "sessions", [session])
    assert open_existing(run.path).manifest == run.manifest
    change_manifest(run.path, "sessions", [session | {field: value}])
    assert_refused(tmp_path, config, run.path)


def change_manifest(path: Path, field: str, value: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | {field: value}
    (path / "manifest.json").write_text(json.dumps(manifest))


def assert_refused(root: Path, config: Config, path: Path) -> None:
    for opening in (lambda: open_existing(path), lambda: Run.open(root, config, ARGV)):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: fields are missing"):
            opening()
    assert [summary.state for summary in list_runs(root)] == ["damaged"]
    assert "manifest.json is damaged" in verify_run(path)[0]
