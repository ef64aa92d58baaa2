"""Run folders as the report reads them: plain dictionaries, so that old runs stay readable.

Checksums are verified on the way: a finished run's manifest against `DONE`, and every file read
here against the manifest.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tomllib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from reports.plans import read_plan
from reports.settings import section
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import sha256_bytes, sha256_file
from robuq_bench.runs.run_files import (
    CONFIG,
    DONE,
    MANIFEST,
    REPLACED,
    RESULTS,
    check_done,
    read_manifest,
    read_results,
)

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_DEPTH = 3
_REDO = "restore it, or delete the folder and run the plan again"


@dataclass(frozen=True, eq=False)
class RunData:
    """One run folder, read and checked.

    `config` is what config.toml holds, `plan` its plan in the form of `reports.plans`, whatever
    schema it was written in.
    `records` are the lines of results.jsonl in order; `torn` says that the last line of an
    unfinished run was cut off by a kill and has been left out.
    """

    path: Path
    id: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    manifest: Mapping[str, Any]
    records: tuple[Record, ...]
    finished: bool
    torn: bool = False
    manifest_sha256: str = ""

    @property
    def study(self) -> str:
        return str(self.config.get("study", "unknown"))

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def workload(self) -> Mapping[str, Any]:
        return section(self.config, "workload")

    @property
    def plan_name(self) -> str:
        return str(self.plan.get("name", "unknown"))

    @property
    def workload_name(self) -> str:
        return str(self.workload.get("name", "unknown"))

    @property
    def anchor(self) -> str:
        """The fragment under which the report describes this run."""
        return "run-" + re.sub(r"[^A-Za-z0-9_-]+", "-", self.id)

    @property
    def href(self) -> str:
        return f"#{self.anchor}"

    @property
    def title(self) -> str:
        """What tells this run from others of its study."""
        return f"{self.plan_name} on {self.workload_name}, seed {self.seed}"

    @property
    def outliers(self) -> str:
        """Outliers that the workload's teacher was given, in words; "" of one as it is."""
        found = section(section(self.workload, "teacher"), "outliers")
        if not found:
            return ""
        layers = ", ".join(map(str, found["layers"]))
        return (
            f"{found['channels']} channels at the inputs of {layers} scaled by {found['scale']:g}"
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """The study's own settings."""
        return section(self.config, self.study)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Machine, packages and code of the last session."""
        sessions = self.manifest.get("sessions", [])
        return section(sessions[-1], "provenance") if sessions else {}

    @property
    def tables(self) -> list[str]:
        """Names of the tables that the run wrote."""
        names = (Path(name) for name in self.manifest.get("outputs", {}))
        return sorted(n.stem for n in names if n.parent.name == "tables" and n.suffix == ".csv")

    def table(self, name: str) -> pd.DataFrame:
        """`tables/<name>.csv`, without rows or columns when the run has none.

        Raises:
            CheckpointError: the file is not what the manifest says, or no table.
        """
        relative = f"tables/{name}.csv"
        data = self.read_output(relative)
        if data is None:
            return pd.DataFrame()
        try:
            return pd.read_csv(io.BytesIO(data), keep_default_na=False, na_values=[""])
        except ValueError as error:  # pandas' parser errors are some
            raise CheckpointError(
                f"{self.path / relative} is no table: {error}; {_REDO}"
            ) from error

    def frame(self, kind: str) -> pd.DataFrame:
        """Records of one kind as a table, without `key` and `kind`."""
        frame = pd.DataFrame(self.of_kind(kind))
        return frame.drop(columns=["key", "kind"], errors="ignore")

    def of_kind(self, kind: str) -> list[Record]:
        """Records of one kind, in the order they were written."""
        return [record for record in self.records if record.get("kind") == kind]

    def first(self, kind: str) -> Record:
        """The first record of a kind, or an empty mapping."""
        return next(iter(self.of_kind(kind)), {})

    def read_output(self, relative: str) -> bytes | None:
        """Bytes of one output file, None when the run has none; its checksum is verified.

        Raises:
            CheckpointError: the file is not what the manifest says.
        """
        path = self.path / relative
        if not path.is_file():
            if relative in self.manifest.get("outputs", {}):
                raise CheckpointError(f"{path} is missing; {_REDO}")
            return None
        data = path.read_bytes()
        if self.finished:
            _check(path, relative, data, self.manifest)
        return data

    def read_png(self, relative: str) -> bytes | None:
        """As `read_output`, for a picture.

        Raises:
            CheckpointError: not a PNG file, or its checksum is wrong.
        """
        data = self.read_output(relative)
        if data is not None and not data.startswith(_PNG_SIGNATURE):
            raise CheckpointError(f"{self.path / relative} is not a PNG file; run this plan again")
        return data


class LeftOut(NamedTuple):
    """A run folder that is in no result, and why."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The sound runs of some folders, and those that cannot be read."""

    runs: list[RunData]
    left_out: list[LeftOut]


def find_runs(paths: Iterable[Path]) -> Found:
    """Read every run at or below `paths`, each once, ordered by study, plan, seed and id.

    A damaged run is left out with a warning.

    Raises:
        UsageError: a path does not exist, no path holds a run, or one run has two results.
    """
    wanted = [Path(path) for path in paths]
    folders: set[Path] = set()
    for path in wanted:
        if not path.exists():
            raise UsageError(f"no such run folder: {path}; `python bench.py runs list` names them")
        folders.update(_run_folders(path))
    if not folders:
        where = ", ".join(map(str, wanted)) or "an empty list of paths"
        raise UsageError(
            f"no runs in {where}: no folder there holds a manifest.json. Make one first: "
            "python bench.py train-and-eval --plan a2"
        )
    runs: dict[str, RunData] = {}
    left_out = []
    for folder in sorted(folders):
        try:
            run = read_run(folder)
        except CheckpointError as error:
            left_out.append(leave_out(folder, error))
            continue
        kept = runs.get(run.id)
        if kept is not None and kept.finished and run.finished and kept.records != run.records:
            raise UsageError(
                f"{kept.path} and {run.path} are the same run with different results; "
                "name only one of them"
            )
        if kept is None or (run.finished and not kept.finished):
            runs[run.id] = run
    ordered = sorted(runs.values(), key=lambda run: (run.study, run.plan_name, run.seed, run.id))
    return Found(ordered, left_out)


def leave_out(path: Path, error: Exception) -> LeftOut:
    """Warn that a run is in no result."""
    reason = str(error)
    if not isinstance(error, CheckpointError):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "reports" in f.filename]
        where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
        reason = (
            "what it recorded is of another kind than its section expects "
            f"({type(error).__name__}: {error}{where})"
        )
    logger.warning("%s is left out of the report: %s", path, reason)
    return LeftOut(path, reason)


