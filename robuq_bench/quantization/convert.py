"""`quantize_`: turn the linear layers of any model into `QuantizedLinear`s by a plan, in place."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robuq_bench.errors import ConfigError, UsageError, suggest
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder, hadamard_factors
from robuq_bench.quantization.activations import activation_quantizer, matmul_quantizer
from robuq_bench.quantization.bits import check_bits
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, hidden_references
from robuq_bench.quantization.selection import (
    LayerFilter,
    Selected,
    blocks_of,
    is_adaln,
    is_modulation,
    matches,
    select_layers,
)

if TYPE_CHECKING:
    from robuq_bench.config import Plan

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def low_rank_of(name: str, plan: Plan) -> int:
    """Rank of the branch that the plan gives the layer `name`; 0 for none."""
    patterns = plan.low_rank.layers
    return plan.low_rank.rank if patterns is None or matches(name, patterns) else 0


def target_layers(
    model: nn.Module, plan: Plan, keep: LayerFilter | None = None
) -> dict[str, nn.Linear]:
    """The layers of an unquantized model that `quantize_` would replace, by first name."""
    selected = select_layers(model, plan, keep)
    return {name: layer.module for name, layer in selected.items() if layer.kind != "kept"}


def layer_settings(name: str, plan: Plan, blocks: Collection[str] = ()) -> dict[str, Any]:
    """What `plan` says of the layer `name`, as arguments of `QuantizedLinear.from_linear`.

    `blocks` are those of the layer's model, for `is_adaln`.
    """
    adaln = is_adaln(name, plan, blocks)
    bits = plan.adaln.activation_bits if adaln else plan.activations.bits
    if plan.activations.quantizer == "none":
        bits = None
    return {
        "weight_quantizer": plan.adaln.weight_quantizer if adaln else plan.weights.quantizer,
        "activation_quantizer": plan.activations.quantizer,
        "activation_bits": bits,
        "rotation": plan.rotation.kind if matches(name, plan.rotation.layers) else "none",
        "rank": low_rank_of(name, plan),
    }


def _check(name: str, linear: nn.Linear, settings: dict[str, Any]) -> None:
    """Everything that can be known to fail, before the first layer is replaced."""
    extra = sorted(set(linear._parameters) - {"weight", "bias"})
    if extra:
        raise UsageError(
            f"layer {name!r} is reparametrised ({', '.join(extra)}), which its copy would lose; "
            "remove the reparametrisation first, or add the layer to layers.skip"
        )
    inside = [*linear._buffers, *linear._modules]
    if inside:
        raise UsageError(
            f"layer {name!r} holds more than a weight and a bias ({', '.join(inside)}), which its "
            "copy would lose; move it elsewhere, or add the layer to layers.skip"
        )
    if "forward" in vars(linear):
        raise UsageError(
            f"layer {name!r} has a forward of its own, which its copy would lose (an offloading "
            "hook?); remove it first, or add the layer to layers.skip"
        )
    weight = linear.weight
    if weight.layout != torch.strided:
        raise UsageError(f"layer {name!r} has a weight of layout {weight.layout}; make it dense")
    if weight.is_meta:
        raise UsageError(f"layer {name!r} is on the meta device; load its weights first")
    if weight.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"layer {name!r} has a weight of {weight.dtype}; quantize_ takes "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in WEIGHT_DTYPES)}"
        )
    for part, value in linear.named_parameters(recurse=False):
        if not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"layer {name!r} has {int((~torch.isfinite(value)).sum())} values in its {part} "
                "that are NaN or infinite; find where the checkpoint was damaged"
            )
    rank = settings["rank"]
    if isinstance(rank, int) and rank > min(linear.weight.shape):
        out_features, in_features = linear.weight.shape
        raise ConfigError(
            f"layer {name!r} is {out_features} x {in_features}: low_rank.rank {rank} exceeds its "
            f"smaller side; lower low_rank.rank, leave the layer out of low_rank.layers, or add it "
            "to layers.skip"
        )
    if settings["rotation"] != "none":
        try:
            hadamard_factors(linear.in_features)
        except UnsupportedHadamardOrder as error:
            raise UnsupportedHadamardOrder(
                f"layer {name!r}: {error}. For this layer alone: leave it out of rotation.layers, "
                "or add it to layers.skip"
            ) from None
    quantizer = activation_quantizer(str(settings["activation_quantizer"]))
    bits = settings["activation_bits"]
    if quantizer is not None and isinstance(bits, int):
        quantizer.check_bits(bits)


def _check_references(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a layer that something would go on calling after it was replaced."""
    for place, name in hidden_references(model, set(layers.values())):
        raise UsageError(
            f"{place!r} holds layer {name!r} besides registering it (a list, or torch.compile of "
            "the layer alone?) and would go on calling the old one; register it as a module, "
            "compile after quantize_, or add the layer to layers.skip"
        )


