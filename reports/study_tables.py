"""Runs of a study as its section reads them: the tables they wrote, rows of text by column."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.loading import RunData
from reports.normality.data import Row, value
from reports.settings import section
from reports.tables import MISSING, Cell, text_cell
from reports.text import significant

__all__ = ["Row", "StudyRun", "group", "number_cell", "span", "study_runs", "three", "two", "value"]


@dataclass(frozen=True)
class StudyRun:
    """One finished run and its tables; a table it did not write is empty."""

    run: RunData
    tables: Mapping[str, Sequence[Row]]

    @property
    def href(self) -> str:
        return f"#{self.run.anchor}"

    @property
    def short(self) -> str:
        """A prefix for names in charts, unique to the run."""
        return f"{self.run.study[:1]}{self.run.id[-6:]}"

    @property
    def title(self) -> str:
        """What tells this run from others of its study."""
        return f"{self.run.plan_name} on {self.run.workload_name}, seed {self.run.seed}"

    @property
    def options(self) -> Mapping[str, Any]:
        return section(self.run.config, self.run.study)

    def of(self, table: str, **wanted: object) -> list[Row]:
        """Rows of a table whose columns read as wanted."""
        return [
            row
            for row in self.tables.get(table, [])
            if all(row.get(name) == str(text) for name, text in wanted.items())
        ]

    def distinct(self, table: str, column: str) -> list[str]:
        """What a column reads, each once, in the order of the table."""
        return list(dict.fromkeys(row[column] for row in self.tables.get(table, [])))


def study_runs(runs: Iterable[RunData], study: str, needed: Sequence[str]) -> list[StudyRun]:
    """The finished runs of a study that wrote the needed tables; a shard writes none.

    Raises:
        CheckpointError: a table is not what the run's manifest says.
    """
    found = []
    for run in runs:
        if run.study == study and run.finished:
            names = [n for n in run.manifest.get("outputs", {}) if n.startswith("tables/")]
            tables = {n[len("tables/") : -len(".csv")]: _read(run, n) for n in names}
            if all(tables.get(name) for name in needed):
                found.append(StudyRun(run, tables))
    return found


def group(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by what the columns read, in the order of the table."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def number_cell(
    number: float | None, show: Callable[[float], str], href: str = "", sub: str = ""
) -> Cell:
    return MISSING if number is None else text_cell(show(number), href, sub=sub)


def span(row: Row, name: str, show: Callable[[float], str]) -> str:
    """`[a to b]` of the columns `name_low` and `name_high`, nothing where one is empty."""
    low, high = value(row, f"{name}_low"), value(row, f"{name}_high")
    return "" if low is None or high is None else f"[{show(low)} to {show(high)}]"


def two(number: float) -> str:
    """Two decimals with a minus sign, and no minus on a zero."""
    text = f"{number:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def three(number: float) -> str:
    return significant(number, 3).replace("-", "−", 1) if number < 0 else significant(number, 3)


def _read(run: RunData, name: str) -> list[Row]:
    data = run.read_output(name)
    return [] if data is None else list(csv.DictReader(io.StringIO(data.decode("utf-8"))))
