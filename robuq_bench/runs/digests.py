"""Which content a path stands for: SHA-256 over names and bytes, of a file or of many.

Every byte counts: names, sizes and times alone cannot tell an image that was edited and dated back
from the old one. Reading a large input anew for every command would be slow, so its digest is
remembered in the cache folder, under the state of all its files: name, device, inode, size, and
times of the last change of content (mtime) and of the file as such (ctime) in nanoseconds. An mtime
can be set back, as `cp -p`, `rsync` and `tar` do; a ctime cannot, short of changing the clock.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from robuq_bench.errors import CheckpointError, MissingResourceError, RobuqError, UsageError
from robuq_bench.files import atomic_write_text, cache_folder, sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

REMEMBERED_BYTES = 64 << 20  # less is read in a moment, and leaves nothing in the cache
ANNOUNCED_BYTES = 4 << 30
# Within a tick of the file system's clock, a second write would leave no trace.
SETTLED_S = 10.0

NamedFile = tuple[str, Path]


def path_digest(path: Path) -> str:
    """Return the digest of a file (as `sha256sum` gives it) or of all files below a folder.

    Raises:
        CheckpointError: it cannot be read.
        MissingResourceError: a link in the folder leads nowhere.
    """
    if not path.is_dir():
        return _remembered([("", path)], lambda: _sha256(path))
    return files_digest([(file.relative_to(path).as_posix(), file) for file in walk(path)])


def files_digest(files: Iterable[NamedFile]) -> str:
    """Return the SHA-256 of the lines `<SHA-256 of the file>  <name>` in the order of the names.

    Args:
        files: names that do not depend on where the files lie, and where they lie.

    Raises:
        CheckpointError: a file cannot be read.
    """
    ordered = sorted(files, key=lambda file: file[0])

    def compute() -> str:
        lines = (f"{_sha256(path)}  {name}\n" for name, path in ordered)
        return sha256_bytes(b"".join(line.encode("utf-8", "surrogateescape") for line in lines))

    return _remembered(ordered, compute)


def require_digest(path: Path, expected: str | None, what: str) -> None:
    """Check an input again once it is read; None expects nothing, "" was not there to identify.

    Raises:
        CheckpointError: it is not what the run is named after.
    """
    if expected is None:
        return
    refuse_change(path_digest(path), expected, f"{what} {path}")


def refuse_change(actual: str, expected: str, what: str) -> None:
    """Raise CheckpointError unless `actual` is the digest under which the run was planned."""
    if actual != expected:
        was = f"had SHA-256 {expected}" if expected else "was not readable"
        raise CheckpointError(
            f"{what} changed: when this run was planned, or where it is stated, it {was}; now it "
            f"has {actual}. Start the run again, or restore it"
        )


def walk(folder: Path, *, hidden: list[Path] | None = None) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths, links followed.

    What is hidden (`.name`) or neither file nor folder is left out, and added to `hidden`.

    Raises:
        MissingResourceError: a link leads nowhere.
        UsageError: a link leads to a folder above it.
        CheckpointError: a folder cannot be read.
    """
    yield from _walk(str(folder), (), [] if hidden is None else hidden)


def _walk(folder: str, above: tuple[tuple[int, int], ...], hidden: list[Path]) -> Iterator[Path]:
    try:
        state = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"folder {folder} cannot be read: {error.strerror}") from error
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise UsageError(f"{folder} is a link to a folder that it lies in; remove the link")
    for entry in listed:
        if entry.name.startswith("."):
            hidden.append(Path(entry.path))
        elif entry.is_symlink() and is_dangling(entry.path):
            raise MissingResourceError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist; "
                "restore that, or remove the link"
            )
        elif entry.is_dir():
            yield from _walk(entry.path, (*above, here), hidden)
        elif entry.is_file():
            yield Path(entry.path)
        else:
            hidden.append(Path(entry.path))


def is_dangling(path: str | Path) -> bool:
    """Whether a path is a link to nothing (or to itself)."""
    return os.path.islink(path) and not os.path.exists(path)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _remembered(files: Sequence[NamedFile], compute: Callable[[], str]) -> str:
    """Return `compute()`, or what it returned for the same files in the same state."""
    state, num_bytes, changed_s = _state(files)
    folder = _cache_folder()
    if num_bytes < REMEMBERED_BYTES or folder is None:
        return compute()
    place = folder / state[:32]
    try:
        digest, _, known = place.read_text("ascii").strip().partition("  ")
        if known == state and len(digest) == 64:
            return digest
    except (OSError, ValueError):
        pass  # not remembered
    if num_bytes >= ANNOUNCED_BYTES:
        logger.warning(
            "reading %.1f GiB once to identify them: %s", num_bytes / 2**30, files[0][1].parent
        )
    digest = compute()
    if time.time() - changed_s > SETTLED_S and _state(files)[0] == state:
        try:
            atomic_write_text(place, f"{digest}  {state}\n")
        except RobuqError as error:
            logger.warning("a digest is not remembered (%s)", error)
    return digest


def _state(files: Sequence[NamedFile]) -> tuple[str, int, float]:
    """Digest of names and states of the files, their bytes, and the newest change (Unix time)."""
    lines, num_bytes, newest = [], 0, 0.0
    for name, path in files:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        values = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        lines.append(f"{name}\0{values}\n")
        num_bytes += stat.st_size
        newest = max(newest, stat.st_mtime, stat.st_ctime)
    return sha256_bytes("".join(lines).encode("utf-8", "surrogateescape")), num_bytes, newest


def _cache_folder() -> Path | None:
    """Where digests are remembered; None without a home, or where ctime means something else."""
    root = cache_folder()
    return root / "digests" if root is not None and os.name == "posix" else None
