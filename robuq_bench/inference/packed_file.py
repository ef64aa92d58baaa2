"""A quantized model as one self-describing safetensors file.

Tensors of a packed layer `name`: `name.codes` (base 3: uint8 [ceil(out * in / 5)]; 2 bit: the
kernels' planes), `name.scale`, and where it has them `name.bias`, `name.low_rank_up`,
`name.low_rank_down`, `name.signs` (one bit each). Everything else keeps its name in the model; what
has several names is stored under the first. A matrix stored in int8 has its scales beside it as
`<tensor>.int8_scale`. The metadata (`packed_header`) holds the model's and the plan's
configuration, the bits of every layer, further names and dtypes, and a SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.config import Plan
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.inference import codecs
from robuq_bench.inference.fused_blocks import FusedBlocks
from robuq_bench.inference.packed_header import (
    DEFAULT_STORAGE,
    Header,
    LayerFacts,
    Storage,
    check_format,
)
from robuq_bench.inference.packed_linear import PackedLinear, packed_layers
from robuq_bench.inference.packed_restore import (
    OPTIONAL_PARTS,
    new_model,
    replacements_of,
    rest_of,
    restored_layer,
)
from robuq_bench.inference.stored_tensors import INT8_SCALE, problem_of, stored
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import layer_type
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, names_of
from robuq_bench.runs.checkpoints import read_safetensors, save_tensors


def export_packed(
    model: nn.Module,
    path: Path,
    *,
    plan: Plan,
    model_config: ModelConfig | None = None,
    storage: str = DEFAULT_STORAGE,
    source: str = "",
) -> list[dict[str, Any]]:
    """Write a packed model (see `pack_`) to `path`, atomically.

    Args:
        model: with `PackedLinear`s, on any device, of any floating-point dtypes.
        path: the file, replaced if it exists; a `.sha256` sidecar is written beside it for
            `sha256sum -c`.
        plan: how it was quantized.
        model_config: of our DiT, so that `load_packed` can build it; None for another model.
        storage: CODES/LOW_RANK/REST; CODES is base3 (1.6 bits) or 2bit, the others fp32, fp16 or
            int8. With fp32 twice a loaded model equals this one bit for bit.
        source: where the weights are from, kept in the metadata.

    Returns:
        `size_table(path)`: every byte of the file by what it holds.

    Raises:
        UsageError: unknown storage, no packed layer, one that is not packed yet or of another
            activation quantizer than the plan's, fused blocks, or a value that cannot be stored:
            not finite, of an unknown dtype, or beyond fp16.
            Nothing was written.
        RobuqError: the file cannot be written.
    """
    path, chosen = Path(path), Storage.parse(storage)
    layers = packed_layers(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no packed layers; call pack_ first")
    for names in names_of(model, QuantizedLinear).values():
        raise UsageError(f"layer {names[0]!r} is quantized but not packed; call pack_ first")
    if any(isinstance(module, FusedBlocks) for module in model.modules()):
        raise UsageError("the blocks are fused; export the model before prepare_for_inference")
    content = _Content()
    for name, layer in layers.items():
        known = {method.method for method in plan.methods() if method.slot == "activation"}
        if layer.activation_bits is not None and layer.activation_method not in known:
            raise UsageError(
                f"layer {name!r} quantizes activations by {layer.activation_method!r}, plan "
                f"{plan.name!r} by {', '.join(map(repr, sorted(known))) or 'nothing'}; pass the "
                "plan that the model was made with"
            )
        content.add_layer(name, layer, chosen)
    for names in names_of(model, PackedLinear).values():
        content.tied |= dict.fromkeys(names[1:], names[0])
    _add_rest(model, content, chosen.rest)
    header = Header(
        storage=chosen,
        source=source,
        plan=plan,
        model=model_config,
        layers={
            name: LayerFacts(
                shape=(layer.out_features, layer.in_features),
                activation_quantizer=layer.activation_method,
                activation_bits=layer.activation_bits,
                rotated=layer.rotated,
            )
            for name, layer in layers.items()
        },
        parameters=_parameters(model),
        tied=content.tied,
        dtypes=content.dtypes,
    )
    metadata = header.metadata()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})
    return size_table(path)


@dataclass
class _Content:
    """Tensors on their way into a file, their further names, and dtypes other than float32."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def add_layer(self, name: str, layer: PackedLinear, storage: Storage) -> None:
        codes = layer.planes
        if storage.codes == "base3":
            codes = codecs.encode_base3(layer.codes().cpu())
        self.tensors[f"{name}.codes"] = codes
        self._note(f"{name}.codes", layer.like.dtype)
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
    holder = name.rpartition(".")[0]
    return holder in layers or holder.rpartition(".")[0] in layers


def _add_rest(model: nn.Module, content: _Content, kind: str) -> None:
    """Everything outside the packed layers; a tensor under several names once."""
    packed = {name for names in names_of(model, PackedLinear).values() for name in names}
    first_names: dict[int, str] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if _is_below(name, packed):
            continue
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is a {type(value).__name__}, a packed file holds tensors")
        first = first_names.setdefault(id(value), name)
        if first != name:
            content.tied[name] = first
        else:
            # A buffer may hold infinities on purpose, such as an attention mask.
            is_buffer = not isinstance(value, nn.Parameter)
            content.add(name, value, kind, may_be_infinite=is_buffer)


