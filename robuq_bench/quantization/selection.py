"""Which layers a plan quantizes, told by where they stand in the model rather than by its names.

A transformer is a list of blocks between embedders and a head. Inside a block, a linear within a
normalisation or a modulation module sees one row per image: its kind is "adaLN"; what is called
like an embedder, and routers of experts, is "other", and all else is "block". What stands outside
the blocks is "other" too. A model without such a list (a single block, an MLP) is taken for one
block, less what is called like an embedder or a head.

A plan's rule names the kinds it is for, and patterns of names. Adapters and subclasses of
`nn.Linear` are left alone whatever a plan says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from torch import nn

from robuq_bench.config.plan import matches
from robuq_bench.errors import UsageError
from robuq_bench.quantization.module_tree import names_of

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Rule
    from robuq_bench.config.plan import Kind

LayerFilter = Callable[[nn.Module, str], bool]

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


@dataclass(frozen=True)
class Selected:
    """What becomes of one linear layer, and why.

    Attributes:
        name: the first of its names; `aliases` are the others.
        kind: where it stands.
        rule: what quantizes it; None keeps it in full precision, and `reason` says why.
        module: the layer.
    """

    name: str
    kind: Kind
    rule: Rule | None
    reason: str
    module: nn.Linear
    aliases: tuple[str, ...] = ()

    @property
    def becomes(self) -> str:
        """The name of its rule, or "kept"."""
        return "kept" if self.rule is None else self.rule.name


def is_modulation(name: str, blocks: Collection[str] = ()) -> bool:
    """Whether a layer, within its block, is or stands in a norm or modulation."""
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


def _where(name: str, blocks: Mapping[str, str | None], is_router: bool) -> tuple[Kind, str]:
    """The kind of a layer, and for "other" what makes it so."""
    is_inside, parts = _locate(name, blocks)
    if not is_inside:
        return "other", f"is outside the blocks ({_few(blocks.values())})"
    if is_router:
        return "other", "is a router of experts"
    if any(map(_EMBEDDER.search, parts)):
        return "other", "is an embedder by its name"
    if None in blocks.values() and any(map(_HEAD.search, parts)):
        return "other", "is a head by its name"
    return ("adaLN" if is_modulation(name, blocks) else "block"), ""


def _untouchable(name: str, module: nn.Linear, blocks: Collection[str]) -> str | None:
    """Why no plan may quantize a layer; None if one may."""
    if type(module) is not nn.Linear:
        # Its owner may read it through the weight, bypassing forward (nn.MultiheadAttention does).
        return f"is a {type(module).__name__}, a subclass of nn.Linear"
    if any(map(_ADAPTER.search, _locate(name, blocks)[1])):
        return "is part of an adapter"
    return None


def _few(holders: Iterable[str | None]) -> str:
    names = list(dict.fromkeys(holder or "the model" for holder in holders))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def select_layers(
    model: nn.Module, plan: Plan, keep: LayerFilter | None = None
) -> dict[str, Selected]:
    """Every `nn.Linear` of an unquantized model, by its first name, and what `plan` does to it.

    Args:
        model: any module; the name of a model that is a linear layer itself is ''.
        plan: its rules are read.
        keep: (module, name) -> False keeps a layer in full precision, after the plan's rules.

    Raises:
        UsageError: a layer has two names, and the plan says different things of them.
    """
    blocks = blocks_of(model)
    routers = _routers(model)
    selected: dict[str, Selected] = {}
    for module, names in names_of(model, nn.Linear).items():
        first, *others = (
            _select(name, module, plan, keep, blocks, module in routers) for name in names
        )
        for other in others:
            if other.rule != first.rule:
                raise UsageError(
                    f"{first.name!r} and {other.name!r} are one layer, but the plan makes the "
                    f"first {_in_words(first)} and the second {_in_words(other)}; name both in "
                    "one rule of [[layers]]"
                )
        selected[first.name] = replace(first, aliases=tuple(names[1:]))
    return selected


def _select(
    name: str,
    module: nn.Linear,
    plan: Plan,
    keep: LayerFilter | None,
    blocks: Mapping[str, str | None],
    is_router: bool,
) -> Selected:
    kind, why = _where(name, blocks, is_router)
    untouchable = _untouchable(name, module, blocks)
    rule = plan.rule_for(name, kind)
    reason = ""
    if untouchable is not None:
        reason = untouchable
    elif rule is None:
        reason = why or f"is of kind {kind}, and no rule of the plan fits it"
        for each in plan.layers:
            if each.match != ("*",) and matches(name, each.match):
                reason += f" (rule {each.name!r} names it, but is not for kind {kind})"
                break
    elif not rule.slots():
        reason = f"is kept by rule {rule.name!r}"
    elif keep is not None and not keep(module, name):
        reason = "is kept by filter_fn"
    return Selected(name, kind, None if reason else rule, reason, module)


def _in_words(layer: Selected) -> str:
    if layer.rule is None:
        return f"full precision (it {layer.reason})"
    return f"quantized by rule {layer.rule.name!r}"
