"""Small classifiers whose features define `fid_digits`, `fid_fashion28` and their companions.

They are to small images what Inception is to ImageNet: pooled features for FID, KID, precision and
recall, an unpooled early map for sFID, logits for the Inception Score. The packaged weights are
made by `python bench.py train-features`, with the command on their card, and pinned by SHA-256.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.checkpointing import load_tensors, save_tensors, sidecar_path
from robuq_bench.config.workload import ASSETS, FEATURES_SUFFIX
from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import atomic_write_text, sha256_file
from robuq_bench.judging.feature_recipe import (
    HALVINGS,
    WIDTHS,
    FeatureRecipe,
    check_architecture,
)
from robuq_bench.models.checkpoints import check_weights

ARCHITECTURE = "robuq-digits-cnn/1"
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 4
LARGEST_SIZE = 1 << 16


def features_asset(name: str) -> Path:
    """Where the packaged network of this name is, or would be."""
    return ASSETS / f"{name}{FEATURES_SUFFIX}"


ASSET = features_asset("digits")


@dataclass(frozen=True)
class Features:
    """What a feature network says of N images, on the CPU.

    Attributes:
        pool: [N, d] pooled penultimate features.
        spatial: [N, s] flattened unpooled features of an early layer.
        logits: [N, c] class scores before the softmax.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, rows: slice | Tensor) -> Features:
        return Features(self.pool[rows], self.spatial[rows], self.logits[rows])


