"""What linear layers see in calibration: one observer, for any `nn.Module`.

A layer's inputs [..., in] are taken as tokens, one a row. Kept of them is only what is asked for: a
bounded uniform sample, the largest magnitude and the mean of each channel, the sum of x^T x, always
the count.
The model runs as it is (whether with quantized predecessors is decided by what it holds by then),
in eval mode, without gradients, and is left as it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
    Sized,
)
from contextlib import suppress
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError, suggest
from robuq_bench.methods.base import Need
from robuq_bench.methods.site import Site
from robuq_bench.quantization.watching import (
    AllSeen,
    Forward,
    evaluating,
    find_layers,
    refuse_missing,
    run_on,
    watching,
)
from robuq_bench.seeds import seeded

logger = logging.getLogger(__name__)

TOKENS_PER_LAYER = 4096
GRAM_ROWS = 1024
"""Tokens made float64 at a time for a gram. Float32 products were measured: entries off by 4e-7 of
the diagonal, eigenvalues of a singular gram at -2e-5, more under TF32; float64: 1e-15 and -1e-13,
for about twice the time of that one product."""


class Observed(dict[str, Site]):
    """Sites by layer, over all batches; `by_group[label]` holds those over a group's batches."""

    def __init__(self, sites: Mapping[str, Site], by_group: Mapping[Hashable, dict[str, Site]]):
        super().__init__(sites)
        self.by_group = dict(by_group)


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module] | Iterable[str],
    batches: Iterable[Any],
    needs: Collection[Need],
    *,
    tokens_per_layer: int = TOKENS_PER_LAYER,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    forward: Forward | None = None,
    calls: Sequence[str] | None = None,
    on_batch: Callable[[int, int | None], object] | None = None,
) -> Observed:
    """Run `model` on `batches` and return what its `layers` saw.

    Which tokens are sampled is a function of seed, layer, and a token's number among those that
    the layer saw (in its first call of a pass, in its second, ...): the same however samples are
    split into batches and groups, as long as a layer's rows come in the order of samples. They are
    returned in random order, so that the first n of them are a uniform sample too.

    Args:
        layers: modules of the model by name, or names. Any that see [..., in], if not linear.
        batches: each a tensor, a tuple of arguments, or a mapping of keyword arguments.
        needs: what to keep besides the count.
        tokens_per_layer: size of the sample, and of every group's.
        seed: of the sample; also each site's.
        groups: a label for each batch, a timestep range say, to have the statistics of each group.
        forward: how to call the model on a batch.
        calls: which layers are called in every pass, as `calls_of` found them: a pass is then left
            at the last input to be seen, and modules after it do not run. A further call of a
            layer would be missed.
        on_batch: told after each batch how many are done, and of how many if that is known.

    Returns:
        Sites on the device of the layers' inputs; `memory_bytes` bounds their size.

    Raises:
        UsageError: no such layer, one that was not called or saw no tokens (of a group), inputs
            that are not floats [..., in] or not finite, no batches, or labels that do not fit them.
    """
    modules = layers if isinstance(layers, Mapping) else find_layers(model, layers)
    for need in needs:
        if need not in get_args(Need):
            raise UsageError(f"nothing called {need!r} to observe{suggest(need, get_args(Need))}")
    if tokens_per_layer < 1:
        raise UsageError(f"tokens_per_layer must be at least 1, got {tokens_per_layer}")
    expected = Counter(name for name in calls or () if name in modules)
    if calls is not None:
        refuse_missing(modules, expected, "is not among `calls`")
    _log_memory(modules, needs, tokens_per_layer, len(set(groups or ())))

    seen: dict[Hashable, dict[str, _Statistics]] = {}
    draws: dict[tuple[str, int], np.random.PCG64] = {}
    in_pass: Counter[str] = Counter()
    label: Hashable = None

    def see(name: str, x: Tensor) -> None:
        call = (name, in_pass[name])
        if call not in draws:
            draws[call] = _random_stream(seed, *call)
        if name not in seen[label]:
            seen[label][name] = _Statistics(name, needs, tokens_per_layer)
        seen[label][name].add(x, draws[call])
        in_pass[name] += 1
        if expected and expected <= in_pass:
            raise AllSeen

    total = len(batches) if isinstance(batches, Sized) else None
    done = 0
    with evaluating(model), watching(modules, see):
        for done, batch in enumerate(batches, 1):
            if groups is not None and len(groups) < done:
                raise UsageError(f"{len(groups)} labels in groups, but more batches than that")
            label = None if groups is None else groups[done - 1]
            seen.setdefault(label, {})
            in_pass.clear()
            with suppress(AllSeen):
                run_on(model, batch, forward)
            if on_batch is not None:
                on_batch(done, total)
    if done == 0:
        raise UsageError("no calibration batches to observe layers on")
    if groups is not None and len(groups) > done:
        raise UsageError(f"{len(groups)} labels in groups, but only {done} batches")
    return _result(modules, seen, seed, is_grouped=groups is not None)


