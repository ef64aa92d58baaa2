"""`quantize_`: turn the linear layers of any model into `QuantizedLinear`s by a plan, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from robuq_bench.config.plan import matches
from robuq_bench.errors import UsageError, suggest
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.bits import check_bits
from robuq_bench.quantization.checks import check_layer, check_references, check_ties
from robuq_bench.quantization.fitting import (
    Calibration,
    fit_by_blocks,
    fit_layer,
    needs_of,
    site_of,
)
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers
from robuq_bench.quantization.selection import (
    LayerFilter,
    Selected,
    is_modulation,
    select_layers,
)

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Rule

logger = logging.getLogger(__name__)


def target_layers(
    model: nn.Module, plan: Plan, keep: LayerFilter | None = None
) -> dict[str, nn.Linear]:
    """The layers of an unquantized model that `quantize_` would replace, by first name."""
    selected = select_layers(model, plan, keep)
    return {name: layer.module for name, layer in selected.items() if layer.rule is not None}


def quantize_(
    model: nn.Module,
    plan: Plan,
    bits_by_layer: Mapping[str, int] | None = None,
    filter_fn: LayerFilter | None = None,
    seed: int = 0,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    weight_bits_by_layer: Mapping[str, int] | None = None,
    blank: bool = False,
) -> nn.Module:
    """Replace the linear layers of `model` by `QuantizedLinear`s as `plan` says, in place.

    Which layers: see `quantization/selection.py`; `select_layers(model, plan)` tells beforehand
    and the logger `robuq_bench` (INFO) while converting. Modules with a `matmul_quantizer`
    attribute get the quantizer of `plan.attention.matmul_bits`. A full-precision plan changes
    nothing. A layer that the model holds under several names stays one layer; hooks,
    `requires_grad` and the training mode of a layer pass to its replacement.

    Args:
        model: any module; subclasses of `nn.Linear` are left alone.
        plan: what to do.
        bits_by_layer: activation bits of every layer in `allocatable_layers`; default what the
            layers' rules say.
        filter_fn: (module, name) -> False keeps a layer as it is, after the plan's rules.
        seed: of what methods draw, together with each layer's name.
        calibration: inputs of the model, for methods that need to see those of their layers; the
            layers are then fitted block by block.
        weight_bits_by_layer: weight bits of every layer in `allocatable_layers(..., "weight")`.
        blank: fit to unit inputs, for a model whose state is loaded afterwards.

    Returns:
        `model` itself; of a model that is an `nn.Linear`, its replacement.

    Raises:
        UnsupportedHadamardOrder, ConfigError: the plan does not fit a layer.
        UsageError: the model is quantized already, no layer matches, `bits_by_layer` names other
            layers than the model's, a method needs calibration, or a layer cannot be replaced: its
            weight is not finite, tied to another module, of an integer dtype or reparametrised.
            Nothing was changed.
    """
    if not hasattr(plan, "is_full_precision"):
        raise UsageError(f"quantize_ takes a Plan, not {plan!r}; see load_plan(name)")
    if plan.is_full_precision:
        if bits_by_layer or weight_bits_by_layer:
            raise UsageError(f"plan {plan.name!r} is full precision; it takes no bits_by_layer")
        return model
    if quantized_layers(model):
        raise UsageError("the model is quantized already; convert a fresh copy of the teacher")
    selected = select_layers(model, plan, filter_fn)
    rules = {name: layer.rule for name, layer in selected.items() if layer.rule is not None}
    layers = {name: selected[name].module for name in rules}
    if not layers:
        raise UsageError(
            f"plan {plan.name!r} matches no nn.Linear of {type(model).__name__}"
            f"{_why_none(selected)}; see the rules in [[layers]], and filter_fn"
        )
    warn_of_idle_rules(plan, selected)
    rules |= _at_weight_bits(rules, weight_bits_by_layer or {})
    for name, linear in layers.items():
        check_layer(name, linear, rules[name])
    check_references(model, layers)
    check_ties(model, layers)
    if bits_by_layer is not None:
        _check_bits_by_layer(bits_by_layer, rules)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(list(calibration))
    needs = {name: needs_of(rule) for name, rule in rules.items()}
    if any(needs.values()) and not blank:
        if calibration is None or not len(calibration.batches):
            name = next(name for name, found in needs.items() if found)
            asking = [m.method for m in rules[name].slots().values() if m.needs]
            raise UsageError(
                f"plan {plan.name!r}: {', '.join(map(repr, asking))} of layer {name!r} needs to "
                "see inputs of the layer; give quantize_(calibration=...) inputs of the model"
            )
        operands = matmul_quantizers(model)
        try:
            if calibration.quantized_predecessors:  # what follows attention sees them too
                _quantize_operands(model, plan)
            model = fit_by_blocks(model, layers, rules, needs, calibration, seed)
        except BaseException:
            for module, present in operands.items():
                module.matmul_quantizer = present
            raise
    else:
        fitted: dict[nn.Module, nn.Module] = {
            linear: fit_layer(linear, rules[name], site_of(name, linear, seed, blank=blank))
            for name, linear in layers.items()
        }
        model = exchange_layers(model, fitted)
    _quantize_operands(model, plan)
    if bits_by_layer is not None:
        set_activation_bits(model, bits_by_layer)
    logger.info("plan %s on %s: %s", plan.name, type(model).__name__, summary(selected))
    return model


def _quantize_operands(model: nn.Module, plan: Plan) -> None:
    if plan.attention.matmul_bits is not None:
        for module in matmul_quantizers(model):
            module.matmul_quantizer = matmul_quantizer(plan.attention.matmul_bits)


def matmul_quantizers(model: nn.Module) -> dict[Any, Any]:
    """The modules that quantize operands of attention's products, each with what it uses now."""
    return {m: m.matmul_quantizer for m in model.modules() if hasattr(m, "matmul_quantizer")}


