"""Reports: one self-contained HTML file and its tables, built from run folders alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from robuq_bench.runs.made import is_made, made_from

__all__ = ["build_report"]

logger = logging.getLogger(__name__)


def build_report(run_paths: Sequence[Path], output: Path) -> Path:
    """Write the report of the given runs to `output`, its tables beside it; return `output`.

    A report that was written before from the same content, by the same code, stays as it is.

    Args:
        run_paths: run folders, or folders that hold runs at some depth. Finished runs are shown;
            unfinished ones are only listed as such.
        output: the HTML file. `<stem>-*.csv` and `<stem>-*.tex` are written beside it.

    A run that is damaged, or whose records are not what its study writes, is left out: a warning
    and the report name it.

    Raises:
        UsageError: no runs, a path that does not exist, or an output that is a folder.
        CheckpointError: no run is sound, or a record of the project is none; names the files.
        RobuqError: the output cannot be written.
    """
    source = made_from(run_paths, "reports")
    if is_made(output, source):
        logger.info("%s was built before from what these runs hold, and stays as it is", output)
        return output
    from reports.builder import build  # imports what draws, which takes longer than all the above

    return build(run_paths, output, source)
