"""Bits per layer: what an allocation chose, and the sensitivities that it chose by."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from reports.comparing import LAYER_TYPES, mean_bits_by_type
from reports.loading import RunData
from reports.page import Block, Figures, Heading, Sheet
from reports.protocols import Group, Row
from reports.published import published_values
from reports.settings import AMPN, allocated, section
from reports.text import fixed, listing, percent, plural, signed, significant
from robuq_bench.figures import Picture, heat, panel

_TYPES = ("qkv", "proj", "fc1", "fc2")


def allocation_blocks(group: Group) -> list[Block]:
    """Heat maps of the bits and sensitivities of every plan that allocates; none without one."""
    blocks: list[Block] = []
    for row in group.rows:
        bits = {run: run.first("allocation").get("bits_by_layer", {}) for run in row.runs}
        bits = {run: found for run, found in bits.items() if found}
        if section(row.plan, "bits") and bits:
            blocks += [Heading(row.label), _allocation(row, bits)]
            if row.family == AMPN and row.bits is not None:
                blocks += _by_type(group, row.bits)
            blocks += _sensitivity(row)
    return blocks


def by_block(values: Mapping[str, float]) -> pd.DataFrame:
    """Layer types × blocks of values by layer name; layers outside the blocks are left out."""
    series = pd.Series(values, dtype=float)
    parts = series.index.to_series().str.extract(r"(?:^|\.)\w*blocks\.(\d+)\.(.+)$")
    frame = pd.DataFrame({"block": parts[0], "type": parts[1], "value": series}).dropna(
        subset=["block"]
    )
    last = frame["type"].str.rpartition(".")[2]
    frame["type"] = frame["type"].where(~last.isin(_TYPES), last)
    table = frame.astype({"block": int}).pivot(index="type", columns="block", values="value")
    order = [kind for kind in _TYPES if kind in table.index]
    return table.reindex([*order, *sorted(set(table.index) - set(order))])


def _allocation(row: Row, bits: Mapping[RunData, Mapping[str, float]]) -> Block:
    """The first training seed's bits, and how much of it the others chose alike."""
    of = allocated(row.plan)
    run, *others = bits
    grid = by_block(bits[run])
    low, high = int(grid.min().min()), int(grid.max().max())
    lines = grid.T.to_dict("list")
    words = "; ".join(f"{kind} {' '.join(f'{b:g}' for b in lines[kind])}" for kind in lines)
    alt = f"{of.capitalize()} bits of {row.label} by layer type and block: {words}"
    with panel(f"bits-{run.anchor}", alt, height=0.9 + 0.24 * len(grid)) as drawn:
        edges = [level - 0.5 for level in range(low, high + 2)]
        heat(grid, drawn.axes, edges, f"{of} bits", texts=grid.map("{:g}".format))
        drawn.axes.set(xlabel="block", ylabel="")
    caption = f"{of.capitalize()} bits, training seed {run.seed}."
    if others:
        alike = np.mean([bits[o].get(name) == b for o in others for name, b in bits[run].items()])
        caption += (
            f" {plural(len(others), 'further training seed')} chose the same bits in "
            f"{percent(float(alike))} of layers; allocation.csv has all."
        )
    return Figures([drawn.picture], caption)


def _by_type(group: Group, bits: float) -> list[Block]:
    """Mean bits per layer type beside the paper's."""
    found = mean_bits_by_type(group, bits)
    if found is None:
        return []
    row, frame = found
    published = published_values()
    order = [kind for kind in LAYER_TYPES if kind in frame.index]
    frame = frame.reindex([*order, *sorted(set(frame.index) - set(order))])
    paper = [published.get(f"bits-a{bits:g}-{kind}", math.nan) for kind in frame.index]
    lows, highs = frame.min(axis=1), frame.max(axis=1)
    sheet = pd.DataFrame(
        {
            "layer type": frame.index,
            "here": frame.mean(axis=1).to_numpy(),
            "paper": paper,
            "difference": frame.mean(axis=1).to_numpy() - paper,
            "run": row.runs[0].href,
            "range": [
                f"[{low:.2f}–{high:.2f}]" if high > low else ""
                for low, high in zip(lows, highs, strict=True)
            ],
        }
    )
    seeds = listing(f"seed {seed}" for seed in frame.columns)
    two = lambda value: fixed(value, 2)  # noqa: E731
    return [
        Sheet(
            sheet,
            f"Mean activation bits per layer type: {row.label} on {group.title}",
            f"Training {seeds}: mean [min–max], layers counted equally. The paper’s are of "
            "DiT-XL/2.",
            formats={"here": two, "paper": two, "difference": signed},
            links={"here": "run"},
            small={"here": "range"},
        )
    ]


def _sensitivity(row: Row) -> list[Block]:
    """One panel per bit width, of the first training seed that measured; one common scale."""
    for run in row.runs:
        frame = run.frame("sensitivity")
        if not frame.empty:
            break
    else:
        return []
    positive = frame[frame["mse"] > 0]
    blank = sorted(set(frame["bits"]) - set(positive["bits"]))
    if positive.empty:
        return []
    logs = np.log10(positive["mse"].astype(float))
    edges = _edges(logs.min(), logs.max())
    positive = positive.assign(log=logs)
    widths = sorted(set(positive["bits"]) - set(blank))
    pictures = [
        _sensitivity_panel(run, width, positive[positive["bits"] == width], edges)
        for width in widths
    ]
    caption = (
        "Sensitivity: mean-squared change of the noise prediction when one layer alone drops to so "
        f"many bits; training seed {run.seed}, one scale for all panels."
    )
    if blank:
        named = listing(plural(int(b), "bit") for b in blank)
        caption += f" Left out: {named}, which changes nothing: it is what is compared with."
    return [Figures(pictures, caption)]


def _sensitivity_panel(run: RunData, bits: int, frame: pd.DataFrame, edges: list[float]) -> Picture:
    grid = by_block(dict(zip(frame["layer"], frame["log"], strict=True)))
    worst = frame["layer"].to_numpy()[frame["mse"].to_numpy().argmax()]
    alt = (
        f"Sensitivity to {plural(bits, 'bit')} by layer type and block: from "
        f"{significant(frame['mse'].min())} to {significant(frame['mse'].max())} in {worst}"
    )
    height, title = 0.95 + 0.24 * len(grid), plural(bits, "bit")
    with panel(f"sensitivity-{run.anchor}-{bits}", alt, height=height, title=title) as drawn:
        heat(grid, drawn.axes, edges, "log₁₀ of the mean-squared change")
        drawn.axes.set(xlabel="block", ylabel="")
    return drawn.picture


def _edges(low: float, high: float) -> list[float]:
    """Round limits of at most eight colours from `low` to `high`."""
    step = next((s for s in (0.1, 0.2, 0.5, 1.0) if (high - low) / s <= 6), 2.0)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(place * step, 1) for place in range(first, last + 1)]
