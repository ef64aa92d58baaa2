"""Opening a run for writing: its lock, moving an old one aside, its manifest, its torn results."""

from __future__ import annotations

import glob
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock

from robuq_bench.config import Config, config_from_toml, config_hash
from robuq_bench.config.files import parse_toml
from robuq_bench.config.older import is_old
from robuq_bench.errors import CheckpointError, ConfigError, RobuqError, UsageError
from robuq_bench.files import append_durably, output_error, sync_file, truncate_durably
from robuq_bench.runs.lock import lock_path, take_lock
from robuq_bench.runs.run_files import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    REPLACED,
    RESULTS,
    Record,
    read_manifest,
    read_results,
)

_LOG = logging.getLogger(__name__)


def acquire_lock(path: Path, wait_s: float) -> filelock.BaseFileLock:
    """Become the one writer of the run folder `path`, waiting `wait_s` seconds at most.

    The lock file lies beside the folder and stays there; only the kernel's lock on it counts, or
    a marker file where the file system has no locks.

    Raises:
        UsageError: another process holds it; names the process and the folder.
        RobuqError: the lock file cannot be created.
    """
    try:
        return take_lock(path, wait_s)
    except filelock.Timeout:
        raise UsageError(
            f"run {path.parent.name}/{path.name} is being written by {_holder(path)} (folder "
            f"{path}); wait for it to end, or choose another --output or --seed"
        ) from None
    except OSError as error:
        raise output_error(lock_path(path), error) from error


def _holder(path: Path) -> str:
    try:
        session = read_manifest(path)["sessions"][-1]
    except RobuqError:
        return "another process"
    return f"process {session['pid']} on {session['host']} since {session['start']}"


def move_aside(path: Path) -> Path | None:
    """Rename an existing run folder to the first free `<name>.replaced-<n>`, which is returned.

    Raises:
        RobuqError: it cannot be renamed.
    """
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}{REPLACED}{number}")).exists():
        number += 1
    try:
        path.rename(target)
        sync_file(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    _LOG.warning("the earlier run was moved to %s", target)
    return target


def take_back(made: Sequence[Path], aside: Path | None) -> None:
    """Remove folders that were made for a run, innermost first, or bring back what was there.

    Raises:
        RobuqError: the run folder cannot be removed or renamed.
    """
    path, *above = made
    try:
        shutil.rmtree(path)
        if aside is not None:
            aside.rename(path)
            _LOG.warning("nothing was done: the earlier run is back in %s", path)
            return
        lock_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    for folder in above:
        try:
            folder.rmdir()
        except OSError:
            return  # another run is in it


def run_folder(root: Path, config: Config) -> Path:
    """Return the folder that belongs to a config; equal configs share it.

    A run of older code whose config says the same in the older schema is the same run.
    """
    start = f"{config.plan.name}-{config.workload.name}-"
    path = root / config.study / f"{start}{config_hash(config)[:12]}"
    if path.exists():
        return path
    older = (p for p in sorted(path.parent.glob(f"{glob.escape(start)}*")) if is_run_of(p, config))
    return next(older, path)


def is_run_of(path: Path, config: Config) -> bool:
    """Whether a folder holds the config `config` in the words of an older schema."""
    file = path / CONFIG
    if REPLACED in path.name:
        return False
    try:
        text = file.read_text("utf-8")
        is_older = is_old(parse_toml(text).get("plan", {}))
        return is_older and config_hash(config_from_toml(text, str(file))) == config_hash(config)
    except (OSError, ValueError, ConfigError):
        return False  # no run, or a damaged one: not this config's


def check_config(path: Path, manifest: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError when a manifest is that of another config than its folder's."""
    digest = manifest["config_sha256"]
    if digest != config_hash(config) and not (
        path.name.endswith(digest[:12]) and is_run_of(path, config)
    ):
        raise other_config(path)


def load_or_create_manifest(path: Path, config: Config) -> dict[str, Any]:
    """Return the manifest of an interrupted run, or (in memory) that of a new one.

    Raises:
        CheckpointError: damaged, of another config, or missing beside results.
    """
    digest = config_hash(config)
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        check_config(path, manifest, config)
        return manifest
    if (path / RESULTS).exists() or (path / CHECKPOINTS).exists():
        raise CheckpointError(f"{path / MANIFEST} is missing; begin anew with --force")
    return {
        "format": 1,
        "id": f"{path.parent.name}/{path.name}",
        "study": config.study,
        "study_version": config.study_version,
        "plan": config.plan.name,
        "workload": config.workload.name,
        "seed": config.seed,
        "config_sha256": digest,
        "inputs": {},
        "outputs": {},
        "sessions": [],
    }


def recover_results(path: Path) -> dict[str, Record]:
    """Return the records of a `results.jsonl`, created if new; a torn last line is cut off.

    Raises:
        CheckpointError: another line is damaged.
        RobuqError: the file cannot be written.
    """
    records, good_bytes, torn = read_results(path)
    if torn:
        _LOG.warning("%s; it is dropped and its item computed again", torn)
        truncate_durably(path, good_bytes)
    if not path.exists():
        append_durably(path, b"")
    return records


def other_config(path: Path) -> CheckpointError:
    """Return the error for a folder whose manifest is that of another config than its name's."""
    return CheckpointError(
        f"{path / MANIFEST} belongs to another config than the folder's name says; move the folder "
        "away, or begin anew with --force"
    )