def read_run(folder: Path) -> RunData:
    """Read one run folder.

    Raises:
        UsageError: there is no run in it.
        CheckpointError: config, manifest or results are missing or damaged, or the plan is none.
    """
    finished = (folder / DONE).is_file()
    manifest = check_done(folder) if finished else read_manifest(folder)
    config = _read_config(folder, manifest, finished)
    try:
        plan = read_plan(config["plan"], section(config["workload"], "model"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} holds no valid plan: {error}; {_REDO}") from error
    records, _, torn = read_results(folder / RESULTS)
    return RunData(
        path=folder,
        id=str(manifest.get("id", f"{config['study']}/{folder.name}")),
        config=config,
        plan=plan,
        manifest=manifest,
        records=tuple(records.values()),
        finished=finished,
        torn=bool(torn),
        manifest_sha256=sha256_file(folder / MANIFEST),
    )


def _run_folders(path: Path) -> list[Path]:
    """The run folders at or below a path."""
    # One spelling per folder, so that a run named twice is read once.
    path = path.resolve()
    found = []
    for root, folders, files in os.walk(path):
        folders.sort()
        folders[:] = [name for name in folders if REPLACED not in name]
        if MANIFEST in files:
            found.append(Path(root))
            folders.clear()
        elif len(Path(root).relative_to(path).parts) >= _MAX_DEPTH:
            folders.clear()
    return found


def _read_config(folder: Path, manifest: Mapping[str, Any], finished: bool) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists() and not finished:
        # Killed between manifest and config: the manifest says enough to name the run.
        named = {part: {"name": manifest.get(part, "unknown")} for part in ("plan", "workload")}
        return {"study": manifest.get("study", folder.parent.name), "seed": 0, **named}
    try:
        data = path.read_bytes()
        config = tomllib.loads(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {_REDO}") from error
    if finished:
        _check(path, CONFIG, data, manifest)
    for key, kind in (("study", str), ("plan", dict), ("workload", dict), ("seed", int)):
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path} has no valid {key!r}; {_REDO}")
    return config


def _check(path: Path, name: str, data: bytes, manifest: Mapping[str, Any]) -> None:
    entry = manifest["outputs"].get(name)
    if entry is None:
        raise CheckpointError(f"{path} is not among the outputs in {MANIFEST}; {_REDO}")
    if sha256_bytes(data) != entry["sha256"]:
        raise CheckpointError(f"{path} differs from its checksum in {MANIFEST}; {_REDO}")
