"""Static activations: percentile against numpy.quantile, LSQ's gradients against differences."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods import read_method
from robuq_bench.methods.activations.percentile import quantile
from robuq_bench.methods.site import Site

WEIGHT = torch.ones(2, 16, dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(name: str, tokens: Tensor, weight: Tensor = WEIGHT, **values: Any) -> Any:
    method = read_method("activation", {"method": name, **values})
    assert method is not None
    return method.fit(weight, Site("a.b", tokens=tokens))


@given(
    arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(0, 1),
)
def test_quantile_is_numpys(values: np.ndarray, q: float) -> None:
    found = quantile(torch.from_numpy(values), q)
    expected = np.quantile(values.astype(np.float64), q)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("q", [0.9, 0.999, 1.0])
def test_percentile_range(q: float, sign: int) -> None:
    """Of skewed tokens, so that either end is the larger one."""
    tokens = sign * (gaussian(300, 16).exp() - 1.5)
    low, high = np.quantile(tokens.double().numpy(), [1 - q, q])
    module = fit("percentile", tokens, q=q)
    assert float(module.low) == pytest.approx(low, rel=1e-9)
    assert float(module.high) == pytest.approx(high, rel=1e-9)
    bound = fit("percentile", tokens, q=q, symmetric=True)
    assert float(bound.high) == -float(bound.low) == pytest.approx(max(-low, high), rel=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_torchs_with_its_gradient(symmetric: bool, bits: int) -> None:
    """One fit serves all bits; values and gradient are those of torch's fake quantization."""
    module = fit("percentile", gaussian(200, 16) + 0.3, q=0.98, symmetric=symmetric)
    low, high = float(module.low), float(module.high)
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    scale = np.float32(high / top if symmetric else (high - low) / top)
    zero = 0 if symmetric else round(-low / scale)
    x, grad = 2 * gaussian(50, 16, seed=1), gaussian(50, 16, seed=2)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    module.float()(ours, bits).backward(grad)
    torch.fake_quantize_per_tensor_affine(
        theirs, float(scale), zero, -top if symmetric else 0, top
    ).backward(grad)
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(scale), zero, -top if symmetric else 0, top
    )
    torch.testing.assert_close(module(x, bits), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert 0 < (ours.grad == 0).float().mean() < 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["percentile", "lsq"])
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_constant_calibration(name: str, value: float) -> None:
    module = fit(name, torch.full((4, 16), value), bits=4).float()
    x = torch.tensor([[value, value * 3, 100.0, -100.0, math.inf, -math.inf]])
    out = module(x, 4)
    assert out.isfinite().all()
    if name == "percentile":
        assert out[0, 0] == value
    else:
        assert module.step.item() == pytest.approx(2 * abs(value) / math.sqrt(7) if value else 1)


@pytest.mark.parametrize("name", ["percentile", "lsq"])
def test_infinities_and_nan(name: str) -> None:
    module = fit(name, gaussian(60, 16), bits=3).float()
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.1, 1e30, -1e30]])
    out = module(x, 3)[0]
    assert out[2].isnan()
    assert torch.equal(out[:2], out[4:])
    assert out[[0, 1, 3]].isfinite().all()
    y = x[:, [0, 1, 3]].clone().requires_grad_()
    module(y, 3).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, torch.tensor([[0.0, 0.0, 1.0]]))
    if name == "lsq":
        assert module.step.grad.isfinite()


@pytest.mark.parametrize("name", ["percentile", "lsq"])
def test_state_loads_into_a_blank_site(name: str) -> None:
    method = read_method("activation", {"method": name, "bits": 3})
    assert method is not None
    fitted, blank = fit(name, gaussian(99, 16), bits=3), method.fit(WEIGHT, Site.blank("a.b", 16))
    x = gaussian(5, 16, seed=4).double()
    assert not torch.equal(blank(x, 3), fitted(x, 3))
    blank.load_state_dict(fitted.state_dict())
    assert torch.equal(blank(x, 3), fitted(x, 3))
    assert all(value.shape == () for value in fitted.state_dict().values())
    assert method.scales_per_token(1152) == 0  # type: ignore[attr-defined]
    assert method.needs == {"tokens"}
    assert torch.equal(pickle.loads(pickle.dumps(fitted))(x, 3), fitted(x, 3))
    half = fit(name, gaussian(99, 16), bits=3).float()
    assert half(x.bfloat16(), 3).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["percentile", "lsq"])
def test_refusals(name: str) -> None:
    with pytest.raises(UsageError, match=r"'a.b'.*tokens"):
        read_method("activation", name).fit(WEIGHT, Site("a.b"))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"'a.b'.*not all finite"):
        fit(name, torch.tensor([[1.0, math.nan]]))
    with pytest.raises(UsageError, match=r"'a.b'.*empty"):
        fit(name, torch.ones(0, 16))
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bits"):
            fit(name, gaussian(4, 16), bits=bits)
    with pytest.raises(ValueError, match="q"):
        fit("percentile", gaussian(4, 16), q=0.5)


