"""Published numbers from published.toml, and what of these runs may stand beside them."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reports.aggregate import Group, Row
from reports.claims import mean_bits_by_type, value_phrase
from reports.settings import section
from reports.tables import MISSING, Cell, Column, Table, header_cell, text_cell
from reports.text import NOT_RUN, Phrase, number, signed, significant

PATH = Path(__file__).with_name("published.toml")
EVIDENCE = {
    "paper": "read at the source",
    "notes": "second-hand: third-party notes on the paper",
    "brief": "second-hand: this project’s source documents",
    "own": "computed for this project",
}
_XL = {"hidden_size": 1152, "depth": 28, "patch_size": 2}


@cache
def load_published() -> dict[str, Any]:
    """The parsed published.toml: `number` (list of tables) and `rivals` (one table)."""
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def published_values() -> dict[str, float]:
    """Published numbers by id."""
    return {entry["id"]: float(entry["value"]) for entry in load_published()["number"]}


def published_table(groups: Sequence[Group]) -> Table:
    """Every published number beside the one measured here, if any run holds its like."""
    columns = [
        Column("what", is_number=False),
        Column("published"),
        Column("here"),
        Column("difference"),
        Column("setting of the published number", is_number=False),
        Column("source", is_number=False),
    ]
    table = Table("Published numbers beside measured ones", columns)
    for entry in load_published()["number"]:
        here, measured = _measured(entry.get("ours", {}), groups)
        table.rows.append(
            [
                header_cell(str(entry["system"]), sub=str(entry["quantity"])),
                text_cell(_printed(entry)),
                here,
                _difference(entry, measured),
                text_cell(str(entry["setting"]), sub=str(entry.get("note", ""))),
                text_cell(str(entry["source"]), sub=EVIDENCE[entry["evidence"]]),
            ]
        )
    table.note = (
        "“Not comparable” marks numbers of another model, data set or feature space: there, only "
        "the order of plans and their ratios can be compared."
    )
    return table


def rivals_table() -> Table:
    """Published rivals on the paper’s own model and data set."""
    rivals = load_published()["rivals"]
    columns = [Column("method", is_number=False), Column("bits", is_number=False)]
    columns += [Column(str(name)) for name in rivals["columns"]]
    columns.append(Column("here", is_number=False))
    table = Table(str(rivals["title"]), columns, note=f"Source: {rivals['source']}.")
    for row in rivals["rows"]:
        cells = [header_cell(str(row["method"])), text_cell(str(row["bits"]))]
        cells += [
            text_cell(f"{value:.4f}" if name == "precision" else f"{value:.2f}")
            for name, value in zip(rivals["columns"], row["values"], strict=True)
        ]
        table.rows.append([*cells, MISSING])
    return table


def _measured(ours: Mapping[str, Any], groups: Sequence[Group]) -> tuple[Cell, float | None]:
    for group in groups:
        found = _in_group(ours, group)
        if found is not None:
            return found
    reason = "needs a run on DiT-XL/2" if "accounting" in ours else ""
    return text_cell(NOT_RUN, sub=reason, tone="missing"), None


def _in_group(ours: Mapping[str, Any], group: Group) -> tuple[Cell, float] | None:
    if "layer_type" in ours:
        return _layer_bits(group, float(ours["mean_bits"]), str(ours["layer_type"]))
    if "accounting" in ours:
        return _reduction(group, f"{ours['accounting']}_reduction")
    if "plan" not in ours:
        return None
    row, metric = _row(group, str(ours["plan"])), _metric(group, str(ours["metric"]))
    summary = row.summary(metric) if row and metric else None
    if row is None or metric is None or summary is None:
        return None
    if "over" not in ours:
        return Cell([value_phrase(row, metric)], sub=f"{row.label}, {metric}"), summary.mean
    other = _row(group, str(ours["over"]))
    below = other.summary(metric) if other else None
    if other is None or below is None or not below.mean:
        return None
    ratio = summary.mean / below.mean
    label = f"{row.label} over {other.label}, {metric}"
    return text_cell(number("ratio", ratio), f"#{row.anchor}", sub=label), ratio


def _layer_bits(group: Group, bits: float, layer_type: str) -> tuple[Cell, float] | None:
    found = mean_bits_by_type(group, bits)
    if found is None or layer_type not in found[1]:
        return None
    row, by_type = found
    mean = math.fsum(by_type[layer_type]) / len(by_type[layer_type])
    return text_cell(f"{mean:.2f}", f"#{row.runs[0].anchor}", sub=row.label), mean


def _reduction(group: Group, key: str) -> tuple[Cell, float] | None:
    model = section(group.workload, "model")
    if any(model.get(name) != value for name, value in _XL.items()):
        return None
    for row in group.rows:
        for run in row.runs:
            value = run.first("accounting").get(key)
            if row.bits is not None and isinstance(value, int | float):
                href = f"#{run.anchor}"
                return text_cell(f"{significant(value, 3)}×", href, sub=row.label), float(value)
    return None


def _row(group: Group, name: str) -> Row | None:
    return next((row for row in group.rows if row.name == name and row.label == name), None)


def _metric(group: Group, base: str) -> str | None:
    return next((m for m in group.metrics if m == base or m.startswith(f"{base}_")), None)


def _printed(entry: Mapping[str, Any]) -> str:
    value = float(entry["value"])
    text = f"{value:.2f}" if "unit" not in entry else f"{value:g}"
    return f"{text}{entry.get('unit', '')}"


def _difference(entry: Mapping[str, Any], measured: float | None) -> Cell:
    if measured is None:
        return MISSING
    if not entry.get("comparable", True):
        return text_cell("not comparable", tone="missing")
    return Cell([Phrase(signed(measured - float(entry["value"])) + entry.get("unit", ""))])
