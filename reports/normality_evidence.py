"""What single tokens show of normality: rejected shares against n, the bound, decay, Q–Q plots.

The run measured tokens of its first subject for most of it; the tables behind it are folded by
`reports.normality`, which has the verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pandas as pd
import seaborn as sns

from reports.loading import RunData
from reports.page import Block, Figures, Fold
from reports.text import fixed, percent, plural, significant, times
from robuq_bench.figures import Picture, colour, log_axis, panel

BEFORE, PLAIN, SIGNS = "identity", "hadamard", "randomized-hadamard"
WORDS = {BEFORE: "before", PLAIN: "plain Hadamard", SIGNS: "random signs"}
#: Colours and marks of the transforms, and of tokens drawn from a normal distribution.
HUES = {
    BEFORE: colour("not rotated"),
    PLAIN: colour("rotated"),
    SIGNS: colour("rotated"),
    "gaussian null": colour("reference"),
}
MARKS = {BEFORE: "X", PLAIN: "^", SIGNS: "o", "gaussian null": "s"}
KEY = (
    ("not rotated", "✖ before"),
    ("rotated", "▲ plain Hadamard"),
    ("rotated", "● Hadamard with random signs"),
)
_TYPE_ORDER = ("qkv", "proj", "fc1", "fc2", "adaLN")
_TYPE_MARKS = {"o": "●", "X": "✖", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
_TESTS = ["shapiro_rejected", "anderson_rejected", "lilliefors_rejected", "dagostino_rejected"]


def placed(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with `place`, the layer type and its width, in the order of a block."""
    kinds = [*_TYPE_ORDER, *sorted(set(frame["layer_type"]) - set(_TYPE_ORDER))]
    order = frame["layer_type"].map(kinds.index) * 1_000_000 + frame["width"]
    place = frame["layer_type"] + frame["width"].map(" ({})".format)
    return frame.assign(place=place).loc[order.sort_values(kind="stable").index]


def sample_size(run: RunData) -> Picture | None:
    """Share rejected when a test sees n values of each token, beside the null."""
    frame = run.table("sample_size")
    if frame.empty:
        return None
    # A mean over layer types compares the same types at every n.
    kinds = frame.groupby("n")["layer_type"].transform("nunique")
    frame = frame[kinds == kinds.max()]
    if frame["n"].nunique() < 2:
        return None
    means = frame.pivot_table("rejected", "sample", "n")
    alt = "; ".join(
        f"{WORDS.get(str(name), 'normal tokens')} {percent(row.iloc[0])} at n = "
        f"{means.columns[0]}, {percent(row.iloc[-1])} at n = {means.columns[-1]}"
        for name, row in means.iterrows()
    )
    alpha = f"{frame['alpha'].iloc[0]:g}"
    with panel(f"normality-n-{run.anchor}", f"Share rejected: {alt}") as drawn:
        sns.lineplot(
            frame, x="n", y="rejected", hue="sample", style="sample", palette=HUES, markers=MARKS,
            dashes=False, errorbar=("pi", 100), legend=False, ax=drawn.axes,
        )  # fmt: skip
        drawn.axes.set(xlabel="n values of a token", ylabel=f"share rejected (α = {alpha})")
        drawn.axes.set_ylim(0, 1.02)
        log_axis(drawn.axes, "x")
    return drawn.picture


