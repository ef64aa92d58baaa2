"""Whether a Hadamard transform makes activations normal, and what it costs where it does not.

The run judges; this prints its words. One subject, the teacher where it was measured, is shown
open; the other subjects, the other transforms and the tables behind the figures are folded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import pandas as pd
import seaborn as sns

from reports.generic import claims_of, rule_of, table_fold
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, sentence
from reports.text import Phrase, fixed, listing, percent, plural, significant, times
from robuq_bench.figures import Picture, colour, heat, log_axis, panel
from robuq_bench.statistics.verdicts import COLUMNS, Verdict, interval_text

ORDER = 40
QUESTION = "Does a Hadamard transform make activations normal?"
OPEN = ("After the Hadamard transform, activations of every token are normal",)
EXPORTS = ("normality-types.csv", "normality-verdicts.csv", "normality.tex")
LIMIT = 1.05
BITS = 2  # where the paper needs normality most
BEFORE, PLAIN, SIGNS = "identity", "hadamard", "randomized-hadamard"
WORDS = {BEFORE: "before", PLAIN: "plain Hadamard", SIGNS: "random signs"}
NULL = "gaussian null"
_COLOURS = {
    BEFORE: colour("not rotated"),
    PLAIN: colour("rotated"),
    SIGNS: colour("rotated"),
    NULL: colour("reference"),
}
_MARKS = {BEFORE: "X", PLAIN: "^", SIGNS: "o", NULL: "s"}
_KEY = (
    ("not rotated", "✖ before"),
    ("rotated", "▲ plain Hadamard"),
    ("rotated", "● Hadamard with random signs"),
)
_TYPE_ORDER = ("qkv", "proj", "fc1", "fc2", "adaLN")
_TYPE_MARKS = {"o": "●", "X": "✖", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
_EDGES = (0.9, 0.95, 1.0, LIMIT, 1.1, 1.25, 1.5, 2.0)
_KEYS = ["subject", "layer_type", "width", "transform"]
_OLD_WORDS = {"normal enough": "holds", "not normal enough": "does not hold"}
_OLD_RULE = "Words of the run, which does not hold its rule’s text: see docs/normality.md."
_WHAT = (
    "Error ratio: mean squared error of a token under the uniform mid-rise quantizer with RobuQ’s "
    f"steps, over that of a normal token of the same variance; {LIMIT} is the limit."
)


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """The first run whole, each other one in a fold; None where no run has judged anything."""
    shown = [run for run in runs if not _judged(run).empty and "types" in run.tables]
    if not shown:
        return None
    first, *rest = shown
    judged = {run: _judged(run) for run in shown}
    types = {run: _placed(run.table("types")) for run in shown}
    blocks = [*_blocks(first, judged[first], types[first])]
    blocks += [Fold(run.title, _blocks(run, judged[run], types[run])) for run in rest]
    return Section(
        anchor="normality",
        title=QUESTION,
        answer=_answer(first, judged[first], types[first]),
        blocks=blocks,
        claims=[claim for run in shown for claim in _claims(run, judged[run], types[run])],
        rule=rule_of([run for run in shown if not _is_old(run)]) or _OLD_RULE,
        exports={
            "normality-types": _with_run({run: run.table("types") for run in shown}),
            "normality-verdicts": _with_run({run: _details(run) for run in shown}),
        },
        tex={
            "normality": [
                sheet
                for run in shown
                for sheet in (
                    _numbers(judged[run], _subjects(types[run])[0]),
                    _effects(run, types[run], _subjects(types[run])[0]),
                )
            ]
        },
    )


def _blocks(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Block]:
    subject, *others = _subjects(types)
    own = types[types["subject"] == subject]
    found: list[Block] = [
        _matrix(judged, types, subject, SIGNS),
        _ratios(run, judged[judged["subject"] == subject]),
        *_heat_maps(run, subject),
        _effects(run, types, subject),
        *_single_tokens(run, judged, own),
        Points([*_evidence(run, subject), *_caveats(run, judged, own)]),
        Fold(
            f"Every other transform, {subject}",
            [
                _matrix(judged, types, subject, transform)
                for transform in own["transform"].unique()
                if transform != SIGNS
            ],
        ),
    ]
    found += [
        Fold(
            f"{other}: verdicts, W and KL",
            [
                *(_matrix(judged, types, other, transform) for transform in (SIGNS, PLAIN)),
                _effects(run, types, other),
            ],
        )
        for other in others
    ]
    found += _examples(run, subject)
    return [*found, Fold("Tables of the run", [table_fold(run, name) for name in run.tables])]


def _answer(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Phrase]:
    subject = _subjects(types)[0]
    total = types.loc[types["subject"] == subject, "place"].nunique()
    signs = _of(judged, subject, SIGNS)
    if signs.empty:
        return sentence("Hadamard with random signs was not measured.")
    by_count: dict[int, list[str]] = {}
    for bits, words in signs.groupby("bits")["verdict"]:
        by_count.setdefault(int((words == "holds").sum()), []).append(str(bits))
    counts = listing(
        f"{count} of {total} for {listing(bits)} {'bit' if bits == ['1'] else 'bits'}"
        for count, bits in by_count.items()
    )
    bits, worst = _worst(signs)
    parts: list[str | Phrase] = [
        f"With random signs before the Hadamard transform, the layer types of the {subject} whose "
        f"tokens are normal enough are {counts}; at {_bits(bits)} the highest error ratio is ",
        Phrase(_ratio_text(worst), run.href),
        f" ({worst['place']}; limit {LIMIT})",
    ]
    plain = _of(judged, subject, PLAIN)
    if bits in set(plain["bits"]):
        _, worst = _worst(plain)
        parts += [", without the signs ", Phrase(_ratio_text(worst), run.href)]
        parts += [f" ({worst['place']})"]
    return sentence(*parts, ".")


def _claims(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Claim]:
    """What the run says of its first subject with random signs; its table has the others."""
    subject = _subjects(types)[0]
    if not _is_old(run):
        start = f"{subject}, {SIGNS}, "
        return [c for c in claims_of([run]) if c.verdict.subject.startswith(start)]
    images = types.groupby(_KEYS)["images"].first()
    return [
        Claim(
            Verdict(
                claim=f"Activations are normal enough for {_bits(row['bits'])}",
                subject=f"{subject}, {SIGNS}, {row['place']}",
                verdict=row["verdict"],
                effect=row["ratio"],
                effect_name="mean error ratio",
                low=row["lower_95"],
                high=row["upper_95"],
                n=int(images[tuple(row[key] for key in _KEYS)]),
                n_of="images",
                test="cluster bootstrap over images",
                p_value=None,
                note=f"normal tokens: {fixed(row['null_ratio'], 3)}",
            ),
            run.title,
            run.href,
        )
        for row in _of(judged, subject, SIGNS).to_dict("records")
    ]


def _matrix(judged: pd.DataFrame, types: pd.DataFrame, subject: str, transform: str) -> Sheet:
    """Verdicts of layer types by bits, numbers in small print; "not judged" where none is."""
    own = _of(judged, subject, transform)
    own = own.assign(numbers=[_ratio_text(row) for row in own.to_dict("records")])
    places = types.loc[types["subject"] == subject, "place"].drop_duplicates()
    words = own.pivot(index="place", columns="bits", values="verdict").reindex(places)
    numbers = own.pivot(index="place", columns="bits", values="numbers").reindex(places)
    heads = {f"{bits}": _bits(bits) for bits in words}
    small = {f"{bits}": f"{bits} small" for bits in words}
    frame = words.fillna("not judged").rename(columns=str)
    frame = frame.join(numbers.rename(columns=lambda bits: f"{bits} small"))
    nulls = own.groupby("bits")["null_ratio"].agg(["min", "max"])
    hints = {
        f"{row['bits']}": f"normal tokens: {_range(row['min'], row['max'], 3)}"
        for row in nulls.reset_index().to_dict("records")
    }
    return Sheet(
        frame.rename_axis("layer type").reset_index(),
        f"Normal enough? {subject}, {_words(transform)}",
        f"Below each word the mean error ratio and its 95 % interval. {_WHAT}",
        heads=heads,
        hints={**hints, "layer type": "(width)"},
        small=small,
        kind="verdicts",
    )


def _numbers(judged: pd.DataFrame, subject: str) -> Sheet:
    """The same numbers for papers."""
    own = _of(judged, subject, SIGNS)
    own = own.assign(numbers=[_ratio_text(row) for row in own.to_dict("records")])
    frame = own.pivot(index="place", columns="bits", values="numbers").rename(columns=_bits)
    caption = f"Mean error ratio [95 % interval], {subject}, {_words(SIGNS)}"
    return Sheet(frame.rename_axis("layer type").reset_index(), caption, _WHAT)


def _ratios(run: RunData, own: pd.DataFrame) -> Figures:
    wanted = [bits for bits in (BITS, 4) if bits in set(own["bits"])] or [int(own["bits"].min())]
    pictures = []
    for bits in wanted:
        at = own[(own["bits"] == bits) & own["transform"].isin(WORDS)]
        # The median of the three is the ratio, their whole range the interval.
        long = at.melt(["place", "transform"], ["lower_95", "ratio", "upper_95"])
        alt = "; ".join(
            f"{row['place']} {_words(row['transform'])} {_ratio_text(row)}"
            for row in at.to_dict("records")
        )
        name = f"normality-ratio-{bits}-{run.anchor}"
        with panel(name, f"Error ratio at {_bits(bits)}: {alt}", title=_bits(bits)) as drawn:
            shown = [name for name in WORDS if name in set(at["transform"])]
            sns.pointplot(
                long, x="value", y="place", hue="transform", hue_order=shown, ax=drawn.axes,
                palette=_COLOURS, markers=[_MARKS[name] for name in shown], markersize=4.5,
                estimator="median", errorbar=("pi", 100), err_kws={"linewidth": 1.4},
                linestyle="none", dodge=0.45, legend=False,
            )  # fmt: skip
            drawn.axes.axvline(LIMIT, color=colour("reference"), linestyle="--", linewidth=1)
            drawn.axes.set(xlabel="error ratio (1: as normal tokens)", ylabel="")
            log_axis(drawn.axes, "x")
        pictures.append(drawn.picture)
    return Figures(
        pictures,
        f"Mean error ratio by layer type (width) and transform, with 95 % intervals. {_WHAT}",
        key=(*_KEY, ("reference", f"╎ limit {LIMIT}")),
    )


def _heat_maps(run: RunData, subject: str) -> list[Block]:
    cells = run.table("cells")
    column = f"ratio_{BITS}"
    if cells.empty or column not in cells:
        return []
    cells = _placed(cells[cells["subject"] == subject]).dropna(subset=[column])
    cells["row"] = cells["layer_type"] + " " + cells["block"].map(significant, na_action="ignore")
    pictures = []
    for transform in WORDS:
        own = cells[cells["transform"] == transform]
        grid = own.pivot_table(column, "row", "timestep", sort=False)
        if not grid.size:
            continue
        passing = int((own[f"{column}_high"] < LIMIT).sum())
        name = f"normality-heat-{transform}-{run.anchor}"
        alt = (
            f"{_words(transform)}: {passing} of {len(own)} cells lie below {LIMIT} with their "
            f"whole interval; ratios from {significant(own[column].min())} to "
            f"{significant(own[column].max())}"
        )
        with panel(name, alt, height=1.3 + 0.15 * len(grid), title=_words(transform)) as drawn:
            heat(grid, drawn.axes, _EDGES, f"error ratio, {_bits(BITS)}", limit=LIMIT)
            drawn.axes.set(xlabel="timestep", ylabel="")
            drawn.axes.tick_params(axis="x", rotation=90)
        pictures.append(drawn.picture)
    return [Figures(pictures, f"{subject}: error ratio of each layer (layer type and block) and "
                    f"timestep. {' '.join(f'{picture.alt}.' for picture in pictures)}")]  # fmt: skip


def _effects(run: RunData, types: pd.DataFrame, subject: str) -> Sheet:
    """W, KL and rejected shares before and after, beside those of normal tokens."""
    own = types[(types["subject"] == subject) & types["transform"].isin(WORDS)]
    controls = run.table("controls")
    null_w: Any = {}
    if not controls.empty:
        normal = controls[(controls["control"] == "gaussian") & (controls["transform"] == BEFORE)]
        null_w = normal.set_index("width")["shapiro_w_median"]
    frame = own.drop_duplicates("place")[["place", "width"]].set_index("place")
    formats: dict[str, Callable[[Any], str]] = {}
    small = {}
    for label, column, show in (
        ("W", "shapiro_w_median", _four),
        ("KL", "kl", _four),
        ("rejected", "shapiro_rejected", percent),
    ):
        if column not in own:
            continue
        for transform, word in WORDS.items():
            at = own[own["transform"] == transform].set_index("place")
            frame[f"{label} {word}"] = at[column]
            formats[f"{label} {word}"] = show
            if label == "KL":
                frame[f"{word} interval"] = _intervals(at)
                small[f"{label} {word}"] = f"{word} interval"
        at = own.drop_duplicates("place").set_index("place")
        null = {
            "W": at["width"].map(null_w).astype(float),
            "KL": at.get("kl_null_error"),
            "rejected": at.get("shapiro_rejected_null"),
        }[label]
        frame[f"{label} normal"] = null
        formats[f"{label} normal"] = (lambda v: f"0 ± {_four(v)}") if label == "KL" else show
    return Sheet(
        frame.drop(columns="width").rename_axis("layer type").reset_index(),
        f"Before and after: {subject}",
        "W: Shapiro–Wilk, median over tokens (1 is normal). KL: mean divergence from the fitted "
        "normal in nats, less that of normal tokens, [95 % interval over images]. Rejected: share "
        f"of tokens by Shapiro–Wilk at α = {significant(own['alpha'].iloc[0])}, n = width up to "
        "5,000. Normal: tokens drawn from a normal distribution, the null.",
        formats=formats,
        small=small,
        kind="dense",
    )


def _single_tokens(run: RunData, judged: pd.DataFrame, own: pd.DataFrame) -> list[Block]:
    """Rejected share against n and W against the ratio; the bound and the decay."""
    places = own["place"].drop_duplicates().tolist()
    marks = dict(zip(places, cycle(_TYPE_MARKS), strict=False))
    subject = str(own["subject"].iloc[0])
    found: list[Block] = []
    tests = [p for p in (_sample_size(run), _w_and_ratio(run, judged, own)) if p]
    if tests:
        found.append(Figures(tests, "Left: share of tokens that Shapiro–Wilk rejects when it sees "
                             "n of their values, mean and range over layer types. Right: error "
                             f"ratio at {_bits(BITS)} against 1 − W, one mark per layer type.",
                             key=(*_KEY, ("reference", "■ normal tokens, the null"))))  # fmt: skip
    bounds = [p for p in (_bound(run, subject, marks), _decay(run, marks)) if p]
    if bounds:
        key = [("rotated", f"{_TYPE_MARKS[mark]} {place}") for place, mark in marks.items()]
        key += [("reference", "━ bound 0.56·L₃; widths: Gaussian to lognormal tokens")]
        found.append(Figures(bounds, "Greatest distance between the distribution function of one "
                             "coordinate under random signs and the normal one: exact, one mark "
                             "per token, with the Berry–Esseen bound; and its median by width, "
                             "with falls as 1/√d (dashed) and 1/d (dotted).", key=key))  # fmt: skip
    return found


def _sample_size(run: RunData) -> Picture | None:
    frame = run.table("sample_size")
    if frame.empty:
        return None
    # A mean over layer types compares the same types at every n.
    kinds = frame.groupby("n")["layer_type"].nunique()
    frame = frame[frame["n"].isin(kinds[kinds == kinds.max()].index)]
    if frame["n"].nunique() < 2:
        return None
    means = frame.groupby(["sample", "n"])["rejected"].mean().unstack()
    alt = "; ".join(
        f"{_words(name)} {percent(row.iloc[0])} at n = {means.columns[0]}, "
        f"{percent(row.iloc[-1])} at n = {means.columns[-1]}"
        for name, row in means.iterrows()
    )
    with panel(f"normality-n-{run.anchor}", f"Share rejected: {alt}") as drawn:
        sns.lineplot(
            frame, x="n", y="rejected", hue="sample", style="sample", palette=_COLOURS,
            markers=_MARKS, dashes=False, errorbar=("pi", 100), legend=False, ax=drawn.axes,
        )  # fmt: skip
        alpha = significant(frame["alpha"].iloc[0])
        drawn.axes.set(xlabel="n values of a token", ylabel=f"share rejected (α = {alpha})")
        log_axis(drawn.axes, "x")
        drawn.axes.set_ylim(0, 1.02)
    return drawn.picture


def _w_and_ratio(run: RunData, judged: pd.DataFrame, own: pd.DataFrame) -> Picture | None:
    at = judged[(judged["bits"] == BITS) & judged["transform"].isin(WORDS)]
    both = own.merge(at[[*_KEYS, "ratio"]], on=_KEYS)
    if "shapiro_w_median" not in both or both.empty:
        return None
    both["departure"] = 1 - both["shapiro_w_median"]
    alt = "; ".join(
        f"{row['place']} {_words(row['transform'])} W {_four(row['shapiro_w_median'])}, "
        f"ratio {fixed(row['ratio'], 3)}"
        for row in both.to_dict("records")
    )
    with panel(f"normality-w-{run.anchor}", f"W and error ratio: {alt}") as drawn:
        sns.scatterplot(
            both, x="departure", y="ratio", hue="transform", style="transform", s=38,
            palette=_COLOURS, markers=_MARKS, legend=False, ax=drawn.axes,
        )  # fmt: skip
        drawn.axes.axhline(LIMIT, color=colour("reference"), linestyle="--", linewidth=1)
        drawn.axes.set(xlabel="1 − W (0: normal)", ylabel=f"error ratio, {_bits(BITS)}")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    return drawn.picture


def _bound(run: RunData, subject: str, marks: dict[str, str]) -> Picture | None:
    frame = run.table("bound")
    if frame.empty:
        return None
    frame = _placed(frame[frame["subject"] == subject]).dropna(subset=["exact_distance"])
    if frame.empty:
        return None
    alt = (
        f"{plural(len(frame), 'token')}, L₃ {_span(frame['l3'])}: exact distance "
        f"{_span(frame['exact_distance'])}, bound {_span(frame['bound'])}"
    )
    with panel(f"normality-bound-{run.anchor}", alt, height=2.6) as drawn:
        sns.scatterplot(
            frame, x="l3", y="exact_distance", style="place", markers=marks, s=22,
            color=colour("rotated"), legend=False, ax=drawn.axes,
        )  # fmt: skip
        sns.lineplot(frame, x="l3", y="bound", color=colour("reference"), ax=drawn.axes)
        drawn.axes.set(xlabel="L₃ of the token", ylabel="distance to normal")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    return drawn.picture


def _decay(run: RunData, marks: dict[str, str]) -> Picture | None:
    frame = run.table("decay")
    if frame.empty:
        return None
    slopes = run.table("decay_slopes").to_dict("records")
    alt = "Slope of the distance by width: " + "; ".join(
        f"{row['source']} {fixed(row['slope'], 2)}" for row in slopes
    )
    kinds = {f"real {place.partition(' ')[0]}": mark for place, mark in marks.items()}
    real = frame[frame["source"].isin(kinds)]
    widths = frame["width"].drop_duplicates().sort_values()
    start = frame.loc[frame["width"] == widths.iloc[0], "exact_distance_median"].median()
    with panel(f"normality-decay-{run.anchor}", alt, height=2.6) as drawn:
        options: dict[str, Any] = {"x": "width", "ax": drawn.axes, "legend": False}
        grey = colour("reference")
        sns.lineplot(
            frame[~frame["source"].isin(kinds)], y="exact_distance_median", units="source",
            estimator=None, color=grey, linewidth=0.9, **options,
        )  # fmt: skip
        sns.lineplot(
            real, y="exact_distance_median", style="source", markers=kinds, dashes=False,
            color=colour("rotated"), markersize=5, **options,
        )  # fmt: skip
        for power, dash in ((0.5, "--"), (1.0, ":")):
            fall = start * (widths / widths.iloc[0]) ** -power
            sns.lineplot(x=widths, y=fall, color=grey, linestyle=dash, ax=drawn.axes)
        drawn.axes.set(xlabel="width of the token", ylabel="distance to normal")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    return drawn.picture


def _examples(run: RunData, subject: str) -> list[Block]:
    frame = run.table("examples")
    if frame.empty:
        return []
    frame = _placed(frame[(frame["subject"] == subject) & (frame["kind"] == "quantile")])
    pictures = []
    for place, own in frame[frame["transform"].isin(WORDS)].groupby("place", sort=False):
        reach = own.groupby("transform")["y"].max().reindex([*WORDS]).dropna()
        alt = f"{place}: greatest quantile " + "; ".join(
            f"{_words(name)} {significant(value)} σ" for name, value in reach.items()
        )
        with panel(f"normality-qq-{place}-{run.anchor}", alt, title=str(place)) as drawn:
            sns.scatterplot(
                own, x="x", y="y", hue="transform", style="transform", palette=_COLOURS,
                markers=_MARKS, s=14, legend=False, ax=drawn.axes,
            )  # fmt: skip
            drawn.axes.axline((0, 0), slope=1, color=colour("reference"), linestyle="--")
            drawn.axes.set(xlabel="normal quantile", ylabel="token’s quantile (σ)")
        pictures.append(drawn.picture)
    caption = (
        "Q–Q plots of one token of each layer type, the one with the median L₃, so neither the "
        "best nor the worst; a normal token lies on the dashed line."
    )
    return [Fold(f"Single tokens, {subject}", [Figures(pictures, caption, key=_KEY)])]


def _evidence(run: RunData, subject: str) -> list[str]:
    """What can be proved, and whether the tests can be trusted, with numbers."""
    found = []
    controls = run.table("controls")
    if not controls.empty:
        before = controls[controls["transform"] == BEFORE]
        tests = [f"{test}_rejected" for test in ("shapiro", "anderson", "lilliefors", "dagostino")]
        null = before.loc[before["control"] == "gaussian", tests].stack()
        other = before.loc[before["control"] != "gaussian", ["control", "shapiro_rejected"]]
        least = other.dropna().sort_values("shapiro_rejected").iloc[0]
        found.append(
            f"Controls: the four tests reject {percent(null.min())} to {percent(null.max())} of "
            f"normal tokens; of tokens that are not normal, Shapiro–Wilk rejects at least "
            f"{percent(least['shapiro_rejected'])} before a transform ({least['control']})."
        )
    bound = run.table("bound")
    if not bound.empty:
        own = bound[bound["subject"] == subject]
        found.append(
            f"The Berry–Esseen bound is violated for {int(own['violated'].sum())} of "
            f"{plural(len(own), 'token')} when signs are redrawn (α = "
            f"{significant(own['alpha'].iloc[0])}); it is "
            f"{times((own['bound'] / own['exact_distance']).median())} the exact distance in the "
            f"median, which is at most {significant(own['exact_distance'].max())}."
        )
    slopes = run.table("decay_slopes")
    if not slopes.empty:
        real = slopes[slopes["source"].str.startswith("real ")]
        found.append(
            f"The distance of real tokens falls with the width as d to the power "
            f"{fixed(real['slope'].min(), 2)} to {fixed(real['slope'].max(), 2)}; the bound "
            "promises −½, symmetric sums can reach −1."
        )
    joint = run.table("multivariate")
    if not joint.empty:
        single = joint[joint["k"] == joint["k"].min()]
        found.append(
            "Joint normality is nowhere proved: the best known bound (Raič 2019) says something "
            f"for at most {plural(int(joint['largest_informative_k'].max()), 'coordinate')} at "
            f"once here, and for one coordinate needs a width of {single['width_needed'].max():,}."
        )
    projections = run.table("projections")
    if not projections.empty:
        excess = projections["rejected"] - projections["rejected_null"]
        row = projections.loc[excess.idxmax()]
        found.append(
            f"Of random projections of k coordinates, {row['layer_type']} with k = {row['k']} is "
            f"farthest from the null: {percent(row['rejected'])} of {row['tokens']} tokens "
            f"rejected, {percent(row['rejected_null'])} of normal ones."
        )
    return found


def _caveats(run: RunData, judged: pd.DataFrame, own: pd.DataFrame) -> list[str]:
    """What the numbers cannot say."""
    decided = len(_of(judged, str(own["subject"].iloc[0]), SIGNS))
    draws = judged["sign_draws"].max() if "sign_draws" in judged else float("nan")
    signs = (
        f"With random signs a ratio is the mean over {draws:.0f} draws of them and its interval "
        "allows for their spread (the rule was amended so after the first run); W, KL and heat "
        "maps are of the plan’s own draw."
        if draws == draws
        else f"With random signs a ratio is of one draw of them (seed {run.seed})."
    )
    nulls = judged[judged["null_ratio"] >= LIMIT].groupby("bits")["null_ratio"].max()
    return [
        "Normal enough is not good enough: the rule divides by each token’s own variance, so it "
        "does not see energy that is one constant vector over all tokens, which a quantizer spends "
        "its steps on all the same. Nor is a ratio below 1 “more normal”: light tails and "
        "two-valued tokens are easier to quantize than normal ones.",
        "Plain Hadamard depends on the matrix: these are the numbers of one construction per "
        "width, another may do better or worse. " + signs,
        "A p-value means nothing without n: the same small departure is rejected more often at a "
        "greater n, so shares rejected stand beside the null’s.",
        f"Intervals resample {_range(own['images'].min(), own['images'].max(), 0)} images whole. "
        f"Each verdict stands alone: of the {decided} in the table above, at most "
        f"{significant(decided / 40, 2)} decided ones are expected to be false (one side of a "
        "95 % interval); no correction is made.",
        *(
            f"At {_bits(int(bits))} normal tokens themselves reach {fixed(null, 3)}, so the limit "
            "lies within their own error."
            for bits, null in nulls.items()
        ),
    ]


def _judged(run: RunData) -> pd.DataFrame:
    """Verdicts with their keys and places, in the words of today; empty where there are none."""
    frame = _details(run)
    return frame if frame.empty else _placed(frame.replace({"verdict": _OLD_WORDS}))


def _details(run: RunData) -> pd.DataFrame:
    """The run's own table; until 2026 it was called `verdicts`."""
    return run.table("verdicts" if _is_old(run) else "judgements")


