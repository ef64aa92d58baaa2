"""The fitted dual rotation: orthogonal, never worse, outliers dealt evenly to the blocks."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.errors import UsageError
from robuq_bench.methods.rotations import dual_rotation
from robuq_bench.methods.rotations.dual_rotation import (
    default_block_size,
    fit_dual_rotation,
    zigzag_permutation,
)


def outlier_tokens(count: int, n: int, seed: int = 0) -> torch.Tensor:
    """Gaussian tokens with loud channels in one corner and one massive entry."""
    x = torch.randn((count, n), generator=torch.Generator().manual_seed(seed))
    x[:, : max(1, n // 50)] *= 30
    x[1, n // 2] = 400
    return x


def spread(x: torch.Tensor) -> float:
    return float(x.max() - x.min())


@settings(max_examples=20)
@given(
    blocks=st.integers(1, 4),
    size=st.sampled_from([1, 2, 3, 8, 12]),
    count=st.integers(2, 20),
    steps=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_orthogonal_and_never_worse(
    blocks: int, size: int, count: int, steps: int, seed: int
) -> None:
    n = blocks * size
    x = outlier_tokens(count, n, seed).double()
    rotation = fit_dual_rotation(x, block_size=size, steps=steps, seed=seed)
    Q = rotation.matrix()
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
    y = rotation.apply(x)
    torch.testing.assert_close(y, x @ Q, rtol=0, atol=1e-10 * 400)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=0)
    assert spread(y) <= spread(x) * (1 + 1e-12)


@pytest.mark.parametrize("n", [384, 576])
def test_outliers_are_spread(n: int) -> None:
    x = outlier_tokens(256, n)
    started = time.process_time()
    rotation = fit_dual_rotation(x)
    # Twice what it needs on a busy core.
    assert time.process_time() - started < 4
    assert rotation.first.shape == (n // default_block_size(n), *2 * [default_block_size(n)])
    assert rotation.first.dtype == torch.float64
    Q = rotation.matrix()
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
    # One even spread over a block of 96 or 128 would already divide the massive entry by 10.
    assert spread(rotation.apply(x)) < 0.25 * spread(x)


def test_the_second_rotation_helps() -> None:
    """Loud channels of one block reach the others only through the permutation."""
    x = torch.randn((256, 384), generator=torch.Generator().manual_seed(0))
    x[:, :60] *= 30
    rotation = fit_dual_rotation(x)
    once = dual_rotation._rotate_blocks(x.double(), rotation.first)
    assert spread(rotation.apply(x)) < 0.9 * spread(once)


def test_one_step_by_hand() -> None:
    """Channel 2 holds the outlier: it alone is spread evenly, with 1/sqrt(4) on each channel."""
    x = torch.eye(4)[2:3] * 8 + 1e-3
    block = fit_dual_rotation(x, block_size=4, steps=1).first[0]
    torch.testing.assert_close(block[2], torch.full((4,), 0.5, dtype=torch.float64))
    swapped = torch.tensor([2, 1, 0, 3])
    torch.testing.assert_close(
        block, dual_rotation._spreading_matrix(4, seed=0)[swapped][:, swapped]
    )


def test_best_prefix_is_kept() -> None:
    """More steps never give the first rotation's blocks a larger range."""
    x = outlier_tokens(64, 96)
    found = []
    for steps in (0, 1, 2, 4, 8, 16, 64):
        first = fit_dual_rotation(x, block_size=48, steps=steps).first
        found.append(dual_rotation._ranges(dual_rotation._rotate_blocks(x.double(), first), 2))
    ranges = torch.stack(found)
    assert torch.equal(ranges[0], dual_rotation._ranges(x.double(), 2))
    # Prefixes are compared in float32.
    assert (ranges[1:] <= ranges[:-1] * (1 + 1e-6)).all()
    assert (ranges[-1] < ranges[0]).all()


