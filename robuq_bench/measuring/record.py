"""Finished runs of the GPU studies as JSON files that a report can show without their folders.

`python -m robuq_bench.measuring.record [--runs runs] [--to reports/recorded]` writes
`<to>/<device>/<study>-<hash>.json` for every finished run of these studies on a CUDA device: its
tables, its resolved config, and the hardware and versions it ran with.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robuq_bench.errors import MissingResourceError, RobuqError
from robuq_bench.files import atomic_write_text
from robuq_bench.runs.run import list_runs, open_existing

STUDIES = ("kernels", "efficiency", "step-time")


def record_runs(runs: Path, target: Path, studies: Sequence[str] = STUDIES) -> list[Path]:
    """Write the JSON files and return their paths; one of the same run is replaced.

    Raises:
        MissingResourceError: no finished run on a CUDA device.
    """
    written = []
    for found in list_runs(runs):
        if found.state != "done" or found.id.partition("/")[0] not in studies:
            continue
        document = to_document(found.path)
        if document is None:
            continue
        name = f"{document['study']}-{found.id.rpartition('-')[2]}.json"
        path = target / slug(document["device"]["name"]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        written.append(atomic_write_text(path, text + "\n"))
    if not written:
        raise MissingResourceError(f"no finished run on a CUDA device in {runs}; try `make gpu`")
    return written


def to_document(path: Path) -> dict[str, Any] | None:
    """One finished run as JSON values, or None if its last session saw no CUDA device.

    Keys: study, run, finished (ISO 8601), device (name and what provenance knows), packages, code,
    config, tables {name: [row]}. Cells are numbers, booleans, texts, or None where empty.
    """
    run = open_existing(path)
    session = run.manifest["sessions"][-1]
    provenance = session["provenance"]
    if not provenance["gpu"]:
        return None
    gpu = provenance["gpu"]
    return {
        "study": run.config.study,
        "run": run.id,
        "finished": session["end"],
        "device": gpu,
        "packages": provenance["packages"],
        "code": provenance["code"],
        "config": run.config.model_dump(mode="json"),
        "tables": {
            table.stem: read_table(table) for table in sorted((path / "tables").glob("*.csv"))
        },
    }


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV table with their types back."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(lines)]


def _cell(text: str) -> Any:
    if text == "":
        return None
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d+\.?\d*(e[+-]?\d+)?", text):
        return float(text)
    return text


def slug(name: str) -> str:
    """A device's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; exit code 4 when there is nothing to write."""
    parser = argparse.ArgumentParser(prog="python -m robuq_bench.measuring.record")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--to", type=Path, default=Path("reports") / "recorded")
    options = parser.parse_args(argv)
    try:
        for path in record_runs(options.runs, options.to):
            print(path)
    except RobuqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
