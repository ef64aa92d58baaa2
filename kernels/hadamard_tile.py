"""The Hadamard transform of a tile of tokens inside a Triton kernel.

A token of width K = outer * m is a matrix X [outer, m]; its transform by Sylvester(outer) (x) H_m
is S X H_m, two products with ±1 entries, exact in fp16. Triton's sizes are powers of two, so m is
held as two parts, 72 = 64 + 8 or 48 = 32 + 16, and nothing is padded; an m without such parts is.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import next_power_of_2

TILE = 64
"""Rows of a product of one warp group, and the most columns of the first part of a row."""
LEAST_REST = 8
"""The fewest columns of a second part: those of the narrowest product."""
LEAST_DEPTH = 16
"""The least inner size of a product."""


@dataclass(frozen=True)
class Fold:
    """A token as a matrix [outer, m] whose rows are `main` + `rest` columns.

    `rest` is 0 where there is one part; then `main` may be more than m, and the excess is zeros.
    """

    outer: int
    m: int
    main: int
    rest: int


def sylvester(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix [order, order] of ±1; order is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def fold(outer: int, m: int) -> Fold:
    """The same matrix with m as large as its parts allow, from 2 (x) m = 2m.

    36 becomes 72 = 64 + 8, 12 becomes 48 = 32 + 16, and 28 becomes 56 of 64 columns.
    """
    while outer > 1 and (2 * m <= TILE or 2 * m == TILE + LEAST_REST):
        outer, m = outer // 2, 2 * m
    padded = next_power_of_2(m)
    main, rest = padded // 2, m - padded // 2
    if outer > 1 and LEAST_REST <= rest < main <= TILE and rest & (rest - 1) == 0:
        return Fold(outer, m, main, rest)
    return Fold(outer, m, max(LEAST_DEPTH, padded), 0)


@functools.cache
def block_sylvester(rows: int, outer: int, device: torch.device) -> Tensor:
    """I_rows (x) Sylvester(outer), float16 [rows * outer, rows * outer] of 0 and ±1.

    Cached because it is launched with every call; it must not be written to.
    """
    with torch.inference_mode(False):
        identity = torch.eye(rows, dtype=torch.float16, device=device)
        return torch.kron(identity, sylvester(outer, torch.float16, device))


@triton.jit
def load_folded(
    pointer,
    M: tl.constexpr,
    FOLDED: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Block [ROWS, COLUMNS] from (ROW, COLUMN) on of Sylvester(FOLDED / M) (x) H_M, as fp16.

    H_M [M, M] is in memory; FOLDED / M is at most 64; what lies outside the matrix is 0.
    """
    i = ROW + tl.arange(0, ROWS)[:, None]
    j = COLUMN + tl.arange(0, COLUMNS)[None, :]
    mask = (i < FOLDED) & (j < FOLDED)
    factor = tl.load(pointer + i % M * M + j % M, mask=mask, other=0.0).to(tl.float16)
    # An entry of Sylvester's matrix is -1 where its indices share an odd number of bits.
    shared = (i // M) & (j // M)
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    return tl.where(shared & 1 == 1, -factor, factor)


@triton.jit
def apply_outer(x, outer, present, GROUPS: tl.constexpr):
    """outer @ x for fp16 x [HEIGHT, GROUPS * SIZE] -> fp16 [GROUPS * HEIGHT, SIZE], SIZE from 16.

    A smaller SIZE is filled up with zeros. `present` is a condition that is true.
    """
    HEIGHT: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1] // GROUPS
    y = tl.dot(outer, x)
    if GROUPS > 1:
        # Triton gives all warps to the rows of products in a chain, here those of one group, and
        # computes every group in each of them. It sees no chain through a branch.
        if present:  # noqa: SIM108
            z = y.to(tl.float16)
        else:
            z = tl.zeros(y.shape, tl.float16)
        z = tl.permute(tl.reshape(z, (HEIGHT, GROUPS, SIZE)), (1, 0, 2))
        z = tl.reshape(z, (GROUPS * HEIGHT, SIZE))
    else:
        z = y.to(tl.float16)
    if SIZE < 16:  # the least depth of the product that follows
        z = tl.permute(tl.join(z, tl.zeros_like(z)), (0, 2, 1))
        z = tl.reshape(z, (GROUPS * HEIGHT, 2 * SIZE))
    return z
