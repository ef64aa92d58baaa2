"""Reading run folders: the files inside them, listing them, and recomputing every checksum."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from robuq_bench.checkpointing import sidecar_path, verify_tensors
from robuq_bench.errors import CheckpointError, RobuqError, UsageError
from robuq_bench.files import read_checksums, sha256_file
from robuq_bench.runs.lock import is_running

CHECKPOINTS = "checkpoints"
CONFIG = "config.toml"
DONE = "DONE"
MANIFEST = "manifest.json"
RESULTS = "results.jsonl"
REPLACED = ".replaced-"

Record = dict[str, Any]
State = Literal["done", "running", "stopped", "damaged"]

_WAY_OUT = "restore it, or begin that run anew with --force"
# What is read from a manifest without looking twice, by type; some runs lack
# those that may be None.
_MANIFEST_FIELDS: dict[str, Any] = {
    "config_sha256": str, "inputs": dict, "outputs": dict, "sessions": list,
    "plan": str | None, "workload": str | None, "seed": int | None,
}  # fmt: skip
_SESSION_FIELDS: dict[str, Any] = {
    "argv": list, "start": str, "end": str | None, "status": str, "host": str, "pid": int,
    "pid_started": str | None, "provenance": dict,
}  # fmt: skip
_PROVENANCE_FIELDS: dict[str, Any] = {"device": str, "threads": int}
_INPUT_FIELDS: dict[str, Any] = {"sha256": str, "path": str | None}


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A line of the list of runs. Times are ISO 8601 in UTC; `items` counts stored results."""

    id: str
    path: Path
    state: State
    plan: str
    workload: str
    seed: int | None
    started: str | None
    ended: str | None
    items: int


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the run folder `path`.

    Raises:
        UsageError: there is none, so `path` is no run folder.
        CheckpointError: it is damaged.
    """
    source = path / MANIFEST
    try:
        manifest = json.loads(source.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no run in {path}: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: {error}; {_WAY_OUT}") from error
    if not _is_manifest(manifest):
        raise CheckpointError(
            f"{source} is damaged: fields are missing or of another kind; {_WAY_OUT}"
        )
    return dict(manifest)


def _is_manifest(value: Any) -> bool:
    """Whether `value` has what the suite reads from a manifest without looking twice."""
    return (
        _has(value, _MANIFEST_FIELDS)
        and all(_has(entry, _INPUT_FIELDS) for entry in value["inputs"].values())
        and all(_has(entry, {"sha256": str}) for entry in value["outputs"].values())
        and all(
            _has(session, _SESSION_FIELDS)
            and all(isinstance(word, str) for word in session["argv"])
            and _has(session["provenance"], _PROVENANCE_FIELDS)
            for session in value["sessions"]
        )
    )


def _has(value: Any, fields: dict[str, Any]) -> bool:
    """Whether `value` is a JSON object whose `fields` are of these types."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in fields.items()
    )


def read_results(path: Path) -> tuple[dict[str, Record], int, str]:
    """Read a `results.jsonl`; of two records with one key the later counts.

    Returns:
        Records by key in order of first appearance; how many bytes of the file are sound; and a
        description of the torn last line that a kill left, empty if there is none.

    Raises:
        CheckpointError: any other line is damaged; names file and line.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    *lines, tail = data.split(b"\n")
    records: dict[str, Record] = {}
    good_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            records[_key(record)] = record
        except ValueError as error:
            if number == len(lines) and not tail:
                return records, good_bytes, f"{path}: line {number} is torn"
            raise CheckpointError(
                f"{path}: line {number} is damaged ({error}); restore the file, or begin anew with "
                "--force"
            ) from error
        good_bytes += len(line) + 1
    return records, good_bytes, f"{path}: line {len(lines) + 1} is torn" if tail else ""


def _key(record: object) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError("not a record with a key")
    return str(record["key"])


def check_done(path: Path) -> dict[str, Any]:
    """Return the manifest of a finished run after checking it and the results against `DONE`.

    Raises:
        CheckpointError: either was changed after the run finished; names the file.
    """
    manifest = read_manifest(path)
    for name, expected in (
        (MANIFEST, _done_digest(path)),
        (RESULTS, manifest["outputs"].get(RESULTS, {}).get("sha256")),
    ):
        try:
            sound = sha256_file(path / name) == expected
        except OSError:
            sound = False
        if not sound:
            raise CheckpointError(
                f"{path / name} was damaged or changed after the run finished; restore it, or "
                "begin anew with --force"
            )
    return manifest


def _done_digest(path: Path) -> str:
    try:
        return read_checksums(path / DONE)[0]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / DONE} is damaged: {error}") from error


def hash_outputs(path: Path) -> dict[str, dict[str, Any]]:
    """Return SHA-256 and bytes of a run's files, all but manifest, `DONE` and hidden ones."""
    return {
        name: {"sha256": sha256_file(path / name), "bytes": (path / name).stat().st_size}
        for name in _output_names(path)
    }


