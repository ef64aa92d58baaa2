"""Linear layers, sizes and multiply-accumulates (MACs) of a model, by the groups of a plan.

The DiT of a workload is built on PyTorch's meta device: no weights, no memory, no forward pass. All
counts are per image and per forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robuq_bench.accounting.packings import TERNARY_BITS, weight_cost
from robuq_bench.errors import UsageError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import low_rank_of
from robuq_bench.quantization.selection import (
    ADALN_NOT_QUANTIZED,
    is_adaln,
    matches,
    quantizes_adaln,
    select_layers,
)

if TYPE_CHECKING:
    from robuq_bench.config import Plan
    from robuq_bench.config.workload import ModelConfig


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer that a plan may quantize; `tokens` are its rows per image."""

    name: str
    in_features: int
    out_features: int
    tokens: int

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        return self.tokens * self.weights


@dataclass(frozen=True)
class Structure:
    """Sizes of a DiT: block linears and modulation (adaLN) linears apart from the rest.

    `shapes` are those of every parameter by name.
    """

    parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    block_linears: tuple[LinearLayer, ...]
    adaln_linears: tuple[LinearLayer, ...]
    attention_macs: int
    other_macs: int

    @property
    def macs(self) -> int:
        linears = (*self.block_linears, *self.adaln_linears)
        return sum(layer.macs for layer in linears) + self.attention_macs + self.other_macs


def layer_macs(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Return the MACs per image of every linear and convolution layer, in the order they run.

    Counted in one forward pass on `inputs` (batch first; a batch of 1 on the meta device is
    cheapest). Layers with `in_features` and `out_features` count as linear, quantized or not;
    bias, low-rank branch and rotation are left out. A layer that runs twice counts twice.
    """
    batch = len(inputs[0])
    counted: dict[str, int] = {}
    handles = []

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                macs = output.numel() * module.weight[0].numel()
            else:
                macs = args[0].numel() * int(module.out_features)  # type: ignore[arg-type]
            counted[name] = counted.get(name, 0) + macs // batch

        return hook

    for name, module in model.named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if is_linear or isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(count(name)))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def dit_layer_macs(model_config: ModelConfig) -> dict[str, int]:
    """Return what `layer_macs` gives for a workload's DiT, without its weights or a forward pass.

    Counted from the shapes, in module order: the timestep embedder and the modulation linears see
    one row per image, every other layer one row per token.
    """
    return dict(_sizes(model_config).macs)


def dit_layer_weights(model_config: ModelConfig) -> dict[str, int]:
    """Weights of every linear layer of a workload's DiT."""
    return {layer.name: layer.weights for layer in _sizes(model_config).linears}


def dit_layer_inputs(model_config: ModelConfig) -> dict[str, int]:
    """Input values per image of every linear layer of a workload's DiT: tokens times width."""
    return {layer.name: layer.tokens * layer.in_features for layer in _sizes(model_config).linears}


@dataclass(frozen=True)
class _Sizes:
    """A DiT without weights: shapes of parameters, MACs by layer (convolutions too), linears."""

    model: DiT
    shapes: dict[str, tuple[int, ...]]
    macs: dict[str, int]
    linears: tuple[LinearLayer, ...]


class _WithoutWeights(TorchFunctionMode):
    """Puts the weights of new layers on the meta device and leaves `normal_` out.

    The whole model on the meta device would do too, but its arithmetic there (`normal_`, position
    table) imports PyTorch's compiler, which takes seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        if func is nn.init.normal_:
            return next(iter((*args, *kwargs.values())))
        return func(*args, **kwargs)


@lru_cache(maxsize=8)
def _sizes(model_config: ModelConfig) -> _Sizes:
    with _WithoutWeights():
        model = DiT.from_config(model_config)
    tokens = _tokens(model_config)
    macs: dict[str, int] = {}
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_conditioning = name.startswith("t_embedder.") or "adaLN_modulation" in name
            rows = 1 if is_conditioning else tokens
            linears.append(LinearLayer(name, module.in_features, module.out_features, rows))
            macs[name] = linears[-1].macs
        elif isinstance(module, nn.Conv2d):
            macs[name] = tokens * module.weight.numel()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return _Sizes(model, shapes, macs, tuple(linears))


def _tokens(model_config: ModelConfig) -> int:
    return (model_config.input_size // model_config.patch_size) ** 2


def dit_structure(model_config: ModelConfig, plan: Plan) -> Structure:
    """Return the sizes of a DiT, its linears grouped as `plan` selects them."""
    sizes = _sizes(model_config)
    selected = select_layers(sizes.model, plan)
    linears = [
        layer
        for layer in sizes.linears
        if selected[layer.name].kind != "kept" or selected[layer.name].reason == ADALN_NOT_QUANTIZED
    ]
    return Structure(
        parameters=sum(map(math.prod, sizes.shapes.values())),
        shapes=sizes.shapes,
        block_linears=tuple(layer for layer in linears if not is_adaln(layer.name, plan)),
        adaln_linears=tuple(layer for layer in linears if is_adaln(layer.name, plan)),
        # QK^T and attention x V: tokens x tokens x width each.
        attention_macs=2
        * model_config.depth
        * _tokens(model_config) ** 2
        * model_config.hidden_size,
        other_macs=sum(sizes.macs.values()) - sum(layer.macs for layer in linears),
    )


def converted_layers(structure: Structure, plan: Plan) -> list[LinearLayer]:
    """Layers that `quantize_` replaces: each has a low-rank branch and, by pattern, a rotation."""
    if plan.is_full_precision:
        return []
    adaln = structure.adaln_linears if quantizes_adaln(plan) else ()
    return [*structure.block_linears, *adaln]


def ternary_layers(structure: Structure, plan: Plan) -> list[LinearLayer]:
    """The layers whose weights the plan makes ternary.

    Raises:
        UsageError: a weight quantizer whose cost is not known, or that is not ternary: the
            packings store ternary codes alone.
    """
    found = []
    for layer in converted_layers(structure, plan):
        name = weight_quantizer(layer, plan)
        cost = weight_cost(name)
        if cost.is_quantized and cost.bits != TERNARY_BITS:
            raise UsageError(f"layer {layer.name!r}: no packing stores {name!r} weights")
        if cost.is_quantized:
            found.append(layer)
    return found


def rotated_layers(structure: Structure, plan: Plan) -> list[LinearLayer]:
    """The layers whose input the plan rotates."""
    if plan.rotation.kind == "none":
        return []
    layers = converted_layers(structure, plan)
    return [layer for layer in layers if matches(layer.name, plan.rotation.layers)]


def low_rank_values(layer: LinearLayer, plan: Plan) -> int:
    """Values in the low-rank branch that the plan gives this layer."""
    return low_rank_of(layer.name, plan) * (layer.in_features + layer.out_features)


def weight_quantizer(layer: LinearLayer, plan: Plan) -> str:
    """Name of the weight quantizer that the plan gives this layer."""
    if is_adaln(layer.name, plan):
        return plan.adaln.weight_quantizer
    return plan.weights.quantizer
