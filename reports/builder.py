"""`build_report`: from run folders to one HTML file and its tables.

The same runs give the same bytes: inputs are sorted, no clock is read, and every time shown comes
from a manifest. A study's section is the module of this package that bears its name and has a
`view`; nothing here knows a study.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from reports import generic
from reports.loading import LeftOut, RunData, find_runs, leave_out
from reports.page import Section, Sheet, claims_sheet, evidence
from reports.provenance import left_out_sheet, machines_of, run_cards, unfinished_sheet
from reports.recorded_gpu import RecordedRun, no_record, read_records, recorded_section
from reports.text import NOT_RUN, Phrase, plural
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.figures import style_sheet
from robuq_bench.files import atomic_write_text

_CLAIM_COLUMNS = ("protocol", "claim", "verdict", "evidence", "subject")
_NO_RESULTS = "No run among these is finished, so every result is “not run”."


def build_report(run_paths: Sequence[Path], output: Path, *, first: Sequence[Section] = ()) -> Path:
    """Write the report of the given runs to `output`, its tables beside it; return `output`.

    Args:
        run_paths: run folders, or folders that hold runs at some depth. Finished runs are shown;
            unfinished ones are only listed as such.
        output: the HTML file. `<stem>-*.csv` and `<stem>-*.tex` are written beside it.
        first: sections that are no study's, in front of the others.

    A run that is damaged, or whose records are not what its study writes, is left out: a warning
    and the report name it.

    Raises:
        UsageError: no runs, a path that does not exist, or an output that is a folder.
        CheckpointError: no run is sound, or a record of the project is none; names the files.
        RobuqError: the output cannot be written.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file, for example {output / 'report.html'}")
    runs, left_out = find_runs(run_paths)
    records = read_records()
    if runs:
        try:
            return _write(_made(runs, left_out, records, first), output)
        except _UNREADABLE:
            for record in records:
                _check_record(record)
            unreadable = _unreadable(runs)
            if not unreadable:
                raise
        left_out += [leave_out(run.path, error) for run, error in unreadable]
        runs = [run for run in runs if all(run is not bad for bad, _ in unreadable)]
    if not runs:
        raise CheckpointError(f"no run is sound: {'; '.join(reason for _, reason in left_out)}")
    return _write(_made(runs, left_out, records, first), output)


# What reading records of another kind than expected raises; CheckpointError is a damaged file.
_UNREADABLE = (CheckpointError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _unreadable(runs: Sequence[RunData]) -> list[tuple[RunData, Exception]]:
    """The runs of which no report can be made even alone, each with what stopped it.

    By halves, so that one bad run among many costs a few reports, and not one for each.
    """
    try:
        _made(runs, [])
    except _UNREADABLE as error:
        if half := len(runs) // 2:
            return [*_unreadable(runs[:half]), *_unreadable(runs[half:])]
        return [(runs[0], error)]
    return []


def _check_record(record: RecordedRun) -> None:
    """Raise CheckpointError, naming its file, where no page can be made of a record alone."""
    try:
        _made([], [], [record])
    except _UNREADABLE as error:
        raise no_record(record.path, error) from error


@cache
def section_modules() -> Mapping[str, ModuleType]:
    """Study -> the module that shows it: `QUESTION`, `ORDER`, `OPEN`, `EXPORTS` and `view`.

    `view(runs, every)` takes the finished runs of the study, and those of all studies, and returns
    a `Section`, or None where the runs hold too little for one. `OPEN` are claims of the paper that
    stand as "not run" until the study has run; studies in `CITES`, if any, are shown by this one.
    Sections come in the order of `ORDER`.
    """
    names = [info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [import_module(f"reports.{name}") for name in names]
    found = {
        m.__name__.rpartition(".")[2].replace("_", "-"): m for m in modules if hasattr(m, "view")
    }
    found.pop("generic")
    return dict(sorted(found.items(), key=lambda item: item[1].ORDER))


def build_sections(runs: Sequence[RunData]) -> dict[str, Section]:
    """Study -> its section, in the order of the page: what has a module first, then the others."""
    by_study: dict[str, list[RunData]] = {}
    for run in runs:
        by_study.setdefault(run.study, []).append(run)
    modules = section_modules()
    cited = {name for study in by_study for name in getattr(modules.get(study), "CITES", ())}
    found: dict[str, Section] = {}
    for study in [*modules, *sorted(by_study.keys() - modules.keys())]:
        own = by_study.get(study, [])
        shown = modules[study].view(own, runs) if own and study in modules else None
        if shown is None and own and study not in cited:
            shown = generic.view(own, runs)
        if shown is not None:
            found[study] = shown
    return found


def record_sections(runs: Sequence[RunData], records: Sequence[RecordedRun]) -> dict[str, Section]:
    """Anchor -> the section of a recorded run that is not among `runs`."""
    at_hand = {run.id for run in runs}
    modules = section_modules()
    found = {}
    for record in records:
        if record.id not in at_hand:
            shown = modules.get(record.study, generic).view([record], [record])
            if shown is None:
                raise ValueError(f"tables that {record.study} writes are missing")
            found[record.anchor] = recorded_section(record, shown)
    return found


class _Report(NamedTuple):
    page: str
    tables: Mapping[str, str]  # by what the names of their files end in


def _made(
    runs: Sequence[RunData],
    left_out: Sequence[LeftOut],
    records: Sequence[RecordedRun] = (),
    first: Sequence[Section] = (),
) -> _Report:
    """The report of these runs; nothing is written."""
    finished = [run for run in runs if run.finished]
    of_studies = build_sections(finished)
    sections = {section.anchor: section for section in first} | of_studies
    kept = record_sections(finished, records)
    machines = machines_of(finished)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            question=_question(of_studies),
            sections=[*sections.values(), *kept.values()],
            no_results=[Phrase(_NO_RESULTS)],
            checklists=_checklists({**sections, **kept}),
            unfinished=unfinished_sheet(runs),
            left_out=left_out_sheet(left_out),
            runs=run_cards(finished, machines),
            machines=list(machines.values()),
            count=_count(runs, left_out),
        )
    )
    page = "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"
    return _Report(page, _tables(sections))


