"""Whether a Hadamard transform makes activations normal enough for few bits.

The run judges; this prints its words. One subject, the teacher where it was measured, is shown
open; other subjects, other transforms and the tables behind the figures are folded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns

from reports.generic import claims_of, rule_of, table_fold
from reports.loading import RunData
from reports.normality_evidence import (
    BEFORE,
    HUES,
    KEY,
    MARKS,
    PLAIN,
    SIGNS,
    WORDS,
    distances,
    examples,
    placed,
    proofs,
    sample_size,
)
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, sentence
from reports.text import Phrase, fixed, listing, significant
from robuq_bench.figures import colour, heat, log_axis, panel
from robuq_bench.normality.names import VERDICT_LIMIT as LIMIT
from robuq_bench.statistics.verdicts import Verdict, interval_text

ORDER = 40
QUESTION = "Does a Hadamard transform make activations normal?"
OPEN = ("After the Hadamard transform, activations of every token are normal",)
EXPORTS = ("normality-types.csv", "normality-verdicts.csv", "normality.tex")
BITS = 2  # where the paper needs normality most
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
    judged = {run: frame for run in runs if not (frame := _judged(run)).empty}
    if not judged:
        return None
    types = {run: placed(run.table("types")) for run in judged}
    subjects = {run: _subjects(types[run]) for run in judged}
    first, *rest = judged
    blocks = _blocks(first, judged[first], types[first])
    blocks += [Fold(run.title, _blocks(run, judged[run], types[run])) for run in rest]
    tex = [_numbers(judged[run], subjects[run][0]) for run in judged]
    tex += [_effects(run, types[run], subjects[run][0]) for run in judged]
    return Section(
        anchor="normality",
        title=QUESTION,
        answer=_answer(first, judged[first], types[first]),
        blocks=blocks,
        claims=[claim for run in judged for claim in _claims(run, judged[run], types[run])],
        rule=rule_of([*judged]) or _OLD_RULE,
        exports={
            "normality-types": _with_run({run: run.table("types") for run in judged}),
            "normality-verdicts": _with_run({run: _details(run) for run in judged}),
        },
        tex={"normality": tex},
    )


def _blocks(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Block]:
    subject, *others = _subjects(types)
    own = judged[judged["subject"] == subject]
    transforms = [name for name in own["transform"].unique() if name != SIGNS]
    return [
        _matrix(judged, types, subject, SIGNS),
        _before_and_after(run, own),
        *_heat_maps(run, subject),
        _effects(run, types, subject),
        *distances(run, subject),
        Points([*proofs(run, subject), *_caveats(run, own, types)]),
        Fold(
            f"Other transforms, {subject}",
            [_matrix(judged, types, subject, name) for name in transforms],
        ),
        *_side_by_side(judged, [subject, *others]),
        *(
            Fold(
                f"{other}: verdicts, W and KL",
                [
                    _matrix(judged, types, other, SIGNS),
                    _matrix(judged, types, other, PLAIN),
                    _effects(run, types, other),
                ],
            )
            for other in others
        ),
        *examples(run, subject),
        Fold("Tables of the run", [table_fold(run, name) for name in run.tables]),
    ]


def _answer(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Phrase]:
    subject = _subjects(types)[0]
    signs, plain = (_of(judged, subject, name) for name in (SIGNS, PLAIN))
    if signs.empty:
        return sentence("Hadamard with random signs was not measured.")
    total = types.loc[types["subject"] == subject, "place"].nunique()
    held = (signs["verdict"] == "holds").groupby(signs["bits"]).sum()
    of = f" of {total} layer types of the {subject} are normal enough for "
    counts = []
    for count, at in held.groupby(held, sort=False):
        counts.append(
            f"{count}{of}{listing(map(str, at.index))} {'bit' if [*at.index] == [1] else 'bits'}"
        )
        of = f" of {total} for "
    bits = BITS if BITS in held.index else int(held.index[0])
    parts: list[str | Phrase] = [
        f"With random signs before the Hadamard transform, {listing(counts)}; at {_bits(bits)} the "
        "highest error ratio is "
    ]
    parts += _highest(run, signs, bits)
    if bits in set(plain["bits"]):
        parts += [", without the signs ", *_highest(run, plain, bits)]
    return sentence(*parts, f". The limit is {LIMIT}.")


def _highest(run: RunData, own: pd.DataFrame, bits: int) -> list[str | Phrase]:
    (row,) = own[own["bits"] == bits].nlargest(1, "ratio").to_dict("records")
    return [Phrase(_ratio_text(row), run.href), f" in {row['place']}"]


def _claims(run: RunData, judged: pd.DataFrame, types: pd.DataFrame) -> list[Claim]:
    """What the run says of its first subject with random signs; its table has the others."""
    subject = _subjects(types)[0]
    if "judgements" in run.tables:
        start = f"{subject}, {SIGNS}, "
        return [c for c in claims_of([run]) if c.verdict.subject.startswith(start)]
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
                n=row["images"],
                n_of="images",
                test="cluster bootstrap over images",
                p_value=None,
                note=f"ratio of normal tokens: {fixed(row['null_ratio'], 3)}",
            ),
            run.title,
            run.href,
        )
        for row in _of(judged, subject, SIGNS)
        .merge(types[[*_KEYS, "images"]], on=_KEYS)
        .to_dict("records")
    ]


def _matrix(judged: pd.DataFrame, types: pd.DataFrame, subject: str, transform: str) -> Sheet:
    """Verdicts of layer types by bits, their numbers in small print."""
    own = _of(judged, subject, transform)
    places = types.loc[types["subject"] == subject, "place"].unique()
    words = own.pivot(index="place", columns="bits", values="verdict").reindex(places)
    frame = words.fillna("not judged").join(_texts(own).rename(columns=lambda b: f"{b} small"))
    frame.columns = frame.columns.map(str)
    nulls = own.groupby(own["bits"].map(str))["null_ratio"]
    hints = {bits: f"normal tokens: {_range(null.min(), null.max(), 3)}" for bits, null in nulls}
    return Sheet(
        frame.rename_axis("layer type").reset_index(),
        f"Normal enough? {subject}, {WORDS.get(transform, transform)}",
        f"Below each word the mean error ratio and its 95 % interval. {_WHAT}",
        heads={f"{bits}": _bits(bits) for bits in words},
        hints={"layer type": "(width)", **hints},
        small={f"{bits}": f"{bits} small" for bits in words},
        kind="verdicts",
    )


def _numbers(judged: pd.DataFrame, subject: str) -> Sheet:
    """The numbers of the matrix, for papers."""
    frame = _texts(_of(judged, subject, SIGNS)).rename(columns=_bits)
    caption = f"Mean error ratio [95 % interval], {subject}, {WORDS[SIGNS]}"
    return Sheet(frame.rename_axis("layer type").reset_index(), caption, _WHAT)


def _before_and_after(run: RunData, own: pd.DataFrame) -> Figures:
    bits = BITS if BITS in set(own["bits"]) else int(own["bits"].min())
    at = own[(own["bits"] == bits) & own["transform"].isin(WORDS)]
    transforms = [name for name in WORDS if name in set(at["transform"])]
    # The median of the three is the ratio, their whole range the interval.
    long = at.melt(["place", "transform"], ["lower_95", "ratio", "upper_95"])
    rows = at.to_dict("records")
    alt = "; ".join(f"{r['place']} {WORDS[r['transform']]} {_ratio_text(r)}" for r in rows)
    with panel(f"normality-ratio-{run.anchor}", f"Error ratio: {alt}", height=2.6) as drawn:
        sns.pointplot(
            long, x="value", y="place", hue="transform", hue_order=transforms, palette=HUES,
            markers=[MARKS[name] for name in transforms], markersize=4.5, estimator="median",
            errorbar=("pi", 100), err_kws={"linewidth": 1.4}, linestyle="none", dodge=0.45,
            legend=False, ax=drawn.axes,
        )  # fmt: skip
        drawn.axes.axvline(LIMIT, color=colour("reference"), linestyle="--", linewidth=1)
        drawn.axes.set(xlabel=f"error ratio at {_bits(bits)}", ylabel="")
        log_axis(drawn.axes, "x")
    caption = (
        f"First, mean error ratio at {_bits(bits)} by layer type (width) with its 95 % interval; "
        f"dashed: the limit {LIMIT}."
    )
    tests = sample_size(run)
    if tests is None:
        return Figures([drawn.picture], caption, KEY)
    caption += (
        " Second, share of tokens that Shapiro–Wilk rejects when it sees n of their values, mean "
        "and range over layer types."
    )
    return Figures([drawn.picture, tests], caption, (*KEY, ("reference", "■ normal tokens")))


def _heat_maps(run: RunData, subject: str) -> Iterator[Figures]:
    cells, ratio = run.table("cells"), f"ratio_{BITS}"
    if cells.empty or ratio not in cells:
        return
    cells = placed(cells[cells["subject"] == subject]).dropna(subset=[ratio])
    blocks = " " + cells["block"].map(significant, na_action="ignore")
    cells["row"] = cells["layer_type"] + blocks.fillna("")
    pictures = []
    for transform, title in WORDS.items():
        own = cells[cells["transform"] == transform]
        if own.empty:
            continue
        passing = (own[f"{ratio}_high"] < LIMIT).sum()
        alt = (
            f"{title}: in {passing} of {len(own)} cells the whole interval lies "
            f"below {LIMIT}; ratios from {significant(own[ratio].min())} to "
            f"{significant(own[ratio].max())}"
        )
        grid = own.pivot_table(ratio, "row", "timestep", sort=False).sort_index(axis=1)
        name = f"normality-heat-{transform}-{run.anchor}"
        with panel(name, alt, height=1.3 + 0.15 * len(grid), title=title) as drawn:
            heat(grid, drawn.axes, _EDGES, f"error ratio, {_bits(BITS)}", limit=LIMIT)
            drawn.axes.set(xlabel="timestep", ylabel="")
            drawn.axes.tick_params(axis="x", rotation=90)
        pictures.append(drawn.picture)
    words = ". ".join(picture.alt for picture in pictures)
    yield Figures(pictures, f"{subject}, mean of a layer type and block by timestep. {words}.")


def _side_by_side(judged: pd.DataFrame, subjects: list[str]) -> Iterator[Fold]:
    at = judged[(judged["bits"] == BITS) & judged["transform"].isin(WORDS)]
    if len(subjects) < 2 or at.empty:
        return
    frame = at.replace({"transform": WORDS}).pivot_table(
        "ratio", ["place", "transform"], "subject", sort=False
    )
    sheet = Sheet(
        frame.reindex(columns=subjects).reset_index().rename(columns={"place": "layer type"}),
        f"Mean error ratio at {_bits(BITS)} by model",
        formats=dict.fromkeys(subjects, _ratio),
    )
    yield Fold(f"Models side by side at {_bits(BITS)}", [sheet])


def _effects(run: RunData, types: pd.DataFrame, subject: str) -> Sheet:
    """W and KL before and after, beside those of normal tokens."""
    own = types[(types["subject"] == subject) & types["transform"].isin(WORDS)]
    columns = ["shapiro_w_median", "kl", "kl_low", "kl_high", "kl_null_error"]
    own = own.reindex(columns=["place", "width", "transform", *columns])
    controls = run.table("controls")
    normal: Mapping[Any, Any] = {}
    if not controls.empty:
        is_null = (controls["control"] == "gaussian") & (controls["transform"] == BEFORE)
        normal = controls[is_null].set_index("width")["shapiro_w_median"].to_dict()
    by_place = own.drop_duplicates("place").set_index("place")
    frame, small = pd.DataFrame(index=by_place.index), {}
    formats: dict[str, Callable[[Any], str]] = {}
    for column, name in (("shapiro_w_median", "W"), ("kl", "KL")):
        for transform, word in WORDS.items():
            frame[f"{name} {word}"] = own[own["transform"] == transform].set_index("place")[column]
        frame[f"{name} normal"] = by_place["width"].map(normal)
        formats |= dict.fromkeys((f"{name} {word}" for word in (*WORDS.values(), "normal")), _four)
    frame["KL normal"], formats["KL normal"] = by_place["kl_null_error"], "0 ± {:.4f}".format
    for transform, word in WORDS.items():
        rows = own[own["transform"] == transform][["place", "kl_low", "kl", "kl_high"]].dropna()
        frame[f"{word} interval"] = pd.Series(
            {place: interval_text(low, high, (0.0, kl)) for place, low, kl, high in rows.to_numpy()}
        )
        small[f"KL {word}"] = f"{word} interval"
    heads = {head: head.replace("plain Hadamard", "plain").replace("random signs", "signs")
             for head in formats}  # fmt: skip
    return Sheet(
        frame.rename_axis("layer type").reset_index(),
        f"Before and after: {subject}",
        "W: Shapiro–Wilk, median over tokens (1 is normal). KL: mean divergence from the fitted "
        "normal in nats, less that of normal tokens, [95 % interval over images]. Normal: "
        "the null, tokens drawn from a normal distribution.",
        formats=formats,
        heads=heads,
        small=small,
        kind="dense",
    )


def _caveats(run: RunData, own: pd.DataFrame, types: pd.DataFrame) -> list[str]:
    """What the numbers cannot say."""
    signs = own[own["transform"] == SIGNS]
    draws = signs["sign_draws"].max() if "sign_draws" in signs else float("nan")
    images = _range(types["images"].min(), types["images"].max(), 0)
    nulls = signs[signs["null_ratio"] >= LIMIT].groupby("bits")["null_ratio"].max()
    return [
        "Normal enough is not good enough: the rule divides by each token’s own variance, so it "
        "misses energy that is one constant vector over all tokens, on which a quantizer spends "
        "its steps all the same. Nor is a ratio below 1 more normal: light tails and two-valued "
        "tokens are easier to quantize than normal ones.",
        "Plain Hadamard depends on the matrix: these are numbers of one construction per width, "
        "and another may do better or worse.",
        f"With random signs a ratio is the mean over {draws:.0f} draws, and its interval allows "
        "for their spread: the rule was amended so after the first run, in which one draw decided "
        "a layer type. W, KL and heat maps are of the plan’s own draw."
        if draws == draws
        else f"With random signs a ratio is of one draw of them (seed {run.seed}).",
        "A p-value means nothing without n: the same small departure is rejected more often at a "
        "greater n, so rejected shares stand beside the null’s.",
        f"Intervals resample {images} images whole. Each verdict stands alone, without correction: "
        f"of the {len(signs)} in the first table, up to {significant(len(signs) / 40, 2)} can be "
        "expected to hold or not to hold falsely (one side of a 95 % interval).",
        *(
            f"At {_bits(bits)} normal tokens themselves reach {fixed(null, 3)}: there "
            "the limit lies within their own error."
            for bits, null in nulls.items()
        ),
    ]


def _judged(run: RunData) -> pd.DataFrame:
    """Verdicts with keys and places, in today's words; empty where there are none."""
    frame = _details(run)
    return frame if frame.empty else placed(frame.replace({"verdict": _OLD_WORDS}))


