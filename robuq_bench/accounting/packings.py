"""Ways to store a quantized model.

A way of storing says how many bits a ternary code takes, and the precision of everything else.
Codes that are not ternary take as many bits as their method says, packed without gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

TERNARY_BITS = math.log2(3)


@dataclass(frozen=True)
class Packing:
    """One way to store a quantized model.

    Attributes:
        name: row name.
        bits_per_code: bits of one ternary code, in whole bytes per tensor ("2bit": in blocks of 128
            codes per row).
        low_rank_bytes: bytes of each low-rank value; 0 leaves the branch out.
        rest_bytes: bytes of each other value (biases, embeddings, layers kept full precision). 1
            is int8 for matrices, with a float32 scale per slice of their shorter side, and fp16
            for vectors; low_rank_bytes likewise.
        scale_bytes: bytes of each scale and zero point of weights, and of each scale of inputs; 0
            leaves them out.
        has_signs: whether what rotations need is stored, such as random signs at one bit each.
        adaln_low_rank: whether the modulation linears have a low-rank branch.
        published: the published size reduction that this reading explains or bounds.
        reading: what it assumes.
    """

    name: str
    bits_per_code: Fraction
    low_rank_bytes: int
    rest_bytes: int
    scale_bytes: int
    has_signs: bool = True
    adaln_low_rank: bool = True
    published: float | None = None
    reading: str = ""


CODES = {
    "ideal": (Fraction(TERNARY_BITS), "log2(3) bits a code, the entropy bound"),
    "base3": (Fraction(8, 5), "five codes a byte, 1.6 bits"),
    "2bit": (Fraction(2), "four codes a byte, rows in blocks of 128 as the kernels read them"),
}
FLOAT_BYTES = {"fp32": 4, "fp16": 2}


def _float_packings(code: str, bits: Fraction, reading: str) -> tuple[Packing, ...]:
    return tuple(
        Packing(
            f"{code}/{low_rank}/{rest}",
            bits,
            FLOAT_BYTES[low_rank],
            FLOAT_BYTES[rest],
            FLOAT_BYTES[rest],
            reading=f"{reading}; {low_rank} low-rank branch; {rest} scales and rest",
        )
        for low_rank, rest in product(FLOAT_BYTES, FLOAT_BYTES)
    )


def _int8_packings(code: str, bits: Fraction, reading: str) -> tuple[Packing, ...]:
    return tuple(
        Packing(
            f"{code}/int8/int8{suffix}",
            bits,
            low_rank_bytes=1,
            rest_bytes=1,
            scale_bytes=2,
            adaln_low_rank=not suffix,
            reading=f"{reading}; int8 branch{suffix} and matrices, fp16 scales and vectors",
        )
        for suffix in ("", " without adaLN")
    )


PACKINGS = tuple(row for code, how in CODES.items() for row in _float_packings(code, *how))
INT8_PACKINGS = _int8_packings("base3", *CODES["base3"])
# For plans without ternary weights, where the three layouts of ternary codes would be one.
DENSE = "dense"
_DENSE_CODES = "each code at its bits, without gaps"
DENSE_PACKINGS = (
    *_float_packings(DENSE, Fraction(0), _DENSE_CODES),
    *_int8_packings(DENSE, Fraction(0), _DENSE_CODES),
)
DEFAULT_PACKING = "base3/fp32/fp32"
PUBLISHED_RANK = 16  # the deployment fork's, at DiT-XL/2's width of 1152
# Hypotheses that reproduce the published figures on DiT-XL/2 with that rank; nobody confirmed them.
READINGS = (
    Packing(
        "reading-13.2x",
        Fraction(158, 100),
        low_rank_bytes=4,
        rest_bytes=4,
        scale_bytes=0,
        has_signs=False,
        published=13.2,
        reading="1.58 bits a code, fp32 low-rank branch and rest, scales not counted",
    ),
    Packing(
        "reading-15.2x",
        Fraction(8, 5),
        low_rank_bytes=2,
        rest_bytes=4,
        scale_bytes=4,
        has_signs=False,
        adaln_low_rank=False,
        published=15.2,
        reading="1.6 bits a code, fp16 low-rank branch without adaLN, fp32 scales and rest",
    ),
    Packing(
        "bound-2bit",
        Fraction(2),
        low_rank_bytes=0,
        rest_bytes=2,
        scale_bytes=0,
        has_signs=False,
        published=15.2,
        reading="the most that 2 bits a code can give: no branch, no scales, fp16 rest",
    ),
)
FULL_PRECISION_PACKINGS = tuple(
    Packing(name, Fraction(0), size, size, size, reading=f"every parameter in {name}")
    for name, size in FLOAT_BYTES.items()
)
