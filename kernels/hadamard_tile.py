"""The Hadamard transform of a tile of tokens inside a Triton kernel.

A token of width K = outer * m is a matrix [outer, m]; its transform by Sylvester(outer) (x) H_m is
S X H_m. Both products are dots with ±1 entries, exact in fp16. Triton's sizes are powers of two, so
m is padded with zeros (36 to 64) in registers only: neither transform nor memory is padded.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Rows and columns of the matrix products of `transform_tokens`; columns past m are zero."""


def sylvester(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix [order, order] of ±1; order is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def fold(outer: int, m: int) -> tuple[int, int]:
    """(outer, m) of the same matrix with m as large as `TILE` allows, from 2 (x) m = 2m."""
    while outer > 1 and 2 * m <= TILE:
        outer, m = outer // 2, 2 * m
    return outer, m


@functools.cache
def block_sylvester(rows: int, outer: int, device: torch.device) -> Tensor:
    """I_rows (x) Sylvester(outer), float16 [rows * outer, rows * outer] of 0 and ±1.

    Cached because it is launched with every call; it must not be written to.
    """
    with torch.inference_mode(False):
        identity = torch.eye(rows, dtype=torch.float16, device=device)
        return torch.kron(identity, sylvester(outer, torch.float16, device))


@triton.jit
def load_folded(pointer, M: tl.constexpr, FOLDED: tl.constexpr, SIZE: tl.constexpr):
    """Sylvester(FOLDED / M) (x) H_M with H_M [M, M] in memory, as [SIZE, SIZE] fp16, zeros around.

    FOLDED / M is at most `TILE`.
    """
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    mask = (i < FOLDED) & (j < FOLDED)
    if FOLDED == M:
        return tl.load(pointer + i * M + j, mask=mask, other=0.0).to(tl.float16)
    factor = tl.load(pointer + i % M * M + j % M, mask=mask, other=0.0).to(tl.float16)
    # An entry of Sylvester's matrix is -1 where its indices share an odd number of bits.
    shared = (i // M) & (j // M)
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    return tl.where(shared & 1 == 1, -factor, factor)


@triton.jit
def transform_tokens(x, inner, outer, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Unnormalised transform of x [ROWS, OUTER, INNER] -> same shape, fp32: S X H_m per token.

    `inner` [INNER, INNER] is H_m padded with zeros, `outer` is `block_sylvester(ROWS, OUTER)`
    (unread for OUTER = 1). Tokens lie below each other in both products, so nothing is permuted;
    a token with an infinite entry would spoil its neighbours.
    """
    y = tl.dot(tl.reshape(x, (ROWS * OUTER, INNER)).to(inner.dtype), inner)
    if OUTER > 1:
        y = tl.dot(outer, y.to(outer.dtype))
    return tl.reshape(y, (ROWS, OUTER, INNER))
