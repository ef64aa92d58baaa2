"""Words and numbers as the report prints them: one place that decides precision and wording."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.aggregate import Summary, stem

NOT_RUN = "not run"
_TWO_DECIMALS = frozenset({"fid", "sfid", "is"})
_THREE_DECIMALS = frozenset({"precision", "recall"})


@dataclass(frozen=True)
class Phrase:
    """A piece of a sentence; with `href` it links to where its number comes from."""

    text: str
    href: str = ""


def number(metric: str, value: float) -> str:
    """`value` at the precision printed for `metric` (losses and KID: 3 significant digits)."""
    if not math.isfinite(value):
        return "not finite"
    if stem(metric) in _TWO_DECIMALS:
        return f"{value:.2f}"
    if stem(metric) in _THREE_DECIMALS:
        return f"{value:.3f}"
    return significant(value, 3)


def significant(value: float, digits: int = 4) -> str:
    """Plain decimal with `digits` significant digits where that is short, else scientific."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def spread(metric: str, summary: Summary) -> str:
    """`[min–max]`, or nothing when a single value leaves no spread to show."""
    if summary.count < 2:
        return ""
    dash = " to " if summary.low < 0 else "–"
    return f"[{number(metric, summary.low)}{dash}{number(metric, summary.high)}]"


def mean_and_spread(metric: str, summary: Summary | None) -> str:
    if summary is None:
        return NOT_RUN
    return f"{number(metric, summary.mean)} {spread(metric, summary)}".rstrip()


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(items: Iterable[str]) -> str:
    """`a, b and c`."""
    words = list(items)
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def signed(value: float) -> str:
    """A difference with its sign, two decimals."""
    return f"{value:+.2f}".replace("-", "−")


def count_text(value: float) -> str:
    """Three significant digits with k, M, G, T."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{significant(value, 3)}{unit}"
        value /= 1000
    return f"{significant(value, 3)} T"


def bytes_text(count: float) -> str:
    """Binary units, three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{int(count)} B" if unit == "B" else f"{significant(count, 3)} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def seconds_text(value: float) -> str:
    if value < 60:
        return f"{significant(value, 3)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def joined(phrases: Iterable[Phrase], separator: str = "; ") -> list[Phrase]:
    """The phrases with `separator` between them."""
    parts: list[Phrase] = []
    for phrase in phrases:
        parts += [Phrase(separator), phrase] if parts else [phrase]
    return parts


def plain(phrases: Sequence[Phrase]) -> str:
    """The sentence without its links."""
    return "".join(phrase.text for phrase in phrases)
