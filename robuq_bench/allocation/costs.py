"""What an allocation spends: cost tables {layer: {bits: cost}} with budgets, in whole numbers.

Costs are integers, so that every solver agrees exactly on what a budget allows. `Cost.divisor`
turns their sum into the unit of the budget: MAC-bits into mean bits, steps of a clock into ms.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robuq_bench.errors import UsageError, suggest

BITS = range(1, 17)
"""Bit widths that the builders fill in."""

MAX_UNITS = 2**53
"""Largest total cost in units: beyond it float64, and with it HiGHS, cannot tell budgets apart."""


@dataclass(frozen=True)
class Cost:
    """One budgeted cost: sum over layers of `table[layer][bits]`, divided by `divisor`, <= budget.

    Table entries are non-negative integers. `budget` is in `unit`; infinity means no limit.
    """

    name: str
    table: Mapping[str, Mapping[int, int]]
    budget: float
    divisor: int = 1
    unit: str = ""


@dataclass(frozen=True, eq=False)
class UnitCost:
    """A cost in whole units above the cheapest allocation, for the layers and bits of a problem.

    `units` is [layers, options] int64 (0 where a layer has fewer options), `base` the integer cost
    of the cheapest allocation, `unit` the greatest common divisor of everything above it, `most`
    the units of the dearest allocation and `capacity` the units that the budget allows.
    """

    cost: Cost
    units: npt.NDArray[np.int64]
    base: int
    unit: int
    most: int
    capacity: int

    def cost_at(self, units: int) -> float:
        """Cost of an allocation that spends `units`, in the unit of the budget."""
        return (self.base + self.unit * units) / self.cost.divisor

    def capacity_for(self, budget: float) -> int:
        """Most units whose cost, as a float, does not exceed `budget`; -1: none does."""
        return bisect_right(range(self.most + 1), budget, key=self.cost_at) - 1


def mac_cost(macs: Mapping[str, int], mean_bits: float) -> Cost:
    """Budget `mean_bits` on the MAC-weighted mean: sum_l m_l b_l / sum_l m_l."""
    weights = checked_macs(macs)
    table = {layer: {bits: count * bits for bits in BITS} for layer, count in weights.items()}
    return Cost("mean_bits", table, mean_bits, divisor=sum(weights.values()) or 1, unit="bits")


def activation_bytes_cost(elements: Mapping[str, int], budget_bytes: float) -> Cost:
    """Budget on the bytes of all quantized layer inputs, each counted once: elements * bits / 8.

    `elements` are the input values of a layer per image: tokens * in_features.
    """
    for layer, count in elements.items():
        if not is_integer(count) or count < 1:
            raise UsageError(
                f"the activation elements of layer {layer!r} must be a positive integer, "
                f"got {count!r}"
            )
    table = {name: {bits: int(count) * bits for bits in BITS} for name, count in elements.items()}
    return Cost("activation_bytes", table, budget_bytes, divisor=8, unit="bytes")


def latency_cost(
    latency_ms: Mapping[str, Mapping[int, float]], budget_ms: float, *, steps_per_ms: int = 1000
) -> Cost:
    """Budget on the summed measured latency of the layers.

    Each entry is rounded up to a step (default: one microsecond), so the sum of the measured
    values never exceeds the budget. Coarser steps make the exact table smaller.
    """
    if not is_integer(steps_per_ms) or steps_per_ms < 1:
        raise UsageError(f"steps_per_ms must be a positive integer, got {steps_per_ms!r}")
    table: dict[str, dict[int, int]] = {}
    for layer, by_bits in latency_ms.items():
        for bits, value in by_bits.items():
            if not is_finite(value) or value < 0:
                raise UsageError(
                    f"the latency of layer {layer!r} at {bits} bits is {value!r} ms; it must be "
                    "finite and not negative"
                )
            # 9 decimals first: 0.003 * 1000 is a hair above 3
            steps = math.ceil(round(float(value) * steps_per_ms, 9))
            table.setdefault(layer, {})[bits] = steps
    return Cost("latency_ms", table, budget_ms, divisor=steps_per_ms, unit="ms")


def unit_cost(cost: Cost, layers: Sequence[str], bits: Sequence[Sequence[int]]) -> UnitCost:
    """Check a cost against the layers and bits of a problem and reduce it to units."""
    if not is_finite(cost.budget) and cost.budget != math.inf:
        raise UsageError(f"the {cost.name} budget must be a finite number, got {cost.budget}")
    _check_names(cost, layers)
    rows = [
        [_entry(cost, layer, width) for width in row]
        for layer, row in zip(layers, bits, strict=True)
    ]
    lowest = [min(row) for row in rows]
    extra = [[value - low for value in row] for row, low in zip(rows, lowest, strict=True)]
    unit = math.gcd(*(value for row in extra for value in row)) or 1
    base, most = sum(lowest), sum(max(row) for row in extra) // unit
    if most > MAX_UNITS:
        raise UsageError(
            f"the {cost.name} costs of {len(layers)} layers have the greatest common divisor "
            f"{unit}, which makes {most} budget units: too many to count exactly (limit "
            f"{MAX_UNITS}); round them to a coarser common unit"
        )
    units = np.zeros((len(layers), max(map(len, bits))), dtype=np.int64)
    for index, row in enumerate(extra):
        units[index, : len(row)] = [value // unit for value in row]
    reduced = UnitCost(cost, units, base, unit, most, capacity=most)
    capacity = reduced.capacity_for(cost.budget)
    if capacity < 0:
        raise unreachable(reduced, cost.budget, bits)
    return UnitCost(cost, units, base, unit, most, capacity)


def unreachable(reduced: UnitCost, budget: float, bits: Sequence[Sequence[int]]) -> UsageError:
    """The error for a budget below the cheapest allocation, with the range that can be reached."""
    cost = reduced.cost
    choices = sorted({width for row in bits for width in row})
    unit = f" {cost.unit}" if cost.unit else ""
    return UsageError(
        f"a {cost.name} budget of {budget:g}{unit} cannot be reached: the bit choices "
        f"{', '.join(map(str, choices))} allow {cost.name} from {reduced.cost_at(0):g} to "
        f"{reduced.cost_at(reduced.most):g}"
    )


def checked_macs(macs: Mapping[str, int]) -> dict[str, int]:
    """Return the MACs as Python integers, which cannot overflow."""
    for layer, count in macs.items():
        if not is_integer(count) or count < 1:
            raise UsageError(
                f"the MACs of layer {layer!r} must be a positive integer, got {count!r}"
            )
    return {layer: int(count) for layer, count in macs.items()}


def is_integer(value: object) -> bool:
    """Whether a value is a whole number by type; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite real number; True and False are not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _check_names(cost: Cost, layers: Sequence[str]) -> None:
    known = set(layers)
    for layer in sorted(cost.table):
        if layer not in known:
            raise UsageError(
                f"layer {layer!r} has a {cost.name} cost but no sensitivity{suggest(layer, known)}"
            )
    for layer in layers:
        if layer not in cost.table:
            raise UsageError(
                f"layer {layer!r} has sensitivities but no {cost.name} cost"
                f"{suggest(layer, cost.table)}"
            )


def _entry(cost: Cost, layer: str, bits: int) -> int:
    by_bits = cost.table[layer]
    if bits not in by_bits:
        raise UsageError(f"layer {layer!r} has no {cost.name} cost at {bits} bits")
    value = by_bits[bits]
    if not is_integer(value) or value < 0:
        raise UsageError(
            f"the {cost.name} cost of layer {layer!r} at {bits} bits must be an integer that is "
            f"not negative, got {value!r}; count in a smaller unit"
        )
    return int(value)
