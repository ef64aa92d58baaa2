"""The charts of the allocation section; each returns an inline SVG element, or None."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.allocation.data import (
    bits_of,
    budgets,
    candidates,
    column,
    measured,
    printed,
)
from reports.allocation.story import AMPN, UNIFORM
from reports.figures import allocation_chart
from reports.study_tables import StudyRun, group, value
from reports.svg import COLOURS, compact, render

_LINES = (
    *(("blue", "-"), ("orange", "-"), ("green", "-"), ("purple", "-"), ("neutral", "-")),
    *(("blue", "--"), ("orange", "--"), ("green", "--")),
)
_MAX_FRONT_POINTS = 160


def dot_chart(study: StudyRun, shown: Sequence[str]) -> str | None:
    """One line per candidate: every training seed, the range and the mean; uniform's as a band."""
    names = candidates(study)
    wanted = [
        (budget, target)
        for budget in budgets(study)
        for target in shown
        if any(measured(study, name, budget, target) for name in names)
    ]
    if not wanted:
        return None
    columns = len({target for _, target in wanted})

    def draw() -> Figure:
        lines = -(-len(wanted) // columns)
        size = (1.0 + 3.1 * columns, 0.3 + (0.6 + 0.2 * len(names)) * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, (budget, target) in zip(grid, wanted, strict=False):
            base = measured(study, UNIFORM, budget, target)
            if base is not None:
                axes.axvspan(base.low, base.high, color=COLOURS["neutral"], alpha=0.18, lw=0)
            for y, name in enumerate(names):
                found = measured(study, name, budget, target)
                if found is None:
                    continue
                colour = COLOURS[{UNIFORM: "neutral", AMPN: "orange"}.get(name, "blue")]
                values = list(found.by_seed.values())
                axes.plot([found.low, found.high], [y, y], color=colour, lw=1.4, alpha=0.5)
                axes.plot(values, [y] * len(values), "|", color=colour, ms=8, mew=0.9)
                axes.plot([found.mean], [y], "o", color=colour, ms=5, mew=0)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0, labelcolor=COLOURS["text"])
            axes.set_title(f"{column(study, target)}, {float(budget):g} bits", loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
        for axes in grid[len(wanted) :]:
            axes.set_axis_off()
        return figure

    parts = [
        f"{column(study, target)} at {float(budget):g} bits: "
        + ", ".join(
            f"{name} {printed(target, found.mean)}"
            for name in names
            if (found := measured(study, name, budget, target))
        )
        for budget, target in wanted
    ]
    alt = f"Candidates, lower is better. {'; '.join(parts)}."
    return compact(render(draw, f"{study.short}-dots", alt))


def bits_chart(study: StudyRun, candidate: str, budget: str) -> str | None:
    """Bits per block and layer type; of a candidate that chose by seed, those of the first."""
    found = bits_of(study, candidate, budget)
    if not found:
        return None
    bits = {layer: round(number) for layer, number in next(iter(found.values())).items()}
    return allocation_chart(bits, f"{study.short}-{candidate}-{budget}")


def front_chart(study: StudyRun) -> str | None:
    """Pareto front of every source: objective, relative to its greatest, against mean bits."""
    fronts: dict[str, list[tuple[float, float]]] = {}
    for (source,), rows in group(study.tables.get("front", []), "source").items():
        points = [
            (bits, objective)
            for row in rows
            if (bits := value(row, "mean_bits")) is not None
            and (objective := value(row, "objective")) is not None
            and objective > 0
        ]
        if points:
            top = max(objective for _, objective in points)
            stride = -(-len(points) // _MAX_FRONT_POINTS)
            kept = points[:: max(1, stride)]
            kept += [] if kept[-1] == points[-1] else [points[-1]]
            fronts[source] = [(bits, objective / top) for bits, objective in kept]
    if not fronts:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(6.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for index, (source, points) in enumerate(fronts.items()):
            xs, ys = zip(*points, strict=True)
            colour, dash = _LINES[index % len(_LINES)]
            axes.plot(xs, ys, color=COLOURS[colour], ls=dash, lw=1.3, label=source)
        for budget in budgets(study):
            axes.axvline(float(budget), color=COLOURS["muted"], lw=0.8, ls=(0, (2, 2)))
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_xlabel("mean activation bits (weighted by MACs)")
        axes.set_ylabel("objective over its greatest")
        axes.grid(axis="y")
        figure.legend(loc="outside right upper", fontsize=8)
        return figure

    reach = "; ".join(
        f"{source} {len(points)} points, {points[0][0]:.3g} to {points[-1][0]:.3g} bits"
        for source, points in fronts.items()
    )
    alt = f"Pareto fronts of predicted objective against mean bits: {reach}."
    return compact(render(draw, f"{study.short}-front", alt))
