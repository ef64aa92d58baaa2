"""Whether a Hadamard transform makes activations normal enough for few bits.

The run judges; this prints its words. One subject, the teacher where it was measured, is shown
open; other subjects, other transforms and the tables behind the figures are folded.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from reports import normality_figures as figures
from reports import normality_output as outputs
from reports.generic import VERDICTS, claims_of, is_verdicts, one_rule, table_fold
from reports.loading import RunData
from reports.normality_figures import BEFORE, BITS, PLAIN, SIGNS, WORDS, placed, span
from reports.page import Block, Claim, Fold, Points, Section, Sheet, sentence
from reports.text import Phrase, fixed, listing, percent, plural, significant, times
from robuq_bench.normality.names import VERDICT_LIMIT as LIMIT
from robuq_bench.statistics.verdicts import COLUMNS, interval_text, read_verdicts

ORDER = 40
QUESTION = "Does a Hadamard transform make activations normal?"
OPEN = ("After the Hadamard transform, activations of every token are normal",)
EXPORTS = ("normality-types.csv", "normality-verdicts.csv", "normality.tex")
_OLD_WORDS = {"normal enough": "holds", "not normal enough": "does not hold"}
_OLD_RULE = "Words of the run, which does not hold its rule’s text: see docs/normality.md."
_WHAT = (
    "Error ratio: mean squared error of a token under the uniform mid-rise quantizer with RobuQ’s "
    f"steps, over that of a normal token of the same variance; {LIMIT} is the limit."
)
_three, _four = partial(fixed, decimals=3), partial(fixed, decimals=4)


class _Found(NamedTuple):
    """What a run judged, in today's words, its table of types, and its subjects in order."""

    run: RunData
    judged: pd.DataFrame
    types: pd.DataFrame
    subjects: list[str]

    def of(self, subject: str, transform: str) -> pd.DataFrame:
        own = self.judged[self.judged["subject"] == subject]
        return own[own["transform"] == transform]

    def by_bits(self, subject: str, transform: str, values: str) -> pd.DataFrame:
        """One column of the verdicts: every layer type of the subject by bits."""
        places = self.types.loc[self.types["subject"] == subject, "place"].unique()
        own = self.of(subject, transform).pivot(index="place", columns="bits", values=values)
        return own.reindex(pd.Index(places, name="layer type")).rename(columns=_bits)


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """The first run whole, each other one in a fold; None where no run has judged anything."""
    tables = [run.table("judgements" if "judgements" in run.tables else "verdicts") for run in runs]
    details = {run: frame for run, frame in zip(runs, tables, strict=True) if not frame.empty}
    if not details:
        return None
    judged = [_found(run, frame) for run, frame in details.items()]
    tex = [_numbers(one) for one in judged] + [_effects(one, one.subjects[0]) for one in judged]
    return Section(
        anchor="normality",
        title=QUESTION,
        answer=_answer(judged[0]),
        blocks=_blocks(judged[0]) + [Fold(one.run.title, _blocks(one)) for one in judged[1:]],
        claims=[claim for one in judged for claim in _claims(one)],
        rule=_rules([*details]) or _OLD_RULE,
        limits=(LIMIT,),
        exports={
            "normality-types": pd.concat([r.table("types").assign(run=r.id) for r in details]),
            "normality-verdicts": pd.concat([f.assign(run=r.id) for r, f in details.items()]),
        },
        tex={"normality": tex},
    )


def _rules(runs: Sequence[RunData]) -> str:
    """Both rules of every run, each text once."""
    tables = [run.table(VERDICTS) for run in runs]
    return one_rule(
        " For outputs: ".join(table["rule"].unique()) for table in tables if is_verdicts(table)
    )


def _found(run: RunData, details: pd.DataFrame) -> _Found:
    types, judged = placed(run.table("types")), placed(details).replace({"verdict": _OLD_WORDS})
    judged["text"] = [
        f"{_ratio(ratio)} {interval_text(low, high, (1.0, LIMIT, ratio)) if low <= high else ''}"
        for low, ratio, high in judged[["lower_95", "ratio", "upper_95"]].to_numpy()
    ]

    def order(subject: str) -> tuple[Any, ...]:
        words = ["teacher", "student before training", "student"]
        place = words.index(subject) if subject in words else len(words)
        return place, [*map(int, re.findall(r"\d+", subject))]

    return _Found(run, judged, types, sorted(types["subject"].unique(), key=order))


