"""RobuQ's ternary weights, per output channel."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from robuq_bench.methods.weights._ternary import TernaryMethod


class TernaryTWN(TernaryMethod):
    """Per output channel τ = 0.5 mean|w|, code = sign(w) where |w| >= τ, scale = mean of those |w|.

    Source: RobuQ's public deployment fork; Li & Liu, "Ternary Weight Networks". Gradient:
    straight-through, clamped to [-1, 1]. An all-zero row has codes 0 and scale 0.
    """

    clamps: ClassVar[bool] = True
    scale_per_row: ClassVar[bool] = True

    @staticmethod
    def codes_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scale [out, 1]."""
        magnitude = weight.abs()
        threshold = magnitude.mean(1, keepdim=True).mul_(0.5)
        # A step function of a float keeps this vectorised on CPU, where boolean masks are not.
        keep = (magnitude - threshold).sign_().add_(1).clamp_(max=1)
        count = keep.sum(1, keepdim=True)
        scale = magnitude.mul_(keep).sum(1, keepdim=True).div_(count.clamp_(min=1))
        return keep.mul_(weight.sign()), scale
