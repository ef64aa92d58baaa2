"""A quantized model as one self-describing safetensors file.

Tensors of a packed layer `name`: `name.codes` (base 3: uint8 [ceil(out * in / 5)]; 2 bit: the
kernels' planes), `name.scale`, and where it has them `name.bias`, `name.low_rank_up`,
`name.low_rank_down`, `name.signs` (one bit each). Everything else keeps its name in the model. A
matrix stored in int8 has its scales beside it as `<tensor>.int8_scale`. The metadata holds the
model's and the plan's configuration, the bits of every layer, and a SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.ternary_matmul.layout import unpack_planes
from robuq_bench.checkpointing import read_safetensors, save_tensors
from robuq_bench.config import Plan
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, UsageError, suggest
from robuq_bench.inference import codecs
from robuq_bench.inference.packed_linear import PackedLinear, packed_layers, replace_module
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.activations import matmul_quantizer
from robuq_bench.quantization.convert import layer_type

FORMAT = "robuq-bench packed model"
FORMAT_VERSION = "1"
CODE_STORAGE = ("base3", "2bit")
FLOAT_STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
DEFAULT_STORAGE = "base3/fp32/fp32"
_INT8_SCALE = ".int8_scale"
_OPTIONAL = ("bias", "low_rank_up", "low_rank_down")


@dataclass(frozen=True)
class Storage:
    """How a file stores codes, low-rank factors, and the rest (scales, biases, other layers).

    "int8" is meant for matrices; vectors beside them are fp16.
    """

    codes: str
    low_rank: str
    rest: str

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Read "base3/fp16/fp16"; UsageError for anything else."""
        parts = text.split("/")
        if len(parts) != 3:
            raise UsageError(
                f"storage {text!r} is not CODES/LOW_RANK/REST, such as {DEFAULT_STORAGE!r}"
            )
        for part, known in zip(parts, (CODE_STORAGE, FLOAT_STORAGE, FLOAT_STORAGE), strict=True):
            if part not in known:
                raise UsageError(f"storage {text!r}: unknown {part!r}{suggest(part, known)}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.codes}/{self.low_rank}/{self.rest}"

    @property
    def is_lossless(self) -> bool:
        """Whether a loaded model equals the exported one bit for bit."""
        return self.low_rank == self.rest == "fp32"


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
        model: with `PackedLinear`s, on any device, float32.
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
        UsageError: unknown storage, no packed layer, or a value that fp16 cannot hold.
        RobuqError: the file cannot be written.
    """
    path, chosen = Path(path), Storage.parse(storage)
    layers = packed_layers(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no packed layers; call pack_ first")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= _layer_tensors(name, layer, chosen)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            tensors |= _stored(name, tensor, chosen.rest)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "storage": str(chosen),
        "source": source,
        "plan": plan.model_dump_json(),
        "model": "" if model_config is None else model_config.model_dump_json(),
        "layers": json.dumps(
            {
                name: {
                    "shape": [layer.out_features, layer.in_features],
                    "activation_quantizer": layer.activation_quantizer,
                    "activation_bits": layer.activation_bits,
                    "rotated": layer.rotated,
                }
                for name, layer in layers.items()
            }
        ),
        "parameters": str(_parameters(model)),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})
    return size_table(path)


def _layer_tensors(name: str, layer: PackedLinear, storage: Storage) -> dict[str, Tensor]:
    codes = codecs.encode_base3(layer.codes().cpu()) if storage.codes == "base3" else layer.planes
    found = {f"{name}.codes": codes}
    # A per-tensor scale is kept once.
    first = layer.scale[:1]
    scale = first if bool((layer.scale == first).all()) else layer.scale
    found |= _stored(f"{name}.scale", scale, storage.rest)
    if layer.signs is not None:
        found[f"{name}.signs"] = codecs.encode_signs(layer.signs.cpu())
    for part in _OPTIONAL:
        value = getattr(layer, part)
        if value is not None:
            kind = storage.rest if part == "bias" else storage.low_rank
            found |= _stored(f"{name}.{part}", value, kind)
    return found


def _stored(name: str, value: Tensor, kind: str) -> dict[str, Tensor]:
    if not value.is_floating_point():
        return {name: value}
    if kind == "fp32":
        return {name: value.float()}
    if kind == "int8" and value.dim() >= 2:
        codes, scale = codecs.encode_int8(_as_matrix(value))
        return {name: codes.view(value.shape), f"{name}{_INT8_SCALE}": scale}
    half = value.half()
    if not bool(torch.isfinite(half).all()):
        raise UsageError(
            f"{name} has a value beyond fp16 (largest {float(value.abs().max()):g}); "
            "store this model with fp32"
        )
    return {name: half}


def _restored(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    value = tensors[name]
    if value.dtype != torch.int8:
        return value.float() if value.is_floating_point() else value
    scale = tensors[f"{name}{_INT8_SCALE}"]
    return codecs.decode_int8(_as_matrix(value), scale).view(value.shape)


def _as_matrix(value: Tensor) -> Tensor:
    """A table [1, T, C] by rows; a convolution [out, in, p, p] as [out, in p p]."""
    return value.flatten(0, -2) if value.dim() == 3 else value.flatten(1)


def _parameters(model: nn.Module) -> int:
    """Parameters of the model before packing: codes count, scales and low-rank factors do not."""
    packed = packed_layers(model)
    total = sum(layer.out_features * layer.in_features for layer in packed.values())
    total += sum(0 if layer.bias is None else layer.bias.numel() for layer in packed.values())
    return total + sum(parameter.numel() for parameter in model.parameters())


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata and tensors, so that one file alone shows whether it is whole."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no packed model; make one with `python bench.py export RUN -o FILE`"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}; export it again"
        )
    expected = metadata.pop("sha256", "")
    if _digest(tensors, metadata) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256")
    return tensors, metadata


def load_packed(path: Path, into: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Restore a packed model on the CPU in eval mode, float32, with backend "reference".

    Args:
        path: a file of `export_packed`.
        into: an instance of the model with unquantized `nn.Linear`s of the same shapes, changed
            in place; needed for models that are not our DiT, whose file says how to build it.

    Returns:
        The model and, by name, its `plan`, `bits_by_layer` {layer: bits}, `storage` and `source`.

    Raises:
        CheckpointError: missing, truncated, changed, of another kind, or it does not fit `into`.
    """
    tensors, metadata = _read(path)
    plan = Plan.model_validate_json(metadata["plan"])
    if into is None:
        if not metadata["model"]:
            raise UsageError(
                f"{path} holds a model that this suite cannot build; pass an instance as into="
            )
        with torch.device("meta"):
            into = DiT.from_config(ModelConfig.model_validate_json(metadata["model"]))
    storage = Storage.parse(metadata["storage"])
    layers: dict[str, dict[str, Any]] = json.loads(metadata["layers"])
    try:
        for name, facts in layers.items():
            layer = _restored_layer(name, facts, tensors, storage)
            _check_fits(into, name, layer)
            replace_module(into, name, layer)
        rest = {
            name: _restored(name, tensors)
            for name in tensors
            if not name.endswith(_INT8_SCALE) and name.rpartition(".")[0] not in layers
        }
        missing, unexpected = into.load_state_dict(rest, strict=False, assign=True)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit its model: {error}") from error
    missing = [name for name in missing if name.rpartition(".")[0] not in layers]
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit its model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    if plan.attention.matmul_bits is not None:
        for module in into.modules():
            if hasattr(module, "matmul_quantizer"):
                module.matmul_quantizer = matmul_quantizer(plan.attention.matmul_bits)  # type: ignore[assignment]
    bits = {name: facts["activation_bits"] for name, facts in layers.items()}
    facts = {"plan": plan, "bits_by_layer": bits} | {
        key: metadata[key] for key in ("storage", "source")
    }
    return into.eval(), facts


def _check_fits(model: nn.Module, name: str, layer: PackedLinear) -> None:
    """ValueError unless `model` has an unquantized linear layer of this shape under `name`."""
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name!r} is a {type(linear).__name__} there, not an nn.Linear")
    found = (linear.out_features, linear.in_features, linear.bias is not None)
    if found != (layer.out_features, layer.in_features, layer.bias is not None):
        raise ValueError(
            f"{name!r} is {found[0]} x {found[1]} {'with' if found[2] else 'without'} bias there, "
            f"{layer.out_features} x {layer.in_features} "
            f"{'with' if layer.bias is not None else 'without'} in the file"
        )


