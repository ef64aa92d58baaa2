"""What makes a layer unfit to be replaced, found before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from robuq_bench.errors import UsageError
from robuq_bench.quantization.linear import check_methods
from robuq_bench.quantization.module_tree import hidden_references

if TYPE_CHECKING:
    from robuq_bench.config import Rule

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_layer(name: str, linear: nn.Linear, rule: Rule) -> None:
    """Everything that can be known to fail, before the first layer is replaced."""
    extra = sorted(set(linear._parameters) - {"weight", "bias"})
    if extra:
        raise UsageError(
            f"layer {name!r} is reparametrised ({', '.join(extra)}), which its copy would lose; "
            "remove the reparametrisation first, or keep it by a rule without methods"
        )
    inside = [*linear._buffers, *linear._modules]
    if inside:
        raise UsageError(
            f"layer {name!r} holds more than a weight and a bias ({', '.join(inside)}), which its "
            "copy would lose; move it elsewhere, or keep it by a rule without methods"
        )
    if "forward" in vars(linear):
        raise UsageError(
            f"layer {name!r} has a forward of its own, which its copy would lose (an offloading "
            "hook?); remove it first, or keep it by a rule without methods"
        )
    weight = linear.weight
    if weight.layout != torch.strided:
        raise UsageError(f"layer {name!r} has a weight of layout {weight.layout}; make it dense")
    if weight.is_meta:
        raise UsageError(f"layer {name!r} is on the meta device; load its weights first")
    if weight.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"layer {name!r} has a weight of {weight.dtype}; quantize_ takes "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in WEIGHT_DTYPES)}"
        )
    for part, value in linear.named_parameters(recurse=False):
        if not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"layer {name!r} has {int((~torch.isfinite(value)).sum())} values in its {part} "
                "that are NaN or infinite; find where the checkpoint was damaged"
            )
    check_methods(rule.slots(), linear, name)


def check_references(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a layer that something would go on calling after it was replaced."""
    for place, name in hidden_references(model, set(layers.values())):
        raise UsageError(
            f"{place!r} holds layer {name!r} besides registering it (a list, or torch.compile of "
            "the layer alone?) and would go on calling the old one; register it as a module, "
            "compile after quantize_, or keep it by a rule without methods"
        )


def check_ties(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a weight whose memory another module uses too: each use would get its own."""
    targets = set(layers.values())
    memory: dict[tuple[int, torch.device], list[tuple[int, int, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for part, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None or value.is_meta or value.layout != torch.strided or not value.numel():
                continue
            # Parts of one memory need not overlap, as those of a flattened model do not.
            reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            start = value.storage_offset() * value.element_size()
            end = start + reach * value.element_size()
            name = f"{module_name}.{part}" if module_name else part
            place = (value.untyped_storage().data_ptr(), value.device)
            for other_start, other_end, other, owner in memory.setdefault(place, []):
                overlaps = start < other_end and other_start < end
                if overlaps and owner is not module and not targets.isdisjoint((owner, module)):
                    raise UsageError(
                        f"{other!r} and {name!r} are one tied parameter, and quantizing would give "
                        "each its own; untie them first (clone one), or keep them by a "
                        "rule without methods"
                    )
            memory[place].append((start, end, name, module))
