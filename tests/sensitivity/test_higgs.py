"""HIGGS: exact on a linear model, and its fit against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from making import quantized
from torch import Tensor, nn

from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.hadamard.rotation import rotate
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity import (
    CalibrationBatch,
    LinearFit,
    higgs,
    linearity,
    local_errors,
)
from robuq_bench.sensitivity.higgs import fit_through_origin


class Chain(nn.Module):
    """eps = b(a(x)), both layers rotated; linear but for the activation quantizers."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = self._layer("a", gain), self._layer("b", 1.0)

    @staticmethod
    def _layer(name: str, gain: float) -> QuantizedLinear:
        linear = nn.Linear(16, 16).double()
        with torch.no_grad():
            linear.weight.mul_(gain)
        return quantized(linear, name, weight="none", rank=2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x))


def tokens(count: int = 40) -> list[CalibrationBatch]:
    x = torch.randn(count, 1, 3, 16, generator=torch.Generator().manual_seed(2)).double()
    index = torch.zeros(count, dtype=torch.int64)
    parts = zip(x.split(16), index.split(16), index.split(16), strict=True)
    return [CalibrationBatch(*part) for part in parts]


def test_fit_through_the_origin_matches_numpy() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0.1, 1, 6)
    e = 3 * x + generator.normal(0, 0.1, 6)
    fit = fit_through_origin(x.tolist(), e.tolist())
    (alpha,), residual, *_ = np.linalg.lstsq(x[:, None], e, rcond=None)
    assert fit.alpha == pytest.approx(alpha)
    assert fit.r_squared == pytest.approx(1 - residual[0] / ((e - e.mean()) ** 2).sum())
    assert fit_through_origin([1.0, 2.0], [0.0, 0.0]).r_squared == 1.0
    assert fit_through_origin([1.0, 2.0], [1.0, 1.0]).r_squared == 0.0
    for bad in (([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(UsageError, match="two different levels"):
            fit_through_origin(*bad)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_linear_model_is_fitted_exactly(name: str) -> None:
    model, batches = Chain(), tokens(1000)
    fit = linearity(model, name, batches, noise_levels=(0.1, 0.3, 1.0))
    assert fit.r_squared == pytest.approx(1.0, abs=1e-6)  # predictions are float32
    assert fit.relative == pytest.approx([0.01, 0.09, 1.0], rel=0.02)
    # Expected: noise energy per entry of a token times the squared norm of the map behind it.
    model.eval()
    with torch.no_grad():
        weight = model.a.quantized_weight()
        behind = model.b.quantized_weight() + model.b.branch.up @ model.b.branch.down
        rotation = model.b.rotation.signs
        x = torch.cat([batch.x_t for batch in batches])
        if name == "a":
            jacobian = behind @ rotate(weight.T, rotation).T
            energy = x.square().sum()
        else:
            jacobian = model.b.quantized_weight()
            model.a.activation_bits = None
            energy = model.a(x).square().sum()
    expected = (energy / 16 * jacobian.square().sum() / x.numel()).detach()
    assert fit.alpha == pytest.approx(expected.item(), rel=0.02)


def test_the_coefficient_scales_with_the_gain() -> None:
    one, two = (linearity(Chain(gain), "a", tokens()) for gain in (1.0, 2.0))
    assert two.alpha == pytest.approx(4 * one.alpha, rel=1e-5)


def test_the_metric_is_coefficient_times_relative_error() -> None:
    model, batches = Chain(), tokens()
    fits: dict[str, LinearFit] = {}
    found = higgs(model, ["a", "b"], [1, 2], batches, seed=3, on_detail=fits.__setitem__)
    errors = local_errors(model, ["a", "b"], [1, 2], batches)
    for name in ("a", "b"):
        assert fits[name] == linearity(model, name, batches, seed=3)
        for bits in (1, 2):
            expected = fits[name].alpha * errors[name].relative_error(bits)
            assert found[name][bits] == pytest.approx(expected)
    assert linearity(model, "a", batches, seed=4) != fits["a"]


def test_a_dit_is_nearly_linear_at_small_noise(subject: Any) -> None:
    model, _, layers, batches, _ = subject
    for name in layers:
        fit = linearity(model, name, batches, noise_levels=(0.01, 0.02, 0.05))
        assert fit.r_squared > 0.99
        assert fit.alpha > 0


def test_impossible_noise_is_refused() -> None:
    for levels in ((0.1,), (0.1, 0.1), (0.0, 0.1)):
        with pytest.raises(UsageError, match="noise levels"):
            linearity(Chain(), "a", tokens(), noise_levels=levels)
    (batch,) = tokens(4)
    silent = [CalibrationBatch(0 * batch.x_t, batch.t, batch.y)]
    with pytest.raises(RobuqError, match="all zero"):
        linearity(Chain(), "a", silent)
