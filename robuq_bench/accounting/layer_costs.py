"""What each quantized layer costs, as the methods of its slots say it.

A method that does not say what is asked of it is an error that names it. Bits are those of the
layer's rule or of an allocation. Where only the mean of an allocation is known, each layer is given
that mean, as long as every figure that is summed over the layers then comes out as that of any
allocation that spends the budget; otherwise it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from robuq_bench.accounting.packings import TERNARY_BITS
from robuq_bench.accounting.structure import LinearLayer, Structure, allocatable
from robuq_bench.config import BitsConfig, Plan, Rule
from robuq_bench.errors import UsageError, suggest
from robuq_bench.methods.base import FULL_PRECISION_BITS, SCALE_BITS

if TYPE_CHECKING:
    from robuq_bench.methods import ActivationMethod, WeightMethod

Of = Literal["activation", "weight"]
Source = Literal["full precision", "uniform", "budget", "allocation"]


@dataclass(frozen=True)
class WeightCost:
    """Bits of a weight [out, in].

    Attributes:
        bits: of a code, as "W4A4" means it and as a bit operation counts them.
        stored: all bits of the weight, with scales and zero points.
    """

    bits: float
    stored: float


@dataclass(frozen=True)
class InputCost:
    """Bits of a layer's input.

    Attributes:
        bits: of one element.
        scales: scales and zero points that go with one token.
    """

    bits: float
    scales: float


@dataclass(frozen=True)
class LayerCost:
    """A quantized layer; `weight` and `input` are None in full precision.

    Attributes:
        branch_values: numbers in the branch, as many multiply-adds a token.
        branch_rank: of a branch of two factors, 0 without a branch; None for any other branch.
        rotation_bits: what its rotation stores.
        rotation_additions, rotation_macs: of rotating one token.
        scaling_bits, centring_bits: what its scaling and its centring store.
        centring_additions: of centring one token.
    """

    layer: LinearLayer
    weight: WeightCost | None
    input: InputCost | None
    branch_values: int
    branch_rank: int | None
    rotation_bits: float
    rotation_additions: int
    rotation_macs: int
    scaling_bits: float
    centring_bits: float
    centring_additions: int

    @property
    def is_ternary(self) -> bool:
        """Whether the codes of the weight are -1, 0 and 1."""
        return self.weight is not None and math.isclose(self.weight.bits, TERNARY_BITS)

    @property
    def bit_ops(self) -> float:
        """MACs times bits of both operands; 0 where either is in full precision."""
        if self.weight is None or self.input is None:
            return 0
        return self.layer.macs * self.weight.bits * self.input.bits

    @property
    def weight_bits(self) -> float:
        """Nominal bits of a weight."""
        return FULL_PRECISION_BITS if self.weight is None else self.weight.bits

    @property
    def stored_weight_bits(self) -> float:
        """Bits of a weight with its share of scales and zero points."""
        return (
            FULL_PRECISION_BITS if self.weight is None else self.weight.stored / self.layer.weights
        )

    @property
    def input_bits(self) -> float:
        """Nominal bits of an activation."""
        return FULL_PRECISION_BITS if self.input is None else self.input.bits

    @property
    def stored_input_bits(self) -> float:
        """Bits of an activation with its share of the token's scales and zero points."""
        if self.input is None:
            return FULL_PRECISION_BITS
        return self.input.bits + SCALE_BITS * self.input.scales / self.layer.in_features

    @property
    def stored_scales(self) -> float:
        """How many scales and zero points the layer stores, with those of its inputs' channels."""
        of_inputs = (self.scaling_bits + self.centring_bits) / SCALE_BITS
        if self.weight is None:
            return of_inputs
        scales = (self.weight.stored - self.weight.bits * self.layer.weights) / SCALE_BITS
        nearest = round(scales)  # log2(3) bits a code leave a rounding error
        return of_inputs + (nearest if abs(scales - nearest) < 1e-3 else scales)


