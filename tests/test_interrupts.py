"""SIGTERM, SIGHUP and Ctrl-C: a checkpoint at the step boundary, an exit code, and resumption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.checkpointing import CheckpointStore, load_tensors
from robuq_bench.runs import interrupts
from robuq_bench.runs.run import Run, list_runs, open_existing

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "training.steps=21",
    "training.log_every_steps=7",
    "training.checkpoint_every_steps=1000",
    "evaluation.num_samples=10",
    "evaluation.seed_ranges=1",
    "evaluation.grid_images=0",
)


@pytest.fixture(autouse=True)
def _signals_as_a_shell_gives_them() -> Iterator[None]:
    """Under nohup the suite inherits that SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send_here(number: int) -> None:
    """To the main thread: a signal to the process may be taken by another, and so come later."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def send(number: int) -> None:
    send_here(number)
    time.sleep(1)  # the handler runs before the next line of Python, or ends the sleep
    raise AssertionError("the signal was not delivered")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_is_under_way(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    expected = KeyboardInterrupt if number == signal.SIGINT else interrupts.Terminated
    with pytest.raises(expected) as caught, interrupts.handled():
        send(number)
    if isinstance(caught.value, interrupts.Terminated):
        assert caught.value.exit_code == 128 + number
        assert str(caught.value) == number.name
    assert signal.getsignal(number) is before


def test_a_loop_finishes_its_step_first() -> None:
    steps = []

    def loop() -> None:
        with interrupts.handled(), interrupts.at_step_boundary() as asked:
            for step in range(5):
                if step == 2:
                    send_here(signal.SIGTERM)
                steps.append(step)
                if asked():
                    break

    with pytest.raises(interrupts.Terminated):
        loop()
    assert steps == [0, 1, 2]
    with interrupts.handled(), interrupts.at_step_boundary() as asked:
        assert not asked()  # the next command starts without it


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with interrupts.handled():
            send_here(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with interrupts.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@contextmanager
def at_the_same_time() -> Iterator[None]:
    """What is sent in the block arrives at once when it is left."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])


def test_copies_of_a_signal_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[Any] = []  # "Signal 15 ignored due to race condition" would be one
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    steps = []

    def loop() -> None:
        with interrupts.handled(), interrupts.at_step_boundary() as asked:
            for step in range(9):
                if step in (2, 3):
                    with at_the_same_time():
                        send_here(signal.SIGTERM)
                        send_here(signal.SIGHUP)
                steps.append(step)
                if asked() and step == 4:
                    break

    with pytest.raises(interrupts.Terminated, match="SIGHUP"):  # the lower number comes first
        loop()
    assert steps == [0, 1, 2, 3, 4]

    def both() -> None:
        with interrupts.handled(), at_the_same_time():
            send_here(signal.SIGTERM)
            send_here(signal.SIGHUP)

    with pytest.raises(interrupts.Terminated):
        both()
    assert [each for each in unraisable if isinstance(each.exc_value, OSError)] == []


def test_a_later_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def loop() -> None:
        with interrupts.handled(), interrupts.at_step_boundary():
            send_here(signal.SIGTERM)
            send_here(signal.SIGTERM)
            assert codes == []
            monkeypatch.setattr(interrupts, "GRACE_S", 0.0)
            send_here(signal.SIGHUP)
            assert codes == [129]

    with pytest.raises(interrupts.Terminated):
        loop()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_exit_code_is_that_of_the_first(second: signal.Signals) -> None:
    code = (
        "import os, sys, time\nfrom robuq_bench.runs.interrupts import *\n"
        "def end(number):\n    os.kill(os.getpid(), number)\n    time.sleep(0.05)\n"
        "try:\n    with handled(until_exit=True), at_step_boundary():\n        end(15)\n"
        f"except Terminated as error:\n    end({int(second)})\n    sys.exit(error.exit_code)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stderr) == (143, "")


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_study_keeps_its_items(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals, code: int, status: str,
) -> None:  # fmt: skip
    good = sys.modules["studies.toy_study"].measure

    def stop(config: Any, run: Run, context: Any) -> list[dict[str, Any]]:
        run.append("item/0", kind="toy", value=0)
        send(number)
        return []

    monkeypatch.setattr(sys.modules["studies.toy_study"], "measure", stop)
    outcome = bench("study", "toy-study", "--json")
    assert outcome.code == outcome.document["exit_code"] == code
    assert "the same command continues" in outcome.err
    assert "Traceback" not in outcome.err
    (summary,) = list_runs(Path("runs"))
    assert (summary.state, summary.items) == ("stopped", 1)
    monkeypatch.setattr(sys.modules["studies.toy_study"], "measure", good)
    path = Path(bench("study", "toy-study", "--json").document["path"])
    sessions = open_existing(path).manifest["sessions"]
    assert [session["status"] for session in sessions] == [status, "finished"]


def command(workload: Path, root: Path) -> list[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return [
        *("train-and-eval", "--plan", "a4", "--on", str(workload), "--threads", "1"),
        *("--device", "cpu", "--quiet", "--json", "-o", str(root), *settings),
    ]


def results(path: Path) -> list[dict[str, Any]]:
    """What was measured, without what took how long."""
    records = open_existing(path).results()
    return [
        {name: value for name, value in record.items() if not name.endswith("seconds")}
        for record in records
        if record["kind"] != "timing"
    ]


def test_sigterm_in_training_then_the_same_command(
    bench: Any, tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Run.append

    def append_and_end(run: Run, key: str, **fields: Any) -> None:
        append(run, key, **fields)
        if key.startswith("train/") and key.endswith("14"):
            for _ in range(3):  # a wrapper passes on what the whole process group got
                send_here(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", append_and_end)
        outcome = bench(*command(tiny_workload, tmp_path / "stopped"))
    assert outcome.code == outcome.document["exit_code"] == 143, outcome.err
    assert "Traceback" not in outcome.err
    (path,) = tmp_path.glob("stopped/train-and-eval/a4-*")
    (step,) = CheckpointStore(path / "checkpoints" / "training").steps()
    assert 14 <= step < 21  # no regular checkpoint is due before the last step
    assert open_existing(path).manifest["sessions"][-1]["status"] == "stopped"
    (state,) = [s.state for s in list_runs(tmp_path / "stopped") if s.path == path]
    assert state == "stopped"

    assert bench(*command(tiny_workload, tmp_path / "stopped")).code == 0
    assert bench(*command(tiny_workload, tmp_path / "whole")).code == 0
    (whole,) = tmp_path.glob("whole/train-and-eval/a4-*")
    assert results(path) == results(whole)
    name = Path("checkpoints") / "student-ema.safetensors"
    resumed, uninterrupted = load_tensors(path / name)[0], load_tensors(whole / name)[0]
    assert resumed.keys() == uninterrupted.keys()
    assert all(resumed[key].equal(uninterrupted[key]) for key in resumed)
