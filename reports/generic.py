"""A study without a module of its own: its verdicts, the figures it drew, its tables folded.

What a study writes is enough: `verdicts.csv` (see `robuq_bench.statistics.verdicts`) makes the
answer and the checklist, `figures/*.svg` the pictures, every other table a fold. Sections of their
own take from here what they share.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import pandas as pd

from reports.loading import RunData
from reports.page import (
    Block,
    Claim,
    Figures,
    Fold,
    Format,
    Section,
    Sheet,
    claims_sheet,
    evidence,
    sentence,
)
from reports.text import (
    Phrase,
    bytes_text,
    listing,
    of_metric,
    percent,
    plural,
    seconds_text,
    times,
)
from robuq_bench.cpu_figures import CAPTION, cpu_pictures
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.figures import Picture
from robuq_bench.statistics.verdicts import COLUMNS, read_verdicts

VERDICTS = "verdicts"
MAX_ROWS = 200
_MAX_LISTED = 8  # longer lists of verdicts are folded; the checklist has them too
#: By the name of a column of numbers. "_s" is not among them: it ends rates, too.
_UNITS: dict[str, Format] = {
    r"(^|_)bytes$": bytes_text,
    r"(^|_)seconds$": seconds_text,
    r"(^|_)share(_|$)": percent,
    r"^ratio_to_|^speedup_|(^|_)reduction(_|$)|(^|_)factor(_|$)": times,
}


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section:
    """The section of runs of one study, whatever they hold."""
    study = runs[0].study
    claims = claims_of(runs)
    listed: list[Block] = [claims_sheet(claims, "Verdicts", rule_of(runs))] if claims else []
    is_long = len(claims) > _MAX_LISTED
    blocks: list[Block] = [Fold(f"{len(claims)} verdicts", listed)] if is_long else listed
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


def old_claims(run: RunData, frame: pd.DataFrame) -> list[Claim]:
    """What a run from before verdicts had one form said, unjudged anew.

    Args:
        run: whose claims they are.
        frame: what there is of the columns of a verdict, one row per claim; others are ignored.

    Raises:
        UsageError: a row is no verdict.
    """
    rows = frame.assign(confidence=0.95).reindex(columns=list(COLUMNS))
    return [Claim(verdict, run.title, run.href) for verdict in read_verdicts(rows)]


def is_verdicts(frame: pd.DataFrame) -> bool:
    """Whether a table is one of verdicts as `verdict_rows` makes it, and not an older one."""
    return set(COLUMNS) <= set(frame.columns)


def rule_of(runs: Sequence[RunData]) -> str:
    """The rule that the runs gave their verdicts by; each, where they are of several versions."""
    tables = [run.table(VERDICTS) for run in runs]
    return one_rule(str(table["rule"].iloc[0]) for table in tables if is_verdicts(table))


def one_rule(rules: Iterable[str]) -> str:
    """Rules of several runs as one text, each once."""
    return " Of other runs: ".join(dict.fromkeys(filter(None, rules)))


def answer_of(claims: Sequence[Claim]) -> list[Phrase]:
    """The verdicts in a sentence: how many of which word, and the numbers of the first."""
    if not claims:
        return []
    first, counts = claims[0].verdict, Counter(claim.verdict.verdict for claim in claims)
    words = listing(f"{word} for {count} of {len(claims)}" for word, count in counts.most_common())
    start = f"{first.claim}: {first.verdict}, " if len(claims) == 1 else f"{first.claim}: {words}; "
    subject = "" if len(claims) == 1 else f"first {first.subject}, "
    numbers = evidence(first) or "without numbers"
    return sentence(f"{start}{subject}", Phrase(numbers, claims[0].href), ".")


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


def cpu(run: RunData) -> list[Block]:
    """The figure of a study that timed a CPU and its summary; nothing of a run without."""
    frame = run.table("cpu_summary")
    if frame.empty:
        return []
    figures = Figures(cpu_pictures(run.table, f"{run.anchor}-cpu"), CAPTION)
    return [figures, plain_sheet(frame.head(MAX_ROWS), f"Timed on a CPU: {run.title}")]


def table_fold(run: RunData, name: str) -> Fold:
    """One of the run's tables, folded; the first rows of a long one, what is alike in its note."""
    frame = run.table(name)
    texts = frame.select_dtypes(exclude="number").dropna(axis=1)
    same = [column for column in texts if len(frame) > 1 and texts[column].nunique() == 1]
    if len(same) == len(frame.columns):
        same = []
    notes = [f"{column}: {frame[column].iloc[0]}." for column in same]
    if len(frame) > MAX_ROWS:
        notes.append(f"The first {MAX_ROWS} of {len(frame):,} rows; the run has them all.")
    shown = frame.drop(columns=same).head(MAX_ROWS)
    sheet = plain_sheet(shown, f"{name} of {run.title}", " ".join(notes))
    return Fold(f"Table {name}: {plural(len(frame), 'row')}, {run.title}", [sheet])


def plain_sheet(frame: pd.DataFrame, caption: str, note: str = "", **others: Any) -> Sheet:
    """Rows of a run's table: units by the names of columns, `_min` and `_max` as small print.

    Args:
        frame, caption, note: as of `Sheet`.
        others: further fields of it, such as heads and links.
    """
    formats = {
        str(name): next(
            (text for pattern, text in _UNITS.items() if re.search(pattern, str(name))),
            of_metric(str(name)),
        )
        for name in frame.select_dtypes("number")
    }
    small = {
        name: f"{name} range" for name in formats if {f"{name}_min", f"{name}_max"} <= {*frame}
    }
    ends = [f"{name}_{end}" for name in small for end in ("min", "max")]
    ranges = {
        small[name]: [
            f"[{formats[name](low)}{' to ' if low < 0 else '–'}{formats[name](high)}]"
            if low < high
            else ""
            for low, high in zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        ]
        for name in small
    }
    formats = {name: text for name, text in formats.items() if name not in ends}
    shown = frame.drop(columns=ends).assign(**ranges)
    return Sheet(
        shown,
        caption,
        note,
        **{"formats": formats, "small": small, "absent": "–", "kind": "dense", **others},
    )


def whole_tables(runs: Sequence[RunData], names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """`<study>-<table>` -> its rows of all runs that have one, with the run's id in `run`."""
    frames = {name: [r.table(name).assign(run=r.id) for r in runs if name in r.tables]
              for name in names}  # fmt: skip
    return {f"{runs[0].study}-{name}": pd.concat(own) for name, own in frames.items() if own}