@dataclass(frozen=True)
class PlanCosts:
    """The quantized layers, and where the bits of their activations and weights are from."""

    layers: tuple[LayerCost, ...]
    activation_source: Source
    weight_source: Source

    @property
    def ternary(self) -> list[LayerCost]:
        """The layers with ternary weights."""
        return [cost for cost in self.layers if cost.is_ternary]

    @property
    def with_codes(self) -> list[LayerCost]:
        """The layers whose weights are stored as codes."""
        return [cost for cost in self.layers if cost.weight is not None]

    @property
    def branch_rank(self) -> int | None:
        """The one rank of all layers (0: no branches); None where they differ or have none."""
        ranks = {cost.branch_rank for cost in self.layers} or {0}
        return ranks.pop() if len(ranks) == 1 else None


def plan_costs(
    structure: Structure, plan: Plan, bits_by_layer: Mapping[str, int] | None
) -> PlanCosts:
    """Ask the methods of every quantized layer what it costs.

    Args:
        bits_by_layer: what the plan allocates, bits of activations or of weights, for exactly the
            layers that have some to choose. None takes what the rules say, or the plan's mean.

    Raises:
        UsageError: unknown or missing layers in `bits_by_layer`, or none where they are needed; a
            method that does not say what it costs.
        ConfigError, UnsupportedHadamardOrder: a method cannot serve its layer.
    """
    of: Of = "activation" if plan.bits is None else plan.bits.of
    layers = allocatable(structure, of)
    if bits_by_layer is not None:
        _check_names(bits_by_layer, [layer.name for layer in layers])
    costs = [_cost(layer, bits_by_layer or {}, of) for layer in structure.quantized]
    sources: dict[Of, Source] = {
        "activation": "uniform" if any(cost.input for cost in costs) else "full precision",
        "weight": "uniform" if any(cost.weight for cost in costs) else "full precision",
    }
    if bits_by_layer is not None and layers:
        sources[of] = "allocation"
    elif bits_by_layer is None and plan.bits is not None:
        if plan.bits.mean is None:
            raise UsageError(f"plan {plan.name!r} reads its bits from a file: pass bits_by_layer")
        costs = _at_mean(costs, plan.bits, {layer.name for layer in layers})
        sources[of] = "budget"
    return PlanCosts(tuple(costs), sources["activation"], sources["weight"])


def _check_names(bits_by_layer: Mapping[str, int], names: Sequence[str]) -> None:
    for name in bits_by_layer:
        if name not in names:
            raise UsageError(f"the allocation has unknown layer {name!r}{suggest(name, names)}")
    for name in names:
        if name not in bits_by_layer:
            raise UsageError(f"the allocation has no bits for layer {name!r}")


def _cost(layer: LinearLayer, bits_by_layer: Mapping[str, int], of: Of) -> LayerCost:
    rule: Rule = layer.rule  # type: ignore[assignment]
    size = layer.out_features, layer.in_features
    bits = bits_by_layer.get(layer.name)
    try:
        for method in rule.slots().values():
            method.check(*size)
        weight, activation = rule.weight, rule.activation
        if weight is not None and bits is not None and of == "weight":
            weight = weight.with_bits(bits)
        if activation is not None and bits is not None and of == "activation":
            activation.check_bits(bits)
        return LayerCost(
            layer,
            None if weight is None else weight_cost(weight, *size),
            None
            if activation is None
            else input_cost(activation, layer.in_features, bits if of == "activation" else None),
            branch_values=0 if rule.branch is None else rule.branch.values(*size),
            branch_rank=0 if rule.branch is None else rule.branch.rank_of(*size),
            rotation_bits=(
                0.0 if rule.rotation is None else rule.rotation.stored_bits(layer.in_features)
            ),
            rotation_additions=(
                0 if rule.rotation is None else rule.rotation.additions(layer.in_features)
            ),
            rotation_macs=0 if rule.rotation is None else rule.rotation.macs(layer.in_features),
            scaling_bits=(
                0.0 if rule.scaling is None else rule.scaling.stored_bits(layer.in_features)
            ),
            centring_bits=(
                0.0 if rule.centring is None else rule.centring.stored_bits(layer.in_features)
            ),
            centring_additions=(
                0 if rule.centring is None else rule.centring.additions(layer.in_features)
            ),
        )
    except UsageError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from None


