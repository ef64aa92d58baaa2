"""What the exact allocation of large models costs: the whole front, beside one MILP solve.

Synthetic sensitivities over layers with the MACs of DiT-XL/2 (qkv, proj, fc1, fc2 as 3:1:4:4). No
time is reported unless the dynamic programme's objective at a mean of 2 bits equals HiGHS's.
"""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np

from robuq_bench.allocation import allocation_problem, allocation_table, mac_cost, solve
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import CheckError
from robuq_bench.runs.run import Run

VERSION = "1"
SUMMARY = "Cost of the exact allocation at every budget, for 112 and 1,000 layers."
USES_DATA = False
SIZES = (112, 1000)
BITS = (1, 2, 3, 4)
MACS = (3, 1, 4, 4)
BUDGET = 2.0
ALLOWED = 1e-6  # relative difference to HiGHS, whose default gap this is


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """One row per number of layers."""
    rows = []
    with context.progress.task("allocation-speed", len(SIZES)) as task:
        for layers in SIZES:
            rows.append(row(layers, config.seed))
            task.advance()
    for item in rows:
        run.append(f"allocation-speed/{item['layers']}", kind="allocation-speed", **item)
    run.write_table("allocation_speed", rows)
    return rows


def row(layers: int, seed: int) -> dict[str, Any]:
    """Seconds of the front, of all its allocations and of MILP, and the table's memory."""
    generator = np.random.default_rng(seed)
    sensitivity, macs = {}, {}
    for index in range(layers):
        name = f"layer{index:04d}"
        # Falls by about 4 per bit, as quantization noise does.
        values = generator.lognormal(sigma=1.0) * 4.0 ** -np.arange(len(BITS))
        sensitivity[name] = dict(zip(BITS, map(float, values), strict=True))
        macs[name] = MACS[index % len(MACS)]
    start = time.perf_counter()
    table = allocation_table(sensitivity, macs, BITS)
    means, _ = table.pareto()
    front_s = time.perf_counter() - start
    # Tracing memory slows everything, so it gets a pass of its own.
    tracemalloc.start()
    allocation_table(sensitivity, macs, BITS).pareto()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    start = time.perf_counter()
    every = table.front()
    all_s = time.perf_counter() - start
    start = time.perf_counter()
    problem = allocation_problem(sensitivity, macs, [mac_cost(macs, BUDGET)])
    reference = solve(problem, "milp").objective
    milp_s = time.perf_counter() - start
    difference = abs(table.solve(BUDGET).objective / reference - 1)
    if not difference <= ALLOWED:
        raise CheckError(
            f"{layers} layers: the exact objective differs from HiGHS by {difference:.1e}, allowed "
            f"{ALLOWED:.0e}; no timing is reported"
        )
    return {
        "layers": layers,
        "bit_widths": len(BITS),
        "budgets_on_front": len(means),
        "front_s": front_s,
        "all_allocations_s": all_s,
        "one_milp_s": milp_s,
        "allocations": len(every),
        "peak_mib": peak / 2**20,
        "difference_to_milp": difference,
    }
