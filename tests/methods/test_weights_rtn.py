"""Round-to-nearest weights and their grids against numpy, known errors and figures by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from robuq_bench.errors import ConfigError
from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._grid import Codes, UniformGrid
from robuq_bench.methods.weights.rtn import Rtn

Array = NDArray[np.float64]

# Noise over signal of N(0, 1): inputs 1152 with the groups 0, 128, 64, 16.
KNOWN = {
    (True, 4): (0.0210, 0.0138, 0.0116, 0.0072),
    (True, 3): (0.114, 0.075, 0.063, 0.040),
    (True, 2): (0.77, 0.59, 0.52, 0.34),
    (False, 4): (0.0162, 0.0101, 0.0083, 0.0048),
    (False, 3): (0.075, 0.047, 0.038, 0.022),
    (False, 2): (0.40, 0.25, 0.21, 0.12),
}


def rtn(**fields: Any) -> Rtn:
    method = read_method("weight", {"method": "rtn", **fields})
    assert isinstance(method, Rtn)
    return method


def fitted(weight: Tensor, **fields: Any) -> Any:
    return rtn(**fields).fit(weight.double(), Site("layer"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bits_of(values: Tensor) -> Tensor:
    """The bit pattern, in which -0 is not 0."""
    sizes = {torch.float64: torch.int64, torch.float32: torch.int32}
    return values.contiguous().view(sizes.get(values.dtype, torch.int16))


def by_hand(cell: Array, bits: int, symmetric: bool, hold_zero: bool) -> tuple[Array, float]:
    """Codes from 0 (affine) or around 0 (symmetric) of one cell, and what they read, one by one."""
    top, bottom = cell.max(), cell.min()
    if symmetric:
        levels = 2 ** (bits - 1) - 1
        step, zero = float(np.float32(np.abs(cell).max() / levels)), 0.0
        least, most = -levels - 1, levels
    else:
        if hold_zero:
            top, bottom = max(top, 0.0), min(bottom, 0.0)
        step = float(np.float32((top - bottom) / (2**bits - 1)))
        zero = np.round(-bottom / step)
        least, most = 0, 2**bits - 1
    codes = np.array([np.clip(np.round(value / step) + zero, least, most) for value in cell])
    return (codes - zero) * step, step


@pytest.mark.parametrize("symmetric", [True, False])
def test_gaussian_weights_have_the_known_error(symmetric: bool) -> None:
    weight = randn(3000, 1152).float()
    for bits in (4, 3, 2):
        for group, known in zip((0, 128, 64, 16), KNOWN[symmetric, bits], strict=True):
            fields = {"bits": bits, "symmetric": symmetric, "group": group}
            error = (fitted(weight[:1], **fields)(weight) - weight).square().mean()
            assert float(error) == pytest.approx(known, rel=0.02), fields


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    width=st.integers(2, 12),
    per=st.sampled_from(["tensor", "row", "group"]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    hold_zero=st.booleans(),
    shift=st.sampled_from([0.0, 0.7, -3.0]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=120)
def test_codes_and_values_are_those_of_the_formula(
    rows: int,
    groups: int,
    width: int,
    per: str,
    bits: int,
    symmetric: bool,
    hold_zero: bool,
    shift: float,
    seed: int,
) -> None:
    weight = randn(rows, groups * width, seed=seed) + shift
    fields: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    fields["zero_in_range"] = hold_zero or symmetric
    cells = weight.numpy()
    if per == "group":
        fields["group"], cells = width, cells.reshape(-1, width)
    elif per == "tensor":
        fields["per"], cells = per, cells.reshape(1, -1)
    expected = np.array([by_hand(cell, bits, symmetric, hold_zero)[0] for cell in cells])
    module = fitted(weight, **fields)
    np.testing.assert_allclose(
        module(weight).numpy(), expected.reshape(weight.shape), rtol=0, atol=1e-12
    )
    codes = module.codes(weight)
    assert codes.codes.dtype == torch.int8
    assert int(codes.codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.codes.max()) <= 2 ** (bits - 1) - 1
    cells_of = {"tensor": (1, 1), "row": (rows, 1), "group": (rows, groups)}
    assert codes.scale.shape == cells_of[per]
    assert (codes.zero is None) == symmetric
    assert codes.zero is None or torch.equal(codes.zero, codes.zero.round())
    reach = cells.max(1) - cells.min(1) if not symmetric else np.abs(cells).max(1)
    worst = np.abs(expected - cells).max(1)
    if symmetric:  # nothing is clipped: half a step is the most
        assert (worst <= reach / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "row", "group", "shrunk", "fixed"])
def test_training_sees_what_the_codes_say_bit_for_bit(
    dtype: torch.dtype, symmetric: bool, kind: str
) -> None:
    weight = randn(5, 24, seed=3).to(dtype)
    fields: dict[str, Any] = {
        "tensor": {"per": "tensor"},
        "group": {"group": 8},
        "shrunk": {"group": 8, "shrink": 20, "shrink_step": 0.04},
    }.get(kind, {})
    module = fitted(weight, symmetric=symmetric, **fields)
    if kind == "fixed":
        codes = module.codes(weight)
        module = UniformGrid(codes.scale, codes.zero, 0, -8, 7)
        weight = weight * 1.5  # some of it past the ends
    codes = module.codes(weight)
    assert codes.scale.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert module(weight).dtype == dtype
    assert torch.equal(bits_of(module(weight)), bits_of(codes.dequantize().to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"symmetric": False, "group": 4}, {"shrink": 60}])
def test_the_gradient_is_that_of_the_identity(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    weight = randn(3, 8, seed=1).to(dtype).requires_grad_()
    upstream = randn(3, 8, seed=2).to(dtype)
    for module in (
        fitted(weight, **fields),
        UniformGrid(torch.full((3, 1), 0.01), None, 0, -2, 1),
    ):
        weight.grad = None
        module(weight).backward(upstream)
        assert weight.grad is not None
        assert torch.equal(weight.grad, upstream)


def test_half_precision_takes_its_statistics_in_float32() -> None:
    weight = randn(4, 64).half()
    codes = fitted(weight, symmetric=False).codes(weight)
    exact = fitted(weight, symmetric=False).codes(weight.float())
    assert torch.equal(codes.scale, exact.scale)
    assert torch.equal(codes.codes, exact.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hold_zero", [True, False])
@pytest.mark.parametrize("shrink", [0, 40])
def test_rows_without_spread_are_defined(
    dtype: torch.dtype, symmetric: bool, hold_zero: bool, shrink: int
) -> None:
    """Zeros read 0 and constants themselves, also beside the smallest and next to equal values."""
    rows = [[0.0] * 4, [0.5] * 4, [-3.0] * 4, [1e-45] * 4, [1e-38, -1e-38, 0, 0], [5, 5, 5, 5.0001]]
    weight = torch.tensor(rows, dtype=torch.float64).to(dtype)
    fields = {"symmetric": symmetric, "zero_in_range": hold_zero or symmetric, "shrink": shrink}
    module = fitted(weight, bits=4, **fields)
    result = module(weight)
    assert result.isfinite().all()
    tolerance = 1e-6 if dtype != torch.bfloat16 else 1e-2
    assert torch.equal(result[0], weight[0])
    torch.testing.assert_close(result[1:3], weight[1:3], rtol=tolerance, atol=0)
    torch.testing.assert_close(result[5], weight[5], rtol=1e-2, atol=0)
    single = torch.tensor([[0.3]], dtype=dtype)
    torch.testing.assert_close(fitted(single, **fields)(single), single, rtol=tolerance, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_is_not_hidden(symmetric: bool) -> None:
    weight = randn(3, 8).float()
    weight[1, 2] = torch.nan
    result = fitted(randn(3, 8), symmetric=symmetric)(weight)
    assert result[1].isnan().all()
    assert not result[[0, 2]].isnan().any()
    fixed = UniformGrid(torch.ones(3, 1), torch.zeros(3, 1), 0, -8, 7)(weight)
    assert torch.equal(fixed.isnan(), weight.isnan())


@given(
    seed=st.integers(0, 9999),
    symmetric=st.booleans(),
    bits=st.integers(2, 4),
    power=st.sampled_from([2.0, 2.4]),
)
@settings(max_examples=25)
def test_clip_search_finds_the_first_best_candidate(
    seed: int, symmetric: bool, bits: int, power: float
) -> None:
    weight = randn(3, 32, seed=seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio = fitted(
        weight, bits=bits, symmetric=symmetric, shrink=30, shrink_step=0.02, shrink_power=power
    ).ratio
    for row, chosen in zip(weight.numpy(), ratio[:, 0].tolist(), strict=True):
        errors = []
        for index in range(30):
            top, bottom = max(row.max(), 0), min(row.min(), 0)
            keep = float(np.float32(1 - 0.02 * index))
            if symmetric:
                step, zero = float(np.float32(np.abs(row).max() * keep / high)), 0.0
            else:
                step = float(np.float32((top - bottom) * keep / (2**bits - 1)))
                zero = np.round(low - bottom * keep / step)
            read = (np.clip(np.round(row / step) + zero, low, high) - zero) * step
            errors.append((np.abs(read - row) ** power).sum())
        assert chosen == pytest.approx(1 - 0.02 * int(np.argmin(errors)), abs=1e-6)
    assert fitted(torch.zeros(2, 8), shrink=30).ratio.tolist() == [[1.0], [1.0]]  # all tie


def test_clip_search_nears_the_best_uniform_quantizer() -> None:
    """Max (1960): no evenly spaced grid of 16 levels has an error below 0.01154 on N(0, 1)."""
    weight = randn(12, 4000)
    fields = {"symmetric": False, "shrink": 80, "shrink_power": 2.0}
    error = float((fitted(weight, **fields)(weight) - weight).square().mean())
    assert 0.01154 < error < 0.0123  # 0 is a level, so the grid is off centre
    assert error < 0.7 * float((fitted(weight, symmetric=False)(weight) - weight).square().mean())


def test_the_grid_follows_the_weight_and_the_clip_ratio_stays() -> None:
    weight = randn(4, 16)
    module = fitted(weight, shrink=50, bits=3)
    ratio = module.ratio.clone()
    torch.testing.assert_close(module(weight * 8), module(weight) * 8)
    assert torch.equal(module.ratio, ratio)
    assert (ratio < 1).any()


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"shrink": 9}, (6, 1)),
        ({"shrink": 9, "group": 8}, (6, 4)),
        ({"shrink": 9, "per": "tensor"}, (1, 1)),
        ({}, None),
    ],
)
def test_state_has_the_same_shapes_on_a_blank_site(
    fields: dict[str, Any], shape: tuple[int, int] | None
) -> None:
    weight = randn(6, 32, seed=5)
    module, blank = fitted(weight, **fields), fitted(torch.zeros(6, 32), **fields)
    state = module.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == (
        {} if shape is None else {"ratio": shape}
    )
    blank.load_state_dict(state)
    assert torch.equal(blank(weight), module(weight))


def test_a_fixed_grid_keeps_scale_and_zero_under_these_names() -> None:
    grid = UniformGrid(torch.tensor([[0.5, 1.0]]).double(), torch.tensor([[1.0, -2.0]]), 2, -8, 7)
    assert {key: value.dtype for key, value in grid.state_dict().items()} == {
        "scale": torch.float32,
        "zero": torch.float32,
    }
    assert list(UniformGrid(torch.ones(2, 1), None, 0, -8, 7).state_dict()) == ["scale"]
    weight = torch.tensor([[1.2, -0.3, 4.4, 99.0]])
    codes = grid.codes(weight)
    assert codes.codes.tolist() == [[3, 0, 2, 7]]
    assert grid(weight).tolist() == [[1.0, -0.5, 4.0, 9.0]]
    assert isinstance(codes, Codes)
    tensor_wide = UniformGrid(torch.tensor([[2.0]]), None, 0, -2, 1)
    assert tensor_wide(torch.tensor([[3.1, -9.0], [0.9, 40.0]])).tolist() == [[2, -4], [0, 2]]


def test_stored_bits_by_hand() -> None:
    """[6, 32]: 192 codes; a scale per tensor, row or group of 8, and as many zero points."""
    assert rtn(bits=4).storage_bits(6, 32) == 192 * 4 + 6 * 16
    assert rtn(bits=3, symmetric=False).storage_bits(6, 32) == 192 * 3 + 2 * 6 * 16
    assert rtn(bits=4, group=8).storage_bits(6, 32) == 192 * 4 + 24 * 16
    assert rtn(bits=4, group=8, symmetric=False).storage_bits(6, 32) == 192 * 4 + 2 * 24 * 16
    assert rtn(bits=8, per="tensor").storage_bits(6, 32) == 192 * 8 + 16
    assert rtn(bits=8, per="tensor", shrink=9).storage_bits(6, 32) == 192 * 8 + 16
    # Groups of 128 cost an eighth of a bit.
    assert rtn(bits=4, group=128).storage_bits(10, 1280) / 12800 == 4.125
    assert rtn(bits=5).nominal_bits() == 5
    assert rtn(bits=5, group=8).with_bits(3) == rtn(bits=3, group=8)


@pytest.mark.parametrize("group", [5, 7, 96])
def test_a_group_that_does_not_divide_the_width_is_refused(group: int) -> None:
    with pytest.raises(ConfigError, match=rf"group = {group} does not divide the 144 inputs"):
        rtn(group=group).check(10, 144)
    with pytest.raises(ConfigError, match="take a divisor"):
        fitted(randn(2, 144), group=group)
    rtn(group=48).check(10, 144)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"per": "tensor", "group": 8}, "exclude each other"),
        ({"zero_in_range": False}, "needs symmetric = false"),
        ({"shrink": 101}, "leave nothing of the range"),
        ({"grup": 8}, "Extra inputs"),
    ],
)
def test_fields_that_make_no_grid_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rtn(**fields)
    rtn(shrink=100)


def test_a_layer_in_float64_or_half_keeps_working() -> None:
    weight = randn(4, 16)
    module: nn.Module = fitted(weight, shrink=20, symmetric=False)
    whole = module(weight.float())
    torch.testing.assert_close(module.double()(weight), whole.double(), rtol=1e-6, atol=1e-7)
    assert module.half()(weight.half()).isfinite().all()
    grid = UniformGrid(torch.full((4, 1), 0.1), torch.ones(4, 1), 4, -8, 7).half()
    codes = grid.codes(weight.float())
    assert codes.scale.dtype == torch.float32
    assert torch.equal(grid(weight.float()), codes.dequantize())


def test_a_blank_site_has_the_shapes_of_a_search_without_searching() -> None:
    weight = randn(4, 16)
    for fields in ({"shrink": 50}, {"shrink": 50, "group": 4}, {"shrink": 50, "per": "tensor"}):
        searched = fitted(weight, **fields)
        blank: Any = rtn(**fields).fit(weight.double(), Site.blank("layer", 16))
        assert blank.ratio.shape == searched.ratio.shape
        assert (blank.ratio == 1).all()
        blank.load_state_dict(searched.state_dict())
        assert torch.equal(blank(weight), searched(weight))
