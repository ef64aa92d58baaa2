"""The figure of `study incoherence`: error against the size of outliers, a line per rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats

from robuq_bench.figures import Picture, colour, legend_below, log_axis, panel

CONFIDENCE = 0.95
_CELL = ("when", "bits", "rotation")
CAPTION = (
    "Squared change of predictions by quantized activations, with unquantized weights, over the "
    "teacher’s energy: geometric means over training seeds, with 95 % t intervals of their "
    "logarithms as bands. Both axes are logarithmic. A size of outliers at which a training "
    "diverged has no point."
)


def at_shared_scales(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows at scales that every stage of training has, so that stages compare; `when`, `scale`.

    Fewer scales are trained than are measured before training.
    """
    stages = frame.groupby("scale")["when"].transform("nunique")
    return frame[stages == frame["when"].nunique()]


def t_interval(values: Any) -> tuple[float, float]:
    """The 95 % t interval of the geometric mean of values above 0; NaN of fewer than two."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    if len(logs) < 2:
        return np.nan, np.nan
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stats.sem(logs)
    return float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach))


def response_pictures(trials: pd.DataFrame, name: str) -> list[Picture]:
    """A panel for every stage of training and bit width, in the order of the rows.

    Args:
        trials: columns when, bits, rotation, scale, seed, error; a row per judged student.
        name: of the run, as in `panel`.
    """
    order = list(dict.fromkeys(trials["rotation"]))
    lost = trials["error"].isna().groupby([trials[k] for k in (*_CELL, "scale")]).transform("any")
    trials = trials.assign(error=trials["error"].mask(lost))
    pictures = []
    for (when, bits), own in trials.groupby(["when", "bits"], sort=False):
        scales = sorted(own["scale"].unique())
        ends = own[own["scale"].isin([scales[0], scales[-1]])]
        means = ends.groupby(["rotation", "scale"], sort=False)["error"].apply(stats.gmean)
        said = means.map("{:.2g}".format).where(means.notna(), "diverged")
        words = "; ".join(
            f"{rotation} {said[rotation, scales[0]]} to {said[rotation, scales[-1]]}"
            for rotation in order
        )
        title = f"{bits} bits, {when}"
        alt = f"Error from s = {scales[0]:g} to {scales[-1]:g}, {title}: {words}"
        key = f"incoherence-{name}-{when}-{bits}"
        with panel(key, alt, height=2.9, title=title) as drawn:
            sns.lineplot(
                own, x="scale", y="error", hue="rotation", style="rotation", hue_order=order,
                style_order=order, palette=_palette(order), markers=True, estimator=stats.gmean,
                errorbar=t_interval, ax=drawn.axes,
            )  # fmt: skip
            log_axis(drawn.axes, "y")
            drawn.axes.set(xscale="log", xlabel="s, the factor of the outliers", ylabel="error")
            drawn.axes.set_xticks(scales, labels=[f"{scale:g}" for scale in scales])
            drawn.axes.minorticks_off()
            legend_below(drawn)
        pictures.append(drawn.picture)
    return pictures


def _palette(rotations: Sequence[str]) -> list[str]:
    """One meaning may have several rotations, which dashes and marks tell apart."""
    meanings = {"none": "not rotated", "block-hadamard": "partly rotated"}
    return [colour(meanings.get(rotation, "rotated")) for rotation in rotations]
