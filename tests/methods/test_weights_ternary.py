"""Ternary weights against the published rules written in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench.errors import ConfigError
from robuq_bench.quantization.weights import fake_quantize_weight, quantize_weight

NAMES = ("ternary-twn", "ternary-absmean")


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def twn(weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row by row: threshold at half the mean magnitude, scale = mean magnitude of what is kept."""
    codes, scales = np.zeros_like(weight), np.zeros((len(weight), 1))
    for i, row in enumerate(weight):
        keep = np.abs(row) >= 0.5 * np.abs(row).mean()
        codes[i, keep] = np.sign(row[keep])
        scales[i] = np.abs(row[keep]).mean()
    return codes, scales


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), seed=st.integers(0, 9999))
@settings(max_examples=60)
def test_twn_is_the_rule_per_channel(rows: int, columns: int, seed: int) -> None:
    weight = randn(rows, columns, seed=seed) * torch.arange(1, rows + 1)[:, None]
    codes, scale = twn(weight.numpy())
    quantized = quantize_weight(weight, "ternary-twn")
    assert quantized.codes.dtype == torch.int8
    np.testing.assert_array_equal(quantized.codes.numpy(), codes)
    np.testing.assert_allclose(quantized.scale.numpy(), scale, rtol=1e-12)
    np.testing.assert_allclose(quantized.dequantize().numpy(), codes * scale, rtol=1e-12)


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), seed=st.integers(0, 9999))
@settings(max_examples=60)
def test_absmean_is_the_rule_per_tensor(rows: int, columns: int, seed: int) -> None:
    weight = randn(rows, columns, seed=seed).numpy()
    alpha = np.abs(weight).mean()
    quantized = quantize_weight(torch.from_numpy(weight), "ternary-absmean")
    expected = np.clip(np.round(weight / (alpha + 1e-5)), -1, 1)
    np.testing.assert_array_equal(quantized.codes.numpy(), expected)
    assert quantized.scale.shape == (1, 1)
    assert float(quantized.scale) == pytest.approx(alpha, rel=1e-12)


def test_threshold_itself_is_kept_by_twn() -> None:
    """Magnitudes 1, 1, 4, 2 have mean 2, so 1 sits on the threshold: all four are kept."""
    quantized = quantize_weight(torch.tensor([[1.0, -1.0, 4.0, -2.0]]), "ternary-twn")
    assert quantized.codes.tolist() == [[1, -1, 1, -1]]
    assert quantized.scale.tolist() == [[2.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fake_quantization_is_dequantized_codes(name: str, dtype: torch.dtype) -> None:
    weight = randn(8, 36).to(dtype)
    before = weight.clone()
    quantized = quantize_weight(weight, name)
    assert set(quantized.codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(fake_quantize_weight(weight, name), quantized.dequantize())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows(name: str) -> None:
    weight = randn(4, 12)
    weight[1] = 0
    quantized = quantize_weight(weight, name)
    assert not quantized.codes[1].any()
    assert bool(quantized.dequantize().isfinite().all())
    if name == "ternary-twn":
        assert float(quantized.scale[1]) == 0
    assert not quantize_weight(torch.zeros(2, 3), name).dequantize().any()


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    """TWN clamps the upstream gradient to [-1, 1] element by element; absmean passes it."""
    weight = randn(5, 16).requires_grad_()
    upstream = 3 * randn(5, 16, seed=1)
    fake_quantize_weight(weight, name).backward(upstream)
    assert weight.grad is not None
    expected = upstream.clamp(-1, 1) if name == "ternary-twn" else upstream
    assert torch.equal(weight.grad, expected)


def test_none_and_unknown_names() -> None:
    weight = randn(2, 3)
    assert fake_quantize_weight(weight, "none") is weight
    for call in (fake_quantize_weight, quantize_weight):
        with pytest.raises(ConfigError, match="did you mean 'ternary-twn'"):
            call(weight, "ternary-tvn")
