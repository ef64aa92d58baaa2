"""The order in which layers are calibrated: block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from robuq_bench.quantization.selection import blocks_of
from robuq_bench.quantization.watching import find_layers, refuse_missing


def blocks_in_order(
    model: nn.Module, names: Iterable[str], calls: Sequence[str] | None = None
) -> list[list[str]]:
    """Layer names in groups to calibrate one after the other: those of a block are one group.

    Layers outside the blocks are groups of their own, as are all layers of a model without blocks.
    Groups, and the layers in them, are in the order of their first calls (`calls_of`) if given,
    else in the model's order of modules.

    Raises:
        UsageError: a layer that the model does not have, or that is not called.
    """
    wanted = find_layers(model, names)
    if calls is None:
        order = [name for name, _ in model.named_modules(remove_duplicate=False) if name in wanted]
    else:
        refuse_missing(wanted, calls, "is not among `calls`")
        order = [name for name in dict.fromkeys(calls) if name in wanted]
    blocks = blocks_of(model)
    if None in blocks.values():  # no list of blocks: the model would be one group
        return [[name] for name in order]
    groups: dict[tuple[bool, str], list[str]] = {}
    for name in order:
        parts = name.split(".")
        holders = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        block = next((holder for holder in holders if holder in blocks), None)
        groups.setdefault((block is not None, name if block is None else block), []).append(name)
    return list(groups.values())
