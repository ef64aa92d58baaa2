"""Ternary weights per output channel, at the threshold and scale of least squared error."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robuq_bench.methods.weights._ternary import TernaryMethod


class TernaryOptimal(TernaryMethod):
    """Per output channel the codes t and the scale α that minimise ||w - α t||².

    With the k largest |w| kept, α is their mean and the error ||w||² - (their sum)²/k, so that one
    sort finds k. Source: the objective of Li & Liu, "Ternary Weight Networks", solved exactly where
    they take τ near 0.7 mean|w| and RobuQ 0.5. Gradient: straight-through, clamped to [-1, 1], as
    that of `ternary-twn`. An all-zero row has codes 0 and scale 0.
    """

    clamps: ClassVar[bool] = True
    scale_per_row: ClassVar[bool] = True

    @staticmethod
    def codes_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scale [out, 1]."""
        magnitude = weight.abs()
        ordered = magnitude.sort(1, descending=True).values
        counts = torch.arange(1, weight.shape[1] + 1, device=weight.device).to(weight.dtype)
        gains = ordered.cumsum(1).square_().div_(counts)
        threshold = ordered.gather(1, gains.argmax(1, keepdim=True))
        keep = (magnitude >= threshold).to(weight.dtype)
        scale = magnitude.mul_(keep).sum(1, keepdim=True).div_(keep.sum(1, keepdim=True))
        return keep.mul_(weight.sign()), scale