def _at_weight_bits(rules: Mapping[str, Rule], bits_by_layer: Mapping[str, int]) -> dict[str, Rule]:
    """The rules of the named layers with their weight methods at other bits."""
    if not bits_by_layer:
        return {}
    methods = {
        name: rule.weight
        for name, rule in rules.items()
        if rule.weight and rule.has_choice("weight")
    }
    for name in bits_by_layer:
        if name not in methods:
            raise UsageError(
                f"weight_bits_by_layer names {name!r}, no layer whose weight has bits to choose"
                f"{suggest(name, methods)}"
            )
    missing = [name for name in methods if name not in bits_by_layer]
    if missing:
        raise UsageError(
            f"weight_bits_by_layer lacks {len(missing)} layers: {', '.join(missing[:5])}"
        )
    return {
        name: rules[name].model_copy(update={"weight": methods[name].with_bits(bits)})
        for name, bits in bits_by_layer.items()
    }


def warn_of_idle_rules(plan: Plan, selected: Mapping[str, Selected]) -> None:
    """Name the rules that fit no layer: a slip of the pen leaves no other trace."""
    for rule in plan.layers:
        if rule.kind == ("adaLN",) and rule.match == ("*",):
            continue  # a model without modulation has none
        used = any(
            plan.rule_for(name, layer.kind) is rule
            for layer in selected.values()
            for name in (layer.name, *layer.aliases)
        )
        if not used:
            logger.warning(
                "rule %r of [[layers]] (match %s, kind %s) fits no layer",
                rule.name,
                ", ".join(rule.match),
                ", ".join(rule.kind),
            )
        elif not rule.slots():  # its patterns are a list of layers, not one for every model
            names = [
                name
                for layer in selected.values()
                if layer.kind in rule.kind
                for name in (layer.name, *layer.aliases)
            ]
            for pattern in rule.match:
                if not any(matches(name, (pattern,)) for name in names):
                    logger.warning("rule %r of [[layers]]: %r matches no layer", rule.name, pattern)


def summary(selected: Mapping[str, Selected]) -> str:
    """One line: how many layers are quantized, and which are kept for which reason."""
    count: dict[str, int] = {"block": 0, "adaLN": 0}
    kept: dict[str, list[str]] = {}
    for layer in selected.values():
        if layer.rule is None:
            kept.setdefault(layer.reason, []).append(layer.name)
        else:
            count[layer.kind] = count.get(layer.kind, 0) + 1
    parts = [" and ".join(f"{n} {kind}" for kind, n in count.items()) + " layers quantized"]
    for reason, names in kept.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{len(names)} kept, {', '.join(names[:3])}{more}: each {reason}")
    return "; ".join(parts)


def _why_none(selected: Mapping[str, Selected]) -> str:
    if not selected:
        return ", which has none"
    first = next(iter(selected.values()))
    return f" (of {len(selected)}; {first.name!r} {first.reason})"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def allocatable_layers(model: nn.Module, of: str = "activation") -> list[str]:
    """Names of the quantized layers whose bits an allocation decides (`of` activations, weights).

    Those of rules with a method in that slot that has bits to choose (see `Rule.has_choice`).
    """
    return [name for name, layer in quantized_layers(model).items() if of in layer.chooses]


def _check_bits_by_layer(bits_by_layer: Mapping[str, int], rules: Mapping[str, Rule]) -> None:
    names = [name for name, rule in rules.items() if rule.has_choice("activation")]
    for name, bits in bits_by_layer.items():
        if name not in names:
            raise UsageError(f"bits_by_layer names {name!r}, no such layer{suggest(name, names)}")
        check_bits(bits, rules[name].activation, name)
    missing = [name for name in names if name not in bits_by_layer]
    if missing:
        raise UsageError(f"bits_by_layer lacks {len(missing)} layers: {', '.join(missing[:5])}")


def set_activation_bits(model: nn.Module, bits_by_layer: Mapping[str, int | None]) -> None:
    """Set the activation bits of the named quantized layers; the others keep theirs.

    Raises:
        UsageError: a name is not a quantized layer of the model.
        ConfigError: the layer's quantizer is not defined at these bits. Nothing is changed.
    """
    layers = quantized_layers(model)
    for name, bits in bits_by_layer.items():
        if name not in layers:
            raise UsageError(f"no quantized layer {name!r}{suggest(name, layers)}")
        layers[name].check_activation_bits(bits)
    for name, bits in bits_by_layer.items():
        layers[name].activation_bits = bits


def layer_type(name: str) -> str:
    """Kind of a layer from its name: qkv, proj, fc1, fc2, adaLN, or the last component.

    A trailing list index is not a kind: "attn1.to_out.0" is "to_out". The feed-forward network of
    diffusers, "ff.net.0.proj" and "ff.net.2", is fc1 and fc2. Every modulation layer is adaLN, also
    "norm1.linear", and a layer under an adapter keeps its kind.
    """
    if is_modulation(name):
        return "adaLN"
    if ".net." in name:
        return "fc1" if ".net.0.proj" in name else "fc2"
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]
    return parts[-1] if parts else name
