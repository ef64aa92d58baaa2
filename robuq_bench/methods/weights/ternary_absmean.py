"""BitNet's ternary weights, per tensor."""

from __future__ import annotations

from torch import Tensor

from robuq_bench.methods.weights._ternary import TernaryMethod

#: Added to the absmean by BitNet b1.58 so that an all-zero matrix has codes 0.
ABSMEAN_EPS = 1e-5


class TernaryAbsmean(TernaryMethod):
    """α = mean|w| over the tensor, code = RoundClip(w/(α + ε), -1, 1), scale = α.

    Source: BitNet b1.58 (arXiv 2402.17764). Gradient: straight-through identity.
    """

    @staticmethod
    def codes_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scale [1, 1]."""
        scale = weight.abs().mean().reshape(1, 1)
        return (weight / (scale + ABSMEAN_EPS)).round_().clamp_(-1, 1), scale
