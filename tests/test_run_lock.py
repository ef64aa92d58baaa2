"""Who writes a run: the lock says so; without locks a process number and its beginning do."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import Config, resolve
from robuq_bench.errors import UsageError
from robuq_bench.runs import lock as run_lock
from robuq_bench.runs.run import Run, list_runs

ROOT = Path(__file__).resolve().parents[1]
MISSING = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP]


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve("train-and-eval", "1", "a2", "digits")


@pytest.fixture(params=MISSING, ids=[errno.errorcode[code] for code in MISSING])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose `flock` is not there, such as Lustre without its mount option."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def rewrite_session(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sessions"][-1].update(status="running", end=None, **fields)
    (path / "manifest.json").write_text(json.dumps(manifest))


def state(root: Path) -> str:
    (summary,) = list_runs(root)
    return summary.state


@pytest.mark.parametrize("where", ["this machine", "another machine"])
def test_a_run_that_nobody_has_locked_is_stopped(
    tmp_path: Path, config: Config, where: str
) -> None:
    with Run.open(tmp_path, config, []) as run:
        assert state(tmp_path) == "running"
    # Killed; its number belongs to a process that lives, or its host cannot be asked.
    host = {} if where == "this machine" else {"host": "elsewhere"}
    rewrite_session(run.path, pid=os.getpid(), **host)
    assert state(tmp_path) == "stopped"
    assert run_lock.status_of(run.path, run.manifest["sessions"][-1] | {"status": "running"}) == (
        "killed"
    )
    run_lock.lock_path(run.path).unlink()  # a copy of the folder has no lock at all
    assert state(tmp_path) == "stopped"
    with Run.open(tmp_path, config, []) as again:
        assert run_lock.status_of(again.path, again.manifest["sessions"][-1]) == "running"
        statuses = [session["status"] for session in again.manifest["sessions"]]
    assert statuses == ["killed", "running"]


def test_asking_writes_nothing_and_disturbs_nobody(tmp_path: Path, config: Config) -> None:
    with Run.open(tmp_path, config, []) as run:
        pass
    before = sorted(run.path.parent.iterdir())
    for _ in range(3):
        assert run_lock.is_locked(run.path) is False
    assert sorted(run.path.parent.iterdir()) == before
    # Whoever asks holds the lock for an instant, which a run that starts waits for.
    descriptor = os.open(run_lock.lock_path(run.path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    asking = threading.Timer(0.05, os.close, [descriptor])
    asking.start()
    Run.open(tmp_path, config, []).close()
    asking.join()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_process_writes_all_the_same(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Run.open(tmp_path, config, []) as run:
        assert state(tmp_path) == "running"
        with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
            Run.open(tmp_path, config, [])
    assert state(tmp_path) == "stopped"
    rewrite_session(run.path, pid=os.getpid(), pid_started="1")  # the number came again
    assert state(tmp_path) == "stopped"
    rewrite_session(run.path, pid=os.getpid(), pid_started=run_lock.process_started(os.getpid()))
    assert state(tmp_path) == "running"
    rewrite_session(run.path, host="elsewhere")  # only its word is known
    assert state(tmp_path) == "running"
    with Run.open(tmp_path, config, []):
        pass
    assert state(tmp_path) == "stopped"


def test_a_process_that_is_gone_does_not_live() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        session = {"pid": child.pid, "pid_started": run_lock.process_started(child.pid)}
        assert run_lock.process_lives(session)
        assert run_lock.process_lives({"pid": child.pid})  # a session of an older version
        assert not run_lock.process_lives({**session, "pid_started": "0"})
        child.kill()
    assert not run_lock.process_lives(session)
