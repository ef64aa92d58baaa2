"""Bits per layer: what an allocation chose, and the sensitivities that it chose by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from reports.comparing import LAYER_TYPES, mean_bits_by_type
from reports.loading import RunData
from reports.page import Block, Figures, Heading, Sheet
from reports.protocols import Group, Row
from reports.published import published_values
from reports.settings import Family, allocated, section
from reports.text import fixed, listing, percent, plural, signed, significant
from robuq_bench.figure_cache import heat_panel

_TYPES = ("qkv", "proj", "fc1", "fc2")


def allocation_blocks(group: Group) -> list[Block]:
    """Heat maps of the bits and sensitivities of every plan that allocates; none without one."""
    blocks: list[Block] = []
    for row in group.rows:
        bits = {run: run.first("allocation").get("bits_by_layer", {}) for run in row.runs}
        bits = {run: found for run, found in bits.items() if found}
        if section(row.plan, "bits") and bits:
            blocks += [Heading(row.label), _allocation(row, bits)]
            if row.family == Family.AMPN and row.bits is not None:
                blocks += _by_type(group, row.bits)
            blocks += _sensitivity(row)
    return blocks


def headroom_text(run: RunData) -> str:
    """What the metric predicts that mixing bits can gain, "" in runs that do not say."""
    found = run.first("allocation").get("headroom")
    return "" if found is None else f"headroom {significant(found)} by the metric"


def by_block(values: Mapping[str, float]) -> pd.DataFrame:
    """Layer types × blocks of values by layer name; layers outside the blocks are left out."""
    series = pd.Series(values, dtype=float, name="value").rename_axis("layer").reset_index()
    parts = series["layer"].str.extract(r"(?:^|\.)\w*blocks\.(?P<block>\d+)\.(?P<type>.+)$")
    frame = series.join(parts).dropna(subset=["block"]).astype({"block": int})
    last = frame["type"].str.rpartition(".")[2]
    frame["type"] = frame["type"].where(~last.isin(_TYPES), last)
    return _ordered(frame.pivot(index="type", columns="block", values="value"), _TYPES)


def _ordered(table: pd.DataFrame, first: Sequence[str]) -> pd.DataFrame:
    """The rows of `first` in its order, then others by name."""
    known = [name for name in first if name in table.index]
    return table.reindex([*known, *sorted(set(table.index) - set(known))])


def _allocation(row: Row, bits: Mapping[RunData, Mapping[str, float]]) -> Block:
    """The first training seed's bits, and how much of it the others chose alike."""
    of = allocated(row.plan).capitalize()
    run, *others = bits
    grid = by_block(bits[run])
    words = "; ".join(
        f"{kind} {' '.join(f'{b:g}' for b in line)}"
        for kind, line in grid.T.to_dict("list").items()
    )
    alt = f"{of} bits of {row.label} by layer type and block: {words}"
    edges = [level - 0.5 for level in range(int(grid.min().min()), int(grid.max().max()) + 2)]
    texts, label = grid.map("{:g}".format), f"{of.lower()} bits"
    picture = heat_panel(f"bits-{run.anchor}", alt, "", grid, edges, label, texts, "block")
    gain = headroom_text(run)
    caption = f"{of} bits, training seed {run.seed}{gain and f': {gain}'}."
    if others:
        alike = np.mean([bits[o].get(name) == b for o in others for name, b in bits[run].items()])
        caption += (
            f" {plural(len(others), 'further training seed')} chose the same bits in "
            f"{percent(float(alike))} of layers; allocation.csv has all."
        )
    return Figures([picture], caption)


def _by_type(group: Group, bits: float) -> list[Block]:
    """Mean bits per layer type beside the paper's."""
    found = mean_bits_by_type(group, bits)
    if found is None:
        return []
    row, frame = found[0], _ordered(found[1], LAYER_TYPES)
    published = published_values()
    sheet = frame.agg(["mean", "min", "max"], axis=1).rename_axis("layer type").reset_index()
    sheet["paper"] = [published.get(f"bits-a{bits:g}-{kind}", math.nan) for kind in frame.index]
    sheet["difference"] = sheet["mean"] - sheet["paper"]
    sheet["range"] = [
        f"[{low:.2f}–{high:.2f}]" if high > low else ""
        for low, high in zip(sheet.pop("min"), sheet.pop("max"), strict=True)
    ]
    seeds = listing(f"seed {seed}" for seed in frame.columns)
    two = lambda value: fixed(value, 2)  # noqa: E731
    return [
        Sheet(
            sheet.assign(run=row.runs[0].href),
            f"Mean activation bits per layer type: {row.label} on {group.title}",
            f"Training {seeds}: mean [min–max], layers counted equally. The paper’s are of "
            "DiT-XL/2.",
            formats={"mean": two, "paper": two, "difference": signed},
            heads={"mean": "here"},
            links={"mean": "run"},
            small={"mean": "range"},
        )
    ]


def _sensitivity(row: Row) -> list[Block]:
    """One panel per bit width, of the first training seed that measured; one common scale."""
    measured = ((run, run.frame("sensitivity")) for run in row.runs)
    run, frame = next(((run, own) for run, own in measured if not own.empty), (None, None))
    if run is None or frame is None:
        return []
    frame = frame.astype({"mse": float, "bits": int})
    positive = frame[frame["mse"] > 0]
    if positive.empty:
        return []
    logs = np.log10(positive["mse"])
    edges = MaxNLocator(7).tick_values(logs.min(), logs.max())
    pictures = []
    for width, own in positive.assign(log=logs).groupby("bits"):
        grid = by_block(dict(zip(own["layer"], own["log"], strict=True)))
        worst = own.sort_values("mse").iloc[-1]
        bits = plural(int(str(width)), "bit")
        alt = (
            f"Sensitivity to {bits} by layer type and block: from "
            f"{significant(own['mse'].min())} to {significant(worst['mse'])} in {worst['layer']}"
        )
        label = "log₁₀ of the mean-squared change"
        name = f"sensitivity-{run.anchor}-{width}"
        pictures.append(heat_panel(name, alt, bits, grid, edges, label, False, "block"))
    caption = (
        "Sensitivity: mean-squared change of the noise prediction when one layer alone drops to so "
        f"many bits; training seed {run.seed}, one scale for all panels."
    )
    if blank := sorted(set(frame["bits"]) - set(positive["bits"])):
        named = listing(plural(b, "bit") for b in blank)
        caption += f" Left out: {named}, which changes nothing: it is what is compared with."
    return [Figures(pictures, caption)]
