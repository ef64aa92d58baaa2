"""Which image seeds a training is sampled from."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.config import Workload, load_workload
from robuq_bench.judging.evaluation import seed_ranges


def workload_of(count: int, ranges: int, image_seeds: str | None) -> Workload:
    workload = load_workload("digits")
    fields = {"num_samples": count, "seed_ranges": ranges, "image_seeds": image_seeds}
    return workload.model_copy(update={"evaluation": workload.evaluation.model_copy(update=fields)})


@given(count=st.integers(2, 50), ranges=st.integers(1, 4))
def test_own_seeds_are_disjoint_and_begin_where_shared_ones_do(count: int, ranges: int) -> None:
    own = workload_of(count, ranges, "own")
    sets = [{seed for part in seed_ranges(own, s) for seed in part} for s in range(4)]
    assert all(len(found) == count * ranges for found in sets)
    assert all(a.isdisjoint(b) for a, b in combinations(sets, 2))
    shared = workload_of(count, ranges, None)
    assert seed_ranges(own, 0) == seed_ranges(shared, 0) == seed_ranges(shared, 3)
