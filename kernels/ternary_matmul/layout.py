"""Planes of 2-bit ternary codes, in the order the matrix-multiplication kernel unpacks them.

Within a block of 128 columns, byte j (0 to 31) holds columns j, j + 32, j + 64 and j + 96 in its
bits 0-1, 2-3, 4-5 and 6-7. One 32-bit shift and mask then yields four weights of one plane, in the
order in which the tensor core reads them, with no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import KernelInputError

BLOCK_K = 128
"""Columns that share one group of bytes; the last block is padded with zero weights."""

PLANES = 4
"""Weights per byte."""

PLANE_BYTES = BLOCK_K // PLANES
"""Bytes per block of columns."""


def packed_width(width: int) -> int:
    """Bytes that a row of `width` ternary weights takes."""
    return -(-width // BLOCK_K) * PLANE_BYTES


def pack_planes(codes: Tensor) -> Tensor:
    """Pack ternary codes; `unpack_planes` undoes it exactly.

    Args:
        codes: int8 [..., N, K] with values -1, 0 and 1.

    Returns:
        uint8 [..., N, ceil(K / 128) * 32], holding code + 1; columns past K hold code 0.

    Raises:
        KernelInputError: another dtype, fewer than two dimensions or another value.
    """
    if codes.dtype != torch.int8 or codes.dim() < 2:
        raise KernelInputError(
            f"pack_planes: codes must be int8 [..., N, K], got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise KernelInputError("pack_planes: codes must be -1, 0 or 1")
    *rows, width = codes.shape
    padding = packed_width(width) * PLANES - width
    stored = torch.nn.functional.pad(codes + 1, (0, padding), value=1).to(torch.uint8)
    blocks = stored.view(*rows, packed_width(width) // PLANE_BYTES, PLANES, PLANE_BYTES)
    first, second, third, fourth = blocks.unbind(-2)
    return (first | second << 2 | third << 4 | fourth << 6).reshape(*rows, packed_width(width))


def unpack_planes(planes: Tensor, width: int) -> Tensor:
    """Ternary codes of packed planes.

    Args:
        planes: uint8 [..., N, ceil(width / 128) * 32], as `pack_planes` returns them.
        width: number of columns K.

    Returns:
        int8 [..., N, width], values -1, 0 and 1.

    Raises:
        KernelInputError: another dtype, or a number of bytes that does not belong to `width`.
    """
    if planes.dtype != torch.uint8 or planes.dim() < 2 or width < 0:
        raise KernelInputError(
            f"unpack_planes: planes must be uint8 [..., N, bytes], got {planes.dtype} "
            f"{list(planes.shape)} for width {width}"
        )
    if planes.shape[-1] != packed_width(width):
        raise KernelInputError(
            f"unpack_planes: width {width} takes {packed_width(width)} bytes per row, "
            f"got {planes.shape[-1]}"
        )
    *rows, size = planes.shape
    blocks = planes.reshape(*rows, size // PLANE_BYTES, 1, PLANE_BYTES)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=planes.device)
    stored = (blocks >> shifts[:, None]) & 3
    return stored.reshape(*rows, size * PLANES)[..., :width].to(torch.int8) - 1