def _blocks(found: _Found) -> list[Block]:
    run, judged, _, (subject, *others) = found
    own = judged[judged["subject"] == subject]
    rest = [
        sheet
        for t in own["transform"].unique()
        if t != SIGNS
        for sheet in (_matrix(found, subject, t), *outputs.both_rules(run, judged, subject, t))
    ]
    models = [*outputs.by_model(run, found.subjects)]
    for other in others:
        models += [_matrix(found, other, t) for t in (SIGNS, PLAIN)]
        models += outputs.both_rules(run, judged, other, SIGNS)
    models += [_effects(found, other) for other in others]
    return [
        _matrix(found, subject, SIGNS),
        *outputs.both_rules(run, judged, subject, SIGNS),
        *figures.before_and_after(run, own),
        *figures.heat_maps(run, subject),
        _effects(found, subject),
        *figures.distances(run, subject),
        Points([*_disagreements(found), *_proofs(run, subject), *_caveats(found)]),
        Fold(f"Other transforms, {subject}", rest),
        *([Fold("Other models", [_side_by_side(found), *models])] if others else []),
        *figures.examples(run, subject),
        Fold("Tables of the run", [table_fold(run, name) for name in run.tables]),
    ]


def _answer(found: _Found) -> list[Phrase]:
    subject = found.subjects[0]
    signs, total = found.of(subject, SIGNS), len(found.by_bits(subject, SIGNS, "verdict"))
    if signs.empty:
        return sentence("Hadamard with random signs was not measured.")
    held = (signs["verdict"] == "holds").groupby(signs["bits"]).sum()
    counts = [
        f"{count} of {total} for {_bits(*at.index)}" for count, at in held.groupby(held, sort=False)
    ]
    parts: list[str | Phrase] = [
        f"Layer types of the {subject} that are normal enough with random signs before the "
        f"Hadamard transform: {listing(counts)}; at {_bits(BITS)} the highest error ratio is "
    ]
    for transform in (SIGNS, PLAIN):
        own = found.of(subject, transform)
        for row in own[own["bits"] == BITS].nlargest(1, "ratio").to_dict("records"):
            parts += [", without the signs "] * (transform == PLAIN)
            parts += [Phrase(row["text"], found.run.href), f" in {row['place']}"]
    good = _good_in_output(signs)
    return sentence(*parts, f". {good}The limit is {LIMIT}{' of both' if good else ''}.")


def _good_in_output(signs: pd.DataFrame) -> str:
    """How many layer types the second rule passes at the bits of the first figure."""
    at = signs[signs["bits"] == BITS]
    if "output_verdict" not in at or at["output_verdict"].isna().all():
        return ""
    held = int((at["output_verdict"] == "holds").sum())
    ratios = span(at["output_ratio"].dropna())
    return (
        f"As good as normal in the layer’s output, where constant energy counts: {held} of "
        f"{len(at)} at {_bits(BITS)}, with output ratios from {ratios}. "
    )


def _disagreements(found: _Found) -> list[str]:
    """Where the two rules differ, subject by subject."""
    texts = [outputs.disagreement(found.judged, subject) for subject in found.subjects]
    return [text for text in texts if text]


def _claims(found: _Found) -> list[Claim]:
    """What the run says of its first subject with random signs; its table has the others."""
    run, _, types, (subject, *_) = found
    start = f"{subject}, {SIGNS}, "
    if "judgements" in run.tables:
        return [c for c in claims_of([run]) if c.verdict.subject.startswith(start)]
    keys = ["subject", "layer_type", "width", "transform"]
    own = found.of(subject, SIGNS).merge(types[[*keys, "images"]], on=keys)
    names = {"ratio": "effect", "lower_95": "low", "upper_95": "high", "images": "n"}
    frame = own.rename(columns=names).assign(
        claim="Activations are normal enough for " + own["bits"].map(_bits),
        subject=start + own["place"],
        note="ratio of normal tokens: " + own["null_ratio"].map(_three),
        effect_name="mean error ratio",
        n_of="images",
        test="cluster bootstrap over images",
        confidence=0.95,
    )
    return [Claim(v, run.title, run.href) for v in read_verdicts(frame.reindex(columns=COLUMNS))]


