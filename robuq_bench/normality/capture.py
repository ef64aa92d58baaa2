"""Tokens at the inputs of linear layers: sampled by hooks, kept in safetensors shards.

Works on any `nn.Module` whose layers see [images, n] or [images, tokens, n]. From every image each
layer keeps the same small number of tokens, drawn without replacement by a generator that depends
only on seed, layer and image, so neither the batch size nor the order of images changes the sample,
and memory is bounded by images x tokens per image x the sum of the layers' widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.quantization.bits import QuantizedInput
from robuq_bench.quantization.watching import find_layers, watching
from robuq_bench.seeds import seeded

FORMAT = "robuq-bench activations 1"


class CapturedTokens(NamedTuple):
    """Tokens of one layer: `tokens` [T, n] in the model's dtype, CPU; `images` [T] int64."""

    tokens: Tensor
    images: Tensor

    def spread(self, count: int) -> CapturedTokens:
        """At most `count` of the tokens, evenly spread, as a copy."""
        if len(self.tokens) <= count:
            return self
        index = torch.linspace(0, len(self.tokens) - 1, count).long()
        return CapturedTokens(self.tokens[index], self.images[index])


Captured = dict[str, CapturedTokens]


class Recorder:
    """Collects the sampled tokens while its hooks are in place; see `record`."""

    def __init__(self, tokens_per_image: int, seed: int, stream: str) -> None:
        self.tokens_per_image, self.seed, self.stream = tokens_per_image, seed, stream
        self.images: Sequence[int] = ()
        self._parts: dict[str, list[CapturedTokens]] = {}

    def add(self, layer: str, x: Tensor) -> None:
        """Sample the input x of `layer`, [images, n] or [images, ..., n]."""
        if not x.is_floating_point() or x.ndim < 2 or len(x) != len(self.images):
            raise UsageError(
                f"layer {layer!r}: expected floats [{len(self.images)} images, ..., n], got "
                f"{x.dtype} {list(x.shape)}; leave the layer out"
            )
        tokens = x.detach().flatten(1, -2) if x.ndim > 2 else x.detach().unsqueeze(1)
        count = min(self.tokens_per_image, tokens.shape[1])
        chosen = np.stack([self._positions(layer, i, tokens.shape[1], count) for i in self.images])
        index = torch.from_numpy(chosen).to(x.device)
        picked = tokens[torch.arange(len(tokens), device=x.device)[:, None], index]
        images = torch.tensor(self.images, dtype=torch.int64).repeat_interleave(count)
        self._parts.setdefault(layer, []).append(CapturedTokens(picked.flatten(0, 1).cpu(), images))

    def _positions(self, layer: str, image: int, total: int, count: int) -> np.ndarray:
        if count == total:
            return np.arange(total)
        seed = seeded("normality/tokens", self.seed, self.stream, layer, image)
        generator = np.random.default_rng(seed)
        return np.sort(generator.choice(total, count, replace=False))

    def result(self) -> Captured:
        """Everything sampled so far, by layer in alphabetical order (as a shard has them)."""
        return {
            layer: CapturedTokens(
                torch.cat([part.tokens for part in parts]),
                torch.cat([part.images for part in parts]),
            )
            for layer, parts in sorted(self._parts.items())
        }


@contextmanager
def record(
    model: nn.Module, layers: Sequence[str], tokens_per_image: int, seed: int, stream: str = ""
) -> Iterator[Recorder]:
    """Hook the named layers of `model`; set `recorder.images` to the ids of a batch, then run it.

    The input of a quantized layer with static centring is x - c, which is all that its quantizer
    and weight see of it: W c is in its bias. `stream` keeps two captures of the same images apart,
    e.g. timesteps.

    Raises:
        UsageError: a name that is not a module of the model.
    """
    recorder = Recorder(tokens_per_image, seed, stream)
    modules = find_layers(model, layers)

    def see(name: str, x: Tensor) -> None:
        module = modules[name]
        recorder.add(name, module.centre_input(x) if isinstance(module, QuantizedInput) else x)

    with watching(modules, see):
        yield recorder


def save_shard(
    path: Path,
    captured: Captured,
    metadata: Mapping[str, str],
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Write one shard, with its SHA-256 beside it; returns the digest.

    Tensors `tokens/<layer>` [T, n] (float32, float16 or bfloat16) and `images/<layer>` [T] int64;
    of layers in `weights` also `weights/<layer>` [out, n], which one shard of a subject may bring.
    """
    tensors: dict[str, Tensor] = {}
    for layer, part in captured.items():
        tensors[f"tokens/{layer}"], tensors[f"images/{layer}"] = part
    for layer, weight in (weights or {}).items():
        tensors[f"weights/{layer}"] = weight.cpu().contiguous()
    return save_tensors(path, tensors, {"format": FORMAT, **metadata})


def load_shard(path: Path) -> tuple[Captured, dict[str, str]]:
    """Read a shard back, memory-mapped: tokens are read from the disk when they are used.

    Raises:
        CheckpointError: missing, damaged, or not such a shard; names the file.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a shard of activations (format {FORMAT!r})")
    captured: Captured = {}
    for name, tokens in tensors.items():
        kind, _, layer = name.partition("/")
        if kind != "tokens":
            continue
        images = tensors.get(f"images/{layer}")
        if images is None or tokens.ndim != 2 or images.shape != tokens.shape[:1]:
            raise CheckpointError(
                f"{path}: layer {layer!r} needs tokens/{layer} [T, n] and images/{layer} [T]"
            )
        captured[layer] = CapturedTokens(tokens, images.to(torch.int64))
    if not captured:
        raise CheckpointError(f"{path}: holds no tensors named tokens/<layer>")
    return dict(sorted(captured.items())), metadata


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights [out, n] by layer that a shard brings, memory-mapped; often none.

    Raises:
        CheckpointError: missing or damaged, or a weight that does not fit its layer's tokens.
    """
    tensors, _ = load_tensors(path)
    found = {}
    for name, weight in tensors.items():
        kind, _, layer = name.partition("/")
        if kind != "weights":
            continue
        tokens = tensors.get(f"tokens/{layer}")
        if weight.ndim != 2 or tokens is None or tokens.shape[-1] != weight.shape[1]:
            raise CheckpointError(
                f"{path}: {name} {list(weight.shape)} needs tokens/{layer} of as many inputs "
                "beside it"
            )
        found[layer] = weight
    return found
