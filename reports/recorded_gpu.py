"""GPU results that the project keeps, written by `python -m robuq_bench.measuring.record`.

Each `recorded/<gpu>/<study>-<hash>.json` is one finished run: its tables, config, hardware and
versions. They are shown in a section of their own, never among the runs of a report; a recorded run
that is itself among those runs is left out. Targets, factors and claims are always shown, the rest
where the report holds a run of the same study.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.claims import Claim
from reports.efficiency import efficiency_view
from reports.efficiency.data import EfficiencyRun
from reports.efficiency.story import efficiency_claims
from reports.kernels import kernel_view
from reports.kernels.data import KernelRun
from reports.kernels.story import kernel_claims
from reports.loading import RunData
from reports.plans import read_plan
from reports.settings import section
from reports.study_tables import Row, StudyRun
from reports.tables import Column, Table, claims_table, header_cell, text_cell
from reports.text import NOT_RUN, significant
from robuq_bench.errors import CheckpointError

FOLDER = Path(__file__).parent / "recorded"
TEMPLATE = "recorded_gpu.html"
PARTS = (("recorded-gpu", "Recorded on GPUs"),)
#: Tables that a study must have written, as those of its own section.
_NEEDED = {"kernels": ("roofline", "kernels"), "efficiency": ("checkpoints", "weights", "claims")}
_FACTS = ("driver", "cuda", "cudnn", "capability")
_VERSIONS = ("torch", "triton", "torchao", "gemlite", "fast-hadamard-transform")
_MAX_ROWS = 60


@dataclass(frozen=True)
class RecordedRun(RunData):
    """A run that is known by its record alone."""

    @property
    def anchor(self) -> str:
        """A fragment of the section on recorded results, which describes this run."""
        return "recorded-" + re.sub(r"[^A-Za-z0-9_-]+", "-", self.id)


def read_recorded(folder: Path | None = None) -> list[StudyRun]:
    """Every recorded run below `folder` (default: `FOLDER`), by device and file name.

    Raises:
        CheckpointError: a file is not what `robuq_bench.measuring.record` writes; names it.
    """
    root = FOLDER if folder is None else folder
    return [_read(path) for path in sorted(root.glob("*/*.json"))]


def recorded_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """What the template prints of every recorded run that is not itself among `runs`."""
    shown = {run.id for run in runs}
    studies = {run.study for run in runs}
    return [
        _view(study, is_full=study.run.study in studies)
        for study in read_recorded()
        if study.run.id not in shown
    ]


def facts(study: StudyRun) -> list[tuple[str, str]]:
    """Run, hardware, versions and date."""
    session = study.run.manifest["sessions"][-1]
    origin = session["provenance"]
    gpu, packages, code = (section(origin, part) for part in ("gpu", "packages", "code"))
    sha = str(code.get("git_sha") or "not recorded")
    return [
        ("run", study.run.id),
        ("date", str(session["end"])),
        ("GPU", str(gpu["name"])),
        *((name, str(gpu.get(name) or "not recorded")) for name in _FACTS),
        *((name, str(packages.get(name, "not installed"))) for name in _VERSIONS),
        ("code", sha + (" with changes" if code.get("dirty") else "")),
    ]


def _view(study: StudyRun, *, is_full: bool) -> dict[str, Any]:
    view: dict[str, Any] = {
        "study": study,
        "device": str(study.run.manifest["sessions"][-1]["provenance"]["gpu"]["name"]),
        "facts": facts(study),
        "is_full": is_full,
        "kind": study.run.study if isinstance(study, KernelRun | EfficiencyRun) else "",
        "body": None,
        "claims": None,
        "tables": [],
    }
    if isinstance(study, KernelRun):
        view |= {"body": kernel_view(study), "claims": _claims(study, kernel_claims(study))}
    elif isinstance(study, EfficiencyRun):
        view |= {"body": efficiency_view(study), "claims": _claims(study, efficiency_claims(study))}
    else:
        view["tables"] = [_plain(name, rows) for name, rows in study.tables.items() if rows]
    return view


def _claims(study: StudyRun, found: Iterable[Claim]) -> Table:
    return claims_table(found, f"Recorded: claims judged with {study.title} ({study.run.study})")


def _plain(name: str, rows: Sequence[Row]) -> Table:
    """A table of a study that has no section of its own."""
    names = list(rows[0])
    table = Table(f"Recorded: {name}", [Column(label, is_number=False) for label in names])
    for row in rows[:_MAX_ROWS]:
        first, *rest = [_shown(row[label]) for label in names]
        table.rows.append([header_cell(first), *(text_cell(text) for text in rest)])
    if len(rows) > _MAX_ROWS:
        table.note = f"The first {_MAX_ROWS} of {len(rows)} rows."
    return table


def _shown(text: str) -> str:
    if text == "":
        return NOT_RUN
    try:
        return significant(float(text), 6)
    except ValueError:
        return text


def _read(path: Path) -> StudyRun:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _study(path, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a recorded GPU result ({type(error).__name__}: {error}); write it "
            "again with python -m robuq_bench.measuring.record, or delete it"
        ) from error


def _study(path: Path, document: Mapping[str, Any]) -> StudyRun:
    provenance = {
        "gpu": {"name": document["device"]["name"], **document["device"]},
        "packages": dict(document["packages"]),
        "code": dict(document["code"]),
    }
    config = dict(document["config"])
    run = RecordedRun(
        path=path,
        id=str(document["run"]),
        config=config,
        plan=read_plan(config["plan"], section(config["workload"], "model")),
        manifest={"sessions": [{"end": document["finished"], "provenance": provenance}]},
        records=(),
        finished=True,
    )
    if run.study != document["study"]:
        raise ValueError(f"its config is of study {run.study}")
    tables = {
        name: [{key: _text(cell) for key, cell in row.items()} for row in rows]
        for name, rows in document["tables"].items()
    }
    is_whole = all(tables.get(name) for name in _NEEDED.get(run.study, ()))
    kinds = {"kernels": KernelRun, "efficiency": EfficiencyRun} if is_whole else {}
    return kinds.get(run.study, StudyRun)(run, tables)


def _text(cell: object) -> str:
    """A cell as the run's CSV file holds it."""
    return "" if cell is None else str(cell)
