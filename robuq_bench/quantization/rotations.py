"""Input rotation of a linear layer: y = W x = (W D H)(H^T D x) for signs D and orthonormal H."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robuq_bench.quantization.hadamard import hadamard_transform


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
