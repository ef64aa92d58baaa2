"""Learned steps: gradients against central differences, codes against numpy, positive steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights.lsq import MIN_STEP, LearnedStep, Lsq

Array = NDArray[np.float64]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def method(**fields: Any) -> Lsq:
    read = read_method("weight", {"method": "lsq", **fields})
    assert isinstance(read, Lsq)
    return read


def fitted(weight: Tensor, **fields: Any) -> LearnedStep:
    module = method(**fields).fit(weight.double(), Site.blank("layer", weight.shape[1]))
    assert isinstance(module, LearnedStep)
    return module


def difference(function: Callable[[Array], float], at: Array) -> Array:
    """Central differences of a function, number by number."""
    result = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[index] += 1e-6
        behind[index] -= 1e-6
        result[index] = (function(ahead) - function(behind)) / 2e-6
    return result


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 8),
    bits=st.integers(2, 8),
    per=st.sampled_from(["tensor", "row"]),
    scale_by=st.sampled_from(["tensor", "quantizer"]),
    spread=st.sampled_from([0.3, 1.0, 3.7]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=80)
def test_gradients_are_central_differences_with_rounding_frozen(
    rows: int, columns: int, bits: int, per: str, scale_by: str, spread: float, seed: int
) -> None:
    """Rounding adds what it adds at the point: then Σ g·ŵ is a smooth function of w and s."""
    start = randn(rows, columns, seed=seed)
    module = fitted(start, bits=bits, per=per, gradient_scale=scale_by).double()
    weight = (start * spread).requires_grad_()
    upstream = randn(rows, columns, seed=seed + 1)
    (module(weight) * upstream).sum().backward()
    assert weight.grad is not None
    assert module.step.grad is not None

    g, w, s = upstream.numpy(), weight.detach().numpy(), module.step.detach().numpy()
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    frozen = np.round(np.clip(w / s, least, most)) - np.clip(w / s, least, most)

    def loss(w: Array, s: Array) -> float:
        return float((g * s * (np.clip(w / s, least, most) + frozen)).sum())

    of_weight = difference(lambda moved: loss(moved, s), w)
    of_step = difference(lambda moved: loss(w, moved), s)
    shared = columns if per == "row" and scale_by == "quantizer" else rows * columns
    of_step /= np.sqrt(shared * most)
    np.testing.assert_allclose(weight.grad.numpy(), of_weight, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(module.step.grad.numpy(), of_step, rtol=1e-5, atol=1e-6)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    bits=st.integers(2, 8),
    per=st.sampled_from(["tensor", "row"]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=60)
def test_codes_values_and_start_are_those_of_the_paper(
    rows: int, columns: int, bits: int, per: str, seed: int
) -> None:
    weight = randn(rows, columns, seed=seed)
    module = fitted(weight, bits=bits, per=per)
    most = 2 ** (bits - 1) - 1
    magnitude = np.abs(weight.numpy())
    mean = magnitude.mean().reshape(1, 1) if per == "tensor" else magnitude.mean(1, keepdims=True)
    start = 2 * mean / np.sqrt(most)
    np.testing.assert_allclose(module.step.detach().numpy(), start, rtol=1e-6)
    step = module.step.detach().double().numpy()
    expected = np.round(np.clip(weight.numpy() / step, -most - 1, most))
    codes = module.codes(weight)
    assert codes.codes.dtype == torch.int8
    assert codes.zero is None
    np.testing.assert_array_equal(codes.codes.numpy(), expected)
    np.testing.assert_array_equal(module(weight).detach().numpy(), expected * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_training_sees_what_the_codes_say_bit_for_bit(dtype: torch.dtype, per: str) -> None:
    weight = randn(5, 24).to(dtype).requires_grad_()
    module = fitted(weight.detach(), bits=3, per=per)
    result, codes = module(weight), module.codes(weight)
    assert result.dtype == dtype
    assert codes.scale.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(result, codes.dequantize().to(dtype))
    result.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert module.step.grad is not None
    assert module.step.grad.dtype == module.step.dtype == torch.float32


def test_the_two_scales_of_the_gradient_by_hand() -> None:
    """[2, 8] at 3 bits: N·Q_p is 8·3 for the quantizer of a row and 16·3 for the tensor."""
    weight = randn(2, 8)
    grads = {}
    for scale_by in ("quantizer", "tensor"):
        module = fitted(weight, bits=3, gradient_scale=scale_by)
        module(weight).sum().backward()
        grads[scale_by] = module.step.grad
    torch.testing.assert_close(grads["quantizer"], grads["tensor"] * 2**0.5)
    module = LearnedStep(torch.tensor([[1.0]]), 3, 0.5)
    # Below −4: −4; −1.3 rounds to −1: 0.3; 2.6 to 3: 0.4; above 3: 3. Times 0.5.
    module(torch.tensor([[-9.0, -1.3, 2.6, 5.0]])).sum().backward()
    assert module.step.grad is not None
    assert float(module.step.grad) == pytest.approx(0.5 * (-4 + 0.3 + 0.4 + 3), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, -0.3, 1e-30])
def test_a_step_pushed_past_zero_is_used_as_the_least_and_comes_back(value: float) -> None:
    weight = torch.tensor([[0.5, -1.0, 2.0]])
    module = fitted(weight, bits=3)
    with torch.no_grad():
        module.step.fill_(value)
    result = module(weight)
    assert result.isfinite().all()
    torch.testing.assert_close(result, torch.tensor([[3.0, -4, 3]]) * MIN_STEP)
    torch.testing.assert_close(module.codes(weight).scale, torch.tensor([[MIN_STEP]]))
    # Every weight is past an end: a larger step lessens the error, and the gradient says so.
    for _ in range(200):
        module.step.grad = None
        (module(weight) - weight).square().sum().backward()
        with torch.no_grad():
            module.step -= 0.05 * module.step.grad  # type: ignore[operator]
    assert float((module(weight) - weight).detach().square().sum()) < 0.3


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_without_spread_give_no_nan(per: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0] * 4, [0.5] * 4, [-3.0] * 4, [1e-30] * 4])
    for weight in (rows, torch.zeros(3, 4), torch.full((1, 1), 0.7)):
        module = fitted(weight, per=per)
        weight = weight.to(dtype).requires_grad_()
        result = module(weight)
        result.sum().backward()
        assert result.isfinite().all()
        assert (result[weight == 0] == 0).all()
        for parameter in (weight, module.step):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        assert (module.step > 0).all()


def test_a_step_that_is_not_finite_is_not_hidden() -> None:
    weight = randn(2, 4).float()
    for value in (torch.nan, torch.inf):
        module = fitted(weight)
        with torch.no_grad():
            module.step[0] = value
        assert module(weight)[0].isnan().all()
        assert module(weight)[1].isfinite().all()


def test_training_the_step_lowers_the_error_of_a_layer() -> None:
    """Outputs of a fixed weight: from the start of the paper, which clips, down to far less."""
    weight, x = randn(16, 32).float(), randn(200, 32, seed=1).float()
    module = fitted(weight, bits=4)
    with torch.no_grad():
        module.step.mul_(3)
    before = float((x @ (module(weight).detach() - weight).T).square().mean())
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (x @ (module(weight) - weight).T).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * before


def test_state_has_the_same_shapes_on_a_blank_site() -> None:
    weight = randn(6, 8).float()
    for per, shape in (("tensor", (1, 1)), ("row", (6, 1))):
        module, blank = fitted(weight, per=per), fitted(torch.zeros(6, 8), per=per)
        assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
            "step": shape
        }
        assert [name for name, _ in module.named_parameters()] == ["step"]
        blank.load_state_dict(module.state_dict())
        assert torch.equal(blank(weight), module(weight))


def test_stored_bits_by_hand() -> None:
    assert method(bits=3).storage_bits(6, 32) == 192 * 3 + 6 * 16
    assert method(bits=3, per="tensor").storage_bits(6, 32) == 192 * 3 + 16
    assert method(bits=3).nominal_bits() == 3
    assert method(bits=3, per="tensor").with_bits(2) == method(bits=2, per="tensor")
    assert not method().needs
    for bits in (1, 9):
        with pytest.raises(ValidationError, match="bits"):
            method(bits=bits)
