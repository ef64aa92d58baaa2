"""The charts of the efficiency section; each returns an inline SVG element, or None."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reports.efficiency.data import MEMORY_PARTS, PARTS, batches, items, times
from reports.efficiency.tables import part_words
from reports.study_tables import Row, StudyRun, value
from reports.svg import COLOURS, compact, render
from reports.text import bytes_text

_PART_COLOURS = ("blue", "purple", "orange", "text", "neutral")
_MEMORY_COLOURS = ("blue", "orange", "neutral")
_MIB, _GIB = 2**20, 2**30


def checkpoint_chart(study: StudyRun) -> str | None:
    """One stacked bar per packing: MiB of every part, total and factor at its end."""
    rows = study.tables["checkpoints"]
    totals = [value(row, "total_bytes") for row in rows]

    def draw() -> Figure:
        figure = Figure(figsize=(8.4, 1.0 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            left = 0.0
            for part, colour in zip(PARTS, _PART_COLOURS, strict=True):
                amount = (value(row, f"{part}_bytes") or 0.0) / _MIB
                if amount:
                    axes.barh(y, amount, 0.68, left, color=COLOURS[colour], lw=0, alpha=0.85)
                left += amount
            axes.annotate(
                _end_words(row),
                (left, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=COLOURS["text"],
            )
        _bar_axes(axes, [row["packing"] for row in rows], "MiB")
        axes.set_xlim(0, 1.25 * max(total or 0.0 for total in totals) / _MIB)
        handles = [
            Patch(color=COLOURS[colour], label=part_words(part), alpha=0.85)
            for part, colour in zip(PARTS, _PART_COLOURS, strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=8)
        return figure

    if not rows:
        return None
    words = "; ".join(f"{row['packing']} {_end_words(row)}" for row in rows)
    alt = f"Bytes of a checkpoint by part for every packing. {words}."
    return compact(render(draw, f"{study.short}-checkpoints", alt))


def memory_chart(study: StudyRun) -> str | None:
    """A panel per batch, a stacked bar per variant: weights, activations, workspace in GiB."""
    rows = [row for row in items(study, "step") if value(row, "peak_bytes") is not None]
    if not rows:
        return None
    found = batches(rows)
    names = list(dict.fromkeys(row["variant"] for row in rows))

    def draw() -> Figure:
        size = (1.6 + 2.5 * len(found), 0.9 + 0.26 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(found), squeeze=False, sharey=True).ravel()
        for axes, batch in zip(grid, found, strict=True):
            top = 0.0
            for row in rows:
                if int(row["batch"]) != batch:
                    continue
                y, left = names.index(row["variant"]), 0.0
                for part, colour in zip(MEMORY_PARTS, _MEMORY_COLOURS, strict=True):
                    amount = (value(row, f"{part}_bytes") or 0.0) / _GIB
                    axes.barh(y, amount, 0.68, left, color=COLOURS[colour], lw=0, alpha=0.85)
                    left += amount
                axes.annotate(
                    _peak(row),
                    (left, y),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=COLOURS["text"],
                )
                top = max(top, left)
            _bar_axes(axes, names, "GiB")
            axes.set_xlim(0, 1.4 * top)
            axes.set_title(f"batch {batch}", loc="left")
        handles = [
            Patch(color=COLOURS[colour], label=part, alpha=0.85)
            for part, colour in zip(MEMORY_PARTS, _MEMORY_COLOURS, strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
        return figure

    words = "; ".join(f"{row['variant']} at batch {row['batch']} {_peak(row)}" for row in rows)
    alt = f"Peak GPU memory of a step by part: {words}."
    return compact(render(draw, f"{study.short}-memory", alt))


def _end_words(row: Row) -> str:
    total, factor = value(row, "total_bytes"), value(row, "size_reduction")
    size = "" if total is None else f"{total / _MIB:.2f}"
    return size if factor is None else f"{size} ({times(factor)})"


def _peak(row: Row) -> str:
    peak = value(row, "peak_bytes")
    return "" if peak is None else bytes_text(peak)


def _bar_axes(axes: Axes, names: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["text"])
    axes.set_xlabel(unit)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