def distances(run: RunData, subject: str) -> Iterator[Figures]:
    """The exact distance to normal beside the Berry–Esseen bound, and by width."""
    bound, decay = run.table("bound"), run.table("decay")
    if bound.empty or decay.empty:
        return
    bound = placed(bound[bound["subject"] == subject]).dropna(subset=["exact_distance"])
    marks = dict(zip(bound["place"].unique(), cycle(_TYPE_MARKS), strict=False))
    key = [("rotated", f"{_TYPE_MARKS[mark]} {place}") for place, mark in marks.items()]
    kinds = dict(zip("real " + bound["layer_type"].unique(), marks.values(), strict=False))
    grey = {"color": colour("reference"), "legend": False}
    blue = {"color": colour("rotated"), "legend": False}
    labels = {"xlabel": "L₃ of the token", "ylabel": "distance to normal"}
    alt = (
        f"{plural(len(bound), 'token')}: L₃ {_span(bound['l3'])}, exact distance "
        f"{_span(bound['exact_distance'])}, bound {_span(bound['bound'])}"
    )
    with panel(f"normality-bound-{run.anchor}", alt, height=2.6) as left:
        sns.scatterplot(
            bound, x="l3", y="exact_distance", style="place", markers=marks, s=22,
            ax=left.axes, **blue,
        )  # fmt: skip
        sns.lineplot(bound, x="l3", y="bound", ax=left.axes, **grey)
        left.axes.set(**labels)
        log_axis(left.axes, "x")
        log_axis(left.axes, "y")
    slopes = run.table("decay_slopes").to_dict("records")
    alt = "Log–log slope of the distance by width: "
    alt += "; ".join(f"{row['source']} {fixed(row['slope'], 2)}" for row in slopes)
    frame = decay.rename(columns={"exact_distance_median": "distance"})
    is_real = frame["source"].isin(kinds)
    with panel(f"normality-decay-{run.anchor}", alt, height=2.6) as right:
        sns.lineplot(
            frame[~is_real], x="width", y="distance", units="source", estimator=None,
            linewidth=0.9, ax=right.axes, **grey,
        )  # fmt: skip
        sns.lineplot(
            frame[is_real], x="width", y="distance", style="source", markers=kinds, dashes=False,
            markersize=5, ax=right.axes, **blue,
        )  # fmt: skip
        widths = frame["width"].drop_duplicates().sort_values()
        start = frame.loc[frame["width"] == widths.iloc[0], "distance"].median()
        for power, dash in ((0.5, "--"), (1.0, ":")):
            fall = start * (widths / widths.iloc[0]) ** -power
            sns.lineplot(x=widths, y=fall, linestyle=dash, ax=right.axes, **grey)
        right.axes.set(**labels | {"xlabel": "width d of the token"})
        log_axis(right.axes, "x")
        log_axis(right.axes, "y")
    yield Figures(
        [left.picture, right.picture],
        "Greatest distance between the distribution function of one coordinate under random signs "
        "and the normal one. First, exact, one mark per token, and the Berry–Esseen bound 0.56·L₃ "
        "(grey). Second, median by width for parts of real tokens and for Gaussian, Laplace, "
        "lognormal and t₃ tokens (grey), with falls as 1/√d (dashed), which the bound promises, "
        "and as 1/d (dotted), which symmetric sums can reach.",
        key,
    )


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
                own, x="x", y="y", hue="transform", style="transform", palette=HUES,
                markers=MARKS, s=14, legend=False, ax=drawn.axes,
            )  # fmt: skip
            drawn.axes.axline((0, 0), slope=1, color=colour("reference"), linestyle="--")
            drawn.axes.set(xlabel="normal quantile", ylabel="token’s quantile (σ)")
        pictures.append(drawn.picture)
    caption = (
        "Q–Q plots of one token of each layer type, the one with the median L₃, so neither the "
        "best nor the worst; a normal token lies on the dashed line."
    )
    yield Fold(f"Single tokens, {subject}", [Figures(pictures, caption, KEY)])


def proofs(run: RunData, subject: str) -> Iterator[str]:
    """Whether the tests can be trusted and what can be proved, in numbers."""
    controls = run.table("controls")
    if not controls.empty:
        before = controls[controls["transform"] == BEFORE]
        is_null = before["control"] == "gaussian"
        null = before.loc[is_null, _TESTS].to_numpy()
        least = before[~is_null].nsmallest(1, "shapiro_rejected").to_dict("records")[0]
        yield (
            f"Controls: the four tests reject {percent(null.min())} to {percent(null.max())} of "
            "normal tokens; of tokens that are not normal, Shapiro–Wilk rejects at least "
            f"{percent(least['shapiro_rejected'])} before a transform ({least['control']}, width "
            f"{least['width']})."
        )
    bound = run.table("bound")
    if not bound.empty:
        own = bound[bound["subject"] == subject]
        yield (
            f"The Berry–Esseen bound is violated for {own['violated'].sum()} of "
            f"{plural(len(own), 'token')} when signs are redrawn (α = {own['alpha'].iloc[0]:g}); "
            f"it is {times((own['bound'] / own['exact_distance']).median())} the exact distance in "
            f"the median, which is at most {significant(own['exact_distance'].max())}."
        )
    joint = run.table("multivariate")
    if not joint.empty:
        reach = int(joint["largest_informative_k"].max())
        width = joint.loc[joint["k"] == joint["k"].min(), "width_needed"].max()
        yield (
            "Joint normality is not proved: the best known bound (Raič 2019) says "
            + (f"something for {plural(reach, 'coordinate')} at most" if reach else "nothing here")
            + f"; even a flat token needs a width of {width:,} for one coordinate."
        )
    projections = run.table("projections")
    if not projections.empty:
        excess = projections["rejected"] - projections["rejected_null"]
        row = projections.assign(excess=excess).nlargest(1, "excess").to_dict("records")[0]
        yield (
            f"Of random projections of k coordinates, {row['layer_type']} with k = {row['k']} is "
            f"farthest from the null: {percent(row['rejected'])} of {row['tokens']} tokens "
            f"rejected, {percent(row['rejected_null'])} of normal ones."
        )


def _span(values: pd.Series[float]) -> str:
    return f"{significant(values.min())} to {significant(values.max())}"
