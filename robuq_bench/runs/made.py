"""Whether a report of runs would come out as it is, so that nothing need be read and drawn.

What a report was made from, and what was written, is kept in `cache_folder()` by digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from robuq_bench.errors import CheckpointError
from robuq_bench.files import cache_folder, sha256_bytes, sha256_file
from robuq_bench.kept import code_digest, keep, read_kept
from robuq_bench.runs.digests import files_digest
from robuq_bench.runs.run_files import DONE, MANIFEST, REPLACED

#: Suffixes of the files of a run that a report reads; checkpoints and samples are not among them.
READ = frozenset({"", ".csv", ".json", ".jsonl", ".png", ".svg", ".toml"})
_MAX_DEPTH = 3


def folders_at(path: Path) -> list[Path]:
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


def made_from(run_paths: Sequence[Path], package: str) -> str:
    """Digest of all that a report is made from: runs, and the package that makes it.

    "" where that is not files alone: of an unfinished run, it says whether its process lives.
    """
    folders = sorted({folder for path in run_paths for folder in folders_at(path)})
    are_finished = all((folder / DONE).is_file() for folder in folders)
    if not (folders and are_finished and all(path.exists() for path in run_paths)):
        return ""
    read = (file for folder in folders for file in folder.rglob("*") if file.suffix in READ)
    files = [(str(file), file) for file in read if file.is_file() and file.name[0] != "."]
    try:
        return sha256_bytes(f"{files_digest(files)} {code_digest(package)}".encode())
    except CheckpointError:
        return ""  # the report says of which run


def is_made(output: Path, source: str) -> bool:
    """Whether the report at `output` and its tables are those that were made from `source`."""
    place = _place(output)
    kept = read_kept(place) if source and place else None
    if kept is None:
        return False
    made = json.loads(kept)
    files = {output.with_name(name): digest for name, digest in made["files"].items()}
    return made["source"] == source and all(
        file.is_file() and sha256_file(file) == digest for file, digest in files.items()
    )


def remember(output: Path, source: str, texts: Mapping[str, str]) -> None:
    """Keep what was written, by name, and from what."""
    place = _place(output)
    if source and place:
        files = {name: sha256_bytes(text.encode()) for name, text in texts.items()}
        keep(place, json.dumps({"source": source, "files": files}))


def _place(output: Path) -> Path | None:
    root = cache_folder()
    return root and root / "reports" / f"{sha256_bytes(bytes(output.resolve()))}.json"
