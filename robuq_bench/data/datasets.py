"""Datasets as one uint8 tensor and its labels: `load_dataset(workload.data) -> ImageData`.

Every loader is deterministic down to the bit, so `ImageData.sha256` identifies what was trained on.
A missing folder raises MissingResourceError, a damaged file CheckpointError naming that file, and a
request that does not fit the data UsageError. Nothing is ever downloaded.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robuq_bench.data import fashion28
from robuq_bench.data.content import content_sha256
from robuq_bench.data.files import (
    EMBEDDED,
    data_digest,
    data_path,
    find_heldout_pair,
    find_idx_pair,
    find_images,
    find_shards,
    listing,
    mnist_folder,
)
from robuq_bench.data.idx import pad_to, read_idx_pair
from robuq_bench.data.images import center_crop, read_image
from robuq_bench.errors import CheckpointError, UsageError, suggest
from robuq_bench.runs.digests import refuse_change

__all__ = [
    "ImageData",
    "center_crop",
    "content_sha256",
    "load_dataset",
    "load_heldout",
    "make_image_data",
    "pad_to",
    "to_model_range",
]

logger = logging.getLogger(__name__)

DIGITS_SHA256 = "4318f5a27219c590b940ba973e958df4400d5d29c511695d051ee1f513e87fd9"
SYNTHETIC_IMAGES, SYNTHETIC_SEED = 2048, 20240
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SD_SCALING_FACTOR = 0.18215  # of Stable Diffusion 1's VAE
SCALE_SAMPLE = 4096


class DataSection(Protocol):
    """The fields of `Workload.data` that the loaders read."""

    @property
    def source(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def image_size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_classes(self) -> int: ...


@dataclass(frozen=True)
class ImageData:
    """A dataset held in memory.

    Attributes:
        images: uint8 [N, C, H, W], 0..255; for `latents` float32 [N, C, H, W], already VAE-scaled.
        labels: int64 [N], 0..num_classes-1.
        source: what was read, for provenance ("digits", "idx:train", ...); never a local path.
        sha256: content hash of images and labels with their shapes and dtypes (64 hex digits).
        part_of: the same of the larger set that these images were chosen from; "" if there is none.
    """

    images: Tensor
    labels: Tensor
    source: str
    sha256: str
    part_of: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_latent(self) -> bool:
        """True when `images` are VAE latents rather than pixels."""
        return self.images.dtype != torch.uint8

    def model_inputs(self, indices: Tensor) -> Tensor:
        """Return the float32 [n, C, H, W] model inputs of these rows (int64 [n])."""
        selected = self.images[indices]
        return selected.float() if self.is_latent else to_model_range(selected)


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 [-1, 1] by x / 127.5 - 1; `to_uint8` inverts it exactly."""
    if images.dtype != torch.uint8:
        raise UsageError(f"to_model_range needs uint8 images, got {images.dtype}")
    return images.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Map a float [-1, 1] tensor to uint8 by clamp(127.5 x + 128, 0, 255), then truncation."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8)


def load_dataset(data: DataSection, *, name: str | None = None) -> ImageData:
    """Load the dataset that a workload's `data` section describes.

    Args:
        data: source, path, image_size (pixels), channels, num_classes.
        name: workload name; without `data.path`, ROBUQ_DATA_<NAME> is looked up for the path.

    Raises:
        UsageError: the section asks for a size, channel or class count the data does not have.
        MissingResourceError: a file or folder is absent; the message says where to get or set it.
        CheckpointError: a file is there but cannot be read or fails its checksum, or the data are
            not those that `data.sha256` names.
    """
    loader = _LOADERS.get(data.source)
    if loader is None:
        raise UsageError(f"unknown data source {data.source!r}{suggest(data.source, _LOADERS)}")
    images, labels, source = loader(data, name)
    _check_shape(images, labels, source, data)
    _check_identity(data, name)
    loaded = make_image_data(images, labels, source)
    is_part = data.source == "fashion28"
    return replace(loaded, part_of=fashion28.WHOLE_SHA256) if is_part else loaded


def load_heldout(data: DataSection, *, name: str | None = None) -> ImageData | None:
    """Load the images that came with a data set to be tested on; None where it has none.

    They are embedded for `fashion28` and the t10k files of an IDX folder, torchvision's included,
    that holds the training set too. `digits`, `synthetic`, image folders and latents have none.

    Raises:
        As `load_dataset`, of which they have the classes and the shape.
    """
    if data.source == "fashion28":
        images, labels = fashion28.read("t10k")
    elif data.source in ("idx", "mnist-torchvision"):
        path = data_path(data.source, data.path, name)
        pair = find_heldout_pair(path if data.source == "idx" else mnist_folder(path))
        if pair is None:
            return None
        images, labels = read_idx_pair(*pair, data.image_size)
    else:
        return None
    source = f"{data.source}:t10k"
    _check_shape(images, labels, source, data)
    return make_image_data(images, labels, source)