def memory_bytes(
    widths: Iterable[int], needs: Collection[Need], tokens_per_layer: int, groups: int = 0
) -> int:
    """At most this much is held while observing layers of these input `widths`, in bytes.

    Of each layer 4 * tokens_per_layer * in (sample) + 8 * tokens_per_layer (its order), 4 * in
    (absmax), 8 * in (mean) and 8 * in^2 (gram), for every one of `groups` and once for all of them;
    for the widest layer, working copies of three samples and `GRAM_ROWS` rows. What the model's
    forward holds, and copies of one input, come on top.
    """
    widths = list(widths)
    sampled, gram = "tokens" in needs, "gram" in needs
    held = sum(
        (4 * n + 8) * tokens_per_layer * sampled
        + (4 * ("absmax" in needs) + 8 * ("mean" in needs)) * n
        + 8 * n * n * gram
        for n in widths
    )
    working = (12 * tokens_per_layer * sampled + 8 * GRAM_ROWS * gram) * max(widths, default=0)
    return held * (groups + 1 if groups else 1) + working


def _random_stream(seed: int, name: str, call: int) -> np.random.PCG64:
    """One number for each token in turn, however many are asked for at a time."""
    return np.random.PCG64(seeded("observe", seed, call, name))


class _Statistics:
    """What one group's batches showed of one layer; `add` takes its inputs, call by call."""

    def __init__(self, name: str, needs: Collection[Need], tokens_per_layer: int) -> None:
        self.name, self.needs, self.capacity = name, needs, tokens_per_layer
        self.count = 0
        self.width: int | None = None
        self.absmax: Tensor | None = None
        self.total: Tensor | None = None  # [in] float64, sum of x
        self.gram: Tensor | None = None
        self._rows: Tensor | None = None  # [capacity, in], the first len(_numbers) of them in use
        self._numbers = np.empty(0, np.uint64)

    def add(self, x: Tensor, stream: np.random.PCG64) -> None:
        """Take in x [..., in]; `stream` gives each of its tokens a number."""
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != (self.width or x.shape[-1]):
            raise UsageError(
                f"layer {self.name!r}: expected floats [..., {self.width or 'in'}] at its input, "
                f"got {x.dtype} {list(x.shape)}; leave the layer out"
            )
        self.width = x.shape[-1]
        x = x.detach().reshape(-1, self.width)
        if not x.isfinite().all():
            bad = int((~x.isfinite()).any(1).sum())
            raise UsageError(
                f"layer {self.name!r}: {bad} of {len(x)} tokens at its input hold NaN or infinity; "
                "check the model, its dtype and the calibration data"
            )
        if len(x) == 0:
            return
        self.count += len(x)
        if "absmax" in self.needs:
            self._raise_absmax(x.abs().amax(0).float())
        if "mean" in self.needs:
            self._add_total(x.sum(0, dtype=torch.float64))
        if "gram" in self.needs:
            if self.gram is None:
                self.gram = x.new_zeros(self.width, self.width, dtype=torch.float64)
            for rows in torch.split(x, GRAM_ROWS):
                rows = rows.double()
                self.gram.addmm_(rows.T, rows)
        if "tokens" in self.needs:
            self._sample(x, stream.random_raw(len(x)))

    def include(self, other: _Statistics) -> None:
        """Take in what another group showed of the same layer."""
        self.count += other.count
        if other.absmax is not None:
            self._raise_absmax(other.absmax)
        if other.total is not None:
            self._add_total(other.total)
        if other.gram is not None:
            self.gram = other.gram.clone() if self.gram is None else self.gram.add_(other.gram)
        if other._rows is not None:
            self._sample(other._rows[: len(other._numbers)], other._numbers)

    def _raise_absmax(self, largest: Tensor) -> None:
        self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)

    def _add_total(self, total: Tensor) -> None:
        self.total = total.clone() if self.total is None else self.total.add_(total)

    def _sample(self, x: Tensor, numbers: np.ndarray) -> None:
        """Keep the tokens with the smallest numbers of those held and x [T, in]."""
        if self._rows is None:
            self._rows = x.new_empty(self.capacity, x.shape[1], dtype=torch.float32)
        held = len(self._numbers)
        numbers = np.concatenate([self._numbers, numbers])
        is_kept = np.ones(len(numbers), bool)
        if len(numbers) > self.capacity:
            is_kept[np.argpartition(numbers, self.capacity)[self.capacity :]] = False
        new = np.flatnonzero(is_kept[held:]) + held
        # Into the places of those that are dropped, then into free ones.
        places = np.append(np.flatnonzero(~is_kept[:held]), np.arange(held, self.capacity))
        places = places[: len(new)]
        self._numbers = numbers[: min(len(numbers), self.capacity)].copy()
        self._numbers[places] = numbers[new]
        to, source = (torch.from_numpy(index).to(x.device) for index in (places, new - held))
        self._rows[to] = x[source].float()

    def site(self, seed: int) -> Site:
        """The statistics as methods read them."""
        tokens = None
        if self._rows is not None:
            order = torch.from_numpy(np.argsort(self._numbers)).to(self._rows.device)
            tokens = self._rows[order]
        mean = None if self.total is None else self.total / self.count
        return Site(self.name, seed, tokens, self.absmax, self.gram, self.count, mean)


