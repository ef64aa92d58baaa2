"""What goes into a packed file: tensors as they are stored, their names, and facts of layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.config import Plan
from robuq_bench.errors import UsageError
from robuq_bench.inference import codecs
from robuq_bench.inference.packed_header import Facts, LayerFacts, RuledFacts, Storage
from robuq_bench.inference.packed_layer import PackedLayer
from robuq_bench.inference.packed_restore import OPTIONAL_PARTS
from robuq_bench.inference.packed_uniform import PackedUniform
from robuq_bench.inference.stored_tensors import holds_signs, problem_of, stored
from robuq_bench.methods import Method
from robuq_bench.quantization.module_tree import names_of


@dataclass
class Content:
    """Tensors on their way into a file, their further names, and dtypes other than float32."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def add_layer(self, name: str, layer: PackedLayer, storage: Storage) -> None:
        """The tensors of a packed layer.

        Raises:
            UsageError: a value that cannot be stored.
        """
        self._note(f"{name}.codes", layer.like.dtype)
        if isinstance(layer, PackedUniform):
            self.tensors[f"{name}.codes"] = layer.packed
            # Flat, since int8 is for matrices of weights.
            self.add(f"{name}.scale", layer.scale.flatten(), storage.rest)
            if layer.zero is not None:
                self.add(f"{name}.zero", layer.zero.flatten(), storage.rest)
        else:
            planes: Any = layer.planes
            is_base3 = storage.codes == "base3"
            codes = codecs.encode_base3(layer.codes().cpu()) if is_base3 else planes
            self.tensors[f"{name}.codes"] = codes
            # A per-tensor scale is kept once.
            first = layer.scale[:1]
            scale = first if bool((layer.scale == first).all()) else layer.scale
            self.add(f"{name}.scale", scale, storage.rest)
        if layer.signs is not None:
            self.tensors[f"{name}.signs"] = codecs.encode_signs(layer.signs.cpu())
        for part in OPTIONAL_PARTS:
            value = getattr(layer, part)
            if value is not None:
                kind = storage.rest if part == "bias" else storage.low_rank
                self.add(f"{name}.{part}", value, kind)
        for slot, module in layer.other_slots().items():
            for key, value in module.state_dict().items():
                self._add_slot(f"{name}.{slot}.{key}", value, storage.rest)

    def _add_slot(self, name: str, value: Tensor, kind: str) -> None:
        """A slot's tensor: signs as bits, and nothing coarser than fp16, which int8 would be."""
        if holds_signs(value) and bool((value.abs() == 1).all()):
            self._note(name, value.dtype)
            self.tensors[name] = codecs.encode_signs(value.cpu())
        else:
            self.add(name, value, "fp32" if kind == "fp32" else "fp16")

    def add_rest(self, model: nn.Module, kind: str) -> None:
        """Everything outside the packed layers, and further names; what has several, once."""
        packed = set()
        for first, *others in names_of(model, PackedLayer).values():  # type: ignore[type-abstract]
            packed |= {first, *others}
            self.tied |= dict.fromkeys(others, first)
        first_names: dict[int, str] = {}
        state: dict[str, Any] = model.state_dict(keep_vars=True)
        for name, value in state.items():
            if _is_below(name, packed):
                continue
            if not isinstance(value, Tensor):
                raise UsageError(f"{name} is a {type(value).__name__}, a packed file holds tensors")
            first = first_names.setdefault(id(value), name)
            if first != name:
                self.tied[name] = first
            else:
                # A buffer may hold infinities on purpose, such as an attention mask.
                is_buffer = not isinstance(value, nn.Parameter)
                self.add(name, value, kind, may_be_infinite=is_buffer)

    def add(self, name: str, value: Tensor, kind: str, *, may_be_infinite: bool = False) -> None:
        problem = problem_of(value, may_be_infinite)
        if problem:
            raise UsageError(f"{name} {problem}; such a model cannot be exported")
        self._note(name, value.dtype)
        new = stored(name, value.detach(), kind)
        if new.keys() & self.tensors.keys():
            raise UsageError(f"two tensors of the model would be stored as {', '.join(new)}")
        self.tensors |= new

    def _note(self, name: str, dtype: torch.dtype) -> None:
        if dtype.is_floating_point and dtype != torch.float32:
            self.dtypes[name] = str(dtype).removeprefix("torch.")


def _is_below(name: str, layers: Collection[str]) -> bool:
    """Whether a tensor belongs to one of the layers, or to a module in one of its slots."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return True
    return False


def facts_of(name: str, layer: PackedLayer, plan: Plan) -> Facts:
    """What a file says of a layer.

    Raises:
        UsageError: the plan is not the one that the layer was made with.
    """
    shape = (layer.out_features, layer.in_features)
    is_uniform = isinstance(layer, PackedUniform)
    if is_uniform or layer.other_slots():
        bits = layer.bits if isinstance(layer, PackedUniform) else None
        return RuledFacts(
            shape=shape,
            rule=_rule_of(name, layer, plan),
            weight_bits=bits,
            activation_bits=layer.activation_bits,
        )
    known = {method.method for method in plan.methods() if method.slot == "activation"}
    if layer.activation_bits is not None and layer.activation_method not in known:
        raise UsageError(
            f"layer {name!r} quantizes activations by {layer.activation_method!r}, plan "
            f"{plan.name!r} by {', '.join(map(repr, sorted(known))) or 'nothing'}; pass the "
            "plan that the model was made with"
        )
    return LayerFacts(
        shape=shape,
        activation_quantizer=layer.activation_method,
        activation_bits=layer.activation_bits,
        rotated=layer.rotated,
    )


def _rule_of(name: str, layer: PackedLayer, plan: Plan) -> str:
    """The rule whose methods the layer has, bits of weights apart, which may be allocated."""

    def text(methods: Mapping[str, Method]) -> dict[str, Any]:
        found = {slot: method.model_dump() for slot, method in methods.items()}
        found.get("weight", {}).pop("bits", None)
        return found

    own = text(layer.methods)
    for rule in plan.layers:
        if text(rule.slots()) == own:
            return rule.name
    chosen = ", ".join(f"{slot} {method.method!r}" for slot, method in layer.methods.items())
    raise UsageError(
        f"no rule of plan {plan.name!r} makes a layer like {name!r} ({chosen}, with its "
        "parameters); pass the plan that the model was made with"
    )