def test_lsq_serves_its_own_bits_alone() -> None:
    module = fit("lsq", gaussian(60, 16), bits=3)
    module.check_bits(3)
    for bits in (2, 4, True):
        with pytest.raises(ConfigError, match=r"'a.b'.*learned for 3 bits"):
            module.check_bits(bits)
        with pytest.raises(ConfigError, match="quantize anew"):
            module(gaussian(2, 16), bits)
    percentile = fit("percentile", gaussian(60, 16))
    for bits in range(2, 9):
        percentile.check_bits(bits)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_start(bits: int) -> None:
    tokens = gaussian(500, 16)
    expected = 2 * np.abs(tokens.double().numpy()).mean() / math.sqrt(2 ** (bits - 1) - 1)
    module = fit("lsq", tokens, bits=bits)
    assert module.step.item() == pytest.approx(expected, rel=1e-12)
    assert fit("lsq", tokens, WEIGHT.float(), bits=bits).step.dtype == torch.float32


@pytest.mark.parametrize("step", [0.3, -0.3, 1.7])
@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_gradients(bits: int, step: float) -> None:
    """Central differences of Σ g x̂ with the rounding error round(v) - v of inside v frozen."""
    x, g = gaussian(7, 16).double(), gaussian(7, 16, seed=1).double()
    module = fit("lsq", x.float(), bits=bits)
    module.step.data.fill_(step)
    x.requires_grad_()
    (module(x, bits) * g).sum().backward()
    n, p = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    values, weights = x.detach().numpy(), g.numpy()
    sign, step = math.copysign(1, step), abs(step)
    frozen = np.rint(np.clip(values / step, -n, p)) - np.clip(values / step, -n, p)

    def surrogate(inputs: np.ndarray, s: float) -> float:
        return float((weights * s * (np.clip(inputs / s, -n, p) + frozen)).sum())

    h = 1e-6
    by_step = (surrogate(values, step + h) - surrogate(values, step - h)) / (2 * h)
    assert float(module.step.grad) == pytest.approx(sign * by_step / math.sqrt(16 * p), rel=1e-6)
    assert x.grad is not None
    for place in np.ndindex(7, 16):
        bump = np.zeros_like(values)
        bump[place] = h
        slope = (surrogate(values + bump, step) - surrogate(values - bump, step)) / (2 * h)
        assert float(x.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    inside = (np.clip(values / step, -n, p) == values / step).mean()
    assert 0 < inside < 1 or abs(step) > 1


def test_lsq_values_by_hand() -> None:
    module = fit("lsq", gaussian(4, 16), bits=3)
    module.step.data.fill_(0.5)
    x = torch.tensor([[-9.0, -2.0, -0.3, 0.0, 0.2, 0.76, 1.4, 9.0]], dtype=torch.float64)
    assert module(x, 3).tolist() == [[-2, -2, -0.5, 0, 0, 1.0, 1.5, 1.5]]
    module.step.data.zero_()
    assert module(x, 3).abs().max() < 1e-300


@given(
    arrays.arrays(np.float32, 8, elements=st.floats(-1e3, 1e3, width=32)),
    st.floats(np.float32(1e-3), 10.0, width=32),
    st.integers(2, 8),
)
def test_lsq_values_are_levels_to_the_bit(x: np.ndarray, step: float, bits: int) -> None:
    """The nearest of them, and the same with a gradient and without."""
    module = fit("lsq", gaussian(4, 8), WEIGHT.float(), bits=bits)
    module.step.data.fill_(step)
    out = module(torch.from_numpy(x), bits)
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.float32) * np.float32(step)
    assert np.isin(out.detach().numpy(), levels).all()
    nearest = np.abs(x[:, None].astype(np.float64) - levels).min(1)
    found = np.abs(x.astype(np.float64) - out.detach().numpy())
    np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-6 * np.abs(levels).max())
    with torch.no_grad():
        assert torch.equal(module(torch.from_numpy(x), bits), out)


def test_lsq_learns_from_a_blank_start() -> None:
    """Trained on its own error, the step finds what a search over steps finds."""
    x = gaussian(64, 16)
    method = read_method("activation", {"method": "lsq", "bits": 3})
    assert method is not None
    module = method.fit(WEIGHT.float(), Site.blank("a.b", 16))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (module(x, 3) - x).square().mean().backward()
        optimizer.step()
    found = (module(x, 3) - x).square().mean().item()
    values = x.numpy()
    steps = np.linspace(0.2, 1.2, 200)
    best = min(np.square(s * np.rint(np.clip(values / s, -4, 3)) - values).mean() for s in steps)
    assert found < 1.05 * best


@pytest.mark.parametrize("name", ["percentile", "lsq"])
def test_whole_graphs(name: str) -> None:
    module = fit(name, gaussian(60, 16), bits=4).float()
    x = gaussian(3, 16).requires_grad_()
    module(x, 4).square().sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x, 4).square().sum().backward()
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
