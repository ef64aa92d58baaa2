"""The module that the full-width Hadamard methods fit."""

from __future__ import annotations

from torch import Tensor, nn

from robuq_bench.hadamard.rotation import rotate
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder, hadamard_factors
from robuq_bench.methods import RotationMethod


class HadamardRotation(nn.Module):
    """x D H / sqrt(n), for tokens and rows of a weight alike; `signs` [n] is D, None for none."""

    signs: Tensor | None

    def __init__(self, signs: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the last axis of x [..., n]; same dtype."""
        return rotate(x, None if self.signs is None else self.signs.to(x.dtype))

    def weight(self, weight: Tensor) -> Tensor:
        """Rotate the rows of a weight [out, n]."""
        return self.forward(weight)

    def extra_repr(self) -> str:
        return "hadamard" if self.signs is None else "hadamard, random signs"


class HadamardMethod(RotationMethod):
    """Base of the rotations over the whole width."""

    def check(self, out_features: int, in_features: int) -> None:
        """Raise UnsupportedHadamardOrder for a width without a matrix."""
        try:
            hadamard_factors(in_features)
        except UnsupportedHadamardOrder as error:
            raise UnsupportedHadamardOrder(
                f"{error}. For this layer alone: a rule in [[layers]] without {self.method!r}"
            ) from None

    def additions(self, in_features: int) -> int:
        """Each Kronecker factor of order m adds m values for each of n outputs."""
        return in_features * sum(hadamard_factors(in_features))