def _result(
    names: Collection[str],
    seen: Mapping[Hashable, dict[str, _Statistics]],
    seed: int,
    *,
    is_grouped: bool,
) -> Observed:
    for label, parts in seen.items():
        where = f" in group {label!r}" if is_grouped else ""
        refuse_missing(names, parts, f"was not called{where}")
        with_tokens = [name for name in names if parts[name].count]
        refuse_missing(names, with_tokens, f"was called{where}, but saw no tokens")
    # Taken out one by one: a sample and its copy in order exist of one layer at a time.
    if not is_grouped:
        return Observed({name: seen[None].pop(name).site(seed) for name in names}, {})
    by_group: dict[Hashable, dict[str, Site]] = {label: {} for label in seen}
    sites = {}
    for name in names:
        total: _Statistics | None = None
        for label, parts in seen.items():
            part = parts.pop(name)
            total = total or _Statistics(name, part.needs, part.capacity)
            total.include(part)
            by_group[label][name] = part.site(seed)
        if total is not None:
            sites[name] = total.site(seed)
    return Observed(sites, by_group)


def _log_memory(
    modules: Mapping[str, nn.Module], needs: Collection[Need], tokens_per_layer: int, groups: int
) -> None:
    widths = [getattr(module, "in_features", None) for module in modules.values()]
    known = [width for width in widths if isinstance(width, int)]
    unknown = len(widths) - len(known)
    logger.info(
        "observing %s of %d layers in at most %.4g MB%s",
        ", ".join(sorted(needs)) or "the count",
        len(known),
        memory_bytes(known, needs, tokens_per_layer, groups) / 1e6,
        f", and {unknown} of unknown width" if unknown else "",
    )
