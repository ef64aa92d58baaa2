"""The figures of the section on normality, with what its tables share: names, order, ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from reports.loading import RunData
from reports.page import Block, Figures, Fold
from reports.text import fixed, percent, plural, significant
from robuq_bench.figures import Picture, colour, heat, log_axis, panel, points
from robuq_bench.normality.names import VERDICT_LIMIT as LIMIT

BITS = 2  # where the paper needs normality most
BEFORE, PLAIN, SIGNS = "identity", "hadamard", "randomized-hadamard"
WORDS = {BEFORE: "before", PLAIN: "plain Hadamard", SIGNS: "random signs"}
_MARKS = {BEFORE: "X", PLAIN: "^", SIGNS: "o", "gaussian null": "s"}
_MEANINGS = ("not rotated", "rotated", "rotated", "reference")
_HUES = dict(zip(_MARKS, map(colour, _MEANINGS), strict=True))
_LABELS = ("✖ before", "▲ plain Hadamard", "● Hadamard with random signs", "■ normal tokens")
_KEY = [*zip(_MEANINGS, _LABELS, strict=True)]
_TYPE_ORDER = ("qkv", "proj", "fc1", "fc2", "adaLN")
_TYPE_MARKS = {"o": "●", "X": "✖", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
_EDGES = (0.9, 0.95, 1.0, LIMIT, 1.1, 1.25, 1.5, 2.0)


def placed(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with `place`, the layer type and its width, in the order of a block."""
    kinds = [*_TYPE_ORDER, *sorted(set(frame["layer_type"]) - set(_TYPE_ORDER))]
    order = frame["layer_type"].map(kinds.index) * 1_000_000 + frame["width"]
    place = frame["layer_type"] + frame["width"].map(" ({})".format)
    return frame.assign(place=place).loc[order.sort_values(kind="stable").index]


def span(values: pd.Series[float], text: Callable[[float], str] = significant) -> str:
    """Least and greatest, "1 to 1.10"; one number where they read alike."""
    return " to ".join(dict.fromkeys((text(values.min()), text(values.max()))))


def before_and_after(run: RunData, judged: pd.DataFrame) -> Iterator[Figures]:
    """Error ratios of one subject's layer types, and what a test rejects at which n."""
    at = judged[(judged["bits"] == BITS) & judged["transform"].isin(WORDS)]
    if at.empty:
        return
    alt = "; ".join(at["place"] + " " + at["transform"].map(WORDS) + " " + at["text"])
    measured = [name for name in WORDS if name in set(at["transform"])]
    with panel(f"normality-ratio-{run.anchor}", f"Error ratio: {alt}", height=2.6) as drawn:
        points(
            at, drawn.axes, "place", ["lower_95", "ratio", "upper_95"], hue="transform",
            hue_order=measured, palette=_HUES, markers=[_MARKS[name] for name in measured],
            markersize=4.5, err_kws={"linewidth": 1.4}, dodge=0.45,
        )  # fmt: skip
        drawn.axes.axvline(LIMIT, color=colour("reference"), linestyle="--", linewidth=1)
        drawn.axes.set_xlabel(f"error ratio at {BITS} bits")
        log_axis(drawn.axes, "x")
    yield Figures(
        [drawn.picture, *_sample_size(run)],
        f"First, mean error ratio at {BITS} bits by layer type (width) with its 95 % interval; "
        f"dashed: the limit {LIMIT}. Second, where measured, share of tokens that Shapiro–Wilk "
        "rejects when it sees n of their values, mean and range over layer types.",
        _KEY,
    )


def _sample_size(run: RunData) -> Iterator[Picture]:
    """Share rejected when a test sees n values of each token, beside the null."""
    frame = run.table("sample_size")
    if frame.empty:
        return
    # A mean over layer types compares the same types at every n.
    kinds = frame.groupby("n")["layer_type"].transform("nunique")
    frame = frame[kinds == kinds.max()]
    if frame["n"].nunique() < 2:
        return
    means = frame.pivot_table("rejected", "sample", "n")
    alt = "; ".join(
        f"{WORDS.get(str(name), 'normal tokens')} {percent(row.iloc[0])} at n = "
        f"{means.columns[0]}, {percent(row.iloc[-1])} at n = {means.columns[-1]}"
        for name, row in means.iterrows()
    )
    with panel(f"normality-n-{run.anchor}", f"Share rejected: {alt}") as drawn:
        sns.lineplot(
            frame, x="n", y="rejected", hue="sample", style="sample", palette=_HUES,
            markers=_MARKS, dashes=False, errorbar=("pi", 100), legend=False, ax=drawn.axes,
        )  # fmt: skip
        label = f"share rejected (α = {frame['alpha'].iloc[0]:g})"
        drawn.axes.set(xlabel="n values of a token", ylabel=label, ylim=(0, 1.02))
        log_axis(drawn.axes, "x")
    yield drawn.picture


