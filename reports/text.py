"""Words and numbers as the report prints them: one place that decides precision and wording."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from robuq_bench.statistics.metrics import stem as stem

NOT_RUN = "not run"
_TWO_DECIMALS = frozenset({"fid", "sfid", "is"})
_THREE_DECIMALS = frozenset({"precision", "recall", "accuracy"})


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
        return fixed(value, 2)
    if stem(metric) in _THREE_DECIMALS:
        return fixed(value, 3)
    return significant(value, 3)


def fixed(value: float, decimals: int) -> str:
    """So many decimals with a minus sign, and no minus on a zero."""
    text = f"{value:.{decimals}f}"
    return (text if float(text) else f"{0:.{decimals}f}").replace("-", "−")


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal with `digits` significant digits where that is short, else scientific."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}".replace("-", "−")
    rounded = f"{value:.{digits - 1}e}"
    if 1e-4 <= abs(value) < 1e6:
        exponent = int(rounded.partition("e")[2])  # after rounding: 0.9996 is 1.00, not 1.000
        rounded = f"{value:.{max(0, digits - 1 - exponent)}f}"
    return rounded.replace("-", "−")


def times(value: float) -> str:
    """A factor, `13.2×`."""
    return f"{significant(value)}×"


def percent(value: float) -> str:
    """A share, `7.4 %`; one below 1 never prints as 100 %."""
    digits = 3
    while value < 1 and digits < 9 and float(significant(100 * value, digits)) >= 100:
        digits += 1
    return f"{significant(100 * value, digits)} %"


def signed(value: float) -> str:
    """A difference with its sign, two decimals."""
    return f"{value:+.2f}".replace("-", "−")


def spread(metric: str, low: float, high: float) -> str:
    """`[low–high]` at the precision of the metric, nothing where there is no spread."""
    if low == high:
        return ""
    dash = " to " if low < 0 else "–"
    return f"[{number(metric, low)}{dash}{number(metric, high)}]"


def of_metric(metric: str) -> Callable[[float], str]:
    """The format of a metric's column."""
    return lambda value: number(metric, value)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listing(items: Iterable[str]) -> str:
    """`a, b and c`."""
    words = list(items)
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def count_text(value: float) -> str:
    """Three significant digits with k, M, G, T."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{significant(value)}{unit}"
        value /= 1000
    return f"{significant(value)} T"


def bytes_text(count: float) -> str:
    """Binary units, three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{int(count)} B" if unit == "B" else f"{significant(count)} {unit}"
        count /= 1024
    return f"{significant(count)} TiB"


def seconds_text(value: float) -> str:
    if value < 60:
        return f"{significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def joined(phrases: Iterable[Phrase], separator: str = "; ") -> list[Phrase]:
    """The phrases with `separator` between them."""
    parts: list[Phrase] = []
    for phrase in phrases:
        parts += [Phrase(separator), phrase] if parts else [phrase]
    return parts
