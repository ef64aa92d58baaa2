"""Round-to-nearest of tokens and groups: closed forms, torch's own fake quantization, corners."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from robuq_bench.errors import ConfigError
from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site

WEIGHT = torch.ones(2, 4, dtype=torch.float64)


def quantizer(**values: Any) -> Any:
    method = read_method("activation", {"method": "rtn", **values})
    assert method is not None
    return method.fit(WEIGHT, Site("a.b"))


@pytest.mark.parametrize(
    ("symmetric", "group", "bits", "expected"),
    [
        (True, 0, 4, 0.0210), (True, 128, 4, 0.0138), (True, 64, 4, 0.0116), (True, 16, 4, 0.0072),
        (True, 0, 3, 0.114), (True, 128, 3, 0.075), (True, 64, 3, 0.063), (True, 16, 3, 0.040),
        (True, 0, 2, 0.77), (True, 128, 2, 0.59), (True, 64, 2, 0.52), (True, 16, 2, 0.34),
        (False, 0, 4, 0.0162), (False, 128, 4, 0.0101), (False, 64, 4, 0.0083),
        (False, 16, 4, 0.0048), (False, 0, 3, 0.075), (False, 128, 3, 0.047),
        (False, 64, 3, 0.038), (False, 16, 3, 0.022), (False, 0, 2, 0.40), (False, 128, 2, 0.25),
        (False, 64, 2, 0.21), (False, 16, 2, 0.12),
    ],
)  # fmt: skip
def test_error_on_gaussian_tokens(symmetric: bool, group: int, bits: int, expected: float) -> None:
    """Normalised error on N(0, 1), width 1152: known from simulation to the digits written."""
    x = torch.randn((1000, 1152), generator=torch.Generator().manual_seed(0))
    error = (quantizer(symmetric=symmetric, group=group)(x, bits) - x).square().mean()
    last_digit = 0.5 * 10.0 ** -len(f"{expected:g}".partition(".")[2])
    assert float(error) == pytest.approx(expected, abs=0.02 * expected + last_digit)


tokens = arrays.arrays(
    np.float64, (3, 12), elements=st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3)
)


@given(tokens, st.integers(2, 8), st.sampled_from([0, 1, 3, 12]), st.sampled_from([1.0, 0.9, 0.3]))
def test_symmetric_by_brute_force(x: np.ndarray, bits: int, group: int, clip: float) -> None:
    """Every entry goes to the nearest of the levels ..., -Δ, 0, Δ, ... of its group."""
    out = quantizer(group=group, clip=clip)(torch.from_numpy(x), bits).numpy()
    for token, result in zip(x, out, strict=True):
        parts, results = (np.split(v, 12 // (group or 12)) for v in (token, result))
        for part, found in zip(parts, results, strict=True):
            top = 2 ** (bits - 1) - 1
            lowest = -top - (clip < 1)  # QuaRot's clip reaches one code more
            levels = np.arange(lowest, top + 1) * (clip * np.abs(part).max() / top)
            best = np.abs(part[:, None] - levels).min(1)
            np.testing.assert_allclose(np.abs(part - found), best, rtol=1e-9, atol=1e-9)
            assert np.isclose(found[:, None], levels, rtol=1e-12, atol=0).any(1).all()


@given(tokens, st.integers(2, 8), st.sampled_from([0, 4]), st.sampled_from([1.0, 0.9]))
def test_affine_is_torchs(x: np.ndarray, bits: int, group: int, clip: float) -> None:
    """On tokens that hold 0, which torch's zero point wants; the range is numpy's."""
    x[:, ::4] = 0
    groups = x.reshape(-1, group or 12)
    low, high = clip * groups.min(1), clip * groups.max(1)
    scale = (high - low) / (2**bits - 1)
    live = scale > 0
    zero = np.zeros_like(scale)
    zero[live] = np.rint(-low[live] / scale[live])
    scale[~live] = 1
    expected = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(groups), torch.from_numpy(scale).float(),
        torch.from_numpy(zero).int(), 0, 0, 2**bits - 1,
    )  # fmt: skip
    out = quantizer(symmetric=False, group=group, clip=clip)(torch.from_numpy(x), bits)
    # torch holds scales in float32, where ties may fall to the other side.
    step = torch.from_numpy(scale)[:, None]
    difference = (out.view_as(expected) - expected).abs() / step
    near_tie = ((torch.from_numpy(groups) / step) % 1 - 0.5).abs() < 1e-4
    assert (difference[~near_tie] < 1e-3).all()
    assert (difference <= 1.001).all()


def test_range_without_zero_and_unclamped_zero_point() -> None:
    """[10, 13] at 2 bits: Δ = 1, z = -10, so every whole number is a level."""
    x = torch.tensor([[10.0, 10.6, 12.4, 13.0]])
    assert quantizer(symmetric=False)(x, 2).tolist() == [[10, 11, 12, 13]]
    # z = round(2.5 / 1) = 2: a rounded zero point leaves the top of the range half a step short.
    y = torch.tensor([[-2.5, 0.5, 0.2, -1.2]])
    assert quantizer(symmetric=False)(y, 2).tolist() == [[-2, 0, 0, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.1, -0.7, 1e-42, 3e38])
def test_constant_tokens(value: float, symmetric: bool, bits: int, dtype: torch.dtype) -> None:
    x = torch.full((2, 8), value, dtype=dtype)
    out = quantizer(symmetric=symmetric, group=4)(x, bits)
    assert out.dtype == dtype
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-41)
    clipped = quantizer(symmetric=symmetric, clip=0.9)(x, bits)
    # A clipped negative constant reaches the code below, at 2 bits with a step of 0.9.
    top = 2 ** (bits - 1) - 1
    reach = min(round(1 / 0.9 * top), top + 1) / top if symmetric and value < 0 else 1.0
    torch.testing.assert_close(clipped, x * 0.9 * reach, rtol=1e-6, atol=1e-41)


@pytest.mark.parametrize("symmetric", [True, False])
def test_infinities_and_nan(symmetric: bool) -> None:
    """An infinite entry saturates on the grid of unit steps around 0; NaN stays in its group."""
    low, top = (-7.0, 7.0) if symmetric else (-8.0, 7.0)
    run = quantizer(symmetric=symmetric, group=4)
    x = torch.tensor([[math.inf, 1.2, -math.inf, 0.0, math.nan, 1.0, 2.0, 3.0, 0.0, 5.0, 6.0, 7.0]])
    out = run(x, 4)[0]
    assert out[:4].tolist() == [top, 1.0, low, 0.0]
    assert out[4:8].isnan().all()
    assert out[8:].isfinite().all()
    assert run(torch.full((1, 4), -math.inf), 4).tolist() == [[low] * 4]
    # The range overflows, though no entry does.
    wide = torch.tensor([[3e38, -3e38, 0.0, 2.2]])
    assert run(wide, 4).isfinite().all()


@given(
    arrays.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False)),
    st.integers(2, 8), st.booleans(),
)  # fmt: skip
def test_never_nan_of_numbers(x: np.ndarray, bits: int, symmetric: bool) -> None:
    """Infinities among them; only within a rounding of the largest float may x̂ overflow."""
    out = quantizer(symmetric=symmetric)(torch.from_numpy(x), bits)
    assert not out.isnan().any()
    assert out.isfinite().all() or np.abs(x[np.isfinite(x)]).max() > 1e38


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_is_the_identity(symmetric: bool) -> None:
    x = torch.randn((5, 12), generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn((5, 12), generator=torch.Generator().manual_seed(1))
    run = quantizer(symmetric=symmetric, clip=0.5, group=6)
    values = run(x, 3)
    values.backward(grad)
    assert torch.equal(x.grad, grad)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(values, run(x, 3))
    y = torch.tensor([[math.inf, 1.0, -2.0, 0.5, 0.0, math.nan]], requires_grad=True)
    quantizer(symmetric=symmetric, group=3)(y, 3)[:, :3].sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [[0, 1, 1, 0, 0, 0]]


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.randn((4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    out = quantizer(group=16)(x, 6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantizer(group=16)(x.float(), 6).bfloat16())


def test_any_leading_shape_and_whole_graphs() -> None:
    x = torch.randn((2, 3, 16), generator=torch.Generator().manual_seed(0))
    run = quantizer(group=8, symmetric=False)
    flat: Tensor = run(x.view(6, 16), 4)
    assert torch.equal(run(x, 4), flat.view(2, 3, 16))
    assert run(x[:0], 4).shape == (0, 3, 16)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, 4), run(x, 4))


def test_bits_groups_and_account() -> None:
    method: Any = read_method("activation", {"method": "rtn", "group": 5})
    with pytest.raises(ConfigError, match="group = 5 does not divide the width 12"):
        method.check(7, 12)
    method.check(7, 15)
    assert method.scales_per_token(15) == 3
    affine: Any = read_method("activation", {"method": "rtn", "group": 16, "symmetric": False})
    assert affine.scales_per_token(1152) == 144
    whole: Any = read_method("activation", "rtn")
    assert whole.scales_per_token(1152) == 1
    for bits in (1, 9, True):
        with pytest.raises(ConfigError, match="2 to 8"):
            quantizer().check_bits(bits)
        with pytest.raises(ConfigError, match="2 to 8"):
            quantizer()(torch.ones(1, 4), bits)
    for wrong in ({"bits": 1}, {"clip": 0.0}, {"clip": 1.1}, {"group": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_method("activation", {"method": "rtn", **wrong})
    assert not quantizer().state_dict()
