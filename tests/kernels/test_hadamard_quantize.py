"""The fused rotate-and-quantize kernel against its reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.hadamard_quantize.reference import (
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
)
from kernels.hadamard_quantize.reference import hadamard_quantize as reference
from kernels.hadamard_quantize.triton import hadamard_quantize
from kernels.launch import KernelInputError
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix

A8 = Grid("mean-mad", 0.0388, -128, 127)
A4 = Grid("mean-mad", 0.42, -8, 7)
MISMATCH = {8: 0.02, 4: 0.005, 2: 0.003, 1: 0.003}
"""Share of codes that may differ, by one, because the products have fp16 operands."""


def rotation_of(width: int, device: torch.device) -> Rotation:
    m = hadamard_factors(width)[-1]
    m = min(width, 32) if m & (m - 1) == 0 else m
    return Rotation(hadamard_matrix(m).to(device, torch.float16), width // m)


def tokens(
    rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows of different mean and spread, with a few outlying channels."""
    generator = torch.Generator().manual_seed(rows * 10007 + width)
    x = torch.randn(rows, width, generator=generator)
    x = x * (0.2 + torch.rand(rows, 1, generator=generator)) + 0.1
    x[:, :: width // 5] *= 8
    return x.to(device, dtype)


def signs_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).to(device, torch.float32)


def modulation_of(
    images: int, per_image: int, width: int, device: torch.device, dtype: torch.dtype
) -> Modulation:
    generator = torch.Generator().manual_seed(images)
    both = torch.randn(images, 2, width, generator=generator).mul(0.3).to(device, dtype)
    return Modulation(both[:, 0], both[:, 1], per_image)  # rows are strided


def assert_close(
    result: Quantized, expected: Quantized, grid: Grid, bits: int, relative: float = 5e-4
) -> None:
    """The kernel's tolerance; also that every output was written."""
    codes, want = result.codes.int(), expected.codes.int()
    assert codes.shape == want.shape
    difference = (codes - want).abs()
    assert difference.max() <= 1
    assert difference.sum() <= MISMATCH[bits] * codes.numel() + 2
    assert torch.equal(result.code_sums, codes.sum(-1, dtype=torch.int32))
    assert result.scale.dtype == result.offset.dtype == torch.float32
    torch.testing.assert_close(result.scale, expected.scale, rtol=relative, atol=0)
    # An offset near zero is measured against the token's statistic.
    slack = relative * (expected.offset.abs() + expected.scale / grid.factor)
    assert ((result.offset - expected.offset).abs() <= slack).all()
    assert (result.branch is None) == (expected.branch is None)
    if result.branch is not None and expected.branch is not None:
        error = (result.branch - expected.branch).square().mean().sqrt()
        assert error <= 0.005 * expected.branch.square().mean().sqrt()


def assert_matches_reference(
    x: Tensor, grid: Grid, bits: int, relative: float = 5e-4, **options: Any
) -> Quantized:
    """The kernel against its reference, every output within tolerance; returns the kernel's."""
    result = hadamard_quantize(x, grid, **options)
    expected = reference(x, grid, **options)
    if result.residual is not None and expected.residual is not None:
        # The interpreter rounds to bfloat16 otherwise than a GPU: one unit in the last place. So
        # what follows is compared on the sum that the kernel wrote.
        rtol = 2**-7 if x.dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(result.residual, expected.residual, rtol=rtol, atol=1e-6)
        options.pop("gated_residual")
        expected = reference(result.residual, grid, **options)
    assert_close(result, expected, grid, bits, relative)
    return result


@pytest.mark.parametrize(
    "width", [36, 64, 144, 384, 576, 768, 1024, 1152, 1280, 1536, 2048, 3072, 4096, 4608, 8192]
)
def test_widths(width: int, device: torch.device) -> None:
    assert_matches_reference(
        tokens(3, width, device),
        A8,
        8,
        rotation=rotation_of(width, device),
        signs=signs_of((width,), device),
        down=torch.randn(4, width, device=device) if width in (768, 4608) else None,
    )


