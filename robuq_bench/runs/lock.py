"""Who writes a run: the kernel's lock beside its folder; a process number where there is none.

Process numbers come again (in containers at once), so they are asked only on file systems without
locks, and together with the moment at which the process began.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

_LOG = logging.getLogger(__name__)
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})
_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})
#: A lock is held for an instant by whoever only asks whether it is; see `is_locked`.
PATIENCE_S = 0.25


def lock_path(path: Path) -> Path:
    """Return the lock file of the run folder `path`: beside it, so that the folder can be moved."""
    return path.with_name(f".{path.name}.lock")


def take_lock(path: Path, wait_s: float) -> filelock.BaseFileLock:
    """Lock the run folder `path`, by a marker file where the file system has no locks.

    Raises:
        filelock.Timeout: another process holds it.
        OSError: the lock file cannot be created.
    """
    lock: filelock.BaseFileLock = filelock.FileLock(lock_path(path), thread_local=False)
    if not _has_locks(lock_path(path)):
        marker = _marker(path)
        _LOG.warning(
            "folder %s is on a file system without locks: %s marks who writes; delete it after a "
            "crash if a run is refused",
            path.parent,
            marker.name,
        )
        lock = filelock.SoftFileLock(marker, thread_local=False)
    lock.acquire(timeout=max(wait_s, PATIENCE_S))
    return lock


def _has_locks(place: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # Windows, where filelock uses another call
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return True


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock-marker")


def is_running(path: Path, session: Mapping[str, Any]) -> bool:
    """Whether a process writes the run folder `path`, whose newest session is `session`.

    A lock says so for sure. Without locks, a session of this machine runs while its process lives,
    and of another machine's only its word is known.
    """
    locked = is_locked(path)
    if locked is not None:
        return locked
    if session["status"] != "running":
        return False
    return session["host"] != platform.node() or process_lives(session)


def status_of(path: Path, session: Mapping[str, Any]) -> str:
    """How the newest session of the run folder `path` ended; a kill wrote no word of its own."""
    status = str(session.get("status", "unknown"))
    return "killed" if status == "running" and not is_running(path, session) else status


def is_locked(path: Path) -> bool | None:
    """Whether the run folder `path` is locked; None where the file system (or Windows) cannot say.

    Nothing is written, so folders that may only be read can be asked about.
    """
    try:
        import fcntl

        descriptor = os.open(lock_path(path), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _HELD else None
    finally:
        os.close(descriptor)  # lets go of the lock too
    return None if _marker(path).exists() else False


def process_started(pid: int) -> str | None:
    """Return when a process began, in ticks since this machine's; None where `/proc` is not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def process_lives(session: Mapping[str, Any]) -> bool:
    """Whether the process that opened `session` on this machine is still there."""
    try:
        os.kill(session["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and another user's
    began = session.get("pid_started")
    return began is None or began == process_started(session["pid"])
