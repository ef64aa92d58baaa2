"""The reference of rotate-and-quantize against the library's own rotation and quantizers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hadamard_quantize.reference import (
    GatedResidual,
    Grid,
    Modulation,
    Rotation,
    hadamard_quantize,
)
from kernels.launch import KernelInputError
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix
from robuq_bench.methods.activations._robust import MAD_TO_SIGMA
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.activations.bitnet import BITNET_EPS
from robuq_bench.methods.activations.robust_midrise import MidriseGrid
from robuq_bench.methods.activations.robust_midtread import MidtreadGrid

QUANTIZERS = [
    (name, bits)
    for name in ("robust-midtread", "robust-midrise", "minmax", "bitnet")
    for bits in range(2 if name == "bitnet" else 1, 9)
]


def grid_of(name: str, bits: int) -> Grid:
    quantizer = token_grid(name)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if isinstance(quantizer, MidriseGrid):
        floor = bits == 1 or not isinstance(quantizer, MidtreadGrid)
        return Grid("mean-mad", quantizer.step(bits) * MAD_TO_SIGMA, low, high, floor=floor)
    if name == "minmax":
        return Grid("min-max", 1 / (2**bits - 1), low, high)
    statistic, divisor = ("absmax", 127.0) if bits == 8 else ("absmean", math.sqrt(high))
    return Grid(statistic, 1 / divisor, low, high, epsilon=BITNET_EPS)


def rotation_of(width: int) -> Rotation:
    m = hadamard_factors(width)[-1]
    m = min(width, 32) if m & (m - 1) == 0 else m
    return Rotation(hadamard_matrix(m).half(), width // m)


def tokens(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x * torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.2).to(dtype)


@pytest.mark.parametrize(("name", "bits"), QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_of_the_library(name: str, bits: int, dtype: torch.dtype) -> None:
    x = tokens(64, 144, dtype)
    x[0], x[1] = 0.0, 2.5  # zero and constant
    x[2, 5], x[3, 9] = math.inf, -math.inf
    want = token_grid(name).quantize(x, bits)
    got = hadamard_quantize(x, grid_of(name, bits), rotation=None)
    assert got.scale.dtype == dtype
    # Dividing by (2^b - 1) and multiplying by its inverse differ in the last place: rounding ties.
    difference = (got.codes.int() - want.codes.int()).abs()
    ties = 5 if name in ("minmax", "bitnet") else 0
    assert difference.max() <= 1
    assert difference.count_nonzero() <= ties
    torch.testing.assert_close(got.scale, want.scale[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.offset, want.offset[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(got.code_sums, got.codes.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize(
    "width", [12, 36, 64, 128, 144, 352, 384, 576, 768, 1024, 1152, 3072, 4608]
)
@pytest.mark.parametrize("signed", [True, False])
def test_rotation_of_the_library(width: int, signed: bool) -> None:
    """Through the low-rank branch, which reads rotated tokens: down = I shows them all."""
    x = tokens(3, width, torch.float64)
    signs = random_signs(width, "layer", 0) if signed else None
    want = rotate(x, None if signs is None else signs.double())
    grid = grid_of("robust-midtread", 8)
    picked = torch.eye(width, dtype=torch.float64)[:: max(1, width // 64)].contiguous()
    got = hadamard_quantize(x, grid, rotation=rotation_of(width), signs=signs, down=picked)
    assert got.branch is not None
    torch.testing.assert_close(got.branch, want @ picked.T, rtol=1e-9, atol=1e-10)
    assert torch.equal(got.codes, token_grid("robust-midtread").quantize(want, 8).codes)


def test_prologues_are_the_layers_of_torch() -> None:
    x, value = tokens(6, 36), tokens(6, 36).flip(0)
    gate, shift, scale = tokens(2, 36), tokens(2, 36) * 2, tokens(2, 36) * 3
    grid = Grid("absmax", 1 / 127, -128, 127)
    down = torch.eye(36)
    total = x.bfloat16() + gate.repeat_interleave(3, 0) * value
    result = hadamard_quantize(
        x.bfloat16(),
        grid,
        rotation=None,
        modulation=Modulation(shift, scale, 3),
        gated_residual=GatedResidual(value, gate, 3),
        down=down,
    )
    assert result.residual is not None
    assert torch.equal(result.residual, total.bfloat16())
    y = F.layer_norm(result.residual.float(), (36,), eps=1e-6).view(2, 3, 36)
    y = y * (1 + scale[:, None]) + shift[:, None]
    assert result.branch is not None
    torch.testing.assert_close(result.branch, y.view(6, 36))
    result = hadamard_quantize(x, grid, rotation=None, silu=True, down=down)
    assert result.branch is not None
    torch.testing.assert_close(result.branch, F.silu(x))


def test_grouped_signs_are_layers_one_by_one() -> None:
    x = tokens(5, 144)
    signs = torch.stack([random_signs(144, f"layer {i}", 1) for i in range(3)])
    down = tokens(6, 144).view(3, 2, 144)
    grid, rotation = grid_of("robust-midtread", 8), rotation_of(144)
    together = hadamard_quantize(x, grid, rotation=rotation, signs=signs, silu=True, down=down)
    for i in range(3):
        alone = hadamard_quantize(
            x, grid, rotation=rotation, signs=signs[i], silu=True, down=down[i]
        )
        for have, want in zip(together[:4], alone[:4], strict=True):
            assert torch.equal(have[i], want)
        assert together.branch is not None
        assert alone.branch is not None
        torch.testing.assert_close(together.branch[i], alone.branch)


def test_nan_has_the_lowest_code() -> None:
    x = tokens(2, 36)
    x[1, 4] = math.nan
    result = hadamard_quantize(x, Grid("mean-mad", 0.4, -8, 7), rotation=None)
    assert result.codes[1, 4] == -8
    assert result.scale[1] == 1
    assert result.offset[1] == 0


def test_rotation_of_another_width() -> None:
    with pytest.raises(KernelInputError, match="of order K = 72"):
        hadamard_quantize(tokens(2, 72), Grid("absmax", 0.1, -8, 7), rotation=rotation_of(144))
