"""Texts in the cache folder that can be made again: read by their checksum, written atomically.

Several processes may read and write one folder at once, and it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

from robuq_bench.errors import RobuqError
from robuq_bench.files import atomic_write_text, sha256_bytes
from robuq_bench.runs.digests import files_digest

#: Of more files in a folder, those that were not used for the longest time are removed.
MOST_FILES = 1000

logger = logging.getLogger(__name__)


@cache
def code_digest(name: str) -> str:
    """Digest of what computes: files of a package or module and of this package, all installed.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: a folder of the packages cannot be listed.
    """
    modules = [sys.modules[module] for module in (name, "robuq_bench")]
    files = [(str(path), path) for module in modules for path in _code(module)]
    return sha256_bytes("\n".join([files_digest(files), installed(), sys.version]).encode())


@cache
def installed() -> str:
    """Digest of the metadata, with name and version, of every distribution on the path.

    Of all, as a library draws by means of others. One without metadata does not count.
    """
    # The text as it is: parsing a hundred of them takes ten times as long as reading them.
    texts = (d.read_text("METADATA") or d.read_text("PKG-INFO") for d in distributions())
    return sha256_bytes("\0".join(sorted(text for text in texts if text)).encode())


def _code(module: ModuleType) -> list[Path]:
    if not hasattr(module, "__path__"):
        return [Path(getattr(module, "__file__", ""))]  # a script, among whatever else lies there
    found = (path for root in module.__path__ for path in Path(root).rglob("*.*"))
    return [path for path in found if _is_code(path)]


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".toml", ".json") or path.parent.name == "templates"


def read_kept(path: Path) -> str | None:
    """The text that was kept, None without one; one that is damaged is reported by a warning."""
    try:
        digest, _, text = path.read_bytes().decode().partition("\n")  # no "\r" is lost
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
        warn_once(f"nothing is kept in {path.parent} ({error.__cause__}); set ROBUQ_CACHE")
        return
    with contextlib.suppress(OSError):  # another process may be removing the same
        if len(os.listdir(path.parent)) > MOST_FILES:
            used = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
            for file in used[:-MOST_FILES]:
                file.unlink()


@cache
def warn_once(text: str) -> None:
    """Log a warning at its first call in this process."""
    logger.warning(text)
