"""What survives QAT: gains of design choices before training against after it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reports.generic import table_fold
from reports.loading import RunData
from reports.mixed import limits, section
from reports.page import Block, Figures, Section, Sheet, sentence
from reports.text import Phrase, listing, times
from robuq_bench.survival_figure import CAPTION, survival_pictures

ORDER = 55
QUESTION = "What survives quantization-aware training?"
OPEN = ()
EXPORTS = ("survival-survival.csv",)
_NEEDED = ("survival",)
_RAW = ("survival", "trials", "arms")


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Gains at every budget; None where no run has finished."""
    return section(runs, _NEEDED, "What survives training", _answer, _blocks, "survival")


def _answer(run: RunData) -> list[Phrase]:
    """What became of the gains after the longest training."""
    frame = run.table("survival")
    last = frame[frame["steps"] == frame["steps"].max()]
    words = last.groupby("outcome", sort=False)["label"].agg(listing)
    return sentence(
        f"After {last['steps'].iloc[0]:,} steps of training, ",
        Phrase("; ".join(f"{word}: {labels}" for word, labels in words.items()), run.href),
        f", over {last['seeds'].iloc[0]} training seeds.",
    )


def _blocks(run: RunData) -> list[Block]:
    pictures = survival_pictures(run.table("survival"), f"survival-{run.anchor}")
    folds = [table_fold(run, name) for name in _RAW]
    figures = [Figures(list(pictures.values()), CAPTION)] if pictures else []
    return [*figures, _sheet(run), *folds]


def _sheet(run: RunData) -> Sheet:
    """Choice × budget: the gain, its interval and what became of it."""
    frame = run.table("survival")
    for of in ("gain_before", "gain"):
        frame[f"{of} limits"] = limits(frame[f"{of}_low"], frame[f"{of}_high"], (1.0,))
    frame["place"] = frame["steps"].map("{:,} steps".format)
    frame["small"] = (frame["gain limits"] + " " + frame["outcome"]).str.strip()
    before = frame.drop_duplicates("label").set_index("label")[
        ["gain_before", "gain_before limits"]
    ]
    wide = frame.pivot(index="label", columns="place", values=["gain", "small"])
    places = list(dict.fromkeys(frame["place"]))
    shown = pd.concat(
        [before, wide["gain"][places], wide["small"][places].add_suffix(" small")], axis=1
    ).reset_index()
    return Sheet(
        shown.sort_values("gain_before", ascending=False),
        f"Gains before and after training: {run.title}",
        "How many times smaller the error is with the choice; below it the 95 % interval over "
        "training seeds, if there is one, and what became of the gain.",
        formats={"gain_before": times, **dict.fromkeys(places, times)},
        heads={"label": "choice", "gain_before": "before training"},
        small={"gain_before": "gain_before limits", **{p: f"{p} small" for p in places}},
    )
