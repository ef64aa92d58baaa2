"""The plain Hadamard transform over the whole input dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from robuq_bench.methods.rotations._hadamard import HadamardMethod, HadamardRotation

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class Hadamard(HadamardMethod):
    """x H / sqrt(n), H of any order that has a construction here."""

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """The same for every layer of a width."""
        return HadamardRotation(None)

    def stored_bits(self, in_features: int) -> float:
        """None: the matrix follows from the width."""
        return 0.0
