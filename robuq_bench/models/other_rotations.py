"""Weights that another program rotated with its own Hadamard matrix, brought into our basis.

There are many Hadamard matrices of one order. Those that QuaRot and its descendants (the public
RobuQ deployment fork among them) hold as tables of order K (12, 20, 28, 36, 40, 52, 60, 108, 140,
156, 172) are others than ours, and stand on the other side of the Kronecker product: a weight
rotated with one is noise to a layer that rotates its input with another. What both rotated can be
undone: W' = W R, so W = W' R^T, as R is orthogonal.

This is exact for full-precision weights alone. A weight that was ternary in the other basis is not
ternary in ours, so a quantized checkpoint does not survive it; quantize the result anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robuq_bench.checkpointing import read_safetensors
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import expand_user
from robuq_bench.hadamard.rotation import rotate
from robuq_bench.hadamard.transform import hadamard_matrix

__all__ = ["read_hadamard_table", "rebase_weight", "table_rotation", "unrotate_weight"]

_ORTHONORMAL_TOLERANCE = 1e-4  # a rotation kept in float32 or computed there passes, half does not


def read_hadamard_table(path: str | Path) -> Tensor:
    """Read a Hadamard matrix [K, K] of +-1, float64, from .npy, .pt, .pth or .safetensors.

    The file holds one array; a mapping with a single tensor will do. Pickles are read without
    running code.

    Raises:
        MissingResourceError: no such file.
        CheckpointError: unreadable, several tensors, not square, not +-1, or H H^T is not K I.
    """
    path = expand_user(path)
    if not path.is_file():
        raise MissingResourceError(f"Hadamard table {path} does not exist")
    table = _only_tensor(path, _read(path)).double()
    if table.dim() != 2 or table.shape[0] != table.shape[1]:
        raise CheckpointError(f"{path} holds {list(table.shape)}; a Hadamard table is square")
    if not bool((table.abs() == 1).all()):
        raise CheckpointError(
            f"{path} holds other values than +1 and -1; a Hadamard table is not normalised"
        )
    order = len(table)
    if not torch.equal(table @ table.T, order * torch.eye(order, dtype=table.dtype)):
        raise CheckpointError(f"{path} is no Hadamard matrix: H H^T is not {order} I")
    return table


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if path.suffix not in (".npy", ".pt", ".pth"):
        raise CheckpointError(f"{path}: a Hadamard table is a .npy, .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise CheckpointError(
            f"{path} cannot be read as a tensor ({type(error).__name__})"
        ) from error


def _only_tensor(path: Path, content: object) -> Tensor:
    values = list(content.values()) if isinstance(content, dict) else [content]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].is_complex():
        raise CheckpointError(f"{path} must hold exactly one real tensor, the table")
    return values[0]


def table_rotation(
    table: Tensor, n: int, signs: Tensor | None = None, *, transpose: bool = True
) -> Tensor:
    """Rotation R [n, n] float64 of rows, x -> x R, made of a table [K, K] as QuaRot makes it.

    R = D (T (x) Sylvester(n / K)) / sqrt(n), with D the `signs` [n] that x is multiplied by first
    (None: all 1). T is the table's transpose, because QuaRot's transform multiplies columns by the
    table from the left; `transpose=False` takes the table itself, for programs that multiply rows
    by it.

    Raises:
        UsageError: n is no power of two times K, or signs of another shape.
    """
    order = len(table)
    power, rest = divmod(n, order)
    if rest or power < 1 or power & (power - 1):
        raise UsageError(f"width {n} is no power of two times the table's order {order}")
    side = table.double().T if transpose else table.double()
    rotation = torch.kron(side.contiguous(), hadamard_matrix(power)) / n**0.5
    if signs is None:
        return rotation
    if signs.shape != (n,):
        raise UsageError(f"signs of width {n} must have shape ({n},), got {tuple(signs.shape)}")
    return signs.double()[:, None] * rotation


def unrotate_weight(weight: Tensor, rotation: Tensor) -> Tensor:
    """The weight [out, n] as it was before somebody stored W R: weight R^T, same dtype.

    Raises:
        UsageError: shapes that do not fit, or a rotation [n, n] that is not orthonormal.
    """
    n = weight.shape[-1]
    if rotation.shape != (n, n):
        raise UsageError(
            f"a weight {list(weight.shape)} needs a rotation [{n}, {n}], got {list(rotation.shape)}"
        )
    rotation = rotation.double()
    deviation = (rotation @ rotation.T - torch.eye(n, dtype=torch.float64)).abs().max()
    if not deviation <= _ORTHONORMAL_TOLERANCE:
        raise UsageError(
            f"the rotation is not orthonormal (R R^T differs from I by {float(deviation):.2g}); "
            "divide a Hadamard matrix by sqrt(n)"
        )
    return (weight.double() @ rotation.T).to(weight.dtype)


def rebase_weight(weight: Tensor, rotation: Tensor, signs: Tensor | None = None) -> Tensor:
    """A full-precision weight [out, n] rotated by `rotation` [n, n], rotated by ours instead.

    W_ours = W_theirs R_theirs^T R_ours, with `signs` [n] those of our layer (its `signs`; None for
    a plain Hadamard rotation). Computed in float64, same dtype.

    Raises:
        UsageError: as `unrotate_weight`.
        UnsupportedHadamardOrder: n has no matrix here.
    """
    plain = unrotate_weight(weight.double(), rotation)
    return rotate(plain, None if signs is None else signs.double()).to(weight.dtype)
