"""Static centring: the mean of the calibration inputs is subtracted, its product is in the bias.

    x W^T + b = (x - c) W^T + (b + W c),    c_j = mean of X_j over all calibration tokens

Inputs of a DiT can have a large constant part, which adaLN's shift and GELU put there: the same
vector in every token. It carries nothing that a code could tell apart, and widens every step.
RobuQ's quantizers subtract the mean of a token over its channels, one direction of in_features;
this subtracts the mean of each channel over tokens. Ours as a slot; SVDQuant (Li et al., ICLR 2025)
shifts GELU's outputs by one constant, Outlier Suppression+ (Wei et al., EMNLP 2023) channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from robuq_bench.methods._observed import finite
from robuq_bench.methods.base import CentringMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class Mean(CentringMethod):
    """The mean of each channel over all tokens of the calibration set, fixed in training."""

    needs = frozenset({"mean"})

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """The mean that was observed.

        Raises:
            UsageError: no inputs were observed, or a mean is not finite.
        """
        return Centre(finite(site, "mean").to(weight))


class Centre(nn.Module):
    """x - c for the buffer `centre` [in]; the fast paths know it. Gradient: identity."""

    centre: Tensor

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)

    def forward(self, x: Tensor) -> Tensor:
        """x - c, [..., in], subtracted in float32 at least and rounded once to the dtype of x."""
        return (x - self.centre).to(x.dtype)
