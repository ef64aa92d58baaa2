"""What a section is made of: an answer, verdicts, and blocks that the page's template prints.

A section's module says what stands where; how it looks is decided here and in `templates/`. Tables
are DataFrames, formatted once, when they are printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from reports.text import NOT_RUN, Phrase, significant
from robuq_bench.figures import COLOURS, MEANINGS, Picture
from robuq_bench.statistics.comparisons import CONFIDENCE, MARGIN
from robuq_bench.statistics.verdicts import Verdict, interval_text

Format = Callable[[Any], str]


@dataclass(frozen=True)
class Cell:
    """What a table prints in one place; `small` stands below in small print."""

    text: str
    href: str = ""
    small: str = ""
    is_number: bool = False
    is_missing: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table: `frame` as it is, and how its columns are printed; the first column heads the rows.

    formats: column -> text of a value; others print texts as they are and numbers at three digits.
    heads, hints: column -> head (default: the column's name), and small print below it.
    links, small: column -> the column that holds its link, its small print; those are not columns
        of their own.
    absent: what is printed where there is no value.
    anchors: the column with an id for each row, which links of the page lead to.
    kind: CSS classes; "dense" for long tables, "claims" for sentences.
    """

    frame: pd.DataFrame
    caption: str
    note: str = ""
    formats: Mapping[str, Format] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    small: Mapping[str, str] = field(default_factory=dict)
    anchors: str = ""
    absent: str = NOT_RUN
    kind: str = ""

    def __post_init__(self) -> None:
        named = [*self.formats, *self.heads, *self.hints, *self.links, *self.small]
        named += [*self.links.values(), *self.small.values(), *filter(None, [self.anchors])]
        unknown = [name for name in named if name not in self.frame.columns]
        if unknown:
            raise ValueError(f"table {self.caption!r} has no columns {unknown}")

    @cached_property
    def columns(self) -> list[str]:
        """The columns that are printed, in order."""
        hidden = {*self.links.values(), *self.small.values(), self.anchors}
        return [str(name) for name in self.frame.columns if name not in hidden]

    def head(self, column: str) -> str:
        return self.heads.get(column, column)

    @cached_property
    def _numbers(self) -> frozenset[str]:
        numbers = self.frame.select_dtypes("number", exclude="bool")
        return frozenset(map(str, numbers.columns))

    def is_number(self, column: str) -> bool:
        return column in self._numbers

    def text(self, column: str, value: Any) -> str:
        """A value as it is printed."""
        if _is_absent(value):
            return self.absent
        if column in self.formats:
            return self.formats[column](value)
        return significant(value) if self.is_number(column) else str(value)

    def rows(self) -> list[tuple[str, list[Cell]]]:
        """Anchor and cells of each row."""
        printed = []
        for row in self.frame.to_dict("records"):
            cells = []
            for name in self.columns:
                beside = (row.get(of.get(name, "")) for of in (self.links, self.small))
                link, small = ("" if _is_absent(value) else str(value) for value in beside)
                text, is_missing = self.text(name, row[name]), _is_absent(row[name])
                cells.append(Cell(text, link, small, self.is_number(name), is_missing))
            anchor = row.get(self.anchors)
            printed.append(("" if _is_absent(anchor) else str(anchor), cells))
        return printed

    def latex(self) -> str:
        """The table as printed, without its small print; needs \\usepackage{booktabs}."""
        texts = pd.DataFrame(
            [[cell.text for cell in cells] for _, cells in self.rows()],
            columns=[self.head(name) for name in self.columns],
        )
        styler = texts.style.hide(axis="index").format(escape="latex")
        note = f" {self.note}" if self.note else ""
        return styler.format_index(escape="latex", axis=1).to_latex(
            hrules=True,
            column_format="".join("r" if self.is_number(name) else "l" for name in self.columns),
            caption=f"{self.caption}.{note}".translate(_LATEX),
        )


@dataclass(frozen=True)
class Figures:
    """Panels of one figure side by side (below each other on a phone) and their caption.

    `key` pairs a meaning of `robuq_bench.figures.MEANINGS` with a mark and words: "◆ with AMPN".
    """

    pictures: Sequence[Picture]
    caption: str
    key: Sequence[tuple[str, str]] = ()

    def key_items(self) -> list[tuple[str, str, str]]:
        """CSS class, mark and words of each line of the key."""
        found = []
        for meaning, text in self.key:
            mark, _, words = text.partition(" ")
            name = MEANINGS.get(meaning, meaning)
            if name not in COLOURS or not words:
                raise ValueError(f"figure {self.caption!r}: no key ({meaning!r}, {text!r})")
            found.append((name, mark, words))
        return found


