"""Cells of the normality tables: a column of the run at a printed precision, or why it is empty."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from reports.normality.data import Place, Row, place_of, value
from reports.tables import Cell, header_cell, text_cell
from reports.text import significant

UNDEFINED = "undefined"


def number_cell(
    row: Row, name: str, show: Callable[[float], str], href: str = "", sub: str = ""
) -> Cell:
    """A column of a row as `show` prints it."""
    found = value(row, name)
    return missing(UNDEFINED) if found is None else text_cell(show(found), href, sub=sub)


def median_cell(
    rows: Sequence[Row], name: str, show: Callable[[float], str] | None = None, sub: str = ""
) -> Cell:
    """The median of a column over rows."""
    found = [v for row in rows if (v := value(row, name)) is not None]
    if not found:
        return missing(UNDEFINED)
    return text_cell((show or three)(statistics.median(found)), sub=sub)


def shown(row: Row, name: str, show: Callable[[float], str]) -> str:
    """A column of a row as text."""
    found = value(row, name)
    return UNDEFINED if found is None else show(found)


def span(row: Row, low: str, high: str, show: Callable[[float], str]) -> str:
    """Two columns as `a to b`."""
    a, b = value(row, low), value(row, high)
    return UNDEFINED if a is None or b is None else f"{show(a)} to {show(b)}"


def missing(text: str, sub: str = "") -> Cell:
    return text_cell(text, sub=sub, tone="missing")


def place_cell(place: Place) -> Cell:
    """The head of a line about a layer type."""
    return header_cell(place[0], sub=f"width {place[1]}")


def row_cell(row: Row) -> Cell:
    return place_cell(place_of(row))


def two(number: float) -> str:
    """Two decimals."""
    return f"{number:.2f}".replace("-", "−")


def three(number: float) -> str:
    """Three significant digits."""
    return significant(number, 3).replace("-", "−") if number < 0 else significant(number, 3)


def four(number: float) -> str:
    """Four decimals, for W and KL."""
    return f"{number:.4f}".replace("-", "−")
