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
from robuq_bench.inference.packed_header import Facts, Header, LayerFacts, RuledFacts, Storage
from robuq_bench.inference.packed_layer import PackedLayer, Rest
from robuq_bench.inference.packed_linear import PackedLinear
from robuq_bench.inference.packed_uniform import PackedUniform
from robuq_bench.inference.stored_tensors import (
    FLOATS,
    INT8_SCALE,
    holds_signs,
    is_int8,
    problem_of,
    restored,
)
from robuq_bench.methods import Method
from robuq_bench.methods.activations._token_grid import GridMethod, GridQuantizer, token_grid
from robuq_bench.methods.base import SCALE_BITS
from robuq_bench.methods.branches.svd import SVD, LowRankBranch
from robuq_bench.methods.rotations._hadamard import HadamardMethod, HadamardRotation
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._codes import Codes
from robuq_bench.models.checkpoints import WRAPPERS
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.module_tree import names_of

OPTIONAL_PARTS = ("bias", "low_rank_up", "low_rank_down")
"""Floats of a packed layer beside its scale and zero points."""


def new_model(header: Header, tensors: int) -> nn.Module:
    """Our DiT of the header's shapes, on the meta device; the file has so many tensors."""
    config: Any = header.model
    if config.depth > tensors:  # before so many blocks are built
        raise ValueError(f"model.depth is {config.depth}, but there are {tensors} tensors")
    try:
        return DiT.without_values(config)
    except (RuntimeError, TypeError, OverflowError, UsageError) as error:
        raise ValueError("its model section describes no DiT") from error


def restored_layer(name: str, header: Header, tensors: Mapping[str, Tensor]) -> PackedLayer:
    """The packed layer `name`."""
    facts = header.layers[name]
    methods: dict[str, Method] = {}
    if isinstance(facts, RuledFacts):
        methods = facts.methods(header.plan)
    stored = tensors.get(f"{name}.codes")
    if stored is None:
        raise ValueError(f"tensor '{name}.codes' is missing")
    is_uniform = facts.weight_bits is not None
    floats = {
        part: restored(f"{name}.{part}", tensors, header.dtypes)
        for part in ("scale", *OPTIONAL_PARTS, *(("zero",) if is_uniform else ()))
        if part == "scale" or f"{name}.{part}" in tensors
    }
    for part, value in floats.items():
        problem = problem_of(value) if value.is_floating_point() else f"is {value.dtype}"
        if problem:
            raise ValueError(f"{name}.{part} {problem}")
    dtype = FLOATS[header.dtypes.get(f"{name}.codes", "float32")]
    # The codes first: what follows takes memory and time that a forged shape decides.
    codes = _codes(name, facts, header.storage, stored)
    try:
        for method in methods.values():
            method.check(*facts.shape)
        slots = _known_slots(name, facts, methods, tensors, floats, dtype)
        for slot, method in methods.items():
            if slot != "weight" and slot not in slots:
                slots[slot] = _other_slot(name, facts.shape, slot, method, header, tensors)
        rest: Rest = {
            "name": name,
            "slots": slots,
            "methods": methods,
            "activation_bits": facts.activation_bits,
            "dtype": dtype,
        }
        bias = floats.get("bias")
        if facts.weight_bits is None:
            return PackedLinear(codes, floats["scale"], bias, **rest)
        weight = _uniform(name, codes, facts.weight_bits, methods["weight"], floats)
        return PackedUniform(weight, facts.weight_bits, bias, **rest)
    except UsageError as error:  # of a method: it does not serve the shape, or not these bits
        raise ValueError(f"{name}: {error}") from None


def _codes(name: str, facts: Facts, storage: Storage, stored: Tensor) -> Tensor:
    """Codes int8 [out, in], as many as the bytes hold."""
    if facts.weight_bits is not None:
        try:
            return codecs.decode_bits(stored, facts.weight_bits, facts.shape)
        except ValueError as error:
            raise ValueError(f"{name}.codes: {error}") from None
    if storage.codes == "base3":
        codes = codecs.decode_base3(stored, facts.shape)
    else:
        codes = unpack_planes(stored, facts.shape[1])
    if tuple(codes.shape) != facts.shape:
        raise ValueError(f"{name}.codes hold {list(codes.shape)}, not {list(facts.shape)}")
    return codes


