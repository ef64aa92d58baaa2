"""Every solver on one interface: within budget, bounded by the optimum, reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robuq_bench.allocation import (
    SOLVERS,
    Cost,
    Problem,
    TableTooLargeError,
    activation_bytes_cost,
    allocation_problem,
    evolutionary_search,
    exact,
    greedy,
    lagrangian,
    latency_cost,
    mac_cost,
    mixed_integer,
    optimal_bits,
    programming,
    random_search,
    solve,
    table,
    uniform,
)
from robuq_bench.errors import RobuqError, UsageError

BITS = (1, 2, 3, 4)
Make = Callable[..., Any]


@pytest.fixture
def two_costs(dit_instance: Make) -> Problem:
    """112 layers under 2.5 mean bits and a latency that does not follow the MACs."""
    sensitivity, macs = dit_instance(seed=1)
    rng = np.random.default_rng(1)
    latency = {n: {b: float(rng.uniform(0.1, 0.2)) * b for b in BITS} for n in sensitivity}
    slow = sum(by_bits[4] for by_bits in latency.values())
    costs = [mac_cost(macs, 2.5), latency_cost(latency, 0.55 * slow)]
    return allocation_problem(sensitivity, macs, costs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_keeps_the_budget_and_repeats(solver: str, dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.2)])
    found = solve(problem, solver, seed=3)
    assert found == solve(problem, solver, seed=3)
    assert set(found.bits_by_layer) == set(sensitivity)
    assert found.costs == {"mean_bits": found.mean_bits}
    assert found.budgets == {"mean_bits": 2.2}
    assert found.budget == 2.2
    assert found.mean_bits <= 2.2
    spent = math.fsum(sensitivity[layer][bits] for layer, bits in found.bits_by_layer.items())
    assert found.objective == pytest.approx(spent, rel=1e-12)
    assert exact(problem).objective <= found.objective * (1 + 1e-12)


def test_bounds_and_order_of_the_solvers(dit_instance: Make) -> None:
    singles, several = [], []
    for seed in range(20):
        sensitivity, macs = dit_instance(seed=seed)
        problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 1.3 + 0.13 * seed)])
        best = exact(problem).objective
        relaxed, steepest = lagrangian(problem), greedy(problem)
        assert relaxed.lower_bound is not None
        assert relaxed.gap is not None
        assert 0.99 * best < relaxed.lower_bound <= best * (1 + 1e-12)
        assert best <= relaxed.objective * (1 + 1e-12)
        assert 0 <= relaxed.gap < 0.05
        assert best <= steepest.objective * (1 + 1e-12)
        assert steepest.objective < 1.05 * best
        assert steepest.objective < uniform(problem).objective
        singles.append(random_search(problem, seed=seed).objective)
        several.append(random_search(problem, seed=seed, draws=50).objective)
        # it starts from the same 50
        evolved = evolutionary_search(problem, seed=seed, population=50, generations=10)
        assert best < evolved.objective < several[-1]
    assert np.mean(np.array(several) / singles) < 0.85


def test_lower_bounds_hold_on_small_instances(random_instance: Make, brute_force: Make) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        sensitivity, macs = random_instance(rng, int(rng.integers(1, 7)))
        other = {n: {b: int(rng.integers(0, 40)) for b in BITS} for n in macs}
        products = {n: {b: count * b for b in BITS} for n, count in macs.items()}
        objectives, products_spent = brute_force(sensitivity, products)
        _, other_spent = brute_force(sensitivity, other)
        costs = [mac_cost(macs, 2.5), Cost("heat", other, float(np.median(other_spent)))]
        allowed = products_spent / sum(macs.values()) <= 2.5
        allowed &= other_spent <= costs[1].budget
        problem = allocation_problem(sensitivity, macs, costs)
        if not allowed.any():
            for solver in (mixed_integer, lagrangian):
                with pytest.raises(UsageError, match=r"together: mean_bits 2\.5, heat"):
                    solver(problem)
            continue
        best = objectives[allowed].min()
        found = mixed_integer(problem)
        assert found.objective == pytest.approx(best, rel=1e-9)
        assert found.costs["heat"] <= found.budgets["heat"]
        assert found.gap == pytest.approx(0, abs=1e-6)
        for name in ("lagrangian", "greedy", "random"):
            try:
                heuristic = solve(problem, name)
            except UsageError as error:
                assert "solver 'milp' finds an allocation" in str(error)  # noqa: PT017
                continue
            assert heuristic.objective >= best * (1 - 1e-12)
            assert heuristic.costs["heat"] <= heuristic.budgets["heat"]
            assert (heuristic.lower_bound or 0) <= best * (1 + 1e-12)


def test_several_costs_at_112_layers(two_costs: Problem) -> None:
    best = mixed_integer(two_costs)
    assert best.lower_bound == pytest.approx(best.objective, rel=1e-9)
    for name in ("milp", "lagrangian", "greedy", "uniform", "random", "evolutionary"):
        found = solve(two_costs, name)
        assert all(found.costs[cost] <= allowed for cost, allowed in found.budgets.items())
        assert found.objective >= best.objective * (1 - 1e-12)
    relaxed = lagrangian(two_costs)
    assert relaxed.gap is not None
    assert relaxed.gap < 0.05
    with pytest.raises(UsageError, match=r"one cost, not 2 \(mean_bits, latency_ms\).*'milp'"):
        exact(two_costs)


def test_highs_answers_over_budget_are_not_returned(
    dit_instance: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scipy.optimize

    sensitivity, macs = dit_instance(seed=0, blocks=2)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    honest, calls = scipy.optimize.milp, []

    def lenient(*args: Any, constraints: Any, **kwargs: Any) -> Any:
        calls.append(constraints[1].ub.copy())
        constraints[1].ub = constraints[1].ub + 1
        return honest(*args, constraints=constraints, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", lenient)
    found = mixed_integer(problem)
    assert len(calls) > 1
    assert found.mean_bits <= 2.0
    assert found.lower_bound is not None
    assert found.lower_bound < exact(problem).objective <= found.objective * (1 + 1e-12)


def test_time_limit_is_an_error_without_an_answer(
    dit_instance: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scipy.optimize

    sensitivity, macs = dit_instance(seed=0, blocks=1)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    late = scipy.optimize.OptimizeResult(status=1, x=None)
    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **kwargs: late)
    with pytest.raises(RobuqError, match="no allocation within 5 s"):
        mixed_integer(problem, time_limit_s=5)


def test_lagrangian_prices_are_the_best(dit_instance: Make) -> None:
    """No multiplier on a fine grid gives a higher bound."""
    sensitivity, macs = dit_instance(seed=2)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    cost = problem.costs[0]
    bounds = [
        (problem.values + price * cost.units).min(axis=1).sum() - price * cost.capacity
        for price in np.geomspace(1e-6, 1, 5000)
    ]
    bound = lagrangian(problem).lower_bound
    assert bound is not None
    assert max(bounds) <= bound * (1 + 1e-12)
    assert bound == pytest.approx(max(bounds), rel=1e-3)
    assert programming._relaxation(problem)[0] == pytest.approx(bound, rel=1e-6)


def test_uniform_takes_the_largest_common_width(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    for budget, width in ((1.0, 1), (2.0, 2), (2.99, 2), (9.0, 4)):
        problem = allocation_problem(sensitivity, macs, [mac_cost(macs, budget)])
        assert set(uniform(problem).bits_by_layer.values()) == {width}
    split = {name: (2, 4) if "qkv" in name else (1, 3) for name in macs}
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 3.0)], split)
    with pytest.raises(UsageError, match=r"no uniform width.*share are \[\]"):
        uniform(problem)


def test_greedy_takes_the_best_gain_per_cost_and_may_jump() -> None:
    sensitivity = {"a": {1: 9.0, 2: 8.9, 4: 0.0}, "b": {1: 5.0, 2: 4.0, 4: 3.9}}
    problem = allocation_problem(sensitivity, {"a": 1, "b": 1}, [mac_cost({"a": 1, "b": 1}, 2.5)])
    assert greedy(problem).bits_by_layer == {"a": 4, "b": 1}
    free = {"a": {2: 1}, "b": {1: 1, 2: 1}}
    sensitivity = {"a": {2: 1.0}, "b": {1: 1.0, 2: 0.5}}
    choices = {"a": (2,), "b": (1, 2)}
    problem = allocation_problem(sensitivity, {"a": 1, "b": 1}, [Cost("c", free, 2)], choices)
    assert greedy(problem).bits_by_layer == {"a": 2, "b": 2}


def test_random_draws_differ_and_spend_their_budget(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    draws = [random_search(problem, seed=seed) for seed in range(20)]
    assert len({tuple(draw.bits_by_layer.values()) for draw in draws}) == 20
    assert all(1.99 < draw.mean_bits <= 2.0 for draw in draws)
    widths = np.array([list(draw.bits_by_layer.values()) for draw in draws])
    assert set(np.unique(widths)) == set(BITS)
    with pytest.raises(UsageError, match="draws must be at least 1"):
        random_search(problem, draws=0)


def test_evolution_finds_the_optimum_of_a_small_problem_and_takes_any_fitness(
    dit_instance: Make,
) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    assert evolutionary_search(problem).objective == pytest.approx(exact(problem).objective)
    wanted = random_search(problem, seed=11).bits_by_layer
    seen: list[dict[str, int]] = []

    def distance(bits_by_layer: dict[str, int]) -> float:
        seen.append(bits_by_layer)
        return float(sum(bits_by_layer[layer] != bits for layer, bits in wanted.items()))

    assert evolutionary_search(problem, fitness=distance).bits_by_layer == wanted
    assert len({tuple(bits.values()) for bits in seen}) == len(seen)
    with pytest.raises(UsageError, match="population of at least 2"):
        evolutionary_search(problem, population=1)


def test_flat_and_slack_problems_are_solved_by_all(dit_instance: Make) -> None:
    _, macs = dit_instance(seed=0, blocks=1)
    for value in (0.0, 0.25):
        flat = {name: dict.fromkeys(BITS, value) for name in macs}
        for budget in (1.0, 2.0, 100.0):
            problem = allocation_problem(flat, macs, [mac_cost(macs, budget)])
            for solver in SOLVERS:
                found = solve(problem, solver)
                assert found.objective == pytest.approx(4 * value)
                assert found.gap in (None, pytest.approx(0))


def test_one_layer_with_one_width() -> None:
    problem = allocation_problem({"a": {3: 0.5}}, {"a": 7}, [mac_cost({"a": 7}, 3.0)])
    assert all(solve(problem, name).bits_by_layer == {"a": 3} for name in SOLVERS)


def test_a_table_too_large_is_said_and_solved_by_milp(
    random_instance: Make,
    brute_force: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(12)
    monkeypatch.setattr(table, "MAX_TABLE_STATES", 0)
    for index in range(60):
        sensitivity, macs = random_instance(rng, int(rng.integers(1, 8)))
        if index % 5 == 0:
            sensitivity = {
                n: {b: round(v, 1) for b, v in s.items()} for n, s in sensitivity.items()
            }
        costs = [mac_cost(macs, float(rng.uniform(1, 4)))]
        found = solve(allocation_problem(sensitivity, macs, costs), "exact")
        objectives, spent = brute_force(sensitivity, costs[0].table)
        best = objectives[spent / sum(macs.values()) <= costs[0].budget].min()
        assert found.objective == pytest.approx(best, rel=1e-9)
        assert found.gap == pytest.approx(0, abs=1e-6)
        assert found.solver == "milp"
        assert found.mean_bits <= costs[0].budget
    assert len(caplog.messages) == 60
    assert "more than 0 totals" in caplog.messages[0]
    assert "Solved by milp" in caplog.messages[0]
    assert optimal_bits({"a": {1: -1.0, 2: -3.0}}, {"a": 5}, 2.0) == {"a": 2}


def test_ten_thousand_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=(10_000, 1)) * 4.0 ** -np.arange(4)
    sensitivity = {f"l{i}": dict(zip(BITS, v.tolist(), strict=True)) for i, v in enumerate(values)}
    macs = {layer: (3, 1, 4, 4)[i % 4] for i, layer in enumerate(sensitivity)}
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    monkeypatch.setattr(table, "MAX_TABLE_STATES", 10**6)  # the real limit takes 20 s to reach
    with pytest.raises(TableTooLargeError, match="10000 layers"):
        exact(problem)
    found = solve(problem, "exact")
    assert found.solver == "milp"
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.mean_bits == 2.0
    assert found.lower_bound == pytest.approx(lagrangian(problem).lower_bound, rel=1e-5)


def test_activation_bytes() -> None:
    sensitivity = {"a": {2: 1.0, 4: 0.0}, "b": {2: 3.0, 4: 0.0}}
    cost = activation_bytes_cost({"a": 8, "b": 16}, 10.0)
    found = exact(allocation_problem(sensitivity, {"a": 1, "b": 1}, [cost]))
    assert found.bits_by_layer == {"a": 2, "b": 4}
    assert found.costs == {"activation_bytes": 10.0}


def test_unknown_solver_is_named(dit_instance: Make) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=1)
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, 2.0)])
    with pytest.raises(UsageError, match="unknown solver 'greddy'; did you mean 'greedy'"):
        solve(problem, "greddy")
