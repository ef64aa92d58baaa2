"""Per-token normality statistics against scipy, statsmodels, published cases and invariances."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, special, stats
from statsmodels.datasets import macrodata
from statsmodels.stats.diagnostic import lilliefors, normal_ad

from kernels import cpu_library
from robuq_bench.errors import UsageError
from robuq_bench.normality import statistics
from robuq_bench.normality.statistics import (
    TokenStatistics,
    computed_by,
    shapiro_wilk,
    token_statistics,
)
from robuq_bench.normality.token_sums import tensor_sums, window_length

Floats = NDArray[np.float64]

#: Even, odd, both sides of Royston's change of fit at 11, the widths of DiT, and his last n.
LENGTHS = [8, 9, 10, 11, 12, 13, 50, 101, 384, 1152, 4608, 5000]
ARRAYS = [name for name in TokenStatistics._fields if name not in ("n", "degenerate")]
P_VALUES = [name for name in ARRAYS if name.endswith("_p")]


@pytest.fixture(scope="module", autouse=True, params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test with the compiled kernels, and again without."""
    with pytest.MonkeyPatch.context() as patch:
        compiled = request.param == "compiled"
        chosen = request.getfixturevalue("library_path") if compiled else "off"
        patch.setenv(cpu_library.PATH_VARIABLE, chosen)
        assert computed_by() == request.param
        yield request.param