def _matrix(found: _Found, subject: str, transform: str) -> Sheet:
    """Verdicts of layer types by bits, their numbers in small print."""
    words = found.by_bits(subject, transform, "verdict").fillna("not judged")
    texts = found.by_bits(subject, transform, "text").add_suffix(" small")
    nulls = found.of(subject, transform).groupby("bits")["null_ratio"]
    hints = {_bits(bits): f"normal tokens: {span(null, _three)}" for bits, null in nulls}
    return Sheet(
        words.join(texts).reset_index(),
        f"Normal enough? {subject}, {WORDS.get(transform, transform)}",
        f"Below each word the mean error ratio and its 95 % interval. {_WHAT}",
        hints={"layer type": "(width)", **hints},
        small={bits: f"{bits} small" for bits in map(str, words)},
        kind="verdicts",
    )


def _numbers(found: _Found) -> Sheet:
    """The numbers of the first matrix, for papers."""
    subject = found.subjects[0]
    frame = found.by_bits(subject, SIGNS, "text").dropna()
    caption = f"Mean error ratio [95 % interval], {subject}, {WORDS[SIGNS]}"
    return Sheet(frame.reset_index(), caption, _WHAT)


def _side_by_side(found: _Found) -> Sheet:
    at = found.judged[found.judged["transform"].isin(WORDS) & (found.judged["bits"] == BITS)]
    keys = ["place", "transform"]
    frame = at.replace({"transform": WORDS}).pivot_table("ratio", keys, "subject", sort=False)
    return Sheet(
        frame.reindex(columns=found.subjects).reset_index(),
        f"Mean error ratio at {_bits(BITS)} by model",
        formats=dict.fromkeys(found.subjects, _ratio),
        heads={"place": "layer type"},
    )


def _effects(found: _Found, subject: str) -> Sheet:
    """W and KL before and after, beside those of normal tokens."""
    columns = ["place", "width", "transform", "shapiro_w_median"]
    columns += ["kl_low", "kl", "kl_high", "kl_null_error"]
    own = found.types[found.types["subject"] == subject].reindex(columns=columns)
    own["text"] = [
        interval_text(low, high, (0.0, kl)) if low <= high else None
        for low, kl, high in own[["kl_low", "kl", "kl_high"]].to_numpy()
    ]
    controls = found.run.table("controls").reindex(columns=["control", *columns])
    is_null = (controls["control"] == "gaussian") & (controls["transform"] == BEFORE)
    normal = controls[is_null].set_index("width")["shapiro_w_median"]
    one = own.drop_duplicates("place").set_index("place")
    heads = {"before": BEFORE, "plain": PLAIN, "signs": SIGNS}
    by = {head: own[own["transform"] == t].set_index("place") for head, t in heads.items()}
    numbers = {
        **{f"W {head}": of["shapiro_w_median"] for head, of in by.items()},
        "W normal": one["width"].map(normal),
        **{f"KL {head}": of["kl"] for head, of in by.items()},
        "KL normal": one["kl_null_error"],
    }
    texts = {f"{head} interval": of["text"] for head, of in by.items()}
    return Sheet(
        pd.DataFrame(numbers | texts, one.index).rename_axis("layer type").reset_index(),
        f"Before and after: {subject}",
        "W: Shapiro–Wilk, median over tokens (1 is normal). KL: mean divergence from the fitted "
        "normal in nats, less that of tokens drawn from one, with its 95 % interval over images.",
        formats=dict.fromkeys(numbers, _four) | {"KL normal": "0 ± {:.4f}".format},
        small={f"KL {head}": f"{head} interval" for head in by},
        kind="dense",
    )


