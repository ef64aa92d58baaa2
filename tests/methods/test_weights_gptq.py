"""GPTQ against optimal brain compression by explicit inverses, closed forms, and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._grid import Codes, Rule
from robuq_bench.methods.weights.gptq import Gptq, gptq

Array = NDArray[np.float64]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated channels of unequal size."""
    sizes = torch.linspace(0.2, 2, width, dtype=torch.float64)
    return randn(tokens, width, seed=seed) @ randn(width, width, seed=seed + 1) * sizes


def neighbours(tokens: int, width: int) -> Tensor:
    """Unit channels, each correlated 0.8 with the one before it and through it with the rest."""
    x = randn(tokens, width)
    for i in range(1, width):
        x[:, i] = 0.8 * x[:, i - 1] + 0.6 * x[:, i]
    return x


def method(**fields: Any) -> Gptq:
    read = read_method("weight", {"method": "gptq", **fields})
    assert isinstance(read, Gptq)
    return read


def site_of(x: Tensor) -> Site:
    return Site("blocks.3.fc1", gram=x.T @ x, count=len(x))


def rounded(weight: Tensor, **fields: Any) -> Tensor:
    read = read_method("weight", {"method": "rtn", **fields})
    assert read is not None
    return read.fit(weight, Site())(weight)


def cell_grid(cell: Array, rule: Rule) -> tuple[float, float]:
    if rule.symmetric:
        return float(np.float32(np.abs(cell).max() / rule.high)), 0.0
    top, bottom = cell.max(), cell.min()
    if rule.zero_in_range:
        top, bottom = max(top, 0.0), min(bottom, 0.0)
    step = float(np.float32((top - bottom) / (2**rule.bits - 1)))
    return step, float(np.round(rule.low - bottom / step))


def compressed(
    weight: Array, gram: Array, count: int, rule: Rule, group: int, damping: float, act_order: bool
) -> Array:
    """What the weight reads, by the rule of optimal brain compression (arXiv 2208.11580), row by
    row: after a weight is rounded, all that are left take the least-squares correction
    (w − ŵ)/[H⁻¹]_11 · H⁻¹_:1, with H of those left only, inverted anew at each column.
    """
    hessian = gram * 2 / count
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(gram))
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
    result = np.zeros_like(weight)
    for row, original in enumerate(weight):
        now = original.copy()
        grids = {}
        for place, column in enumerate(order):
            key = column // group if group else 0
            if key not in grids:
                source = original if act_order or not group else now
                start = key * group
                cell = source[start : start + group] if group else source
                grids[key] = cell_grid(cell, rule)
            step, zero = grids[key]
            code = np.clip(np.round(now[column] / step) + zero, rule.low, rule.high)
            result[row, column] = (code - zero) * step
            left = order[place:]
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            now[left] -= (now[column] - result[row, column]) / inverse[0, 0] * inverse[:, 0]
    return result


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    width=st.integers(2, 5),
    grouped=st.booleans(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    damping=st.sampled_from([0.001, 0.01, 0.3]),
    block=st.sampled_from([1, 3, 128]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=150)
def test_it_is_optimal_brain_compression_column_by_column(
    rows: int,
    groups: int,
    width: int,
    grouped: bool,
    bits: int,
    symmetric: bool,
    act_order: bool,
    damping: float,
    block: int,
    seed: int,
) -> None:
    x = inputs(3 * groups * width, groups * width, seed)
    weight, rule = randn(rows, groups * width, seed=seed + 2), Rule(bits, symmetric)
    group = width if grouped else 0
    codes = gptq(
        weight,
        x.T @ x,
        len(x),
        rule,
        group=group,
        damping=damping,
        act_order=act_order,
        block=block,
    )
    expected = compressed(
        weight.numpy(), (x.T @ x).numpy(), len(x), rule, group, damping, act_order
    )
    np.testing.assert_allclose(codes.dequantize().numpy(), expected, rtol=1e-6, atol=1e-9)
    assert codes.codes.dtype == torch.int8
    assert codes.scale.shape == (rows, groups if grouped else 1)


def test_two_columns_by_hand() -> None:
    """Grid step 1. H ∝ [[2, 1], [1, 4]]: 0.4 becomes 0, and the second weight, which the loss
    2d₁² + 2d₁d₂ + 4d₂² wants moved by 0.4/4 = 0.1, goes from 2.45 to 2.55 and rounds to 3. With the
    largest diagonal first, 2.45 becomes 2, 0.4 becomes 0.4 + 0.45/2 = 0.625 and rounds to 1.
    """
    gram = torch.tensor([[2.0, 1.0, 0], [1.0, 4.0, 0], [0, 0, 1]], dtype=torch.float64)
    weight = torch.tensor([[0.4, 2.45, 7.0]], dtype=torch.float64)
    plain = gptq(weight, gram, 5, Rule(4), damping=0)
    assert plain.scale.item() == 1
    assert plain.codes.tolist() == [[0, 3, 7]]
    ordered = gptq(weight, gram, 5, Rule(4), damping=0, act_order=True)
    assert ordered.codes.tolist() == [[1, 2, 7]]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fields", [{}, {"group": 8}, {"symmetric": False, "group": 8}])
def test_uncorrelated_inputs_leave_round_to_nearest(
    fields: dict[str, Any], act_order: bool
) -> None:
    weight = randn(6, 32)
    expected = rounded(weight, **fields)
    sizes = torch.linspace(0.1, 3, 32, dtype=torch.float64)
    hairs = 1e-7 * (torch.ones(32, 32) - torch.eye(32))  # so that columns are gone through
    for gram in (torch.eye(32).double(), sizes.diag()):
        for size in (0, 1):
            site = Site(gram=gram + size * hairs, count=7)
            _, result = method(act_order=act_order, **fields).fit(weight, site)
            torch.testing.assert_close(result, expected, rtol=size * 1e-6, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4},
        {"bits": 3, "group": 16},
        {"bits": 3, "group": 16, "symmetric": False, "act_order": True},
        {"bits": 2, "shrink": 40, "symmetric": False},
    ],
)
def test_the_output_error_is_far_below_that_of_rounding(fields: dict[str, Any]) -> None:
    x, weight = neighbours(400, 96), randn(40, 96, seed=9)
    _, result = method(**fields).fit(weight, site_of(x))
    plain = rounded(weight, **{key: fields[key] for key in fields if key != "act_order"})
    error = (x @ (result - weight).T).square().mean()
    assert error < 0.4 * (x @ (plain - weight).T).square().mean()
    assert (result - weight).square().mean() > (plain - weight).square().mean()


