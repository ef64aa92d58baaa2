"""The allocation problem and its answer.

min  sum_l s_l(b_l)    subject to    sum_l c_k,l(b_l)  <=  C_k    for every cost k
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from robuq_bench.allocation.costs import (
    Cost,
    UnitCost,
    checked_macs,
    is_finite,
    is_integer,
    unit_cost,
)
from robuq_bench.errors import UsageError, suggest

Sensitivities = Mapping[str, Mapping[int, float]]
BitChoices = Sequence[int] | Mapping[str, Sequence[int]]
Choice = npt.NDArray[np.int64]
"""Index of the option that each layer takes, [layers]."""


@dataclass(frozen=True)
class Allocation:
    """Activation bits per layer, chosen for one budget.

    `objective` is the summed sensitivity, `mean_bits` the MAC-weighted mean that was reached and
    `budget` the mean that was allowed (infinite when only other costs are limited); `mean_bits <=
    budget` always. `costs` and `budgets` hold what was reached and allowed for every cost by name.
    No allocation within the budgets has an objective below `lower_bound` (None: not known).
    `solver` is the one that found it, as `solve` knows them (None: called directly).
    """

    bits_by_layer: dict[str, int]
    objective: float
    mean_bits: float
    budget: float
    costs: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    lower_bound: float | None = None
    solver: str | None = None

    @property
    def gap(self) -> float | None:
        """How far above the optimum the objective can be, as a fraction of the objective."""
        if self.lower_bound is None:
            return None
        return (self.objective - self.lower_bound) / self.objective if self.objective else 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Checked sensitivities and costs; make it with `allocation_problem`.

    Layers are in name order, `bits` the ascending options of each. `values` is [layers, options]
    float64, infinite where a layer has fewer options than the longest row.
    """

    layers: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]
    values: npt.NDArray[np.float64]
    costs: tuple[UnitCost, ...]
    macs: tuple[int, ...]

    def objective(self, choice: Choice) -> float:
        """Summed sensitivity of one allocation."""
        return math.fsum(self.values[np.arange(len(self.layers)), choice])

    def spent(self, choice: Choice) -> list[int]:
        """Units that one allocation spends of each cost."""
        rows = np.arange(len(self.layers))
        return [int(cost.units[rows, choice].sum()) for cost in self.costs]

    def allows(self, choice: Choice) -> bool:
        """True when the allocation is within every budget."""
        return all(
            units <= cost.capacity
            for units, cost in zip(self.spent(choice), self.costs, strict=True)
        )

    def relative_costs(self) -> npt.NDArray[np.float64]:
        """All costs as one: the fraction of its budget that an option takes, summed over costs."""
        parts = [cost.units / max(cost.capacity, 1) for cost in self.costs]
        return np.where(np.isinf(self.values), np.inf, np.sum(parts, axis=0))

    def cheapest(self) -> Choice:
        """The cheapest option of every layer, which search starts from and retreats to.

        Raises:
            UsageError: with several costs it may still exceed one of the budgets.
        """
        choice = np.argmin(self.relative_costs(), axis=1)
        if not self.allows(choice):
            names = ", ".join(cost.cost.name for cost in self.costs)
            raise UsageError(
                f"the layers' cheapest bits do not meet all budgets ({names}) at once; solver "
                "'milp' finds an allocation if there is one"
            )
        return choice

    def allocation(
        self,
        choice: Choice,
        *,
        objective: float | None = None,
        lower_bound: float | None = None,
        budgets: Mapping[str, float] | None = None,
    ) -> Allocation:
        """Return the `Allocation` of a choice; `objective` and `budgets` as given, if given."""
        picks = choice.tolist()
        bits = [row[pick] for row, pick in zip(self.bits, picks, strict=True)]
        costs = {
            cost.cost.name: cost.cost_at(units)
            for units, cost in zip(self.spent(choice), self.costs, strict=True)
        }
        allowed = {cost.cost.name: cost.cost.budget for cost in self.costs} | dict(budgets or {})
        spent_macs = sum(count * width for count, width in zip(self.macs, bits, strict=True))
        value = self.objective(choice) if objective is None else objective
        return Allocation(
            bits_by_layer=dict(zip(self.layers, bits, strict=True)),
            objective=value,
            mean_bits=spent_macs / sum(self.macs),
            budget=allowed.get("mean_bits", math.inf),
            costs=costs,
            budgets=allowed,
            # rounding must not lift a bound above the objective
            lower_bound=None if lower_bound is None else min(lower_bound, value),
        )


