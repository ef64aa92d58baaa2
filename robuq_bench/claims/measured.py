"""What a run folder says for claims: metrics by image range, hours, and the code that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robuq_bench.runs.run_files import DONE, RESULTS, check_done, read_manifest, read_results

TEACHER = "teacher"
_COUNTS = ("seed_range", "seed_start", "num_samples", "images_searched")


@dataclass(frozen=True)
class Measured:
    """A finished run.

    lines: subject ("student", "teacher"), image range, metric, value; in the order of the records.
    cpu_hours: of the student's parts (the teacher has a run of its own); None where not recorded.
    commit: of the code, "" where the run does not know it or was made with uncommitted changes.
    """

    name: str
    lines: tuple[tuple[str, int, str, float], ...]
    cpu_hours: float | None
    commit: str

    def metrics(self) -> list[str]:
        """Names of what was measured of the student, in the order of the records."""
        return list(dict.fromkeys(name for who, _, name, _ in self.lines if who != TEACHER))


def read_measured(folder: Path) -> Measured:
    """Read a finished run.

    Raises:
        CheckpointError: manifest or results are damaged.
    """
    manifest = check_done(folder)
    records, _, _ = read_results(folder / RESULTS)
    seconds = records.get("timing", {}).get("cpu_s")
    return Measured(
        name=folder.name,
        lines=tuple(line for record in records.values() for line in _lines(record)),
        cpu_hours=None if seconds is None else float(seconds) / 3600,
        commit=_commit(manifest),
    )


def why_unfinished(folder: Path) -> str:
    """How the last session of an unfinished run failed; "" where it did not, or is under way."""
    if (folder / DONE).exists():
        return ""
    sessions = read_manifest(folder)["sessions"]
    status = str(sessions[-1]["status"]) if sessions else ""
    return status if status.startswith("failed") else ""


def _lines(record: Mapping[str, Any]) -> Iterator[tuple[str, int, str, float]]:
    if record.get("kind") == "metrics":
        subject, image_range = str(record["subject"]), int(record["seed_range"])
    elif record.get("kind") == "validation":
        subject, image_range = "student", 0  # on one fixed set of images
    else:
        return
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _COUNTS:
            yield subject, image_range, name, float(value)


def _commit(manifest: Mapping[str, Any]) -> str:
    """The commit of all sessions, where it is one and nothing was changed on top of it."""
    codes = [session["provenance"].get("code", {}) for session in manifest["sessions"]]
    found = {None if code.get("dirty") else code.get("git_sha") for code in codes}
    commit = found.pop() if len(found) == 1 else None
    return str(commit or "")
