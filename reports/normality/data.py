"""Runs of `study normality` as the report reads them: tables as rows of text, and verdicts.

A layer type passes at b bits when the run says so: the upper end of the 95 % interval of its mean
error ratio is below 1.05. Here it also gets the two other words of the checklist: it *does not
hold* when the whole interval lies at or above 1.05, and is *undecided* when the interval spans 1.05
or could not be given. A transform holds at b bits when every layer type does, and does not hold
when one does not.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from reports.claims import FAILS, HOLDS, UNDECIDED
from reports.loading import RunData
from reports.text import Phrase, significant

STUDY = "normality"
LIMIT = 1.05
REFERENCE = "robust-midrise"
BEFORE, PLAIN, WITHOUT_DC, SIGNS = (
    "identity",
    "hadamard",
    "hadamard-without-dc",
    "randomized-hadamard",
)
MAIN = (BEFORE, PLAIN, SIGNS)
TRANSFORM_WORDS = {
    BEFORE: "before",
    PLAIN: "plain Hadamard",
    WITHOUT_DC: "plain Hadamard without DC",
    SIGNS: "random signs",
    "random-orthogonal": "random orthogonal",
    "block-hadamard-64": "block Hadamard 64",
    "block-hadamard-128": "block Hadamard 128",
    "dual-rotation": "dual rotation",
}
_TYPE_ORDER = ("qkv", "proj", "fc1", "fc2", "adaLN")
_TABLES = (
    *("types", "errors", "verdicts", "cells", "lyapunov", "channels", "bound", "multivariate"),
    *("decay", "decay_slopes", "projections", "sample_size", "examples", "controls", "skipped"),
)

Row = Mapping[str, str]
#: A layer type and its width: layers of one name may have several.
Place = tuple[str, int]


@dataclass(frozen=True)
class Judgement:
    """One layer type of one subject under one transform at one bit width."""

    place: Place
    transform: str
    bits: int
    ratio: float
    low: float
    high: float
    null_ratio: float
    cells: int
    passing: int
    worst_ratio: float
    worst_layer: str
    worst_timestep: int
    verdict: str
    sign_draws: str
    """How the verdict's ratio varies over draws of the random signs; empty for other transforms."""


@dataclass(frozen=True)
class Outcome:
    """The verdict over all layer types: those that fail, are open, or have no interval."""

    verdict: str
    judgements: Sequence[Judgement]
    without_interval: Sequence[Place]

    @property
    def falling_short(self) -> list[Judgement]:
        """Judgements that are not `holds`, the highest ratio first."""
        short = [j for j in self.judgements if j.verdict != HOLDS]
        return sorted(short, key=lambda j: -j.ratio)

    @property
    def highest(self) -> Judgement | None:
        return max(self.judgements, key=lambda j: j.high, default=None)


@dataclass(frozen=True)
class NormalityRun:
    """One finished run and its tables; a table it did not write is empty."""

    run: RunData
    tables: Mapping[str, Sequence[Row]]
    _judged: dict[str, list[Judgement]] = field(default_factory=dict)

    @property
    def href(self) -> str:
        return f"#{self.run.anchor}"

    @property
    def short(self) -> str:
        """A prefix for names in charts, unique to the run."""
        return f"n{self.run.id[-6:]}"

    @property
    def title(self) -> str:
        captured = self.options.get("captured", "none")
        if captured not in (None, "none"):
            return f"saved activations, seed {self.run.seed}"
        return f"{self.run.workload_name}, seed {self.run.seed}"

    @property
    def options(self) -> Mapping[str, Any]:
        found = self.run.config.get("normality")
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def subjects(self) -> list[str]:
        """The teacher first, then students, then the plan by its training step."""
        return sorted({row["subject"] for row in self.tables["types"]}, key=_subject_order)

    @cached_property
    def places(self) -> list[Place]:
        return sorted({place_of(row) for row in self.tables["types"]}, key=_place_order)

    @cached_property
    def transforms(self) -> list[str]:
        found = {row["transform"] for row in self.tables["types"]}
        known = list(TRANSFORM_WORDS)
        return sorted(found, key=lambda t: (known.index(t) if t in known else len(known), t))

    @cached_property
    def bits(self) -> list[int]:
        return sorted({int(row["bits"]) for row in self.tables["verdicts"]})

    @property
    def usual_bits(self) -> int:
        """2 bits, where the paper needs normality most, or the least that was judged."""
        return 2 if 2 in self.bits or not self.bits else self.bits[0]

    def name(self, place: Place) -> str:
        """The layer type, with its width where the type has several."""
        several = sum(other[0] == place[0] for other in self.places) > 1
        return f"{place[0]} ({place[1]})" if several else place[0]

    def of(self, table: str, **wanted: object) -> list[Row]:
        """Rows of a table whose columns read as wanted; `place` stands for type and width."""
        place = wanted.pop("place", None)
        return [
            row
            for row in self.tables[table]
            if all(row.get(name) == str(value) for name, value in wanted.items())
            and (place is None or place_of(row) == place)
        ]

    def judgements(self, subject: str) -> list[Judgement]:
        """Every verdict of a subject; read once."""
        if subject not in self._judged:
            lows = {
                (place_of(row), row["transform"], row["bits"]): value(row, "low")
                for row in self.of("errors", subject=subject, quantizer=REFERENCE)
            }
            self._judged[subject] = [
                _judgement(row, lows.get((place_of(row), row["transform"], row["bits"])))
                for row in self.of("verdicts", subject=subject)
                if value(row, "ratio") is not None and value(row, "upper_95") is not None
            ]
        return self._judged[subject]

    def judgement(self, subject: str, place: Place, transform: str, bits: int) -> Judgement | None:
        key = place, transform, bits
        found = (j for j in self.judgements(subject) if (j.place, j.transform, j.bits) == key)
        return next(found, None)

    def outcome(self, subject: str, transform: str, bits: int) -> Outcome | None:
        """The verdict on one transform at one bit width; None where it was not measured."""
        measured = [place_of(r) for r in self.of("types", subject=subject, transform=transform)]
        if not measured:
            return None
        found = [self.judgement(subject, place, transform, bits) for place in measured]
        judged = [j for j in found if j is not None]
        without = [p for p, j in zip(measured, found, strict=True) if j is None]
        verdicts = {j.verdict for j in judged} | ({UNDECIDED} if without else set())
        # A layer type that the transform does not exist for is open, too.
        if {place_of(r) for r in self.of("types", subject=subject)} - set(measured):
            verdicts.add(UNDECIDED)
        order = (FAILS, UNDECIDED, HOLDS)
        return Outcome(next(v for v in order if v in verdicts), judged, without)


