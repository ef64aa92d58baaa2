"""A Hadamard transform of randomly signed inputs, as RobuQ and QuaRot rotate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from robuq_bench.hadamard.rotation import random_signs
from robuq_bench.methods.rotations._hadamard import HadamardMethod, HadamardRotation

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class RandomizedHadamard(HadamardMethod):
    """x D H / sqrt(n), D random signs of the layer's name and the seed.

    Source: RobuQ's public deployment fork, after QuaRot (arXiv 2404.00456).
    """

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """Draw the signs."""
        return HadamardRotation(random_signs(weight.shape[1], site.name, site.seed))

    def stored_bits(self, in_features: int) -> float:
        """One bit a sign."""
        return float(in_features)
