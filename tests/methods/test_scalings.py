"""SmoothQuant's scaling; that every scaling cancels is tested with the rotations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from robuq_bench.errors import UsageError
from robuq_bench.methods import read_method
from robuq_bench.methods.site import Site


def fit(weight: torch.Tensor, absmax: torch.Tensor, **values: Any) -> Any:
    found = read_method("scaling", {"method": "smooth", **values})
    assert found is not None
    return found.fit(weight, Site("a.b", absmax=absmax))


def test_half_and_half_makes_both_sides_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((200, 144), generator=generator, dtype=torch.float64)
    tokens *= torch.logspace(-3, 3, 144, dtype=torch.float64)
    weight = torch.randn((48, 144), generator=generator, dtype=torch.float64)
    module = fit(weight, tokens.abs().amax(0))
    inputs, rows = module(tokens).abs().amax(0), module.weight(weight).abs().amax(0)
    torch.testing.assert_close(inputs, rows, rtol=1e-12, atol=0)


magnitudes = st.floats(1e-6, 1e6)


@given(
    absmax=arrays.arrays(np.float64, 6, elements=magnitudes),
    rows=arrays.arrays(np.float64, 6, elements=magnitudes),
    alpha=st.floats(0, 1),
)
def test_formula(absmax: np.ndarray, rows: np.ndarray, alpha: float) -> None:
    weight = torch.from_numpy(np.stack([rows, -rows / 2]))
    scale = fit(weight, torch.from_numpy(absmax), alpha=alpha).scale
    floored = np.maximum(rows, 1e-5)
    expected = np.exp(alpha * np.log(absmax) - (1 - alpha) * np.log(floored))
    expected = np.maximum(expected, 1e-5)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_silent_channels_keep_their_scale(alpha: float) -> None:
    """Zero inputs, a zero column, both: where the formula gives 0, infinity or NaN, s is 1."""
    absmax = torch.tensor([0.0, 2.0, 0.0, 8.0])
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    module = fit(weight, absmax, alpha=alpha)
    assert module.scale.isfinite().all()
    assert (module.scale > 0).all()
    assert module.scale[3] == pytest.approx(8**alpha / 2 ** (1 - alpha))
    assert module.scale[:3].tolist() == [1, 1, 1]
    x = torch.tensor([[3.0, -1.0, 4.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(module(x) @ module.weight(weight).T, x @ weight.T)


def test_infinities_and_nan_stay_in_their_channel() -> None:
    module = fit(torch.ones(2, 3, dtype=torch.float64), torch.tensor([4.0, 4.0, 4.0]))
    x = torch.tensor([[float("inf"), float("nan"), 2.0]])
    assert module(x)[0].tolist()[::2] == [float("inf"), 1.0]
    assert module(x)[0, 1].isnan()
    assert module(x).dtype == torch.float32


def test_refusals_and_account() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"'a.b'.*absmax"):
        read_method("scaling", "smooth").fit(weight, Site("a.b"))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"'a.b'.*not all finite"):
        fit(weight, torch.tensor([1.0, float("inf"), 1.0]))
    with pytest.raises(UsageError, match=r"'a.b'.*weight"):
        fit(weight * float("nan"), torch.ones(3))
    with pytest.raises(ValueError, match="alpha"):
        fit(weight, torch.ones(3), alpha=1.5)
    method: Any = read_method("scaling", "smooth")
    assert method.stored_bits(1152) == 16 * 1152
    assert method.needs == {"absmax"}
