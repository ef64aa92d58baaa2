"""`quantize_`: turn the linear layers of any model into `QuantizedLinear`s by a plan, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from robuq_bench.errors import ConfigError, UsageError, suggest
from robuq_bench.quantization.activations import activation_quantizer, matmul_quantizer
from robuq_bench.quantization.hadamard import UnsupportedHadamardOrder, hadamard_factors
from robuq_bench.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from robuq_bench.config import Plan

LayerFilter = Callable[[nn.Module, str], bool]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_adaln(name: str, plan: Plan) -> bool:
    """Whether the layer `name` is a modulation linear, which follows `plan.adaln`."""
    return _matches(name, plan.layers.adaln)


def low_rank_of(name: str, plan: Plan) -> int:
    """Rank of the branch that the plan gives the layer `name`; 0 for none."""
    patterns = plan.low_rank.layers
    return plan.low_rank.rank if patterns is None or _matches(name, patterns) else 0


def _replaceable(module: nn.Module) -> bool:
    # A subclass may be read through its weight (nn.MultiheadAttention does), bypassing forward.
    return type(module) is nn.Linear


def target_layers(
    model: nn.Module, plan: Plan, keep: LayerFilter | None = None
) -> dict[str, nn.Linear]:
    """The layers of an unquantized model that `quantize_` would replace, by name."""
    adaln = plan.adaln
    quantizes_adaln = adaln.weight_quantizer != "none" or adaln.activation_bits is not None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and _replaceable(module)
        and not _matches(name, plan.layers.skip)
        and (quantizes_adaln or not is_adaln(name, plan))
        and (keep is None or keep(module, name))
    }


def layer_settings(name: str, plan: Plan) -> dict[str, Any]:
    """What `plan` says of the layer `name`, as arguments of `QuantizedLinear.from_linear`."""
    adaln = is_adaln(name, plan)
    bits = plan.adaln.activation_bits if adaln else plan.activations.bits
    if plan.activations.quantizer == "none":
        bits = None
    return {
        "weight_quantizer": plan.adaln.weight_quantizer if adaln else plan.weights.quantizer,
        "activation_quantizer": plan.activations.quantizer,
        "activation_bits": bits,
        "rotation": plan.rotation.kind if _matches(name, plan.rotation.layers) else "none",
        "rank": low_rank_of(name, plan),
    }


def _check(name: str, linear: nn.Linear, settings: dict[str, Any]) -> None:
    """Everything that can fail, before the first layer is replaced."""
    rank = settings["rank"]
    if isinstance(rank, int) and rank > min(linear.weight.shape):
        out_features, in_features = linear.weight.shape
        raise ConfigError(
            f"layer {name!r} is {out_features} x {in_features}: low_rank.rank {rank} exceeds its "
            f"smaller side; lower low_rank.rank or add the layer to layers.skip"
        )
    if settings["rotation"] != "none":
        try:
            hadamard_factors(linear.in_features)
        except UnsupportedHadamardOrder as error:
            raise UnsupportedHadamardOrder(f"layer {name!r}: {error}") from None
    quantizer = activation_quantizer(str(settings["activation_quantizer"]))
    bits = settings["activation_bits"]
    if quantizer is not None and isinstance(bits, int):
        quantizer.check_bits(bits)


def quantize_(
    model: nn.Module,
    plan: Plan,
    bits_by_layer: Mapping[str, int] | None = None,
    filter_fn: LayerFilter | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace the linear layers of `model` by `QuantizedLinear`s as `plan` says, in place.

    Layers matching `plan.layers.skip` stay; those matching `plan.layers.adaln` follow `plan.adaln`
    and are not part of the bit allocation. Modules with a `matmul_quantizer` attribute get the
    quantizer of `plan.attention.matmul_bits`. A full-precision plan changes nothing.

    Args:
        model: any module; subclasses of `nn.Linear` are left alone.
        plan: what to do.
        bits_by_layer: activation bits of every layer in `allocatable_layers`; default
            `plan.activations.bits` everywhere.
        filter_fn: (module, name) -> False keeps a layer as it is, after the plan's patterns.
        seed: of the random signs, together with each layer's name.

    Returns:
        `model` itself.

    Raises:
        UnsupportedHadamardOrder, ConfigError: the plan does not fit a layer; nothing was changed.
        UsageError: the model is quantized already, no layer matches, or `bits_by_layer` names
            other layers than the model's.
    """
    if not hasattr(plan, "is_full_precision"):
        raise UsageError(f"quantize_ takes a Plan, not {plan!r}; see load_plan(name)")
    if plan.is_full_precision:
        if bits_by_layer:
            raise UsageError(f"plan {plan.name!r} is full precision; it takes no bits_by_layer")
        return model
    if quantized_layers(model):
        raise UsageError("the model is quantized already; convert a fresh copy of the teacher")
    layers = target_layers(model, plan, filter_fn)
    if not layers:
        raise UsageError(
            f"plan {plan.name!r} matches no nn.Linear of {type(model).__name__}; see layers.skip "
            "and filter_fn"
        )
    settings = {name: layer_settings(name, plan) for name in layers}
    for name, linear in layers.items():
        _check(name, linear, settings[name])
    allocated = [name for name in layers if not is_adaln(name, plan)]
    if bits_by_layer is not None:
        _check_names(bits_by_layer, allocated)
    for name, linear in layers.items():
        converted = QuantizedLinear.from_linear(linear, name=name, seed=seed, **settings[name])
        parent_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent_name), attribute, converted)
    if plan.attention.matmul_bits is not None:
        for module in model.modules():
            if hasattr(module, "matmul_quantizer"):
                module.matmul_quantizer = matmul_quantizer(plan.attention.matmul_bits)  # type: ignore[assignment]
    if bits_by_layer is not None:
        set_activation_bits(model, bits_by_layer)
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def allocatable_layers(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the quantized layers whose activation bits an allocation decides (not adaLN)."""
    return [
        name
        for name, layer in quantized_layers(model).items()
        if not is_adaln(name, plan) and layer.activation_bits is not None
    ]


def _check_names(bits_by_layer: Mapping[str, int], names: list[str]) -> None:
    for name in bits_by_layer:
        if name not in names:
            raise UsageError(f"bits_by_layer names {name!r}, no such layer{suggest(name, names)}")
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
    diffusers, "ff.net.0.proj" and "ff.net.2", is fc1 and fc2.
    """
    if "adaLN" in name:
        return "adaLN"
    if ".net." in name:
        return "fc1" if name.endswith(".net.0.proj") else "fc2"
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name
