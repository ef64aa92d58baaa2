"""Compiled sums of normality statistics against scipy row by row, numpy, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compiled import available, force
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.normality_sums.cpu import SUMS, normality_sums
from robuq_bench.normality import token_sums
from robuq_bench.normality.p_values import shapiro_weights
from robuq_bench.normality.token_sums import Workspace, block_sums, compiled_sums, window_length

#: A few entries, each side of whole vectors and of whole products, the widths of DiT.
WIDTHS = (8, 9, 15, 63, 64, 65, 144, 1001, 1152, 4608)


def tokens(n: int) -> Tensor:
    """Sorted rows [11, n] float32: normal, heavy-tailed, skewed, tied, one-hot, tiny, huge."""
    rng = np.random.default_rng(n)
    normal = rng.normal(size=n)
    rows = [
        normal,
        normal * 3 + 50,
        rng.standard_t(3, size=n),
        rng.standard_cauchy(n),
        rng.lognormal(size=n),
        np.round(rng.normal(size=n)),
        np.arange(n) % 2,
        np.eye(n)[0],
        -np.eye(n)[0],
        normal * 1e-40,
        normal * 1e37,
    ]
    return torch.from_numpy(np.sort(np.stack(rows), axis=1)).float()


def sums_of(x: Tensor, window: int | None = None) -> Tensor:
    n = x.shape[1]
    constants = token_sums._kernel_constants(n)
    return normality_sums(x, *constants, window_length(n) if window is None else window)


def by_scipy(x: NDArray[np.float64]) -> dict[str, float]:
    n, mean, std = len(x), x.mean(), x.std(ddof=1)
    z = (x - mean) / std
    i = np.arange(1, n + 1)
    logarithms = special.log_ndtr(z) + special.log_ndtr(-z[::-1])
    window = window_length(n)
    with np.errstate(divide="ignore"):
        entropy = stats.differential_entropy(z, window_length=window, method="vasicek")
    return {
        "mean": mean,
        "std": std,
        "shapiro_w": stats.shapiro(z).statistic,
        "skewness": stats.skew(z),
        "kurtosis": stats.kurtosis(z),
        "anderson_a2": -n - ((2 * i - 1) * logarithms).mean(),
        "ks_distance": stats.kstest(z, "norm").statistic,
        "entropy": entropy - math.log(n / (2 * window)),
        "l3": (np.abs(x / std) ** 3).sum() / ((x / std) ** 2).sum() ** 1.5,
    }


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agree_with_scipy(n: int, dtype: torch.dtype, instructions: str) -> None:
    x = tokens(n).to(dtype)
    for row, found in zip(x.double().numpy(), sums_of(x).numpy(), strict=True):
        named = dict(zip(SUMS, found, strict=True))
        for name, expected in by_scipy(row).items():
            assert named[name] == pytest.approx(expected, rel=1e-11, abs=1e-11), name


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_finds_the_same(n: int, dtype: torch.dtype, library: None) -> None:
    x = tokens(n).to(dtype).numpy()
    compiled, numpy = compiled_sums(x), block_sums(x.copy(), Workspace(*x.shape))
    for name, have, want in zip(compiled._fields, compiled, numpy, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("n", WIDTHS)
def test_instruction_sets_give_the_same_bits(
    n: int, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name in available():
        force(name, monkeypatch)
        results.append(sums_of(tokens(n)))
    assert not results[0].isnan().any()
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_unusable_tokens_are_nan_and_leave_the_others_alone(instructions: str) -> None:
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sums_of(x.sort(dim=1).values)
    x[1] = 0.0
    x[2] = -7.5
    x[3, 5] = math.inf
    x[4, 6] = -math.inf
    x[5, 7] = math.nan
    x[6] = math.nan
    x[7] = 0.0
    x[7, 0] = 5e-324  # its standard deviation is below the smallest float64
    found = sums_of(x.sort(dim=1).values)
    assert found[1:8].isnan().all()
    assert torch.equal(found[[0, 8]], expected[[0, 8]])


@pytest.mark.parametrize("window", [1, 40, 200])
def test_any_window_of_spacings(window: int, library: None) -> None:
    x = torch.arange(100, dtype=torch.float64)[None]
    index = np.arange(100)
    spacings = np.minimum(index + window, 99) - np.maximum(index - window, 0)
    expected = np.log(spacings / np.std(index, ddof=1)).mean()
    assert sums_of(x, window)[0, SUMS.index("entropy")].item() == pytest.approx(expected, abs=1e-13)


def test_no_tokens(library: None) -> None:
    assert sums_of(torch.empty(0, 8)).shape == (0, len(SUMS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, device="meta")}, "x is on meta"),
        ({"x": torch.zeros(8)}, r"x must be \[any, any\], got \[8\]"),
        ({"x": torch.zeros(2, 8).bfloat16()}, "x must be float32, float64, got torch.bfloat16"),
        ({"x": torch.zeros(8, 2).T}, "x must be contiguous"),
        ({"weights": torch.zeros(8)}, "weights must be float64"),
        ({"density": torch.zeros(8).double()}, r"density must be \[9\]"),
        ({"window": 0}, "needs 2 entries and a window of 1, got 8 and 0"),
    ],
)
def test_misuse_is_refused(change: dict[str, object], message: str, library: None) -> None:
    operands = {
        "x": torch.zeros(2, 8),
        "weights": torch.from_numpy(shapiro_weights(8).copy()),
        "density": torch.zeros(9).double(),
        "window": 2,
    }
    with pytest.raises(KernelInputError, match=message):
        normality_sums(**(operands | change))  # type: ignore[arg-type]