@dataclass(frozen=True)
class Prose:
    """A paragraph; `kind` is a CSS class, such as "missing"."""

    parts: Sequence[Phrase]
    kind: str = ""


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section; with `anchor` it stands in the table of contents."""

    text: str
    anchor: str = ""


@dataclass(frozen=True)
class Image:
    """A sample grid as a data URI; width and height in its own pixels."""

    label: str
    note: str
    uri: str
    width: int
    height: int
    href: str
    alt: str


@dataclass(frozen=True)
class Images:
    """Pictures side by side."""

    images: Sequence[Image]


@dataclass(frozen=True)
class Fold:
    """What is shown when its summary is opened."""

    summary: str
    blocks: Sequence[Block]


Block = Sheet | Figures | Prose | Points | Heading | Images | Fold


@dataclass(frozen=True)
class Claim:
    """A verdict of a study as the checklist lists it; `about` says of which runs."""

    verdict: Verdict
    about: str
    href: str = ""


@dataclass(frozen=True)
class Section:
    """What one study contributes to the page.

    answer: one sentence with the number and its interval; stands first, here and at the top.
    claims, rule: verdicts for the checklist, and the text of the rule that gave them.
    limits: of that rule, besides 0 and 1, which intervals are printed to the right side of.
    open: claims that no run here can judge -> what they need.
    exports: name -> table that is written beside the report as `<stem>-<name>.csv`, whole.
    tex: name -> tables that are written as `<stem>-<name>.tex`.
    """

    anchor: str
    title: str
    answer: Sequence[Phrase]
    blocks: Sequence[Block]
    claims: Sequence[Claim] = ()
    rule: str = ""
    limits: Sequence[float] = ()
    open: Mapping[str, str] = field(default_factory=dict)
    exports: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tex: Mapping[str, Sequence[Sheet]] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Anchor and title of what the table of contents lists below the section."""
        headings = [block for block in self.blocks if isinstance(block, Heading)]
        return [(block.anchor, block.text) for block in headings if block.anchor]


def claims_sheet(
    claims: Sequence[Claim], caption: str, note: str = "", limits: Sequence[float] = ()
) -> Sheet:
    """The checklist: what is claimed, the verdict, and the evidence; `limits` as of a section."""
    rows = [
        {
            "claim": v.claim,
            "subject": "" if v.subject in v.claim else v.subject,
            "verdict": v.verdict,
            "evidence": evidence(v, limits),
            "href": claim.href or None,
            "note": v.note,
        }
        for claim in claims
        for v in [claim.verdict]
    ]
    columns = ["claim", "subject", "verdict", "evidence", "href", "note"]
    return Sheet(
        pd.DataFrame(rows, columns=columns),
        caption,
        note,
        links={"evidence": "href"},
        small={"claim": "subject", "evidence": "note"},
        kind="claims",
    )


def evidence(verdict: Verdict, limits: Sequence[float] = ()) -> str:
    """Effect, interval, n and the test's name; no rounding takes an interval across `limits`."""
    parts = []
    if verdict.effect is not None:
        text = f"{verdict.effect_name} {significant(verdict.effect)}"
        low, high = verdict.low, verdict.high
        if low is not None and high is not None:
            sides = [0.0, 1.0, MARGIN, 1 / MARGIN, *limits]
            if min(verdict.effect - low, high - verdict.effect) > 1e-4 * abs(verdict.effect):
                sides.append(verdict.effect)
            text += f" {interval_text(low, high, sides)}"
            if verdict.confidence != CONFIDENCE:
                text += f" at {100 * verdict.confidence:g} %"
        parts.append(text)
    if verdict.n:
        units = verdict.n_of if verdict.n > 1 else verdict.n_of.removesuffix("s")
        parts.append(f"n = {verdict.n:,} {units}")
    if verdict.test not in ("", "none"):
        parts.append(verdict.test)
    if verdict.p_adjusted is not None:
        parts.append(f"adjusted p = {significant(verdict.p_adjusted, 2)}")
    if verdict.detectable is not None and verdict.verdict == "undecided":
        parts.append(f"smallest effect that would have shown: {significant(verdict.detectable)}")
    return "; ".join(parts)


def sentence(*parts: str | Phrase) -> list[Phrase]:
    """Phrases of texts and links."""
    return [Phrase(part) if isinstance(part, str) else part for part in parts]


def _is_absent(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
