"""Input rotation of a linear layer: y = W x = (W D H)(H^T D x) for signs D and orthonormal H."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from robuq_bench.hadamard.transform import hadamard_transform, transform_factors


def random_signs(n: int, name: str, seed: int) -> Tensor:
    """Signs ±1 [n] float32 for the layer `name`: bits of SHAKE-256 of "seed:name".

    A hash and not a torch generator, so that the signs of a layer depend neither on torch's
    version nor on the other layers.
    """
    stream = hashlib.shake_256(f"{seed}:{name}".encode()).digest(-(-n // 8))
    bits = torch.tensor(list(stream), dtype=torch.uint8)[:, None] >> torch.arange(8)
    return (1 - 2 * (bits & 1).flatten()[:n].to(torch.int8)).float()


def rotate(x: Tensor, signs: Tensor | None) -> Tensor:
    """Rotate the last axis: x D H / sqrt(n); x [..., n], signs [n] or None for D = I.

    Applied to the rows of a weight [out, in] and to the activations alike, it leaves x @ W.T
    unchanged.
    """
    return hadamard_transform(x if signs is None else x * signs)


class ColumnRotation(NamedTuple):
    """The rotation prepared for tokens as columns; see `rotate_to_columns`.

    `blocks` [n/m, m, m]: the last Kronecker factor, block i with its signs folded in, H_m^T D_i,
    so that flipping signs costs nothing. `leading`: the other factors, last first.
    """

    blocks: Tensor
    leading: tuple[Tensor, ...]


def column_rotation(signs: Tensor | None, like: Tensor) -> ColumnRotation:
    """Prepare the rotation of tokens like [..., n] by signs [n] (None = all 1)."""
    n = like.shape[-1]
    *leading, last = transform_factors(n, like.dtype, like.device)
    m = last.shape[0]
    count = n // m
    blocks = last.T.expand(count, m, m) if signs is None else last.T * signs.view(count, 1, m)
    return ColumnRotation(blocks, tuple(reversed(leading)))


def rotate_to_columns(rows: Tensor, rotation: ColumnRotation) -> Tensor:
    """Rotated tokens as columns: rows [R, n] -> [n, R] contiguous.

    Tokens as columns make every factor one large product and every per-token operation a
    contiguous one, which on CPU halves the cost against `rotate`; the transposition itself
    happens inside the first product.
    """
    count, m, _ = rotation.blocks.shape
    n, tokens = count * m, len(rows)
    columns = torch.bmm(rotation.blocks, rows.view(tokens, count, m).permute(1, 2, 0))
    inner = m
    for factor in rotation.leading:
        columns = _left_product(factor.T, columns.view(n, tokens), inner)
        inner *= factor.shape[0]
    return columns.view(n, tokens)


def rotate_from_columns(columns: Tensor, rotation: ColumnRotation, out: Tensor) -> None:
    """Transpose of `rotate_to_columns`: columns [n, R] -> out [R, n], which is written to."""
    count, m, _ = rotation.blocks.shape
    n, tokens = columns.shape
    inner = m
    for factor in rotation.leading:
        columns = _left_product(factor, columns.view(n, tokens), inner)
        inner *= factor.shape[0]
    target = out.view(tokens, count, m).transpose(0, 1)
    torch.bmm(columns.view(count, m, tokens).transpose(1, 2), rotation.blocks, out=target)


def _left_product(factor: Tensor, columns: Tensor, inner: int) -> Tensor:
    """Apply a factor to the axis of its order in columns [n, R] seen as [outer, order, inner R]."""
    order = factor.shape[0]
    n, tokens = columns.shape
    outer = n // (order * inner)
    if outer == 1:
        return torch.mm(factor, columns.view(order, inner * tokens))
    return torch.matmul(factor, columns.view(outer, order, inner * tokens))
