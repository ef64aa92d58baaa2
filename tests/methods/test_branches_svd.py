"""The SVD branch against the best approximation by NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robuq_bench.config import load_plan, resolve
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
        read_method("branch", {"method": "svd", "rank": -1})
    scaled = read_method("branch", {"method": "svd", "rank": 16, "at_width": 8})
    with pytest.raises(ConfigError, match=r"branch\.rank 16 at width 8, here 20, exceeds"):
        scaled.check(10, 24)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((3456, 1152), 16), ((432, 144), 2), ((144, 576), 2), ((36, 12), 1), ((768, 3072), 11)],
)
def test_a_rank_for_a_width_is_the_same_share_of_narrower_layers(
    shape: tuple[int, int], rank: int
) -> None:
    """By hand: 16 * 144 / 1152 = 2, 16 * 768 / 1152 = 10.7, 16 * 12 / 1152 = 0.17: at least 1."""
    method = read_method("branch", {"method": "svd", "rank": 16, "at_width": 1152})
    module = method.fit(torch.zeros(shape, dtype=torch.float64), Site("a", is_blank=True))
    assert method.rank_of(*shape) == module.up.shape[1] == module.down.shape[0] == rank
    assert method.values(*shape) == sum(p.numel() for p in module.parameters())


def test_rank_0_is_no_branch_and_a_rank_alone_is_of_any_width() -> None:
    none = resolve("account", "1", "a4", "digits", 0, ["layers.block.branch.rank=0"])
    assert none.plan.layers[1].branch is None
    assert none == resolve("account", "1", "a4", "digits", 0, ["layers.block.branch=none"])
    key = "layers.block.branch"
    alone = resolve("account", "1", "a4", "digits", 0, [f"{key}.rank=8"])
    assert alone.plan.layers[1].branch.rank_of(432, 144) == 8  # type: ignore[union-attr]
    for order in ([0, 1], [1, 0]):
        texts = [f"{key}.at_width=1152", f"{key}.rank=8"]
        both = resolve("account", "1", "a4", "digits", 0, [texts[i] for i in order])
        assert both.plan.layers[1].branch.rank_of(432, 144) == 1  # type: ignore[union-attr]


def test_a_plan_that_extends_another_gives_its_own_rank(tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    path.write_text(
        'extends = "a4"\n[[layers]]\nname = "block"\nbranch = { method = "svd", rank = 8 }\n'
    )
    assert [rule.branch.rank_of(432, 144) for rule in load_plan(path).layers] == [2, 8]  # type: ignore[union-attr]
