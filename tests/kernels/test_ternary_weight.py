"""Fake-quantized ternary weights: kernel, reference and the library's composition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.ternary_weight import reference, triton
from robuq_bench.methods import method_class
from robuq_bench.methods.weights._codes import Codes
from robuq_bench.methods.weights._ternary import TernaryWeight

RULES = reference.RULES
SHAPES = [(5, 7), (3, 48), (13, 384), (9, 1152), (2, 4608), (1, 1), (3, 5000)]


def library(rule: str) -> TernaryWeight:
    """What fills the slot of a layer: the kernel computes the same."""
    return TernaryWeight(method_class("weight", rule), rule)


def quantize_weight(weight: Tensor, rule: str) -> Codes:
    return library(rule).codes(weight)


def weight_gradient(grad: Tensor, rule: str) -> Tensor:
    weight = torch.ones_like(grad).requires_grad_()
    (found,) = torch.autograd.grad(library(rule)(weight), weight, grad)
    return found


def weight_of(rows: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    weight = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 0, rows)[:, None]
    return weight.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_forward(rule: str, shape: tuple[int, int], device: torch.device) -> None:
    weight = weight_of(*shape, device)
    expected = quantize_weight(weight, rule)
    for function in (reference.ternary_weight, triton.ternary_weight):
        found = function(weight, rule)
        assert found.dtype == torch.float32
        # Sums in another order move the threshold by one unit; no weight here lies that close.
        assert torch.equal(found.sign().to(torch.int8), expected.codes)
        torch.testing.assert_close(found, expected.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_in_the_dtype_of_the_product(
    rule: str, dtype: torch.dtype, device: torch.device
) -> None:
    weight = weight_of(9, 144, device)
    found = triton.ternary_weight(weight, rule, dtype)
    assert found.dtype == dtype
    # Triton's interpreter cuts bfloat16 off where the GPU rounds to nearest.
    tolerance = 2**-7 if dtype == torch.bfloat16 and weight.device.type == "cpu" else 0.0
    expected = triton.ternary_weight(weight, rule).to(dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_zero_rows_ties_and_ones(rule: str, device: torch.device) -> None:
    weight = torch.zeros(4, 36, device=device)
    weight[1] = 1.0  # every |w| equals the mean
    weight[2, ::2] = -2.0
    weight[3, 0] = 1e-30
    expected = quantize_weight(weight, rule).dequantize()
    torch.testing.assert_close(triton.ternary_weight(weight, rule), expected, rtol=1e-6, atol=0)
    zeros = torch.zeros(3, 36, device=device)
    assert torch.equal(triton.ternary_weight(zeros, rule), zeros)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_visible(rule: str, device: torch.device) -> None:
    weight = weight_of(3, 36, device)
    weight[1, 4] = math.nan
    found = triton.ternary_weight(weight, rule).isnan()
    assert torch.equal(found, quantize_weight(weight, rule).scale.isnan().expand(3, 36))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward(rule: str, dtype: torch.dtype, device: torch.device) -> None:
    grad = (weight_of(7, 144, device) * 3).to(dtype)
    grad[0, :3] = torch.tensor([5.0, -5.0, math.nan])
    expected = weight_gradient(grad.float(), rule)
    for value in (grad, grad.t().contiguous().t()):
        for function in (reference.ternary_weight_backward, triton.ternary_weight_backward):
            found = function(value, rule, torch.float32)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device: torch.device) -> None:
    empty = torch.zeros(0, 36, device=device)
    for rule in RULES:
        assert triton.ternary_weight(empty, rule).shape == (0, 36)
        assert triton.ternary_weight_backward(empty, rule, torch.float32).shape == (0, 36)


def test_errors_say_what_is_supported(device: torch.device) -> None:
    weight = weight_of(3, 36, device)
    with pytest.raises(KernelInputError, match="ternary-twn, ternary-absmean"):
        triton.ternary_weight(weight, "binary")
    with pytest.raises(KernelInputError, match="must be float32"):
        triton.ternary_weight(weight.double(), "ternary-twn")
    with pytest.raises(KernelInputError, match="contiguous"):
        triton.ternary_weight(weight.t(), "ternary-twn")
    with pytest.raises(KernelInputError, match="up to 16384"):
        triton.ternary_weight(torch.zeros(1, 16385, device=device), "ternary-twn")
    with pytest.raises(KernelInputError, match="out_dtype"):
        triton.ternary_weight(weight, "ternary-twn", torch.float64)
    with pytest.raises(KernelInputError, match="must be bfloat16, float16, float32"):
        triton.ternary_weight_backward(weight.double(), "ternary-twn", torch.float32)
