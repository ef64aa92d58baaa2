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
from reports.protocols import Group
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
    rows = []
    for entry in numbers:
        found = (_measured(entry.get("ours", {}), group) for group in groups)
        rows.append(_line(entry, next(filter(None, found), None)))
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


def _measured(ours: Mapping[str, Any], group: Group) -> Measured | None:
    """What a protocol holds of the kind that `ours` in published.toml names."""
    match ours:
        case {"layer_type": kind, "mean_bits": bits}:
            found = mean_bits_by_type(group, float(bits))
            if found and kind in found[1].index:
                row, mean = found[0], float(found[1].mean(axis=1)[kind])
                return Measured(f"{mean:.2f}", row.label, row.runs[0].href, mean)
        case {"accounting": part} if _XL.items() <= section(group.workload, "model").items():
            for row in group.rows:
                for run in row.runs:
                    value = run.first("accounting").get(f"{part}_reduction")
                    if row.bits is not None and isinstance(value, int | float):
                        text = f"{significant(value, 3)}×"
                        return Measured(text, row.label, run.href, float(value))
        case {"plan": plan, "metric": metric}:
            return _of_plans(group, metric, plan, ours.get("over"))
    return None


def _of_plans(group: Group, metric: str, plan: str, over: str | None) -> Measured | None:
    """A plan's mean, or its ratio to that of the plan `over`."""
    name = next((name for name in group.metrics if stem(name) == metric), "")
    rows = {row.label: row for row in group.rows if group.found(row, name)}
    if plan not in rows or (over and over not in rows):
        return None
    row, href = rows[plan], f"#{rows[plan].anchor}"
    means = group.summary["mean"].xs(name, level="metric")
    if over is None:
        return Measured(group.text(row, name), f"{plan}, {name}", href, means[plan])
    if not means[over]:
        return None
    ratio = means[plan] / means[over]
    return Measured(number("ratio", ratio), f"{plan} over {over}, {name}", href, ratio)
