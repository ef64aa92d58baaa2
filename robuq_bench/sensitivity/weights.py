"""End-to-end sensitivity to the weight bits of one layer, from models converted at each width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from robuq_bench.errors import UsageError
from robuq_bench.judging.sampling import evaluation_mode
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.epsilon import mean_squared_error
from robuq_bench.sensitivity.prefix import Prefix
from robuq_bench.sensitivity.probing import Done, OnItem, Table, named_layers, predict, resumable


def weight_epsilon_mse(
    variants: Mapping[int, nn.Module],
    layers: Sequence[str],
    batches: Sequence[ModelInputs],
    *,
    reference: nn.Module | None = None,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """s_l(b): mean squared change of the noise prediction when only layer l has b weight bits.

    Args:
        variants: {bits: the model with all its weights at these bits}; the model of the most bits
            is the one whose layers are exchanged.
        layers: names of quantized layers, each measured alone.
        batches: calibration set.
        reference: compare with this model (the teacher): the increase of the error against it, at
            least 0; None compares with the model of the most bits.
        done, on_item: as of `epsilon_mse`.

    Returns:
        {layer: {bits: value}}, 0 at the most bits.
    """
    base = variants[max(variants)]
    named_layers(base, layers, batches)
    for model in variants.values():
        if model is not base and model.training != base.training:
            raise UsageError("all variants must be in one mode")
    with evaluation_mode(base), torch.no_grad():
        source = base if reference is None else reference
        with evaluation_mode(source):
            target = [predict(source, batch) for batch in batches]
        present = mean_squared_error(base, batches, target)
        prefix = Prefix(base, {name: base.get_submodule(name) for name in layers}, batches)

        def compute(names: list[str]) -> Table:
            table: Table = {}
            for name in names:
                table[name] = {max(variants): 0.0}
                for bits, model in variants.items():
                    if model is base:
                        continue
                    other = model.get_submodule(name)
                    with (
                        _exchanged(base, name, other),
                        evaluation_mode(other),
                        prefix.reused(name),
                    ):
                        error = mean_squared_error(base, batches, target)
                    table[name][bits] = max(0.0, error - present)
            return table

        return resumable(
            "weight sensitivity",
            layers,
            sorted(variants),
            compute,
            done,
            on_item,
            layer_by_layer=True,
        )


@contextmanager
def _exchanged(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Put `layer` in the place of the layer `name` for the block."""
    holder, _, last = name.rpartition(".")
    parent = model.get_submodule(holder)
    present = parent._modules[last]
    parent._modules[last] = layer
    try:
        yield
    finally:
        parent._modules[last] = present
