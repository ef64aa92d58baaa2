"""A quantized model as one self-describing safetensors file.

Tensors of a packed layer `name`: `name.codes` (ternary in base 3: uint8 [ceil(out * in / 5)], or
in 2 bits: the kernels' planes; codes of b bits: `codecs.encode_bits`), `name.scale`, and where it
has them `name.zero`, `name.bias`, `name.low_rank_up`, `name.low_rank_down`, `name.signs` (one bit
each), and `name.SLOT.TENSOR` for what else is in its slots. Everything else keeps its name in the
model; what has several names is stored under the first. A matrix stored in int8 has its scales
beside it as `<tensor>.int8_scale`. The metadata (`packed_header`) holds the model's and the plan's
configuration, the bits of every layer, further names and dtypes, and a SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.checkpointing import read_safetensors, save_tensors
from robuq_bench.config import Plan
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.inference.fused_blocks import FusedBlocks
from robuq_bench.inference.packed_content import Content, facts_of
from robuq_bench.inference.packed_header import (
    DEFAULT_STORAGE,
    Header,
    RuledFacts,
    Storage,
    check_format,
)
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.inference.packed_restore import (
    new_model,
    replacements_of,
    rest_of,
    restored_layer,
)
from robuq_bench.inference.stored_tensors import INT8_SCALE
from robuq_bench.methods.weights._ternary import TERNARY_BITS
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import layer_type
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, names_of


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
        model: with packed layers, on any device, of any floating-point dtypes.
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
        UsageError: unknown storage, no packed layer, one that is not packed yet or of other
            methods than the plan's, fused blocks, or a value that cannot be stored: not finite, of
            an unknown dtype, or beyond fp16.
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
    content = Content()
    facts = {name: facts_of(name, layer, plan) for name, layer in layers.items()}
    for name, layer in layers.items():
        content.add_layer(name, layer, chosen)
    content.add_rest(model, chosen.rest)
    header = Header(
        storage=chosen,
        source=source,
        plan=plan,
        model=model_config,
        layers=facts,
        parameters=_parameters(model),
        tied=content.tied,
        dtypes=content.dtypes,
    )
    metadata = header.metadata()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})
    return size_table(path)


def _parameters(model: nn.Module) -> int:
    """Parameters of the model before packing: codes count, scales and low-rank factors do not."""
    packed = packed_layers(model).values()
    total = sum(layer.out_features * layer.in_features for layer in packed)
    slots = [module for layer in packed for module in layer.slots().values()]
    added = {id(p) for module in slots for p in module.parameters()}
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
        rest = rest_of(model, header, tensors, layers)
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
    """Plan, source, storage, layers and mean bits by layer type (codes alone) of a packed file.

    Raises:
        CheckpointError: as `load_packed`.
    """
    _, header = _read(Path(path))
    weights: dict[str, list[float]] = {}
    activations: dict[str, list[float]] = {}
    for name, facts in header.layers.items():
        weights.setdefault(layer_type(name), []).append(facts.weight_bits or TERNARY_BITS)
        if facts.activation_bits is not None:
            activations.setdefault(layer_type(name), []).append(facts.activation_bits)
    return {
        "plan": header.plan.name,
        "source": header.source,
        "storage": str(header.storage),
        "packed_layers": len(header.layers),
        "mean_weight_bits": {kind: round(fmean(bits), 3) for kind, bits in weights.items()},
        "mean_activation_bits": {kind: fmean(bits) for kind, bits in activations.items()},
    }


def size_table(path: Path) -> list[dict[str, Any]]:
    """Every byte of a packed file by what it holds, and the reduction against FP32.

    Rows: ternary codes, scales, low-rank branch, signs, biases of packed layers, everything else;
    where there are any, uniform codes (2 to 8 bits), zero points, and other slots (values of
    scalings, static activation quantizers and other rotations); the file's header, and the total,
    whose `size_reduction` is 4 bytes times the parameters of the model before packing, divided by
    the size of the file.

    Raises:
        CheckpointError: as `load_packed`.
    """
    path = Path(path)
    tensors, header = _read(path)
    parts = dict.fromkeys(_ROWS, 0)
    for name, tensor in tensors.items():
        parts[_part_of(name, header)] += tensor.numel() * tensor.element_size()
    parts = {part: count for part, count in parts.items() if count or part not in _OPTIONAL_ROWS}
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


_ROWS = (
    "ternary codes",
    "uniform codes",
    "scales",
    "zero points",
    "low-rank branch",
    "signs",
    "other slots",
    "biases of packed layers",
    "rest",
)
_OPTIONAL_ROWS = ("uniform codes", "zero points", "other slots")
_PARTS = {
    "scale": "scales",
    "zero": "zero points",
    "signs": "signs",
    "bias": "biases of packed layers",
    "low_rank_up": "low-rank branch",
    "low_rank_down": "low-rank branch",
}


def _part_of(name: str, header: Header) -> str:
    """What a stored tensor is, in the words of `size_table`."""
    layer, _, kind = name.removesuffix(INT8_SCALE).rpartition(".")
    facts = header.layers.get(layer)
    if facts is not None:
        if kind == "codes":
            return "ternary codes" if facts.weight_bits is None else "uniform codes"
        return _PARTS.get(kind, "rest")
    above = [layer]
    while above[-1]:
        above.append(above[-1].rpartition(".")[0])
    return (
        "other slots"
        if any(isinstance(header.layers.get(n), RuledFacts) for n in above)
        else "rest"
    )
