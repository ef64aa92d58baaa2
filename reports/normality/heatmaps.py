"""Heat maps of the normality section: layer (rows) by timestep (columns), one scale in all panels.

Cells of one shade are one path, so that a thousand cells stay a small SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from reports.normality.data import (
    BEFORE,
    LIMIT,
    PLAIN,
    SIGNS,
    NormalityRun,
    Place,
    bits_text,
    place_of,
    value,
    words,
)
from reports.svg import COLOURS, compact, render
from reports.text import significant

_SHADES = 16
_Grid = dict[tuple[str, int], float]


def ratio_heatmap(study: NormalityRun, bits: int) -> str | None:
    """Error ratio before, with plain Hadamard and with random signs; failing cells are dotted."""
    grids, dots = _grids(study, f"ratio_{bits}", f"ratio_{bits}_high", (BEFORE, PLAIN, SIGNS))
    values = [v for grid in grids.values() for v in grid.values()]
    if not values:
        return None
    top = max(max(values), LIMIT)

    def shade(number: float) -> float:
        return math.log(max(number, 1.0)) / math.log(top)

    alt = (
        f"Error ratio at {bits_text([bits])} of every layer and timestep: paler is nearer to 1, "
        f"the darkest is {significant(top, 3)}; a dot marks a cell that does not pass alone. "
        + _ranges(grids)
    )
    steps = [
        step for step in (1.0, LIMIT, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0) if step < top / 1.2
    ]
    name = f"{study.short}-heat-ratio"
    return _heatmap(study, grids, dots, shade, [*steps, top], name, alt)


def w_heatmap(study: NormalityRun) -> str | None:
    """Median W before, with plain Hadamard and with random signs; darker is farther from 1."""
    grids, _ = _grids(study, "shapiro_w_median", "", (BEFORE, PLAIN, SIGNS))
    values = [v for grid in grids.values() for v in grid.values()]
    if not values:
        return None
    low = min(*values, 0.99)

    def shade(number: float) -> float:
        return (1 - min(number, 1.0)) / (1 - low)

    alt = (
        "Median Shapiro–Wilk W of every layer and timestep: paler is nearer to 1, the darkest is "
        f"{significant(low, 3)}. " + _ranges(grids)
    )
    steps = [
        step
        for step in (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4)
        if step > low + 0.05 * (1 - low)
    ]
    name = f"{study.short}-heat-w"
    return _heatmap(study, grids, {}, shade, [*steps, low], name, alt)


_Panel = tuple[str, str]


def _grids(
    study: NormalityRun, column: str, high: str, transforms: Sequence[str]
) -> tuple[dict[_Panel, _Grid], dict[_Panel, list[tuple[str, int]]]]:
    """(subject, transform) -> (layer, timestep) -> value; and the cells that do not pass."""
    grids: dict[_Panel, _Grid] = {}
    failing: dict[_Panel, list[tuple[str, int]]] = {}
    for row in study.tables["cells"]:
        number = value(row, column)
        if row["transform"] not in transforms or number is None:
            continue
        panel, cell = (row["subject"], row["transform"]), (row["layer"], int(row["timestep"]))
        grids.setdefault(panel, {})[cell] = number
        upper = value(row, high) if high else None
        if upper is not None and upper >= LIMIT:
            failing.setdefault(panel, []).append(cell)
    return grids, failing


def _layers(study: NormalityRun) -> list[tuple[Place, str, str]]:
    """(place, block, layer) of every row, by type and then by depth."""
    found = {(place_of(row), row.get("block", ""), row["layer"]) for row in study.tables["cells"]}
    return sorted(
        found,
        key=lambda item: (
            study.places.index(item[0]) if item[0] in study.places else 99,
            int(item[1]) if item[1] else 10**6,
            item[2],
        ),
    )


def _heatmap(
    study: NormalityRun,
    grids: Mapping[_Panel, _Grid],
    dots: Mapping[_Panel, Sequence[tuple[str, int]]],
    shade: Callable[[float], float],
    scale: Sequence[float],
    name: str,
    alt: str,
) -> str:
    layers = _layers(study)
    rows = {layer: y for y, (_, _, layer) in enumerate(layers)}
    timesteps = sorted({timestep for grid in grids.values() for _, timestep in grid})
    columns = {timestep: x for x, timestep in enumerate(timesteps)}
    subjects = [s for s in study.subjects if any(panel[0] == s for panel in grids)]
    transforms = [t for t in (BEFORE, PLAIN, SIGNS) if any(panel[1] == t for panel in grids)]

    def draw() -> Figure:
        height = min(0.175, 6.0 / len(layers)) * len(layers)
        size = (1.2 + 2.9 * len(transforms), 0.6 + (height + 0.6) * len(subjects))
        figure = Figure(figsize=size, layout="constrained")
        grid_spec = figure.add_gridspec(
            len(subjects) + 1,
            len(transforms),
            height_ratios=[height] * len(subjects) + [0.3],
        )
        for y, subject in enumerate(subjects):
            for x, transform in enumerate(transforms):
                axes = figure.add_subplot(grid_spec[y, x])
                grid = grids.get((subject, transform), {})
                places: dict[tuple[float, float], float] = {
                    (columns[timestep], rows[layer]): shade(number)
                    for (layer, timestep), number in grid.items()
                }
                _cells(axes, places)
                marked = [(columns[t], rows[n]) for n, t in dots.get((subject, transform), ())]
                _dots(axes, marked)
                _axes(axes, layers, timesteps, is_first=x == 0)
                head = words(transform)
                title = f"{subject}: {head}" if len(subjects) > 1 else head
                axes.set_title(title, loc="left")
        legend = [significant(step, 3) for step in scale]
        _scale(figure.add_subplot(grid_spec[-1, :]), [shade(step) for step in scale], legend)
        return figure

    return compact(render(draw, name, alt))


def _cells(axes: Axes, places: Mapping[tuple[float, float], float], size: float = 0.46) -> None:
    """Squares at (x, y), one path per shade."""
    by_shade: dict[int, list[tuple[float, float]]] = {}
    for place, share in places.items():
        by_shade.setdefault(round(min(max(share, 0), 1) * _SHADES), []).append(place)
    for level, squares in sorted(by_shade.items()):
        _patch(axes, squares, size, (*to_rgb(COLOURS["heat"]), _alpha(level / _SHADES)))


def _dots(axes: Axes, places: Sequence[tuple[int, int]]) -> None:
    """Short strokes in the middle of cells, all in one path."""
    if places:
        points = [(x + dx, y) for x, y in places for dx in (-0.08, 0.08)]
        path = Path(points, [Path.MOVETO, Path.LINETO] * len(places))
        axes.add_patch(PathPatch(path, fill=False, edgecolor=COLOURS["text"], lw=1.6))


def _patch(
    axes: Axes,
    places: Sequence[tuple[float, float]],
    half: float,
    colour: tuple[float, ...],
) -> None:
    corners = ((-half, -half), (half, -half), (half, half), (-half, half), (-half, -half))
    points = [(x + dx, y + dy) for x, y in places for dx, dy in corners]
    kinds = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(places)
    axes.add_patch(PathPatch(Path(points, kinds), facecolor=colour, lw=0))


def _alpha(share: float) -> float:
    return round(0.06 + 0.94 * share, 2)


def _axes(
    axes: Axes,
    layers: Sequence[tuple[Place, str, str]],
    timesteps: Sequence[int],
    *,
    is_first: bool,
) -> None:
    axes.set_xlim(-0.5, len(timesteps) - 0.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    stride = max(1, math.ceil(len(timesteps) / 5))
    shown = range(0, len(timesteps), stride)
    axes.set_xticks(list(shown), [str(timesteps[i]) for i in shown])
    axes.set_xlabel("timestep")
    axes.tick_params(length=0, labelcolor=COLOURS["text"], labelsize=8)
    by_place: dict[Place, list[int]] = {}
    for y, (place, _, _) in enumerate(layers):
        by_place.setdefault(place, []).append(y)
    for ys in list(by_place.values())[1:]:
        axes.axhline(ys[0] - 0.5, color=COLOURS["muted"], lw=0.6)
    labels = {}
    for place, ys in by_place.items():
        every = max(1, math.ceil(len(ys) / 4))
        for index, y in enumerate(ys):
            block = layers[y][1] or str(index)
            if index % every == 0:
                labels[y] = f"{place[0]}  {block}" if index == 0 else block
    axes.set_yticks(list(labels), list(labels.values()) if is_first else [""] * len(labels))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _scale(axes: Axes, shares: Sequence[float], labels: Sequence[str]) -> None:
    """The shades of some values, as a row of squares below the panels."""
    _cells(axes, {(float(i), 0.0): share for i, share in enumerate(shares)})
    for i, label in enumerate(labels):
        axes.text(i, 0.75, label, ha="center", va="top", fontsize=8, color=COLOURS["text"])
    axes.set_xlim(-0.6, max(len(shares), 12) - 0.4)
    axes.set_ylim(1.7, -0.5)
    axes.set_axis_off()


def _ranges(grids: Mapping[_Panel, _Grid]) -> str:
    parts = [
        f"{subject}, {words(transform)}: {significant(min(grid.values()), 3)} to "
        f"{significant(max(grid.values()), 3)}"
        for (subject, transform), grid in grids.items()
    ]
    return "; ".join(parts) + "."
