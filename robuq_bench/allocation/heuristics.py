"""Solvers that need no table and no library: uniform bits and greedy marginal gain."""

from __future__ import annotations

import numpy as np

from robuq_bench.allocation.problem import Allocation, Choice, Problem
from robuq_bench.errors import UsageError


def uniform(problem: Problem) -> Allocation:
    """Give every layer the same bits: the largest width within every budget.

    Raises:
        UsageError: no width that all layers share meets the budgets.
    """
    common = sorted(set(problem.bits[0]).intersection(*problem.bits), reverse=True)
    for bits in common:
        choice = np.array([row.index(bits) for row in problem.bits], dtype=np.int64)
        if problem.allows(choice):
            return problem.allocation(choice)
    raise UsageError(
        f"no uniform width meets the budgets: the widths that all layers share are {common[::-1]}"
    )


def greedy(problem: Problem) -> Allocation:
    """Raise bits from the cheapest allocation, best sensitivity reduction per cost first.

    Each step may raise one layer to any of its widths that still fits. With several costs, the
    price of a step is the fraction of every budget that it takes, summed.
    """
    return problem.allocation(improve(problem, problem.cheapest()))


def improve(problem: Problem, choice: Choice) -> Choice:
    """Change one layer at a time, most gain per cost first, while something that fits gains."""
    choice = choice.copy()
    rows = np.arange(len(problem.layers))
    prices = np.where(np.isinf(problem.values), 0.0, problem.relative_costs())
    units = np.stack([cost.units for cost in problem.costs])
    capacities = np.array([cost.capacity for cost in problem.costs])
    while True:
        taken = units[:, rows, choice]
        left = capacities - taken.sum(axis=1)
        gain = problem.values[rows, choice][:, None] - problem.values
        price = prices - prices[rows, choice][:, None]
        fits = (units - taken[:, :, None] <= left[:, None, None]).all(axis=0)
        useful = fits & (gain > 0)
        if not useful.any():
            return choice
        # a gain that costs nothing comes before any that does
        free = np.where(price <= 0, np.inf, gain / np.where(price > 0, price, 1.0))
        layer, option = divmod(int(np.argmax(np.where(useful, free, -1.0))), gain.shape[1])
        choice[layer] = option
