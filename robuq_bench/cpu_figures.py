"""The figures of what `study kernels` and `study efficiency` timed on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns

from robuq_bench.figures import Picture, colour, legend_below, log_axis, panel, points

LIMITS = ("factor_low", "factor", "factor_high")
CAPTION = "On a CPU. Results that differ from the reference are not timed."


def cpu_pictures(table: Callable[[str], pd.DataFrame], name: str) -> list[Picture]:
    """The figure of a run by its tables (empty: it has none), called `name`; none without times."""
    factors: Any = table("cpu_factors").to_dict("records")
    kernels: Any = table("cpu_kernels").to_dict("records")
    found = (step_speeds(factors, name), throughput(kernels, name))
    return [picture for picture in found if picture is not None]


def step_speeds(factors: Sequence[Mapping[str, Any]], name: str = "cpu-speed") -> Picture | None:
    """How many times as fast a packed step is as each baseline, at the last model; or None.

    `factors` are rows of the table "cpu_factors" of `study efficiency`; `name` as in `panel`.
    """
    steps = [row for row in factors if row["scope"] == "step"]
    if not steps:
        return None
    frame = pd.DataFrame(steps)
    last = frame.iloc[-1]
    for column in ("model", "batch", "threads"):
        frame = frame[frame[column] == last[column]]
    where = (f"{model_name(last['model'])}, batch {last['batch']}, "
             f"{last['threads']} thread{'s' if last['threads'] > 1 else ''}")  # fmt: skip
    words = "; ".join(
        f"{r['ours']} {r['factor']:.2f}× as fast as {r['against']}"
        for r in frame.to_dict("records")
    )
    height = 1.2 + 0.35 * frame["against"].nunique()
    alt, title = f"Speed of a step of {where}: {words}", f"Speed of a step\n{where}"
    with panel(name, alt, height=height, title=title) as drawn:
        points(frame[["against", "ours", *LIMITS]], drawn.axes, "against", LIMITS, hue="ours",
               dodge=0.5 if frame["ours"].nunique() > 1 else False, legend=True)  # fmt: skip
        drawn.axes.axvline(1, color=colour("reference"), linewidth=1.4)
        drawn.axes.set(xlabel="times as fast, 95 % interval", ylabel="")
        log_axis(drawn.axes, "x")
        legend_below(drawn, 3)
    return drawn.picture


def throughput(rows: Sequence[Mapping[str, Any]], name: str = "cpu-kernels") -> Picture | None:
    """Operations per second of every implementation, at the widest model and most images.

    None where no product was timed. `rows` are those of the table "cpu_kernels" of `study kernels`;
    `name` as in `panel`.
    """
    if not any((row.get("gop_s") or 0) > 0 for row in rows):
        return None
    frame = pd.DataFrame(rows).dropna(subset=["gop_s"])
    model = frame.sort_values("width")["model"].iloc[-1]
    frame = frame[(frame["model"] == model) & (frame["threads"] == frame["threads"].min())]
    frame = frame[frame["images"] == frame["images"].max()]
    words = "; ".join(
        f"{which} {own['gop_s'].min():.3g} to {own['gop_s'].max():.3g}"
        for which, own in frame.groupby("implementation", sort=False)
    )
    where = f"DiT-{model}/2, batch {frame['images'].iloc[0]}, {frame['threads'].iloc[0]} thread"
    alt = f"GOP/s of products on a CPU, {where}: {words}"
    with panel(name, alt, height=3.2, title=f"Products\n{where}") as drawn:
        sns.scatterplot(frame, x="gop_s", y="layer", hue="implementation", style="implementation",
                        ax=drawn.axes, s=32)  # fmt: skip
        drawn.axes.set(xlabel="GOP/s", ylabel="")
        log_axis(drawn.axes, "x")
        legend_below(drawn, 1)
    return drawn.picture


def model_name(size: str) -> str:
    """A size as it is written: "XL" is DiT-XL/2."""
    return f"DiT-{size}/2" if size in ("S", "B", "L", "XL") else "the workload’s model"
