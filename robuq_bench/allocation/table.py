"""The exact dynamic programme: one table answers every budget of one cost.

Layers are added one after another. After each, only the totals that are not dominated are kept:
those where spending more lowers the sum of sensitivities. There are at most as many as budget
units, and far fewer when the costs share no divisor, so costs need no rounding.

Memory: 5 bytes per kept total and layer, refused above `MAX_TABLE_STATES`, where `solve` turns to
HiGHS. 112 layers of DiT-XL/2 (MAC units 3:1:4:4, 1 to 4 bits) keep about 55,000, 0.3 MB; with MACs
that share no divisor about 400,000, 2 MB. 1,000 layers of DiT-XL/2 keep 4.5 million, 22 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robuq_bench.allocation.costs import UnitCost, is_finite, mac_cost, unreachable
from robuq_bench.allocation.problem import (
    Allocation,
    BitChoices,
    Problem,
    Sensitivities,
    allocation_problem,
)
from robuq_bench.errors import UsageError

MAX_TABLE_STATES = 2**27
"""Most totals that a table keeps over all layers: 640 MiB, reached in about 20 seconds."""

MAX_FRONT_CELLS = 2**24
"""Most points x layers that `AllocationTable.front` spells out: about 0.7 GB of dicts."""


class TableTooLargeError(UsageError):
    """The table would keep more than `MAX_TABLE_STATES` totals; solver 'milp' needs no table."""


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Every undominated total of a multiple-choice knapsack and the way back to its options.

    Total t spends `spent[t]` for the value `best[t]`; spending ascends and value falls, strictly.
    There it takes option `options[l][t]` in the last row l and total `parents[l][t]` of the rows
    before it.
    """

    spent: Ints
    best: Floats
    options: tuple[npt.NDArray[np.uint8], ...]
    parents: tuple[npt.NDArray[np.int32], ...]

    def trace(self, totals: Sequence[int] | Ints) -> npt.NDArray[np.uint8]:
        """Return the options behind several totals, [totals, rows]."""
        at = np.asarray(totals)
        picked = np.empty((len(at), len(self.options)), dtype=np.uint8)
        for row in reversed(range(len(self.options))):
            picked[:, row] = self.options[row][at]
            at = self.parents[row][at]
        return picked


def knapsack(values: Floats, costs: Ints, capacity: int) -> Knapsack:
    """Pick one option per row; return the least total value for every total cost that improves it.

    Args:
        values: [rows, options] float64; infinite where a row has no such option.
        costs: [rows, options] int64, non-negative; some option of every row costs 0.
        capacity: largest total cost considered, not negative.

    Of equal totals the one with the lowest option in the last row that differs is kept.

    Raises:
        TableTooLargeError: more than `MAX_TABLE_STATES` totals would have to be kept.
    """
    spent, best = np.zeros(1, dtype=np.int64), np.zeros(1)
    options: list[npt.NDArray[np.uint8]] = []
    parents: list[npt.NDArray[np.int32]] = []
    kept = 0
    for row_values, row_costs in zip(values, costs, strict=True):
        valid = np.flatnonzero(np.isfinite(row_values))
        new_spent = (spent + row_costs[valid, None]).ravel()
        new_best = (best + row_values[valid, None]).ravel()
        order = np.argsort(new_spent, kind="stable")
        order = order[: np.searchsorted(new_spent, capacity, "right", sorter=order)]
        new_spent, new_best = new_spent[order], new_best[order]
        better = np.flatnonzero(new_best < _before(new_best))
        # of those that spend the same, the last to improve is the best
        last = np.append(np.diff(new_spent[better]) > 0, True)
        better = better[last]
        option, parent = np.divmod(order[better], len(spent))
        options.append(valid[option].astype(np.uint8))
        parents.append(parent.astype(np.int32))
        spent, best = new_spent[better], new_best[better]
        kept += len(spent)
        if kept > MAX_TABLE_STATES:
            raise TableTooLargeError(
                f"the exact table of {len(values)} layers would keep more than {MAX_TABLE_STATES} "
                f"totals (it got to layer {len(options)}): round the costs to a coarser common "
                "unit, or use solver 'milp', which needs no table"
            )
    return Knapsack(spent, best, tuple(options), tuple(parents))