def _details(run: RunData) -> pd.DataFrame:
    return run.table("judgements" if "judgements" in run.tables else "verdicts")


def _of(judged: pd.DataFrame, subject: str, transform: str) -> pd.DataFrame:
    return judged[(judged["subject"] == subject) & (judged["transform"] == transform)]


def _subjects(types: pd.DataFrame) -> list[str]:
    """The teacher first, then a student, then the plan by its training step."""

    def order(subject: str) -> tuple[Any, ...]:
        steps = [int(digits) for digits in re.findall(r"\d+", subject)]
        return subject != "teacher", subject != "student", steps, subject

    return sorted(types["subject"].unique(), key=order)


def _texts(own: pd.DataFrame) -> pd.DataFrame:
    """Ratio and interval as text, layer types by bits."""
    texts = own.assign(text=[_ratio_text(row) for row in own.to_dict("records")])
    return texts.pivot(index="place", columns="bits", values="text").loc[own["place"].unique()]


def _ratio_text(row: Mapping[Any, Any]) -> str:
    limits = interval_text(row["lower_95"], row["upper_95"], (1.0, LIMIT, row["ratio"]))
    return f"{_ratio(row['ratio'])} {limits}"


def _ratio(value: float) -> str:
    return fixed(value, 3) if value < 10 else significant(value)


def _with_run(frames: Mapping[RunData, pd.DataFrame]) -> pd.DataFrame:
    parts = {run.id: frame for run, frame in frames.items()}
    return pd.concat(parts, names=["run"]).reset_index("run")


def _bits(bits: Hashable) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def _four(value: float) -> str:
    return fixed(value, 4)


def _range(low: float, high: float, decimals: int) -> str:
    texts = fixed(low, decimals), fixed(high, decimals)
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)
