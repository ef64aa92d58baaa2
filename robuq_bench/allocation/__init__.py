"""Bit allocation: which activation bits each layer gets under a budget.

A `Problem` holds sensitivities and one or several costs with their budgets; every solver of
`SOLVERS` turns it into an `Allocation`. With one cost the problem is a multiple-choice knapsack,
which a dynamic programme (`table`) solves for every budget at once; this is the activation-only
mixed precision (AMPN) of RobuQ. RobuQ names the programme but not its state; the MAC-weighted
constraint is the reading that its published A2 means support.
"""

from robuq_bench.allocation.buckets import collapse, expand_over_buckets
from robuq_bench.allocation.costs import Cost, activation_bytes_cost, latency_cost, mac_cost
from robuq_bench.allocation.heuristics import greedy, uniform
from robuq_bench.allocation.problem import (
    Allocation,
    Problem,
    allocation_problem,
    mean_bits,
    mean_bits_by_type,
)
from robuq_bench.allocation.programming import lagrangian, mixed_integer
from robuq_bench.allocation.saving import save_allocation, sensitivities_sha256
from robuq_bench.allocation.search import evolutionary_search, random_search
from robuq_bench.allocation.solvers import SOLVERS, headroom, optimal_bits, solve
from robuq_bench.allocation.table import (
    AllocationTable,
    Knapsack,
    TableTooLargeError,
    allocation_table,
    exact,
    knapsack,
    problem_table,
    solve_ampn,
)

__all__ = [
    "SOLVERS",
    "Allocation",
    "AllocationTable",
    "Cost",
    "Knapsack",
    "Problem",
    "TableTooLargeError",
    "activation_bytes_cost",
    "allocation_problem",
    "allocation_table",
    "collapse",
    "evolutionary_search",
    "exact",
    "expand_over_buckets",
    "greedy",
    "headroom",
    "knapsack",
    "lagrangian",
    "latency_cost",
    "mac_cost",
    "mean_bits",
    "mean_bits_by_type",
    "mixed_integer",
    "optimal_bits",
    "problem_table",
    "random_search",
    "save_allocation",
    "sensitivities_sha256",
    "solve",
    "solve_ampn",
    "uniform",
]