def _proofs(run: RunData, subject: str) -> Iterator[str]:
    """Whether the tests can be trusted and what can be proved, in numbers."""
    names = ("controls", "bound", "decay_slopes", "multivariate", "projections")
    controls, bound, slopes, joint, projections = map(run.table, names)
    if not controls.empty:
        before = controls[controls["transform"] == BEFORE]
        is_null = before["control"] == "gaussian"
        null = before[is_null].filter(like="_rejected").melt()["value"]
        (least,) = before[~is_null].nsmallest(1, "shapiro_rejected").to_dict("records")
        yield (
            f"Controls: the four tests reject {span(null, percent)} of normal tokens; of others, "
            f"Shapiro–Wilk rejects at least {percent(least['shapiro_rejected'])} before a "
            f"transform ({least['control']}, width {least['width']})."
        )
    if not bound.empty:
        own = bound[bound["subject"] == subject]
        yield (
            f"The Berry–Esseen bound is violated for {own['violated'].sum()} of "
            f"{plural(len(own), 'token')} when signs are redrawn (α = {own['alpha'].iloc[0]:g}); "
            f"it is {times((own['bound'] / own['exact_distance']).median())} the exact distance in "
            f"the median, which is at most {significant(own['exact_distance'].max())}."
        )
    if not slopes.empty:
        texts = [
            f"{row['source']} {fixed(row['slope'], 2)} "
            f"{interval_text(row['low'], row['high'], (-1.0, -0.5))}"
            for row in slopes.dropna().to_dict("records")
        ]
        yield (
            "Log–log slope of the exact distance by width, −0.5 in the bound; symmetric sums can "
            f"reach −1: {'; '.join(texts)}."
        )
    if not joint.empty:
        reach = int(joint["largest_informative_k"].max())
        width = joint.loc[joint["k"] == joint["k"].min(), "width_needed"].max()
        yield (
            "Joint normality is not proved: the best known bound (Raič 2019) is informative for "
            f"at most {reach} coordinates; even a flat token needs a width of {width:,} for one."
        )
    if not projections.empty:
        excess = projections["rejected"] - projections["rejected_null"]
        (row,) = projections.assign(excess=excess).nlargest(1, "excess").to_dict("records")
        yield (
            f"Of random projections of k coordinates, {row['layer_type']} with k = {row['k']} is "
            f"farthest from the null: {percent(row['rejected'])} of {row['tokens']} tokens "
            f"rejected, {percent(row['rejected_null'])} of normal ones."
        )


def _caveats(found: _Found) -> list[str]:
    """What the numbers cannot say."""
    signs = found.of(found.subjects[0], SIGNS)
    draws = int(signs["sign_draws"].max()) if "sign_draws" in signs else 1
    given = found.run.outliers
    return [
        *([f"The teacher was given outliers: {given}, its function unchanged."] if given else []),
        "Normal enough is not good enough: the rule of tokens misses energy that is one constant "
        "vector over all tokens, on which a quantizer spends its steps all the same. Nor is a "
        "ratio below 1 more normal: light tails and two-valued tokens are easier to quantize.",
        "Plain Hadamard depends on the matrix: "
        f"{outputs.matrices(found.judged, found.subjects[0])}. "
        f"With random signs a ratio is the mean over {plural(draws, 'draw')} of them; W, KL and "
        "heat maps are of the plan’s own draw.",
        "A greater n rejects the same departure more often: rejected shares need those of normal "
        "tokens beside them. Where their ratio reaches the limit, the limit is within their error.",
        f"Intervals resample {span(found.types['images'])} images whole. Each verdict stands "
        f"alone, without correction: of the {len(signs)} in the first table, up to "
        f"{significant(len(signs) / 40, 2)} can be expected to hold or not to hold falsely.",
    ]


def _ratio(value: float) -> str:
    return _three(value) if value < 10 else significant(value)


def _bits(*bits: Hashable) -> str:
    return f"{listing(map(str, bits))} {'bit' if bits == (1,) else 'bits'}"