def test_the_gain_is_what_the_inputs_tell_of_each_other() -> None:
    """Fine grids leave Σ Δ²/12 · var(x_i | x_{j>i}) of Σ Δ²/12 · var(x_i): 1 − 0.8² of it here."""
    x, weight = neighbours(8000, 64), randn(60, 64, seed=9)
    _, result = method(bits=8, damping=1e-6).fit(weight, site_of(x))
    error = (x @ (result - weight).T).square().mean()
    plain = (x @ (rounded(weight, bits=8) - weight).T).square().mean()
    assert float(error / plain) == pytest.approx(0.36, rel=0.06)


def test_act_order_is_undone() -> None:
    """Sorting the inputs oneself, and back afterwards, gives the same as `act_order`."""
    x, weight = inputs(200, 24), randn(5, 24)
    gram = x.T @ x
    order = gram.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(24))
    inside = gptq(weight, gram, 200, Rule(3), act_order=True).dequantize()
    outside = gptq(weight[:, order], gram[order][:, order], 200, Rule(3)).dequantize()
    assert torch.equal(inside[:, order], outside)
    assert not torch.equal(inside, gptq(weight, gram, 200, Rule(3)).dequantize())


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    x, weight = inputs(200, 24), randn(5, 24)
    gram = x.T @ x
    damped = gram + 0.25 * gram.diagonal().mean() * torch.eye(24)
    inside = gptq(weight, gram, 200, Rule(3), damping=0.25)
    assert torch.equal(inside.codes, gptq(weight, damped, 200, Rule(3), damping=0).codes)
    assert not torch.equal(inside.codes, gptq(weight, gram, 200, Rule(3)).codes)
    drowned = gptq(weight, gram, 200, Rule(3), damping=1e9).dequantize()
    assert torch.equal(drowned, rounded(weight, bits=3))


def test_unused_inputs_get_weight_zero_and_widen_no_grid() -> None:
    x, weight = inputs(200, 24), randn(5, 24)
    x[:, 7] = 0
    weight[:, 7] = 1000
    grid, result = method().fit(weight, site_of(x))
    assert (result[:, 7] == 0).all()
    assert float(grid.scale.max()) < 1
    _, nothing = method(group=8).fit(weight, Site(gram=torch.zeros(24, 24), count=0))
    assert (nothing == 0).all()


