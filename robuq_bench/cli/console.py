"""What the commands print: tables for people, one JSON line for programs, errors on stderr."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from robuq_bench.errors import UsageError

Row = Mapping[str, Any]

_ANY_WIDTH = 10**6  # columns that no table needs


def print_json(document: Mapping[str, Any]) -> None:
    """Print one compact JSON line to stdout; NaN and infinity become null."""
    print(json.dumps(plain(document), separators=(",", ":"), allow_nan=False), flush=True)


def print_table(rows: Sequence[Row], missing: str = "not run") -> None:
    """Print aligned columns to stdout; a few wide rows are turned if they then fit the screen."""
    text = format_table(rows, missing)
    screen = shutil.get_terminal_size((100, 24)).columns
    if _width(text) > screen and len(rows) < screen // 3:  # more could not stand side by side
        first = next(iter(rows[0]))
        names = [_cell(row.get(first), missing) for row in rows]
        columns = list(dict.fromkeys(column for row in rows for column in row))[1:]
        values = [
            {first: column} | {name: row.get(column) for name, row in zip(names, rows, strict=True)}
            for column in columns
        ]
        turned = format_table(values, missing)
        if len(set(names)) == len(names) and _width(turned) <= screen:
            text = turned
    print(text, flush=True)


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def format_table(rows: Sequence[Row], missing: str = "not run") -> str:
    """Aligned text columns in order of first appearance; None and NaN read `missing`.

    Numbers stand at the right. Nothing is cut, wrapped or coloured, whatever the screen, so that a
    table in a pipe or file is whole.
    """
    from rich.console import Console
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return "(no rows)"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        values = [row.get(column) for row in rows]
        numeric = all(isinstance(value, int | float) or value is None for value in values)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(Text(column), justify=justify, no_wrap=True)
    table.add_row(*(Rule(characters="-") for _ in columns))
    for row in rows:
        cells = (_cell(row.get(column), missing) for column in columns)
        # expanded here, for rich counts a tab as no width at all
        table.add_row(*(Text(cell.expandtabs()) for cell in cells))
    text = io.StringIO()
    Console(file=text, width=_ANY_WIDTH, color_system=None).print(table, crop=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cell(value: Any, missing: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return missing
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item, missing) for item in value)
    return str(value)


def plain(value: Any) -> Any:
    """Return `value` made of what JSON has; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(getattr(value, "item", None)):
        return plain(value.item())
    return str(value)


def print_error(message: str, exit_code: int, *, as_json: bool = False) -> int:
    """Print `error: message` to stderr (and a JSON line to stdout when asked); return the code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if as_json:
        print_json({"error": message, "exit_code": exit_code})
    return exit_code


def check_writable(folder: Path) -> None:
    """Raise UsageError unless `folder` is, or can be made, a folder that takes new files."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{place} is a file, not a folder; choose another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to folder {place}; make it writable or change --output")


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, which a progress bar may have wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def set_up_logging(*, quiet: bool) -> None:
    """Send the suite's own log to stderr: everything from INFO on, or warnings only."""
    for name in ("robuq_bench", "studies", "reports"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, _StderrHandler):
                logger.removeHandler(handler)
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def unreadable(error: OSError) -> str | None:
    """A sentence for a path that cannot be looked at (not ours, too long, a loop); else None."""
    reasons = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
    if error.errno not in reasons or error.filename is None:
        return None
    name = os.fsdecode(error.filename)
    shown = name if len(name) <= 200 else f"{name[:100]}... ({len(name)} characters)"
    return f"{shown}: {error.strerror}; make it readable, or name another place"


def out_of_memory(error: Exception) -> str | None:
    """A sentence for an allocation that failed (numpy's, torch's on CPU and GPU); else None."""
    # PyTorch's CPU allocator raises a bare RuntimeError; on CUDA it is a subclass of it.
    bare = type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    if not (bare or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
        return None
    reason = str(error).partition("\n")[0] or "out of memory"
    return (
        f"not enough memory: {reason}; lower what the request makes large, such as "
        "training.batch_size, evaluation.batch_size or the size of the model"
    )


def is_disk_error(error: OSError) -> bool:
    """Whether an OSError is about the disk or its permissions, not about a bug."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
