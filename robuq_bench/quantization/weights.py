"""Ternary weight quantizers: codes and scale, and fake quantization for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robuq_bench.errors import ConfigError, suggest
from robuq_bench.quantization import cuda_path

#: Added to the absmean by BitNet b1.58 so that an all-zero matrix has codes 0.
ABSMEAN_EPS = 1e-5


class QuantizedWeight(NamedTuple):
    """Ternary `codes` [out, in] int8 in {-1, 0, 1} and `scale` [out, 1] or [1, 1]."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """`scale * codes` in the dtype of the scale, [out, in]."""
        return self.codes.to(self.scale.dtype).mul_(self.scale)


def _twn_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = weight.abs()
    threshold = magnitude.mean(1, keepdim=True).mul_(0.5)
    # A step function of a float keeps this vectorised on CPU, where boolean masks are not.
    keep = (magnitude - threshold).sign_().add_(1).clamp_(max=1)
    count = keep.sum(1, keepdim=True)
    scale = magnitude.mul_(keep).sum(1, keepdim=True).div_(count.clamp_(min=1))
    return keep.mul_(weight.sign()), scale


def _absmean_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().mean().reshape(1, 1)
    return (weight / (scale + ABSMEAN_EPS)).round_().clamp_(-1, 1), scale


_CODES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "ternary-twn": _twn_codes,
    "ternary-absmean": _absmean_codes,
}


def _codes_of(name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if name not in _CODES:
        raise ConfigError(f"unknown weights.quantizer {name!r}{suggest(name, [*_CODES, 'none'])}")
    return _CODES[name]


class _TernaryFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, name: str, dtype: torch.dtype, clamp: bool) -> Tensor:
        ctx.name, ctx.dtype, ctx.clamp = name, weight.dtype, clamp
        codes, scale = _CODES[name](_working(weight))
        return codes.mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.to(ctx.dtype)
        return (weight_gradient(grad, ctx.name) if ctx.clamp else grad), None, None, None


def _working(weight: Tensor) -> Tensor:
    """Statistics of half-precision weights are taken in float32."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def weight_gradient(grad: Tensor, name: str) -> Tensor:
    """Straight-through gradient: clamped element-wise to [-1, 1] for TWN, identity for absmean."""
    return grad.clamp(-1, 1) if name == "ternary-twn" else grad


def quantize_weight(weight: Tensor, name: str) -> QuantizedWeight:
    """Ternary codes and scale of a weight [out, in].

    - "ternary-twn" (RobuQ deployment fork; Li & Liu, "Ternary Weight Networks"): per output
      channel, τ = 0.5 mean|w|, code = sign(w) where |w| >= τ, scale = mean of |w| over those.
    - "ternary-absmean" (BitNet b1.58, arXiv 2402.17764): per tensor, α = mean|w|,
      code = RoundClip(w/(α + ε), -1, 1), scale = α.

    Computed in float32, or float64 for float64 weights, as is the scale returned.
    An all-zero row has codes 0; its scale is 0 under "ternary-twn".

    Raises:
        ConfigError: unknown quantizer name.
    """
    codes, scale = _codes_of(name)(_working(weight.detach()))
    return QuantizedWeight(codes.to(torch.int8), scale)


def fake_quantize_weight(
    weight: Tensor, name: str, dtype: torch.dtype | None = None, clamp: bool = True
) -> Tensor:
    """Differentiable `quantize_weight(weight, name).dequantize()`; "none" returns the weight.

    `dtype` is that of the result, by default the weight's. `clamp` False leaves the clamp of
    `weight_gradient` to the caller. On CUDA a kernel computes it where one can, see `cuda_path`.
    """
    dtype = dtype or weight.dtype
    if name == "none":
        return weight.to(dtype)
    _codes_of(name)
    if clamp and cuda_path.weight_reason(weight, name) is None:
        return cuda_path.ternary_weight(weight, name, dtype)
    if torch.compiler.is_compiling():
        from robuq_bench.quantization import compiled

        return compiled.ternary(weight, name, dtype, clamp)
    result: Tensor = _TernaryFakeQuantize.apply(weight, name, dtype, clamp)
    return result