def normality_runs(runs: Iterable[RunData]) -> list[NormalityRun]:
    """The finished runs of the study that wrote their main tables.

    Raises:
        CheckpointError: a table is not what the run's manifest says.
    """
    found = []
    for run in runs:
        if run.study == STUDY and run.finished:
            tables = {name: _read(run, name) for name in _TABLES}
            if tables["types"] and tables["verdicts"]:
                found.append(NormalityRun(run, tables))
    return found


def value(row: Row, name: str) -> float | None:
    """A finite number of a row; None where the run left it empty."""
    text = row.get(name, "")
    if text == "":
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def place_of(row: Row) -> Place:
    return row["layer_type"], int(row["width"])


def words(transform: str) -> str:
    """A transform in words, as the report calls it."""
    return TRANSFORM_WORDS.get(transform, transform)


def ratio_text(number: float) -> str:
    """An error ratio: three decimals below 10, three significant digits above."""
    return f"{number:.3f}" if abs(number) < 10 else significant(number, 3)


def percent(share: float) -> str:
    """A share in percent: no decimals above 10 %, one below, and never 0 for what is not."""
    if 0 < share < 0.001:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def block_of(layer: str) -> str:
    """Where a layer is, in words."""
    found = re.search(r"blocks\.(\d+)\.", layer)
    return f"block {found[1]}" if found else layer


def bits_text(bits: Sequence[int]) -> str:
    """`1, 2 and 4 bits`."""
    texts = [str(b) for b in bits]
    joined = ", ".join(texts[:-1]) + " and " + texts[-1] if len(texts) > 1 else texts[0]
    return f"{joined} bit" if texts == ["1"] else f"{joined} bits"


def judged_phrase(study: NormalityRun, judgement: Judgement) -> Phrase:
    """`fc2 1.902 [≤ 1.919]`, linked to the run."""
    text = (
        f"{study.name(judgement.place)} {ratio_text(judgement.ratio)} "
        f"[≤ {ratio_text(judgement.high)}]"
    )
    return Phrase(text, study.href)


def _judgement(row: Row, low: float | None) -> Judgement:
    cells = int(row["cells"])
    holds = row["normal_enough"] == "True"
    fails = not holds and low is not None and low >= LIMIT
    return Judgement(
        place=place_of(row),
        transform=row["transform"],
        bits=int(row["bits"]),
        ratio=float(row["ratio"]),
        low=math.nan if low is None else low,
        high=float(row["upper_95"]),
        null_ratio=float(row["null_ratio"]),
        cells=cells,
        passing=round(cells * (value(row, "cells_passing") or 0)),
        worst_ratio=value(row, "worst_ratio") or math.nan,
        worst_layer=row.get("worst_layer", ""),
        worst_timestep=int(row.get("worst_timestep") or -1),
        verdict=HOLDS if holds else FAILS if fails else UNDECIDED,
        sign_draws=_sign_draws(row),
    )


def _sign_draws(row: Row) -> str:
    draws = value(row, "sign_draws")
    if draws is None:
        return ""
    low, high = (ratio_text(float(row[name])) for name in ("draws_min", "draws_max"))
    return f"{row['draws_passing']} of {draws:g} sign draws pass alone ({low} to {high})"


def _read(run: RunData, name: str) -> list[Row]:
    data = run.read_output(f"tables/{name}.csv")
    return [] if data is None else list(csv.DictReader(io.StringIO(data.decode("utf-8"))))


def _subject_order(subject: str) -> tuple[bool, bool, str, list[int]]:
    steps = [int(digits) for digits in re.findall(r"\d+", subject.partition(" after ")[2])]
    return subject != "teacher", subject != "student", subject.partition(" after ")[0], steps


def _place_order(place: Place) -> tuple[int, str, int]:
    kind, width = place
    order = _TYPE_ORDER.index(kind) if kind in _TYPE_ORDER else len(_TYPE_ORDER)
    return order, kind, width