def heat_maps(run: RunData, subject: str) -> Iterator[Figures]:
    """Error ratio of every layer type and block at every timestep."""
    cells, ratio = run.table("cells"), f"ratio_{BITS}"
    if cells.empty or ratio not in cells:
        return
    cells = placed(cells[cells["subject"] == subject]).dropna(subset=[ratio])
    blocks = " " + cells["block"].map(significant, na_action="ignore")
    cells["row"] = cells["layer_type"] + blocks.fillna("")
    pictures = []
    for transform in [name for name in WORDS if name in set(cells["transform"])]:
        own, title = cells[cells["transform"] == transform], WORDS[transform]
        alt = (
            f"{title}: in {(own[f'{ratio}_high'] < LIMIT).sum()} of {len(own)} cells the whole "
            f"interval lies below {LIMIT}; ratios from {span(own[ratio])}"
        )
        grid = own.pivot_table(ratio, "row", "timestep", sort=False).sort_index(axis=1)
        name = f"normality-heat-{transform}-{run.anchor}"
        with panel(name, alt, height=1.3 + 0.15 * len(grid), title=title) as drawn:
            heat(grid, drawn.axes, _EDGES, f"error ratio, {BITS} bits", limit=LIMIT)
            drawn.axes.set(xlabel="timestep", ylabel="")
            drawn.axes.tick_params(axis="x", rotation=90)
        pictures.append(drawn.picture)
    words = ". ".join(picture.alt for picture in pictures)
    yield Figures(pictures, f"{subject}, mean of a layer type and block by timestep. {words}.")


def distances(run: RunData, subject: str) -> Iterator[Figures]:
    """The exact distance to normal of single tokens beside the Berry–Esseen bound."""
    bound = run.table("bound")
    if bound.empty:
        return
    bound = placed(bound[bound["subject"] == subject]).dropna(subset=["exact_distance"])
    marks = dict(zip(bound["place"].unique(), cycle(_TYPE_MARKS), strict=False))
    alt = (
        f"{plural(len(bound), 'token')}: L₃ {span(bound['l3'])}, exact distance "
        f"{span(bound['exact_distance'])}, bound {span(bound['bound'])}"
    )
    with panel(f"normality-bound-{run.anchor}", alt, height=2.6) as drawn:
        sns.scatterplot(
            bound, x="l3", y="exact_distance", style="place", markers=marks, s=22,
            color=colour("rotated"), legend=False, ax=drawn.axes,
        )  # fmt: skip
        sns.lineplot(bound, x="l3", y="bound", color=colour("reference"), ax=drawn.axes)
        drawn.axes.set(xlabel="L₃ of the token", ylabel="distance to normal")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    kinds = dict(zip("real " + bound["layer_type"].unique(), marks.values(), strict=False))
    yield Figures(
        [drawn.picture, *_decay(run, kinds)],
        "Greatest distance between the distribution function of one coordinate under random signs "
        "and the normal one. First, exact, one mark per token, and the Berry–Esseen bound 0.56·L₃ "
        "(grey). Second, median by width for parts of real tokens and for controls (grey), with "
        "falls as 1/√d (dashed), which the bound promises, and as 1/d (dotted), which symmetric "
        "sums can reach.",
        [("rotated", f"{_TYPE_MARKS[mark]} {place}") for place, mark in marks.items()],
    )


def _decay(run: RunData, kinds: Mapping[str, str]) -> Iterator[Picture]:
    """The distance by width; `kinds` are the marks of real tokens by their source."""
    frame = run.table("decay").rename(columns={"exact_distance_median": "distance"})
    if frame.empty:
        return
    slopes = run.table("decay_slopes").to_dict("records")
    alt = "; ".join(f"{row['source']} falls as d^{fixed(row['slope'], 2)}" for row in slopes)
    is_real = frame["source"].isin(kinds)
    widths = np.sort(frame["width"].unique())
    start = frame.loc[frame["width"] == widths[0], "distance"].median()
    with panel(f"normality-decay-{run.anchor}", f"Distance by width: {alt}", height=2.6) as drawn:
        same: dict[str, Any] = {"x": "width", "y": "distance", "ax": drawn.axes, "legend": False}
        grey, blue = same | {"color": colour("reference")}, same | {"color": colour("rotated")}
        sns.lineplot(frame[~is_real], units="source", estimator=None, linewidth=0.9, **grey)
        sns.lineplot(frame[is_real], style="source", markers=kinds, dashes=False, **blue)
        for power, dash in ((0.5, "--"), (1.0, ":")):
            fall = {"width": widths, "distance": start * (widths / widths[0]) ** -power}
            sns.lineplot(pd.DataFrame(fall), linestyle=dash, **grey)
        drawn.axes.set(xlabel="width d of the token", ylabel="distance to normal")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    yield drawn.picture


def examples(run: RunData, subject: str) -> Iterator[Block]:
    """Q–Q plots of one token of each layer type, folded."""
    frame = run.table("examples")
    if frame.empty:
        return
    wanted = (frame["subject"] == subject) & (frame["kind"] == "quantile")
    frame = placed(frame[wanted & frame["transform"].isin(WORDS)])
    pictures = []
    for place, own in frame.groupby("place", sort=False):
        reach = own.groupby("transform")["y"].max().rename(WORDS)
        alt = "; ".join(f"{word} {significant(value)} σ" for word, value in reach.items())
        name = f"normality-qq-{place}-{run.anchor}"
        with panel(name, f"{place}: greatest quantile {alt}", title=str(place)) as drawn:
            sns.scatterplot(
                own, x="x", y="y", hue="transform", style="transform", palette=_HUES,
                markers=_MARKS, s=14, legend=False, ax=drawn.axes,
            )  # fmt: skip
            drawn.axes.axline((0, 0), slope=1, color=colour("reference"), linestyle="--")
            drawn.axes.set(xlabel="normal quantile", ylabel="token’s quantile (σ)")
        pictures.append(drawn.picture)
    caption = (
        "Q–Q plots of one token of each layer type, the one with the median L₃, so neither the "
        "best nor the worst; a normal token lies on the dashed line."
    )
    yield Fold(f"Single tokens, {subject}", [Figures(pictures, caption, _KEY[:3])])