def test_unused_inputs_count_as_one_in_the_damping() -> None:
    """As in GPTQ's code, where H = 2/n·Σxxᵀ has a 1 for them when its mean is taken."""
    x, weight = inputs(200, 24) / 50, randn(5, 24)
    x[:, 7] = weight[:, 7] = 0
    gram = x.T @ x
    codes = gptq(weight, gram, 200, Rule(3), damping=0.1).codes
    gram[7, 7] = 200 / 2
    expected = compressed(weight.numpy(), gram.numpy(), 200, Rule(3), 0, 0.1, False)
    scale = gptq(weight, gram, 200, Rule(3)).scale
    np.testing.assert_array_equal((codes * scale).numpy(), expected)
    gram[7, 7] = 1e-9
    assert not torch.equal(codes, gptq(weight, gram, 200, Rule(3), damping=0.1).codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_the_grid_returns_the_fitted_weight_unchanged(
    symmetric: bool, bits: int, group: int
) -> None:
    """In every dtype a layer may keep it in, and the codes are the same ones."""
    dtypes = [torch.float64, torch.float32, torch.float16]
    if bits < 8 or symmetric:  # bfloat16 cannot tell 254 steps from 255
        dtypes.append(torch.bfloat16)
    x, weight = inputs(200, 24), randn(50, 24)
    weight[3] = 0
    grid, result = method(bits=bits, symmetric=symmetric, group=group).fit(weight, site_of(x))
    assert result.dtype == torch.float64
    assert result.isfinite().all()
    found = grid.codes(result).codes
    for dtype in dtypes:
        stored = result.to(dtype)
        assert torch.equal(grid(stored), stored)
        codes: Codes = grid.codes(stored)
        assert torch.equal(codes.codes, found)
        assert torch.equal(codes.dequantize().to(dtype), stored)


def test_state_has_the_same_shapes_on_a_blank_site() -> None:
    x, weight = inputs(200, 24), randn(5, 24)
    for fields, shape in (({}, (5, 1)), ({"group": 8}, (5, 3))):
        fitting = method(symmetric=False, shrink=10, **fields)
        grid, result = fitting.fit(weight, site_of(x))
        blank, _ = fitting.fit(torch.zeros(5, 24).double(), Site.blank("layer", 24))
        assert {key: tuple(value.shape) for key, value in grid.state_dict().items()} == {
            "scale": shape,
            "zero": shape,
        }
        blank.load_state_dict(grid.state_dict())
        assert torch.equal(blank(result.float()), result.float())
    assert list(method().fit(weight, site_of(x))[0].state_dict()) == ["scale"]


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    weight, x = randn(5, 24), inputs(10, 24)
    with pytest.raises(UsageError, match=r"blocks\.3\.fc1.*damping = 0\.0.*singular"):
        method(damping=0.0).fit(weight, Site("blocks.3.fc1", gram=torch.ones(24, 24), count=10))
    with pytest.raises(UsageError, match=r"blocks\.3\.fc1.*not finite"):
        method().fit(weight, site_of(x * torch.nan))
    with pytest.raises(UsageError, match=r"'fc2'.*needs gram"):
        method().fit(weight, Site("fc2"))
    with pytest.raises(ConfigError, match="group = 7 does not divide the 24 inputs"):
        method(group=7).fit(weight, site_of(x))
    method().fit(weight, site_of(x))  # fewer inputs than channels: damping is there for it


def test_it_asks_for_the_gram_and_stores_what_rounding_does() -> None:
    assert method().needs == {"gram"}
    fitting = method(bits=3, group=8, symmetric=False)
    assert fitting.storage_bits(6, 32) == 192 * 3 + 2 * 24 * 16
    assert fitting.nominal_bits() == 3
    assert fitting.with_bits(5).nominal_bits() == 5


def test_fitting_leaves_its_inputs_alone() -> None:
    x, weight = inputs(200, 24), randn(5, 24)
    x[:, 3] = 0
    site, before = site_of(x), weight.clone()
    assert site.gram is not None
    gram = site.gram.clone()
    method(group=8, act_order=True).fit(weight, site)
    assert torch.equal(weight, before)
    assert torch.equal(site.gram, gram)


def test_a_rotated_blank_site_takes_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded afterwards is not worth a Cholesky factor and a loop."""
    turn = torch.linalg.qr(randn(24, 24)).Q
    gram = turn @ torch.eye(24, dtype=torch.float64) @ turn.T
    assert not torch.equal(gram, torch.eye(24, dtype=torch.float64))
    monkeypatch.setattr("robuq_bench.methods.weights.gptq._inverse_factor", None)
    weight = randn(5, 24)
    _, result = method(group=8).fit(weight, Site(gram=gram, count=24))
    assert torch.equal(result, rounded(weight, group=8))