@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 1536, 3072, 4608])
def test_ranks_at_the_widths_of_transformers(width: int, device: torch.device) -> None:
    rotation = rotation_of(width, device)
    x = tokens(6, width, device)
    modulation = modulation_of(2, 3, width, device, x.dtype)
    gated = GatedResidual(tokens(6, width, device).flip(0).contiguous(), modulation.scale, 3)
    down = torch.randn(2, 32, width, device=device).to(x.dtype) / width**0.5
    assert_matches_reference(
        x,
        A8,
        8,
        rotation=rotation,
        signs=signs_of((width,), device),
        modulation=modulation,
        gated_residual=gated,
        down=down[0, :16].contiguous(),
    )
    assert_matches_reference(
        x[:3], A4, 4, rotation=rotation, signs=signs_of((2, width), device), silu=True, down=down
    )


def test_paley_one_factor_is_not_symmetric(device: torch.device) -> None:
    rotation = rotation_of(352, device)
    assert not torch.equal(rotation.inner, rotation.inner.T)
    assert_matches_reference(tokens(5, 352, device), A8, 8, rotation=rotation)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (Grid("mean-mad", 0.0388, -128, 127, floor=True), 8),
        (Grid("mean-mad", 1.25, -2, 1), 2),
        (Grid("mean-mad", 1.25, -2, 1, floor=True), 2),
        (Grid("mean-mad", 2.0, -1, 0, floor=True), 1),
        (Grid("min-max", 1 / 255, -128, 127), 8),
        (Grid("min-max", 1 / 15, -8, 7), 4),
        (Grid("min-max", 1.0, -1, 0), 1),
        (Grid("absmax", 1 / 127, -128, 127, epsilon=1e-5), 8),
        (Grid("absmean", 1 / math.sqrt(7), -8, 7, epsilon=1e-5), 4),
        (Grid("absmean", 1.0, -2, 1, epsilon=1e-5), 2),
    ],
)
@pytest.mark.parametrize("rotated", [True, False])
def test_statistics(grid: Grid, bits: int, rotated: bool, device: torch.device) -> None:
    rotation = rotation_of(144, device) if rotated else None
    assert_matches_reference(tokens(17, 144, device), grid, bits, rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rotated", [True, False])
def test_layer_norm_and_modulation(dtype: torch.dtype, rotated: bool, device: torch.device) -> None:
    # Six tokens per image: an image ends inside a tile.
    assert_matches_reference(
        tokens(18, 384, device, dtype),
        A4,
        4,
        rotation=rotation_of(384, device) if rotated else None,
        signs=signs_of((384,), device),
        modulation=modulation_of(3, 6, 384, device, dtype),
        down=torch.randn(16, 384, device=device, dtype=dtype) / 20,
    )


@pytest.mark.parametrize("per_image", [2, 4, 1])
def test_gated_residual(per_image: int, device: torch.device) -> None:
    # Two tokens per image fill a tile of 1152 exactly, so that its modulation is loaded once.
    x = tokens(4, 1152, device)
    modulation = modulation_of(4 // per_image, per_image, 1152, device, torch.bfloat16)
    gated = GatedResidual(tokens(4, 1152, device).flip(0).contiguous(), modulation.scale, per_image)
    rotation = rotation_of(1152, device)
    result = assert_matches_reference(
        x, A4, 4, rotation=rotation, modulation=modulation, gated_residual=gated
    )
    assert result.residual is not None
    assert not torch.equal(result.residual, x)
    assert torch.isfinite(result.residual).all()
    assert_matches_reference(x.half(), A4, 4, rotation=None, gated_residual=gated)


@pytest.mark.parametrize("rank", [8, 16, 32, 3])
def test_grouped(rank: int, device: torch.device) -> None:
    x = tokens(5, 144, device)
    down = torch.randn(3, rank, 144, device=device)
    result = assert_matches_reference(
        x,
        A8,
        8,
        rotation=rotation_of(144, device),
        signs=signs_of((3, 144), device),
        silu=True,
        down=down,
    )
    assert result.codes.shape == (3, 5, 144)
    assert result.branch is not None
    assert result.branch.shape == (3, 5, rank)


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_strides(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    wide = tokens(max(rows, 1), 600, device, dtype)[:rows]
    x = wide[:, 16:160]
    assert rows < 2 or not x.is_contiguous()
    result = hadamard_quantize(x, A8, rotation=rotation_of(144, device))
    assert result.codes.shape == (rows, 144)
    assert result.scale.shape == result.offset.shape == result.code_sums.shape == (rows,)
    if rows:
        assert_close(result, reference(x, A8, rotation=rotation_of(144, device)), A8, 8)


def test_several_tiles_per_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.hadamard_quantize.triton.PROGRAMS", 1)
    monkeypatch.setattr("kernels.hadamard_quantize.triton.LONG_PROGRAMS", 1)
    x = tokens(70, 576, device)
    rotation = rotation_of(576, device)
    modulation = modulation_of(2, 35, 576, device, x.dtype)
    # A token's outlier is rounded to fp16, and so moves all its coordinates and their scale.
    assert_matches_reference(x, A8, 8, relative=7e-4, rotation=rotation, modulation=modulation)
    x = tokens(64, 576, device)
    assert_matches_reference(
        x, A8, 8, rotation=rotation, modulation=modulation_of(2, 32, 576, device, x.dtype)
    )


def test_constant_and_zero_tokens(device: torch.device) -> None:
    x = torch.zeros(4, 144, device=device)
    x[1] = 3.0
    x[2] = tokens(1, 144, device)[0]
    x[3, 0] = 5.0  # its rotation is constant in magnitude
    for rotation in (None, rotation_of(144, device)):
        for grid in (
            A8,
            A4,
            Grid("min-max", 1 / 255, -128, 127),
            Grid("absmax", 1 / 127, -128, 127),
        ):
            result = hadamard_quantize(x, grid, rotation=rotation)
            expected = reference(x, grid, rotation=rotation)
            got = result.codes * result.scale[:, None] + result.offset[:, None]
            want = expected.codes * expected.scale[:, None] + expected.offset[:, None]
            torch.testing.assert_close(got, want, rtol=2e-3, atol=1.1 * float(expected.scale[2]))
            torch.testing.assert_close(got[:2], want[:2], rtol=1e-3, atol=1e-5)
            assert (result.codes[0] == 0).all()
            assert result.scale[0] == 0
            assert (grid.low <= result.codes).all()
            assert (result.codes <= grid.high).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("statistic", ["mean-mad", "min-max", "absmax", "absmean"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinite_entries(
    statistic: Any, rotated: bool, infinity: float, device: torch.device
) -> None:
    grid = Grid(statistic, 0.05, -8, 7)
    rotation = rotation_of(144, device) if rotated else None
    x = tokens(6, 144, device)
    clean = hadamard_quantize(x, grid, rotation=rotation)
    x[2, 75] = infinity
    result = hadamard_quantize(x, grid, rotation=rotation, signs=signs_of((144,), device))
    expected = reference(x, grid, rotation=rotation, signs=signs_of((144,), device))
    assert torch.equal(result.codes[2], expected.codes[2])
    assert result.scale[2] == expected.scale[2] == 1
    assert result.offset[2] == expected.offset[2] == 0
    # Its neighbours in the tile notice nothing.
    others = [0, 1, 3, 4, 5]
    result = hadamard_quantize(x, grid, rotation=rotation)
    assert torch.equal(result.codes[others], clean.codes[others])
    assert torch.equal(result.scale[others], clean.scale[others])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
def test_infinite_token_through_layer_norm(device: torch.device) -> None:
    x = tokens(6, 144, device)
    modulation = modulation_of(1, 6, 144, device, torch.bfloat16)
    rotation = rotation_of(144, device)
    clean = hadamard_quantize(x, A4, rotation=rotation, modulation=modulation)
    x[3, 7] = math.inf
    for rotated in (rotation, None):
        result = hadamard_quantize(x, A4, rotation=rotated, modulation=modulation)
        expected = reference(x, A4, rotation=rotated, modulation=modulation)
        assert torch.equal(result.codes[3], expected.codes[3])
        assert result.scale[3] == 1
        assert result.offset[3] == 0
    result = hadamard_quantize(x, A4, rotation=rotation, modulation=modulation)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(result.codes[others], clean.codes[others])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    exponent=st.integers(-18, 18),
    mean=st.floats(-5, 5),
    seed=st.integers(0, 99),
)
def test_tokens_of_any_magnitude(
    device: torch.device, rows: int, exponent: int, mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 384, generator=generator) + mean) * 10.0**exponent
    assert_matches_reference(x.to(device), A4, 4, rotation=rotation_of(384, device))


class TestErrors:
    def call(self, device: torch.device, rows: int = 4, width: int = 144, **options: Any) -> None:
        options.setdefault("rotation", rotation_of(144, device))
        options.setdefault("x", torch.zeros(rows, width, device=device))
        hadamard_quantize(options.pop("x"), options.pop("grid", A8), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"x": torch.zeros(2, 144, dtype=torch.float64)},
                "x must be bfloat16, float16, float32",
            ),
            ({"x": torch.zeros(2, 144, dtype=torch.int8)}, "x must be bfloat16"),
            ({"x": torch.zeros(2, 3, 144)}, r"x must be \[any, any\]"),
            ({"x": torch.zeros(2, 0), "rotation": None}, "at least one column"),
            ({"x": torch.zeros(144, 4).T}, "last dimension of x must be contiguous"),
            ({"x": torch.zeros(1, 8200), "rotation": None}, "above the 8192 supported"),
            ({"width": 288}, "of order K = 288"),
            ({"signs": torch.ones(143)}, r"signs must be \[144\], got \[143\]"),
            ({"signs": torch.ones(144, dtype=torch.int32)}, "signs must be bfloat16"),
            ({"down": torch.ones(16, 100)}, r"down must be \[any, 144\]"),
            ({"down": torch.ones(65, 144)}, "rank 65; 1 to 64"),
            ({"down": torch.ones(144, 16).T}, "down must be contiguous"),
            ({"grid": Grid("mean-mad", 0.1, -256, 127)}, r"within \[-128, 127\]"),
            ({"grid": Grid("mean-mad", 0.0, -8, 7)}, "factor must be positive"),
            ({"grid": Grid("median", 0.1, -8, 7)}, "unknown grid.statistic 'median'"),  # type: ignore[arg-type]
            (
                {"modulation": Modulation(torch.ones(2, 144), torch.ones(2, 144), 3)},
                "4 rows of x are no multiple of tokens_per_image = 3",
            ),
            (
                {"modulation": Modulation(torch.ones(1, 144), torch.ones(2, 144), 2)},
                r"modulation.shift must be \[2, 144\]",
            ),
            (
                {"modulation": Modulation(torch.ones(1, 144), torch.ones(1, 144), 4), "silu": True},
                "either modulation or silu",
            ),
            (
                {
                    "modulation": Modulation(torch.ones(1, 144), torch.ones(1, 144), 4),
                    "gated_residual": GatedResidual(torch.ones(4, 144), torch.ones(2, 144), 2),
                },
                "differ in tokens_per_image",
            ),
            (
                {
                    "signs": torch.ones(2, 144),
                    "gated_residual": GatedResidual(torch.ones(4, 144), torch.ones(2, 144), 2),
                },
                "take no gated_residual",
            ),
        ],
    )
    def test_input(self, options: dict[str, Any], message: str, device: torch.device) -> None:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        for name, kind in (("modulation", Modulation), ("gated_residual", GatedResidual)):
            if name in moved:
                values = [
                    v.to(device) if isinstance(v, Tensor) else v for v in vars(moved[name]).values()
                ]
                moved[name] = kind(*values)
        with pytest.raises(KernelInputError, match=message):
            self.call(device, **moved)

    def test_factor_above_64(self, device: torch.device) -> None:
        rotation = rotation_of(136, device)
        assert len(rotation.inner) == 68
        with pytest.raises(KernelInputError, match="136 = 2 x 68 is not supported"):
            self.call(device, width=136, rotation=rotation)

    def test_device(self, device: torch.device) -> None:
        inner = torch.ones(36, 36, device="meta")
        x = torch.zeros(2, 144, device=device)
        with pytest.raises(KernelInputError, match=r"rotation.inner is on meta"):
            hadamard_quantize(x, A8, rotation=Rotation(inner, 4))
