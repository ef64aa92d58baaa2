"""Rotate and quantize tokens in one pass: the launcher of `reference.hadamard_quantize`.

A program holds several tokens as one tile, which is both factors' matrix-product shape, and takes
ITERATIONS such tiles so that it loads the factors once. Numbers differ from the reference in the
fp16 operands of the products alone: about 1 % of 8-bit codes differ, by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.hadamard_quantize.kernel import hadamard_quantize_kernel
from kernels.hadamard_quantize.reference import (
    OP,
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
    check_inputs,
)
from kernels.hadamard_tile import LEAST_DEPTH, TILE, Fold, block_sylvester, fold
from kernels.launch import KernelInputError, next_power_of_2

MAX_OUTER = 128
"""Most rows of a tile that belong to one token."""
MAX_WIDTH = MAX_OUTER * TILE
MAX_RANK = 64
BLOCK_RANK = 16
"""Ranks of one product of the low-rank branch; up to these `down` stays in shared memory."""
PROJECTED = 4
"""Tokens of a tile that is projected, where one warp group has fewer: they share what is read."""
PROGRAMS = 1024
"""Programs that keep a large GPU busy; with more tiles than these, a program takes several."""
MAX_ITERATIONS = 8
LONG_PROGRAMS = 128
"""As PROGRAMS, of those that fill a multiprocessor each: tiles of several warp groups."""
LONG_ITERATIONS = 64
NUM_STAGES = 1
"""Loads are not pipelined: Triton 3.6 then spills registers; other programs fill the waits."""


@dataclass(frozen=True)
class Tile:
    """How tokens of one width lie in the registers of a program.

    Attributes:
        width: K.
        fold: a token as a matrix.
        source_m: order of the rotation's inner factor in memory.
        rows: tokens of one product.
        groups: products side by side, each by four warps per `TILE` rows.
    """

    width: int
    fold: Fold
    source_m: int
    rows: int
    groups: int

    @property
    def tokens(self) -> int:
        return self.rows * self.groups

    @property
    def num_warps(self) -> int:
        """Sixteen rows of a product each."""
        return self.tokens * self.fold.outer // 16

    @property
    def products(self) -> int:
        """Multiply-accumulates per entry of a rotation: its columns, and the rows of a product."""
        return self.fold.m + self.rows * self.fold.outer

    def iterations(self, rows: int) -> int:
        """Tiles of a program: a power of two, few enough that all of the GPU has work."""
        tiles = triton.cdiv(rows, self.tokens)
        programs = PROGRAMS if self.groups == 1 else LONG_PROGRAMS
        most = MAX_ITERATIONS if self.groups == 1 else LONG_ITERATIONS
        iterations = 1
        while iterations < most and tiles // (2 * iterations) >= programs:
            iterations *= 2
        return iterations

    @property
    def constants(self) -> dict[str, int]:
        """Constants of a launch that follow from the width."""
        outer, main, rest = self.fold.outer, self.fold.main, self.fold.rest
        # A part of the projection is at least as deep as a product has to be.
        narrowest = min(main // 2, rest or main)
        batch = min(self.num_warps, max(1, outer * narrowest // LEAST_DEPTH), outer)
        return {
            "K": self.width,
            "M": self.fold.m,
            "FACTOR_M": self.source_m,
            "OUTER": outer,
            "MAIN": main,
            "REST": rest,
            "ROWS": self.rows,
            "GROUPS": self.groups,
            "BLOCK_RANK": BLOCK_RANK,
            "BATCH": batch,
        }


def hadamard_quantize(
    x: Tensor,
    grid: Grid,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    modulation: Modulation | None = None,
    gated_residual: GatedResidual | None = None,
    silu: bool = False,
    down: Tensor | None = None,
) -> Quantized:
    """`reference.hadamard_quantize` in one kernel, for bfloat16, float16 and float32 tokens.

    K is at most 8192 and, when rotated, a power of two times a factor of order at most 64; r is at
    most 64, and `down` is rounded to float16. Scale, offset and branch are float32. A token whose
    statistics are infinite or NaN has branch NaN, and where several infinities meet in a coordinate
    its code is not specified.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or exclusive options.
    """
    check_inputs(x, grid, rotation, signs, modulation, gated_residual, silu, down, anywhere=False)
    rows, width = x.shape
    images = [p.tokens_per_image for p in (modulation, gated_residual) if p is not None]
    if len(set(images)) > 1:
        raise KernelInputError(f"{OP}: modulation and gated_residual differ in tokens_per_image")
    if gated_residual is not None and gated_residual.value.dtype == torch.float64:
        raise KernelInputError(f"{OP}: gated_residual.value must not be float64")
    rank = 0 if down is None else down.shape[-2]
    if rank > MAX_RANK or (down is not None and rank == 0):
        raise KernelInputError(f"{OP}: down has rank {rank}; 1 to {MAX_RANK} are supported")
    tile = tile_of(width, rotation, rank, rows)
    iterations = tile.iterations(rows)
    tokens_per_image = images[0] if images else 1

    groups = None if signs is None or signs.dim() == 1 else len(signs)
    lead = (rows,) if groups is None else (groups, rows)
    codes = torch.empty((*lead, width), dtype=torch.int8, device=x.device)
    scale = torch.empty(lead, dtype=torch.float32, device=x.device)
    offset = torch.empty(lead, dtype=torch.float32, device=x.device)
    code_sums = torch.empty(lead, dtype=torch.int32, device=x.device)
    branch = None if down is None else torch.empty((*lead, rank), device=x.device)
    residual = (
        None
        if gated_residual is None
        else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    )
    result = Quantized(codes, scale, offset, code_sums, branch, residual)
    if codes.numel() == 0:
        return result
    grid_size = (triton.cdiv(rows, tile.tokens * iterations), 1 if groups is None else groups)
    # What a specialisation does not read is x, so that every argument is a tensor.
    hadamard_quantize_kernel[grid_size](
        x,
        x if gated_residual is None else gated_residual.value,
        x if gated_residual is None else gated_residual.gate,
        x if residual is None else residual,
        x if modulation is None else modulation.shift,
        x if modulation is None else modulation.scale,
        x if signs is None else signs,
        x if rotation is None else rotation.inner,
        x if rotation is None else block_sylvester(tile.rows, tile.fold.outer, x.device),
        x if down is None else down,
        codes,
        scale,
        offset,
        code_sums,
        scale if branch is None else branch,
        rows,
        tokens_per_image,
        x.stride(0),
        0 if gated_residual is None else gated_residual.value.stride(0),
        0 if gated_residual is None else gated_residual.gate.stride(0),
        0 if modulation is None else modulation.shift.stride(0),
        0 if modulation is None else modulation.scale.stride(0),
        float(grid.factor),
        float(grid.epsilon),
        float(grid.low),
        float(grid.high),
        1e-6 if modulation is None else float(modulation.eps),
        **tile.constants,
        ITERATIONS=iterations,
        ROTATED=rotation is not None,
        SIGNED=signs is not None,
        RESIDUAL=gated_residual is not None,
        MODULATED=modulation is not None,
        ONE_IMAGE=tokens_per_image % (tile.tokens * iterations) == 0,
        SILU=silu,
        STATISTIC=grid.statistic,
        FLOOR=grid.floor,
        RANK=rank,
        num_warps=tile.num_warps,
        num_stages=NUM_STAGES,
    )
    return result


def tile_of(width: int, rotation: Rotation | None, rank: int, rows: int) -> Tile:
    """The tile of `rows` tokens.

    Raises:
        KernelInputError: such tokens do not fit.
    """
    if rotation is None:
        if width > MAX_WIDTH:
            raise KernelInputError(f"{OP}: K = {width} is above the {MAX_WIDTH} supported")
        power = width & -width
        folded = fold(power, width // power)
        if folded.main > TILE or folded.outer > MAX_OUTER:
            folded = Fold(next_power_of_2(triton.cdiv(width, TILE)), TILE, TILE, 0)
        source_m = folded.m
    else:
        source_m = len(rotation.inner)
        folded = fold(rotation.outer, source_m)
        if folded.main > TILE or folded.outer > MAX_OUTER:
            raise KernelInputError(
                f"{OP}: K = {width} = {rotation.outer} x {source_m} is not supported; K up to "
                f"{MAX_WIDTH} is, as a power of two times a factor of order up to {TILE}"
            )
    per_product = max(1, TILE // folded.outer)
    groups = 1
    if rank:
        most = 16 // (per_product * folded.outer // 16)  # a program has at most sixteen warps
        groups = max(1, min(PROJECTED // per_product, most))
        while groups > 1 and per_product * groups // 2 >= rows:
            groups //= 2
    return Tile(width, folded, source_m, per_product, groups)
