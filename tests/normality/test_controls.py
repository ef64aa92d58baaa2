"""Control tokens against the distributions they are named after."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from robuq_bench.errors import UsageError
from robuq_bench.normality.controls import CONTROL_NAMES, control_tokens

LAWS = {
    "gaussian": stats.norm(),
    "laplace": stats.laplace(scale=math.sqrt(0.5)),
    "student-t3": stats.t(3, scale=1 / math.sqrt(3)),
    "lognormal": stats.lognorm(1.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_distribution(name: str) -> None:
    values = control_tokens(name, 50, 400, seed=0, dtype=torch.float64).flatten().numpy()
    assert stats.kstest(values, LAWS[name].cdf).pvalue > 0.01
    others = [law for other, law in LAWS.items() if other != name]
    assert max(stats.kstest(values, law.cdf).pvalue for law in others) < 1e-6


@pytest.mark.parametrize("name", ["gaussian", "laplace", "student-t3"])
def test_symmetric_controls_have_variance_one(name: str) -> None:
    assert LAWS[name].var() == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "expected"), [(1152, 12), (64, 1), (4608, 46)])
def test_outlier_channels_are_few_and_fixed(n: int, expected: int) -> None:
    tokens = control_tokens("few-outlier-channels", 400, n, seed=1)
    spread = tokens.std(dim=0)
    loud = spread > 10
    assert int(loud.sum()) == expected
    assert spread[loud].numpy() == pytest.approx(np.full(expected, 30.0), rel=0.2)
    assert spread[~loud].numpy() == pytest.approx(np.ones(n - expected), rel=0.2)


def test_one_hot_tokens_differ_in_place() -> None:
    tokens = control_tokens("one-hot", 200, 32, seed=0)
    assert torch.equal(tokens.sort(dim=1).values[:, -1], torch.ones(200))
    assert torch.equal(tokens.count_nonzero(dim=1), torch.ones(200, dtype=torch.int64))
    assert len(tokens.argmax(dim=1).unique()) > 25


@pytest.mark.parametrize("name", CONTROL_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_seed_same_tokens_rounded_to_dtype(name: str, dtype: torch.dtype) -> None:
    tokens = control_tokens(name, 6, 128, seed=2, dtype=dtype)
    assert tokens.shape == (6, 128)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, control_tokens(name, 6, 128, seed=2, dtype=torch.float64).to(dtype))
    assert not torch.equal(tokens, control_tokens(name, 6, 128, seed=3, dtype=dtype))
    assert len({tuple(row.tolist()) for row in tokens}) == 6


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'gaussian'"):
        control_tokens("gausian", 1, 8, seed=0)
    with pytest.raises(UsageError, match="floating dtype"):
        control_tokens("gaussian", 1, 8, seed=0, dtype=torch.int8)
    with pytest.raises(UsageError, match="count, n >= 1"):
        control_tokens("gaussian", 0, 8, seed=0)
