"""The AMPN programme against brute force, HiGHS and its own promises."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.allocation import (
    allocation_problem,
    allocation_table,
    knapsack,
    latency_cost,
    mac_cost,
    mean_bits,
    mean_bits_by_type,
    mixed_integer,
    problem_table,
    solve_ampn,
    table,
)
from robuq_bench.errors import UsageError

BITS = (1, 2, 3, 4)
Sensitivity = dict[str, dict[int, float]]
Macs = dict[str, int]
Make = Callable[..., Any]


def least(sensitivity: Sensitivity, macs: Macs, budget: float) -> float:
    """The optimum by trying everything, summed without rounding."""
    layers, widths = list(sensitivity), list(next(iter(sensitivity.values())))
    total = sum(macs.values())
    return min(
        math.fsum(sensitivity[layer][b] for layer, b in zip(layers, bits, strict=True))
        for bits in itertools.product(widths, repeat=len(layers))
        if sum(macs[layer] * b for layer, b in zip(layers, bits, strict=True)) / total <= budget
    )


def test_equals_brute_force_at_every_budget_of_500_random_instances(
    random_instance: Make, brute_force: Make
) -> None:
    rng = np.random.default_rng(0)
    for index in range(500):
        widths = [BITS, BITS, (2, 4), (2, 3, 4, 8), (2, 3, 8)][index % 5]
        layers = int(rng.integers(1, 9 if index % 10 == 0 else 7))
        sensitivity, macs = random_instance(rng, layers, widths)
        total = sum(macs.values())
        products = {layer: {b: count * b for b in widths} for layer, count in macs.items()}
        objectives, costs = brute_force(sensitivity, products)
        whole = allocation_table(sensitivity, macs)
        means, front = whole.pareto()
        # monotone, and right at every budget at which anything changes
        assert (np.diff(means) > 0).all()
        assert (np.diff(front) < 0).all()
        order = np.lexsort((objectives, costs))
        running = np.minimum.accumulate(objectives[order])
        sums = np.unique(costs)
        expected = running[np.searchsorted(costs[order], sums, "right") - 1]
        found = front[np.searchsorted(means, sums / total, "right") - 1]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        budget = float(rng.uniform(widths[0], widths[-1]))
        one = solve_ampn(sensitivity, macs, budget)
        assert one.objective == pytest.approx(objectives[costs / total <= budget].min(), rel=1e-12)
        assert one == whole.solve(budget)
        chosen = math.fsum(sensitivity[name][b] for name, b in one.bits_by_layer.items())
        assert one.objective == pytest.approx(chosen, rel=1e-12)
        assert one.mean_bits == mean_bits(one.bits_by_layer, macs) <= budget


@pytest.mark.parametrize("budget", [1.5, 2.0, 2.85, 3.5])
def test_equals_highs_on_dit_xl(dit_instance: Make, budget: float) -> None:
    sensitivity, macs = dit_instance(seed=int(budget * 100))
    assert len(sensitivity) == 112
    found = solve_ampn(sensitivity, macs, budget)
    other = mixed_integer(allocation_problem(sensitivity, macs, [mac_cost(macs, budget)]))
    assert found.objective == pytest.approx(other.objective, rel=1e-9)
    assert found.mean_bits <= budget
    assert other.mean_bits <= budget


def test_costs_without_a_common_divisor_need_no_rounding(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=3)
    rng = np.random.default_rng(3)
    awkward = {name: int(rng.integers(10**8, 10**9)) for name in macs}
    started = time.process_time()
    whole = allocation_table(sensitivity, awkward)
    assert time.process_time() - started < 2
    found = whole.solve(2.0)
    other = mixed_integer(allocation_problem(sensitivity, awkward, [mac_cost(awkward, 2.0)]))
    assert found.objective == pytest.approx(other.objective, rel=1e-9)


def test_more_budget_is_never_worse_and_the_front_is_the_same_optimum(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=5, blocks=6)
    whole = allocation_table(sensitivity, macs)
    objectives = [solve_ampn(sensitivity, macs, b).objective for b in np.linspace(1, 4, 500)]
    assert all(b <= a for a, b in itertools.pairwise(objectives))
    front = whole.front()
    assert front[0].mean_bits == 1.0
    assert len(front) > 50
    for a, b in itertools.pairwise(front):
        assert a.mean_bits < b.mean_bits
        assert a.objective > b.objective
    for point in front[::7]:
        assert point == solve_ampn(sensitivity, macs, point.budget)
        assert point == whole.solve(point.budget)
        assert point.mean_bits == mean_bits(point.bits_by_layer, macs)
    means, values = whole.pareto()
    assert means.tolist() == [point.mean_bits for point in front]
    assert values.tolist() == [point.objective for point in front]


@pytest.mark.parametrize(("blocks", "limit_s"), [(28, 0.2), (250, 5.0)])
def test_whole_front_is_fast(dit_instance: Make, blocks: int, limit_s: float) -> None:
    sensitivity, macs = dit_instance(seed=9, blocks=blocks)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        whole = allocation_table(sensitivity, macs)
        means, _ = whole.pareto()
        points = whole.front() if blocks == 28 else []
        seconds.append(time.process_time() - started)
    assert min(seconds) < limit_s
    assert len(means) > 200
    assert len(points) in (0, len(means))
    # the docstring's figure
    assert sum(map(len, whole.totals.options)) < 5000 * 4 * blocks


@st.composite
def instances(draw: st.DrawFn) -> tuple[Sensitivity, Macs, float]:
    widths = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    size = draw(st.integers(1, 4))
    # Small integers make ties common, and keep every sum exact.
    value = st.integers(0, 5)
    sensitivity = {f"l{i}": {b: float(draw(value)) for b in widths} for i in range(size)}
    macs = {name: draw(st.integers(1, 5)) for name in sensitivity}
    return sensitivity, macs, draw(st.floats(widths[0], widths[-1] + 1.0))


@settings(max_examples=200, deadline=None)
@given(instances())
def test_optimal_within_budget_and_thrifty_on_ties(case: tuple[Sensitivity, Macs, float]) -> None:
    sensitivity, macs, budget = case
    found = solve_ampn(sensitivity, macs, budget)
    assert found.objective == least(sensitivity, macs, budget)
    assert found.mean_bits <= budget
    backwards = {name: dict(reversed(list(s.items()))) for name, s in reversed(sensitivity.items())}
    assert solve_ampn(backwards, macs, budget) == found
    if found.mean_bits > min(next(iter(sensitivity.values()))):
        tighter = math.nextafter(found.mean_bits, 0)
        assert least(sensitivity, macs, tighter) > found.objective


def test_budget_that_was_reached_can_be_asked_for_again(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=2, blocks=5)
    for budget in np.linspace(1.0, 4.0, 40):
        found = solve_ampn(sensitivity, macs, float(budget))
        assert solve_ampn(sensitivity, macs, found.mean_bits).bits_by_layer == found.bits_by_layer


def test_interchangeable_layers_are_told_apart_by_name() -> None:
    same = {1: 1.0, 2: 0.0}
    found = [
        solve_ampn(dict.fromkeys(names, same), dict.fromkeys(names, 1), 1.5)
        for names in ("ab", "ba")
    ]
    assert found[0] == found[1]


def test_useless_bits_are_not_spent() -> None:
    flat = {name: dict.fromkeys(BITS, 0.25) for name in "abc"}
    found = solve_ampn(flat, {"a": 3, "b": 1, "c": 4}, 4.0)
    assert found.bits_by_layer == {"a": 1, "b": 1, "c": 1}
    assert found.mean_bits == 1.0


def test_budget_above_the_largest_width_is_slack() -> None:
    rising = {"a": {1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0}, "b": {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}}
    found = solve_ampn(rising, {"a": 1, "b": 1}, 100.0)
    assert found.bits_by_layer == {"a": 2, "b": 4}
    assert found.budget == 100.0


def test_huge_macs_do_not_overflow() -> None:
    sensitivity = {"a": {1: 1.0, 4: 0.0}, "b": {1: 2.0, 4: 0.0}}
    found = solve_ampn(sensitivity, {"a": 2**70, "b": 2**70}, 2.5)
    assert found.bits_by_layer == {"a": 1, "b": 4}


@pytest.mark.parametrize("budget", [0.5, 0.0, -1.0, 0.999999])
def test_unreachable_budget_names_the_range(dit_instance: Make, budget: float) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=1)
    with pytest.raises(UsageError, match=r"from 1 to 4") as error:
        solve_ampn(sensitivity, macs, budget)
    assert f"{budget:g} bits cannot be reached" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("budget", [math.nan, math.inf, True])
def test_budget_must_be_finite(budget: float) -> None:
    with pytest.raises(UsageError, match="finite number"):
        solve_ampn({"a": {1: 0.0}}, {"a": 1}, budget)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_bad_sensitivity_names_layer_and_bits(dit_instance: Make, value: float) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    sensitivity["blocks.1.mlp.fc2"][3] = value
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc2' at 3 bits"):
        solve_ampn(sensitivity, macs, 2.0)


def test_missing_bits_and_unmatched_layers_are_named(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    del sensitivity["blocks.0.attn.qkv"][2]
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.qkv' has no sensitivity at 2 bits"):
        solve_ampn(sensitivity, macs, 2.0)
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    renamed = {**macs, "blocks.0.attn.qvk": 3}
    with pytest.raises(UsageError, match=r"did you mean 'blocks\.0\.attn\.qkv'"):
        solve_ampn(sensitivity, renamed, 2.0)
    del macs["blocks.1.mlp.fc1"]
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc1' has sensitivities but no MACs"):
        solve_ampn(sensitivity, macs, 2.0)


@pytest.mark.parametrize("macs", [0, -3, 2.5, True])
def test_macs_must_be_positive_integers(macs: int) -> None:
    with pytest.raises(UsageError, match=r"MACs of layer 'a'"):
        solve_ampn({"a": {1: 0.0}}, {"a": macs}, 1.0)


@pytest.mark.parametrize("sensitivity", [{}, {"a": {}}])
def test_nothing_to_allocate(sensitivity: Sensitivity) -> None:
    with pytest.raises(UsageError, match="no sensitivities"):
        solve_ampn(sensitivity, dict.fromkeys(sensitivity, 1), 2.0)


def test_bit_widths_must_be_integers() -> None:
    with pytest.raises(UsageError, match="positive integers, got '2'"):
        solve_ampn({"a": {"2": 0.0}}, {"a": 1}, 2.0)  # type: ignore[dict-item]


def test_too_many_units_to_count_are_refused() -> None:
    sensitivity = {name: dict.fromkeys(BITS, 1.0) for name in "ab"}
    with pytest.raises(UsageError, match=r"common divisor 1,.*coarser common unit"):
        solve_ampn(sensitivity, {"a": 10**17, "b": 10**17 + 1}, 2.0)


def test_a_table_above_the_limit_is_refused(
    dit_instance: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity, macs = dit_instance(seed=0)
    monkeypatch.setattr(table, "MAX_TABLE_STATES", 35_000)
    assert solve_ampn(sensitivity, macs, 2.0).mean_bits <= 2.0
    with pytest.raises(UsageError, match=r"112 layers would keep more than 35000.*'milp'"):
        solve_ampn(sensitivity, macs, 4.0)


def test_a_front_above_the_limit_is_refused(
    dit_instance: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=4)
    whole = allocation_table(sensitivity, macs)
    means, _ = whole.pareto()
    monkeypatch.setattr(table, "MAX_FRONT_CELLS", 16 * len(means) - 1)
    with pytest.raises(UsageError, match=rf"{len(means)} points of 16 layers.*pareto\(\)"):
        whole.front()


def test_a_table_does_not_answer_beyond_its_own_budget(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=4)
    whole = problem_table(allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)]))
    assert whole.solve(1.5) == solve_ampn(sensitivity, macs, 1.5)
    with pytest.raises(UsageError, match="made for a mean_bits budget of 2"):
        whole.solve(2.5)


def test_front_over_latency(dit_instance: Make, brute_force: Make) -> None:
    sensitivity, macs = dit_instance(seed=4, blocks=1)
    rng = np.random.default_rng(4)
    measured = {n: {b: float(rng.uniform(0.1, 1) + b / 4) for b in BITS} for n in sensitivity}
    cost = latency_cost(measured, math.inf)
    points = problem_table(allocation_problem(sensitivity, macs, [cost])).front()
    objectives, units = brute_force(sensitivity, cost.table)
    assert points[0].costs["latency_ms"] == min(units) / 1000
    for point in points:
        allowed = units / 1000 <= point.costs["latency_ms"]
        assert point.objective == pytest.approx(objectives[allowed].min(), rel=1e-12)
        assert point.budgets == point.costs
        assert point.budget == math.inf
        assert point.mean_bits == mean_bits(point.bits_by_layer, macs)


def test_knapsack_takes_any_costs() -> None:
    values = np.array([[5.0, 1.0], [4.0, 0.0]])
    totals = knapsack(values, np.array([[0, 2], [0, 7]]), capacity=6)
    assert totals.spent.tolist() == [0, 2]
    assert totals.best.tolist() == [9.0, 5.0]
    assert totals.trace([0, 1]).tolist() == [[0, 0], [1, 0]]
    totals = knapsack(np.ones((1, 3)), np.zeros((1, 3), dtype=np.int64), capacity=0)
    assert totals.trace([0]).tolist() == [[0]]
    # the best of several that spend the same, and never an option that is not there
    values = np.array([[3.0, 2.0, 1.0, np.inf]])
    totals = knapsack(values, np.array([[0, 1, 1, 0]]), capacity=1)
    assert totals.spent.tolist() == [0, 1]
    assert totals.best.tolist() == [3.0, 1.0]
    assert totals.trace([1]).tolist() == [[2]]


def test_mean_bits_is_weighted_by_macs() -> None:
    bits = {"a": 1, "b": 4}
    assert mean_bits(bits, {"a": 3, "b": 1, "unused": 9}) == 1.75
    with pytest.raises(UsageError, match="no MACs for layer 'b'"):
        mean_bits(bits, {"a": 3})
    with pytest.raises(UsageError, match="empty"):
        mean_bits({}, {})


def test_published_a2_means_match_a_mac_weighted_budget_of_two() -> None:
    published = {"qkv": (2.21, 3), "proj": (2.75, 1), "fc1": (2.00, 4), "fc2": (1.64, 4)}
    weighted = sum(bits * units for bits, units in published.values()) / 12
    assert weighted == pytest.approx(1.995, abs=5e-4)


def test_mean_bits_by_type() -> None:
    bits = {
        "blocks.0.attn.qkv": 2,
        "blocks.0.mlp.fc1": 4,
        "blocks.1.attn.qkv": 3,
        "blocks.1.mlp.fc1": 1,
    }
    assert mean_bits_by_type(bits) == {"fc1": 2.5, "qkv": 2.5}