def _uniform(
    name: str, codes: Tensor, bits: int, method: Any, floats: Mapping[str, Tensor]
) -> Codes:
    """The codes with the scales and zero points of as many cells as the method has."""
    out_features, in_features = codes.shape
    scale, zero = floats["scale"], floats.get("zero")
    count = scale.numel() + (0 if zero is None else zero.numel())
    expected = (method.storage_bits(out_features, in_features) - bits * codes.numel()) / SCALE_BITS
    if count != expected or (zero is not None and zero.numel() != scale.numel()):
        raise ValueError(
            f"{name} has {count} scales and zero points, {expected:g} by {method.method!r}"
        )
    cells, group = (1, 1), 0
    if scale.numel() > 1:
        cells = (out_features, scale.numel() // out_features)
        group = in_features // cells[1] if cells[1] > 1 else 0
    return Codes(codes, scale.view(cells), None if zero is None else zero.view(cells), group)


def _known_slots(
    name: str,
    facts: Facts,
    methods: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    floats: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """The slots that every format knows: Hadamard rotation, low-rank branch, grid of tokens."""
    out_features, in_features = facts.shape
    slots: dict[str, nn.Module] = {}
    signs = tensors.get(f"{name}.signs")
    up, down = floats.get("low_rank_up"), floats.get("low_rank_down")
    if isinstance(facts, LayerFacts):
        grid, rotated = facts.activation_quantizer, facts.rotated
    else:
        activation, rotation, branch = (
            methods.get(slot) for slot in ("activation", "rotation", "branch")
        )
        grid = activation.method if isinstance(activation, GridMethod) else "none"
        rotated = isinstance(rotation, HadamardMethod)
        has_signs = isinstance(rotation, HadamardMethod) and rotation.stored_bits(in_features) > 0
        rank = branch.rank_of(out_features, in_features) if isinstance(branch, SVD) else 0
        if has_signs != (signs is not None) or rank != (0 if down is None else len(down)):
            raise ValueError(f"{name} has other signs or another rank than rule {facts.rule!r}")
    if (up is None) != (down is None) or (signs is not None and not rotated):
        raise ValueError(f"{name} has half a low-rank branch, or signs without a rotation")
    if rotated:
        hadamard_factors(in_features)
        slots["rotation"] = HadamardRotation(
            None
            if signs is None
            else codecs.decode_signs(signs, in_features).to(
                torch.promote_types(dtype, torch.float32)
            )
        )
    if up is not None and down is not None:
        rank = len(down)
        for part, value, shape in (
            ("up", up, (out_features, rank)),
            ("down", down, (rank, in_features)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name}.low_rank_{part} is {list(value.shape)}, not {list(shape)}"
                )
        slots["branch"] = LowRankBranch(up, down)
    if grid != "none":
        slots["activation"] = GridQuantizer(token_grid(grid))
    return slots


def _other_slot(
    name: str,
    shape: tuple[int, ...],
    slot: str,
    method: Method,
    header: Header,
    tensors: Mapping[str, Tensor],
) -> nn.Module:
    """The module of any other slot: fitted to nothing, with the state of the file."""
    n = shape[1]
    gram = torch.eye(n, dtype=torch.float64) if "gram" in method.needs else None
    site = Site(
        name, tokens=torch.ones(1, n), absmax=torch.ones(n), gram=gram, count=1, mean=torch.zeros(n)
    )
    # As `fit` takes it, without its memory.
    module: Any = method.fit(torch.ones((1, 1), dtype=torch.float64).expand(shape), site)
    state = {}
    for key, template in module.state_dict().items():
        full = f"{name}.{slot}.{key}"
        stored = tensors.get(full)
        if stored is not None and stored.dtype == torch.uint8 and holds_signs(template):
            signs = codecs.decode_signs(stored, len(template))
            value = signs.to(FLOATS[header.dtypes.get(full, "float32")])
        else:
            value = restored(full, tensors, header.dtypes)
        if value.shape != template.shape:
            raise ValueError(f"{full} is {list(value.shape)}, not {list(template.shape)}")
        if value.is_floating_point() != template.is_floating_point() or not (
            value.is_floating_point() or value.dtype == template.dtype
        ):
            raise ValueError(f"{full} is {value.dtype}, not {template.dtype}")
        problem = problem_of(value)
        if problem:
            raise ValueError(f"{full} {problem}")
        state[key] = value
    module.load_state_dict(state, assign=True)
    if slot in ("scaling", "rotation"):
        try:
            module(torch.zeros(1, n))
        except (IndexError, RuntimeError) as error:  # a permutation of more places than there are
            raise ValueError(f"{name}.{slot} cannot be computed: {error}") from None
    fitted: nn.Module = module
    return fitted


def _bare(name: str) -> str:
    """A name without what torch's wrappers (DDP, torch.compile) put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def replacements_of(
    model: nn.Module, header: Header, layers: Mapping[str, PackedLayer]
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


def rest_of(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, PackedLayer],
) -> dict[str, Tensor]:
    """The state dict of everything outside the packed layers, in the form `model` takes it."""
    parts = ("codes", "signs", "scale", *OPTIONAL_PARTS)
    elsewhere = {f"{name}.{part}" for name in header.layers for part in parts}
    for name, layer in packed.items():
        if isinstance(layer, PackedUniform):
            elsewhere.add(f"{name}.zero")
        for slot, module in layer.other_slots().items():
            elsewhere |= {f"{name}.{slot}.{key}" for key in module.state_dict()}
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
