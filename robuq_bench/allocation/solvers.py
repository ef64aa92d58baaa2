"""Solvers by name, as studies and their options know them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from robuq_bench.allocation.costs import mac_cost
from robuq_bench.allocation.heuristics import greedy, uniform
from robuq_bench.allocation.problem import Allocation, Problem, Sensitivities, allocation_problem
from robuq_bench.allocation.programming import core, lagrangian, mixed_integer
from robuq_bench.allocation.search import evolutionary_search, random_search
from robuq_bench.allocation.table import TableTooLargeError, exact
from robuq_bench.errors import UsageError, suggest

logger = logging.getLogger(__name__)

FALLBACK_TIME_LIMIT_S = 600.0
"""For HiGHS in place of the table; 10,000 layers take seconds."""

Solver = Callable[[Problem, int], Allocation]
"""Takes the problem and a seed, which only the solvers that draw use."""

SOLVERS: dict[str, Solver] = {
    "exact": lambda problem, seed: _exact(problem),
    "milp": lambda problem, seed: mixed_integer(problem),
    "lagrangian": lambda problem, seed: lagrangian(problem),
    "greedy": lambda problem, seed: greedy(problem),
    "evolutionary": lambda problem, seed: evolutionary_search(problem, seed=seed),
    "random": lambda problem, seed: random_search(problem, seed=seed),
    "random-best-of-1000": lambda problem, seed: random_search(problem, seed=seed, draws=1000),
    "uniform": lambda problem, seed: uniform(problem),
}


def solve(problem: Problem, solver: str, *, seed: int = 0) -> Allocation:
    """Solve with the solver of that name.

    Where the table of 'exact' would be too large, HiGHS finds the optimum instead: a warning says
    so, and the allocation's `solver` is 'milp'.

    Raises:
        UsageError: unknown solver, or the problem is not one that it can solve.
    """
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}{suggest(solver, SOLVERS)}")
    found = SOLVERS[solver](problem, seed)
    return replace(found, solver=found.solver or solver)


def _exact(problem: Problem) -> Allocation:
    try:
        return exact(problem)
    except TableTooLargeError as error:
        found = mixed_integer(core(problem), time_limit_s=FALLBACK_TIME_LIMIT_S)
        logger.warning("%s. Solved by milp, at most %.1e above the optimum", error, found.gap)
        return replace(found, solver="milp")


def headroom(values: Sensitivities, found: Allocation, mean: float) -> float | None:
    """What mixing bits can gain by the metric: the predicted loss of uniform bits over `found`'s.

    1 says that the metric sees no gain, so that no allocation by it can show one. None where `mean`
    is no width that all layers have, or nothing is predicted to be lost.
    """
    if not found.objective or any(mean not in by_bits for by_bits in values.values()):
        return None
    return math.fsum(by_bits[int(mean)] for by_bits in values.values()) / found.objective


def optimal_bits(values: Sensitivities, macs: Mapping[str, int], budget: float) -> dict[str, int]:
    """Bits with the least sum of `values`, which may lie below 0, at a mean of `budget` bits.

    Raises:
        UsageError: as of `allocation_problem`.
    """
    # What all bits of a layer share changes no choice, and solvers take nothing below 0.
    above = {
        layer: {bits: value - min(by_bits.values()) for bits, value in by_bits.items()}
        for layer, by_bits in values.items()
    }
    problem = allocation_problem(above, macs, [mac_cost(macs, budget)])
    return solve(problem, "exact").bits_by_layer
