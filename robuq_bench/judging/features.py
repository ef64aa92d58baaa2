"""A small digit classifier whose features define `fid_digits` and its companions.

The network is to 8x8 digits what Inception is to ImageNet: pooled features for FID, KID, precision
and recall, an unpooled early map for sFID, logits for the Inception Score. The packaged weights are
made by `python bench.py train-features` and pinned by SHA-256.
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
from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import atomic_write_text, sha256_file
from robuq_bench.models.checkpoints import check_weights

ASSET = Path(__file__).parents[1] / "assets" / "digits_features.safetensors"
ASSET_SHA256 = "b2aaef0a1f1b76cc4054549f0a4e8d4c27b08d43a662e32c525296e9cf4ee31a"
ARCHITECTURE = "robuq-digits-cnn/1"
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 4
IMAGES_SEEN = 60_000
LARGEST_SIZE = 1 << 16


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


class DigitsCNN(nn.Module):
    """Five 3x3 convolutions (32, 32, pool, 64, 64, pool, 64 channels), global mean, linear.

    Input: uint8 [N, 1 or 3, H, W]; a network of one channel averages three, one of three repeats
    one, and any size other than `input_size` is resized by antialiased bilinear interpolation
    (`FeatureNetwork` sees to it that this happens on request only). Output: pool [N, 64], spatial
    [N, 112] (first 7 channels of the third convolution, 4x4, channel first, as ADM takes 7 channels
    of an Inception block), logits [N, classes].

    `pool_scale` and `spatial_scale` give both features a mean variance of 1 over the training
    images, so that distances of networks trained anew stay comparable.
    """

    pool_scale: Tensor
    spatial_scale: Tensor

    def __init__(self, *, input_size: int = 8, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        if input_size % 8 or input_size < 8:
            raise UsageError(f"the feature network needs an input size of 8k, not {input_size}")
        if channels not in (1, 3):
            raise UsageError(f"the feature network sees 1 or 3 channels, not {channels}")
        self.input_size, self.channels = input_size, channels
        widths = (channels, 32, 32, 64, 64, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
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
            if index in (2, 4):
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

    network: DigitsCNN
    heldout_accuracy: float
    training_accuracy: float
    heldout_images: int
    dataset_sha256: str
    settings: dict[str, int | float]


def train_digits_features(
    data: ImageData,
    *,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    heldout_fraction: float = 0.2,
    input_size: int = 8,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> TrainedFeatures:
    """Train a `DigitsCNN` on a dataset of digits (or any small images), float32 on the CPU.

    AdamW (weight decay 1e-3), cosine decay after one warm-up epoch, cross-entropy, random shifts
    by up to input_size / 8 pixels. The held-out images are a seeded `heldout_fraction` of every
    class and are never trained on. Equal seed, data and thread count give equal weights.

    Args:
        epochs: None for as many as show the network 60,000 images.
        input_size: pixels, a multiple of 8; images of other sizes are resized to it. The network
            is then one for images of the size and the channels of `data`.
        progress: called after each epoch with (epoch from 1, epochs, {"loss", "heldout_accuracy"}).

    Raises:
        UsageError: latents, or too few images to hold any out.
    """
    if data.is_latent:
        raise UsageError("a feature network is trained on images, not on latents")
    generator = torch.Generator().manual_seed(seed)
    heldout = _stratified_rows(data.labels, heldout_fraction, generator)
    if not heldout.any() or heldout.all():
        raise UsageError(f"{len(data)} images are too few to hold out {heldout_fraction:.0%}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsCNN(
            input_size=input_size,
            num_classes=int(data.labels.max()) + 1,
            channels=data.images.shape[1],
        )
    x, y = network.prepare(data.images[~heldout]), data.labels[~heldout]
    epochs = epochs or math.ceil(IMAGES_SEEN / len(y))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-3)
    steps_per_epoch = math.ceil(len(y) / batch_size)
    total, step = epochs * steps_per_epoch, 0
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        network.train()
        order, loss_sum = torch.randperm(len(y), generator=generator), 0.0
        for rows in torch.split(order, batch_size):
            warmup = min(1.0, (step + 1) / steps_per_epoch)
            decay = 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.param_groups[0]["lr"] = learning_rate * warmup * decay
            shifted = _random_shift(x[rows], input_size // 8, generator)
            loss = F.cross_entropy(network.features(shifted)[2], y[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            loss_sum, step = loss_sum + loss.item() * len(rows), step + 1
        accuracy = _accuracy(network, data.images[heldout], data.labels[heldout])
        if progress is not None:
            progress(epoch, epochs, {"loss": loss_sum / len(y), "heldout_accuracy": accuracy})
    _set_scales(network, x)
    return TrainedFeatures(
        network=network,
        heldout_accuracy=accuracy,
        training_accuracy=_accuracy(network, data.images[~heldout], y),
        heldout_images=int(heldout.sum()),
        dataset_sha256=data.sha256,
        settings={
            "seed": seed,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "heldout_fraction": heldout_fraction,
            "input_size": input_size,
            "image_size": data.images.shape[-1],
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
) -> tuple[DigitsCNN, dict[str, str], str]:
    """Load a feature network in float64 evaluation mode: (network, metadata, SHA-256 of the file).

    float64 makes features independent of batch size and thread count to about 1e-12. The packaged
    asset is checked against the digest pinned here, other files against their `.sha256`.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not a feature network.
    """
    pinned = expected_sha256 or (ASSET_SHA256 if path == ASSET else None)
    if pinned is None and path.exists() and not sidecar_path(path).exists():
        raise CheckpointError(f"{path} has no {sidecar_path(path).name} to verify it against")
    tensors, metadata = load_tensors(path, expected_sha256=pinned)
    if metadata.get("architecture") != ARCHITECTURE:
        raise CheckpointError(f"{path} does not hold a {ARCHITECTURE!r} feature network")
    try:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", metadata["name"]):
            raise ValueError(f"{metadata['name']!r} is no name for metrics")
        network = DigitsCNN(
            input_size=_size(metadata["input_size"]),
            num_classes=_size(metadata["num_classes"]),
            channels=_size(metadata.get("channels", "1")),  # what older files do not say
        )
        _size(metadata.get("image_size", "1"))
        check_weights(network.state_dict(), tensors)
    except (KeyError, ValueError, TypeError, UsageError, CheckpointError) as error:
        raise CheckpointError(f"{path} does not fit {ARCHITECTURE!r}: {error}") from error
    network.load_state_dict(tensors)
    network.double().eval().requires_grad_(False)
    return network, metadata, pinned or sha256_file(path)


def _size(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST_SIZE:
        raise ValueError(f"a size of {value}")
    return value


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


@torch.no_grad()
def _accuracy(network: DigitsCNN, images: Tensor, labels: Tensor) -> float:
    network.eval()
    guesses = torch.cat([network(part)[2].argmax(1) for part in torch.split(images, 512)])
    return (guesses == labels).double().mean().item()


@torch.no_grad()
def _set_scales(network: DigitsCNN, x: Tensor) -> None:
    network.eval()
    parts = [network.features(part)[:2] for part in torch.split(x, 512)]
    pool, spatial = (torch.cat(column).double() for column in zip(*parts, strict=True))
    network.pool_scale.fill_(pool.var(0).mean().rsqrt().item())
    network.spatial_scale.fill_(spatial.var(0).mean().rsqrt().item())