def _restored_layer(
    name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], storage: Storage
) -> PackedLinear:
    out_features, in_features = facts["shape"]
    stored = tensors[f"{name}.codes"]
    if storage.codes == "base3":
        codes = codecs.decode_base3(stored, (out_features, in_features))
    else:
        codes = unpack_planes(stored, in_features)
    if tuple(codes.shape) != (out_features, in_features):
        raise ValueError(f"{name}.codes hold {list(codes.shape)}, not {facts['shape']}")
    parts = {
        part: _restored(f"{name}.{part}", tensors) if f"{name}.{part}" in tensors else None
        for part in _OPTIONAL
    }
    signs = tensors.get(f"{name}.signs")
    up, down = parts["low_rank_up"], parts["low_rank_down"]
    return PackedLinear(
        codes,
        _restored(f"{name}.scale", tensors),
        parts["bias"],
        name=name,
        activation_quantizer=facts["activation_quantizer"],
        activation_bits=facts["activation_bits"],
        rotated=facts["rotated"],
        signs=None if signs is None else codecs.decode_signs(signs, in_features),
        low_rank=None if up is None or down is None else (up, down),
    )


def describe(path: Path) -> dict[str, Any]:
    """Plan, source, storage, layers and mean activation bits by layer type of a packed file.

    Raises:
        CheckpointError: as `load_packed`.
    """
    _, metadata = _read(Path(path))
    layers = json.loads(metadata["layers"])
    kinds: dict[str, list[int]] = {}
    for name, facts in layers.items():
        if facts["activation_bits"] is not None:
            kinds.setdefault(layer_type(name), []).append(facts["activation_bits"])
    return {
        "plan": Plan.model_validate_json(metadata["plan"]).name,
        "source": metadata["source"],
        "storage": metadata["storage"],
        "packed_layers": len(layers),
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
    tensors, metadata = _read(path)
    layers = json.loads(metadata["layers"])
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
        layer, _, kind = name.removesuffix(_INT8_SCALE).rpartition(".")
        part = kinds[kind] if layer in layers else "rest"
        parts[part] += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    parts["header (names, configuration)"] = size - sum(parts.values())
    full_precision = 4 * int(metadata["parameters"])
    rows: list[dict[str, Any]] = [
        {"part": part, "bytes": count, "percent": 100 * count / size}
        for part, count in parts.items()
    ]
    rows.append({"part": "total", "bytes": size, "percent": 100.0})
    rows[-1]["fp32_bytes"] = full_precision
    rows[-1]["size_reduction"] = full_precision / size
    return rows
