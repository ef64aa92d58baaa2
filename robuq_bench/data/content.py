"""What tensors hold, as one digest."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def content_sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 (64 hex) of tensors' dtypes, shapes and row-major little-endian bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
