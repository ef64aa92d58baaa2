"""Cluster bootstrap against scipy, a loop and its coverage; rejections against statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from robuq_bench.errors import UsageError
from robuq_bench.normality.intervals import cluster_bootstrap_mean, rejected_share


def test_one_value_per_cluster_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=40)
    mean, low, high = cluster_bootstrap_mean(values, np.arange(40), draws=20_000, confidence=0.9)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    assert mean == pytest.approx(values.mean())
    # Quantiles of 20,000 draws have a standard error of about 1.5 % of the standard error.
    tolerance = 0.08 * values.std() / math.sqrt(40)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=tolerance)


def test_equals_resampling_the_tokens_themselves() -> None:
    """Unequal clusters: concatenate the tokens of the drawn images and average them."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(100, 118), rng.integers(1, 9, 18))
    rng.shuffle(clusters)
    values = rng.standard_normal(len(clusters)) + 1e6
    found = cluster_bootstrap_mean(values, clusters, draws=300, seed=7, confidence=0.8)
    means = []
    for counts in np.random.default_rng(7).multinomial(18, [1 / 18] * 18, size=300):
        drawn = [values[clusters == 100 + i] for i in range(18) for _ in range(counts[i])]
        means.append(np.concatenate(drawn).mean())
    expected = (values.mean(), *np.quantile(means, [0.1, 0.9]))
    assert tuple(found) == pytest.approx(expected, rel=1e-15)


def test_columns_share_the_draws() -> None:
    rng = np.random.default_rng(2)
    values, clusters = rng.standard_normal((90, 3)), np.arange(90) % 18
    together = cluster_bootstrap_mean(values, clusters, draws=100)
    assert together.mean.shape == together.low.shape == together.high.shape == (3,)
    for column in range(3):
        alone = cluster_bootstrap_mean(values[:, column], clusters, draws=100)
        assert isinstance(alone.low, float)
        assert tuple(alone) == pytest.approx(tuple(part[column] for part in together))


def test_coverage_with_dependent_tokens() -> None:
    """30 images of 20 tokens that share an effect: about 95 %, where tokens alone give half."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), 20)
    covered, naive = 0, 0
    for seed in range(200):
        values = rng.standard_normal(30)[clusters] + rng.standard_normal(600)
        _, low, high = cluster_bootstrap_mean(values, clusters, draws=400, seed=seed)
        covered += bool(low <= 0 <= high)
        _, low, high = cluster_bootstrap_mean(values, np.arange(600), draws=400, seed=seed)
        naive += bool(low <= 0 <= high)
    # 200 trials at 94 %: standard error 1.7 %.
    assert 0.88 <= covered / 200 <= 0.99
    assert naive / 200 < 0.6


def test_few_clusters_are_refused_unless_asked() -> None:
    values, clusters = np.arange(30.0), np.arange(30) % 15
    with pytest.raises(UsageError, match="15 images are too few"):
        cluster_bootstrap_mean(values, clusters)
    mean, low, high = cluster_bootstrap_mean(values, clusters, min_clusters=15)
    assert low < mean == 14.5 < high


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="1 of 20 values are not finite"):
        cluster_bootstrap_mean([bad, *range(19)], np.arange(20))


def test_malformed_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="one cluster for each"):
        cluster_bootstrap_mean(np.ones(20), np.arange(19))
    with pytest.raises(UsageError, match="one cluster for each"):
        cluster_bootstrap_mean(np.ones(0), np.arange(0))
    with pytest.raises(UsageError, match="integers"):
        cluster_bootstrap_mean(np.ones(20), np.arange(20.0))
    with pytest.raises(UsageError, match="confidence"):
        cluster_bootstrap_mean(np.ones(20), np.arange(20), confidence=1.0)


@given(
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.05, 0.2]),
)
def test_rejected_share_is_statsmodels(p: list[float], alpha: float) -> None:
    raw, adjusted = rejected_share(p, alpha)
    assert raw == np.mean(np.array(p) <= alpha)
    # A p-value exactly on its threshold may fall either way by rounding: two nearby levels.
    shares = [
        multipletests(p, a, method="fdr_bh")[0].mean() for a in (alpha * 0.999, alpha * 1.001)
    ]
    assert shares[0] <= adjusted <= shares[1]
    assert adjusted <= raw


def test_benjamini_hochbergs_own_example() -> None:
    """Table 1 of the 1995 paper: 15 p-values, 4 rejected at q = 0.05, 9 uncorrected."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    assert rejected_share(p, 0.05) == (9 / 15, 4 / 15)


@pytest.mark.parametrize("p", [[], [0.1, math.nan], [0.1, 1.5], [[0.1]]])
def test_p_values_are_checked(p: list[float]) -> None:
    with pytest.raises(UsageError, match="p-values"):
        rejected_share(p, 0.05)
    with pytest.raises(UsageError, match="alpha"):
        rejected_share([0.5], 0.0)