def allocation_problem(
    sensitivity: Sensitivities,
    macs: Mapping[str, int],
    costs: Sequence[Cost],
    bit_choices: BitChoices | None = None,
) -> Problem:
    """Check everything and return the problem for the solvers.

    Args:
        sensitivity: s_l(b) >= 0 per layer and bit width. It need not fall with b.
        macs: multiply-accumulates of every layer, positive integers; they weight `mean_bits`.
        costs: what is limited; `mac_cost`, `activation_bytes_cost`, `latency_cost` or your own.
        bit_choices: the bit widths to choose from, for all layers or by layer. None takes every
            width that occurs in `sensitivity`, for every layer.

    Raises:
        UsageError: a NaN, infinite, negative or missing sensitivity (naming layer and bits), layers
            or costs that do not match, or a budget below what can be reached (naming the range).
    """
    layers = tuple(sorted(sensitivity))
    bits = _bits(sensitivity, layers, bit_choices)
    weights = _matching_macs(layers, macs)
    values = np.full((len(layers), max(map(len, bits))), np.inf)
    for index, (layer, row) in enumerate(zip(layers, bits, strict=True)):
        values[index, : len(row)] = [_sensitivity(sensitivity, layer, row, width) for width in row]
    names = [cost.name for cost in costs]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"give one or more costs with different names, got {names}")
    reduced = tuple(unit_cost(cost, layers, bits) for cost in costs)
    return Problem(layers, bits, values, reduced, weights)


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


def _bits(
    sensitivity: Sensitivities, layers: Sequence[str], bit_choices: BitChoices | None
) -> tuple[tuple[int, ...], ...]:
    """Return the ascending options of every layer."""
    if not any(sensitivity.values()):
        raise UsageError("there are no sensitivities to allocate bits from")
    if bit_choices is None:
        bit_choices = [bits for by_bits in sensitivity.values() for bits in by_bits]
    if not isinstance(bit_choices, Mapping):
        common = _ascending(bit_choices)
        return (common,) * len(layers)
    for layer in sorted(bit_choices):
        if layer not in sensitivity:
            raise UsageError(
                f"layer {layer!r} has bit choices but no sensitivity{suggest(layer, layers)}"
            )
    for layer in layers:
        if layer not in bit_choices:
            raise UsageError(f"layer {layer!r} has no bit choices{suggest(layer, bit_choices)}")
    return tuple(_ascending(bit_choices[layer], f" of layer {layer!r}") for layer in layers)


def _ascending(choices: Sequence[int], where: str = "") -> tuple[int, ...]:
    for bits in choices:
        if not is_integer(bits) or bits < 1:
            raise UsageError(f"bit widths{where} must be positive integers, got {bits!r}")
    if not 1 <= len(set(choices)) <= 255:
        raise UsageError(f"there must be 1 to 255 bit choices{where}, got {list(choices)}")
    return tuple(sorted({int(bits) for bits in choices}))


def _sensitivity(sensitivity: Sensitivities, layer: str, row: Sequence[int], bits: int) -> float:
    if bits not in sensitivity[layer]:
        raise UsageError(
            f"layer {layer!r} has no sensitivity at {bits} bits; it needs all of "
            f"{', '.join(map(str, row))}"
        )
    value = sensitivity[layer][bits]
    if not is_finite(value) or value < 0:
        raise UsageError(
            f"the sensitivity of layer {layer!r} at {bits} bits is {value!r}; it must be finite "
            "and not negative"
        )
    return float(value)


def _matching_macs(layers: Sequence[str], macs: Mapping[str, int]) -> tuple[int, ...]:
    known = set(layers)
    for layer in sorted(macs):
        if layer not in known:
            raise UsageError(f"layer {layer!r} has MACs but no sensitivity{suggest(layer, known)}")
    for layer in layers:
        if layer not in macs:
            raise UsageError(f"layer {layer!r} has sensitivities but no MACs{suggest(layer, macs)}")
    counts = checked_macs(macs)
    return tuple(counts[layer] for layer in layers)
