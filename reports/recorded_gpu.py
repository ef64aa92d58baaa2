"""GPU results that the project keeps, written by `python -m robuq_bench.measuring.record`.

Each `recorded/<gpu>/<study>-<hash>.json` is one finished run: its tables, config, hardware and
versions. It is shown by the module of its study, in a section of its own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from reports.loading import RunData
from reports.page import Fold, Points, Prose, Section
from reports.plans import read_plan
from reports.settings import section
from reports.text import Phrase
from robuq_bench.errors import CheckpointError

FOLDER = Path(__file__).parent / "recorded"
_FACTS = ("driver", "cuda", "cudnn", "capability")
_VERSIONS = ("torch", "triton", "torchao", "gemlite", "fast-hadamard-transform")


@dataclass(frozen=True, eq=False)
class RecordedRun(RunData):
    """A run that is known by its record alone; `cells` are its tables as CSV."""

    cells: Mapping[str, str] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """The section that shows this run."""
        return "recorded-" + re.sub(r"[^A-Za-z0-9_-]+", "-", self.id)

    @property
    def device(self) -> str:
        return str(self.provenance["gpu"]["name"])

    @property
    def tables(self) -> list[str]:
        return sorted(self.cells)

    def table(self, name: str) -> pd.DataFrame:
        if name not in self.cells:
            return pd.DataFrame()
        text = io.StringIO(self.cells[name])
        return pd.read_csv(text, keep_default_na=False, na_values=[""])


def read_records(folder: Path | None = None) -> list[RecordedRun]:
    """Every recorded run below `folder` (default: `FOLDER`), by device and file name.

    Raises:
        CheckpointError: a file is not what `robuq_bench.measuring.record` writes; names it.
    """
    return [_read(path) for path in sorted((folder or FOLDER).glob("*/*.json"))]


def recorded_section(run: RecordedRun, shown: Section) -> Section:
    """What the study's module shows of a recorded run, as a section apart from the runs at hand."""
    gpu, packages, code = (run.provenance[part] for part in ("gpu", "packages", "code"))
    lead = (
        f"Run {run.id}, finished {run.manifest['sessions'][-1]['end']} on {run.device}: another "
        "machine and often other code than of the runs of this report; mixed with none of them."
    )
    facts = [f"{name}: {gpu.get(name) or 'not recorded'}" for name in _FACTS]
    facts += [f"{name}: {packages.get(name, 'not installed')}" for name in _VERSIONS]
    dirty = " with changes" if code.get("dirty") else ""
    facts.append(f"code: {code.get('git_sha') or 'not recorded'}{dirty}")
    return replace(
        shown,
        anchor=run.anchor,
        title=f"Recorded on {run.device}: {shown.title}",
        blocks=[
            Prose([Phrase(lead)]),
            Fold("Hardware and versions", [Points(facts)]),
            Fold(f"Figures and tables of {run.study} on {run.device}", shown.blocks),
        ],
        exports={},
        tex={},
    )


def no_record(path: Path, error: Exception) -> CheckpointError:
    """What to raise for a file that cannot be read or shown."""
    return CheckpointError(
        f"{path} is not a recorded GPU result ({type(error).__name__}: {error}); write it again "
        "with python -m robuq_bench.measuring.record, or delete it"
    )


def _read(path: Path) -> RecordedRun:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        config = dict(document["config"])
        if config["study"] != document["study"]:
            raise ValueError(f"its config is of study {config['study']}")
        places = {"gpu": "device", "packages": "packages", "code": "code"}
        provenance = {part: dict(document[place]) for part, place in places.items()}
        return RecordedRun(
            path=path,
            id=str(document["run"]),
            config=config,
            plan=read_plan(config["plan"], section(config["workload"], "model")),
            manifest={"sessions": [{"end": document["finished"], "provenance": provenance}]},
            records=(),
            finished=True,
            cells={
                name: pd.DataFrame(rows, dtype=object).to_csv(index=False)
                for name, rows in document["tables"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise no_record(path, error) from error