def _write(report: _Report, output: Path) -> Path:
    """Write the page to `output` and the tables beside it."""
    texts = {f"{output.stem}-{name}": text for name, text in report.tables.items()}
    for module in section_modules().values():
        for name in (f"{output.stem}-{name}" for name in module.EXPORTS):
            if name not in texts and output.with_name(name).exists():
                texts[name] = ""  # of an older report; these runs lack it
    texts[output.name] = report.page  # last: there is no page whose tables could not be made
    for name, text in texts.items():
        atomic_write_text(output.with_name(name), text)
    return output


def _tables(sections: Mapping[str, Section]) -> dict[str, str]:
    """Every section's tables, by what the names of their files end in."""
    claims = pd.DataFrame(
        [
            (
                *(claim.about, v.claim, v.verdict),
                "; ".join(filter(None, [evidence(v, section.limits), v.note])),
                v.subject,
            )
            for section in sections.values()
            for claim in section.claims
            for v in [claim.verdict]
        ]
        + [
            (section.claims[0].about if section.claims else "", claim, NOT_RUN, needs, "")
            for section in sections.values()
            for claim, needs in section.open.items()
        ],
        columns=list(_CLAIM_COLUMNS),
    )
    texts = {"claims.csv": claims.to_csv(index=False, lineterminator="\n")}
    for section in sections.values():
        for name, frame in section.exports.items():
            texts[f"{name}.csv"] = frame.to_csv(index=False, lineterminator="\n")
        for name, sheets in section.tex.items():
            texts[f"{name}.tex"] = "\n".join(sheet.latex() for sheet in sheets)
    return texts


def _question(sections: Mapping[str, Section]) -> str:
    """What the report answers: the question of its first section."""
    modules = section_modules()
    for study, section in sections.items():
        return str(modules[study].QUESTION) if study in modules else section.title
    return str(next(iter(modules.values())).QUESTION)


def _checklists(sections: Mapping[str, Section]) -> list[Sheet]:
    """Verdicts by section, each under its rule; then the claims that no run here has judged."""
    found = [
        claims_sheet(section.claims, section.title, section.rule, section.limits)
        for section in sections.values()
        if section.claims
    ]
    unjudged = [
        {"claim": claim, "verdict": NOT_RUN, "evidence": needs}
        for claim, needs in _open(sections).items()
    ]
    if unjudged:
        found.append(Sheet(pd.DataFrame(unjudged), "Claims that need other runs", kind="claims"))
    return found


def _open(sections: Mapping[str, Section]) -> dict[str, str]:
    """Claims that no run here judges -> what they need."""
    found: dict[str, str] = {}
    for study, module in section_modules().items():
        if study in sections:
            found.update(sections[study].open)
        else:
            found.update(dict.fromkeys(module.OPEN, f"needs a run of the study “{study}”"))
    return found


def _count(runs: Sequence[RunData], left_out: Sequence[LeftOut]) -> str:
    finished = sum(run.finished for run in runs)
    text = f"{plural(finished, 'finished run')}, {len(runs) - finished} unfinished"
    return f"{text}, {len(left_out)} left out" if left_out else text


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (Path(__file__).parent / "templates/style.css").read_text("utf-8")
    environment.globals["css"] = css + style_sheet()
    return environment