def _check_shape(images: Tensor, labels: Tensor, source: str, data: DataSection) -> None:
    """Refuse images and labels that are not as many, or not those that the section describes."""
    if len(labels) != len(images) or len(labels) == 0:
        raise CheckpointError(f"{source}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= max(data.num_classes, 1):
        raise UsageError(
            f"{source} has labels {int(labels.min())}..{int(labels.max())}, but data.num_classes "
            f"is {data.num_classes}; set data.num_classes={int(labels.max()) + 1}"
        )
    _warn_of_absent_classes(labels, data.num_classes, source)
    if images.shape[1] != data.channels:
        raise UsageError(
            f"{source} has {images.shape[1]} channel(s), but data.channels is {data.channels}"
        )
    if tuple(images.shape[2:]) != (data.image_size, data.image_size):
        raise UsageError(
            f"{source} gives {images.shape[2]}x{images.shape[3]} images, but data.image_size is "
            f"{data.image_size}"
        )


def _check_identity(data: DataSection, name: str | None) -> None:
    """Refuse data that changed between planning and reading, or are not the ones stated."""
    if data.sha256 is None:
        return
    if data.source in EMBEDDED:
        raise UsageError(f"data.sha256 is for files; source {data.source!r} has none: leave it out")
    path = data_path(data.source, data.path, name)
    refuse_change(data_digest(data.source, path), data.sha256, f"the data in {path}")


def _warn_of_absent_classes(labels: Tensor, num_classes: int, source: str) -> None:
    absent = sorted(set(range(num_classes)) - set(labels.unique().tolist()))
    if absent:
        logger.warning(
            "%s has images of %d of data.num_classes=%d classes (the first without is %d); samples "
            "are drawn from all of them",
            source,
            num_classes - len(absent),
            num_classes,
            absent[0],
        )


def make_image_data(images: Tensor, labels: Tensor, source: str) -> ImageData:
    """Bundle images (uint8 or float32 [N,C,H,W]) and int64 [N] labels with their content hash."""
    return ImageData(images, labels, source, content_sha256(images, labels))


def _load_digits(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """scikit-learn's 1,797 8x8 digits; grey v in 0..16 becomes (255 v + 8) // 16 (halves up)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = bunch.images.astype(np.int64)
    pixels = ((255 * grey + 8) // 16).astype(np.uint8)
    images = torch.from_numpy(pixels)[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    if content_sha256(images, labels) != DIGITS_SHA256:
        raise CheckpointError(
            "the digits that this scikit-learn ships are not those of the `digits` workload; "
            "install the pinned version"
        )
    return images, labels, "digits"


def _load_fashion28(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """10,000 of the 60,000 training images of Fashion-MNIST; `fashion28.py` says which."""
    return *fashion28.read("train"), "fashion28:train"


def _load_idx(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """IDX files (raw or .gz), by folder or by images file; zero-padded to data.image_size."""
    path = data_path(data.source, data.path, name)
    images_file, labels_file, split = find_idx_pair(path)
    if split == "t10k" and path.is_dir():
        logger.warning("%s has no training set; using the t10k test set", path)
    images, labels = read_idx_pair(images_file, labels_file, data.image_size)
    return images, labels, f"idx:{split}"


def _load_torchvision_mnist(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """The training set in the files of torchvision.datasets.MNIST; padded to data.image_size.

    They are IDX files; torchvision itself would also unpickle what its old versions left there.
    """
    path = data_path(data.source, data.path, name)
    images_file, labels_file, _ = find_idx_pair(mnist_folder(path))
    return *read_idx_pair(images_file, labels_file, data.image_size), "mnist-torchvision:train"


def _load_imagefolder(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """Images in one folder per class, in name order; a folder without subfolders is one class."""
    path = data_path(data.source, data.path, name)
    if data.channels not in (1, 3):
        raise UsageError(f"imagefolder gives 1 or 3 channels, data.channels is {data.channels}")
    found = find_images(path)
    _require_memory(len(found.items) * data.channels * data.image_size**2, path)
    images = torch.empty(len(found.items), data.channels, data.image_size, data.image_size).byte()
    remarks: dict[str, list[Path]] = {}
    deep = [c for c in found.classes if not any(file.parent.name == c for file, _ in found.items)]
    if deep and len(deep) == len(found.classes):
        logger.warning(
            "%s: no class folder holds images itself, only in folders of its own (%s), each of "
            "which becomes part of that class; is data.path one level too high?",
            path,
            ", ".join(deep[:5]),
        )
    if found.left_out:
        remarks["not read, being hidden or no images by their names"] = found.left_out
    for row, (file, _) in enumerate(found.items):
        pixels, said = read_image(file, data.image_size, data.channels)
        images[row] = torch.from_numpy(pixels)
        for remark in said:
            remarks.setdefault(remark, []).append(file)
    for remark, files in remarks.items():
        logger.warning("%s: %d file(s) %s: %s", path, len(files), remark, listing(files))
    labels = torch.tensor([label for _, label in found.items], dtype=torch.int64)
    return images, labels, f"imagefolder:{len(found.classes) or 1} classes"


def _require_memory(num_bytes: int, path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total // 2:
        raise UsageError(
            f"{path} decodes to {num_bytes / 2**30:.1f} GiB, more than half of this machine's "
            f"memory ({total / 2**30:.1f} GiB); encode it once and use data.source=latents"
        )


def _load_latents(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """Shards `*.safetensors` with `latents` [n,C,H,W] (float) and `labels` [n], each beside its
    `<shard>.sha256`; read in name order, returned as float32."""
    path = data_path(data.source, data.path, name)
    shards = find_shards(path)
    parts = [_read_shard(shard) for shard in shards]
    if len({tuple(latents.shape[1:]) for latents, _ in parts}) > 1:
        raise CheckpointError(f"the shards in {path} hold latents of different shapes")
    latents, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    _warn_of_scale(latents, path)
    return latents, labels, f"latents:{len(shards)} shards"


def _read_shard(shard: Path) -> tuple[Tensor, Tensor]:
    """Latents float32 [n,C,H,W] and labels int64 [n] of one shard, all finite."""
    from robuq_bench.checkpointing import load_tensors, sidecar_path

    sidecar = sidecar_path(shard)
    if not sidecar.is_file():
        raise CheckpointError(f"{shard} has no {sidecar.name}; write it with sha256sum")
    tensors, _ = load_tensors(shard)
    if not {"latents", "labels"} <= tensors.keys():
        raise CheckpointError(f"{shard} must hold latents [n,C,H,W] and labels [n]")
    latents, labels = tensors["latents"], tensors["labels"]
    if latents.ndim != 4 or not latents.is_floating_point() or len(latents) == 0:
        raise CheckpointError(
            f"{shard}: latents must be floating-point [n,C,H,W] with n > 0, got {latents.dtype} "
            f"{tuple(latents.shape)}"
        )
    whole = labels.dtype in INTEGERS and labels.shape == (len(latents),)
    if not whole or labels.min() < 0:
        least = f", least {int(labels.min())}" if whole else ""
        raise CheckpointError(
            f"{shard}: labels must be whole numbers from 0 of shape [{len(latents)}], one per "
            f"latent; got {labels.dtype} {tuple(labels.shape)}{least}"
        )
    latents = latents.float()
    bad = (~latents.isfinite()).flatten(1).any(1).nonzero()[:, 0]
    if len(bad):
        raise CheckpointError(
            f"{shard}: {len(bad)} of {len(latents)} latents are not finite, the first is number "
            f"{int(bad[0])}; encode them anew (in float32: half precision overflows in the VAE)"
        )
    return latents, labels.to(torch.int64)


def _warn_of_scale(latents: Tensor, path: Path) -> None:
    """Diffusion takes data of about unit variance, which the VAE's factor is there for."""
    channels = latents[:SCALE_SAMPLE].double().transpose(0, 1).flatten(1)
    std = math.sqrt(float(channels.var(1, correction=0).mean()))
    if 0.5 <= std <= 2:
        return
    guess = ""
    if 0.5 <= std * SD_SCALING_FACTOR <= 2:
        guess = f": they look as if they were not multiplied by {SD_SCALING_FACTOR}"
    elif 0.5 <= std / SD_SCALING_FACTOR <= 2:
        guess = f": they look as if they were multiplied by {SD_SCALING_FACTOR} twice"
    logger.warning(
        "%s: the latents have a standard deviation of %.3g where a diffusion model expects about "
        "1%s. Encode with latents = scaling_factor * vae.encode(image) (Stable Diffusion 1: %s)",
        path,
        std,
        guess,
        SD_SCALING_FACTOR,
    )


def _load_synthetic(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """2,048 seeded Gaussian-mixture images: a smooth mean per class, shared noise of sd 24/255."""
    generator = torch.Generator().manual_seed(SYNTHETIC_SEED)
    classes = max(data.num_classes, 1)
    size, channels = data.image_size, data.channels
    coarse = torch.rand(classes, channels, 3, 3, generator=generator) * 191 + 32
    means = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    labels = torch.arange(SYNTHETIC_IMAGES) % classes
    noise = torch.randn(SYNTHETIC_IMAGES, channels, size, size, generator=generator)
    images = (means[labels] + 24.0 * noise).round().clamp(0, 255).to(torch.uint8)
    return images, labels, f"synthetic:seed {SYNTHETIC_SEED}"


_LOADERS = {
    "digits": _load_digits,
    "fashion28": _load_fashion28,
    "idx": _load_idx,
    "mnist-torchvision": _load_torchvision_mnist,
    "imagefolder": _load_imagefolder,
    "latents": _load_latents,
    "synthetic": _load_synthetic,
}
