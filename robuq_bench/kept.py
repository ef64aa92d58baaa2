"""Texts in the cache folder that can be made again: read by their checksum, written atomically.

Several processes may read and write one folder at once, and it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from robuq_bench.errors import RobuqError
from robuq_bench.files import atomic_write_text, sha256_bytes
from robuq_bench.runs.digests import files_digest

#: Of more files in a folder, those that were not used for the longest time are removed.
MOST_FILES = 1000
_LIBRARIES = (
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "pillow",
    "scipy",
    "seaborn",
    "statsmodels",
)

logger = logging.getLogger(__name__)


@cache
def code_digest(package: str) -> str:
    """Digest of what computes: files of a package and of this one, libraries, the interpreter."""
    roots = [Path(str(sys.modules[name].__file__)).parent for name in (package, "robuq_bench")]
    files = [(str(path), path) for root in roots for path in root.rglob("*.*") if _is_code(path)]
    versions = [f"{name} {version(name)}" for name in _LIBRARIES]
    return sha256_bytes("\n".join([files_digest(files), *versions, sys.version]).encode())


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".toml", ".json") or path.parent.name == "templates"


def read_kept(path: Path) -> str | None:
    """The text that was kept, None without one; one that is damaged is reported by a warning."""
    try:
        digest, _, text = path.read_text("utf-8").partition("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read (%s); making it anew", path, error)
        return None
    if sha256_bytes(text.encode()) != digest:
        logger.warning("%s is damaged; making it anew", path)
        return None
    with contextlib.suppress(OSError):  # another user's, who alone may touch it
        os.utime(path)
    return text


def keep(path: Path, text: str) -> None:
    """Keep a text; where that cannot be, a warning says so once for each folder."""
    try:
        atomic_write_text(path, f"{sha256_bytes(text.encode())}\n{text}")
    except RobuqError as error:
        _warn_once(f"nothing is kept in {path.parent} ({error.__cause__}); set ROBUQ_CACHE")
        return
    with contextlib.suppress(OSError):  # another process may be removing the same
        if len(os.listdir(path.parent)) > MOST_FILES:
            used = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
            for file in used[:-MOST_FILES]:
                file.unlink()


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