def _output_names(path: Path) -> list[str]:
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    hidden = (f for f in found if not any(part.startswith(".") for part in f.parts))
    return sorted(f.as_posix() for f in hidden if f.as_posix() not in (MANIFEST, DONE))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV text; columns in order of first appearance, absent cells empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def verify_run(path: Path) -> list[str]:
    """Recompute every checksum of a run; return one line per problem, none when all is sound.

    A finished run is checked completely: manifest against `DONE`, every output against the
    manifest, files that came or went. Of an unfinished one, the results and checkpoints are
    checked. An input that is still where it was must not have changed.

    Raises:
        UsageError: there is no run in `path`.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = _input_problems(manifest["inputs"])
    if not (path / DONE).exists():
        return ["the run is not finished", *problems, *_unfinished_problems(path)]
    try:
        if sha256_file(path / MANIFEST) != _done_digest(path):
            problems.append(f"{MANIFEST}: changed after the run finished")
    except CheckpointError as error:
        problems.append(str(error))
    present = set(_output_names(path))
    for name, expected in manifest["outputs"].items():
        if name not in present:
            problems.append(f"{name}: missing")
        elif sha256_file(path / name) != expected["sha256"]:
            problems.append(f"{name}: SHA-256 differs from the manifest")
    problems += [
        f"{name}: not in the manifest" for name in sorted(present - {*manifest["outputs"]})
    ]
    return problems


def _input_problems(inputs: dict[str, dict[str, str]]) -> list[str]:
    return [
        f"input {name}: changed since the run"
        for name, entry in inputs.items()
        if (source := Path(entry.get("path") or "")).is_file()
        and sha256_file(source) != entry["sha256"]
    ]


def _unfinished_problems(path: Path) -> list[str]:
    problems = []
    try:
        torn = read_results(path / RESULTS)[2]
        problems += [torn] if torn else []
    except CheckpointError as error:
        problems.append(str(error))
    names = [name for name in _output_names(path) if name.endswith(".safetensors")]
    for name in names:
        if sidecar_path(path / name).exists() or name.startswith(f"{CHECKPOINTS}/"):
            try:
                verify_tensors(path / name)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def list_runs(root: Path) -> list[RunSummary]:
    """Return the runs under `root`, sorted by id; runs that `--force` moved aside are left out."""
    return [_summary(folder) for folder in run_folders(root)]


def run_folders(root: Path) -> list[Path]:
    """Return the folders of `list_runs`, damaged ones too."""
    folders = sorted(manifest.parent for manifest in root.glob(f"*/*/{MANIFEST}"))
    return [folder for folder in folders if REPLACED not in folder.name]


def _summary(path: Path) -> RunSummary:
    run_id = f"{path.parent.name}/{path.name}"
    try:
        done = (path / DONE).exists()
        manifest = check_done(path) if done else read_manifest(path)
        items = len(read_results(path / RESULTS)[0])
        sessions = manifest["sessions"]
    except RobuqError:
        return RunSummary(run_id, path, "damaged", "", "", None, None, None, 0)
    running = not done and bool(sessions) and is_running(path, sessions[-1])
    state: State = "done" if done else "running" if running else "stopped"
    return RunSummary(
        id=run_id,
        path=path,
        state=state,
        plan=manifest.get("plan") or "",
        workload=manifest.get("workload") or "",
        seed=manifest.get("seed"),
        started=sessions[0]["start"] if sessions else None,
        ended=sessions[-1]["end"] if sessions else None,
        items=items,
    )