def _check_ties(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a weight whose memory another module uses too: each use would get its own."""
    targets = set(layers.values())
    memory: dict[tuple[int, torch.device], list[tuple[int, int, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for part, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None or value.is_meta or value.layout != torch.strided or not value.numel():
                continue
            # Parts of one memory need not overlap, as those of a flattened model do not.
            reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            start = value.storage_offset() * value.element_size()
            end = start + reach * value.element_size()
            name = f"{module_name}.{part}" if module_name else part
            place = (value.untyped_storage().data_ptr(), value.device)
            for other_start, other_end, other, owner in memory.setdefault(place, []):
                overlaps = start < other_end and other_start < end
                if overlaps and owner is not module and not targets.isdisjoint((owner, module)):
                    raise UsageError(
                        f"{other!r} and {name!r} are one tied parameter, and quantizing would give "
                        "each its own; untie them first (clone one), or add the layers to "
                        "layers.skip"
                    )
            memory[place].append((start, end, name, module))


def quantize_(
    model: nn.Module,
    plan: Plan,
    bits_by_layer: Mapping[str, int] | None = None,
    filter_fn: LayerFilter | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace the linear layers of `model` by `QuantizedLinear`s as `plan` says, in place.

    Which layers: see `quantization/selection.py`; `select_layers(model, plan)` tells beforehand
    and the logger `robuq_bench` (INFO) while converting. Modulation layers follow `plan.adaln` and
    are not part of the bit allocation. Modules with a `matmul_quantizer` attribute get the
    quantizer of `plan.attention.matmul_bits`. A full-precision plan changes nothing. A layer that
    the model holds under several names stays one layer; hooks, `requires_grad` and the training
    mode of a layer pass to its replacement.

    Args:
        model: any module; subclasses of `nn.Linear` are left alone.
        plan: what to do.
        bits_by_layer: activation bits of every layer in `allocatable_layers`; default
            `plan.activations.bits` everywhere.
        filter_fn: (module, name) -> False keeps a layer as it is, after the plan's patterns.
        seed: of the random signs, together with each layer's name.

    Returns:
        `model` itself; of a model that is an `nn.Linear`, its replacement.

    Raises:
        UnsupportedHadamardOrder, ConfigError: the plan does not fit a layer.
        UsageError: the model is quantized already, no layer matches, `bits_by_layer` names other
            layers than the model's, or a layer cannot be replaced: its weight is not finite, tied
            to another module, of an integer dtype or reparametrised. Nothing was changed.
    """
    if not hasattr(plan, "is_full_precision"):
        raise UsageError(f"quantize_ takes a Plan, not {plan!r}; see load_plan(name)")
    if plan.is_full_precision:
        if bits_by_layer:
            raise UsageError(f"plan {plan.name!r} is full precision; it takes no bits_by_layer")
        return model
    if quantized_layers(model):
        raise UsageError("the model is quantized already; convert a fresh copy of the teacher")
    selected = select_layers(model, plan, filter_fn)
    layers = {name: layer.module for name, layer in selected.items() if layer.kind != "kept"}
    if not layers:
        raise UsageError(
            f"plan {plan.name!r} matches no nn.Linear of {type(model).__name__}"
            f"{_why_none(selected)}; see layers.skip, layers.include and filter_fn"
        )
    blocks = blocks_of(model)
    _warn_of_idle_patterns(plan, selected)
    settings = {name: layer_settings(name, plan, blocks) for name in layers}
    for name, linear in layers.items():
        _check(name, linear, settings[name])
    _check_references(model, layers)
    _check_ties(model, layers)
    allocated = [name for name in layers if selected[name].kind == "block"]
    if bits_by_layer is not None:
        _check_bits_by_layer(bits_by_layer, allocated, settings)
    converted = {
        linear: QuantizedLinear.from_linear(linear, name=name, seed=seed, **settings[name])
        for name, linear in layers.items()
    }
    for layer in converted.values():
        for part, value in layer.named_parameters():
            if not bool(torch.isfinite(value).all()):  # rotation can exceed half precision's range
                raise UsageError(
                    f"{part!r} of layer {layer.name!r} overflows {value.dtype} once rotated; "
                    "convert the model in float32"
                )
    model = exchange_layers(model, converted)
    if plan.attention.matmul_bits is not None:
        for module in model.modules():
            if hasattr(module, "matmul_quantizer"):
                module.matmul_quantizer = matmul_quantizer(plan.attention.matmul_bits)  # type: ignore[assignment]
    if bits_by_layer is not None:
        set_activation_bits(model, bits_by_layer)
    logger.info("plan %s on %s: %s", plan.name, type(model).__name__, summary(selected))
    return model


def _warn_of_idle_patterns(plan: Plan, selected: Mapping[str, Selected]) -> None:
    """Name the plan's patterns that match no layer: a slip of the pen leaves no other trace."""
    names = [name for layer in selected.values() for name in (layer.name, *layer.aliases)]

    def idle(patterns: Iterable[str]) -> list[str]:
        return [each for each in patterns if not any(matches(name, (each,)) for name in names)]

    for field in ("skip", "include", "adaln"):
        unused = idle(getattr(plan.layers, field) or ())
        if unused:
            logger.warning("layers.%s matches no layer with %s", field, ", ".join(unused))
    for field, patterns, is_on in (
        ("rotation.layers", plan.rotation.layers, plan.rotation.kind != "none"),
        ("low_rank.layers", plan.low_rank.layers or ("*",), plan.low_rank.rank > 0),
    ):
        # One that is for several families of models has patterns of the others.
        if is_on and len(idle(patterns)) == len(patterns):
            logger.warning("%s matches no layer with %s", field, ", ".join(patterns))


def summary(selected: Mapping[str, Selected]) -> str:
    """One line: how many layers are quantized, and which are kept for which reason."""
    count = {kind: sum(s.kind == kind for s in selected.values()) for kind in ("block", "adaLN")}
    kept: dict[str, list[str]] = {}
    for layer in selected.values():
        if layer.kind == "kept":
            kept.setdefault(layer.reason, []).append(layer.name)
    parts = [f"{count['block']} block and {count['adaLN']} adaLN layers quantized"]
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


def allocatable_layers(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the quantized layers whose activation bits an allocation decides (not adaLN)."""
    blocks = blocks_of(model)
    return [
        name
        for name, layer in quantized_layers(model).items()
        if not is_adaln(name, plan, blocks) and layer.activation_bits is not None
    ]


def _check_bits_by_layer(
    bits_by_layer: Mapping[str, int], names: list[str], settings: Mapping[str, dict[str, Any]]
) -> None:
    for name, bits in bits_by_layer.items():
        if name not in names:
            raise UsageError(f"bits_by_layer names {name!r}, no such layer{suggest(name, names)}")
        check_bits(bits, str(settings[name]["activation_quantizer"]), name)
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
