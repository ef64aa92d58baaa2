"""The compiled rotate-and-quantize against its reference, on every instruction set here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compiled import GRIDS, WIDTHS, available, force, rotation_of, signs_of, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.hadamard_quantize import cpu as quantizing
from kernels.hadamard_quantize import reference as quantizing_reference
from kernels.hadamard_quantize.reference import (
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
)
from robuq_bench.hadamard.transform import hadamard_matrix

MISMATCH = 1e-3
"""Share of codes that may differ, by one: those nearer to the next code than sums are accurate."""

pytestmark = pytest.mark.usefixtures("library")


def assert_quantized(got: Quantized, want: Quantized, grid: Grid) -> None:
    difference = (got.codes.int() - want.codes.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= max(1, MISMATCH * difference.numel())
    assert torch.equal(got.code_sums, got.codes.sum(-1, dtype=torch.int32))
    torch.testing.assert_close(got.scale, want.scale, rtol=5e-6, atol=0)
    # An offset near zero is measured against the token's statistic.
    slack = 5e-6 * (want.offset.abs() + want.scale / grid.factor)
    assert ((got.offset - want.offset).abs() <= slack).all()
    assert (got.branch is None) == (want.branch is None)
    if got.branch is not None and want.branch is not None:
        size = float(want.branch.square().mean().sqrt())
        torch.testing.assert_close(got.branch, want.branch, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("width", [12, 32, 36, 352, 1024, *WIDTHS])
def test_rotation(width: int, instructions: str) -> None:
    """352 has a factor that is not symmetric."""
    x, grid = tokens(19, width), GRIDS["mid-tread"]
    options: dict[str, Any] = {
        "rotation": rotation_of(width),
        "signs": signs_of(width),
        "down": torch.randn(5, width),
    }
    got = quantizing.hadamard_quantize(x, grid, **options)
    assert_quantized(got, quantizing_reference.hadamard_quantize(x, grid, **options), grid)


def test_factor_of_any_order(instructions: str) -> None:
    """A ±1 matrix whose order is no multiple of four, against the dense product."""
    inner, outer = signs_of(7, 7), 8
    x, down = tokens(5, 56), torch.eye(56)
    got = quantizing.hadamard_quantize(
        x, GRIDS["mid-tread"], rotation=Rotation(inner, outer), down=down
    )
    dense = torch.kron(hadamard_matrix(outer), inner.double()) / math.sqrt(56)
    assert got.branch is not None
    torch.testing.assert_close(got.branch.double(), x.double() @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rotated", [True, False])
def test_statistics(grid: str, rotated: bool, instructions: str) -> None:
    x = tokens(37, 144)
    rotation = rotation_of(144) if rotated else None
    got = quantizing.hadamard_quantize(x, GRIDS[grid], rotation=rotation)
    want = quantizing_reference.hadamard_quantize(x, GRIDS[grid], rotation=rotation)
    assert_quantized(got, want, GRIDS[grid])
    if not rotated and grid in ("min-max", "absmax"):  # nothing is summed
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.offset, want.offset)


@pytest.mark.parametrize("grid", GRIDS)
def test_infinite_nan_and_constant_tokens(grid: str, instructions: str) -> None:
    x = tokens(20, 40)
    x[1] = 0.0
    x[3] = 2.5
    x[5, 7], x[6, 39], x[17, 0] = math.inf, -math.inf, math.nan
    got = quantizing.hadamard_quantize(x, GRIDS[grid], rotation=None)
    want = quantizing_reference.hadamard_quantize(x, GRIDS[grid], rotation=None)
    odd = [1, 3, 5, 6, 17]
    assert torch.equal(got.codes[odd], want.codes[odd])
    assert torch.equal(got.scale[odd], want.scale[odd])
    assert torch.equal(got.offset[odd], want.offset[odd])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modulation_residual_and_half_precision(dtype: torch.dtype, instructions: str) -> None:
    """Six tokens per image: an image ends inside a block of lanes; rows are strided."""
    both = torch.randn(3, 2, 384, generator=torch.Generator().manual_seed(1)).mul(0.3).to(dtype)
    x = tokens(18, 400).to(dtype)[:, 16:]
    options: dict[str, Any] = {
        "rotation": rotation_of(384),
        "signs": signs_of(384),
        "modulation": Modulation(both[:, 0], both[:, 1], 6),
        "gated_residual": GatedResidual(tokens(18, 384).to(dtype), both[:, 0], 6),
        "down": torch.randn(16, 384, dtype=dtype) / 20,
    }
    got = quantizing.hadamard_quantize(x, GRIDS["mid-tread"], **options)
    want = quantizing_reference.hadamard_quantize(x, GRIDS["mid-tread"], **options)
    assert_quantized(got, want, GRIDS["mid-tread"])
    assert got.residual is not None
    assert want.residual is not None
    assert got.residual.dtype == dtype
    assert torch.equal(got.residual, want.residual)


def test_groups_are_layers_one_by_one() -> None:
    x, grid = tokens(5, 144), GRIDS["mid-rise"]
    options: dict[str, Any] = {
        "rotation": rotation_of(144),
        "signs": signs_of(3, 144),
        "silu": True,
        "down": torch.randn(3, 4, 144),
    }
    got = quantizing.hadamard_quantize(x, grid, **options)
    assert got.codes.shape == (3, 5, 144)
    assert_quantized(got, quantizing_reference.hadamard_quantize(x, grid, **options), grid)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    order=st.integers(1, 45),
    log_outer=st.integers(0, 4),
    rank=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_rotations_of_any_shape(
    rows: int, order: int, log_outer: int, rank: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, grid = order * 2**log_outer, Grid("min-max", 1 / 15, -8, 7)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, 2, (order, order), generator=generator).mul(2.0).sub(1.0)
    options: dict[str, Any] = {
        "rotation": Rotation(inner, 2**log_outer),
        "signs": signs_of(width),
        "down": torch.randn(rank, width, generator=generator) if rank else None,
    }
    x = tokens(rows, width, seed % 1000)
    # Exact ties of a random ±1 matrix round either way, so tokens are compared before rounding.
    want = quantizing_reference.hadamard_quantize(x.double(), grid, **options)
    for name in available():
        force(name, monkeypatch)
        got = quantizing.hadamard_quantize(x, grid, **options)
        assert (got.codes.int() - want.codes.int()).abs().max() <= 1, name
        assert torch.equal(got.code_sums, got.codes.sum(-1, dtype=torch.int32))
        size = float(x.abs().max()) * math.sqrt(width)
        torch.testing.assert_close(got.scale.double(), want.scale, rtol=1e-5, atol=1e-6 * size)
        if rank:
            assert got.branch is not None
            assert want.branch is not None
            error = (got.branch.double() - want.branch).abs().max()
            assert error <= 1e-5 * size * math.sqrt(width)
