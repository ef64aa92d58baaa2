"""The charts of the kernels section; each returns an inline SVG element, or None."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from reports.figures import log_ticks
from reports.kernels.data import (
    GROUPED,
    MATMUL,
    QUANTIZE,
    SHARE,
    SPEEDUP,
    TARGETS,
    Peaks,
    is_unstable,
    models,
    ours,
    peaks,
    products,
)
from reports.kernels.story import MODEL_MARK, percent
from reports.study_tables import Row, StudyRun, group, two, value
from reports.svg import COLOURS, compact, render
from reports.text import significant

_CAPTION = (
    "{device}: " + MODEL_MARK + ". A mark is one product of a block: what its operations per byte "
    "allow. Larger marks are more images in a step. On the slope, memory sets the time; on a flat "
    "roof, arithmetic. adaLN has far fewer operations per byte: the table has it."
)
_MARKS = {"qkv": "o", "proj": "s", "fc1": "^", "fc2": "v"}
_LINES = (
    *(("blue", "o", "-"), ("orange", "s", "-"), ("green", "^", "-")),
    *(("purple", "v", "-"), ("neutral", "D", "-"), ("blue", "P", "--")),
)
_TRAINING = {"fake_quantize": "forward", "fake_quantize_backward": "backward"}


def roofline_chart(study: StudyRun) -> str | None:
    """One panel per model: attainable rate against operations per byte, ternary and bf16."""
    sheets = peaks(study)
    if not sheets:
        return None
    sheet = sheets[0]
    panels = [
        (model, rows)
        for model in models(study)
        if (rows := [r for r in products(study, sheet.device, model) if r["kernel"] == MATMUL])
    ]
    if not panels:
        return None
    everything = [row for _, rows in panels for row in rows]
    places = [_place(row, kind) for row in everything for kind in ("ternary", "bf16")]
    left, bottom = (min(place[axis] for place in places) / 1.15 for axis in (0, 1))
    right = max(*(x for x, _ in places), sheet.int8 / sheet.tb_s) * 1.4
    top = 1.35 * sheet.int8
    most = max(int(row["images"]) for row in everything)

    def draw() -> Figure:
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(1.5 + 3.4 * columns, 0.5 + 2.4 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (model, rows) in zip(grid, panels, strict=False):
            _roofs(axes, sheet, left, right)
            for row in rows:
                size = 3 + 4 * math.log2(int(row["images"])) / max(1.0, math.log2(most))
                for kind, colour in (("bf16", "orange"), ("ternary", "blue")):
                    mark, hue = _MARKS.get(row["layer"], "o"), COLOURS[colour]
                    x, y = _place(row, kind)
                    axes.plot([x], [y], mark, mfc="none", mec=hue, ms=size, mew=0.9)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(left, right)
            axes.set_ylim(bottom, top)
            for ticks, place in ((log_ticks(left, right), axes.set_xticks),
                                 (log_ticks(bottom, top), axes.set_yticks)):  # fmt: skip
                place(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(f"DiT-{model}/2", loc="left")
            axes.grid()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("operations per byte", fontsize=9, color=COLOURS["muted"])
        figure.supylabel("at most, TOP/s", fontsize=9, color=COLOURS["muted"])
        muted = COLOURS["muted"]
        layers = list(dict.fromkeys(row["layer"] for row in everything))
        handles = [
            Line2D([], [], ls="", marker="o", color=COLOURS["blue"], label="ternary × int8"),
            Line2D([], [], ls="", marker="o", color=COLOURS["orange"], label="bf16"),
            *(
                Line2D([], [], ls="", marker=_MARKS.get(n, "o"), color=muted, label=n)
                for n in layers
            ),
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
        return figure

    parts = []
    for model, rows in panels:
        for (layer,), own in group(rows, "layer").items():
            ends = [significant(_place(row, "ternary")[0], 3) for row in (own[0], own[-1])]
            parts.append(f"DiT-{model} {layer} {ends[0]} to {ends[1]}")
    alt = (
        f"Roofline of {sheet.device}, {MODEL_MARK}. Operations per byte of the ternary products, "
        f"fewest to most images: {'; '.join(parts)}."
    )
    return compact(render(draw, f"{study.short}-roofline", alt))


def roofline_caption(study: StudyRun) -> str:
    sheets = peaks(study)
    return _CAPTION.format(device=f"{sheets[0].device} ({sheets[0].source})") if sheets else ""


def share_chart(study: StudyRun, model: str) -> str | None:
    """Share of the measured ceiling by images, a panel per kernel, and speed-up over cuBLAS."""
    rows = [row for row in ours(study) if row["model"] == model and int(row["images"]) > 0]
    wanted = (
        ("Hadamard + quantize: share of ceiling", (QUANTIZE,), SHARE),
        ("ternary product: share of ceiling", (MATMUL, GROUPED), SHARE),
        ("ternary product: times as fast as cuBLAS bf16", (MATMUL,), SPEEDUP),
        ("training: share of ceiling", tuple(_TRAINING), SHARE),
    )
    panels = [
        (title, names[0], column, found)
        for title, names, column in wanted
        if (found := _lines([row for row in rows if row["kernel"] in names], column))
    ]
    if not panels:
        return None
    counts = sorted({int(row["images"]) for row in rows})

    def draw() -> Figure:
        lines = -(-len(panels) // 2)
        figure = Figure(figsize=(8.6, 0.3 + 2.35 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, squeeze=False).ravel()
        for axes, (title, kernel, column, found) in zip(grid, panels, strict=False):
            for index, (layer, points) in enumerate(found.items()):
                colour, mark, dash = _LINES[index % len(_LINES)]
                xs = [counts.index(count) for count, _, _ in points]
                ys = [amount for _, amount, _ in points]
                hue = COLOURS[colour]
                axes.plot(xs, ys, ls=dash, marker=mark, ms=4, mew=0, lw=1.1, color=hue, label=layer)
                shaky = [(x, y) for x, y, p in zip(xs, ys, points, strict=True) if p[2]]
                if shaky:
                    axes.plot(*zip(*shaky, strict=True), "o", ms=9, mfc="none", mec=hue, mew=0.8)
            if model == "XL":
                _target_lines(axes, kernel, column, rows, counts)
            axes.set_xticks(range(len(counts)), [str(count) for count in counts])
            axes.set_xlim(-0.4, len(counts) - 0.6)
            top = max(amount for points in found.values() for _, amount, _ in points)
            axes.set_ylim(0, max(1.9 if column == SPEEDUP else 1.05, 1.1 * top))
            axes.set_title(title, loc="left")
            axes.set_xlabel("images in a step")
            if column == SHARE:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(axis="y")
            axes.legend(loc="lower left", ncols=2, fontsize=7)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        return figure

    words = []
    for title, _, column, found in panels:
        show = percent if column == SHARE else two
        ends = ", ".join(f"{layer} {show(points[-1][1])}" for layer, points in found.items())
        words.append(f"{title} at most images: {ends}")
    alt = f"DiT-{model}/2 on the device. {'; '.join(words)}."
    return compact(render(draw, f"{study.short}-{model}-share", alt))


_Points = list[tuple[int, float, bool]]


def _lines(rows: list[Row], column: str) -> dict[str, _Points]:
    """{layer: [(images, value, unstable)]} of what has the value, by images."""
    found: dict[str, _Points] = {}
    for row in rows:
        amount = value(row, column)
        if amount is not None:
            point = (int(row["images"]), amount, is_unstable(row))
            part = _TRAINING.get(row["kernel"], "")
            layer = f"{row['layer'].removeprefix('training ')}, {part}" if part else row["layer"]
            found.setdefault(layer, []).append(point)
    return {layer: sorted(points) for layer, points in found.items()}


def _target_lines(axes: Axes, kernel: str, column: str, rows: list[Row], counts: list[int]) -> None:
    """A short line at each target, at the images that have its number of rows."""
    shown = [t for t in TARGETS if (t.kernel, t.column) == (kernel, column)]
    for target in shown:
        images = {
            int(row["images"])
            for row in rows
            if row["kernel"] == kernel
            and row["layer"] in target.layers
            and int(row["rows"]) == target.tokens
        }
        is_lower = any(t.tokens == target.tokens and t.bound > target.bound for t in shown)
        for count in images:
            x = counts.index(count)
            axes.plot([x - 0.35, x + 0.35], [target.bound] * 2, color=COLOURS["text"], lw=1.6)
            text = f"{100 * target.bound:g} %" if column == SHARE else f"{target.bound:g}×"
            axes.annotate(
                f"target {text}",
                (x + 0.35, target.bound),
                xytext=(0, -3 if is_lower else 2),
                textcoords="offset points",
                ha="right",
                va="top" if is_lower else "bottom",
                fontsize=7,
                color=COLOURS["text"],
            )


def _place(row: Row, kind: str) -> tuple[float, float]:
    """Operations per byte, and the most TOP/s that they allow, of a product of the model.

    Bytes in bf16: weight, input and output, each moved once.
    """
    names = ("operations", "bytes", "least_us", "bf16_least_us")
    operations, moved, least, dense = (value(row, name) for name in names)
    if not (operations and moved and least and dense):
        raise ValueError(f"no operations, bytes or times of {row['layer']}")
    if kind == "ternary":
        return operations / moved, operations / least / 1e6
    rows, width, outputs = (int(row[name]) for name in ("rows", "width", "outputs"))
    full = 2 * int(row["groups"]) * (width * outputs + rows * (width + outputs))
    return operations / full, operations / dense / 1e6


def _roofs(axes: Axes, sheet: Peaks, low: float, high: float) -> None:
    for rate, name, colour in ((sheet.bf16, "bf16", "orange"), (sheet.int8, "int8", "blue")):
        xs, ys = [low, rate / sheet.tb_s, high], [low * sheet.tb_s, rate, rate]
        axes.plot(xs, ys, color=COLOURS[colour], lw=1, alpha=0.5)
        axes.annotate(
            f"{name} {rate:g}",
            (high, rate),
            xytext=(-2, 5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
            color=COLOURS["muted"],
        )
