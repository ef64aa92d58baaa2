"""Comparisons of plans: against scipy and statsmodels, and by simulation from known components."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from robuq_bench.errors import UsageError
from robuq_bench.statistics.comparisons import (
    MARGIN,
    RULE,
    compare_plans,
    judge_contrast,
    judge_family,
    judge_interval,
)
from robuq_bench.statistics.verdicts import Verdict

Floats = NDArray[np.float64]


def log_ratios(
    rng: np.random.Generator, seeds: int, ranges: int, sd: tuple[float, float, float]
) -> Floats:
    """[seeds, ranges] with standard deviations of seeds, ranges and residual."""
    of_seeds, of_ranges, residual = sd
    return (
        of_seeds * rng.normal(size=(seeds, 1))
        + of_ranges * rng.normal(size=(1, ranges))
        + residual * rng.normal(size=(seeds, ranges))
    )


def plans(d: Floats, base: float = 5.0) -> pd.DataFrame:
    """Values of "new" and "old" whose log ratio is d[seed, range]; "old" varies as well."""
    seed, image_range = np.indices(d.shape)
    old = base * np.exp(0.1 * np.sin(seed) + 0.2 * image_range)
    frames = [
        pd.DataFrame(
            {
                "plan": plan,
                "seed": seed.ravel() + 100,
                "image_range": [f"{50 * r}:{50 * r + 50}" for r in image_range.ravel()],
                "value": value.ravel(),
            }
        )
        for plan, value in (("new", old * np.exp(d)), ("old", old))
    ]
    return pd.concat(frames, ignore_index=True)


def compare(d: Floats, **options: Any) -> Verdict:
    return compare_plans(plans(d), "new", "old", "fid_digits", **options)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_one_range_is_the_paired_t_test(confidence: float) -> None:
    d = log_ratios(np.random.default_rng(0), 8, 1, (0.05, 0.0, 0.02)) + 0.04
    frame = plans(d)
    found = compare_plans(frame, "new", "old", "fid_digits", confidence=confidence)
    a, b = (np.log(frame.loc[frame["plan"] == plan, "value"]) for plan in ("new", "old"))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(confidence)
    assert found.effect == pytest.approx(math.exp(d.mean()))
    assert (found.low, found.high) == pytest.approx(
        (math.exp(interval.low), math.exp(interval.high))
    )
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.test == "paired t over seeds (one image range)"
    assert found.effect_name == "ratio of geometric means of fid_digits"
    assert (found.n, found.n_of) == (8, "training seeds")


def singular(*_: Any, **__: Any) -> None:
    raise np.linalg.LinAlgError


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize("is_singular", [False, True])
def test_the_balanced_mixed_model_is_the_analysis_of_variance(
    seeds: int, is_singular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = log_ratios(np.random.default_rng(8), seeds, 3, (0.05, 0.03, 0.02))
    seed, image_range = np.indices(d.shape)
    table = pd.DataFrame({"d": d.ravel(), "s": seed.ravel(), "r": image_range.ravel()})
    squares = sm.stats.anova_lm(smf.ols("d ~ C(s) + C(r)", table).fit())["mean_sq"]
    of_seeds, of_ranges, residual = squares / d.size
    assert min(of_seeds, of_ranges) > residual  # inside, where both estimators are one
    variance = of_seeds + of_ranges - residual
    by_range = of_ranges - residual
    freedom = variance**2 / ((variance - by_range) ** 2 / (seeds - 1) + by_range**2 / 2)
    half = stats.t(min(freedom, seeds - 1)).ppf(0.975) * math.sqrt(variance)
    if is_singular:
        monkeypatch.setattr(MixedLM, "fit", singular)
    found = compare(d)
    assert found.test.startswith("analysis of variance" if is_singular else "mixed model")
    assert np.log([found.effect, found.low, found.high]) == pytest.approx(
        [d.mean(), d.mean() - half, d.mean() + half], abs=(1e-9 if is_singular else 2e-4) * half
    )


def test_without_residual_ranges_still_count() -> None:
    """Then REML has no solution; if seeds do not vary either, the ranges are all there is."""
    of_ranges = np.array([[-0.02, 0.01, 0.04, -0.01, 0.03]])
    found = compare(np.repeat(of_ranges, 6, axis=0))
    assert found.test.startswith("analysis of variance, seeds and image ranges random (mixed model")
    interval = stats.ttest_1samp(of_ranges[0], 0).confidence_interval()
    assert np.log([found.low, found.high]) == pytest.approx(interval)
    both = compare(of_ranges + log_ratios(np.random.default_rng(0), 6, 1, (0.05, 0.0, 0.0)))
    assert (both.high or 0) / (both.low or 1) > (found.high or 9) / (found.low or 9)


def test_ranges_that_do_not_vary_leave_the_paired_t_over_seeds() -> None:
    """REML then puts the ranges' component at 0, and the error is that of the seeds' means."""
    d = log_ratios(np.random.default_rng(1), 8, 3, (0.05, 0.0, 0.02))
    d -= d.mean(axis=0) - d.mean()
    interval = stats.ttest_1samp(d.mean(axis=1), 0).confidence_interval()
    found = compare(d)
    assert found.test.startswith("mixed model")
    assert np.log([found.low, found.high]) == pytest.approx(interval, rel=1e-3)


def test_missing_pairs_are_left_out_of_an_unbalanced_model() -> None:
    d = log_ratios(np.random.default_rng(3), 7, 4, (0.05, 0.03, 0.02))
    frame = plans(d)
    dropped = frame.drop(index=[0, 5, 28 + 9])
    found = compare_plans(dropped, "new", "old", "fid_digits")
    assert found.note == "3 (seed, image range) of one plan only left out"
    table = frame[:28].assign(d=d.ravel()).drop(index=[0, 5, 9])
    table["d"] *= 50
    expected = smf.mixedlm(
        "d ~ 1",
        table,
        groups=np.ones(25),
        vc_formula={"s": "0 + C(seed)", "r": "0 + C(image_range)"},
    ).fit()
    assert math.log(found.effect or 0) * 50 == pytest.approx(expected.fe_params.iloc[0], rel=1e-3)
    error = expected.bse_fe.iloc[0] / 50
    quantiles = stats.t(np.array([[2.0], [6.0]])).ppf([0.975, 0.8])
    half = (math.log(found.high or 0) - math.log(found.low or 0)) / 2
    assert quantiles[1, 0] * error <= half * 1.001
    assert half <= quantiles[0, 0] * error
    assert found.detectable is not None
    assert math.log(found.detectable) > half


def test_the_detectable_ratio_has_the_power_it_claims() -> None:
    d = log_ratios(np.random.default_rng(0), 8, 1, (0.05, 0.0, 0.0))
    found = compare(d)
    assert found.detectable is not None
    size = math.log(found.detectable) / d.std(ddof=1)
    assert TTestPower().power(size, nobs=8, alpha=0.05) == pytest.approx(0.8, abs=0.02)


def test_coverage_and_false_decisions() -> None:
    """Equal plans, 8 seeds and 3 ranges; 300 draws leave ± 2.5 % at two standard errors."""
    rng = np.random.default_rng(2)
    found = [compare(log_ratios(rng, 8, 3, (0.05, 0.03, 0.02))) for _ in range(300)]
    covered = np.mean([(v.low or 9) <= 1 <= (v.high or 0) for v in found])
    assert 0.91 <= covered <= 0.98
    assert np.mean([v.verdict in ("better", "worse") for v in found]) <= 0.06
    mixed = np.mean([v.test.startswith("mixed model") for v in found])
    assert mixed > 0.95


@pytest.mark.parametrize(
    ("shift", "spread", "word"),
    [(0.1, 0.02, "worse"), (-0.1, 0.02, "better"), (0, 0.005, "equivalent"), (0, 0.2, "undecided")],
)
def test_words(shift: float, spread: float, word: str) -> None:
    d = log_ratios(np.random.default_rng(1), 8, 3, (spread, spread / 4, spread / 4))
    d += shift - d.mean()
    assert compare(d).verdict == word
    opposite = {"worse": "better", "better": "worse"}.get(word, word)
    assert compare(d, lower_is_better=False).verdict == opposite


limits = st.floats(-1, 1) | st.sampled_from([0.0, 0.03, -0.03])


@given(limits, limits, st.floats(1e-6, 0.5) | st.just(0.03), st.booleans())
def test_an_interval_earns_one_word(x: float, y: float, margin: float, lower: bool) -> None:
    low, high = min(x, y), max(x, y)
    inside = max(abs(low), abs(high)) <= margin
    earned = {
        "equivalent": inside,
        "better": not inside and (high < 0 if lower else low > 0),
        "worse": not inside and (low > 0 if lower else high < 0),
        "undecided": not inside and low <= 0 and high >= 0,
    }
    assert [word for word, is_earned in earned.items() if is_earned] == [
        judge_interval(low, high, margin, lower)
    ]
    swapped = judge_interval(-high, -low, margin, not lower)
    assert swapped == judge_interval(low, high, margin, lower)


def test_few_seeds_are_not_judged() -> None:
    d = np.full((6, 3), 0.2)
    frame = plans(d)
    few = frame[(frame["plan"] == "old") | (frame["seed"] < 104)]
    found = compare_plans(few, "new", "old", "fid_digits")
    assert (found.verdict, found.n, found.p_value) == ("not judged", 4, None)
    # All differences are equal, so the numbers that stand without a word have no width.
    assert (found.low, found.high) == pytest.approx((math.exp(0.2), math.exp(0.2)))
    one = compare_plans(frame[frame["seed"] == frame["seed"].min()], "new", "old", "fid_digits")
    assert (one.verdict, one.n, one.low) == ("not judged", 1, None)
    assert found.effect == pytest.approx(math.exp(0.2))
    assert "6 (seed, image range) of one plan only left out; 5 training seeds" in found.note
    none = frame[(frame["plan"] == "old") == (frame["seed"] < 103)]
    assert compare_plans(none, "new", "old", "fid_digits").effect is None


def test_metrics_around_zero_are_compared_by_differences() -> None:
    d = log_ratios(np.random.default_rng(1), 8, 1, (0.05, 0.0, 0.0))
    frame = plans(d)
    is_new = frame["plan"] == "new"
    frame["value"] = np.where(is_new, -0.02 + np.tile(d.ravel(), 2) / 100, 0.01)
    found = compare_plans(frame, "new", "old", "kid", difference_margin=0.001)
    expected = stats.ttest_1samp(d.ravel() / 100 - 0.03, 0)
    assert found.effect_name == "difference of means of kid"
    assert (found.effect, found.p_value) == pytest.approx((-0.03 + d.mean() / 100, expected.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.verdict == "better"
    wide = compare_plans(frame, "new", "old", "kid", difference_margin=0.1)
    assert wide.verdict == "equivalent"
    with pytest.raises(UsageError, match=r"seed 100, range 0:50, is not above 0, as a ratio needs"):
        compare_plans(frame, "new", "old", "kid")


@pytest.mark.parametrize(("ratio", "word", "p"), [(1.0, "equivalent", 1.0), (2.0, "worse", 0.0)])
def test_equal_differences_have_no_spread(ratio: float, word: str, p: float) -> None:
    frame = plans(np.zeros((5, 2)))
    frame["value"] = np.where(frame["plan"] == "new", ratio, 1.0)
    found = compare_plans(frame, "new", "old", "fid_digits")
    assert (found.verdict, found.p_value) == (word, p)
    assert found.low == found.high == found.effect == pytest.approx(ratio)
    assert found.test == "paired t over seeds (all differences are equal)"


def test_an_unbalanced_model_that_fails_gives_way_to_the_paired_t(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d = log_ratios(np.random.default_rng(0), 6, 3, (0.05, 0.03, 0.02))
    frame = plans(d).drop(index=0)
    means = [d[0, 1:].mean(), *d[1:].mean(axis=1)]
    interval = stats.ttest_1samp(means, 0).confidence_interval()
    fit = MixedLM.fit
    for fake, why in (
        (singular, "singular"),
        (lambda self, **options: fit(self, maxiter=1, **options), "did not converge"),
    ):
        monkeypatch.setattr(MixedLM, "fit", fake)
        found = compare_plans(frame, "new", "old", "fid_digits")
        assert found.test == f"paired t over seeds, ranges taken as fixed (mixed model {why})"
        assert np.log([found.low, found.high]) == pytest.approx(interval)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.drop(columns="image_range"), {}, "fid have no column image_range"),
        (lambda f: f[f["plan"] != "old"], {}, "no values of fid for plan old"),
        (lambda f: pd.concat([f, f[3:4]]), {}, "new, seed 101, range 50:100, is there twice"),
        (lambda f: f.replace(f["value"][2], np.nan), {}, "seed 101, range 0:50, is not finite"),
        (lambda f: f.replace(104, np.nan), {}, "new, seed nan, range 0:50, has no seed or range"),
        (lambda f: f.replace("old", "new"), {"baseline": "new"}, "compared with itself"),
        (lambda f: f, {"difference_margin": 0.0}, "difference_margin"),
        (lambda f: f, {"confidence": 1.0}, "confidence"),
    ],
)
def test_wrong_values_are_named(change: Any, options: dict[str, Any], message: str) -> None:
    frame = change(plans(np.zeros((5, 2))))
    with pytest.raises(UsageError, match=message):
        compare_plans(frame, **({"candidate": "new", "baseline": "old", "metric": "fid"} | options))


def test_the_rule_says_what_is_done() -> None:
    for said in ("95% interval", str(MARGIN), "fewer than 5 common seeds", "Holm"):
        assert said in RULE


def family() -> list[Verdict]:
    d = log_ratios(np.random.default_rng(5), 8, 3, (0.05, 0.01, 0.02))
    d -= d.mean()
    found = [compare(d + shift) for shift in (0.12, 0.045, 0.05, 0.0)]
    equivalent = compare(0.1 * d + 0.005)
    assert [v.verdict for v in (*found, equivalent)] == [
        "worse", "worse", "worse", "undecided", "equivalent"
    ]  # fmt: skip
    return [*found, compare(d[:4]), equivalent]


def test_a_family_is_adjusted_as_by_statsmodels() -> None:
    verdicts = family()
    judged = judge_family(verdicts)
    with_p = [v for v in verdicts if v.p_value is not None]
    assert len(with_p) == 5
    expected = multipletests([v.p_value for v in with_p], method="holm")[1]
    assert [v.p_adjusted for v in judged if v.p_value is not None] == pytest.approx([*expected])
    for before, after in zip(verdicts, judged, strict=True):
        lost = before.verdict == "worse" and after.p_adjusted > 0.05
        assert after.verdict == ("undecided" if lost else before.verdict)
        assert ("worse alone, undecided among 5 (holm: p = 0.0" in after.note) == lost
        unchanged = ("verdict", "note", "p_adjusted")
        fields = {name: getattr(before, name) for name in unchanged}
        assert dataclasses.replace(after, **fields) == before
    assert [v.verdict for v in judged] == [
        "worse", "undecided", "undecided", "undecided", "not judged", "equivalent"
    ]  # fmt: skip


def test_members_of_a_planned_family_without_p_value_count_as_1() -> None:
    verdicts = family()
    judged = judge_family(verdicts, planned=True)
    p_values = [1.0 if v.p_value is None else v.p_value for v in verdicts]
    expected = multipletests(p_values, method="holm")[1]
    for verdict, p in zip(judged, expected, strict=True):
        assert verdict.p_adjusted == (None if verdict.p_value is None else pytest.approx(p))
    alone = judge_family(verdicts[:1])[0].p_adjusted
    assert judge_family([verdicts[0], verdicts[5]], planned=True)[0].p_adjusted == 2 * alone


def test_ranges_of_own_images_are_averaged_by_seed() -> None:
    d = log_ratios(np.random.default_rng(3), 8, 3, (0.03, 0.0, 0.08))
    weights = {"new": 1.0, "old": -1.0}
    found = judge_contrast(plans(d), weights, "fid_digits", shared_ranges=False)
    expected = stats.ttest_1samp(d.mean(axis=1), 0)
    low, high = expected.confidence_interval(0.95)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((low, high))
    assert found.p_value == pytest.approx(expected.pvalue)


def test_a_family_of_one_keeps_its_word_and_is_adjusted_once() -> None:
    worse = family()[1]
    (judged,) = judge_family([worse])
    assert (judged.verdict, judged.p_adjusted) == ("worse", worse.p_value)
    with pytest.raises(UsageError, match="were: new"):
        judge_family([judged])
    assert judge_family([]) == []
