"""Error ratios against quadrature, published optima and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from robuq_bench.errors import UsageError
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.normality.consequence import (
    BITS,
    QUANTIZERS,
    SETTINGS,
    Setting,
    error_ratios,
    gaussian_error,
)


@pytest.mark.parametrize(
    ("quantizer", "values"),
    [
        # Max (1960), tables I and II.
        ("robust-midrise", (0.3634, 0.1188, 0.03744, 0.01154)),
        ("lloyd-max", (0.3634, 0.1175, 0.03454, 0.009497)),
        ("robust-midtread", (0.3634, 0.150, 0.0408, 0.0119)),
    ],
)
def test_errors_on_the_normal_distribution(quantizer: str, values: tuple[float, ...]) -> None:
    for bits, value in zip((1, 2, 3, 4), values, strict=True):
        assert gaussian_error(quantizer, bits) == pytest.approx(value, rel=4e-3)


@pytest.mark.parametrize("bits", BITS)
def test_closed_form_equals_quadrature_of_the_real_quantizer(bits: int) -> None:
    """The quantizer is applied to a token with mean 0 and mean |x| = E|N|, so sigma-hat is 1."""
    for name in ("robust-midrise", "robust-midtread", "lloyd-max"):
        quantizer = token_grid(name)
        grid = norm.ppf((np.arange(400_000) + 0.5) / 400_000)
        x = torch.from_numpy(grid)
        error = (quantizer.fake_quantize(x, bits) - x).square().mean()
        assert gaussian_error(name, bits) == pytest.approx(float(error), rel=0.01)


def test_one_bit_by_quadrature() -> None:
    level = 0.7978845608028654  # sqrt(2 / pi)
    value, _ = quad(lambda t: (abs(t) - level) ** 2 * norm.pdf(t), -8, 8, points=[0])
    assert gaussian_error("robust-midrise", 1) == pytest.approx(value, rel=1e-9)
    # The optimum of one bit: 1 - 2 / pi (Max 1960).
    assert gaussian_error("robust-midrise", 1) == pytest.approx(1 - 2 / np.pi, rel=1e-12)


def test_wide_gaussian_tokens_have_ratio_one() -> None:
    tokens = torch.randn(400, 4608, generator=torch.Generator().manual_seed(0))
    ratios = error_ratios(tokens, tuple(Setting("robust-midrise", b) for b in (1, 2, 3, 4)))
    np.testing.assert_allclose(ratios.mean(0), 1.0, atol=0.01)


def test_ratios_are_the_definition() -> None:
    tokens = torch.randn(3, 96, dtype=torch.float64) * 5 + 2
    ratios = error_ratios(tokens)
    assert ratios.shape == (3, len(SETTINGS))
    x = tokens[1].numpy()
    low, high = x.min(), x.max()
    step = (high - low) / 7
    quantized = low + step * np.round((x - low) / step)
    expected = np.mean((x - quantized) ** 2) / x.var() / gaussian_error("robust-midrise", 3)
    assert ratios[1, SETTINGS.index(Setting("minmax", 3))] == pytest.approx(expected)
    step = np.abs(x).max() / 7
    expected = np.mean((x - step * np.round(x / step)) ** 2) / x.var()
    expected /= gaussian_error("robust-midrise", 4)
    assert ratios[1, SETTINGS.index(Setting("absmax", 4))] == pytest.approx(expected)


def test_degenerate_tokens_are_nan_and_the_rest_is_not() -> None:
    tokens = torch.randn(5, 64)
    tokens[0], tokens[1], tokens[2, 0], tokens[3, 5] = 0.0, 3.3, torch.inf, torch.nan
    ratios = error_ratios(tokens)
    assert np.isnan(ratios[:4]).all()
    assert np.isfinite(ratios[4]).all()


def test_heavy_tails_cost_more_and_no_fixed_grid_is_refused() -> None:
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((200, 1152))
    assert error_ratios(laplace, (Setting("robust-midrise", 4),)).mean() > 1.5
    assert set(QUANTIZERS) >= {"minmax", "absmax"}
    with pytest.raises(UsageError, match="no fixed grid"):
        gaussian_error("minmax", 4)