def weight_cost(method: WeightMethod, out_features: int, in_features: int) -> WeightCost:
    """What a method says of a weight [out, in].

    Raises:
        UsageError: it does not say it, or says what cannot be.
    """
    bits = method.nominal_bits()
    stored = method.storage_bits(out_features, in_features)
    codes = bits * out_features * in_features
    if not (bits > 0 and math.isfinite(stored) and stored > codes * (1 - 1e-9)):
        raise UsageError(
            f"weight method {method.method!r} says {stored:g} storage_bits for {out_features} x "
            f"{in_features} codes of {bits:g} nominal_bits; codes and scales must be in them"
        )
    return WeightCost(bits, stored)


def input_cost(method: ActivationMethod, in_features: int, bits: int | None = None) -> InputCost:
    """What a method says of tokens [in], at `bits` where they are not its own.

    Raises:
        UsageError: it does not say it, or says what cannot be.
    """
    scales = method.scales_per_token(in_features)
    if not (math.isfinite(scales) and scales >= 0):
        raise UsageError(
            f"activation method {method.method!r} says {scales:g} scales_per_token; a token has "
            "none or more"
        )
    return InputCost(method.bits if bits is None else bits, scales)


def _at_mean(costs: list[LayerCost], bits: BitsConfig, names: set[str]) -> list[LayerCost]:
    """The layers `names` at the mean that the plan allocates, which `bits.cost` is weighted by."""
    mean = float(bits.mean or 0)
    chosen = [cost for cost in costs if cost.layer.name in names]
    weigh: Callable[[LinearLayer], int] = {
        "macs": lambda layer: layer.macs,
        "weights": lambda layer: layer.weights,
        "inputs": lambda layer: layer.tokens * layer.in_features,
    }[bits.cost]
    if not _in_step(
        [(weigh(cost.layer), cost.layer.macs * _other(cost, bits.of)) for cost in chosen]
    ):
        raise _not_enough(bits, "bit operations")
    lines = {}
    if bits.of == "weight":
        lines = {cost.layer.name: _line(cost, bits) for cost in chosen}
        if not _in_step([(weigh(cost.layer), lines[cost.layer.name][1]) for cost in chosen]):
            raise _not_enough(bits, "the size of weights")
    means: dict[str, LayerCost] = {}
    for cost in chosen:
        if bits.of == "weight":
            constant, slope = lines[cost.layer.name]
            changed = replace(cost, weight=WeightCost(mean, constant + slope * mean))
        else:
            assert cost.input is not None
            changed = replace(cost, input=InputCost(mean, cost.input.scales))
        means[cost.layer.name] = changed
    return [means.get(cost.layer.name, cost) for cost in costs]


def _other(cost: LayerCost, of: Of) -> float:
    """Bits of the operand that is not allocated; 0 where the product is no bit operation."""
    if cost.weight is None or cost.input is None:
        return 0.0
    return cost.weight.bits if of == "activation" else cost.input.bits


def _in_step(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the second numbers are the first ones times one factor."""
    return all(
        math.isclose(a * pairs[0][1], b * pairs[0][0], rel_tol=1e-9, abs_tol=0.0) for a, b in pairs
    )


def _line(cost: LayerCost, bits: BitsConfig) -> tuple[float, float]:
    """Stored bits of a weight as (constant, per bit of a code)."""
    method: WeightMethod = cost.layer.rule.weight  # type: ignore[union-attr, assignment]
    size = cost.layer.out_features, cost.layer.in_features
    stored = {b: weight_cost(method.with_bits(b), *size).stored for b in bits.choices}
    low, high = bits.choices[0], bits.choices[-1]
    slope = (stored[high] - stored[low]) / (high - low) if high > low else 0.0
    if not all(math.isclose(v, stored[low] + slope * (b - low)) for b, v in stored.items()):
        raise _not_enough(bits, "the size of weights")
    return stored[low] - slope * low, slope


def _not_enough(bits: BitsConfig, what: str) -> UsageError:
    return UsageError(
        f"a mean of {bits.mean:g} {bits.of} bits over {bits.cost} does not decide {what}, which "
        "depend on the layers that get them; give the bits by layer: bits.path, or a finished run"
    )
