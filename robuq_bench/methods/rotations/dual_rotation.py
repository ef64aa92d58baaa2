"""Dual rotation R1 P R2 fitted to a layer's outliers, which LRQ-DiT gives its salient layers.

Source: Lin et al., "DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized
LLMs" (NeurIPS 2024); chosen per layer by LRQ-DiT's adaptive rotation. Channels are cut into blocks
of B. In every block the channel with the largest |x| is swapped to the front, multiplied by an
orthogonal matrix whose first row is uniform, 1/sqrt(B) everywhere, which spreads it evenly over the
block, and swapped back; this is repeated greedily, and of all prefixes of the steps the one with
the least max(x) - min(x) is kept. A zigzag permutation then deals the channels to the blocks by
descending max|x|, and the blocks are rotated a second time in the same way.

The swap follows the paper: the channel (column) that holds the outlier moves to the front. The
public code of DuQuant, and LRQ-DiT's after it, takes the row of `divmod(argmax, columns)`, which is
the token, modulo B, so there the swapped channel is in effect an arbitrary one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods._observed import finite
from robuq_bench.methods.base import RotationMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site

MAX_BLOCK = 128
"""Largest default block: DuQuant's block size."""

PATIENCE = 32
"""Steps without an improvement in any block after which the search stops."""


class DualRotationMethod(RotationMethod):
    """The dual rotation, fitted to the calibration tokens of the layer.

    Attributes:
        block: B, a divisor of the width; 0 = its largest divisor up to `MAX_BLOCK`.
        steps: budget of greedy steps of each of the two rotations.
    """

    needs = frozenset({"tokens"})

    block: int = Field(default=0, ge=0)
    steps: int = Field(default=256, ge=0)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError unless `block` divides the width."""
        block_size_of(in_features, self.block or None)

    def stored_bits(self, in_features: int) -> float:
        """Both rotations' blocks in fp16, and the place of every channel."""
        matrices = 2 * in_features * block_size_of(in_features, self.block or None)
        return 16.0 * matrices + in_features * (in_features - 1).bit_length()

    def additions(self, in_features: int) -> int:
        """None: its entries are no ±1, see `macs`."""
        return 0

    def macs(self, in_features: int) -> int:
        """The two block products."""
        return 2 * in_features * block_size_of(in_features, self.block or None)

    def fit(self, weight: Tensor, site: Site) -> FittedDualRotation:
        """The rotation; its random part is drawn from the layer's name and seed.

        Raises:
            UsageError: no tokens, or some that are not finite.
            ConfigError: a block that does not divide the width.
        """
        tokens = finite(site, "tokens")
        digest = hashlib.shake_256(f"{site.seed}:{site.name}".encode()).digest(7)
        seed = int.from_bytes(digest, "big")
        rotation = fit_dual_rotation(
            tokens, self.block or None, 0 if site.is_blank else self.steps, seed
        )
        return FittedDualRotation(
            rotation.first.to(weight),
            rotation.permutation.to(weight.device),
            rotation.second.to(weight),
        )


class FittedDualRotation(nn.Module):
    """x R1 P R2 for x [..., in] and the same for W [out, in], in the dtype of the input.

    Buffers as of `DualRotation`, in the dtype of the weight. Differentiable in x and W; the
    rotation itself gets no gradient. Infinities and NaN spread over their blocks.
    """

    first: Tensor
    permutation: Tensor
    second: Tensor

    def __init__(self, first: Tensor, permutation: Tensor, second: Tensor) -> None:
        super().__init__()
        self.register_buffer("first", first)
        self.register_buffer("permutation", permutation)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        """x R1 P R2, [..., in]."""
        return DualRotation(self.first, self.permutation, self.second).apply(x)

    def weight(self, w: Tensor) -> Tensor:
        """W R1 P R2, [out, in]."""
        return self.forward(w)


