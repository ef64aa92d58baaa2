"""A study without a module of its own: its verdicts, the figures it drew, its tables folded.

What a study writes is enough: `verdicts.csv` (see `robuq_bench.statistics.verdicts`) makes the
answer and the checklist, `figures/*.svg` the pictures, every other table a fold.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import PurePath

import pandas as pd

from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Section, Sheet, claims_sheet, evidence
from reports.text import Phrase, plural
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.figures import Picture
from robuq_bench.statistics.verdicts import COLUMNS, read_verdicts

VERDICTS = "verdicts"
MAX_ROWS = 200


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """The section of runs of one study, whatever they hold."""
    study = runs[0].study
    claims = claims_of(runs)
    blocks: list[Block] = [claims_sheet(claims, "Verdicts", rule_of(runs))] if claims else []
    for run in runs:
        pictures = [*drawn(run)]
        if pictures:
            blocks.append(Figures(pictures, f"Drawn by the run {run.title}."))
    for run in runs:
        names = [n for n in run.tables if n != VERDICTS or not is_verdicts(run.table(n))]
        blocks += [table_fold(run, name) for name in names]
    return Section(
        anchor=f"study-{study}",
        title=f"Study: {study}",
        answer=answer_of(claims) or [Phrase(f"{plural(len(runs), 'run')}, without a verdict.")],
        blocks=blocks,
        claims=claims,
        rule=rule_of(runs),
    )


def claims_of(runs: Sequence[RunData]) -> list[Claim]:
    """The verdicts that the runs wrote; none of a run from before verdicts had one form.

    Raises:
        CheckpointError: a verdict is none; names the file.
    """
    found = []
    for run in runs:
        frame = run.table(VERDICTS)
        if is_verdicts(frame):
            try:
                verdicts = read_verdicts(frame)
            except UsageError as error:
                raise CheckpointError(f"{run.path / 'tables/verdicts.csv'}: {error}") from error
            found += [Claim(verdict, run.title, run.href) for verdict in verdicts]
    return found


def is_verdicts(frame: pd.DataFrame) -> bool:
    """Whether a table is one of verdicts as `verdict_rows` makes it, and not an older one."""
    return set(COLUMNS) <= set(frame.columns)


def rule_of(runs: Sequence[RunData]) -> str:
    """The rule that the first run with verdicts gave them by."""
    tables = (run.table(VERDICTS) for run in runs)
    return next((str(table["rule"].iloc[0]) for table in tables if is_verdicts(table)), "")


def answer_of(claims: Sequence[Claim]) -> list[Phrase]:
    """The first verdict in a sentence, and how many others there are."""
    if not claims:
        return []
    first = claims[0].verdict
    more = f" ({plural(len(claims) - 1, 'further verdict')} below)" if len(claims) > 1 else ""
    return [Phrase(f"{first.claim}: {first.verdict}, "), Phrase(evidence(first), claims[0].href),
            Phrase(f"{more}.")]  # fmt: skip


def drawn(run: RunData) -> list[Picture]:
    """The figures that a run drew, as images: what is in their files cannot touch the page."""
    names = sorted(n for n in run.manifest.get("outputs", {}) if n.startswith("figures/"))
    found = []
    for name in names:
        data = run.read_output(name)
        if data is not None and name.endswith(".svg"):
            alt = f"{PurePath(name).stem} of {run.title}"
            uri = "data:image/svg+xml;base64," + base64.b64encode(data).decode("ascii")
            found.append(Picture(f'<img class="chart" src="{uri}" alt="{escape(alt)}">', alt))
    return found


def table_fold(run: RunData, name: str) -> Fold:
    """One of the run's tables, folded; the first rows of a long one."""
    frame = run.table(name)
    note = f"The first {MAX_ROWS} of {len(frame):,} rows; the run has them all."
    sheet = Sheet(
        frame.head(MAX_ROWS),
        f"{name} of {run.title}",
        note if len(frame) > MAX_ROWS else "",
        kind="dense",
    )
    return Fold(f"Table {name}: {plural(len(frame), 'row')}, {run.title}", [sheet])
