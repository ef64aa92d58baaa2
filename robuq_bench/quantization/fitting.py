"""Fitting the layers of a model: at once, or block by block on what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.methods.base import Need
from robuq_bench.methods.site import Site
from robuq_bench.quantization.blocks import blocks_in_order
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers
from robuq_bench.quantization.observing import observe
from robuq_bench.quantization.watching import calls_of

if TYPE_CHECKING:
    from robuq_bench.config import Rule


@dataclass
class Calibration:
    """What a plan's methods are fitted on, and how far that has come.

    Attributes:
        batches: inputs of the model, each a tensor, a tuple of arguments or a dict of keywords;
            gone through once for every block.
        tokens: at most so many are kept of each layer's input.
        quantized_predecessors: whether a block sees the outputs of the quantized blocks before
            it; otherwise those of the full-precision model.
        done: states of blocks that are fitted already, by the first name in the block; what is
            found there is not fitted again, and every block that is fitted is put there.
        on_block: called with (blocks done, blocks in all).
    """

    batches: Sequence[Any]
    tokens: int = 4096
    quantized_predecessors: bool = True
    done: MutableMapping[str, dict[str, Tensor]] | None = None
    on_block: Callable[[int, int], None] | None = None


def needs_of(rule: Rule) -> frozenset[Need]:
    """What the methods of a layer read of its inputs."""
    slots = rule.slots()
    needs = frozenset[Need]().union(*(method.needs for method in slots.values()))
    # After a rotation the largest magnitudes are those of the sample, see `Site.through`.
    after = (m.needs for slot, m in slots.items() if slot not in ("scaling", "rotation"))
    if rule.rotation is not None and any("absmax" in found for found in after):
        needs |= {"tokens"}
    return needs


def site_of(name: str, linear: nn.Linear, seed: int, *, blank: bool) -> Site:
    if not blank:
        return Site(name, seed)
    return Site.blank(name, linear.in_features, seed, linear.weight.device)


def fit_layer(linear: nn.Linear, rule: Rule, site: Site) -> QuantizedLinear:
    layer = QuantizedLinear.from_linear(linear, rule.slots(), site)
    layer.fixed_bits = rule.fixed_bits
    for part, value in layer.named_parameters():
        if not bool(torch.isfinite(value).all()):  # rotation can exceed half precision's range
            raise UsageError(
                f"{part!r} of layer {layer.name!r} overflows {value.dtype} once it is converted; "
                "convert the model in float32"
            )
    return layer


def fit_by_blocks(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    rules: Mapping[str, Rule],
    needs: Mapping[str, frozenset[Need]],
    calibration: Calibration,
    seed: int,
) -> nn.Module:
    """Observe, fit and replace the layers of one block after another; the model or its stand-in."""
    calls = calls_of(model, layers, calibration.batches[0])
    blocks = blocks_in_order(model, list(layers), calls)
    fitted: dict[nn.Module, nn.Module] = {}
    try:
        for count, names in enumerate(blocks, 1):
            now: dict[nn.Module, nn.Module] = {}
            for name, layer in _fitted_block(
                model, names, layers, rules, needs, calibration, calls, seed
            ):
                now[layers[name]] = layer
            fitted |= now
            if calibration.quantized_predecessors:
                model = exchange_layers(model, now)
            if calibration.on_block is not None:
                calibration.on_block(count, len(blocks))
    except BaseException:
        if calibration.quantized_predecessors:  # leave the model as it was given
            exchange_layers(model, {new: old for old, new in fitted.items()})
        raise
    return model if calibration.quantized_predecessors else exchange_layers(model, fitted)


def _fitted_block(
    model: nn.Module,
    names: Sequence[str],
    layers: Mapping[str, nn.Linear],
    rules: Mapping[str, Rule],
    needs: Mapping[str, frozenset[Need]],
    calibration: Calibration,
    calls: Sequence[str],
    seed: int,
) -> Iterator[tuple[str, QuantizedLinear]]:
    done = calibration.done
    known = None if done is None else done.get(names[0])
    if known is not None:
        for name in names:
            site = site_of(name, layers[name], seed, blank=True)
            layer = fit_layer(layers[name], rules[name], site)
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in known.items() if k.startswith(prefix)}
            layer.load_state_dict(state)
            yield name, layer
        return
    watched = {name: layers[name] for name in names if needs[name]}
    wanted = frozenset[Need]().union(*(needs[name] for name in names))
    sites = (
        observe(
            model,
            watched,
            calibration.batches,
            wanted,
            tokens_per_layer=calibration.tokens,
            seed=seed,
            calls=calls,
        )
        if watched
        else {}
    )
    fitted: dict[str, Tensor] = {}
    for name in names:
        layer = fit_layer(layers[name], rules[name], sites.pop(name, Site(name, seed)))
        fitted |= {f"{name}/{key}": value.clone() for key, value in layer.state_dict().items()}
        yield name, layer
    if done is not None:
        done[names[0]] = fitted
