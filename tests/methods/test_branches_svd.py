"""The SVD branch against the best approximation by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from robuq_bench.errors import ConfigError
from robuq_bench.methods import read_method
from robuq_bench.methods.branches.svd import low_rank_factors
from robuq_bench.methods.site import Site


def weight_of(rows: int = 10, columns: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_low_rank_factors_are_the_best_approximation(rank: int) -> None:
    weight = weight_of()
    up, down = low_rank_factors(weight, rank)
    assert (up.shape, down.shape) == ((10, rank), (rank, 24))
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    best = torch.from_numpy(u[:, :rank] * s[:rank] @ vh[:rank])
    torch.testing.assert_close(up @ down, best, rtol=1e-10, atol=1e-10)
    error = torch.linalg.norm(weight - up @ down)
    assert float(error) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), abs=1e-12)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # each takes sqrt(S)


def test_signs_of_the_factors_are_decided() -> None:
    """The largest entry of every row of `down` is positive, whatever LAPACK returned."""
    for weight in (weight_of(), -weight_of()):
        _, down = low_rank_factors(weight, 5)
        assert bool((down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all())


def test_the_module_takes_its_product_off_the_weight() -> None:
    weight = weight_of()
    method = read_method("branch", {"method": "svd", "rank": 3})
    module = method.fit(weight, Site("a"))
    up, down = low_rank_factors(weight, 3)
    torch.testing.assert_close(module.weight(weight), weight - up @ down)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(module(x) + x @ module.weight(weight).T, x @ weight.T)
    assert {name for name, _ in module.named_parameters()} == {"up", "down"}
    assert method.values(10, 24) == sum(p.numel() for p in module.parameters())


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    method = read_method("branch", {"method": "svd", "rank": 11})
    with pytest.raises(ConfigError, match=r"branch\.rank 11 exceeds the smaller side of 10 x 24"):
        method.check(10, 24)
    method.check(11, 24)
    with pytest.raises(ValueError, match="rank"):
        read_method("branch", {"method": "svd", "rank": 0})
