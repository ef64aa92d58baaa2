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
    def forward(ctx: Any, weight: Tensor, name: str) -> Tensor:
        ctx.name = name
        codes, scale = _CODES[name](weight)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return weight_gradient(grad, ctx.name), None


def weight_gradient(grad: Tensor, name: str) -> Tensor:
    """Straight-through gradient: clamped element-wise to [-1, 1] for TWN, identity for absmean."""
    return grad.clamp(-1, 1) if name == "ternary-twn" else grad


def quantize_weight(weight: Tensor, name: str) -> QuantizedWeight:
    """Ternary codes and scale of a weight [out, in].

    - "ternary-twn" (RobuQ deployment fork; Li & Liu, "Ternary Weight Networks"): per output
      channel, τ = 0.5 mean|w|, code = sign(w) where |w| >= τ, scale = mean of |w| over those.
    - "ternary-absmean" (BitNet b1.58, arXiv 2402.17764): per tensor, α = mean|w|,
      code = RoundClip(w/(α + ε), -1, 1), scale = α.

    An all-zero row has codes 0; its scale is 0 under "ternary-twn".

    Raises:
        ConfigError: unknown quantizer name.
    """
    codes, scale = _codes_of(name)(weight.detach())
    return QuantizedWeight(codes.to(torch.int8), scale)


def fake_quantize_weight(weight: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Differentiable `quantize_weight(weight, name).dequantize()`; "none" returns the weight.

    `dtype` is that of the result, by default the weight's. On CUDA a kernel computes it where one
    can, see `cuda_path`.
    """
    result = weight
    if name != "none":
        _codes_of(name)
        if cuda_path.weight_reason(weight, name) is None:
            return cuda_path.ternary_weight(weight, name, dtype or weight.dtype)
        result = _TernaryFakeQuantize.apply(weight, name)
    return result if dtype is None else result.to(dtype)
