"""Distance of Rademacher sums to the normal: enumeration, binomials, exact sums, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from robuq_bench import seeds
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder, hadamard_matrix
from robuq_bench.normality import sign_sums
from robuq_bench.normality.berry_esseen import (
    SHEVTSOVA_2010,
    berry_esseen_bound,
    best_multivariate_bound,
    channel_lyapunov,
    decay_slope,
    informative_coordinates,
    is_void,
    lyapunov_coefficient,
    monte_carlo_check,
    multivariate_bound,
)
from robuq_bench.normality.controls import CONTROL_NAMES, control_tokens
from robuq_bench.normality.sign_sums import distance_of_signs, exact_distance

ENTRIES = st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bound_of(token: torch.Tensor) -> float:
    return float(berry_esseen_bound(lyapunov_coefficient(token[None]))[0])


def sup_distance(values: NDArray[np.float64], masses: NDArray[np.float64]) -> float:
    """Sup-distance to the normal of a law with these atoms, by its definition."""
    above = np.cumsum(masses)
    normal = stats.norm.cdf(values)
    return float(max(np.abs(above - normal).max(), np.abs(above - masses - normal).max()))


def brute_force(token: torch.Tensor) -> float:
    """All 2^d sign vectors as one matrix; equal sums merged at 1e-12."""
    d = len(token)
    signs = 1 - 2 * ((np.arange(2**d)[:, None] >> np.arange(d)) & 1)
    scaled = (token.double() / token.abs().max()).numpy()
    weights = scaled / np.linalg.norm(scaled)
    values, counts = np.unique(np.round(signs @ weights, 12), return_counts=True)
    return sup_distance(values, counts / 2**d)


def sums_of(steps: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Atoms, in standard deviations, and masses of sum(+-steps): one convolution per step."""
    total = sum(steps)
    masses = np.zeros(total + 1)
    masses[0] = 1.0
    for step in steps:
        shifted = np.zeros_like(masses)
        shifted[step:] = masses[: len(masses) - step]
        masses = (masses + shifted) / 2
    return (2.0 * np.arange(total + 1) - total) / math.sqrt(sum(k * k for k in steps)), masses


def test_the_constant_is_the_published_one() -> None:
    assert SHEVTSOVA_2010 == 0.5600


@given(st.lists(ENTRIES, min_size=1, max_size=64))
def test_lyapunov_coefficient_lies_in_its_range(entries: list[float]) -> None:
    x = torch.tensor([entries], dtype=torch.float64)
    l3 = float(lyapunov_coefficient(x)[0])
    if not any(entries):
        assert math.isnan(l3)
        return
    assert len(entries) ** -0.5 * (1 - 1e-12) <= l3 <= 1 + 1e-12
    scaled = x / x.abs().max()
    expected = float((scaled.abs() ** 3).sum() / (scaled**2).sum() ** 1.5)
    assert l3 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_lyapunov_coefficient_neither_over_nor_underflows(scale: float) -> None:
    x = torch.stack([torch.full((144,), 1.0), torch.eye(144)[7]]).double() * scale
    torch.testing.assert_close(
        lyapunov_coefficient(x), torch.tensor([1 / 12, 1.0]).double(), rtol=1e-7, atol=0
    )


def test_void_bounds_keep_their_value() -> None:
    bound = berry_esseen_bound(torch.tensor([0.1, 2.0, math.nan]))
    assert bound[1] == 2.0 * 0.56
    assert is_void(bound).tolist() == [False, True, True]
    assert is_void(1.0)
    assert is_void(math.inf)


@settings(max_examples=40)
@given(st.lists(ENTRIES, min_size=1, max_size=14).filter(any))
def test_few_entries_equal_brute_force_and_stay_below_the_bound(entries: list[float]) -> None:
    token = torch.tensor(entries, dtype=torch.float64)
    exact = exact_distance(token)
    # Merging sums at 1e-12 shifts the normal by as much.
    assert exact == pytest.approx(brute_force(token), abs=1e-11)
    assert exact <= bound_of(token)


