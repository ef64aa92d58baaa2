"""Opening runs: one writer at a time, every session recorded, nothing deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config, resolve
from robuq_bench.errors import CheckpointError, RobuqError, UsageError
from robuq_bench.runs.run import Run, list_runs, open_existing, run_folder, verify_run

ROOT = Path(__file__).resolve().parents[1]
ARGV = ["bench.py", "train-and-eval", "--plan", "fp"]

HOLDER = """
import sys, time
from pathlib import Path
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run
run = Run.open(Path(sys.argv[1]), resolve("train-and-eval", "1", "fp", "digits"), ["holder"])
run.append("first", value=1)
print("open", flush=True)
if sys.argv[2] == "appending":
    for number in range(10**9):
        run.append(f"item/{number}", value=[number] * 100)
time.sleep(float(sys.argv[2]))
run.finish()
run.close()
"""


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve("train-and-eval", "1", "fp", "digits")


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


def start_holder(root: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(root), how]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_resumed_run_records_every_session(tmp_path: Path, config: Config) -> None:
    def fail(argv: str, error: type[BaseException]) -> None:
        with Run.open(tmp_path, config, [argv], threads=3) as run:
            assert run.has("a") == (argv == "2")
            run.append("a", value=1)
            raise error

    with pytest.raises(ZeroDivisionError):
        fail("1", ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):
        fail("2", KeyboardInterrupt)
    with Run.open(tmp_path, config, ["3"], threads=9):
        pass
    end(start_holder(tmp_path, "60"))
    with Run.open(tmp_path, config, ["5"]) as run:
        run.finish()
    sessions = manifest_of(run.path)["sessions"]
    assert [session["argv"] for session in sessions] == [["1"], ["2"], ["3"], ["holder"], ["5"]]
    assert [session["status"] for session in sessions] == [
        "failed: ZeroDivisionError",
        "interrupted",
        "stopped",
        "killed",
        "finished",
    ]
    assert [session["end"] is None for session in sessions] == [False, False, False, True, False]
    assert sessions[0]["provenance"]["threads"] == 3
    assert sessions[2]["provenance"]["threads"] == 9
    assert run.get("first") == {"key": "first", "value": 1}


def test_killed_while_appending_loses_at_most_one_item(tmp_path: Path, config: Config) -> None:
    reached = 0
    for _ in range(2):
        holder = start_holder(tmp_path, "appending")
        time.sleep(0.1)
        end(holder)
        run = open_existing(run_folder(tmp_path, config))
        numbers = [int(r["key"].split("/")[1]) for r in run.results() if "/" in r["key"]]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= reached
        reached = len(numbers)
    assert reached > 0


def test_two_processes_never_write_one_run(tmp_path: Path, config: Config) -> None:
    holder = start_holder(tmp_path, "60")
    try:
        path = run_folder(tmp_path, config)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for force in (False, True):
            started = time.monotonic()
            with pytest.raises(UsageError, match=rf"process {holder.pid} on .*{path}"):
                Run.open(tmp_path, config, ARGV, force=force, wait_s=0.2 if force else 0.0)
            assert time.monotonic() - started < 5
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        assert list_runs(tmp_path)[0].state == "running"
        assert open_existing(path).get("first") is not None
        with Run.open(tmp_path, resolve("train-and-eval", "1", "a3", "digits"), ARGV):
            pass  # another run is free
    finally:
        end(holder)
    assert list_runs(tmp_path)[0].state == "stopped"


def test_two_openings_in_one_process_are_refused_too(tmp_path: Path, config: Config) -> None:
    with (
        Run.open(tmp_path, config, ARGV),
        pytest.raises(UsageError, match=f"process {os.getpid()}"),
    ):
        Run.open(tmp_path, config, ARGV)


def test_waiting_for_the_other_process_gives_its_result(tmp_path: Path, config: Config) -> None:
    holder = start_holder(tmp_path, "0.5")
    with Run.open(tmp_path, config, ARGV, wait_s=60) as run:
        assert run.is_done
        assert run.has("first")
    assert holder.wait() == 0
    end(holder)


def test_stopped_process_keeps_its_run(tmp_path: Path, config: Config) -> None:
    holder = start_holder(tmp_path, "60")
    try:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(UsageError, match=str(holder.pid)):
            Run.open(tmp_path, config, ARGV)
    finally:
        holder.send_signal(signal.SIGCONT)
        end(holder)


def test_force_moves_aside_and_deletes_nothing(tmp_path: Path, config: Config) -> None:
    path = finished(tmp_path, config)
    first = {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    for number in (1, 2):
        with Run.open(tmp_path, config, ARGV, force=True) as run:
            assert run.results() == []
            run.append("round", value=number)
    aside = path.with_name(path.name + ".replaced-1")
    assert {f.relative_to(aside): f.read_bytes() for f in aside.rglob("*") if f.is_file()} == first
    assert verify_run(aside) == []
    second = open_existing(path.with_name(path.name + ".replaced-2"))
    assert second.get("round") == {"key": "round", "value": 1}
    assert [summary.path for summary in list_runs(tmp_path)] == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_damaged_manifest_of_an_unfinished_run(
    tmp_path: Path, config: Config, content: bytes
) -> None:
    with Run.open(tmp_path, config, ARGV) as run:
        run.append("a", value=1)
    (run.path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*--force"):
        Run.open(tmp_path, config, ARGV)
    assert "manifest.json is damaged" in verify_run(run.path)[0]
    (run.path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing.*--force"):
        Run.open(tmp_path, config, ARGV)


def test_folder_of_another_config_is_refused(tmp_path: Path, config: Config) -> None:
    other = resolve("train-and-eval", "1", "a2", "digits", 5)
    finished(tmp_path, other).rename(run_folder(tmp_path, config))
    with pytest.raises(CheckpointError, match="another config"):
        Run.open(tmp_path, config, ARGV)


@pytest.mark.parametrize("root", ["{tmp}/file", "{tmp}/file/runs", "/proc/robuq"])
def test_output_that_is_not_writable(tmp_path: Path, config: Config, root: str) -> None:
    (tmp_path / "file").write_text("")
    place = root.format(tmp=tmp_path)
    with pytest.raises(RobuqError, match=rf"folder {place}.*--output") as caught:
        Run.open(Path(place), config, ARGV)
    assert caught.value.exit_code != 0
    assert list_runs(Path(place)) == []


def test_an_untouched_run_leaves_no_trace(tmp_path: Path, config: Config) -> None:
    root = tmp_path / "deep" / "runs"
    with Run.open(root, config, ARGV) as run:
        run.add_input_digest("data", "0" * 64)
        run.remove_if_untouched()
        run.remove_if_untouched()
    assert list((tmp_path / "deep").iterdir()) == []
    with Run.open(root, config, ARGV) as run:  # as if nothing had been
        run.append("a", kind="a")
    assert run.path.is_dir()


@pytest.mark.parametrize("touch", ["a record", "a file", "an earlier session"])
def test_a_touched_run_stays(tmp_path: Path, config: Config, touch: str) -> None:
    if touch == "an earlier session":
        Run.open(tmp_path, config, ARGV).close()
    with Run.open(tmp_path, config, ARGV) as run:
        if touch == "a record":
            run.append("a", kind="a")
        if touch == "a file":
            run.write_text("checkpoints/a.txt", "a")
        run.remove_if_untouched()
    assert manifest_of(run.path)["sessions"][-1]["status"] == "stopped"


def test_what_force_moved_aside_is_back(tmp_path: Path, config: Config) -> None:
    path = finished(tmp_path, config)
    before = sorted(path.rglob("*"))
    with Run.open(tmp_path, config, ARGV, force=True) as run:
        run.remove_if_untouched()
    assert sorted(path.rglob("*")) == before
    assert open_existing(path).is_done
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == [path.name]
