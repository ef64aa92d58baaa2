"""Which layers a plan quantizes, told by where they stand in the model rather than by its names.

A transformer is a list of blocks between embedders and a head. What stands outside the blocks, and
every embedder, stays in full precision. Inside a block, a linear within a normalisation or a
modulation module sees one row per image: it is a modulation (adaLN) layer, and all others are
block layers, less adapters and routers of experts. A model without such a list (a single block, an
MLP) is taken for one block, less what is called like an embedder or a head.

`layers.skip` adds to what is kept, `layers.include` takes layers in, `layers.adaln` replaces the
rule for modulation layers. Their patterns (fnmatch) match a name from any of its components on, so
that a wrapper ("module.", "_orig_mod.", "dit.") changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from torch import nn

from robuq_bench.errors import UsageError
from robuq_bench.quantization.module_tree import names_of

if TYPE_CHECKING:
    from robuq_bench.config import Plan

LayerFilter = Callable[[nn.Module, str], bool]
Kind = Literal["block", "adaLN", "kept"]

_EMBEDDER = re.compile(r"(^|_)emb(ed|edder|edders|edding|eddings)?(_|\d|$)")
_MODULATION = re.compile(
    r"(^|_|layer|rms|group)norm(_|\d|s?$)|modulation|ada_?ln|scale_shift|(^|_)(mod|ada|ln)(_|\d|$)",
    re.IGNORECASE,
)
_HEAD = re.compile(r"^(final_layer|proj_out|norm_out|adaln_single|caption_projection)")
_ADAPTER = re.compile(r"(^|_)lora(_|$)|(^|_)adapter(s|_|$)", re.IGNORECASE)
# In names of modules and of classes; only attention normalises its queries.
_ATTENTION = re.compile(
    r"attn|attention|qkv|^(mha|msa|to_q|q_proj)$|(^|_)(q|query)_?norm|norm_?q(uery)?$",
    re.IGNORECASE,
)
_EXPERTS = re.compile(r"(^|_)experts$")

ADALN_NOT_QUANTIZED = "is a modulation layer, and plan.adaln quantizes none"


@dataclass(frozen=True)
class Selected:
    """What becomes of one linear layer, and why; `aliases` are its further names."""

    name: str
    kind: Kind
    reason: str
    module: nn.Linear
    aliases: tuple[str, ...] = ()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches `name` or what follows one of its dots."""
    parts = name.split(".")
    suffixes = [".".join(parts[start:]) for start in range(len(parts))]
    return any(fnmatchcase(suffix, pattern) for pattern in patterns for suffix in suffixes)


def is_adaln(name: str, plan: Plan, blocks: Collection[str] = ()) -> bool:
    """Whether the block layer `name` is a modulation linear, which follows `plan.adaln`.

    `blocks` are those of its model (`blocks_of`); without them, a block is taken to begin at the
    first index in the name.
    """
    if plan.layers.adaln is not None:
        return matches(name, plan.layers.adaln)
    return is_modulation(name, blocks)


def is_modulation(name: str, blocks: Collection[str] = ()) -> bool:
    """The rule of `is_adaln`: within its block, a layer is or stands in a norm or modulation."""
    parts = _locate(name, blocks)[1] if blocks else _after_index(name)
    return any(map(_MODULATION.search, parts))


def _after_index(name: str) -> list[str]:
    """Components after the first list index that has some: "blocks.0.norm1.linear" -> norm1, ..."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]  # of torch.compile
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return parts[position + 1 :]
    return parts


def _locate(name: str, blocks: Collection[str]) -> tuple[bool, list[str]]:
    """Whether a layer is in a block, and the components of its name from there, or from beside."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) + 1):
        if ".".join(parts[:depth]) in blocks:
            return True, parts[depth:]
    return False, parts[max(_shared([parts, block.split(".")]) for block in blocks) :]


def _shared(paths: list[list[str]]) -> int:
    """How many leading components are the same in all paths."""
    same = (len(set(components)) == 1 for components in zip(*paths, strict=False))
    return sum(takewhile(bool, same))


def blocks_of(model: nn.Module) -> dict[str, str | None]:
    """Names of the blocks of `model`, each with the name of what holds it.

    They are the members of the innermost lists made of blocks, but for lists in an embedder (where
    they refine its tokens), and further modules of the same classes (a block between two lists).
    Of a model without any, the one block is what holds all its layers, and its holder is None.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    lists = [name for name, module in modules.items() if _is_made_of_blocks(module)]
    lists = [name for name in lists if not any(_is_inside(other, name) for other in lists)]
    lists = [name for name in lists if not _is_in_embedder(name, lists)]
    blocks: dict[str, str | None] = {}
    for name in lists:
        for key, member in modules[name].named_children():
            if _is_block(member):
                blocks[_unwrapped(f"{name}.{key}" if name else key, modules)] = name
    classes = {type(modules[name]) for name in blocks} - {nn.ModuleList, nn.Sequential}
    for name, module in modules.items():
        is_another = type(module) in classes and not any(_is_inside(each, name) for each in lists)
        if is_another and not _is_in_embedder(name, lists):
            blocks.setdefault(name, name.rpartition(".")[0])
    leaves = [name.split(".")[:-1] for name, module in modules.items() if not module._modules]
    return blocks or {".".join(leaves[0][: _shared(leaves)]): None}


def _unwrapped(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of what a wrapper holds ("blocks.0" compiled: "blocks.0._orig_mod"), or `name`."""
    children = list(modules[name].named_children())
    if len(children) != 1 or not children[0][1]._modules:
        return name
    return _unwrapped(f"{name}.{children[0][0]}", modules)


