"""The figures of what survives training: gains of design choices before it against after it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from robuq_bench.figures import Picture, colour, log_axis, panel
from robuq_bench.statistics.comparisons import MARGIN

CAPTION = (
    "Each point is a design choice: how many times smaller the error is with it, before training "
    "(right is better) and after (up is better), with 95 % intervals over training seeds. On the "
    "diagonal a gain is kept whole, on the dotted line half of its logarithm; in the band nothing "
    "is left of it."
)
_GAP = 0.062  # between labels, in heights of the axes


def survival_pictures(rows: pd.DataFrame, name: str) -> dict[int, Picture]:
    """A panel per budget, in ascending order, by its steps; none where no gain is known.

    Args:
        rows: of the table "survival" of `study survival`.
        name: as in `panel`.
    """
    frame = rows.dropna(subset=["gain", "gain_before"])
    return {
        steps: _panel(
            frame[frame["steps"] == steps].reset_index(drop=True), steps, f"{name}-{steps}"
        )
        for steps in sorted({int(steps) for steps in frame["steps"]})
    }


def _panel(frame: pd.DataFrame, steps: int, name: str) -> Picture:
    listed = "; ".join(
        f"{r['label']} {r['gain_before']:.2f} to {r['gain']:.2f}, {r['outcome']}"
        for r in frame.to_dict("records")
    )
    title = f"Gains before and after {steps:,} steps"
    with panel(name, f"{title}: {listed}", height=3.6, title=title) as drawn:
        axes, after = drawn.axes, colour("after training")
        sns.scatterplot(frame, x="gain_before", y="gain", ax=axes, color=after, s=22, zorder=3)
        for of, which in (("gain_before", "xerr"), ("gain", "yerr")):
            low, high = (
                frame[f"{of}_{end}"].astype(float).fillna(frame[of]) for end in ("low", "high")
            )
            around = np.abs(np.stack([frame[of] - low, high - frame[of]]))
            axes.errorbar(frame["gain_before"], frame["gain"], **{which: around}, fmt="none",
                          ecolor=after, elinewidth=0.8)  # fmt: skip
        for which in ("x", "y"):
            log_axis(axes, which)
        limits = axes.get_xlim(), axes.get_ylim()
        x = np.geomspace(*limits[0], 50)
        axes.plot(x, x, color=colour("reference"), linewidth=1)
        axes.plot(x, np.sqrt(x), color=colour("reference"), linewidth=1, linestyle=":")
        axes.axhspan(MARGIN, 1 / MARGIN, color=colour("line"), zorder=0)
        axes.axhline(1, color=colour("reference"), linewidth=1)
        axes.set(xlabel="gain before training", ylabel="gain after training",
                 xlim=limits[0], ylim=limits[1])  # fmt: skip
        _label(axes, frame)
    return drawn.picture


def _label(axes: Axes, frame: pd.DataFrame) -> None:
    """Names in a column to the right, in the order of their points, each with a line to its own."""
    heights = axes.transAxes.inverted().transform(
        axes.transData.transform(frame[["gain_before", "gain"]].to_numpy(float))
    )[:, 1]
    order = np.argsort(-heights)
    places = heights[order].copy()
    for i in range(1, len(places)):
        places[i] = min(places[i], places[i - 1] - _GAP)
    places += max(0.0, -places[-1])  # a column that runs out below is moved up
    for i in range(len(places) - 2, -1, -1):
        places[i] = max(min(places[i], 0.96), places[i + 1] + _GAP)
    for row, place in zip(frame.iloc[order].to_dict("records"), places, strict=True):
        axes.annotate(row["label"], (row["gain_before"], row["gain"]), (1.06, place),
                      textcoords="axes fraction", va="center", fontsize=8,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour("muted"),
                                  "shrinkA": 1, "shrinkB": 2})  # fmt: skip
