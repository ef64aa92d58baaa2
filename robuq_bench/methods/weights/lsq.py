"""Learned step size: the step of a uniform grid is trained with the weight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robuq_bench.methods.base import SCALE_BITS, WeightMethod
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._codes import Codes, working

MIN_STEP = 1e-8
"""The least step that is used, far below that of any weight that does something."""


class Lsq(WeightMethod):
    """ŵ = s·round(clamp(w/s, −Q_n, Q_p)) with Q_n = 2^{b−1}, Q_p = 2^{b−1}−1 and s learned.

    Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153). s
    starts at 2·mean|w|/√Q_p of its row or tensor, so `fit` alone is no good PTQ: train it.

    Shapes: weight [out, in]; parameter `step` [out, 1], or [1, 1] per tensor.

    Gradient, with v = w/s, "inside" meaning −Q_n < v < Q_p, and upstream gradient g:

        ∂w = g inside, 0 outside
        ∂s = Σ g·(round(v) − v inside, −Q_n below, Q_p above) / √(N·Q_p)

    Attributes:
        bits: of a code, 2 to 8.
        per: what shares a step.
        gradient_scale: N. "quantizer": weights that share the step, as the paper says. "tensor":
            all of the weight, even with a step per row, as lsq-net and ParetoQ compute it.
    """

    bits: int = Field(default=4, ge=2, le=8)
    per: Literal["tensor", "row"] = "row"
    gradient_scale: Literal["tensor", "quantizer"] = "quantizer"

    def nominal_bits(self) -> float:
        """`bits`."""
        return float(self.bits)

    def storage_bits(self, out_features: int, in_features: int) -> float:
        """`bits` a code and 16 a step."""
        steps = 1 if self.per == "tensor" else out_features
        return float(self.bits * out_features * in_features + SCALE_BITS * steps)

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """A `LearnedStep` at the start the paper gives; nothing of `site` is read."""
        dims = (0, 1) if self.per == "tensor" else (1,)
        start = 2 * weight.detach().abs().mean(dims, keepdim=True) / math.sqrt(_high(self.bits))
        shared = weight.numel() // start.numel()
        elements = shared if self.gradient_scale == "quantizer" else weight.numel()
        return LearnedStep(start, self.bits, 1 / math.sqrt(elements * _high(self.bits)))


def _high(bits: int) -> int:
    return 2 ** (bits - 1) - 1


class LearnedStep(nn.Module):
    """The grid of `Lsq`. Parameter `step`: float32, [out, 1] or [1, 1].

    An optimizer may push a step to zero or past it. What is used is max(step, `MIN_STEP`), and the
    gradient reaches `step` as if it had not been raised: the step can come back, and no weight is
    divided by 0 or flips its sign. A step that is not finite stays so: training has to notice.
    """

    def __init__(self, start: Tensor, bits: int, gradient_scale: float) -> None:
        super().__init__()
        self.step = nn.Parameter(start.float().clamp(min=MIN_STEP))
        self.high = _high(bits)
        self.low = -self.high - 1
        self.gradient_scale = gradient_scale

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest points of the grid, [out, in] in the dtype of `weight`."""
        quantized: Tensor = _LearnedStep.apply(
            weight, self.step, self.low, self.high, self.gradient_scale
        )
        return quantized

    def codes(self, weight: Tensor) -> Codes:
        """Codes that dequantize to `forward(weight)` bit for bit (before its cast to half)."""
        weight = weight.detach()
        step = _used(self.step, weight)
        return Codes(_codes(weight / step, self.low, self.high).to(torch.int8), step)


def _used(step: Tensor, weight: Tensor) -> Tensor:
    """The step as it is used, in float32, or float64 for a float64 weight."""
    return step.detach().to(working(weight).dtype).clamp(min=MIN_STEP)


def _codes(ratio: Tensor, low: int, high: int) -> Tensor:
    return ratio.round().clamp_(low, high)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        used = _used(step, weight)
        return Codes(_codes(weight / used, low, high), used).dequantize().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, step = ctx.saved_tensors
        ratio = weight / _used(step, weight)
        inside = (ratio > ctx.low) & (ratio < ctx.high)
        codes = _codes(ratio, ctx.low, ctx.high)
        slope = torch.where(inside, codes - ratio, codes)
        dims = (0, 1) if step.numel() == 1 else (1,)
        of_step = (grad * slope).sum(dims, keepdim=True) * ctx.gradient_scale
        return grad * inside, of_step.to(step.dtype), None, None, None
