"""Which layers a plan quantizes, told by where they stand in the model rather than by its names.

A transformer is a list of blocks between embedders and a head. What stands outside the list, and
every embedder, stays in full precision. Inside a block, a linear within a normalisation or a
modulation module sees one row per image: it is a modulation (adaLN) layer, and all others are
block layers. A model without such a list (a single block, an MLP) is taken for one block, less
what is called like an embedder or a head.

`layers.skip` adds to what is kept, `layers.include` takes layers in, `layers.adaln` replaces the
rule for modulation layers. Their patterns (fnmatch) match a name from any of its components on, so
that a wrapper ("module.", "_orig_mod.", "dit.") changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from torch import nn

from robuq_bench.errors import UsageError
from robuq_bench.quantization.module_tree import names_of

if TYPE_CHECKING:
    from robuq_bench.config import Plan

LayerFilter = Callable[[nn.Module, str], bool]
Kind = Literal["block", "adaLN", "kept"]

_EMBEDDER = re.compile(r"(^|_)emb(ed|edder|edders|edding|eddings)?(_|\d|$)")
_MODULATION = re.compile(r"norm|modulation|adaln|(^|_)mod(_|\d|$)", re.IGNORECASE)
_HEAD = re.compile(r"^(final_layer|proj_out|norm_out|adaln_single|caption_projection)")
_ADAPTER = re.compile(r"(^|_)lora(_|$)|(^|_)adapter(s|_|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|^(mha|msa|to_q|q_proj|qkv)$", re.IGNORECASE)

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


def is_adaln(name: str, plan: Plan) -> bool:
    """Whether the block layer `name` is a modulation linear, which follows `plan.adaln`."""
    if plan.layers.adaln is not None:
        return matches(name, plan.layers.adaln)
    return any(_MODULATION.search(part) for part in _within_block(name)[:-1])


def _within_block(name: str) -> list[str]:
    """Components after the first list index that has some: "blocks.0.norm1.linear" -> norm1, ..."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return parts[position + 1 :]
    return parts


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of `model` that are its blocks: the innermost ones made of blocks."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and not _is_embedder(name)  # a refiner of text stands within its embedder
        and _is_made_of_blocks(module)
    ]
    return [outer for outer in found if not any(_is_in(f"{b}.x", outer) for b in found)]


def _is_made_of_blocks(members: Iterable[nn.Module]) -> bool:
    composites = [member for member in members if member._modules]
    return bool(composites) and all(map(_is_block, composites))


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds attention and is more than that, by names of classes and children."""
    return not _ATTENTION.search(type(module).__name__) and any(
        any(map(_ATTENTION.search, (*part._modules, *(type(m).__name__ for m in part.children()))))
        for part in module.modules()
    )


def _is_embedder(name: str) -> bool:
    return any(_EMBEDDER.search(part) for part in name.split("."))


def _reason_to_keep(
    name: str, module: nn.Linear, plan: Plan, keep: LayerFilter | None, lists: list[str]
) -> str | None:
    if type(module) is not nn.Linear:
        # Its owner may read it through the weight, bypassing forward (nn.MultiheadAttention does).
        return f"is a {type(module).__name__}, a subclass of nn.Linear"
    parts = name.split(".")
    if any(map(_ADAPTER.search, parts)):
        return "is a low-rank adapter"
    if matches(name, plan.layers.skip):
        return "matches layers.skip"
    if not matches(name, plan.layers.include):
        reason = _reason_of_place(name, lists)
        if reason is not None:
            return reason
    if is_adaln(name, plan) and not quantizes_adaln(plan):
        return ADALN_NOT_QUANTIZED
    if keep is not None and not keep(module, name):
        return "is kept by filter_fn"
    return None


def _reason_of_place(name: str, lists: list[str]) -> str | None:
    parts = name.split(".")
    if lists:
        inside = next((outer for outer in lists if _is_in(name, outer)), None)
        if inside is None:
            return f"is outside the blocks ({', '.join(outer or 'the model' for outer in lists)})"
        parts = name.removeprefix(inside).split(".")
    elif any(map(_HEAD.search, parts)):
        return "is a head by its name"
    return "is an embedder by its name" if any(map(_EMBEDDER.search, parts)) else None


def _is_in(name: str, outer: str) -> bool:
    """Whether a layer is within a member of the list `outer`, not a member itself."""
    prefix = f"{outer}." if outer else ""
    return name.startswith(prefix) and "." in name.removeprefix(prefix)


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
    lists = block_lists(model)
    selected: dict[str, Selected] = {}
    for module, (name, *aliases) in names_of(model, nn.Linear).items():
        said: dict[str, tuple[Kind, str]] = {}
        for each in (name, *aliases):
            reason = _reason_to_keep(each, module, plan, keep, lists)
            kind: Kind = "adaLN" if is_adaln(each, plan) else "block"
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
