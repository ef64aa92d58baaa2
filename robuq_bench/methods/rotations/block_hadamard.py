"""Hadamard rotation of blocks of channels: R = D (I ⊗ H_B) / sqrt(B).

Every B consecutive channels are rotated by the same orthonormal Hadamard matrix; D are random
signs, or 1. Sources: IST-DASLab QuEST (B = 128), HQ-DM (B = 32), and the blocks of OrbitQuant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from robuq_bench.errors import ConfigError
from robuq_bench.hadamard.rotation import random_signs
from robuq_bench.hadamard.transform import (
    UnsupportedHadamardOrder,
    hadamard_factors,
    hadamard_transform,
)
from robuq_bench.methods.base import RotationMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class BlockHadamard(RotationMethod):
    """Hadamard transform of every block of channels.

    Attributes:
        block: B, an order of which a Hadamard matrix exists here and that divides the width.
        signs: whether channels get random signs first, drawn from the layer's name and seed.
    """

    block: int = Field(ge=2)
    signs: bool = False

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError unless `block` is a Hadamard order and divides the width."""
        try:
            hadamard_factors(self.block)
        except UnsupportedHadamardOrder as error:
            raise ConfigError(
                f"rotation method {self.method!r}: block = {self.block}: {error}"
            ) from None
        if in_features % self.block:
            raise ConfigError(
                f"rotation method {self.method!r}: block = {self.block} does not divide the width "
                f"{in_features}"
            )

    def stored_bits(self, in_features: int) -> float:
        """A bit for each sign."""
        return float(in_features) if self.signs else 0.0

    def additions(self, in_features: int) -> int:
        """Of the Kronecker factors of H_B, a product each."""
        return in_features * sum(hadamard_factors(self.block))

    def fit(self, weight: Tensor, site: Site) -> BlockHadamardRotation:
        """The rotation; nothing is fitted to the inputs."""
        n = weight.shape[1]
        signs = random_signs(n, site.name, site.seed).to(weight) if self.signs else None
        return BlockHadamardRotation(self.block, signs)


class BlockHadamardRotation(nn.Module):
    """x R for x [..., in] and W R for W [out, in]; differentiable, in the dtype of the input.

    Buffer `signs` [in] of ±1, None without. Infinities and NaN spread over their block.
    """

    signs: Tensor | None

    def __init__(self, block: int, signs: Tensor | None) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """x R, [..., in]."""
        signed = x if self.signs is None else x * self.signs.to(x.dtype)
        return hadamard_transform(signed.unflatten(-1, (-1, self.block))).flatten(-2)

    def weight(self, w: Tensor) -> Tensor:
        """W R, [out, in]."""
        return self.forward(w)
