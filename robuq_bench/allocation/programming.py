"""Solvers on HiGHS (`scipy.optimize`): exact with several costs, and the Lagrangian bound.

Variables x[l, b] in {0, 1} say that layer l takes option b; the options of a layer sum to one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from robuq_bench.allocation.heuristics import improve
from robuq_bench.allocation.problem import Allocation, Choice, Problem
from robuq_bench.errors import RobuqError, UsageError

Floats = npt.NDArray[np.float64]

TARGET_OBJECTIVE = 1e4
"""HiGHS stops at an absolute gap of 1e-6, so objectives are scaled to make that 1e-10."""

EXACT_UNITS = 1e6
"""Budgets up to this many units are beyond HiGHS's feasibility tolerance of 1e-6."""


def mixed_integer(problem: Problem, *, time_limit_s: float = 60.0) -> Allocation:
    """Return the optimum under any number of costs, by branch and bound.

    `lower_bound` is what HiGHS proved. It differs from the objective only after the time limit, or
    where a budget of more than a million units had to be tightened because HiGHS's tolerance let
    its answer exceed it.

    Raises:
        UsageError: no allocation meets all budgets together.
        RobuqError: HiGHS found no allocation within the time limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = ~np.isinf(problem.values)
    relaxed, _ = _relaxation(problem)
    scale = TARGET_OBJECTIVE / relaxed if relaxed > 0 else 1.0
    one_each, costs, capacities, scales = _matrices(problem)
    bound: float | None = None
    for _ in range(10):
        result = milp(
            problem.values[options] * scale,
            integrality=np.ones(options.sum()),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs / scales[:, None], -np.inf, capacities / scales),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
        if result.status == 2:
            raise _infeasible(problem)
        if result.x is None:
            raise RobuqError(f"HiGHS found no allocation within {time_limit_s:g} s")
        bound = result.mip_dual_bound / scale if bound is None else bound
        choice = _choice(problem, result.x)
        excess = np.array(problem.spent(choice)) - [cost.capacity for cost in problem.costs]
        if (excess <= 0).all():
            return problem.allocation(choice, lower_bound=max(bound, 0.0))
        capacities = capacities - np.maximum(excess, 0)
    raise RobuqError("HiGHS keeps exceeding a budget; count its cost in coarser units")


def lagrangian(problem: Problem) -> Allocation:
    """Return a good allocation with the Lagrangian lower bound on every allocation.

        L(lambda) = sum_l min_b [s_l(b) + sum_k lambda_k c_k,l(b)] - sum_k lambda_k C_k

    for lambda >= 0 is a lower bound. Its maximum is where lambda are the dual prices of the linear
    relaxation (the layers' choices have the integrality property), so HiGHS gives the best lambda
    in one solve. Layers that the relaxation splits take their cheapest part; what budget is left is
    then spent by marginal gain.

    Raises:
        UsageError: no allocation meets all budgets together, or rounding finds none.
    """
    _, (shares, prices) = _relaxation(problem)
    _, bound = _priced(problem, prices)
    used = np.where(shares > 1e-9, problem.relative_costs(), np.inf)
    choice = np.argmin(used, axis=1)
    if not problem.allows(choice):
        choice = problem.cheapest()
    return problem.allocation(improve(problem, choice), lower_bound=max(bound, 0.0))


def core(problem: Problem) -> Problem:
    """Return the problem without the options that no optimum takes, infinite from here on.

    An allocation with option b of layer l costs at least the Lagrangian bound plus how far the
    option's priced value lies above the layer's least; the option goes where that exceeds what
    `lagrangian` found. Errors as of `lagrangian`.
    """
    _, (_, prices) = _relaxation(problem)
    priced, bound = _priced(problem, prices)
    least = bound + (priced - priced.min(axis=1, keepdims=True))
    found = lagrangian(problem).objective
    return replace(problem, values=np.where(least > found * (1 + 1e-9), np.inf, problem.values))


def _priced(problem: Problem, prices: Floats) -> tuple[Floats, float]:
    """Values [layers, options] with what the options' costs are worth, and the bound L(prices).

    Evaluated from the problem, so that solver tolerances cannot make the bound too high.
    """
    priced = problem.values.copy()
    for price, cost in zip(prices, problem.costs, strict=True):
        priced += price * cost.units
    spent = math.fsum(p * cost.capacity for p, cost in zip(prices, problem.costs, strict=True))
    return priced, math.fsum(priced.min(axis=1)) - spent


def _relaxation(problem: Problem) -> tuple[float, tuple[Floats, Floats]]:
    """Solve the linear relaxation: objective, shares [layers, options] and a price per cost."""
    from scipy.optimize import linprog

    options = ~np.isinf(problem.values)
    one_each, costs, capacities, _ = _matrices(problem)
    value_scale = float(problem.values[options].max()) or 1.0
    cost_scales = np.maximum(capacities, 1.0)
    result = linprog(
        problem.values[options] / value_scale,
        A_ub=costs / cost_scales[:, None],
        b_ub=capacities / cost_scales,
        A_eq=one_each,
        b_eq=np.ones(len(problem.layers)),
        bounds=(0, 1),
        method="highs",
    )
    if result.status == 2:
        raise _infeasible(problem)
    if result.x is None:
        raise RobuqError(f"HiGHS failed on the linear relaxation: {result.message}")
    shares = np.zeros(problem.values.shape)
    shares[options] = result.x
    prices = np.maximum(0.0, -result.ineqlin.marginals) * value_scale / cost_scales
    return float(result.fun) * value_scale, (shares, prices)


def _matrices(problem: Problem) -> tuple[Any, Floats, Floats, Floats]:
    """Constraints over the flattened options: one each, costs [costs, variables], capacities."""
    from scipy.sparse import csr_array

    options = ~np.isinf(problem.values)
    rows = np.nonzero(options)[0]
    ones = np.ones(len(rows))
    one_each = csr_array((ones, (rows, np.arange(len(rows)))), shape=(len(options), len(rows)))
    costs = np.array([cost.units[options] for cost in problem.costs], dtype=np.float64)
    capacities = np.array([cost.capacity for cost in problem.costs], dtype=np.float64)
    return one_each, costs, capacities, np.maximum(1.0, capacities / EXACT_UNITS)


def _choice(problem: Problem, solution: Floats) -> Choice:
    picked = np.full(problem.values.shape, -1.0)
    picked[~np.isinf(problem.values)] = solution
    return np.argmax(picked, axis=1)


def _infeasible(problem: Problem) -> UsageError:
    budgets = ", ".join(f"{cost.cost.name} {cost.cost.budget:g}" for cost in problem.costs)
    return UsageError(f"no allocation meets these budgets together: {budgets}; raise one of them")
