"""Activation quantizers and rotations in the terms of the kernels."""

from __future__ import annotations

import functools
import math

import torch

from kernels.hadamard_quantize.reference import Grid, Rotation
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix
from robuq_bench.methods.activations._robust import MAD_TO_SIGMA
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.activations.bitnet import BITNET_EPS
from robuq_bench.methods.activations.robust_midrise import MidriseGrid
from robuq_bench.methods.activations.robust_midtread import MidtreadGrid


def grid_of(name: str, bits: int) -> Grid:
    """The grid of an activation quantizer at these bits.

    Raises:
        UsageError: its levels are not uniform (Lloyd-Max), so integer products cannot use them.
        ConfigError: the quantizer is not defined at these bits.
    """
    if name == "none":
        raise UsageError("activations are not quantized, so there are no integer products")
    quantizer = token_grid(name)
    quantizer.check_bits(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if isinstance(quantizer, MidriseGrid):
        # One bit has no level at zero, so mid-tread is mid-rise there.
        floor = not isinstance(quantizer, MidtreadGrid) or bits == 1
        return Grid("mean-mad", quantizer.step(bits) * MAD_TO_SIGMA, low, high, floor=floor)
    if name == "minmax":
        return Grid("min-max", 1 / (2**bits - 1), low, high)
    if name == "bitnet":
        if bits == 8:
            return Grid("absmax", 1 / 127, low, high, epsilon=BITNET_EPS)
        factor = 1 / math.sqrt(2 ** (bits - 1) - 1)
        return Grid("absmean", factor, low, high, epsilon=BITNET_EPS)
    raise UsageError(
        f"activation method {name!r} has levels that are not evenly spaced, which integer "
        'products cannot use; run it with backend "reference"'
    )


@functools.cache
def kernel_rotation(n: int, device: torch.device) -> Rotation:
    """`hadamard_matrix(n)` as Sylvester(outer) ⊗ inner, inner [m, m] float16.

    Raises:
        UnsupportedHadamardOrder: n has no Hadamard matrix.
        UsageError: n needs two Paley factors, which no kernel applies.
    """
    factors = hadamard_factors(n)
    inner = factors[-1] if factors[-1] & (factors[-1] - 1) else min(n, 32)
    outer = n // inner
    if outer & (outer - 1):
        raise UsageError(
            f"width {n} has the Hadamard factors {factors}; kernels take one factor that is no "
            'power of two. Use backend "reference" for this model'
        )
    with torch.inference_mode(False):
        return Rotation(hadamard_matrix(inner).to(device, torch.float16), outer)
