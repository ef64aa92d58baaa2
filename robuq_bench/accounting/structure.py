"""Linear layers, sizes and multiply-accumulates (MACs) of a model, with the rules of a plan.

The DiT of a workload is built on PyTorch's meta device: no weights, no memory, no forward pass. All
counts are per image and per forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robuq_bench.models.dit import DiT
from robuq_bench.quantization.selection import Selected, select_layers

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Rule
    from robuq_bench.config.plan import Kind
    from robuq_bench.config.workload import ModelConfig


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer.

    Attributes:
        tokens: its rows per image.
        kind: where it stands, as a plan's rules name it.
        rule: what quantizes it; None keeps it in full precision.
    """

    name: str
    in_features: int
    out_features: int
    tokens: int
    kind: Kind = "block"
    rule: Rule | None = None

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        return self.tokens * self.weights


@dataclass(frozen=True)
class Structure:
    """Sizes of a DiT and its linear layers, with what a plan says of them.

    `shapes` are those of every parameter by name. `other_linears` are those outside the blocks
    that the plan quantizes; what they cost is not in `other_macs`.
    """

    parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    block_linears: tuple[LinearLayer, ...]
    adaln_linears: tuple[LinearLayer, ...]
    other_linears: tuple[LinearLayer, ...]
    attention_macs: int
    other_macs: int

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        return (*self.block_linears, *self.adaln_linears, *self.other_linears)

    @property
    def quantized(self) -> tuple[LinearLayer, ...]:
        """The layers that `quantize_` replaces."""
        return tuple(layer for layer in self.linears if layer.rule is not None)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.linears) + self.attention_macs + self.other_macs


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
    """Weights (bias left out) of every linear layer of a workload's DiT, in module order."""
    return {layer.name: layer.weights for layer in _sizes(model_config).linears}


def dit_layer_inputs(model_config: ModelConfig) -> dict[str, int]:
    """Input elements per image of every linear layer of a workload's DiT, in module order."""
    return {layer.name: layer.tokens * layer.in_features for layer in _sizes(model_config).linears}


def dit_selected(model_config: ModelConfig, plan: Plan) -> dict[str, Selected]:
    """What a plan does to every linear layer of a workload's DiT, built without weights."""
    return select_layers(_sizes(model_config).model, plan)


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
    """Return the sizes of a DiT, its linears with the rules of `plan`."""
    sizes = _sizes(model_config)
    selected = dit_selected(model_config, plan)
    linears = [
        replace(layer, kind=selected[layer.name].kind, rule=selected[layer.name].rule)
        for layer in sizes.linears
    ]
    counted = [layer for layer in linears if layer.kind != "other" or layer.rule is not None]

    def of(kind: Kind) -> tuple[LinearLayer, ...]:
        return tuple(layer for layer in counted if layer.kind == kind)

    return Structure(
        parameters=sum(map(math.prod, sizes.shapes.values())),
        shapes=sizes.shapes,
        block_linears=of("block"),
        adaln_linears=of("adaLN"),
        other_linears=of("other"),
        # QK^T and attention x V: tokens x tokens x width each.
        attention_macs=2
        * model_config.depth
        * _tokens(model_config) ** 2
        * model_config.hidden_size,
        other_macs=sum(sizes.macs.values()) - sum(layer.macs for layer in counted),
    )


def allocatable(structure: Structure, of: Literal["activation", "weight"]) -> list[LinearLayer]:
    """The layers whose bits of activations or weights an allocation decides.

    The same as `allocatable_layers` says of the quantized model.
    """
    layers = structure.quantized
    return [layer for layer in layers if layer.rule is not None and layer.rule.has_choice(of)]
