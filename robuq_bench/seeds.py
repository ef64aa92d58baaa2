"""Where randomness comes from: one derivation of a seed from what it is for.

`("calibration", 3)` and `("noise", 3)` are unrelated streams although both are of seed 3, and a
stream asked for twice is the same on every machine, in any order. Two exceptions, both because
their numbers are published: an image starts from `manual_seed` of its own number, and the signs of
a rotation are a stream of bits (`hadamard.rotation.random_signs`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seeded(*parts: str | int) -> int:
    """Return the seed in [0, 2**63) of a purpose: its name, the user's seed, and which draw it is.

    The first 8 bytes of SHA-256 of the parts joined by "/", little-endian, without the lowest bit:
    63 bits are what every generator takes. A part may hold "/", so give a purpose always the same
    number of parts.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """Return a CPU generator that depends on nothing but `parts`, seeded by `seeded`."""
    import torch  # here, for what is imported with the configs must stay free of it

    return torch.Generator().manual_seed(seeded(*parts))
