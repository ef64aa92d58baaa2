"""Operators that `torch.compile` leaves whole: what it could not trace, or would trace for ever.

The bits of a layer are a tensor here, so that a new allocation is no new graph; a compiled model
would otherwise meet the recompile limit at its ninth. And torch 2.11 traces the autograd functions
behind them to gradients of zero. Eager code calls those functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robuq_bench.errors import ConfigError
from robuq_bench.hadamard.transform import hadamard_transform
from robuq_bench.quantization.activations import ActivationQuantizer, activation_quantizer
from robuq_bench.quantization.weights import fake_quantize_weight, weight_gradient


@torch.library.custom_op("robuq_bench::hadamard_transform", mutates_args=())
def transform(x: Tensor, inverse: bool) -> Tensor:
    """`hadamard_transform(x, inverse)` as one operator."""
    return hadamard_transform(x, inverse)


@transform.register_fake
def _(x: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember_direction(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _transform_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return transform(grad, not ctx.inverse), None


torch.library.register_autograd(
    "robuq_bench::hadamard_transform", _transform_gradient, setup_context=_remember_direction
)


def _quantizer(name: str) -> ActivationQuantizer:
    found = activation_quantizer(name)
    if found is None:
        raise ConfigError("activations are not quantized")
    return found


@torch.library.custom_op("robuq_bench::fake_quantize_tokens", mutates_args=())
def fake_quantize_tokens(x: Tensor, quantizer: str, bits: Tensor) -> Tensor:
    """`fake_quantize` of x [..., n] at the bits held by a tensor of one element on the CPU."""
    return _quantizer(quantizer).fake_quantize(x, int(bits))


@torch.library.custom_op("robuq_bench::fake_quantize_tokens_backward", mutates_args=())
def _fake_quantize_tokens_backward(grad: Tensor, x: Tensor, quantizer: str, bits: Tensor) -> Tensor:
    with torch.enable_grad():
        tokens = x.detach().requires_grad_()
        values = _quantizer(quantizer).fake_quantize(tokens, int(bits))
    (result,) = torch.autograd.grad(values, tokens, grad)
    return result.clone()  # an operator may not return its input, as the identity does


@fake_quantize_tokens.register_fake
def _(x: Tensor, quantizer: str, bits: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake_quantize_tokens_backward.register_fake
def _(grad: Tensor, x: Tensor, quantizer: str, bits: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _remember_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.quantizer, bits = inputs
    ctx.save_for_backward(x, bits)


def _tokens_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    x, bits = ctx.saved_tensors
    return _fake_quantize_tokens_backward(grad, x, ctx.quantizer, bits), None, None


torch.library.register_autograd(
    "robuq_bench::fake_quantize_tokens", _tokens_gradient, setup_context=_remember_tokens
)


@torch.library.custom_op("robuq_bench::fake_quantize_weight", mutates_args=())
def ternary(weight: Tensor, rule: str, dtype: torch.dtype, clamp: bool) -> Tensor:
    """`fake_quantize_weight(weight, rule, dtype, clamp)` for a quantizer other than "none"."""
    return fake_quantize_weight(weight, rule, dtype, clamp)


@ternary.register_fake
def _(weight: Tensor, rule: str, dtype: torch.dtype, clamp: bool) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _remember_rule(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.rule, _, ctx.clamp = inputs
    ctx.dtype = weight.dtype


def _ternary_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    grad = grad.to(ctx.dtype)
    return (weight_gradient(grad, ctx.rule) if ctx.clamp else grad), None, None, None


torch.library.register_autograd(
    "robuq_bench::fake_quantize_weight", _ternary_gradient, setup_context=_remember_rule
)
