"""Run folders: addressed by content, written by one process at a time, resumable at any instant.

    runs/<study>/<plan>-<workload>-<hash12>/
        config.toml manifest.json results.jsonl tables/ figures/ checkpoints/ samples/ DONE

`results.jsonl` grows by one line per finished item, so a kill loses at most one item. `DONE` comes
last and holds the SHA-256 of `manifest.json`, which holds that of every other file. The lock lies
beside the folder, so that `--force` can move the folder aside while it is held.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import filelock

from robuq_bench.config import Config, config_from_toml, to_toml
from robuq_bench.errors import CheckpointError, RobuqError
from robuq_bench.files import (
    append_durably,
    atomic_write_bytes,
    atomic_write_text,
    make_folder,
    remove_temporaries,
    sha256_file,
)
from robuq_bench.runs import provenance
from robuq_bench.runs.interrupts import Terminated
from robuq_bench.runs.lock import process_started
from robuq_bench.runs.opening import (
    acquire_lock,
    check_config,
    is_run_of,
    load_or_create_manifest,
    move_aside,
    recover_results,
    run_folder,
    take_back,
)
from robuq_bench.runs.run_files import (
    CHECKPOINTS,
    CONFIG,
    DONE,
    MANIFEST,
    RESULTS,
    Record,
    RunSummary,
    check_done,
    hash_outputs,
    list_runs,
    read_manifest,
    read_results,
    to_csv,
    verify_run,
)

__all__ = ["Run", "RunSummary", "list_runs", "open_existing", "run_folder", "verify_run"]

_LOG = logging.getLogger(__name__)
_RESERVED = frozenset({CONFIG, DONE, MANIFEST, RESULTS})


class Run:
    """One run folder, open for writing (`Run.open`) or reading (`open_existing`).

    Use it as a context manager: leaving the block records how the session ended and lets go of
    the lock. Every write is on the disk, whole, when its method returns; a write that fails raises
    `RobuqError` naming the folder and leaves earlier files intact.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        records: dict[str, Record],
        lock: filelock.BaseFileLock | None = None,
        config: Config | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._records = records
        self._lock = lock
        self._config = config
        self._made: list[Path] = []  # folders that were not there before, innermost first
        self._aside: Path | None = None  # where `force` moved the run that was here

    @classmethod
    def open(
        cls,
        root: Path,
        config: Config,
        argv: Sequence[str],
        *,
        force: bool = False,
        wait_s: float = 0.0,
        device: str = "cpu",
        threads: int | None = None,
    ) -> Run:
        """Create or continue the run of `config` under `root`, or return it as it is when done.

        Args:
            root: the folder of all runs.
            config: what decides the result; its hash is part of the folder's name.
            argv: the command line, recorded.
            force: move an existing run aside (`<name>.replaced-<n>`) and begin anew.
            wait_s: how long to wait, in seconds, for another process to let go of the run.
            device: where it computes, recorded.
            threads: CPU threads, recorded; None takes what the environment implies.

        Raises:
            UsageError: another process writes this run.
            CheckpointError: the folder's manifest or results are damaged.
            RobuqError: the folder cannot be written.
        """
        path = run_folder(root, config)
        if (path / DONE).exists() and not force:
            return cls._open_done(path, config)
        aside = None
        made = [folder for folder in (path.parent, root) if not folder.exists()]
        make_folder(path.parent)
        lock = acquire_lock(path, wait_s)
        try:
            if force:
                aside = move_aside(path)
                if run_folder(root, config) != path:  # it had its name from older code
                    lock.release()
                    return cls.open(
                        root, config, argv, wait_s=wait_s, device=device, threads=threads
                    )
            elif (path / DONE).exists():  # finished while this process waited for the lock
                lock.release()
                return cls._open_done(path, config)
            manifest = load_or_create_manifest(path, config)
            if not path.exists():
                made.insert(0, path)
            make_folder(path)
            remove_temporaries(path, recursive=True)
            records = recover_results(path / RESULTS)
            run = cls(path, manifest, records, lock, config)
            run._made, run._aside = made, aside
            run._begin_session(argv, device, threads)
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def _open_done(cls, path: Path, config: Config | None = None) -> Run:
        manifest = check_done(path)
        if config is not None:
            check_config(path, manifest, config)
        return cls(path, manifest, read_results(path / RESULTS)[0], config=config)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close("stopped")
            return
        status = f"failed: {kind.__name__}" if issubclass(kind, Exception) else "interrupted"
        try:
            self.close("stopped" if issubclass(kind, Terminated) else status)
        except RobuqError as second:  # must not hide the error that ended the block
            _LOG.error("%s", second)

    def close(self, status: str = "stopped") -> None:
        """Record the end of an unfinished session and let go of the lock; may be called twice."""
        if self._lock is None:
            return
        try:
            if not self.is_done:
                self._end_session(status)
                self._write_manifest()
        finally:
            self._lock.release()
            self._lock = None

    def remove_if_untouched(self) -> None:
        """Close the run and remove its folder, if this session made it and stored nothing in it.

        So what is refused before any work leaves no trace: a run that `force` moved aside is back.
        """
        files = {path.name for path in self.path.rglob("*") if path.is_file()}
        is_touched = bool(self._records) or not files <= {CONFIG, MANIFEST, RESULTS}
        if self._lock is None or self.path not in self._made or is_touched:
            return
        take_back(self._made, self._aside)
        self._lock.release()
        self._lock = None

    @property
    def id(self) -> str:
        """`study/plan-workload-hash12`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def config(self) -> Config:
        """The resolved config.

        Raises:
            ConfigError: it was written by another version of the suite, whose keys differ.
            CheckpointError: `config.toml` is missing or unreadable.
        """
        if self._config is None:
            source = self.path / CONFIG
            try:
                text = source.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{source} cannot be read: {error}") from error
            self._config = config_from_toml(text, str(source))
        return self._config

    @property
    def is_done(self) -> bool:
        """Whether the run is finished and final."""
        return (self.path / DONE).exists()

    @property
    def checkpoint_folder(self) -> Path:
        """Where the run's `CheckpointStore` belongs."""
        return self.path / CHECKPOINTS

    def results(self) -> list[Record]:
        """Return one record per key, in the order in which the keys first appeared."""
        return [dict(record) for record in self._records.values()]

    def has(self, key: str) -> bool:
        """Return whether the item `key` has a record."""
        return key in self._records

    def get(self, key: str) -> Record | None:
        """Return the record of the item `key`, or None."""
        record = self._records.get(key)
        return None if record is None else dict(record)

    def append(self, key: str, **fields: Any) -> None:
        """Add the record of one finished item: a line of `results.jsonl`, synced to the disk.

        A key's newest record counts: a resumed training repeats the items after its checkpoint. An
        equal record is not written again. Zero-dimensional arrays and tensors become numbers.

        Raises:
            RobuqError: NaN, infinity or another value JSON cannot hold; finished run; full disk.
        """
        self._check_writable()
        try:
            line = json.dumps({"key": key, **fields}, allow_nan=False, default=_to_number)
        except (TypeError, ValueError) as error:
            raise RobuqError(
                f"result {key!r} of run {self.id} cannot be stored: {error}"
            ) from error
        record: Record = json.loads(line)  # what a resumed run will read, e.g. str for int keys
        if self._records.get(key) == record:
            return
        append_durably(self.path / RESULTS, line.encode() + b"\n")
        self._records[key] = record

    def write_table(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        """Write `tables/<name>.csv`: columns in order of first appearance, floats unrounded.

        Raises:
            RobuqError: no rows, or the folder cannot be written.
        """
        if not rows:
            raise RobuqError(f"table {name!r} of run {self.id} has no rows")
        return self.write_text(f"tables/{name.removesuffix('.csv')}.csv", to_csv(rows))

    def write_bytes(self, relative_path: str, data: bytes) -> Path:
        """Write a file of the run atomically, replacing an older one; returns its path."""
        return atomic_write_bytes(self._output_path(relative_path), data)

    def write_text(self, relative_path: str, text: str) -> Path:
        """`write_bytes` of UTF-8 text."""
        return self.write_bytes(relative_path, text.encode())

    def figure_path(self, name: str) -> Path:
        """Return where to save the figure `name` (`.svg` unless it has a suffix)."""
        path = self._output_path(f"figures/{name}" if Path(name).suffix else f"figures/{name}.svg")
        make_folder(path.parent)
        return path

    def add_input(self, path: Path | str, name: str | None = None) -> str:
        """Record the SHA-256 of a file the result depends on, under `name` or its path.

        Returns:
            The SHA-256, 64 hex digits.

        Raises:
            CheckpointError: it cannot be read, or changed since an earlier session of this run.
        """
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise CheckpointError(f"input {path} cannot be read: {error.strerror}") from error
        self.add_input_digest(name or str(path), digest, path=str(path))
        return digest

    def add_input_digest(self, name: str, sha256: str, **fields: str) -> None:
        """Record an input that is no single file (a data set, a feature network) by its SHA-256.

        Raises:
            CheckpointError: it changed since an earlier session of this run.
        """
        self._check_writable()
        known = self.manifest["inputs"].get(name)
        if known is not None and known["sha256"] != sha256:
            raise CheckpointError(
                f"input {name} changed since run {self.id} began: its SHA-256 was "
                f"{known['sha256']}, now {sha256}; restore it, or begin anew with --force"
            )
        entry = {"sha256": sha256, **fields}
        if known != entry:
            self._write_manifest(inputs={**self.manifest["inputs"], name: entry})

    def finish(self) -> None:
        """Hash every output into the manifest, then write `DONE`. Afterwards the run is read-only.

        Raises:
            RobuqError: the folder cannot be written; the run stays unfinished and can be resumed.
        """
        self._check_writable()
        remove_temporaries(self.path, recursive=True)
        self._end_session("finished")
        self._write_manifest(outputs=hash_outputs(self.path))
        digest = sha256_file(self.path / MANIFEST)
        atomic_write_text(self.path / DONE, f"{digest}  {MANIFEST}\n")

    @property
    def _session(self) -> dict[str, Any]:
        session: dict[str, Any] = self.manifest["sessions"][-1]
        return session

    def _begin_session(self, argv: Sequence[str], device: str, threads: int | None) -> None:
        for session in self.manifest["sessions"]:
            if session["status"] == "running":
                session["status"] = "killed"
        self.manifest["sessions"].append(
            {
                "argv": list(argv),
                "pid": os.getpid(),
                "pid_started": process_started(os.getpid()),
                "host": platform.node(),
                "start": _now(),
                "end": None,
                "status": "running",
                "provenance": provenance.collect(device, _thread_count(threads)),
            }
        )
        # First of all, so that a refused second process can name the one that holds the run.
        self._write_manifest()
        if not is_run_of(self.path, self.config):  # what older code wrote stays as it is
            atomic_write_text(self.path / CONFIG, to_toml(self.config))

    def _end_session(self, status: str) -> None:
        self._session.update(end=_now(), status=status)

    def _write_manifest(self, **changes: Any) -> None:
        manifest = {**self.manifest, **changes}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        # Half a surrogate stands for a byte of a path that is not UTF-8; JSON escapes it alike.
        atomic_write_bytes(self.path / MANIFEST, text.encode("utf-8", "backslashreplace"))
        self.manifest = manifest

    def _check_writable(self) -> None:
        if self._lock is None or self.is_done:
            reason = "is finished" if self.is_done else "is open for reading only"
            raise RobuqError(f"run {self.id} {reason}; begin anew with --force to change it")

    def _output_path(self, relative_path: str) -> Path:
        self._check_writable()
        parts = PurePosixPath(relative_path).parts
        bad = not parts or any(part.startswith((".", "/")) for part in parts)
        if bad or relative_path in _RESERVED:
            raise RobuqError(f"run {self.id} has no place for an output called {relative_path!r}")
        return self.path.joinpath(*parts)


def open_existing(path: Path) -> Run:
    """Open a run folder for reading: finished, unfinished or being written.

    Raises:
        UsageError: there is no run in `path`.
        CheckpointError: its manifest or results are damaged, or changed after it finished.
    """
    path = path.resolve()
    if (path / DONE).exists():
        return Run._open_done(path)
    manifest = read_manifest(path)
    records, _, torn = read_results(path / RESULTS)
    if torn:
        _LOG.warning("%s; it is left out", torn)
    return Run(path, manifest, records)


def _thread_count(threads: int | None) -> int:
    return provenance.default_threads() if threads is None else threads


def _to_number(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
