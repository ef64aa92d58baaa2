"""Fitting the layers of a model: at once, or block by block on what they see."""

from __future__ import annotations

import hashlib
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
        done: states of blocks that are fitted already; what is found there is not fitted again,
            and every block that is fitted is put there. The key is the block's first name and a
            digest of everything its fit depends on, so that another plan, seed, model or
            calibration set finds nothing.
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
    if "centring" in slots and "gram" in needs:
        needs |= {"mean"}  # see `Site.less`
    # After a centring or a rotation the largest magnitudes are those of the sample, see `Site`.
    moved = False
    for slot, method in slots.items():
        if moved and "absmax" in method.needs:
            needs |= {"tokens"}
        moved = moved or slot in ("centring", "rotation")
    return needs


def site_of(name: str, linear: nn.Linear, seed: int, *, blank: bool) -> Site:
    """The site of a layer that nothing is observed of: bare, or blank for values to be loaded."""
    if not blank:
        return Site(name, seed)
    return Site.blank(name, linear.in_features, seed, linear.weight.device)


def fit_layer(linear: nn.Linear, rule: Rule, site: Site) -> QuantizedLinear:
    """What replaces a layer by its rule.

    Raises:
        ConfigError, UsageError: as `QuantizedLinear.from_linear`, or a value is no longer finite.
    """
    layer = QuantizedLinear.from_linear(linear, rule.slots(), site)
    layer.chooses = frozenset(of for of in ("activation", "weight") if rule.has_choice(of))
    for part, value in (*layer.named_parameters(), *layer.named_buffers()):
        # Rotation can exceed half precision's range.
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
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
    watched = [name for name in layers if needs[name]]
    passes = [calls_of(model, watched, batch) for batch in calibration.batches]
    blocks = _blocks(model, layers, passes[0])
    # Leaving a pass at its last input is right only where every pass is the same.
    calls = passes[0] if all(each == passes[0] for each in passes) else None
    digest = _digest(model, calibration, seed)
    fitted: dict[nn.Module, nn.Module] = {}
    try:
        for count, names in enumerate(blocks, 1):
            digest = _extended(digest, names, rules)
            key = f"{names[0]} {digest}"
            now: dict[nn.Module, nn.Module] = {}
            for name, layer in _fitted_block(
                model, names, key, layers, rules, needs, calibration, calls, seed
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


def _blocks(
    model: nn.Module, layers: Mapping[str, nn.Linear], calls: Sequence[str]
) -> list[list[str]]:
    """Groups of layers in the order in which a pass comes to them.

    Layers that observe nothing stand where the model has them, whether a pass calls them or not.
    """
    place = {name: position for position, name in enumerate(dict.fromkeys(calls))}
    groups = blocks_in_order(model, list(layers))
    known = {id(group): [place[name] for name in group if name in place] for group in groups}
    last = max(place.values(), default=0) + 1
    for group in groups:
        group.sort(key=lambda name: place.get(name, last))
    return sorted(groups, key=lambda group: min(known[id(group)], default=last))


def _digest(model: nn.Module, calibration: Calibration, seed: int) -> str:
    """Of what every block's fit depends on; "" where nothing is kept."""
    if calibration.done is None:
        return ""
    facts = (seed, calibration.tokens, calibration.quantized_predecessors)
    found = hashlib.sha256(repr(facts).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode() + (_bytes(value) if isinstance(value, Tensor) else b""))
    for batch in calibration.batches:
        parts = batch.values() if isinstance(batch, Mapping) else batch
        for part in (parts,) if isinstance(parts, Tensor) else parts:
            found.update(_bytes(part) if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()


def _extended(digest: str, names: Sequence[str], rules: Mapping[str, Rule]) -> str:
    """The digest of a block from that of the one before it."""
    chosen = [f"{name} {rules[name].model_dump_json()}" for name in names]
    return hashlib.sha256("\n".join([digest, *chosen]).encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _fitted_block(
    model: nn.Module,
    names: Sequence[str],
    key: str,
    layers: Mapping[str, nn.Linear],
    rules: Mapping[str, Rule],
    needs: Mapping[str, frozenset[Need]],
    calibration: Calibration,
    calls: Sequence[str] | None,
    seed: int,
) -> Iterator[tuple[str, QuantizedLinear]]:
    done = calibration.done
    known = None if done is None else done.get(key)
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
        done[key] = fitted
