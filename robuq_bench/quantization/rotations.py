"""Input rotation of a linear layer: y = W x = (W D H)(H^T D x) for signs D and orthonormal H."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robuq_bench.quantization.hadamard import hadamard_transform, transform_factors


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


def rotation_blocks(signs: Tensor | None, like: Tensor) -> Tensor:
    """Last Kronecker factor with the signs folded in: [n/m, m, m] for like [..., n].

    Block i is H_m^T diag(D_i); multiplying by it flips the signs at no cost.
    """
    n = like.shape[-1]
    last = transform_factors(n, like.dtype, like.device)[-1].T
    m = last.shape[0]
    if signs is None:
        return last.expand(n // m, m, m)
    return last * signs.view(n // m, 1, m)


def rotate_to_columns(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rotated tokens as columns: rows [R, n] -> [n, R] contiguous, n = blocks' n/m * m.

    Tokens as columns make every factor one large product and every per-token operation a
    contiguous one, which on CPU halves the cost against `rotate`; the transposition itself
    happens inside the first product.
    """
    count, m, _ = blocks.shape
    columns = torch.bmm(blocks, rows.view(-1, count, m).permute(1, 2, 0))
    return _leading_factors(columns.view(count * m, -1), m, inverse=False)


def rotate_from_columns(columns: Tensor, blocks: Tensor, rows: Tensor) -> None:
    """Transpose of `rotate_to_columns`: write the gradient at its rows into rows [R, n]."""
    count, m, _ = blocks.shape
    columns = _leading_factors(columns, m, inverse=True)
    product = torch.bmm(columns.view(count, m, -1).transpose(1, 2), blocks)
    rows.view(-1, count, m).copy_(product.transpose(0, 1))


def _leading_factors(columns: Tensor, m: int, inverse: bool) -> Tensor:
    """Apply all Kronecker factors but the last to the feature axis of columns [n, R]."""
    n = columns.shape[0]
    inner = columns.shape[1] * m
    for factor in reversed(transform_factors(n, columns.dtype, columns.device)[:-1]):
        order = factor.shape[0]
        left = factor if inverse else factor.T
        columns = torch.matmul(left, columns.view(-1, order, inner))
        inner *= order
    return columns.view(n, -1)