def samples(n: int, seed: int = 0) -> Floats:
    """[8, n]: normal tokens, then shifted, uniform, skewed and heavy-tailed ones."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            *rng.normal(size=(3, n)),
            rng.normal(5.0, 3.0, n),
            rng.uniform(size=n),
            np.abs(rng.normal(size=n)),
            rng.laplace(size=n),
            rng.lognormal(size=n),
        ]
    )


def of(x: Floats) -> TokenStatistics:
    return token_statistics(torch.from_numpy(np.atleast_2d(x)))


def direct_anderson(x: Floats) -> float:
    """A^2 from its definition with logarithms of both tails (statsmodels cancels beyond z = 5)."""
    z = np.sort((x - x.mean()) / x.std(ddof=1))
    i = np.arange(1, len(x) + 1)
    terms = (2 * i - 1) * (special.log_ndtr(z) + special.log_ndtr(-z[::-1]))
    return float(-len(x) - terms.mean())


@pytest.mark.parametrize("n", LENGTHS)
def test_agrees_with_one_token_at_a_time(n: int) -> None:
    X = samples(n)
    found = of(X)
    expected: dict[str, list[float]] = {name: [] for name in ARRAYS if name != "wasserstein"}
    for x in X:
        s = x.std(ddof=1)
        reference = {
            "mean": x.mean(),
            "std": s,
            "anderson_a2": direct_anderson(x),
            "anderson_p": normal_ad(x)[1],
            "skewness": stats.skew(x),
            "excess_kurtosis": stats.kurtosis(x),
            "negentropy": 0.5 * math.log(2 * math.pi * math.e * s * s)
            - stats.differential_entropy(x, window_length=window_length(n), method="vasicek"),
            "l3": (np.abs(x) ** 3).sum() / (x @ x) ** 1.5,
        }
        reference["shapiro_w"], reference["shapiro_p"] = stats.shapiro(x)
        reference["ks_distance"], reference["lilliefors_p"] = lilliefors(x)
        reference["dagostino_k2"], reference["dagostino_p"] = stats.normaltest(x)
        for name, value in reference.items():
            expected[name].append(float(value))
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(found, name), values, rtol=1e-10, atol=1e-10, err_msg=name
        )
    assert found.n == n
    assert not found.degenerate.any()


@pytest.mark.parametrize("n", [8, 144, 1000, 4608])
def test_p_values_are_those_of_statsmodels_row_by_row(n: int) -> None:
    """Tokens from normal to skewed, so that p runs through all of Lilliefors' table."""
    X = np.random.default_rng(n).normal(size=(200, n))
    X = np.where(X > 0, 1 + np.linspace(0, 2, 200)[:, None], 1) * X
    found = of(X)
    expected = np.array([lilliefors(x) for x in X])
    np.testing.assert_allclose(found.ks_distance, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(found.lilliefors_p, expected[:, 1], atol=1e-9)
    assert (expected[:, 1] > 0.5).any()
    assert (expected[:, 1] < 0.01).any()
    np.testing.assert_allclose(found.anderson_p, [normal_ad(x)[1] for x in X], rtol=1e-7)


def test_lilliefors_p_ends_with_the_table() -> None:
    ends = statistics.lilliefors_p(np.array([0.0, 0.02, 0.4, 1.0]), 100)
    np.testing.assert_array_equal(ends, [0.99, 0.99, 0.001, 0.001])


def test_anderson_is_that_of_statsmodels() -> None:
    X = np.random.default_rng(3).normal(size=(20, 200))
    np.testing.assert_allclose(of(X).anderson_a2, [normal_ad(x)[0] for x in X], atol=1e-10)


def test_skewness_and_kurtosis_scores_are_those_of_scipy() -> None:
    X = samples(64)
    squares = (
        stats.skewtest(X, axis=1).statistic ** 2 + stats.kurtosistest(X, axis=1).statistic ** 2
    )
    np.testing.assert_allclose(of(X).dagostino_k2, squares, rtol=1e-10)


# Royston's W and p of these are pinned by scipy's and R's own tests; x4 is from the paper of 1995.
PUBLISHED_SHAPIRO = [
    (
        "0.11 7.87 4.61 10.14 7.95 3.14 0.46 4.43 0.21 4.75 "
        "0.71 1.52 3.24 0.93 0.42 4.97 9.53 4.55 0.47 6.66",
        (0.90047299861907959, 1e-6),
        (0.042089745402336121, 1e-6),
    ),
    (
        "1.36 1.14 2.92 2.55 1.46 1.06 5.27 -1.11 3.48 1.10 "
        "0.88 -0.51 1.46 0.52 6.20 1.69 0.08 3.67 2.81 3.49",
        (0.9590270, 1e-6),
        (0.52460, 1e-3),
    ),
    (
        "0.139 0.157 0.175 0.256 0.344 0.413 0.503 0.577 0.614 0.655 0.954 1.392 1.557 1.648 "
        "1.690 1.994 2.174 2.206 3.245 3.510 3.571 4.354 4.980 6.084 8.351",
        (0.83467, 1e-5),
        (0.000914, 1e-6),
    ),
    # Weights of eleven men, the worked example of Shapiro and Wilk (1965): W = 0.79.
    ("148 154 158 160 161 162 166 170 182 195 236", (0.79, 5e-3), (0.006704, 1e-5)),
]


@pytest.mark.parametrize(("data", "w", "p"), PUBLISHED_SHAPIRO)
def test_published_shapiro_cases(data: str, w: tuple[float, float], p: tuple[float, float]) -> None:
    found = of(np.array(data.split(), dtype=float))
    assert found.shapiro_w[0] == pytest.approx(w[0], abs=w[1])
    assert found.shapiro_p[0] == pytest.approx(p[0], abs=p[1])


def growth_residuals() -> Floats:
    """Residuals of the regression on US macro data that R's nortest was run on for statsmodels."""
    d = macrodata.load_pandas().data
    investment, output = (
        400 * np.diff(np.log(d[name].to_numpy())) for name in ("realinv", "realgdp")
    )
    design = np.column_stack([np.ones(len(output)), output, d["realint"].to_numpy()[:-1]])
    return investment - design @ np.linalg.lstsq(design, investment)[0]


def test_published_anderson_and_lilliefors_cases() -> None:
    """ad.test and lillie.test of R's nortest, all residuals and the first twenty."""
    residuals = growth_residuals()
    found, few = of(residuals), of(residuals[:20])
    assert found.anderson_a2[0] == pytest.approx(1.602209621518313, abs=1e-10)
    assert found.anderson_p[0] == pytest.approx(0.0003937979149362316, abs=1e-11)
    assert found.ks_distance[0] == pytest.approx(0.0723390908786589, abs=1e-10)
    assert few.anderson_a2[0] == pytest.approx(0.3017073732210775, abs=1e-10)
    assert few.anderson_p[0] == pytest.approx(0.5443499281265933, abs=1e-10)
    assert few.ks_distance[0] == pytest.approx(0.1333956004203103, abs=1e-10)


@pytest.mark.parametrize(
    ("a2_star", "alpha"), [(0.631, 0.10), (0.752, 0.05), (0.873, 0.025), (1.035, 0.01)]
)
def test_anderson_p_meets_stephens_critical_values(a2_star: float, alpha: float) -> None:
    """D'Agostino and Stephens (1986), table 4.7, case 3; the p formula is a fit to about 2 %."""
    n = 500
    a2 = np.array([a2_star / (1 + 0.75 / n + 2.25 / n**2)])
    assert statistics.anderson_p(a2, n)[0] == pytest.approx(alpha, rel=0.025)


@pytest.mark.parametrize("n", [8, 11, 50, 1152])
def test_wasserstein_is_the_integral_of_the_cdf_difference(n: int) -> None:
    X = samples(n)
    for x, found in zip(X, of(X).wasserstein, strict=True):
        z = np.sort((x - x.mean()) / x.std(ddof=1))
        # Pieces between the order statistics, split where Phi crosses the step.
        steps = np.arange(n + 1) / n
        edges = np.concatenate([[-np.inf], z, [np.inf]])
        total = 0.0
        for k, step in enumerate(steps):
            lower, upper = edges[k], edges[k + 1]
            cross = min(max(float(special.ndtri(step)), lower), upper)
            for a, b in ((lower, cross), (cross, upper)):
                if a < b:
                    # Antiderivative of Phi is z Phi(z) + phi(z): no quadrature error per piece.
                    total += abs(_integral_of_difference(a, b, step))
        assert found == pytest.approx(total, abs=1e-10)


def _integral_of_difference(a: float, b: float, step: float) -> float:
    def primitive(t: float) -> float:
        if math.isinf(t):
            return 0.0
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        # Towards +inf, Phi - 1 is the integrable one.
        return t * (float(special.ndtr(t)) - step) + density

    return primitive(b) - primitive(a)


def test_wasserstein_by_quadrature() -> None:
    x = samples(12)[5]
    z = np.sort((x - x.mean()) / x.std(ddof=1))

    def difference(t: float) -> float:
        return abs(np.searchsorted(z, t, side="right") / len(z) - float(special.ndtr(t)))

    expected, _ = integrate.quad(difference, -9, 9, points=[*z], limit=2000, epsabs=1e-10)
    assert of(x).wasserstein[0] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n", [8, 13, 384, 1152, 4608])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_path_of_cuda_equals_the_cpu_path(n: int, dtype: torch.dtype) -> None:
    x = torch.from_numpy(samples(n)).to(dtype)
    x[1] = 2.0
    x[2, 3] = math.nan
    x[3, 5] = 1e4
    cpu = statistics._sums(x)
    other = tensor_sums(x.sort(dim=1).values)
    assert cpu.valid.tolist() == [True, False, False, True, True, True, True, True]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for name, a, b in zip(cpu._fields, cpu, other, strict=True):
        np.testing.assert_allclose(
            a[cpu.valid],
            b[cpu.valid],
            rtol=1e-5 if tolerance > 1e-5 else 1e-10,
            atol=tolerance,
            err_msg=name,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("n", [384, 1152, 4608])
def test_cuda_equals_cpu(n: int) -> None:
    x = torch.from_numpy(samples(n))
    on_cpu, on_cuda = token_statistics(x), token_statistics(x.cuda())
    for name in ARRAYS:
        np.testing.assert_allclose(
            getattr(on_cuda, name), getattr(on_cpu, name), rtol=1e-9, atol=1e-9, err_msg=name
        )


@pytest.mark.parametrize("n", [384, 1152, 4608])
def test_float32_tokens_lose_nothing(n: int) -> None:
    x = torch.randn(64, n, generator=torch.Generator().manual_seed(1))
    for single, double in zip(token_statistics(x), token_statistics(x.double()), strict=True):
        np.testing.assert_array_equal(single, double)


def test_blocks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.from_numpy(np.concatenate([samples(40, seed) for seed in range(4)]))
    whole = token_statistics(X)
    for path in ("COMPILED", "NUMPY"):
        monkeypatch.setattr(statistics, f"_{path}_BLOCK", 40 * 5)
    for a, b in zip(whole, token_statistics(X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_type_one_rate_on_normal_tokens() -> None:
    X = torch.randn(2000, 200, generator=torch.Generator().manual_seed(5))
    found = token_statistics(X)
    rates = {name: float(np.mean(getattr(found, name) < 0.05)) for name in P_VALUES}
    assert len(rates) == 4
    assert all(0.035 <= rate <= 0.065 for rate in rates.values()), rates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_normals_to_half_is_not_rejected(dtype: torch.dtype) -> None:
    X = torch.randn(400, 5000, generator=torch.Generator().manual_seed(6)).to(dtype)
    found = token_statistics(X)
    assert np.isfinite(found.negentropy).all()
    rates = {name: float(np.mean(getattr(found, name) < 0.05)) for name in P_VALUES}
    assert all(rate <= 0.08 for rate in rates.values()), rates


@pytest.mark.parametrize("make", [torch.distributions.Laplace, torch.distributions.Uniform])
def test_power_against_other_shapes(make: type) -> None:
    torch.manual_seed(0)
    X = make(torch.tensor(0.0), torch.tensor(1.0)).sample((50, 1000))
    found = token_statistics(X)
    for name in P_VALUES:
        assert np.mean(getattr(found, name) < 0.05) > 0.95, name


def test_degenerate_tokens_are_flagged_and_nan() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[1] = 0.0
    x[2] = -7.5
    x[3, 10] = math.inf
    x[4, 11] = -math.inf
    x[5, 12] = math.nan
    x[6] = math.nan
    x[7] = 0.0
    x[7, 0] = 5e-324  # its standard deviation is below the smallest float64
    found = token_statistics(x)
    assert found.degenerate.tolist() == [False, *[True] * 7, False]
    for name in ARRAYS:
        values = getattr(found, name)
        assert values.shape == (9,)
        assert values.dtype == np.float64
        np.testing.assert_array_equal(np.isnan(values), found.degenerate, err_msg=name)
    assert found.degenerate.dtype == np.bool_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [8, 1152, 4608])
def test_one_hot_and_few_valued_tokens_are_defined(n: int, dtype: torch.dtype) -> None:
    """A single outlier has z = sqrt(n): its tail probability underflows in either dtype."""
    x = torch.zeros(2, n, dtype=dtype)
    x[0, 3] = 1.0
    x[1, ::2] = 1.0
    found = token_statistics(x)
    assert not found.degenerate.any()
    assert found.l3[0] == pytest.approx(1.0)
    assert (found.negentropy == np.inf).all() or n == 8
    for name in ARRAYS:
        assert not np.isnan(getattr(found, name)).any(), name
    z_edge = direct_anderson(x[0].double().numpy())
    assert found.anderson_a2[0] == pytest.approx(z_edge, rel=1e-6)


@pytest.mark.parametrize("n", [127, 200])
@pytest.mark.parametrize("kernels", ["", "off"])
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-11, 1e11, 1e25, 1e37])
def test_float32_scale_extremes(
    n: int, kernels: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:
        monkeypatch.setenv("ROBUQ_CPU_KERNELS", kernels)
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(4))
    plain, scaled = token_statistics(x), token_statistics(x * scale)
    tolerance = 1e-3 if scale < 1e-37 else 1e-6  # 1e-40 is a denormal with few digits
    names = ("shapiro_w", "l3", "anderson_a2", "wasserstein", "negentropy")
    # Equal denormals have no spacing between them, which the entropy is made of.
    for name in names if scale > 1e-37 else names[:-1]:
        np.testing.assert_allclose(getattr(scaled, name), getattr(plain, name), rtol=tolerance)


def test_p_of_shapiro_is_refused_above_5000() -> None:
    x = torch.randn(3, 5001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = token_statistics(x)
    assert np.isnan(found.shapiro_p).all()
    assert (found.shapiro_w > 0.99).all()
    assert not found.degenerate.any()


@pytest.mark.parametrize("n", [*LENGTHS, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapiro_alone_is_that_of_all_statistics(n: int, dtype: torch.dtype, path: str) -> None:
    rows = [samples(n), samples(n, 1) * 1e35, np.full((1, n), 2.0), np.full((1, n), np.nan)]
    x = torch.from_numpy(np.concatenate(rows)).to(dtype)
    x[-1, 1:] = 0.0
    w, p = shapiro_wilk(x)
    every = token_statistics(x)
    tolerance = 0 if path == "numpy" else 1e-12
    np.testing.assert_allclose(w, every.shapiro_w, rtol=tolerance)
    np.testing.assert_allclose(p, every.shapiro_p, rtol=tolerance * 1e4)
    assert np.isnan(w[-2:]).all()
    assert np.isfinite(w[:-2]).all()


def test_no_tokens() -> None:
    found = token_statistics(torch.empty(0, 16))
    assert [a.shape for a in shapiro_wilk(torch.empty(0, 16))] == [(0,), (0,)]
    assert all(getattr(found, name).shape == (0,) for name in [*ARRAYS, "degenerate"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(20), "matrix"),
        (torch.zeros(2, 3, 20), "matrix"),
        (torch.zeros(3, 20, dtype=torch.int64), "floating point"),
        (torch.zeros(3, 7), "at least 8"),
    ],
)
def test_wrong_input_is_named(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        token_statistics(tokens)
    with pytest.raises(UsageError, match=message):
        shapiro_wilk(tokens)


def test_half_types_gradients_and_strides_are_accepted() -> None:
    x = torch.randn(32, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = token_statistics(x.T.contiguous().float())
    found = token_statistics(x.T.requires_grad_())
    np.testing.assert_array_equal(found.shapiro_w, expected.shapiro_w)


@settings(max_examples=40)
@given(
    n=st.integers(8, 90),
    seed=st.integers(0, 10_000),
    shift=st.floats(-50, 50),
    scale=st.floats(1e-6, 1e6),
)
def test_affine_maps_and_permutations_change_nothing(
    n: int, seed: int, shift: float, scale: float
) -> None:
    """Except mean, std and L3; a reflection negates the skewness alone."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size=n)
    found = of(np.stack([x, rng.permutation(x), scale * (x + shift), -x]))
    for name in ARRAYS:
        values = getattr(found, name)
        np.testing.assert_allclose(values[1], values[0], rtol=1e-10, atol=1e-12, err_msg=name)
        if name in ("mean", "std", "l3"):
            continue
        np.testing.assert_allclose(values[2], values[0], rtol=1e-8, atol=1e-9, err_msg=name)
        sign = -1 if name == "skewness" else 1
        np.testing.assert_allclose(values[3], sign * values[0], rtol=1e-8, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found.std[2], scale * found.std[0], rtol=1e-10)


@settings(max_examples=40)
@given(n=st.integers(8, 200), seed=st.integers(0, 10_000))
def test_bounds(n: int, seed: int) -> None:
    """W in (0, 1], p in [0, 1], distances above 1/(2n), L3 in [n^-1/2, 1]."""
    x = np.round(np.random.default_rng(seed).standard_cauchy(size=(3, n)), 1)
    found = of(x)
    assert ((found.shapiro_w > 0) & (found.shapiro_w <= 1)).all()
    for name in P_VALUES:
        assert ((getattr(found, name) >= 0) & (getattr(found, name) <= 1)).all(), name
    assert ((found.ks_distance >= 0.5 / n - 1e-15) & (found.ks_distance < 1)).all()
    assert (found.wasserstein > 0).all()
    assert ((found.l3 >= n**-0.5 - 1e-12) & (found.l3 <= 1 + 1e-12)).all()


def test_negentropy_sees_the_tails_of_t5_where_the_usual_window_does_not() -> None:
    t = stats.t(5)
    truth = 0.5 * math.log(2 * math.pi * math.e * t.var()) - float(t.entropy())
    rng = np.random.default_rng(0)
    for n, allowed in ((144, 0.35), (1152, 0.12), (4608, 0.08)):
        heavy, normal = t.rvs((400, n), random_state=rng), rng.standard_normal((400, n))
        found = of(heavy).negentropy.mean() - of(normal).negentropy.mean()
        assert found == pytest.approx(truth, rel=allowed)
        usual = [
            (0.5 * np.log(2 * np.pi * np.e * x.var(axis=1, ddof=1))
             - stats.differential_entropy(x, axis=1, method="vasicek")).mean()
            for x in (heavy, normal)
        ]  # fmt: skip
        assert abs(found - truth) < 0.5 * abs(usual[0] - usual[1] - truth)
