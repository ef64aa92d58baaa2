"""Published numbers from published.toml, and what of these runs may stand beside them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from reports.comparing import mean_bits_by_type
from reports.page import Sheet
from reports.protocols import Group, Row
from reports.settings import section
from reports.text import NOT_RUN, number, signed, significant, stem

PATH = Path(__file__).with_name("published.toml")
EVIDENCE = {
    "paper": "read at the source",
    "notes": "second-hand: third-party notes on the paper",
    "brief": "second-hand: this project’s source documents",
    "own": "computed for this project",
}
_XL = {"hidden_size": 1152, "depth": 28, "patch_size": 2}


class Measured(NamedTuple):
    """What stands beside a published number: printed, of which rows, linked, and its value."""

    text: str
    small: str
    href: str | None
    value: float


@cache
def load_published() -> dict[str, Any]:
    """The parsed published.toml: `number` (list of tables) and `rivals` (one table)."""
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def published_values() -> dict[str, float]:
    """Published numbers by id."""
    return {entry["id"]: float(entry["value"]) for entry in load_published()["number"]}


def published_sheet(groups: Sequence[Group]) -> Sheet:
    """Every published number beside the one measured here, if any run holds its like."""
    numbers = load_published()["number"]
    rows = [_line(entry, _measured(entry.get("ours", {}), groups)) for entry in numbers]
    return Sheet(
        pd.DataFrame(rows),
        "Published numbers beside measured ones",
        "“Not comparable” marks numbers of another model, data set or feature space: there, only "
        "the order of plans and their ratios can be compared.",
        links={"here": "href"},
        small={"what": "quantity", "here": "of", "setting of the published number": "note",
               "source": "evidence"},
        kind="dense",
    )  # fmt: skip


def rivals_sheet() -> Sheet:
    """Published rivals on the paper's own model and data set."""
    rivals = load_published()["rivals"]
    frame = pd.DataFrame(
        [
            [r["method"], r["bits"], *(f"{v:.4f}" if v < 1 else f"{v:.2f}" for v in r["values"])]
            for r in rivals["rows"]
        ],
        columns=["method", "bits", *rivals["columns"]],
    )
    return Sheet(frame, str(rivals["title"]), f"Source: {rivals['source']}. Here: not run.")


def _line(entry: Mapping[str, Any], here: Measured | None) -> dict[str, Any]:
    unit, value = entry.get("unit", ""), float(entry["value"])
    difference = None if here is None else "not comparable"
    if here is not None and entry.get("comparable", True):
        difference = signed(here.value - value) + unit
    reason = "needs a run on DiT-XL/2" if "accounting" in entry.get("ours", {}) else ""
    return {
        "what": entry["system"],
        "published": f"{value:g}{unit}" if unit else f"{value:.2f}",
        "here": here.text if here else NOT_RUN,
        "difference": difference,
        "setting of the published number": entry["setting"],
        "source": entry["source"],
        "quantity": entry["quantity"],
        "of": here.small if here else reason,
        "href": here.href if here else None,
        "note": entry.get("note", ""),
        "evidence": EVIDENCE[entry["evidence"]],
    }


def _measured(ours: Mapping[str, Any], groups: Sequence[Group]) -> Measured | None:
    found = (_in_group(ours, group) for group in groups)
    return next((one for one in found if one is not None), None)


def _in_group(ours: Mapping[str, Any], group: Group) -> Measured | None:
    if "layer_type" in ours:
        return _layer_bits(group, float(ours["mean_bits"]), str(ours["layer_type"]))
    if "accounting" in ours:
        return _reduction(group, f"{ours['accounting']}_reduction")
    if "plan" not in ours:
        return None
    metric = next((name for name in group.metrics if stem(name) == ours["metric"]), "")
    row = _row(group, ours["plan"])
    found = group.found(row, metric) if row else None
    if row is None or found is None:
        return None
    href = f"#{row.anchor}"
    if "over" not in ours:
        return Measured(group.text(row, metric), f"{row.label}, {metric}", href, found.mean)
    other = _row(group, ours["over"])
    below = group.found(other, metric) if other else None
    if other is None or below is None or not below.mean:
        return None
    ratio = found.mean / below.mean
    label = f"{row.label} over {other.label}, {metric}"
    return Measured(number("ratio", ratio), label, href, ratio)


def _layer_bits(group: Group, bits: float, layer_type: str) -> Measured | None:
    found = mean_bits_by_type(group, bits)
    if found is None or layer_type not in found[1].index:
        return None
    row, mean = found[0], float(found[1].mean(axis=1)[layer_type])
    return Measured(f"{mean:.2f}", row.label, row.runs[0].href, mean)


def _reduction(group: Group, key: str) -> Measured | None:
    model = section(group.workload, "model")
    if any(model.get(name) != value for name, value in _XL.items()):
        return None
    for row in group.rows:
        for run in row.runs:
            value = run.first("accounting").get(key)
            if row.bits is not None and isinstance(value, int | float):
                return Measured(f"{significant(value, 3)}×", row.label, run.href, float(value))
    return None


def _row(group: Group, name: str) -> Row | None:
    return next((row for row in group.rows if row.label == name), None)
