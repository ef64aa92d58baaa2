"""What the fake quantization of a ternary weight computes, in plain PyTorch.

Rules as in `robuq_bench.methods.weights`: "ternary-twn" per output channel, τ = 0.5 mean|w|,
code = sign(w) where |w| >= τ, scale = mean of |w| over those; "ternary-absmean" for the whole
weight, α = mean|w|, code = sign(w) where |w| > (α + 1e-5) / 2, scale = α.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("ternary-twn", "ternary-absmean")
ABSMEAN_EPS = 1e-5


def ternary_weight(weight: Tensor, rule: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """`scale * code` of weight [N, K] in `out_dtype`, by default that of the weight."""
    size = weight.abs()
    if rule == "ternary-twn":
        kept = size >= 0.5 * size.mean(1, keepdim=True)
        total = size.masked_fill(~kept, 0.0).sum(1, keepdim=True)
        scale = total / kept.sum(1, keepdim=True).clamp(min=1)
    else:
        scale = size.mean()
        kept = size > 0.5 * (scale + ABSMEAN_EPS)
    return (weight.sign() * kept * scale).to(out_dtype or weight.dtype)


def ternary_weight_backward(grad: Tensor, rule: str, out_dtype: torch.dtype) -> Tensor:
    """Straight-through gradient: clamped to [-1, 1] for TWN, identity for absmean."""
    return (grad.clamp(-1, 1) if rule == "ternary-twn" else grad).to(out_dtype)