def _parameters(model: nn.Module) -> int:
    """Parameters of the model before packing: codes count, scales and low-rank factors do not."""
    packed = packed_layers(model).values()
    total = sum(layer.out_features * layer.in_features for layer in packed)
    added = {id(p) for layer in packed for p in (layer.low_rank_up, layer.low_rank_down)}
    return total + sum(p.numel() for p in model.parameters() if id(p) not in added)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata and tensors, so that one file alone shows whether it is whole."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], Header]:
    tensors, metadata = read_safetensors(path)
    check_format(path, metadata)
    expected = metadata.pop("sha256", "")
    if _digest(tensors, metadata) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256")
    return tensors, Header.parse(path, metadata)


def load_packed(path: Path, into: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Restore a packed model on the CPU in eval mode, in its own dtypes, on backend "reference".

    Args:
        path: a file of `export_packed`.
        into: an instance of the model with unquantized `nn.Linear`s of the same shapes, which share
            and tie what the exported model did, changed in place; needed for models that are not
            our DiT, whose file says how to build it. Hooks of its layers are kept. Where all that
            was exported has one dtype, buffers outside the state are cast to it, too.

    Returns:
        The model (`into`, or what replaces it when it is itself a layer) and, by name, its `plan`,
        `bits_by_layer` {layer: bits}, `storage` and `source`.

    Raises:
        CheckpointError: missing, truncated, changed, of another kind, or it does not fit `into`,
            which is then unchanged.
        UsageError: the file says of no model to build, and there is no `into`.
    """
    path = Path(path)
    tensors, header = _read(path)
    if into is None and header.model is None:
        raise UsageError(
            f"{path} holds a model that this suite cannot build; pass an instance as into="
        )
    try:
        model = new_model(header, len(tensors)) if into is None else into
        layers = {name: restored_layer(name, header, tensors) for name in header.layers}
        replacements = replacements_of(model, header, layers)
        rest = rest_of(model, header, tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit its model: {error}") from error
    dtypes = {value.dtype for value in rest.values() if value.is_floating_point()}
    dtypes |= {layer.like.dtype for layer in layers.values()}
    if into is not None and len(dtypes) == 1:
        model = model.to(dtypes.pop())
    model = exchange_layers(model, replacements)
    model.load_state_dict(rest, strict=False, assign=True)
    if header.plan.attention.matmul_bits is not None:
        for module in model.modules():
            if hasattr(module, "matmul_quantizer"):
                quantizer: Any = matmul_quantizer(header.plan.attention.matmul_bits)
                module.matmul_quantizer = quantizer
    return model.eval(), {
        "plan": header.plan,
        "bits_by_layer": {name: facts.activation_bits for name, facts in header.layers.items()},
        "storage": str(header.storage),
        "source": header.source,
    }


def describe(path: Path) -> dict[str, Any]:
    """Plan, source, storage, layers and mean activation bits by layer type of a packed file.

    Raises:
        CheckpointError: as `load_packed`.
    """
    _, header = _read(Path(path))
    kinds: dict[str, list[int]] = {}
    for name, facts in header.layers.items():
        if facts.activation_bits is not None:
            kinds.setdefault(layer_type(name), []).append(facts.activation_bits)
    return {
        "plan": header.plan.name,
        "source": header.source,
        "storage": str(header.storage),
        "packed_layers": len(header.layers),
        "mean_activation_bits": {kind: sum(bits) / len(bits) for kind, bits in kinds.items()},
    }


def size_table(path: Path) -> list[dict[str, Any]]:
    """Every byte of a packed file by what it holds, and the reduction against FP32.

    Rows: ternary codes, scales, low-rank branch, signs, biases of packed layers, everything else,
    the file's header, and the total, whose `size_reduction` is 4 bytes times the parameters of
    the model before packing, divided by the size of the file.

    Raises:
        CheckpointError: as `load_packed`.
    """
    path = Path(path)
    tensors, header = _read(path)
    parts = dict.fromkeys(
        ("ternary codes", "scales", "low-rank branch", "signs", "biases of packed layers", "rest"),
        0,
    )
    kinds = {
        "codes": "ternary codes",
        "scale": "scales",
        "signs": "signs",
        "bias": "biases of packed layers",
        "low_rank_up": "low-rank branch",
        "low_rank_down": "low-rank branch",
    }
    for name, tensor in tensors.items():
        layer, _, kind = name.removesuffix(INT8_SCALE).rpartition(".")
        part = kinds.get(kind, "rest") if layer in header.layers else "rest"
        parts[part] += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    parts["header (names, configuration)"] = size - sum(parts.values())
    full_precision = 4 * header.parameters
    rows: list[dict[str, Any]] = [
        {"part": part, "bytes": count, "percent": 100 * count / size}
        for part, count in parts.items()
    ]
    rows.append({"part": "total", "bytes": size, "percent": 100.0})
    rows[-1]["fp32_bytes"] = full_precision
    rows[-1]["size_reduction"] = full_precision / size
    return rows