def test_ranges_that_float32_cannot_tell_apart() -> None:
    """Eight directions in a plane: an eighth of a turn changes the range by some 1e-9 only."""
    for seed in range(20):
        noise = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        angles = torch.arange(8) * (math.pi / 4) + 1e-4 * noise[:8]
        x = torch.stack([angles.cos(), angles.sin()], dim=1) * (1 + noise[8])
        assert spread(fit_dual_rotation(x).apply(x)) <= spread(x) + 1e-12


def test_zigzag_by_hand() -> None:
    peaks = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert zigzag_permutation(peaks, 3).tolist() == [0, 5, 6, 1, 4, 7, 2, 3, 8]
    with pytest.raises(UsageError, match="evenly"):
        zigzag_permutation(peaks, 2)


@given(
    peaks=st.lists(st.floats(0, 1e6), min_size=12, max_size=12),
    blocks=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_zigzag_deals_outliers_evenly(peaks: list[float], blocks: int) -> None:
    """Every rank group of `blocks` channels is spread over all blocks, and sums differ little."""
    values = torch.tensor(peaks, dtype=torch.float64)
    order = zigzag_permutation(values, blocks)
    assert sorted(order.tolist()) == list(range(12))
    dealt = values[order].view(blocks, -1)
    ranked = values.sort(descending=True).values.view(-1, blocks)
    for place, group in enumerate(ranked):
        assert sorted(dealt[:, place].tolist(), reverse=True) == group.tolist()
    sums = dealt.sum(1)
    assert sums.max() - sums.min() <= values.max() - values.min() + 1e-6


def test_fitted_permutation_spreads_loud_channels() -> None:
    x = torch.randn((64, 96), generator=torch.Generator().manual_seed(0))
    x[:, :12] *= 50
    rotation = fit_dual_rotation(x, block_size=24, steps=0)
    blocks = rotation.permutation.view(4, 24)
    assert ((blocks < 12).sum(dim=1) == 3).all()


def test_other_tokens_dtypes_and_shapes() -> None:
    rotation = fit_dual_rotation(outlier_tokens(32, 48))
    x = torch.randn((2, 3, 48), generator=torch.Generator().manual_seed(5))
    assert rotation.apply(x).dtype == torch.float32
    torch.testing.assert_close(rotation.apply(x), (x.double() @ rotation.matrix()).float())
    # One weight, one rotation: the layer's product does not change.
    W = torch.randn((7, 48), generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(rotation.apply(x) @ rotation.apply(W).T, x @ W.T)
    with pytest.raises(UsageError, match="width 48"):
        rotation.apply(torch.ones(2, 47))


def test_same_seed_same_rotation() -> None:
    x = outlier_tokens(32, 48)
    first, again, other = (fit_dual_rotation(x, seed=s).matrix() for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("x", [torch.zeros(4, 12), torch.ones(4, 12)])
def test_degenerate_tokens(x: torch.Tensor) -> None:
    rotation = fit_dual_rotation(x)
    assert rotation.matrix().isfinite().all()
    assert spread(rotation.apply(x)) <= spread(x) + 1e-12


@pytest.mark.parametrize(
    ("n", "block"), [(384, 128), (576, 96), (1152, 128), (4608, 128), (144, 72), (1, 1), (7, 7)]
)
def test_default_block_size(n: int, block: int) -> None:
    assert default_block_size(n) == block


def test_refusals() -> None:
    with pytest.raises(UsageError, match="width 131 has no divisor"):
        fit_dual_rotation(torch.ones(2, 131))
    with pytest.raises(UsageError, match="does not divide"):
        fit_dual_rotation(torch.ones(2, 12), block_size=5)
    with pytest.raises(UsageError, match="not all finite"):
        fit_dual_rotation(torch.full((2, 12), math.inf))
    with pytest.raises(UsageError, match=r"tokens \[T, n\]"):
        fit_dual_rotation(torch.ones(12))
    with pytest.raises(UsageError, match="negative"):
        fit_dual_rotation(torch.ones(2, 12), steps=-1)
