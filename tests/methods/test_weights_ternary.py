"""Ternary weights against the published rules written in plain numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench.errors import ConfigError
from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._codes import Codes
from robuq_bench.methods.weights._ternary import TernaryWeight

NAMES = ("ternary-twn", "ternary-absmean", "ternary-optimal")


def fitted(name: str, weight: Tensor) -> TernaryWeight:
    """What fills the slot of a layer with this weight."""
    module = read_method("weight", name).fit(weight.detach(), Site("a"))
    assert isinstance(module, TernaryWeight)
    assert not module.state_dict()
    return module


def quantize_weight(weight: Tensor, name: str) -> Codes:
    return fitted(name, weight).codes(weight)


def fake_quantize_weight(weight: Tensor, name: str) -> Tensor:
    found: Tensor = fitted(name, weight)(weight)
    return found


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


@given(columns=st.integers(1, 7), seed=st.integers(0, 9999), ties=st.booleans())
@settings(max_examples=60)
def test_optimal_is_the_best_of_all_ternary_rows(columns: int, seed: int, ties: bool) -> None:
    """Against every code there is, each at its least-squares scale."""
    weight = randn(2, columns, seed=seed)
    weight = weight.round() if ties else weight
    every = np.array(list(itertools.product((-1, 0, 1), repeat=columns)), float)
    found = fake_quantize_weight(weight, "ternary-optimal").numpy()
    for row, own in zip(weight.numpy(), found, strict=True):
        scale = every @ row / np.maximum((every**2).sum(1), 1)
        best = ((row - scale[:, None] * every) ** 2).sum(1).min()
        assert ((row - own) ** 2).sum() == pytest.approx(best, rel=1e-9, abs=1e-12)


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
    if name != "ternary-absmean":
        assert float(quantized.scale[1]) == 0
    assert not quantize_weight(torch.zeros(2, 3), name).dequantize().any()


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    """Rules per row clamp the upstream gradient to [-1, 1] by element; absmean passes it."""
    weight = randn(5, 16).requires_grad_()
    upstream = 3 * randn(5, 16, seed=1)
    fake_quantize_weight(weight, name).backward(upstream)
    assert weight.grad is not None
    expected = upstream if name == "ternary-absmean" else upstream.clamp(-1, 1)
    assert torch.equal(weight.grad, expected)


def test_the_clamp_can_be_left_to_the_optimizers_step() -> None:
    """`defer_gradient_clamp` clears `clamps_in_backward`: the gradient passes whole."""
    weight = randn(5, 16).requires_grad_()
    module = fitted("ternary-twn", weight)
    module.clamps_in_backward = False
    upstream = 3 * randn(5, 16, seed=1)
    module(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_of_the_product(name: str) -> None:
    weight = randn(5, 16).float().requires_grad_()
    found = fitted(name, weight)(weight, torch.float16)
    assert torch.equal(found, fake_quantize_weight(weight, name).half())
    upstream = randn(5, 16, seed=1).half() / 4
    found.backward(upstream)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, upstream.float())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    weight = randn(8, 4096).bfloat16()
    wide, half = quantize_weight(weight.float(), name), quantize_weight(weight, name)
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.codes, wide.codes)
    assert torch.equal(half.scale, wide.scale)
    assert torch.equal(fake_quantize_weight(weight, name), wide.dequantize().bfloat16())


@pytest.mark.parametrize(
    ("name", "scales"), [("ternary-twn", 7), ("ternary-absmean", 1), ("ternary-optimal", 7)]
)
def test_bits(name: str, scales: int) -> None:
    """log2(3) bits a code, and 16 for each scale."""
    method = read_method("weight", name)
    assert method.nominal_bits() == pytest.approx(np.log2(3))
    assert method.storage_bits(7, 12) == pytest.approx(7 * 12 * np.log2(3) + 16 * scales)
    with pytest.raises(ConfigError, match=f"'{name}' has no bits to choose"):
        method.with_bits(2)


def test_none_and_unknown_names() -> None:
    assert read_method("weight", "none") is None
    with pytest.raises(ConfigError, match="did you mean 'ternary-twn'"):
        read_method("weight", "ternary-tvn")