class FeatureCNN(nn.Module):
    """3x3 convolutions of `widths` channels, halved before `halvings`, global mean, linear.

    Input: uint8 [N, 1 or 3, H, W]; a network of one channel averages three, one of three repeats
    one, and any size other than `input_size` is resized by antialiased bilinear interpolation
    (`FeatureNetwork` sees to it that this happens on request only). Output: pool [N, widths[-1]],
    spatial [N, 112] (first 7 channels of the third convolution, averaged to 4x4, channel first, as
    ADM takes 7 channels of an Inception block), logits [N, classes].

    `pool_scale` and `spatial_scale` give both features a mean variance of 1 over the training
    images, so that distances of networks trained anew stay comparable.
    """

    pool_scale: Tensor
    spatial_scale: Tensor

    def __init__(
        self,
        *,
        input_size: int = 8,
        num_classes: int = 10,
        channels: int = 1,
        widths: tuple[int, ...] = WIDTHS,
        halvings: tuple[int, ...] = HALVINGS,
    ) -> None:
        super().__init__()
        multiple = 2 ** len(halvings)
        if input_size % multiple or input_size < 8:
            raise UsageError(
                f"the feature network needs an input size of 8 or more that is a multiple of "
                f"{multiple}, not {input_size}"
            )
        if channels not in (1, 3):
            raise UsageError(f"the feature network sees 1 or 3 channels, not {channels}")
        self.input_size, self.channels = input_size, channels
        self.widths, self.halvings = widths, halvings
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False)
            for a, b in itertools.pairwise((channels, *widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.register_buffer("pool_scale", torch.ones(()))
        self.register_buffer("spatial_scale", torch.ones(()))

    def prepare(self, images: Tensor) -> Tensor:
        """Turn uint8 [N, 1 or 3, H, W] into [N, channels, input_size, input_size] in [-1, 1]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UsageError(
                f"feature networks take uint8 [N, 1 or 3, H, W], got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        x = images.to(self.classifier.weight.dtype)
        x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
        x = x / 127.5 - 1
        size = (self.input_size, self.input_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (pool, spatial, logits) of uint8 images."""
        return self.features(self.prepare(images))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (pool, spatial, logits) of `prepare`d images."""
        spatial = x
        for index, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            if index in self.halvings:
                x = F.avg_pool2d(x, 2)
            x = F.relu(norm(convolution(x)))
            if index == 2:
                spatial = x[:, :SPATIAL_CHANNELS]
        pool = x.mean((2, 3))
        spatial = F.adaptive_avg_pool2d(spatial, SPATIAL_SIDE).flatten(1)
        logits = self.classifier(pool)
        return pool * self.pool_scale, spatial * self.spatial_scale, logits


@dataclass(frozen=True)
class TrainedFeatures:
    """A trained network with what its card records; accuracies are fractions in [0, 1]."""

    network: FeatureCNN
    heldout_accuracy: float
    training_accuracy: float
    heldout_images: int
    dataset_sha256: str
    settings: dict[str, int | float | str]


def train_feature_network(
    data: ImageData,
    recipe: FeatureRecipe | None = None,
    *,
    heldout: ImageData | None = None,
    seed: int = 0,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> TrainedFeatures:
    """Train a `FeatureCNN` to name the classes of small images, float32 on the CPU.

    AdamW (weight decay 1e-3), cosine decay after one warm-up epoch, cross-entropy, random shifts
    and, if asked for, flips. Held-out images are never trained on: `heldout`, or else a seeded
    `recipe.heldout_fraction` of every class. Equal seed, data and thread count give equal weights
    on equal processors.

    Args:
        recipe: None for its defaults.
        heldout: images and labels like those of `data`, to measure accuracy on.
        progress: called after each epoch with (epoch from 1, epochs, {"loss", "heldout_accuracy"}).

    Raises:
        UsageError: latents, or too few images to hold any out.
    """
    if data.is_latent:
        raise UsageError("a feature network is trained on images, not on latents")
    recipe = recipe or FeatureRecipe()
    generator = torch.Generator().manual_seed(seed)
    if heldout is None:
        rows = _stratified_rows(data.labels, recipe.heldout_fraction, generator)
        if not rows.any() or rows.all():
            raise UsageError(
                f"{len(data)} images are too few to hold out {recipe.heldout_fraction:.0%}"
            )
        judged_on, tests, answers = "", data.images[rows], data.labels[rows]
        images, y = data.images[~rows], data.labels[~rows]
    else:
        judged_on, tests, answers = heldout.source, heldout.images, heldout.labels
        images, y = data.images, data.labels
    pixels = images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureCNN(
            input_size=recipe.input_size or -(-pixels // 8) * 8,
            num_classes=int(data.labels.max()) + 1,
            channels=images.shape[1],
            widths=recipe.widths,
            halvings=recipe.halvings,
        )
    x, shift = network.prepare(images), recipe.shift
    shift = network.input_size // 8 if shift is None else shift
    epochs = recipe.epochs or math.ceil(recipe.images_seen / len(y))
    is_bf16 = recipe.precision == "bf16"
    if is_bf16:
        _lay_out(network, torch.channels_last)  # of oneDNN's bf16 kernels
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    steps_per_epoch = math.ceil(len(y) / recipe.batch_size)
    total, step = epochs * steps_per_epoch, 0
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        network.train()
        order, loss_sum = torch.randperm(len(y), generator=generator), 0.0
        for rows in torch.split(order, recipe.batch_size):
            warmup = min(1.0, (step + 1) / steps_per_epoch)
            decay = 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * warmup * decay
            seen = _random_shift(x[rows], shift, generator)
            if recipe.flip:
                seen = _random_flip(seen, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                logits = network.features(seen)[2]
            loss = F.cross_entropy(logits.float(), y[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            loss_sum, step = loss_sum + loss.item() * len(rows), step + 1
        accuracy = _accuracy(network, tests, answers)
        if progress is not None:
            progress(epoch, epochs, {"loss": loss_sum / len(y), "heldout_accuracy": accuracy})
    _lay_out(network, torch.contiguous_format)
    _set_scales(network, x)
    return TrainedFeatures(
        network=network,
        heldout_accuracy=accuracy,
        training_accuracy=_accuracy(network, images, y),
        heldout_images=len(answers),
        dataset_sha256=data.sha256,
        settings={
            "seed": seed,
            "epochs": epochs,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            **({"heldout": judged_on} if judged_on else {}),
            **({} if judged_on else {"heldout_fraction": recipe.heldout_fraction}),
            "widths": _listed(network.widths),
            "halvings": _listed(network.halvings),
            "shift": shift,
            "flip": int(recipe.flip),
            "precision": recipe.precision,
            "input_size": network.input_size,
            "image_size": pixels,
            "channels": network.channels,
            "threads": torch.get_num_threads(),
        },
    )


def save_features(path: Path, trained: TrainedFeatures, *, name: str, command: str) -> str:
    """Write weights, their `.sha256` and a `.json` card beside them; return the SHA-256.

    Args:
        name: what the features are called in metric names, before the start of their SHA-256
            ("mine" gives `fid_mine-1a2b3c4d`).
        command: the shell command that remakes the file, for the card.
    """
    facts: dict[str, str | int | float] = {
        "name": name,
        "architecture": ARCHITECTURE,
        "input_size": trained.network.input_size,
        "num_classes": trained.network.classifier.out_features,
        "heldout_accuracy": round(trained.heldout_accuracy, 6),
        "training_accuracy": round(trained.training_accuracy, 6),
        "heldout_images": trained.heldout_images,
        "dataset_sha256": trained.dataset_sha256,
        "command": command,
        "torch": torch.__version__,
        **trained.settings,
    }
    digest = save_tensors(
        path, trained.network.state_dict(), {key: str(value) for key, value in facts.items()}
    )
    card = {"sha256": digest, "licence": "Apache-2.0", **facts}
    atomic_write_text(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    return digest


def load_features(
    path: Path = ASSET, *, expected_sha256: str | None = None
) -> tuple[FeatureCNN, dict[str, str], str]:
    """Load a feature network in float64 evaluation mode: (network, metadata, SHA-256 of the file).

    float64 makes features independent of batch size and thread count to about 1e-12. The file is
    checked against `expected_sha256`, or else against its `.sha256`.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not a feature network.
    """
    if expected_sha256 is None and path.exists() and not sidecar_path(path).exists():
        raise CheckpointError(f"{path} has no {sidecar_path(path).name} to verify it against")
    tensors, metadata = load_tensors(path, expected_sha256=expected_sha256)
    if metadata.get("architecture") != ARCHITECTURE:
        raise CheckpointError(f"{path} does not hold a {ARCHITECTURE!r} feature network")
    try:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", metadata["name"]):
            raise ValueError(f"{metadata['name']!r} is no name for metrics")
        widths = _numbers(metadata.get("widths", _listed(WIDTHS)))
        halvings = _numbers(metadata.get("halvings", _listed(HALVINGS)))
        check_architecture(widths, halvings)
        network = FeatureCNN(
            input_size=_size(metadata["input_size"]),
            num_classes=_size(metadata["num_classes"]),
            # what older files do not say
            channels=_size(metadata.get("channels", "1")),
            widths=widths,
            halvings=halvings,
        )
        _size(metadata.get("image_size", "1"))
        check_weights(network.state_dict(), tensors)
    except (KeyError, ValueError, TypeError, UsageError, CheckpointError) as error:
        raise CheckpointError(f"{path} does not fit {ARCHITECTURE!r}: {error}") from error
    network.load_state_dict(tensors)
    network.double().eval().requires_grad_(False)
    return network, metadata, expected_sha256 or sha256_file(path)


def _size(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST_SIZE:
        raise ValueError(f"a size of {value}")
    return value


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_size(part) for part in text.split(",") if part)


def _stratified_rows(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Bool [N]: a random `fraction` (rounded) of the rows of every class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        rows = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator)
        chosen[rows[order[: round(fraction * len(rows))]]] = True
    return chosen


def _random_shift(x: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Shift each image [N, C, S, S] by -limit..limit pixels in both directions, filling with -1."""
    size = x.shape[-1]
    windows = F.pad(x, (limit,) * 4, value=-1.0).unfold(2, size, 1).unfold(3, size, 1)
    dy, dx = torch.randint(2 * limit + 1, (2, len(x)), generator=generator)
    return windows[torch.arange(len(x)), :, dy, dx]


def _lay_out(network: FeatureCNN, memory_format: torch.memory_format) -> None:
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it


def _random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images of [N, C, S, S] left to right, each with probability one half."""
    is_flipped = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(is_flipped[:, None, None, None], x.flip(-1), x)


@torch.no_grad()
def _accuracy(network: FeatureCNN, images: Tensor, labels: Tensor) -> float:
    network.eval()
    guesses = torch.cat([network(part)[2].argmax(1) for part in torch.split(images, 512)])
    return (guesses == labels).double().mean().item()


@torch.no_grad()
def _set_scales(network: FeatureCNN, x: Tensor) -> None:
    network.eval()
    parts = [network.features(part)[:2] for part in torch.split(x, 512)]
    pool, spatial = (torch.cat(column).double() for column in zip(*parts, strict=True))
    network.pool_scale.fill_(pool.var(0).mean().rsqrt().item())
    network.spatial_scale.fill_(spatial.var(0).mean().rsqrt().item())
