"""Solvers that draw: random allocations within the budgets, and evolutionary search.

Populations are integer arrays [individuals, layers] of options; all steps work on whole ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from robuq_bench.allocation.problem import Allocation, Problem
from robuq_bench.errors import UsageError

Population = npt.NDArray[np.int64]
Fitness = Callable[[dict[str, int]], float]


def random_search(problem: Problem, *, seed: int = 0, draws: int = 1) -> Allocation:
    """Return the best of `draws` random allocations; one draw is the random baseline.

    Every layer draws its bits uniformly. Random layers are then lowered a step until the budgets
    are met, and random layers raised a step while any step still fits, so that a draw spends its
    budget as the other solvers do.
    """
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    rng = np.random.default_rng(seed)
    drawn = _fill(problem, _repair(problem, _draw(problem, rng, draws), rng), rng)
    objectives = _objectives(problem, drawn)
    return problem.allocation(drawn[int(np.argmin(objectives))])


def evolutionary_search(
    problem: Problem,
    *,
    seed: int = 0,
    population: int = 50,
    generations: int = 200,
    mutation: float = 0.05,
    fitness: Fitness | None = None,
) -> Allocation:
    """Search as Q-DiT searches its group sizes: selection, crossover, mutation, elitism.

    The better half are parents. A child takes each layer from one of two random parents; each of
    its layers then mutates with probability `mutation` to random bits; budgets are met and spent as
    in `random_search`. The best `population` different individuals live on.

    Args:
        fitness: what to minimise, called once per different {layer: bits}, e.g. a measured loss.
            None takes the summed sensitivity. The result's `objective` is always the latter.
    """
    if population < 2 or generations < 0 or not 0 <= mutation <= 1:
        raise UsageError(
            "evolutionary search needs a population of at least 2, generations of at least 0 and "
            f"a mutation probability, got {population}, {generations} and {mutation}"
        )
    rng = np.random.default_rng(seed)
    start = _fill(problem, _repair(problem, _draw(problem, rng, population), rng), rng)
    known: dict[bytes, float] = {}
    alive, scores = _select(problem, start, population, fitness, known)
    for _ in range(generations):
        parents = alive[: max(2, len(alive) // 2)]
        pairs = rng.integers(len(parents), size=(2, population))
        from_first = rng.random((population, len(problem.layers))) < 0.5
        children = np.where(from_first, parents[pairs[0]], parents[pairs[1]])
        mutated = rng.random(children.shape) < mutation
        children = np.where(mutated, _draw(problem, rng, population), children)
        children = _fill(problem, _repair(problem, children, rng), rng)
        both = np.concatenate([alive, children])
        alive, scores = _select(problem, both, population, fitness, known)
    return problem.allocation(alive[int(np.argmin(scores))])


def _select(
    problem: Problem,
    candidates: Population,
    keep: int,
    fitness: Fitness | None,
    known: dict[bytes, float],
) -> tuple[Population, npt.NDArray[np.float64]]:
    """The `keep` best different candidates, best first."""
    different = np.unique(candidates, axis=0)
    if fitness is None:
        scores = _objectives(problem, different)
    else:
        for row in different:
            if row.tobytes() not in known:
                known[row.tobytes()] = fitness(problem.allocation(row).bits_by_layer)
        scores = np.array([known[row.tobytes()] for row in different])
    order = np.argsort(scores, kind="stable")[:keep]
    return different[order], scores[order]


def _objectives(problem: Problem, candidates: Population) -> npt.NDArray[np.float64]:
    rows = np.arange(len(problem.layers))
    objectives: npt.NDArray[np.float64] = problem.values[rows, candidates].sum(axis=1)
    return objectives


def _draw(problem: Problem, rng: np.random.Generator, count: int) -> Population:
    options = [len(row) for row in problem.bits]
    return rng.integers(options, size=(count, len(options)))


def _repair(problem: Problem, candidates: Population, rng: np.random.Generator) -> Population:
    """Move random layers one step towards their cheapest option until all budgets are met."""
    start = problem.cheapest()
    candidates = candidates.copy()
    while True:
        over = np.flatnonzero(~_within(problem, candidates))
        if not len(over):
            return candidates
        movable = candidates[over] != start
        layer = _pick(movable, rng)
        candidates[over, layer] += np.sign(start[layer] - candidates[over, layer])


def _fill(problem: Problem, candidates: Population, rng: np.random.Generator) -> Population:
    """Raise random layers one step while any step fits."""
    candidates = candidates.copy()
    last = np.array([len(row) - 1 for row in problem.bits])
    rows = np.arange(len(problem.layers))
    active = np.arange(len(candidates))
    while len(active):
        now = candidates[active]
        higher = np.minimum(now + 1, last)
        fits = now < last
        for cost in problem.costs:
            taken = cost.units[rows, now]
            left = cost.capacity - taken.sum(axis=1)
            fits &= cost.units[rows, higher] - taken <= left[:, None]
        some = fits.any(axis=1)
        active, fits = active[some], fits[some]
        if len(active):
            candidates[active, _pick(fits, rng)] += 1
    return candidates


def _within(problem: Problem, candidates: Population) -> npt.NDArray[np.bool_]:
    rows = np.arange(len(problem.layers))
    within = np.ones(len(candidates), dtype=np.bool_)
    for cost in problem.costs:
        within &= cost.units[rows, candidates].sum(axis=1) <= cost.capacity
    return within


def _pick(allowed: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """A random allowed layer of each row."""
    return np.argmax(np.where(allowed, rng.random(allowed.shape), -1.0), axis=1)
