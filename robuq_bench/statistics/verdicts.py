"""What a study concludes: one `Verdict` per judged claim, as the table `verdicts` of its run.

A study decides and writes; a report reads and prints. Nothing is judged twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robuq_bench.errors import UsageError

WORDS = (
    "holds",
    "does not hold",
    "undecided",
    "not judged",
    "better",
    "equivalent",
    "worse",
)
"""A claim holds or does not, a candidate is better, equivalent or worse. "undecided": the data were
enough to be judged and leave it open; "not judged": they were too few, or something is missing."""

MAX_DECIMALS = 6
"""Of an interval's text; one that needs more, or reaches ±10^6, is printed with exponents."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim, judged.

    Attributes:
        claim: what is judged, one sentence.
        subject: of what or whom: a layer type, a plan, a candidate.
        verdict: one of `WORDS`.
        effect: estimate of `effect_name`; None where there is none.
        effect_name: quantity and unit, e.g. "ratio of geometric mean fid_digits".
        low: lower limit of the interval of the effect; None without an interval.
        high: upper limit.
        confidence: of the interval, in (0, 1).
        n: number of independent units.
        n_of: what the units are: "training seeds", "images".
        test: name of the test or interval.
        p_value: of the hypothesis that a decided word rejects; None where no test was made.
        p_adjusted: `p_value` after correction within a family of verdicts.
        detectable: smallest effect that could have been seen, on the scale of `effect`.
        note: what a reader has to know besides.

    Raises:
        ValueError: an unknown word, an interval with one end or the wrong way round, a p-value or
            confidence that is none, a negative n, a number that is NaN.
    """

    claim: str
    subject: str
    verdict: str
    effect: float | None
    effect_name: str
    low: float | None
    high: float | None
    confidence: float = 0.95
    n: int
    n_of: str
    test: str
    p_value: float | None
    p_adjusted: float | None = None
    detectable: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in WORDS:
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(WORDS)}")
        for name in ("effect", "low", "high", "detectable"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise ValueError(f"{name} is NaN; leave out a number that does not exist (None)")
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two limits: give low and high, or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} lies above high {self.high}")
        for name in ("p_value", "p_adjusted"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {value}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence lies in (0, 1), got {self.confidence}")
        if self.n < 0:
            raise ValueError(f"n is a count, got {self.n}")


_FIELDS = tuple(field.name for field in dataclasses.fields(Verdict))
_OPTIONAL = ("effect", "low", "high", "p_value", "p_adjusted", "detectable")
COLUMNS = (*_FIELDS, "rule")
"""Columns of the table `verdicts`, in order."""


def no_verdict(
    claim: str,
    subject: str,
    effect_name: str,
    note: str,
    *,
    n: int = 0,
    n_of: str = "training seeds",
) -> Verdict:
    """A claim that is not judged, without effect, interval and test; `note` says why."""
    return Verdict(
        claim=claim, subject=subject, verdict="not judged", effect=None, effect_name=effect_name,
        low=None, high=None, n=n, n_of=n_of, test="none", p_value=None, note=note,
    )  # fmt: skip


def verdict_rows(verdicts: Iterable[Verdict], rule: str) -> list[dict[str, Any]]:
    """Rows of `COLUMNS` for `Run.write_table("verdicts", rows)`.

    Args:
        verdicts: in the order of the table.
        rule: how a word is earned, fixed before the data; the same text in every row.
    """
    return [dataclasses.asdict(verdict) | {"rule": rule} for verdict in verdicts]


def read_verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """Verdicts of a table that `verdict_rows` made, as `pandas.read_csv` returns it.

    Raises:
        UsageError: columns are missing or unknown, or a cell is not what its column holds; names
            columns, or row and reason.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    extra = [str(name) for name in frame.columns if name not in COLUMNS]
    if missing or extra:
        raise UsageError(
            f"no table of verdicts: columns missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(extra) or 'none'}; remake it with its study"
        )
    verdicts = []
    for number, row in enumerate(frame.to_dict("records"), start=1):
        try:
            verdicts.append(Verdict(**{name: _cell(name, row[name]) for name in _FIELDS}))
        except ValueError as error:
            raise UsageError(f"row {number} of the table of verdicts: {error}") from error
    return verdicts


def _cell(name: str, value: Any) -> Any:
    empty = bool(pd.isna(value)) or value == ""
    if name in _OPTIONAL:
        return None if empty else float(value)
    if name == "note":
        return "" if empty else str(value)
    if empty:
        raise ValueError(f"{name} is empty")
    if name == "n":
        if not float(value).is_integer():
            raise ValueError(f"n is a count, got {value}")
        return int(float(value))
    return float(value) if name == "confidence" else str(value)


def interval_text(low: float, high: float, thresholds: Sequence[float] = (0.0, 1.0)) -> str:
    """`[low to high]`, rounded so that no limit changes its side of a threshold.

    Both limits have the same decimals, as few as leave two significant digits of each and print no
    limit as a threshold that it is not; with more than `MAX_DECIMALS`, each has its own digits.

    Raises:
        ValueError: a limit is NaN, or low lies above high.
    """
    if not low <= high:
        raise ValueError(f"an interval goes from low to high, got {low} and {high}")
    limits = [limit for limit in (low, high) if math.isfinite(limit)]
    if len(limits) == 2 and high - low > 1e-4 * max(map(abs, limits)):
        thresholds = (*thresholds, (low + high) / 2)
    decimals = max((_decimals_of_two_digits(limit) for limit in limits), default=0)
    while not all(_same_side(limit, f"{limit:.{decimals}f}", thresholds) for limit in limits):
        decimals += 1
    if decimals <= MAX_DECIMALS and all(abs(limit) < 1e6 for limit in limits):
        texts = [f"{limit + 0.0:.{decimals}f}" for limit in (low, high)]  # + 0.0: no "-0"
    else:
        texts = [_shortest(limit + 0.0, thresholds) for limit in (low, high)]
    return f"[{_sign(texts[0])} to {_sign(texts[1])}]"


def _decimals_of_two_digits(limit: float) -> int:
    return 0 if limit == 0 else max(0, 1 - math.floor(math.log10(abs(limit))))


def _shortest(limit: float, thresholds: Sequence[float]) -> str:
    digits = 2
    while math.isfinite(limit) and not _same_side(limit, f"{limit:.{digits}g}", thresholds):
        digits += 1
    return f"{limit:.{digits}g}"


def _same_side(value: float, text: str, thresholds: Sequence[float]) -> bool:
    shown = float(text)
    return all(shown != t and (shown < t) == (value < t) for t in thresholds if value != t)


def _sign(text: str) -> str:
    """Typographic minus and infinity; the exponent keeps its ASCII sign, as elsewhere."""
    text = text.replace("inf", "∞")
    return f"−{text[1:]}" if text.startswith("-") else text