def _is_made_of_blocks(module: nn.Module) -> bool:
    """Whether a list holds blocks alone, or, between an embedder and a head, two of one class."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    composites = [member for member in module if member._modules]
    blocks = [type(member) for member in composites if _is_block(member)]
    return bool(blocks) and (len(blocks) == len(composites) or len(set(blocks)) < len(blocks))


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds attention and is more than that, by names of classes and children."""
    attention = [
        child
        for parent in module.modules()
        for name, child in parent.named_children()
        if _ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)
    ]
    if not _ATTENTION.search(type(module).__name__):
        return bool(attention)
    # Such as "CrossAttentionBlock": one that has whole attention in it, and other layers.
    whole = [child for child in attention if child._modules]
    held = {layer for child in whole for layer in child.modules()}
    return bool(whole) and any(
        layer not in held and (hasattr(layer, "in_features") or hasattr(layer, "in_channels"))
        for layer in module.modules()
    )


def _is_in_embedder(name: str, lists: Iterable[str]) -> bool:
    """Whether `name` is in an embedder: one so called, beside which stands a list that is not."""
    parts = name.split(".")
    others = [other.split(".") for other in lists]
    return any(
        _EMBEDDER.search(part)
        and any(
            len(other) > depth
            and other[:depth] == parts[:depth]
            and not _EMBEDDER.search(other[depth])
            for other in others
        )
        for depth, part in enumerate(parts)
    )


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _routers(model: nn.Module) -> set[nn.Module]:
    """Linear layers beside a module of experts that have one output for each of them."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        for name, experts in parent._modules.items():
            if experts is None or not _EXPERTS.search(name):
                continue
            counts = {p.shape[0] for p in experts._parameters.values() if p is not None}
            if isinstance(experts, nn.ModuleList):
                counts = {len(experts)}
            for child in parent._modules.values():
                if isinstance(child, nn.Linear) and child.out_features in counts:
                    found.add(child)
    return found


def _reason_to_keep(
    name: str,
    module: nn.Linear,
    plan: Plan,
    keep: LayerFilter | None,
    blocks: Mapping[str, str | None],
    is_router: bool,
) -> str | None:
    if type(module) is not nn.Linear:
        # Its owner may read it through the weight, bypassing forward (nn.MultiheadAttention does).
        return f"is a {type(module).__name__}, a subclass of nn.Linear"
    is_inside, parts = _locate(name, blocks)
    if any(map(_ADAPTER.search, parts)):
        return "is part of an adapter"
    if matches(name, plan.layers.skip):
        return "matches layers.skip"
    if not matches(name, plan.layers.include):
        if not is_inside:
            return f"is outside the blocks ({_few(blocks.values())})"
        if is_router:
            return "is a router of experts"
        if any(map(_EMBEDDER.search, parts)):
            return "is an embedder by its name"
        if None in blocks.values() and any(map(_HEAD.search, parts)):
            return "is a head by its name"
    if is_adaln(name, plan, blocks) and not quantizes_adaln(plan):
        return ADALN_NOT_QUANTIZED
    if keep is not None and not keep(module, name):
        return "is kept by filter_fn"
    return None


def _few(holders: Iterable[str | None]) -> str:
    names = list(dict.fromkeys(holder or "the model" for holder in holders))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def quantizes_adaln(plan: Plan) -> bool:
    """Whether the plan quantizes weights or inputs of modulation layers."""
    return plan.adaln.weight_quantizer != "none" or plan.adaln.activation_bits is not None


def select_layers(
    model: nn.Module, plan: Plan, keep: LayerFilter | None = None
) -> dict[str, Selected]:
    """Every `nn.Linear` of an unquantized model, by its first name, and what `plan` does to it.

    Args:
        model: any module; the name of a model that is a linear layer itself is ''.
        plan: `plan.layers` and `plan.adaln` are read.
        keep: (module, name) -> False keeps a layer in full precision, after the plan's rules.

    Raises:
        UsageError: a layer has two names, and the plan says different things of them.
    """
    blocks = blocks_of(model)
    routers = _routers(model)
    selected: dict[str, Selected] = {}
    for module, (name, *aliases) in names_of(model, nn.Linear).items():
        said: dict[str, tuple[Kind, str]] = {}
        for each in (name, *aliases):
            reason = _reason_to_keep(each, module, plan, keep, blocks, module in routers)
            kind: Kind = "adaLN" if is_adaln(each, plan, blocks) else "block"
            said[each] = (kind, "") if reason is None else ("kept", reason)
        for alias in aliases:
            if said[alias][0] != said[name][0]:
                raise UsageError(
                    f"{name!r} and {alias!r} are one layer, but the plan makes the first "
                    f"{_in_words(*said[name])} and the second {_in_words(*said[alias])}; name both "
                    "in layers.skip or layers.include"
                )
        selected[name] = Selected(name, *said[name], module, tuple(aliases))
    return selected


def _in_words(kind: Kind, reason: str) -> str:
    return f"full precision (it {reason})" if kind == "kept" else f"a quantized {kind} layer"