def _is_old(run: RunData) -> bool:
    frame = run.table("verdicts")
    return not frame.empty and "rule" not in frame


def _placed(frame: pd.DataFrame) -> pd.DataFrame:
    """With `place`, the layer type and its width, in the order of a block."""
    kinds = [*_TYPE_ORDER, *sorted(set(frame["layer_type"]) - set(_TYPE_ORDER))]
    placed = frame.assign(place=frame["layer_type"] + frame["width"].map(" ({})".format))
    rank = frame["layer_type"].map(kinds.index)
    return placed.assign(rank=rank).sort_values(["rank", "width"], kind="stable").drop(columns="rank")


def _of(judged: pd.DataFrame, subject: str, transform: str) -> pd.DataFrame:
    return judged[(judged["subject"] == subject) & (judged["transform"] == transform)]


def _subjects(types: pd.DataFrame) -> list[str]:
    """The teacher first, then a student, then the plan by its training step."""

    def order(subject: str) -> tuple[Any, ...]:
        steps = [int(digits) for digits in re.findall(r"\d+", subject)]
        return subject != "teacher", subject != "student", steps, subject

    return sorted(types["subject"].unique(), key=order)


def _worst(own: pd.DataFrame) -> tuple[int, dict[str, Any]]:
    """The bit width that matters and its row with the highest ratio."""
    bits = BITS if BITS in set(own["bits"]) else int(own["bits"].min())
    at = own[own["bits"] == bits].sort_values("ratio")
    return bits, at.to_dict("records")[-1]


def _ratio_text(row: dict[str, Any]) -> str:
    low, high = row["lower_95"], row["upper_95"]
    return f"{significant(row['ratio'])} {interval_text(low, high, (1.0, LIMIT))}"


def _intervals(at: pd.DataFrame) -> pd.Series[str]:
    limits = at[["kl_low", "kl_high"]].dropna()
    return limits.apply(lambda row: interval_text(*row), axis=1)


def _with_run(frames: dict[RunData, pd.DataFrame]) -> pd.DataFrame:
    parts = []
    for run, frame in frames.items():
        parts.append(frame.copy())
        parts[-1].insert(0, "run", run.id)
    return pd.concat(parts)


def _words(transform: Any) -> str:
    return WORDS.get(transform, str(transform))


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def _four(value: float) -> str:
    return fixed(value, 4)


def _range(low: float, high: float, decimals: int) -> str:
    texts = fixed(low, decimals), fixed(high, decimals)
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _span(values: pd.Series[float]) -> str:
    return f"{significant(values.min())} to {significant(values.max())}"