@dataclass(frozen=True, eq=False)
class AllocationTable:
    """The solved dynamic programme: the optimum for *every* budget up to the problem's own."""

    problem: Problem
    totals: Knapsack

    @property
    def cost(self) -> UnitCost:
        """The one cost of the problem."""
        return self.problem.costs[0]

    def solve(self, budget: float) -> Allocation:
        """Return the best allocation that costs at most `budget` (mean bits, for a MAC cost).

        Of several optima the cheapest is taken.

        Raises:
            UsageError: the budget is not a finite number, below the cheapest allocation, or above
                the budget that the table was made for.
        """
        check_budget(self.cost.cost.name, budget)
        if budget > self.cost.cost.budget:
            raise UsageError(
                f"this table was made for a {self.cost.cost.name} budget of "
                f"{self.cost.cost.budget:g}, so it does not know {budget:g}"
            )
        capacity = self.cost.capacity_for(budget)
        if capacity < 0:
            raise unreachable(self.cost, budget, self.problem.bits)
        total = int(np.searchsorted(self.totals.spent, capacity, "right")) - 1
        return self._allocation(total, self.totals.trace([total])[0], budget)

    def pareto(self) -> tuple[Floats, Floats]:
        """Return the exact Pareto front as arrays: cost (mean bits) and objective, [points] each.

        Cost ascends and the objective falls, both strictly. `solve(cost)` gives the allocation of
        a point; `front` those of all points, which takes far longer with many layers.
        """
        cost = [self.cost.cost_at(units) for units in self.totals.spent.tolist()]
        return np.array(cost), self.totals.best.copy()

    def front(self) -> list[Allocation]:
        """Return the allocation of every point of `pareto`; each one's budget is its own cost.

        Raises:
            UsageError: points x layers exceed `MAX_FRONT_CELLS`.
        """
        points, layers = len(self.totals.spent), len(self.problem.layers)
        if points * layers > MAX_FRONT_CELLS:
            raise UsageError(
                f"the front has {points} points of {layers} layers: too many to spell out (limit "
                f"{MAX_FRONT_CELLS // layers} points); take the curve from pareto() and single "
                "allocations from solve()"
            )
        picked = self.totals.trace(np.arange(points))
        own = [self.cost.cost_at(units) for units in self.totals.spent.tolist()]
        return [self._allocation(total, picked[total], own[total]) for total in range(points)]

    def _allocation(self, total: int, picked: npt.NDArray[np.uint8], budget: float) -> Allocation:
        value = float(self.totals.best[total])
        return self.problem.allocation(
            picked.astype(np.int64),
            objective=value,
            lower_bound=value,
            budgets={self.cost.cost.name: float(budget)},
        )


def problem_table(problem: Problem) -> AllocationTable:
    """Solve a problem with one cost for every budget up to its own.

    Raises:
        UsageError: several costs.
        TableTooLargeError: more than `MAX_TABLE_STATES` totals would have to be kept.
    """
    if len(problem.costs) > 1:
        names = ", ".join(cost.cost.name for cost in problem.costs)
        raise UsageError(
            f"the dynamic programme takes one cost, not {len(problem.costs)} ({names}); "
            "solver 'milp' is exact with several"
        )
    cost = problem.costs[0]
    return AllocationTable(problem, knapsack(problem.values, cost.units, cost.capacity))


def exact(problem: Problem) -> Allocation:
    """Return the optimum under one cost by dynamic programming; errors of `problem_table`."""
    table = problem_table(problem)
    budget = table.cost.cost.budget
    return table.solve(budget if math.isfinite(budget) else table.cost.cost_at(table.cost.most))


def solve_ampn(
    sensitivity: Sensitivities,
    macs: Mapping[str, int],
    mean_bits: float,
    bit_choices: BitChoices | None = None,
) -> Allocation:
    """Return the exact optimum of the AMPN programme for one budget.

        min  sum_l s_l(b_l)    subject to    sum_l m_l b_l  <=  B sum_l m_l

    Args:
        sensitivity: s_l(b) >= 0 per layer and bit width. It need not fall with b.
        macs: multiply-accumulates of every layer in `sensitivity`, positive integers.
        mean_bits: budget B on the MAC-weighted mean; above the largest bit width it is slack.
        bit_choices: as for `allocation_problem`.

    Ties go to the allocation with fewer MAC-weighted bits; the result does not depend on the
    order of the mappings.

    Raises:
        UsageError: unreachable budget (with the reachable range), a NaN, infinite, negative or
            missing sensitivity (naming layer and bits), layers that do not match, or a table
            above `MAX_TABLE_STATES`.
    """
    check_budget("mean_bits", mean_bits)
    return exact(allocation_problem(sensitivity, macs, [mac_cost(macs, mean_bits)], bit_choices))


def allocation_table(
    sensitivity: Sensitivities, macs: Mapping[str, int], bit_choices: BitChoices | None = None
) -> AllocationTable:
    """Solve the AMPN programme for every budget at once; arguments and errors of `solve_ampn`."""
    costs = [mac_cost(macs, math.inf)]
    return problem_table(allocation_problem(sensitivity, macs, costs, bit_choices))


def check_budget(name: str, budget: float) -> None:
    """Raise UsageError unless the budget is a finite number."""
    if not is_finite(budget):
        raise UsageError(f"the {name} budget must be a finite number, got {budget}")


def _before(values: Floats) -> Floats:
    """The least of all values before each one."""
    return np.concatenate(([np.inf], np.minimum.accumulate(values)[:-1]))
