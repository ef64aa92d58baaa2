"""From the tensors of a packed file to a model, checked before the model is touched.

Every function raises ValueError where file and model do not fit; none changes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.ternary_matmul.layout import unpack_planes
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.transform import hadamard_factors
from robuq_bench.inference import codecs
from robuq_bench.inference.packed_header import Header
from robuq_bench.inference.packed_linear import PackedLinear
from robuq_bench.inference.stored_tensors import (
    FLOATS,
    INT8_SCALE,
    is_int8,
    problem_of,
    restored,
)
from robuq_bench.models.checkpoints import WRAPPERS
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.module_tree import names_of

OPTIONAL_PARTS = ("bias", "low_rank_up", "low_rank_down")
"""Floats of a packed layer beside its scale."""


def new_model(header: Header, tensors: int) -> nn.Module:
    """Our DiT of the header's shapes, on the meta device; the file has so many tensors."""
    config: Any = header.model
    if config.depth > tensors:  # before so many blocks are built
        raise ValueError(f"model.depth is {config.depth}, but there are {tensors} tensors")
    try:
        with torch.device("meta"):
            return DiT.from_config(config)
    except (RuntimeError, TypeError, OverflowError, UsageError) as error:
        raise ValueError("its model section describes no DiT") from error


def restored_layer(name: str, header: Header, tensors: Mapping[str, Tensor]) -> PackedLinear:
    """The packed layer `name`."""
    facts = header.layers[name]
    out_features, in_features = facts.shape
    if facts.rotated:
        try:
            hadamard_factors(in_features)
        except UsageError as error:
            raise ValueError(f"{name}: {error}") from None
    stored = tensors.get(f"{name}.codes")
    if stored is None:
        raise ValueError(f"tensor '{name}.codes' is missing")
    if header.storage.codes == "base3":
        codes = codecs.decode_base3(stored, (out_features, in_features))
    else:
        codes = unpack_planes(stored, in_features)
    if tuple(codes.shape) != (out_features, in_features):
        raise ValueError(f"{name}.codes hold {list(codes.shape)}, not {list(facts.shape)}")
    scale = restored(f"{name}.scale", tensors, header.dtypes)
    parts = {
        part: restored(f"{name}.{part}", tensors, header.dtypes)
        for part in OPTIONAL_PARTS
        if f"{name}.{part}" in tensors
    }
    for part, value in {"scale": scale, **parts}.items():
        problem = problem_of(value) if value.is_floating_point() else f"is {value.dtype}"
        if problem:
            raise ValueError(f"{name}.{part} {problem}")
    signs = tensors.get(f"{name}.signs")
    up, down = parts.get("low_rank_up"), parts.get("low_rank_down")
    if (up is None) != (down is None) or (signs is not None and not facts.rotated):
        raise ValueError(f"{name} has half a low-rank branch, or signs without a rotation")
    dtype = FLOATS[header.dtypes.get(f"{name}.codes", "float32")]
    return PackedLinear(
        codes,
        scale,
        parts.get("bias"),
        name=name,
        activation_quantizer=facts.activation_quantizer,
        activation_bits=facts.activation_bits,
        rotated=facts.rotated,
        signs=None if signs is None else codecs.decode_signs(signs, in_features).to(dtype),
        low_rank=None if up is None or down is None else (up, down),
        dtype=dtype,
    )


def _bare(name: str) -> str:
    """A name without what torch's wrappers (DDP, torch.compile) put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def replacements_of(
    model: nn.Module, header: Header, layers: Mapping[str, PackedLinear]
) -> dict[nn.Module, nn.Module]:
    """The linear layer of `model` that each packed one replaces; ValueError when none fits."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names_there = names_of(model, nn.Module)
    found: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if name not in modules:
            bare = [each for each in modules if each and _bare(each) == _bare(name)]
            hint = f"; a wrapper calls it {bare[0]!r} there: pass the module inside" if bare else ""
            raise ValueError(f"it has no layer {name!r}{hint}")
        linear = modules[name]
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name!r} is a {type(linear).__name__} there, not an nn.Linear")
        names = {name, *(other for other, first in header.tied.items() if first == name)}
        if names != set(names_there[linear]):
            raise ValueError(
                f"{sorted(names)} are one layer in the file, {sorted(names_there[linear])} there"
            )
        shapes = [
            f"{part.out_features} x {part.in_features} {'without' if part.bias is None else 'with'}"
            for part in (linear, layer)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name!r} is {shapes[0]} bias there, {shapes[1]} in the file")
        found[linear] = layer
    return found


def rest_of(model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of everything outside the packed layers, in the form `model` takes it."""
    parts = ("codes", "signs", "scale", *OPTIONAL_PARTS)
    elsewhere = {f"{name}.{part}" for name in header.layers for part in parts}
    elsewhere |= {f"{name}{INT8_SCALE}" for name in tensors if is_int8(name, tensors)}
    rest = {n: restored(n, tensors, header.dtypes) for n in tensors if n not in elsewhere}
    layers = header.layers.keys() | {
        o for o, first in header.tied.items() if first in header.layers
    }
    tied = {name: first for name, first in header.tied.items() if first not in header.layers}
    state: dict[str, Any] = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in layers
    }
    unknown = sorted((header.dtypes.keys() - tensors.keys()) | (tied.keys() & rest.keys()))
    if unknown:
        raise ValueError(f"its dtypes or tied names say too much of {unknown[0]!r}")
    stored = rest.keys() | tied.keys()
    missing, unexpected = sorted(state.keys() - stored), sorted(stored - state.keys())
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    first_names: dict[int, str] = {}
    for name, value in state.items():
        first = first_names.setdefault(id(value), name)
        if tied.get(name, name) == first:
            continue
        # Format 1 stored tied tensors once a name.
        twice = name not in tied and name in rest and first in rest
        if not twice or not torch.equal(rest[name], rest[first]):
            raise ValueError(f"{name!r} and {first!r} are one tensor there or in the file only")
        tied[name] = first
        del rest[name]
    for name, value in rest.items():
        expected = state[name]
        is_parameter = isinstance(expected, nn.Parameter)
        if value.shape != expected.shape:
            raise ValueError(f"{name} is {list(value.shape)}, not {list(expected.shape)}")
        same_kind = value.is_floating_point() == expected.is_floating_point()
        if not same_kind or (value.dtype != expected.dtype and not value.is_floating_point()):
            raise ValueError(f"{name} is {value.dtype}, not {expected.dtype}")
        problem = problem_of(value, may_be_infinite=not is_parameter)
        if problem:
            raise ValueError(f"{name} {problem}")
        if is_parameter:  # one object, so that its further names stay tied to it
            rest[name] = nn.Parameter(value, requires_grad=expected.requires_grad)
    return rest | {name: rest[first] for name, first in tied.items()}
