"""Bit allocation: the activation-only mixed precision (AMPN) of RobuQ, solved exactly.

Each layer l picks one bit width b_l from a common set. The allocation minimises the summed
sensitivity under a budget on the MAC-weighted mean:

    min  sum_l s_l(b_l)    subject to    sum_l m_l b_l  <=  B sum_l m_l

This is a multiple-choice knapsack with integer costs, so a dynamic programme over "units spent"
solves it exactly for every budget at once. RobuQ names the programme but not its state; the
MAC-weighted constraint is the reading that its published A2 means support.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robuq_bench.errors import UsageError, suggest

MAX_TABLE_CELLS = 2**28
"""Largest DP table (layers x units), one byte each: 256 MiB."""


@dataclass(frozen=True)
class Allocation:
    """Activation bits per layer, chosen for one budget.

    `objective` is the summed sensitivity, `mean_bits` the MAC-weighted mean that was reached and
    `budget` the mean that was allowed; `mean_bits <= budget` always.
    """

    bits_by_layer: dict[str, int]
    objective: float
    mean_bits: float
    budget: float


@dataclass(frozen=True, eq=False)
class AllocationTable:
    """The solved dynamic programme: the optimum for *every* budget up to its capacity.

    A "unit" is `unit_cost` MAC-bits above the cheapest allocation, which costs `base_cost`.
    `best[u]` is the least summed sensitivity that spends exactly u units (inf: unreachable), and
    `choices[l, u]` the index into `bit_choices` that layer l takes there.
    """

    layers: tuple[str, ...]
    bit_choices: tuple[int, ...]
    unit_costs: npt.NDArray[np.int64]
    best: npt.NDArray[np.float64]
    choices: npt.NDArray[np.uint8]
    base_cost: int
    unit_cost: int
    total_macs: int

    def mean_bits_at(self, units: int) -> float:
        """MAC-weighted mean bits of an allocation that spends `units`."""
        return (self.base_cost + self.unit_cost * units) / self.total_macs

    def solve(self, mean_bits: float) -> Allocation:
        """Return the best allocation whose mean is at most `mean_bits` (MAC-weighted bits).

        Of several optima the one with the fewest MAC-weighted bits is taken.

        Raises:
            UsageError: the budget is not a finite number, or below the cheapest allocation.
        """
        _check_budget(mean_bits)
        capacity = self._capacity(mean_bits)
        if capacity < 0:
            raise _unreachable(mean_bits, self.bit_choices)
        spent = int(np.argmin(self.best[: capacity + 1]))
        return self._allocations([spent], [mean_bits])[0]

    def front(self) -> list[Allocation]:
        """Return the exact Pareto front: every mean at which more bits lower the objective.

        Ordered by mean bits; each allocation's budget is its own mean.
        """
        before = np.concatenate(([np.inf], np.minimum.accumulate(self.best)[:-1]))
        spent = np.flatnonzero(self.best < before).tolist()
        return self._allocations(spent, [self.mean_bits_at(units) for units in spent])

    def _capacity(self, mean_bits: float) -> int:
        """Largest number of units whose mean, as a float, does not exceed the budget; -1: none."""
        units = range(len(self.best))
        return bisect_right(units, mean_bits, key=self.mean_bits_at) - 1

    def _allocations(self, spent: Sequence[int], budgets: Sequence[float]) -> list[Allocation]:
        """Trace the choices of several budgets back through the table at once."""
        left = np.asarray(spent, dtype=np.int64)
        picked = np.empty((len(spent), len(self.layers)), dtype=np.int64)
        for layer in reversed(range(len(self.layers))):
            picked[:, layer] = self.choices[layer, left]
            left = left - self.unit_costs[layer, picked[:, layer]]
        bits = np.asarray(self.bit_choices)[picked].tolist()
        return [
            Allocation(
                bits_by_layer=dict(zip(self.layers, row, strict=True)),
                objective=float(self.best[units]),
                mean_bits=self.mean_bits_at(units),
                budget=float(budget),
            )
            for row, units, budget in zip(bits, spent, budgets, strict=True)
        ]


def solve_ampn(
    sensitivity: Mapping[str, Mapping[int, float]], macs: Mapping[str, int], mean_bits: float
) -> Allocation:
    """Return the exact optimum of the AMPN programme for one budget.

    Args:
        sensitivity: s_l(b) >= 0 per layer and bit width; the same bit widths for every layer.
            It need not fall with b.
        macs: multiply-accumulates of every layer in `sensitivity`, positive integers.
        mean_bits: budget B on the MAC-weighted mean; above the largest bit width it is slack.

    Ties go to the allocation with fewer MAC-weighted bits; the result does not depend on the
    order of the mappings.

    Raises:
        UsageError: unreachable budget (with the reachable range), a NaN, infinite, negative or
            missing sensitivity (naming layer and bits), layers that do not match, or MACs with so
            small a common divisor that the table would not fit in memory.
    """
    _check_budget(mean_bits)
    return _build(sensitivity, macs, mean_bits).solve(mean_bits)


def allocation_table(
    sensitivity: Mapping[str, Mapping[int, float]], macs: Mapping[str, int]
) -> AllocationTable:
    """Solve the AMPN programme for every budget at once; arguments and errors of `solve_ampn`."""
    return _build(sensitivity, macs, math.inf)


def mean_bits(bits_by_layer: Mapping[str, float], macs: Mapping[str, int]) -> float:
    """Return the MAC-weighted mean bits of an allocation.

    Raises:
        UsageError: the allocation is empty or has a layer without MACs.
    """
    if not bits_by_layer:
        raise UsageError("the allocation is empty, so it has no mean bits")
    for layer in bits_by_layer:
        if layer not in macs:
            raise UsageError(f"no MACs for layer {layer!r} of the allocation{suggest(layer, macs)}")
    total = sum(macs[layer] for layer in bits_by_layer)
    return sum(macs[layer] * bits for layer, bits in bits_by_layer.items()) / total


def mean_bits_by_type(bits_by_layer: Mapping[str, float]) -> dict[str, float]:
    """Return the plain mean bits of each layer type (qkv, proj, fc1, fc2, ...), in type order.

    Within a type all layers of a DiT cost the same, so this is comparable with the paper's
    2.75 / 2.21 / 2.00 / 1.64 (proj / qkv / fc1 / fc2) at a mean of 2 bits.
    """
    from robuq_bench.quantization.convert import layer_type

    grouped: dict[str, list[float]] = {}
    for layer, bits in bits_by_layer.items():
        grouped.setdefault(layer_type(layer), []).append(bits)
    return {kind: sum(bits) / len(bits) for kind, bits in sorted(grouped.items())}


def knapsack(
    values: npt.NDArray[np.float64], costs: npt.NDArray[np.int64], capacity: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Pick one option per row; return the least total value for every exact total cost.

    Args:
        values: [rows, options] float64.
        costs: [rows, options] int64, non-negative.
        capacity: largest total cost considered.

    Returns:
        best: [capacity + 1] float64, inf where no combination costs exactly that much.
        choices: [rows, capacity + 1] uint8, the option each row takes there (the lowest on ties).
    """
    rows = len(values)
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((rows, capacity + 1), dtype=np.uint8)
    reach = 0
    for row in range(rows):
        # Totals above `reach` are still unreachable, so early rows touch a short prefix only.
        previous_reach, reach = reach, min(capacity, reach + int(costs[row].max()))
        updated = np.full(capacity + 1, np.inf)
        for option, (value, cost) in enumerate(zip(values[row], costs[row], strict=True)):
            end = min(previous_reach, capacity - int(cost)) + 1
            if end <= 0:
                continue
            candidate = best[:end] + value
            window = updated[cost : cost + end]
            better = candidate < window
            window[better] = candidate[better]
            choices[row, cost : cost + end][better] = option
        best = updated
    return best, choices


