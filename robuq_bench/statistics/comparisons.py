"""Is one plan better than another: paired over training seeds, judged against a margin.

Both plans are trained from the same seeds and sampled from the same image ranges, so they differ
pair by pair: d[seed, range] = log(candidate) − log(baseline), or the plain difference where a
metric can be 0 or less. The model is d = effect + seed + range + residual, all but the effect
random and normal. Seeds share the ranges, whose part of the error does not shrink with more seeds.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from robuq_bench.errors import UsageError
from robuq_bench.statistics.verdicts import Verdict

Floats = NDArray[np.float64]
Word = Literal["better", "equivalent", "worse", "undecided"]

MIN_SEEDS = 5
"""Fewer common training seeds are not judged."""

MARGIN = 0.97
"""Ratios from this to its reciprocal are of no consequence."""

CONFIDENCE = 0.95
POWER = 0.80

RULE = (
    "Two plans are compared over the training seeds and image ranges that both have, by the ratio "
    f"of geometric means and its {CONFIDENCE:.0%} interval. Equivalent: the interval lies within "
    f"{MARGIN} to 1/{MARGIN}, ends included. Otherwise better or worse: it lies wholly on that "
    f"side of 1. Otherwise undecided. With fewer than {MIN_SEEDS} common seeds: not judged. "
    "Metrics that can be 0 or less are compared by their difference, against 0 and a margin in "
    "their own unit. Where comparisons are judged as a family, better and worse must also survive "
    "Holm's correction."
)

_DECIDED = ("better", "worse", "holds", "does not hold")


class _Estimate(NamedTuple):
    """A mean difference, its standard error, degrees of freedom, and how they were found."""

    mean: float
    error: float
    freedom: float
    test: str


def judge_interval(low: float, high: float, margin: float, lower_is_better: bool = True) -> Word:
    """The word that `RULE` gives an interval [low, high] of log ratios or differences.

    Differences of at most `margin` are of no consequence. A negative interval is the better one
    where `lower_is_better`.
    """
    if -margin <= low and high <= margin:
        return "equivalent"
    if low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == lower_is_better else "worse"


def compare_plans(
    values: pd.DataFrame,
    candidate: str,
    baseline: str,
    metric: str,
    *,
    lower_is_better: bool = True,
    difference_margin: float | None = None,
    confidence: float = CONFIDENCE,
) -> Verdict:
    """`judge_contrast` of the plan `candidate` beside the plan `baseline`.

    Raises:
        UsageError: as `judge_contrast`, or a plan is compared with itself.
    """
    if candidate == baseline:
        raise UsageError(f"plan {candidate!r} is compared with itself")
    found = judge_contrast(
        values,
        {candidate: 1.0, baseline: -1.0},
        metric,
        lower_is_better=lower_is_better,
        difference_margin=difference_margin,
        confidence=confidence,
    )
    claim = f"{metric} of {candidate} differs from that of {baseline}."
    return dataclasses.replace(found, claim=claim, subject=candidate)


def judge_contrast(
    values: pd.DataFrame,
    weights: Mapping[str, float],
    metric: str,
    *,
    lower_is_better: bool = True,
    margin: float = 1 - MARGIN,
    difference_margin: float | None = None,
    confidence: float = CONFIDENCE,
    shared_ranges: bool = True,
) -> Verdict:
    """Judge Σ weight · log(value of a plan) over plans by `RULE`; weights add up to 0.

    {a: 1, b: -1} is the ratio a / b, and {a: 1, b: -1, c: -1, d: 1} the ratio of the ratios a / b
    and c / d. "better" says that the contrast is negative where `lower_is_better`.

    The interval is mean ± t · SE of the mixed model (REML); by Satterthwaite's rule, the part of
    SE² that ranges hold has ranges − 1 degrees of freedom, the rest seeds − 1, and the whole at
    most seeds − 1. Where the model cannot be fitted, as without residual, SE comes from the mean
    squares of the analysis of variance; with one range, or where pairs are missing besides, it is
    the paired t interval over the seeds' means, ranges taken as fixed. `test` says which, and why.
    `detectable` is the effect that would be told from none with 80 % power:
    exp((t(1 − α/2) + t(0.8)) · SE), without exp for differences.

    From two seeds on there is an interval, and a word from `MIN_SEEDS` on.

    Simulated 95 % intervals of 8 seeds and 3 ranges cover 93 to 98 % while ranges vary no more than
    seeds, 91 % where seeds do not vary at all; of 2 ranges, 90 and 85 %.

    Args:
        values: columns `plan`, `seed` (training seed), `image_range`, `value`; other columns and
            other plans are passed over.
        weights: plan -> its weight.
        metric: what `value` is, for the words of the verdict.
        lower_is_better: as for FID; False for precision and the like.
        margin: ratios from 1 - margin to its reciprocal are of no consequence; in (0, 1).
        difference_margin: compare by differences, of which those up to this (> 0, in the unit of
            the metric) are of no consequence. None: by ratios, within `margin`.
        confidence: of the interval, in (0, 1).
        shared_ranges: range r is of the same images for every seed. False: each seed has images of
            its own, over whose ranges its contrasts are averaged.

    Raises:
        UsageError: weights that do not add up to 0; a column, plan, seed or range is missing, a
            (plan, seed, range) is there twice, a value is not finite, or not above 0 where ratios
            are compared (give `difference_margin` for such a metric); names it.
    """
    ratio = difference_margin is None
    if difference_margin is not None and not difference_margin > 0:
        raise UsageError(f"difference_margin lies above 0, got {difference_margin}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence lies in (0, 1), got {confidence}")
    if not 0 < margin < 1:
        raise UsageError(f"margin lies in (0, 1), got {margin}")
    if not any(weights.values()) or abs(sum(weights.values())) > 1e-12:
        raise UsageError(f"weights of a contrast add up to 0 and are not all 0: {dict(weights)}")
    d, left_out = _contrasts(values, weights, metric, ratio)
    back: Callable[[float], float] = math.exp if ratio else float
    is_pair = sorted(weights.values()) == [-1, 1]
    of = "" if is_pair else "ratio of " if ratio else "difference of "
    some = "one plan only" if len(weights) == 2 else "not all plans"
    verdict = Verdict(
        claim=f"{metric} differs in {contrast_text(weights, ratio)}.",
        subject=contrast_text(weights, ratio),
        verdict="not judged",
        effect=back(d.mean()) if len(d) else None,
        effect_name=f"{of}{'ratio of geometric' if ratio else 'difference of'} means of {metric}",
        low=None,
        high=None,
        confidence=confidence,
        n=d.index.unique("seed").size,
        n_of="training seeds",
        test="none",
        p_value=None,
        note=f"{left_out} (seed, image range) of {some} left out" if left_out else "",
    )
    what = "both plans" if len(weights) == 2 else "all plans"
    reason = f"{MIN_SEEDS} training seeds that {what} have are needed"
    if verdict.n < 2:
        return _noted(verdict, reason)
    found = _estimate(d, shared_ranges)
    t = stats.t(found.freedom)
    quantile = float(t.ppf((1 + confidence) / 2))
    low, high = found.mean - quantile * found.error, found.mean + quantile * found.error
    of_no_consequence = -math.log(1 - margin) if difference_margin is None else difference_margin
    verdict = dataclasses.replace(
        verdict, effect=back(found.mean), low=back(low), high=back(high), test=found.test
    )
    if verdict.n < MIN_SEEDS:  # the numbers stand, without a word or a place in a family
        return _noted(verdict, reason)
    return dataclasses.replace(
        verdict,
        verdict=judge_interval(low, high, of_no_consequence, lower_is_better=lower_is_better),
        p_value=_two_sided_p(found),
        detectable=back((quantile + float(t.ppf(POWER))) * found.error),
    )


def contrast_text(weights: Mapping[str, float], ratio: bool = True) -> str:
    """A contrast in symbols: `a ÷ b`, `(a ÷ b) ÷ (c ÷ d)`, else `a^0.5 · b^−0.5`; `−` for `÷`."""
    sign = " ÷ " if ratio else " − "
    plus = [name for name, weight in weights.items() if weight == 1]
    minus = [name for name, weight in weights.items() if weight == -1]
    if len(plus) + len(minus) == len(weights) and len(plus) == len(minus) <= 2:
        if len(plus) == 1:
            return f"{plus[0]}{sign}{minus[0]}"
        return f"({plus[0]}{sign}{minus[0]}){sign}({minus[1]}{sign}{plus[1]})"
    powers = (f"{n}^{w:g}" if ratio else f"{w:g} {n}" for n, w in weights.items())
    return (" · " if ratio else " + ").join(powers).replace("-", "−")


def _two_sided_p(found: _Estimate) -> float:
    if not found.error:  # all differences are equal
        return 0.0 if found.mean else 1.0
    return float(2 * stats.t(found.freedom).sf(abs(found.mean) / found.error))


def _contrasts(
    values: pd.DataFrame, weights: Mapping[str, float], metric: str, ratio: bool
) -> tuple[pd.Series[float], int]:
    """Contrasts by (seed, image_range), and how many of these not all plans have."""
    key = ["plan", "seed", "image_range"]
    if missing := [name for name in [*key, "value"] if name not in values.columns]:
        raise UsageError(f"the values of {metric} have no column {', '.join(missing)}")
    used = values.loc[values["plan"].isin(list(weights)), [*key, "value"]]
    if absent := sorted(set(weights) - set(used["plan"])):
        raise UsageError(f"no values of {metric} for plan {', '.join(absent)}")
    number = used["value"].to_numpy(dtype=np.float64)
    for bad, problem in (
        (used[key].isna().any(axis=1).to_numpy(), "has no seed or range"),
        (used.duplicated(key).to_numpy(), "is there twice"),
        (~np.isfinite(number), "is not finite"),
        (
            ratio & (number <= 0),
            "is not above 0, as a ratio needs; set difference_margin",
        ),
    ):
        if bad.any():
            plan, seed, image_range = used[key].iloc[int(bad.argmax())]
            raise UsageError(f"{metric} of {plan}, seed {seed}, range {image_range}, {problem}")
    table = used.assign(value=np.log(number) if ratio else number).pivot(
        index=["seed", "image_range"], columns="plan", values="value"
    )
    common = table.dropna()
    contrast = common[list(weights)] @ pd.Series(weights)
    return contrast, len(table) - len(common)


def _estimate(d: pd.Series[float], shared_ranges: bool) -> _Estimate:
    """Mean of `d` (index: seed, image_range; at least two seeds) and its standard error."""
    from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec

    seeds, ranges = (pd.factorize(d.index.get_level_values(i))[0] for i in ("seed", "image_range"))
    S, R, N = seeds.max() + 1, ranges.max() + 1, len(d)
    means = d.groupby("seed").mean()
    paired = (float(means.mean()), float(means.std() / math.sqrt(S)), S - 1.0)
    spread = float(d.std())
    if R == 1 or not spread or not shared_ranges:
        equal = "images of its own for each seed" if spread else "all differences are equal"
        why = "one image range" if R == 1 else equal
        return _Estimate(*paired, f"paired t over seeds ({why})")
    components = VCSpec(
        ["seed", "range"],
        [[[*range(S)]], [[*range(R)]]],
        [[np.eye(S)[seeds]], [np.eye(R)[ranges]]],
    )
    model = MixedLM(d.to_numpy() / spread, np.ones(N), groups=np.zeros(N), exog_vc=components)
    with warnings.catch_warnings():
        # a variance component of 0 is a result, not a fault; convergence is asked for below
        warnings.simplefilter("ignore")
        try:
            # Nelder-Mead: gradient methods stop short where a component is 0
            fit = model.fit(reml=True, method="nm")
            error = float(fit.bse_fe[0]) * spread
            why = "" if fit.converged and math.isfinite(error) else "did not converge"
        except np.linalg.LinAlgError:
            why = "singular"
    if not why:
        of_ranges = float(fit.vcomp[1]) * spread**2 / R  # their part of the squared error
        mean, test, how = float(fit.fe_params[0]) * spread, "mixed model", "REML"
    elif N == S * R:
        error, of_ranges = _moments(d.unstack().to_numpy())
        mean, test, how = paired[0], "analysis of variance", f"mixed model {why}"
    else:
        return _Estimate(*paired, f"paired t over seeds, ranges taken as fixed (mixed model {why})")
    freedom = error**4 / ((error**2 - of_ranges) ** 2 / (S - 1) + of_ranges**2 / (R - 1))
    test += f", seeds and image ranges random ({how}, Satterthwaite t)"
    return _Estimate(mean, error, min(freedom, S - 1.0), test)


def _moments(d: Floats) -> tuple[float, float]:
    """Standard error of the mean of d [S, R], and the ranges' part of its square.

    From the mean squares of the two-way table without repetition; negative components are 0.
    """
    S, R = d.shape
    by_seed, by_range = d.mean(axis=1, keepdims=True), d.mean(axis=0, keepdims=True)
    residual = ((d - by_seed - by_range + d.mean()) ** 2).sum() / ((S - 1) * (R - 1))
    of_seeds = max(R * by_seed.var(ddof=1) - residual, 0.0) / d.size
    of_ranges = max(S * by_range.var(ddof=1) - residual, 0.0) / d.size
    return math.sqrt(of_seeds + of_ranges + residual / d.size), of_ranges


def judge_family(
    verdicts: Sequence[Verdict], method: str = "holm", *, planned: bool = False
) -> list[Verdict]:
    """Verdicts with p-values adjusted over all that have one; words that do not survive are taken.

    Every interval stays that of its own comparison, and the p-value beside it is of the same test,
    so without a family the two agree. Correction can only take a word away: a decided one (better,
    worse, holds, does not hold) whose adjusted p is above 1 − confidence becomes "undecided", and
    its note says so. "equivalent" rejects another hypothesis than the p-value does, so it stands on
    its interval, with the error rate of a single comparison. Without a p-value a verdict passes.

    Args:
        verdicts: the family, of one kind or of several.
        method: of `statsmodels.stats.multitest.multipletests`.
        planned: the family was fixed beforehand: a member without a p-value counts as p = 1.

    Raises:
        UsageError: a verdict of the family is adjusted already.
    """
    from statsmodels.stats.multitest import multipletests

    if done := [v.subject for v in verdicts if v.p_adjusted is not None]:
        raise UsageError(f"p-values are adjusted once, and these were: {', '.join(done)}")
    p_values = [v.p_value for v in verdicts if v.p_value is not None]
    p_values += [1.0] * (len(verdicts) - len(p_values)) if planned else []
    adjusted = iter(multipletests(p_values, method=method)[1] if p_values else [])
    return [
        v if v.p_value is None else _survived(v, float(next(adjusted)), len(p_values), method)
        for v in verdicts
    ]


def _survived(verdict: Verdict, p_adjusted: float, size: int, method: str) -> Verdict:
    judged = dataclasses.replace(verdict, p_adjusted=p_adjusted)
    if verdict.verdict not in _DECIDED or p_adjusted <= 1 - verdict.confidence:
        return judged
    reason = f"{verdict.verdict} alone, undecided among {size} ({method}: p = {p_adjusted:.2g})"
    return _noted(dataclasses.replace(judged, verdict="undecided"), reason)


def _noted(verdict: Verdict, reason: str) -> Verdict:
    return dataclasses.replace(verdict, note="; ".join(filter(None, [verdict.note, reason])))
