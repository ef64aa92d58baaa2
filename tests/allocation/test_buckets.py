"""Bits per layer and timestep bucket."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robuq_bench.allocation import (
    allocation_problem,
    collapse,
    exact,
    expand_over_buckets,
    latency_cost,
    mac_cost,
    mixed_integer,
    solve_ampn,
)
from robuq_bench.errors import UsageError

BITS = (1, 2, 3, 4)
Make = Callable[..., Any]


def test_one_bucket_is_the_problem_without_buckets(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=3)
    expanded = expand_over_buckets({"all": sensitivity}, macs, [mac_cost(macs, 2.0)], {"all": 7})
    found, plain = exact(allocation_problem(*expanded)), solve_ampn(sensitivity, macs, 2.0)
    assert collapse(found.bits_by_layer) == {"all": plain.bits_by_layer}
    assert found.mean_bits == plain.mean_bits
    assert found.objective == pytest.approx(plain.objective, rel=1e-12)


def test_buckets_never_cost_more_and_never_do_worse(dit_instance: Make) -> None:
    steps = {"early": 30, "middle": 10, "late": 10}
    by_bucket = {name: dit_instance(seed=i, blocks=6)[0] for i, name in enumerate(steps)}
    macs = dit_instance(seed=0, blocks=6)[1]
    rng = np.random.default_rng(0)
    latency = {n: {b: float(rng.uniform(0.1, 0.2)) * b for b in BITS} for n in macs}
    ceiling = 2.5 * 0.15 * len(macs)
    costs = [mac_cost(macs, 2.0), latency_cost(latency, ceiling)]
    found = mixed_integer(allocation_problem(*expand_over_buckets(by_bucket, macs, costs, steps)))
    mean = {
        layer: {b: sum(by_bucket[k][layer][b] * n / 50 for k, n in steps.items()) for b in BITS}
        for layer in macs
    }
    static = mixed_integer(allocation_problem(mean, macs, costs))
    assert found.objective < 0.95 * static.objective
    bits = collapse(found.bits_by_layer)
    per_step = {
        bucket: sum(macs[layer] * width for layer, width in layers.items()) / sum(macs.values())
        for bucket, layers in bits.items()
    }
    over_run = sum(per_step[bucket] * count / 50 for bucket, count in steps.items())
    assert found.mean_bits == pytest.approx(over_run, rel=1e-12)
    assert found.mean_bits <= 2.0
    spent = sum(latency[la][b] * steps[k] / 50 for k, by in bits.items() for la, b in by.items())
    assert spent <= found.costs["latency_ms"] <= ceiling
    objective = math.fsum(
        by_bucket[k][layer][b] * steps[k] / 50 for k, by in bits.items() for layer, b in by.items()
    )
    assert found.objective == pytest.approx(objective, rel=1e-12)


def test_buckets_that_do_not_match_are_named(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=1)
    for buckets, steps, message in (
        ({"early": sensitivity}, {"erly": 3}, "bucket 'early' has no steps; did you mean 'erly'"),
        ({"a": sensitivity}, {"a": 3, "b": 1}, "bucket 'b' has no sensitivities"),
        ({"a": sensitivity}, {"a": 0}, "steps of bucket 'a' must be at least 1"),
        ({"a@b": sensitivity}, {"a@b": 1}, "must not contain '@'"),
    ):
        with pytest.raises(UsageError, match=message):
            expand_over_buckets(buckets, macs, [], steps)
    with pytest.raises(UsageError, match="'plain' is not a layer and bucket"):
        collapse({"plain": 2})