@pytest.mark.parametrize("d", range(1, 17))
def test_gaussian_tokens_equal_brute_force(d: int) -> None:
    token = randn(d, seed=d)
    assert exact_distance(token) == pytest.approx(brute_force(token), abs=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_small_integers_beyond_enumeration_equal_brute_force(seed: int) -> None:
    token = torch.from_numpy(np.random.default_rng(seed).integers(1, 9, 18)) * 0.125
    found = distance_of_signs(token)
    assert found.method == "lattice"
    assert found.value == pytest.approx(brute_force(token), abs=1e-11)


@pytest.mark.parametrize("d", [1, 2, 16, 17, 18, 144, 1152, 4608])
def test_flat_tokens_are_binomial(d: int) -> None:
    token = torch.full((d,), -0.3)
    heads = np.arange(d + 1)
    expected = sup_distance((2 * heads - d) / math.sqrt(d), stats.binom.pmf(heads, d, 0.5))
    assert exact_distance(token) == pytest.approx(expected, abs=1e-11)
    # C0 of Shevtsova 2013: identically distributed summands, as the flat token's are
    assert expected <= 0.4690 * d**-0.5


def test_one_hot_takes_two_values() -> None:
    assert exact_distance(torch.eye(1152)[3]) == pytest.approx(stats.norm.cdf(1) - 0.5, abs=1e-12)


def test_lattice_equals_exact_sums() -> None:
    steps = [int(k) for k in np.random.default_rng(0).integers(1, 128, 256)]
    token = torch.tensor(steps) * 2.0**-7
    assert distance_of_signs(token).method == "lattice"
    assert exact_distance(token) == pytest.approx(sup_distance(*sums_of(steps)), abs=1e-10)


def test_inversion_equals_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a lattice too fine to see, inversion gives the mid-height of every atom."""
    monkeypatch.setattr(sign_sums, "MAX_LATTICE_POINTS", 1)
    steps = [int(k) for k in np.random.default_rng(1).integers(1, 16384, 64)]
    found = distance_of_signs(torch.tensor(steps))
    values, masses = sums_of(steps)
    middle = np.abs(np.cumsum(masses) - masses / 2 - stats.norm.cdf(values)).max()
    assert found.method == "inversion"
    assert found.value == pytest.approx(middle, abs=1e-8)
    assert abs(found.value - sup_distance(values, masses)) <= found.error < 1e-5


def test_coarse_lattices_are_not_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The characteristic function of a flat token returns to 1: no wrong value may come out."""
    monkeypatch.setattr(sign_sums, "MAX_LATTICE_POINTS", 1)
    for width in (1152, 100_000):
        assert distance_of_signs(torch.ones(width)).method == "largest entries"
        assert math.isnan(exact_distance(torch.ones(width)))
    # First return at u = pi times the norm, about 40,000 and just within the grid.
    for seed in range(6):
        rare = (randn(64, seed=seed) * 1592).round()
        assert distance_of_signs(rare).method == "largest entries"


def test_gaussian_tokens_follow_the_edgeworth_term() -> None:
    """F - Phi = -kappa_4 / 24 He_3 phi + O(1/n^2), with kappa_4 = -2 ||x||_4^4 / ||x||_2^4."""
    t = np.linspace(0, 3, 30_001)
    shape = np.abs((t**3 - 3 * t) * stats.norm.pdf(t)).max()
    for n, dtype in ((1152, torch.float64), (1152, torch.bfloat16), (4608, torch.float32)):
        token = randn(n, seed=n).to(dtype)
        x = token.double()
        kappa = 2 * float((x**4).sum() / (x**2).sum() ** 2)
        assert exact_distance(token) == pytest.approx(kappa / 24 * shape, rel=0.01)


def test_massive_entries_with_weak_rest() -> None:
    """Four massive entries: enumerate them, give the rest of norm r a normal law instead."""
    token = torch.cat([randn(1148), torch.tensor([3500.0, 3000.0, 2700.0, 2500.0])])
    norm = float(token.norm())
    r = float(token[:1148].norm()) / norm
    signs = 1 - 2 * ((np.arange(16)[:, None] >> np.arange(4)) & 1)
    atoms = signs @ (token[1148:].numpy() / norm)
    t = np.linspace(-4, 4, 400_001)
    F = sum(stats.norm.cdf((t - atom) / r) for atom in atoms) / 16
    # The rest is itself as close to normal as 1148 Gaussian entries are: 1.3e-4 per atom.
    assert exact_distance(token) == pytest.approx(np.abs(F - stats.norm.cdf(t)).max(), abs=2e-4)


def test_maximum_is_located_within_the_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steep steps beside four massive entries: a grid 16 times as fine finds the same maximum."""
    tokens = [torch.cat([randn(1148, seed=s), torch.full((4,), 3000.0 + s)]) for s in range(3)]
    found = [distance_of_signs(token) for token in tokens]
    monkeypatch.setattr(sign_sums, "WAVE_POINTS", 512)
    for coarse, token in zip(found, tokens, strict=True):
        fine = distance_of_signs(token)
        assert coarse.method == fine.method == "inversion"
        assert abs(coarse.value - fine.value) <= 2e-8 < coarse.error


def test_undecided_tokens_are_nan_with_a_reason() -> None:
    between = distance_of_signs(randn(24))
    assert between.method == "largest entries"
    assert between.error > 0.01
    assert math.isnan(exact_distance(randn(24)))
    weak = torch.cat([torch.ones(3), 1e-9 * randn(500)])
    assert exact_distance(weak) == pytest.approx(brute_force(torch.ones(3).double()), abs=1e-6)
    for bad in (torch.zeros(8), torch.tensor([1.0, math.inf])):
        assert math.isnan(exact_distance(bad))
    with pytest.raises(UsageError, match="one token"):
        exact_distance(randn(2, 3))


@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_exact_distance_lies_in_the_monte_carlo_band(name: str) -> None:
    tokens = control_tokens(name, 5, 384, seed=3)
    # 30 tokens at 1e-5 each: the band fails by chance once in 3000 seeds, and the seed is fixed.
    check = monte_carlo_check(tokens, draws=8000, alpha=1e-5, seed=1)
    for token, measured, bound in zip(tokens, check.distance, check.bound, strict=True):
        exact = exact_distance(token)
        assert abs(exact - measured) <= check.slack
        assert exact <= bound
        assert bound == bound_of(token)


def test_no_violation_in_200_tokens() -> None:
    tokens = torch.cat([control_tokens(name, 34, 256, seed=5) for name in CONTROL_NAMES])[:200]
    check = monte_carlo_check(tokens, draws=6000, alpha=0.001, seed=2)
    assert check.slack == pytest.approx(math.sqrt(math.log(2000) / 12000))
    assert int(check.violated.sum()) == 0


def test_a_bound_that_is_too_small_is_caught() -> None:
    tokens = torch.stack([torch.eye(64)[0], torch.ones(64), torch.zeros(64)])
    check = monte_carlo_check(tokens, draws=20_000, alpha=0.001, seed=0, constant=0.15)
    assert check.violated.tolist() == [True, True, False]
    assert math.isnan(check.distance[2])
    with pytest.raises(UsageError, match="alpha"):
        monte_carlo_check(tokens, alpha=1.0)


def test_monte_carlo_distance_is_scipys() -> None:
    """Same signs as the check draws, one-sample Kolmogorov-Smirnov statistic by scipy."""
    token = randn(40)
    signs = seeds.generator("normality/signs", 4)
    bits = torch.randint(2, (500, 40), generator=signs, dtype=torch.int8)
    sums = (2 * bits.double() - 1) @ (token / token.norm())
    check = monte_carlo_check(1e200 * token[None], draws=500, seed=4)
    assert float(check.distance[0]) == pytest.approx(stats.kstest(sums.numpy(), "norm").statistic)


def test_channel_lyapunov() -> None:
    x = randn(50, 7).exp()
    centred = (x - x.mean(0)).numpy()
    expected = (np.abs(centred) ** 3).mean(0).sum() / centred.var(0).sum() ** 1.5
    assert channel_lyapunov(x) == pytest.approx(expected, rel=1e-12)
    assert channel_lyapunov(1e-200 * x) == pytest.approx(expected, rel=1e-12)
    # Channels of +-1 about any mean: n / n^(3/2).
    signs = torch.tensor([[1.0], [-1.0]]).repeat(5, 64) + torch.arange(64)
    assert channel_lyapunov(signs) == pytest.approx(1 / 8)
    assert math.isnan(channel_lyapunov(torch.ones(4, 3)))
    with pytest.raises(UsageError, match="two tokens"):
        channel_lyapunov(torch.ones(1, 3))


def test_multivariate_bound_by_eigendecomposition() -> None:
    token, k = randn(44), 5  # a matrix of order 44 that is not symmetric
    rows = hadamard_matrix(44)[:, :k].numpy().T
    X = rows * token.numpy() / math.sqrt(44)
    values, vectors = np.linalg.eigh(X @ X.T)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    expected = (42 * k**0.25 + 16) * (np.linalg.norm(root @ X, axis=0) ** 3).sum()
    assert multivariate_bound(token, k) == pytest.approx(expected, rel=1e-9)
    assert multivariate_bound(1e200 * token, k) == pytest.approx(expected, rel=1e-9)


def test_multivariate_bound_closed_forms() -> None:
    token = randn(144)
    assert multivariate_bound(token, 1) == pytest.approx(58 * bound_of(token) / SHEVTSOVA_2010)
    for k in (1, 2, 8, 144):
        flat = multivariate_bound(torch.ones(144), k)
        assert flat == pytest.approx((42 * k**0.25 + 16) * k**1.5 / 12)
        assert flat == pytest.approx(best_multivariate_bound(144, k))
        # At k = n every whitened column is a unit vector: equality for all tokens.
        assert flat < multivariate_bound(token, k) or k == 144
    assert multivariate_bound(torch.eye(144)[0], 2) == math.inf


def test_few_coordinates_are_informative() -> None:
    """58 / sqrt(n) < 1 needs n > 3364, so even a flat token of width 1152 gets nothing."""
    assert informative_coordinates(torch.ones(1152)) == 0
    assert informative_coordinates(torch.ones(4608)) == 1
    assert informative_coordinates(randn(4608)) == 0
    assert informative_coordinates(torch.ones(2**16)) == 2
    assert [best_multivariate_bound(n, 2) < 1 for n in (34_791, 34_792)] == [False, True]


def test_multivariate_bound_refuses() -> None:
    with pytest.raises(UsageError, match="1 <= k <= n"):
        multivariate_bound(torch.ones(8), 9)
    with pytest.raises(UsageError, match="all zero"):
        multivariate_bound(torch.zeros(8), 1)
    with pytest.raises(UnsupportedHadamardOrder):
        multivariate_bound(torch.ones(92), 1)


def test_decay_slope_equals_statsmodels() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    widths = np.repeat([64, 144, 384, 1152, 4608], 3)
    distances = widths**-0.7 * np.exp(0.1 * rng.standard_normal(15))
    fit = decay_slope(widths.tolist(), distances.tolist(), confidence=0.9)
    ols = sm.OLS(np.log(distances), sm.add_constant(np.log(widths))).fit()
    assert fit.slope == pytest.approx(ols.params[1])
    assert (fit.low, fit.high) == pytest.approx(tuple(ols.conf_int(0.1)[1]))
    assert fit.agrees_with(-0.72)
    assert not fit.agrees_with(-0.5)


def test_measured_rates() -> None:
    """Lattice steps make flat tokens decay as d^(-1/2); symmetric smooth sums decay as 1/d."""
    widths = [64, 144, 384, 1152]
    flat = decay_slope(widths, [exact_distance(torch.ones(n)) for n in widths])
    assert flat.slope == pytest.approx(-0.5, abs=0.002)
    smooth = [np.median([exact_distance(randn(n, seed=s)) for s in range(4)]) for n in widths]
    assert decay_slope(widths, smooth).slope == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize(
    ("widths", "distances"),
    [([1, 2], [1, 1]), ([1, 1, 2], [1, 1, 1]), ([1, 2, 3], [1, 0, 1]), ([1, 2, 3], [1, 1])],
)
def test_decay_slope_refuses(widths: list[float], distances: list[float]) -> None:
    with pytest.raises(UsageError, match="a decay needs"):
        decay_slope(widths, distances)