def _build(
    sensitivity: Mapping[str, Mapping[int, float]], macs: Mapping[str, int], max_mean: float
) -> AllocationTable:
    """Validate, reduce costs to integer units and run the programme up to the mean `max_mean`."""
    bit_choices = _check_sensitivity(sensitivity)
    weights = _check_macs(sensitivity, macs)
    layers = tuple(sorted(sensitivity))
    lowest = bit_choices[0]
    extra = [[weights[layer] * (bits - lowest) for bits in bit_choices] for layer in layers]
    unit = math.gcd(*(cost for row in extra for cost in row)) or 1
    total = sum(weights.values())
    base = lowest * total
    capacity = sum(row[-1] for row in extra) // unit
    if max_mean < bit_choices[-1]:
        # One unit more than the rounded budget: the table decides about the last one itself.
        capacity = min(capacity, max(0, math.ceil((max_mean * total - base) / unit) + 1))
    if len(layers) * (capacity + 1) > MAX_TABLE_CELLS:
        raise UsageError(
            f"the MACs of {len(layers)} layers have the greatest common divisor {unit}, which "
            f"makes {capacity} budget units: too many for an exact table (limit "
            f"{MAX_TABLE_CELLS // len(layers)}); round the MACs to a coarser common unit"
        )
    costs = np.array([[cost // unit for cost in row] for row in extra], dtype=np.int64)
    values = np.array([[sensitivity[layer][bits] for bits in bit_choices] for layer in layers])
    best, choices = knapsack(values.astype(np.float64), costs, capacity)
    return AllocationTable(layers, bit_choices, costs, best, choices, base, unit, total)


def _check_budget(budget: float) -> None:
    if isinstance(budget, bool) or not math.isfinite(budget):
        raise UsageError(f"the budget on the mean bits must be a finite number, got {budget}")


def _unreachable(budget: float, bit_choices: Sequence[int]) -> UsageError:
    return UsageError(
        f"a mean of {budget:g} bits cannot be reached: the bit choices "
        f"{', '.join(map(str, bit_choices))} allow means from {bit_choices[0]} to {bit_choices[-1]}"
    )


def _check_sensitivity(sensitivity: Mapping[str, Mapping[int, float]]) -> tuple[int, ...]:
    """Return the common bit widths in ascending order."""
    widths = {bits for by_bits in sensitivity.values() for bits in by_bits}
    if not widths:
        raise UsageError("there are no sensitivities to allocate bits from")
    for bits in widths:
        if not _is_integer(bits) or bits < 1:
            raise UsageError(f"bit widths must be positive integers, got {bits!r}")
    bit_choices = tuple(sorted(int(bits) for bits in widths))
    for layer, by_bits in sensitivity.items():
        for bits in bit_choices:
            if bits not in by_bits:
                raise UsageError(
                    f"layer {layer!r} has no sensitivity at {bits} bits; every layer needs all of "
                    f"{', '.join(map(str, bit_choices))}"
                )
            value = by_bits[bits]
            if not math.isfinite(value) or value < 0:
                raise UsageError(
                    f"the sensitivity of layer {layer!r} at {bits} bits is {value}; it must be "
                    "finite and not negative"
                )
    return bit_choices


def _check_macs(layers: Iterable[str], macs: Mapping[str, int]) -> dict[str, int]:
    """Return the MACs as Python integers, which cannot overflow."""
    layers = set(layers)
    for layer in sorted(macs):
        if layer not in layers:
            raise UsageError(f"layer {layer!r} has MACs but no sensitivity{suggest(layer, layers)}")
    for layer in sorted(layers):
        if layer not in macs:
            raise UsageError(f"layer {layer!r} has sensitivities but no MACs{suggest(layer, macs)}")
        if not _is_integer(macs[layer]) or macs[layer] < 1:
            raise UsageError(
                f"the MACs of layer {layer!r} must be a positive integer, got {macs[layer]!r}"
            )
    return {layer: int(macs[layer]) for layer in macs}


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
