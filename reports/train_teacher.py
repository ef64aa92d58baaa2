"""Training curves: of the full-precision teachers here, of plans for `train_and_eval`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns

from reports.exports import training
from reports.generic import claims_of, rule_of, table_fold
from reports.loading import RunData
from reports.page import Block, Figures, Fold, Section, Sheet, sentence
from reports.text import Phrase, listing, number, plural, significant
from robuq_bench.figure_cache import drawn_once
from robuq_bench.figures import Picture, colour, log_axis, panel

ORDER = 100
QUESTION = "How was the full-precision teacher trained?"
OPEN: tuple[str, ...] = ()
EXPORTS = ("training.csv",)
MAX_PANELS = 24
MAX_POINTS = 120
# A curve may leave the others' range upwards by this factor before it is cut off.
_HEADROOM = 10.0


class Curves(NamedTuple):
    """One panel: runs that differ in their seed, and what their colour means."""

    label: str
    runs: Sequence[RunData]
    meaning: str


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Last losses and curves of the teachers; None where no run logged a loss."""
    ends = pd.DataFrame([_end(run) for run in runs if run.of_kind("train")])
    if ends.empty:
        return None
    last = ends.iloc[0]
    blocks: list[Block] = loss_blocks([Curves(r.title, [r], "reference") for r in runs], "teachers")
    sheet = Sheet(ends, "Teachers and their last logged losses", links={"run": "href"})
    tables = [table_fold(run, name) for run in runs for name in run.tables]
    return Section(
        anchor="train-teacher",
        title="Teacher training",
        answer=sentence(
            f"{plural(len(ends), 'teacher')} trained; {last['run']} ends after "
            f"{last['steps']:,} steps at a loss of ",
            Phrase(significant(last["loss"]), last["href"]),
            " (last logged value; no interval, as one step's batch gives it).",
        ),
        blocks=[*blocks, Fold("Last losses", [sheet]), *tables],
        claims=claims_of(runs),
        rule=rule_of(runs),
        exports={"training": training(every)},
    )


def loss_blocks(panels: Sequence[Curves], name: str) -> list[Block]:
    """Small multiples of the training loss: one panel per label, one line style per seed.

    All have the same axes. A curve that diverges is cut off instead of flattening the others, and
    the caption names it. `name` makes the pictures' ids unique.
    """
    losses = [(curves, frame) for curves in panels if len(frame := _losses(curves.runs))]
    if not losses:
        return []
    every = pd.concat([frame.assign(label=curves.label) for curves, frame in losses])
    tops = every.groupby("label", sort=False)["loss"].max()
    limit = min(tops.max(), _HEADROOM * tops.median())
    axes = {
        "xlim": (0, every["step"].max()),
        "ylim": (every["loss"].min() / 1.1, limit * 1.1),
    }
    pictures = []
    for place, (curves, frame) in enumerate(losses[:MAX_PANELS]):
        ends = frame.groupby("seed")["loss"].last()
        alt = f"Training loss by step of {curves.label}: ends at " + listing(
            f"{number('loss', loss)} (seed {seed})" for seed, loss in ends.items()
        )
        called = (f"loss-{name}-{place}", alt, curves.label, curves.meaning)
        pictures.append(_panel(*called, frame.reset_index(drop=True), axes))
    caption = (
        "Training loss by step, logarithmic, the same axes in all panels; one line style per "
        f"seed, at most {MAX_POINTS} of its logged points."
    )
    if len(cut := tops[tops > limit]):
        names = listing(f"{label} (up to {significant(top)})" for label, top in cut.items())
        caption += f" Cut off above {significant(limit)}: {names}."
    if len(losses) > MAX_PANELS:
        caption += f" The first {MAX_PANELS} of {len(losses)}; training.csv has all."
    return [Figures(pictures, caption)]


@drawn_once
def _panel(
    name: str, alt: str, label: str, meaning: str, frame: pd.DataFrame, axes: Mapping[str, Any]
) -> Picture:
    with panel(name, alt, height=1.6, title=textwrap.fill(label, 46)) as drawn:
        sns.lineplot(
            frame, x="step", y="loss", style="seed", ax=drawn.axes, estimator=None,
            color=colour(meaning), legend=False, linewidth=1.1,
        )  # fmt: skip
        drawn.axes.set(**axes)
        log_axis(drawn.axes, "y")
        drawn.axes.set(xlabel="training step", ylabel="loss")
    return drawn.picture


def _losses(runs: Sequence[RunData]) -> pd.DataFrame:
    """seed, step, loss of the logged steps; thinned evenly, the last one kept."""
    frame = training(runs)[["seed", "step", "loss"]].dropna().astype({"loss": float})
    frame = frame[np.isfinite(frame["loss"]) & (frame["loss"] > 0)].sort_values(["seed", "step"])
    by_seed = frame.groupby("seed")["step"]
    stride = np.ceil(by_seed.transform("size") / MAX_POINTS)
    is_kept = (by_seed.cumcount() % stride == 0) | (by_seed.cumcount(ascending=False) == 0)
    return frame[is_kept]


def _end(run: RunData) -> dict[str, object]:
    last = run.of_kind("train")[-1]
    losses = {k: v for k, v in last.items() if k == "loss" or k.endswith("_loss")}
    return {"run": run.title, "steps": last.get("step"), **losses, "href": run.href}
