"""The charts of the normality section; each returns an inline SVG element, or None without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures import log_ticks
from reports.normality.data import (
    BEFORE,
    LIMIT,
    MAIN,
    PLAIN,
    SIGNS,
    WITHOUT_DC,
    NormalityRun,
    Row,
    bits_text,
    ratio_text,
    value,
    words,
)
from reports.svg import COLOURS, compact, render
from reports.text import listing, significant

#: Colour, line and mark of a transform, the same in every chart and in the page's legend.
STYLES = {
    BEFORE: ("orange", "-", "X"),
    PLAIN: ("purple", "-", "^"),
    WITHOUT_DC: ("purple", (0, (1, 1.5)), ""),
    SIGNS: ("blue", "-", "o"),
    "random-orthogonal": ("green", (0, (4, 1.5)), ""),
    "dual-rotation": ("neutral", (0, (4, 1.5)), ""),
}
#: Above this ratio a chart shows nothing: what matters is near 1.
CUT_OFF = 12.0
_TYPE_MARKS = (
    ("blue", "o"),
    ("orange", "X"),
    ("green", "s"),
    ("purple", "^"),
    ("neutral", "D"),
)


def examples_chart(study: NormalityRun, subject: str) -> str | None:
    """Histogram and Q–Q plot of one token per layer type, before and after."""
    rows = study.of("examples", subject=subject)
    places = [p for p in study.places if _of_place(rows, p)]
    if not places:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(0.5 + 2.0 * len(places), 3.7), layout="constrained")
        panels = figure.subplots(2, len(places), squeeze=False)
        for column, place in enumerate(places):
            own = _of_place(rows, place)
            _histogram(panels[0][column], own)
            _quantiles(panels[1][column], own)
            panels[0][column].set_title(f"{place[0]} (d = {place[1]})", loc="left")
        panels[0][0].set_ylabel("density")
        panels[1][0].set_ylabel("token’s quantile (σ)")
        figure.supxlabel("above: value (σ); below: normal quantile", fontsize=9)
        return figure

    reach = "; ".join(f"{study.name(p)} {_reach(_of_place(rows, p))}" for p in places)
    alt = f"Histograms and Q–Q plots of one token of each layer type. Greatest quantile: {reach}."
    return _chart(draw, f"{study.short}-examples-{subject}", alt)


def ratio_chart(study: NormalityRun) -> str | None:
    """Error ratio against bits, one panel per layer type, one line per transform."""
    places, subjects = study.places, study.subjects
    if not study.bits:
        return None

    def draw() -> Figure:
        size = (0.7 + 2.0 * len(places), 0.6 + 1.75 * len(subjects))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(subjects), len(places), squeeze=False, sharey=True)
        for line, subject in zip(panels, subjects, strict=True):
            for axes, place in zip(line, places, strict=True):
                for transform, (colour, dash, mark) in STYLES.items():
                    found = [study.judgement(subject, place, transform, b) for b in study.bits]
                    xs = [i for i, j in enumerate(found) if j is not None]
                    ys = [j.ratio for j in found if j is not None]
                    shade = COLOURS[colour]
                    axes.plot(xs, ys, color=shade, ls=dash, marker=mark, ms=3, lw=1.1)
                axes.axhline(LIMIT, color=COLOURS["muted"], lw=0.7, ls=(0, (2, 2)))
                axes.set_xticks(range(len(study.bits)), [str(b) for b in study.bits])
                axes.set_title(study.name(place), loc="left")
                axes.grid(axis="y")
            line[0].set_ylabel(subject if len(subjects) > 1 else "error ratio", wrap=True)
        ratios = [min(j.ratio, CUT_OFF) for s in subjects for j in study.judgements(s)]
        _log(panels[0][0], "y", ratios)
        figure.supxlabel("bits", fontsize=9, color=COLOURS["muted"])
        return figure

    bits = study.usual_bits
    parts = [
        f"{study.name(place)} {ratio_text(before.ratio)} to {ratio_text(after.ratio)}"
        for place in places
        if (before := study.judgement(subjects[0], place, BEFORE, bits))
        and (after := study.judgement(subjects[0], place, SIGNS, bits))
    ]
    alt = f"Error ratio by bits and transform. At {bits_text([bits])}, before to random signs: "
    return _chart(draw, f"{study.short}-ratios", alt + "; ".join(parts) + ".")


def bound_chart(study: NormalityRun) -> str | None:
    """L₃ against the exact distance of single tokens, with the bound and the d^-1/2 of both."""
    rows = [r for r in study.tables["bound"] if value(r, "exact_distance") and value(r, "l3")]
    if not rows:
        return None
    subjects = [s for s in study.subjects if any(r["subject"] == s for r in rows)]

    def draw() -> Figure:
        figure = Figure(figsize=(0.6 + 3.9 * len(subjects), 3.2), layout="constrained")
        panels = figure.subplots(1, len(subjects), squeeze=False, sharex=True, sharey=True)[0]
        xs = [float(row["l3"]) for row in rows]
        ys = [float(row["exact_distance"]) for row in rows]
        slope = float(rows[0]["bound"]) / float(rows[0]["l3"])
        span = [min(xs) / 1.2, max(xs) * 1.2]
        for axes, subject in zip(panels, subjects, strict=True):
            line = [slope * x for x in span]
            axes.plot(span, line, color=COLOURS["text"], lw=1.1, label=f"bound {slope:.2f}·L₃")
            for (colour, mark), place in zip(_marks(len(study.places)), study.places, strict=True):
                own = _of_place([r for r in rows if r["subject"] == subject], place)
                x = [float(row["l3"]) for row in own]
                y = [float(row["exact_distance"]) for row in own]
                axes.plot(
                    x, y, mark, ms=4, color=COLOURS[colour], alpha=0.75, label=study.name(place)
                )
            axes.set_xlabel("L₃ of the token (logarithmic)")
            if len(subjects) > 1:
                axes.set_title(subject, loc="left")
            axes.grid()
        _log(panels[0], "x", span)
        _log(panels[0], "y", [*ys, slope * span[0], slope * span[1]])
        panels[0].set_ylabel("exact distance to normal")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
        return figure

    low, high = (
        min(float(r["exact_distance"]) for r in rows),
        max(float(r["exact_distance"]) for r in rows),
    )
    alt = (
        f"Exact distance of {len(rows)} tokens against L₃, all below the bound or counted as "
        f"violations; distances from {significant(low, 3)} to {significant(high, 3)}."
    )
    return _chart(draw, f"{study.short}-bound", alt)


def decay_chart(study: NormalityRun) -> str | None:
    """Exact distance against the width: parts of real tokens, and synthetic tokens."""
    rows = [r for r in study.tables["decay"] if value(r, "exact_distance_median")]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    groups = [
        ("parts of real tokens", [s for s in _real(study) if s in sources]),
        ("synthetic tokens", [s for s in sources if not s.startswith("real ")]),
    ]
    groups = [group for group in groups if group[1]]
    if not groups:
        return None
    widths = [float(row["width"]) for row in rows]
    values = [float(row["exact_distance_median"]) for row in rows]

    def draw() -> Figure:
        figure = Figure(figsize=(0.6 + 3.9 * len(groups), 3.2), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, names) in zip(panels, groups, strict=True):
            for (colour, mark), name in zip(_marks(len(names)), names, strict=True):
                own = [row for row in rows if row["source"] == name]
                x = [float(row["width"]) for row in own]
                y = [float(row["exact_distance_median"]) for row in own]
                label = name.removeprefix("real ")
                axes.plot(x, y, mark, ls="-", ms=3.5, lw=1, color=COLOURS[colour], label=label)
            ends = [min(widths), max(widths)]
            for rate, text in ((-0.5, "1/√d"), (-1.0, "1/d")):
                guide = [max(values) * (x / ends[0]) ** rate for x in ends]
                axes.plot(ends, guide, color=COLOURS["muted"], lw=0.8, ls=(0, (3, 2)))
                axes.annotate(text, (ends[1], guide[1]), ha="right", va="bottom", fontsize=8)
            axes.set_title(title, loc="left")
            axes.set_xlabel("width d (logarithmic)")
            axes.grid()
            axes.legend(fontsize=7.5, loc="lower left", handlelength=1.4, labelspacing=0.25)
        _log(panels[0], "x", widths, powers_of_two=True)
        _log(panels[0], "y", values)
        panels[0].set_ylabel("exact distance to normal")
        return figure

    slopes = [
        f"{row['source']} {slope:.2f}"
        for row in study.tables["decay_slopes"]
        if (slope := value(row, "slope")) is not None
    ]
    alt = f"Exact distance against the width, both logarithmic. Slopes: {'; '.join(slopes)}."
    return _chart(draw, f"{study.short}-decay", alt)


def sample_size_chart(study: NormalityRun) -> str | None:
    """Share that Shapiro–Wilk rejects against n: before, after, and the null."""
    rows = study.tables["sample_size"]
    places = [p for p in study.places if _of_place(rows, p)]
    if not places:
        return None
    samples = [(name, STYLES[name][0], STYLES[name][2]) for name in MAIN]
    samples.append(("gaussian null", "neutral", "s"))

    def draw() -> Figure:
        figure = Figure(figsize=(0.7 + 2.0 * len(places), 2.1), layout="constrained")
        panels = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
        for axes, place in zip(panels, places, strict=True):
            for sample, colour, mark in samples:
                own = [row for row in _of_place(rows, place) if row["sample"] == sample]
                x = [float(row["n"]) for row in own]
                y = [value(row, "rejected") or 0.0 for row in own]
                axes.plot(x, y, mark, ls="-", ms=3, lw=1, color=COLOURS[colour])
            _log(axes, "x", [float(r["n"]) for r in _of_place(rows, place)], powers_of_two=True)
            axes.set_title(study.name(place), loc="left")
            axes.grid(axis="y")
        panels[0].set_ylim(-0.03, 1.03)
        panels[0].set_ylabel("share rejected")
        figure.supxlabel("values n that the test sees", fontsize=9, color=COLOURS["muted"])
        return figure

    ends = []
    for place in places:
        own = _of_place(rows, place)
        greatest = max(int(row["n"]) for row in own)
        shares = [
            f"{words(row['sample'])} {value(row, 'rejected') or 0:.2f}"
            for row in own
            if int(row["n"]) == greatest
        ]
        ends.append(f"{study.name(place)} at n = {greatest}: {listing(shares)}")
    alt = f"Share of tokens rejected by Shapiro–Wilk against n. {'; '.join(ends)}."
    return _chart(draw, f"{study.short}-sample-size", alt)


def _chart(draw: Callable[[], Figure], name: str, alt: str) -> str:
    return compact(render(draw, name, alt))


def _histogram(axes: Axes, rows: Sequence[Row]) -> None:
    for transform in MAIN:
        own = [r for r in rows if r["transform"] == transform and r["kind"] == "density"]
        x, y = [float(r["x"]) for r in own], [float(r["y"]) for r in own]
        # Narrower where nothing lies: the run's bins reach to the farthest value.
        axes.step(x, y, where="mid", color=COLOURS[STYLES[transform][0]], lw=1.1)
    grid = [i / 10 for i in range(-40, 41)]
    normal = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in grid]
    axes.plot(grid, normal, color=COLOURS["muted"], lw=0.8, ls=(0, (3, 2)))
    axes.set_xlim(-4.5, 4.5)


def _quantiles(axes: Axes, rows: Sequence[Row]) -> None:
    axes.plot([-3, 3], [-3, 3], color=COLOURS["muted"], lw=0.8, ls=(0, (3, 2)))
    for transform in MAIN:
        own = [r for r in rows if r["transform"] == transform and r["kind"] == "quantile"]
        x, y = [float(r["x"]) for r in own], [float(r["y"]) for r in own]
        axes.plot(x, y, color=COLOURS[STYLES[transform][0]], lw=1.4)
    axes.grid()


def _reach(rows: Sequence[Row]) -> str:
    parts = []
    for transform in MAIN:
        found = [
            abs(float(r["y"]))
            for r in rows
            if r["transform"] == transform and r["kind"] == "quantile"
        ]
        if found:
            parts.append(f"{words(transform)} {max(found):.1f} σ")
    return ", ".join(parts)


def _log(axes: Axes, side: str, values: Sequence[float], *, powers_of_two: bool = False) -> None:
    """A logarithmic axis with few round ticks; linear when a value is not positive."""
    if not values or min(values) <= 0:
        return
    low, high = min(values) / 1.15, max(values) * 1.15
    if powers_of_two:
        steps = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        stride = max(1, math.ceil(len(steps) / 4))
        ticks = [float(2**step) for step in steps[::stride]]
    else:
        ticks = log_ticks(low, high)
    setters: dict[str, tuple[Callable[..., object], ...]] = {
        "x": (axes.set_xscale, axes.set_xlim, axes.set_xticks),
        "y": (axes.set_yscale, axes.set_ylim, axes.set_yticks),
    }
    scale, limits, place = setters[side]
    scale("log")
    limits(low, high)
    place(ticks, [f"{tick:g}" for tick in ticks])
    place([], minor=True)


def _real(study: NormalityRun) -> list[str]:
    """Sources of the decay that are real tokens, in the order of the layer types."""
    return list(dict.fromkeys(f"real {kind}" for kind, _ in study.places))


def _of_place(rows: Sequence[Row], place: tuple[str, int]) -> list[Row]:
    return [r for r in rows if (r["layer_type"], r["width"]) == (place[0], str(place[1]))]


def _marks(count: int) -> list[tuple[str, str]]:
    return [_TYPE_MARKS[i % len(_TYPE_MARKS)] for i in range(count)]
