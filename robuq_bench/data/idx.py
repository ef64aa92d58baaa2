"""IDX files, the format of MNIST and its kin: as they come, by gzip or by xz."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robuq_bench.errors import CheckpointError, UsageError

MAGIC_IMAGES, MAGIC_LABELS = 0x0803, 0x0801
_DECOMPRESSORS = {".gz": gzip.decompress, ".xz": lzma.decompress}


def read_idx_pair(images_file: Path, labels_file: Path, size: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, size, size], zero-padded by `pad_to`, and labels int64 [N].

    Raises:
        CheckpointError: a damaged file, named.
        UsageError: images that cannot be padded to `size`.
    """
    images = read_idx(images_file, MAGIC_IMAGES)
    labels = read_idx(labels_file, MAGIC_LABELS)
    padded = pad_to(torch.from_numpy(images)[:, None], size)
    return padded, torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist), checking its size.

    Args:
        magic: the four bytes it begins with: 0x0803 for [N, H, W], 0x0801 for [N].

    Raises:
        CheckpointError: a damaged file, named.
    """
    try:
        raw = _DECOMPRESSORS.get(path.suffix, bytes)(path.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CheckpointError(
            f"{path} is unreadable or cut short ({error}); copy it anew"
        ) from error
    dims = magic & 0xFF
    header = 4 + 4 * dims
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise CheckpointError(f"{path} is not a {dims}-dimensional IDX file of unsigned bytes")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise CheckpointError(
            f"{path} announces {shape} but holds {len(raw) - header} bytes; copy it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def pad_to(images: Tensor, size: int) -> Tensor:
    """Zero-pad uint8 [N, C, h, w] evenly to [N, C, size, size]; never crops or resizes."""
    height, width = images.shape[-2:]
    extra_h, extra_w = size - height, size - width
    if extra_h < 0 or extra_w < 0 or extra_h % 2 or extra_w % 2:
        raise UsageError(
            f"cannot pad {height}x{width} images evenly to data.image_size={size}; "
            f"use {height}, {height + 2}, {height + 4}, ..."
        )
    border = (extra_w // 2, extra_w // 2, extra_h // 2, extra_h // 2)
    return torch.nn.functional.pad(images, border)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    """Write a uint8 array as an IDX file, compressed by xz where its name ends so."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    raw = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
    is_xz = path.suffix == ".xz"
    path.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME) if is_xz else raw)
