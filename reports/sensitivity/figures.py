"""The charts of the sensitivity section; each returns an inline SVG element, or None."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures import log_ticks, sensitivity_chart
from reports.sensitivity.story import (
    after,
    agreements,
    ceiling,
    layer_words,
    main_target,
    metric_words,
    steps_of,
    usual_bits,
    width_words,
)
from reports.sensitivity.tables import metric_ranks, truth_ranks
from reports.study_tables import Row, StudyRun, group, two, value
from reports.svg import COLOURS, compact, render

SCATTERED = ("epsilon_mse", "epsilon_mse_teacher")
#: Colour and mark of a layer type, a bit width or a metric, in the order of the run.
MARKS = (
    *(("blue", "o"), ("orange", "X"), ("green", "s"), ("purple", "^"), ("neutral", "D")),
    *(("blue", "v"), ("orange", "P"), ("green", "<"), ("purple", "*")),
)
_MAX_LABELS = 64


def steps_chart(study: StudyRun) -> str | None:
    """Agreement against K for every metric, one panel per bit width, the ceiling as a band."""
    widths = [bits for bits in study.distinct("agreement", "bits") if agreements(study, bits)]
    if not widths:
        return None
    steps = steps_of(study)
    metrics = study.distinct("agreement", "metric")

    def draw() -> Figure:
        figure = Figure(figsize=(1.8 + 1.75 * len(widths), 3.0), layout="constrained")
        panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
        for axes, bits in zip(panels, widths, strict=True):
            limit = ceiling(study, main_target(study), bits)
            if limit:
                axes.axhspan(min(limit), max(limit), color=COLOURS["neutral"], alpha=0.2, lw=0)
                axes.axhline(statistics.fmean(limit), color=COLOURS["neutral"], lw=0.8)
            for index, metric in enumerate(metrics):
                rows = agreements(study, bits, metric=metric)
                xs = [steps.index(row["steps"]) for row in rows]
                colour, mark = MARKS[index % len(MARKS)]
                axes.plot(
                    xs,
                    [float(row["spearman"]) for row in rows],
                    color=COLOURS[colour],
                    marker=mark,
                    ms=4,
                    lw=1.8 if index == 0 else 0.9,
                    label=metric,
                )
            axes.set_xticks(range(len(steps)), steps)
            axes.set_title(width_words(bits), loc="left")
            axes.grid(axis="y")
        panels[0].set_ylabel("Spearman’s ρ with the truth")
        figure.supxlabel("training steps before measuring", fontsize=9, color=COLOURS["muted"])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        return figure

    found = agreements(study, widths[-1])
    listed = "; ".join(
        f"{row['metric']} {after(row['steps'])} {two(float(row['spearman']))}" for row in found
    )
    alt = f"Spearman’s rho by metric and steps. {width_words(widths[-1])}: {listed}."
    return _chart(draw, f"{study.short}-steps", alt)


def scatter_chart(study: StudyRun) -> str | None:
    """Metric against truth before training and after the last K steps, colour by bits."""
    truth = {
        (row["layer"], row["bits"]): increase
        for row in study.of("truth", target=main_target(study))
        if (increase := value(row, "increase")) is not None
    }
    widths = study.distinct("truth", "bits")
    present = study.distinct("metrics", "metric")
    steps = list(dict.fromkeys((steps_of(study)[0], steps_of(study)[-1])))
    panels = [
        (metric, at, [(row, key) for row in rows if (key := (row["layer"], row["bits"])) in truth])
        for metric in SCATTERED
        if metric in present
        for at in steps
        if (rows := [r for r in study.of("metrics", metric=metric, steps=at) if _filled(r)])
    ]
    if not truth or not panels:
        return None
    floor = _floor(list(truth.values()))

    def draw() -> Figure:
        columns = len(steps)
        lines = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(0.8 + 3.1 * columns, 0.4 + 2.3 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, (metric, at, points) in zip(grid, panels, strict=False):
            least = _floor([float(row["value"]) for row, _ in points])
            for index, bits in enumerate(widths):
                own = [(row, key) for row, key in points if key[1] == bits]
                colour, mark = MARKS[index % len(MARKS)]
                xs = [max(float(row["value"]), least) for row, _ in own]
                ys = [max(truth[key], floor) for _, key in own]
                axes.plot(xs, ys, mark, color=COLOURS[colour], ms=4, mew=0, label=width_words(bits))
            _log(axes, "x", [max(float(row["value"]), least) for row, _ in points])
            _log(axes, "y", [max(v, floor) for v in truth.values()])
            axes.set_title(f"{metric} {after(at)}", loc="left")
        grid[0].legend(loc="upper left", fontsize=8)
        figure.supylabel("truth: increase of the loss", fontsize=9, color=COLOURS["muted"])
        figure.supxlabel("metric", fontsize=9, color=COLOURS["muted"])
        return figure

    below = sum(v <= 0 for v in truth.values())
    drawn = "; ".join(f"{metric_words(m)} {after(s)}, {len(p)} points" for m, s, p in panels)
    alt = f"Metric against truth: {drawn}. {below} of {len(truth)} truths are not above 0."
    return _chart(draw, f"{study.short}-scatter", alt)


def rank_chart(study: StudyRun) -> str | None:
    """Ranks of all layers from before training through K steps to the truth, as lines."""
    bits, metric = usual_bits(study), study.tables["verdicts"][0]["metric"]
    stages = [
        (f"{steps} steps" if steps != "0" else "PTQ", metric_ranks(study, metric, steps, bits))
        for steps in steps_of(study)
    ]
    truth = truth_ranks(study, bits)
    stages = [(label, ranks) for label, ranks in stages if ranks]
    if not truth or not stages:
        return None
    stages.append(("truth", truth))
    types = list(dict.fromkeys(layer.rpartition(".")[2] for layer in truth))

    def draw() -> Figure:
        size = (1.6 + 1.05 * len(stages), min(0.6 + 0.19 * len(truth), 14))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for layer in truth:
            colour, mark = MARKS[types.index(layer.rpartition(".")[2]) % len(MARKS)]
            found = [(x, ranks[layer]) for x, (_, ranks) in enumerate(stages) if layer in ranks]
            xs, ys = zip(*found, strict=True)
            axes.plot(xs, ys, color=COLOURS[colour], marker=mark, ms=4, lw=1.1)
            if len(truth) <= _MAX_LABELS:
                for (x, y), side, align in ((found[0], -8, "right"), (found[-1], 8, "left")):
                    axes.annotate(
                        layer_words(layer),
                        (x, y),
                        xytext=(side, 0),
                        textcoords="offset points",
                        ha=align,
                        va="center",
                        fontsize=8,
                    )
        axes.set_xlim(-0.75, len(stages) - 0.25)
        axes.set_ylim(len(truth) + 0.6, 0.4)
        axes.set_xticks(range(len(stages)), [label for label, _ in stages])
        axes.set_yticks([])
        axes.tick_params(length=0, labelcolor=COLOURS["text"])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure

    first = stages[0][1]
    listed = "; ".join(
        f"{layer_words(layer)} {first[layer]} to {rank}"
        for layer, rank in truth.items()
        if layer in first
    )
    alt = f"Rank of each layer at {width_words(bits)}, before training to truth: {listed}."
    return _chart(draw, f"{study.short}-ranks", alt)


def truth_chart(study: StudyRun) -> str | None:
    """Heat map of the truth, layer × bits."""
    measured = {
        (row["layer"], int(row["bits"])): increase
        for row in study.of("truth", target=main_target(study))
        if (increase := value(row, "increase")) is not None
    }
    return sensitivity_chart(measured, f"{study.short}-truth") if measured else None


def timestep_chart(study: StudyRun) -> str | None:
    """Mean sensitivity by timestep bucket, one line per layer type, one panel per steps."""
    rows = [row for row in study.of("timesteps", bits=usual_bits(study)) if _filled(row)]
    panels = [(steps, found) for (steps,), found in group(rows, "steps").items()]
    if not panels:
        return None
    types = list(dict.fromkeys(row["layer_type"] for row in rows))
    means = {
        key: statistics.fmean(float(row["value"]) for row in own)
        for key, own in group(rows, "steps", "layer_type", "bucket").items()
    }
    buckets = sorted({int(row["bucket"]) for row in rows})

    def draw() -> Figure:
        figure = Figure(figsize=(1.2 + 1.75 * len(panels), 2.6), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (steps, _) in zip(grid, panels, strict=True):
            for index, kind in enumerate(types):
                own = [(b, means[key]) for b in buckets if (key := (steps, kind, str(b))) in means]
                colour, mark = MARKS[index % len(MARKS)]
                xs, ys = [b for b, _ in own], [mean for _, mean in own]
                axes.plot(xs, ys, color=COLOURS[colour], marker=mark, ms=4, lw=1.1, label=kind)
            axes.set_xticks(buckets, [str(b + 1) for b in buckets])
            axes.set_title(after(steps), loc="left")
            axes.grid(axis="y")
        _log(grid[0], "y", list(means.values()))
        figure.supxlabel("timestep bucket, little noise first", fontsize=9, color=COLOURS["muted"])
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        return figure

    listed = "; ".join(
        f"{kind} bucket {int(bucket) + 1} {mean:.2g}"
        for (steps, kind, bucket), mean in means.items()
        if steps == panels[0][0]
    )
    alt = f"Mean sensitivity by timestep bucket, {after(panels[0][0])}: {listed}."
    return _chart(draw, f"{study.short}-timesteps", alt)


def additivity_chart(study: StudyRun) -> str | None:
    """Predicted against measured change, pairs and whole allocations, with the median ratio."""
    rows = [
        row
        for row in study.tables.get("interactions", [])
        if (value(row, "predicted") or 0) > 0 and (value(row, "actual") or 0) > 0
    ]
    panels = group(rows, "kind")
    if not panels:
        return None
    steps = list(dict.fromkeys(row["steps"] for row in rows))

    def draw() -> Figure:
        figure = Figure(figsize=(1.4 + 3.0 * len(panels), 2.9), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, ((kind,), own) in zip(grid, panels.items(), strict=True):
            both = [float(row[name]) for row in own for name in ("predicted", "actual")]
            ends = [min(both), max(both)]
            axes.plot(ends, ends, color=COLOURS["muted"], lw=0.9)
            for index, at in enumerate(steps):
                points = [row for row in own if row["steps"] == at]
                colour, mark = MARKS[index % len(MARKS)]
                xs = [float(row["predicted"]) for row in points]
                ys = [float(row["actual"]) for row in points]
                axes.plot(xs, ys, mark, color=COLOURS[colour], ms=4, mew=0, label=after(at))
            _log(axes, "x", both)
            _log(axes, "y", both)
            axes.set_title(f"{_kind(kind)}: median ratio {_median_ratio(own)}", loc="left")
            axes.set_xlabel("predicted")
        grid[0].set_ylabel("measured")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        return figure

    listed = "; ".join(f"{_kind(k)} {_median_ratio(own)}" for (k,), own in panels.items())
    alt = f"Predicted against measured change; median of measured over predicted: {listed}."
    return _chart(draw, f"{study.short}-additivity", alt)


def _kind(kind: str) -> str:
    return "pairs" if kind == "pair" else "whole allocations"


def _median_ratio(rows: Sequence[Row]) -> str:
    return two(statistics.median(float(r["actual"]) / float(r["predicted"]) for r in rows))


def _filled(row: Row) -> bool:
    return value(row, "value") is not None


def _floor(values: Sequence[float]) -> float:
    """Where a logarithmic axis puts what is not above 0: half the least positive value."""
    return min((v for v in values if v > 0), default=1.0) / 2


def _log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with few round ticks; linear if a value is not positive."""
    if not values or min(values) <= 0:
        return
    low, high = min(values) / 1.3, max(values) * 1.3
    ticks = log_ticks(low, high)
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    labels = [f"{tick:g}" for tick in ticks]
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, labels)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_yticks(ticks, labels)
    axes.minorticks_off()


def _chart(draw: Callable[[], Figure], name: str, alt: str) -> str:
    return compact(render(draw, name, alt))
