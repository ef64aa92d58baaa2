"""The charts of the report; each returns an inline SVG element, or None without data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports.aggregate import Group, Row
from reports.loading import RunData
from reports.settings import (
    ALLOCATED,
    AMPN,
    FROM_FILE,
    FULL_PRECISION,
    PARTIAL,
    UNIFORM,
    UNROTATED,
)
from reports.svg import COLOURS, render
from reports.text import number, significant

FAMILY_MARKS = {
    FULL_PRECISION: ("neutral", "s"),
    AMPN: ("blue", "D"),
    ALLOCATED: ("blue", "s"),
    FROM_FILE: ("blue", "P"),
    UNIFORM: ("green", "o"),
    PARTIAL: ("purple", "^"),
    UNROTATED: ("orange", "X"),
}
MAX_CURVE_POINTS = 120


def fid_chart(group: Group) -> str | None:
    """One line per plan: every value as a dot, the range as a bar, the mean as a mark."""
    metric = group.fid
    rows = [row for row in group.rows if metric and row.summary(metric)]
    if metric is None or not rows:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            if y and row.bits != rows[y - 1].bits:
                axes.axhline(y - 0.5, color=COLOURS["line"], lw=0.6)
            _dot_line(axes, y, row, metric)
        teacher = group.teacher.summary(metric)
        if teacher:
            axes.axvspan(teacher.low, teacher.high, color=COLOURS["neutral"], alpha=0.15, lw=0)
            axes.axvline(teacher.mean, color=COLOURS["neutral"], lw=1.2, ls=(0, (4, 2)))
            axes.annotate(
                f"teacher {number(metric, teacher.mean)}",
                (teacher.mean, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="left",
                va="bottom",
                color=COLOURS["muted"],
            )
        _log_axis(
            axes, [v.value for row in (*rows, group.teacher) for v in row.values.get(metric, [])]
        )
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["text"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"{metric} (lower is better; logarithmic)")
        axes.grid(axis="x", which="major")
        axes.spines["left"].set_visible(False)
        return figure

    listed = "; ".join(
        f"{row.label} {number(metric, row.summary(metric).mean)}"  # type: ignore[union-attr]
        for row in rows
    )
    return render(draw, f"fid-{group.title}", f"{metric} of each plan. Means: {listed}.")


def loss_chart(rows: Sequence[Row], title: str) -> str | None:
    """Small multiples of the training loss, one panel per plan, one line per training seed."""
    panels = [
        (row.label, [(f"seed {run.seed}", loss_curve(run)) for run in row.runs]) for row in rows
    ]
    panels = [(label, [c for c in curves if c[1]]) for label, curves in panels]
    return _curves([panel for panel in panels if panel[1]], title)


def run_loss_chart(runs: Sequence[RunData], title: str) -> str | None:
    """The same for runs that are no plans (teachers): one panel per run."""
    curves = [(f"{run.workload_name}, seed {run.seed}", loss_curve(run)) for run in runs]
    return _curves([(label, [("loss", points)]) for label, points in curves if points], title)


def loss_curve(run: RunData) -> list[tuple[float, float]]:
    """(step, loss) of the logged steps, at most MAX_CURVE_POINTS of them, evenly thinned."""
    points = [
        (float(record["step"]), float(record["loss"]))
        for record in run.of_kind("train")
        if "step" in record and "loss" in record
    ]
    points.sort()
    stride = math.ceil(len(points) / MAX_CURVE_POINTS) or 1
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def allocation_chart(
    bits_by_layer: Mapping[str, int], name: str, of: str = "activation"
) -> str | None:
    """Heat map of activation or weight bits, layer type × block, the bits printed in the cells."""
    grid = by_block(bits_by_layer)
    if not grid:
        return None
    types = _types(grid)
    blocks = sorted({block for block, _ in grid})

    def draw() -> Figure:
        figure = Figure(
            figsize=(1.1 + 0.34 * len(blocks), 0.75 + 0.3 * len(types)), layout="constrained"
        )
        axes = figure.subplots()
        for (block, kind), bits in grid.items():
            level = min(max(round(bits), 1), 4)
            x, y = blocks.index(block), types.index(kind)
            box = Rectangle((x - 0.5, y - 0.5), 1, 1, fc=COLOURS[f"bits{level}"], lw=1.5)
            box.set_edgecolor(COLOURS["page"])
            axes.add_patch(box)
            axes.text(
                x, y, significant(bits, 2), ha="center", va="center", color=COLOURS[f"on{level}"]
            )
        _matrix_axes(axes, blocks, types)
        return figure

    words = "; ".join(
        f"{kind}: {' '.join(significant(grid[b, kind], 2) for b in blocks if (b, kind) in grid)}"
        for kind in types
    )
    return render(draw, f"allocation-{name}", f"{of.capitalize()} bits per block, {words}.")


def sensitivity_chart(sensitivity: Mapping[tuple[str, int], float], name: str) -> str | None:
    """Heat maps of the sensitivity, layer type × block: one per bit width, one common scale."""
    widths = sorted({bits for _, bits in sensitivity})
    logs = {key: math.log10(value) for key, value in sensitivity.items() if value > 0}
    if not logs:
        return None
    low, high = min(logs.values()), max(logs.values())
    grids = {
        bits: by_block({layer: logs[layer, b] for layer, b in logs if b == bits}) for bits in widths
    }
    types = _types({key: 0.0 for grid in grids.values() for key in grid})
    blocks = sorted({block for grid in grids.values() for block, _ in grid})

    def draw() -> Figure:
        columns = min(len(widths), 2 if len(blocks) > 8 else 4)
        lines = math.ceil(len(widths) / columns)
        size = (1.0 + columns * (0.35 + 0.3 * len(blocks)), lines * (0.75 + 0.28 * len(types)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, bits in zip(panels, widths, strict=False):
            for (block, kind), value in grids[bits].items():
                share = (value - low) / (high - low) if high > low else 1.0
                x, y = blocks.index(block), types.index(kind)
                box = Rectangle((x - 0.5, y - 0.5), 1, 1, lw=1.5, fill=True)
                box.set_facecolor((*to_rgb(COLOURS["heat"]), round(0.08 + 0.92 * share, 2)))
                box.set_edgecolor(COLOURS["page"])
                axes.add_patch(box)
            _matrix_axes(axes, blocks, types)
            if axes.get_subplotspec() is not None and not axes.get_subplotspec().is_first_col():
                axes.set_yticks([])
            axes.set_title(f"{bits} bit" if bits == 1 else f"{bits} bits", loc="left")
        for axes in panels[len(widths) :]:
            axes.set_axis_off()
        return figure

    return render(
        draw,
        f"sensitivity-{name}",
        "Sensitivity of each layer at each bit width; darker is more sensitive. From "
        f"{significant(10**low, 3)} to {significant(10**high, 3)}; the CSV file has every value.",
    )


def by_block(values: Mapping[str, float]) -> dict[tuple[int, str], float]:
    """`blocks.3.attn.qkv` -> (3, "qkv"); layers outside the blocks are left out."""
    grid = {}
    for layer, value in values.items():
        match = re.search(r"(?:^|\.)\w*blocks\.(\d+)\.(.+)$", layer)
        if match:
            grid[int(match[1]), _short_type(match[2])] = value
    return grid


def _dot_line(axes: Axes, y: int, row: Row, metric: str) -> None:
    summary = row.summary(metric)
    if summary is None:
        return
    colour, marker = FAMILY_MARKS[row.family]
    values = [value.value for value in row.values[metric]]
    axes.plot([summary.low, summary.high], [y, y], color=COLOURS[colour], lw=1.4, alpha=0.5)
    axes.plot(values, [y] * len(values), "|", color=COLOURS[colour], ms=9, mew=0.8, alpha=0.7)
    page = COLOURS["page"]
    axes.plot([summary.mean], [y], marker, color=COLOURS[colour], ms=7, mec=page, mew=0.7)
    axes.annotate(
        number(metric, summary.mean),
        (summary.high, y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=COLOURS["text"],
    )


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with 1-2-5 ticks and room for the labels; linear if a value is not positive."""
    if min(values) <= 0:
        return
    low, high = min(values) / 1.25, max(values) * 1.5
    ticks = log_ticks(low, high)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` (positive), about four of them, denser on short ranges."""
    span = high / low
    steps: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    for limit, coarser in ((2.5, (1, 1.5, 2, 3, 4, 5, 7)), (8, (1, 2, 5)), (300, (1,))):
        steps = coarser if span > limit else steps
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Through text, so that 3 * 10**-2 is 0.03.
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


_Curve = tuple[str, list[tuple[float, float]]]


def _curves(panels: Sequence[tuple[str, Sequence[_Curve]]], title: str) -> str | None:
    if not panels:
        return None
    everything = [y for _, curves in panels for _, points in curves for _, y in points]
    finite = [y for y in everything if math.isfinite(y)]

    def draw() -> Figure:
        columns = min(4, len(panels))
        lines = math.ceil(len(panels) / columns)
        figure = Figure(
            figsize=(max(2.6, 1.85 * columns), 0.3 + 1.35 * lines), layout="constrained"
        )
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (label, curves) in zip(grid.ravel(), panels, strict=False):
            for index, (_, points) in enumerate(curves):
                x, y = zip(*points, strict=True)
                style = ("-", (0, (4, 1.5)), (0, (1, 1)))[index % 3]
                axes.plot(x, y, color=COLOURS["blue"], lw=1.1, ls=style, alpha=0.9)
            axes.set_title(label, loc="left")
            axes.grid(axis="y")
            axes.margins(x=0.02)
            if finite and min(finite) > 0:
                ticks = log_ticks(min(finite), max(finite))
                axes.set_yscale("log")
                axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        for index in range(len(panels), columns * lines):
            grid.ravel()[index].set_axis_off()
            grid.ravel()[index - columns].tick_params(labelbottom=True)
        figure.supxlabel("training step", fontsize=9, color=COLOURS["muted"])
        figure.supylabel("loss (logarithmic)", fontsize=9, color=COLOURS["muted"])
        return figure

    ends = "; ".join(
        f"{label} ends at {', '.join(significant(points[-1][1], 3) for _, points in curves)}"
        for label, curves in panels
    )
    return render(draw, f"loss-{title}", f"Training loss by step, one panel per plan: {ends}.")


def _matrix_axes(axes: Axes, blocks: Sequence[int], types: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(types) - 0.5, -0.5)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(types)), list(types))
    axes.tick_params(length=0, labelcolor=COLOURS["text"])
    axes.set_xlabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _types(grid: Mapping[tuple[int, str], float]) -> list[str]:
    known = ("qkv", "proj", "fc1", "fc2")
    return sorted(
        {kind for _, kind in grid}, key=lambda k: (known.index(k) if k in known else 9, k)
    )


def _short_type(rest: str) -> str:
    last = rest.rsplit(".", 1)[-1]
    return last if last in ("qkv", "proj", "fc1", "fc2") else rest