@dataclass(frozen=True)
class DualRotation:
    """A fixed orthogonal map of tokens: y = x R1 P R2.

    `first`, `second` [n/B, B, B], float64 as fitted: the blocks on the diagonals of R1 and R2,
    each applied as row vector times block. `permutation` [n] int64: channel `permutation[i]` moves
    to place i.
    """

    first: Tensor
    permutation: Tensor
    second: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the last axis: [..., n] -> [..., n] in the dtype and on the device of x.

        Raises:
            UsageError: the last axis is not the width that was fitted.
        """
        n = len(self.permutation)
        if x.shape[-1] != n:
            raise UsageError(f"rotation fitted to width {n} applied to tokens {tuple(x.shape)}")
        y = _rotate_blocks(x, self.first.to(x))
        return _rotate_blocks(y[..., self.permutation.to(x.device)], self.second.to(x))

    def matrix(self) -> Tensor:
        """Return the map as one matrix Q [n, n] float64: y = x @ Q."""
        return self.apply(torch.eye(len(self.permutation), dtype=torch.float64))


def fit_dual_rotation(
    tokens: Tensor, block_size: int | None = None, steps: int = 256, seed: int = 0
) -> DualRotation:
    """Fit the dual rotation to calibration tokens [T, n] of one layer.

    Args:
        tokens: floating point, finite, T >= 1.
        block_size: B, a divisor of n; default the largest divisor up to `MAX_BLOCK`.
        steps: budget of greedy steps of each rotation; ends early after `PATIENCE` idle ones. The
            empty prefix counts, so no block gets a larger range than it had.
        seed: of the random part of the orthogonal matrix.

    Raises:
        UsageError: tokens not [T, n], not finite or not floating point, a block size that does not
            divide n or that n has no default for, or a negative budget.
    """
    if tokens.ndim != 2 or tokens.numel() == 0 or not tokens.is_floating_point():
        raise UsageError(f"needs floating tokens [T, n], got {tokens.dtype} {tuple(tokens.shape)}")
    if not tokens.isfinite().all():
        raise UsageError("calibration tokens of the dual rotation are not all finite")
    if steps < 0:
        raise UsageError(f"the step budget of the dual rotation is negative: {steps}")
    n = tokens.shape[1]
    block = block_size_of(n, block_size)
    x = tokens.detach().cpu().double()
    rotation = _spreading_matrix(block, seed)
    first = _greedy_rotation(x, rotation, steps)
    x = _rotate_blocks(x, first)
    permutation = zigzag_permutation(x.abs().amax(dim=0), n // block)
    second = _greedy_rotation(x[:, permutation], rotation, steps)
    return DualRotation(first, permutation, second)


def block_size_of(n: int, block_size: int | None) -> int:
    """`block_size`, a divisor of n, or the default one; ConfigError if there is none."""
    block = default_block_size(n) if block_size is None else block_size
    if block < 1 or n % block:
        raise ConfigError(f"dual rotation: the block size {block} does not divide the width {n}")
    return block


def default_block_size(n: int) -> int:
    """Largest divisor of n that is at most `MAX_BLOCK`.

    Raises:
        ConfigError: it is 1, which would rotate nothing.
    """
    block = next(size for size in range(min(n, MAX_BLOCK), 0, -1) if n % size == 0)
    if block == 1 and n > 1:
        raise ConfigError(
            f"width {n} has no divisor from 2 to {MAX_BLOCK}: give the dual rotation a block size"
        )
    return block


def zigzag_permutation(peaks: Tensor, blocks: int) -> Tensor:
    """Deal channels to blocks by descending peak, there and back: peaks [n] -> [n] int64.

    The first `blocks` channels go to blocks 0, 1, ..., the next ones back from the last block, and
    so on (DuQuant's zigzag), so every block gets one channel of each rank group and the sums of the
    blocks differ little. Entry i is the channel that moves to place i, blocks one after another.

    Raises:
        UsageError: blocks does not divide n.
    """
    if blocks < 1 or len(peaks) % blocks:
        raise UsageError(f"{len(peaks)} channels cannot be dealt evenly to {blocks} blocks")
    rounds = torch.argsort(peaks, descending=True, stable=True).view(-1, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def _rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Row vector times block, block by block: x [..., n], blocks [n/B, B, B] -> [..., n]."""
    count, size, _ = blocks.shape
    columns = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(columns, blocks).transpose(0, 1).reshape(x.shape)


def _spreading_matrix(size: int, seed: int) -> Tensor:
    """Random orthogonal matrix [B, B] float64 whose first row is 1/sqrt(B) everywhere."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    # The Householder reflection that maps the first unit vector to the uniform one.
    mirror = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    mirror[0] += 1
    reflection = torch.eye(size, dtype=torch.float64)
    reflection -= 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn((size - 1, size - 1), generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    # Signs of the diagonal make the distribution uniform (Haar) and independent of the library.
    orthogonal *= triangular.diagonal().sign()
    reflection[1:] = orthogonal @ reflection[1:]
    return reflection


def _greedy_rotation(tokens: Tensor, rotation: Tensor, steps: int) -> Tensor:
    """Best prefix of greedy steps for every block: tokens [T, n] -> [n/B, B, B] float64."""
    size = len(rotation)
    count = tokens.shape[1] // size
    every = torch.arange(count)
    identity = torch.eye(size, dtype=torch.float64).expand(count, size, size)
    # Channels first, [B, n/B, T]: a swap moves whole rows and a step is one product. The search
    # runs in float32, which decides only where to swap; the matrices are float64 throughout.
    x = tokens.view(len(tokens), count, size).permute(2, 1, 0).float().contiguous()
    product = identity.permute(2, 0, 1).contiguous()
    turn, turn32 = rotation.T.contiguous(), rotation.T.float().contiguous()
    low, high = torch.aminmax(x, dim=2)
    least = high.amax(0) - low.amin(0)
    best, idle = product.clone(), 0
    for _ in range(steps):
        front = torch.maximum(high, -low).argmax(0)
        x, product = (_step(x, turn32, front, every), _step(product, turn, front, every))
        low, high = torch.aminmax(x, dim=2)
        spread = high.amax(0) - low.amin(0)
        better = spread < least
        least = torch.where(better, spread, least)
        best[:, better] = product[:, better]
        idle = 0 if better.any() else idle + 1
        if idle == PATIENCE:
            break
    blocks = best.permute(1, 2, 0).contiguous()
    # Float32 cannot tell ranges apart that differ in the last digits: settle those in float64.
    worse = _ranges(_rotate_blocks(tokens, blocks), count) > _ranges(tokens, count)
    return torch.where(worse[:, None, None], identity, blocks)


def _step(x: Tensor, turn: Tensor, front: Tensor, every: Tensor) -> Tensor:
    """Swap channel `front` [n/B] of every block to place 0, rotate, swap back; x [B, n/B, T].

    Overwrites x: the caller goes on with the result.
    """
    _swap(x, front, every)
    x = (turn @ x.view(len(turn), -1)).view(x.shape)
    _swap(x, front, every)
    return x


def _swap(x: Tensor, front: Tensor, every: Tensor) -> None:
    first = x[0].clone()
    x[0] = x[front, every]
    x[front, every] = first


def _ranges(x: Tensor, count: int) -> Tensor:
    """max - min of every block of tokens [T, n]: [n/B]."""
    blocks = x.view(len(x), count, -1)
    return blocks.amax(dim=(0, 2)) - blocks.amin(dim=(0, 2))
