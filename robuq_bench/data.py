"""Datasets as one uint8 tensor and its labels: `load_dataset(workload.data) -> ImageData`.

Every loader is deterministic down to the bit, so `ImageData.sha256` identifies what was trained on.
A missing folder raises MissingResourceError, a damaged file CheckpointError naming that file, and a
request that does not fit the data UsageError. Nothing is ever downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError, suggest
from robuq_bench.files import expand_user

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
IDX_FOLDERS = ("", "raw", "MNIST/raw")
IDX_MAGIC_IMAGES, IDX_MAGIC_LABELS = 0x0803, 0x0801
SYNTHETIC_IMAGES, SYNTHETIC_SEED = 2048, 20240


class DataSection(Protocol):
    """The fields of `Workload.data` that the loaders read."""

    @property
    def source(self) -> str: ...
    @property
    def path(self) -> str | None: ...
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
    """

    images: Tensor
    labels: Tensor
    source: str
    sha256: str

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
        CheckpointError: a file is there but cannot be read or fails its checksum.
    """
    loader = _LOADERS.get(data.source)
    if loader is None:
        raise UsageError(f"unknown data source {data.source!r}{suggest(data.source, _LOADERS)}")
    images, labels, source = loader(data, name)
    if len(labels) != len(images) or len(labels) == 0:
        raise CheckpointError(f"{source}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= max(data.num_classes, 1):
        raise UsageError(
            f"{source} has labels {int(labels.min())}..{int(labels.max())}, but data.num_classes "
            f"is {data.num_classes}; set data.num_classes={int(labels.max()) + 1}"
        )
    if images.shape[1] != data.channels:
        raise UsageError(
            f"{source} has {images.shape[1]} channel(s), but data.channels is {data.channels}"
        )
    if tuple(images.shape[2:]) != (data.image_size, data.image_size):
        raise UsageError(
            f"{source} gives {images.shape[2]}x{images.shape[3]} images, but data.image_size is "
            f"{data.image_size}"
        )
    return make_image_data(images, labels, source)


def make_image_data(images: Tensor, labels: Tensor, source: str) -> ImageData:
    """Bundle images (uint8 or float32 [N,C,H,W]) and int64 [N] labels with their content hash."""
    return ImageData(images, labels, source, content_sha256(images, labels))


def content_sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 (64 hex) of tensors' dtypes, shapes and row-major little-endian bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_digits(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """scikit-learn's 1,797 8x8 digits; grey v in 0..16 becomes (255 v + 8) // 16 (halves up)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = bunch.images.astype(np.int64)
    pixels = ((255 * grey + 8) // 16).astype(np.uint8)
    return (
        torch.from_numpy(pixels)[:, None],
        torch.from_numpy(bunch.target.astype(np.int64)),
        "digits",
    )


def _load_idx(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """IDX files (raw or .gz), by folder or by images file; zero-padded to data.image_size."""
    path = _existing_path(data, name, "the folder with train-images-idx3-ubyte(.gz) and its labels")
    images_file, labels_file, split = _find_idx_pair(path)
    images = _read_idx(images_file, IDX_MAGIC_IMAGES)
    labels = _read_idx(labels_file, IDX_MAGIC_LABELS)
    tensor = pad_to(torch.from_numpy(images)[:, None], data.image_size)
    return tensor, torch.from_numpy(labels.astype(np.int64)), f"idx:{split}"


def _find_idx_pair(path: Path) -> tuple[Path, Path, str]:
    if path.is_file():
        split = path.name.split("-images")[0]
        if "-images" not in path.name:
            raise UsageError(f"{path}: an IDX images file is named <split>-images-idx3-ubyte[.gz]")
        return path, _idx_file(path.parent, split, "labels-idx1-ubyte"), split
    folders = [path / sub for sub in IDX_FOLDERS if (path / sub).is_dir()]
    for split in ("train", "t10k"):
        for folder in folders:
            for suffix in ("", ".gz"):
                images = folder / f"{split}-images-idx3-ubyte{suffix}"
                if images.is_file():
                    if split == "t10k":
                        logger.warning("%s has no training set; using the t10k test set", path)
                    return images, _idx_file(folder, split, "labels-idx1-ubyte"), split
    raise MissingResourceError(
        f"no train-images-idx3-ubyte or t10k-images-idx3-ubyte (.gz or not) in {path}; "
        "put MNIST-style IDX files there or point data.path at their folder"
    )


def _idx_file(folder: Path, split: str, kind: str) -> Path:
    for suffix in ("", ".gz"):
        candidate = folder / f"{split}-{kind}{suffix}"
        if candidate.is_file():
            return candidate
    raise MissingResourceError(f"{folder / f'{split}-{kind}'}(.gz) is missing beside its images")


def _read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist), checking its size."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(
            f"{path} is unreadable or cut short ({error}); copy it anew"
        ) from error
    dims = magic & 0xFF
    header = 4 + 4 * dims
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise CheckpointError(f"{path} is not a {dims}-dimensional IDX file of unsigned bytes")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise CheckpointError(
            f"{path} announces {shape} but holds {len(raw) - header} bytes; copy it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def pad_to(images: Tensor, size: int) -> Tensor:
    """Zero-pad uint8 [N, C, h, w] evenly to [N, C, size, size]; never crops or resizes."""
    height, width = images.shape[-2:]
    extra_h, extra_w = size - height, size - width
    if extra_h < 0 or extra_w < 0 or extra_h % 2 or extra_w % 2:
        raise UsageError(
            f"cannot pad {height}x{width} images evenly to data.image_size={size}; "
            f"use {height}, {height + 2}, {height + 4}, ..."
        )
    border = (extra_w // 2, extra_w // 2, extra_h // 2, extra_h // 2)
    return torch.nn.functional.pad(images, border)


def _load_torchvision_mnist(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """torchvision.datasets.MNIST's training set, found on disk only; padded to data.image_size."""
    path = _existing_path(data, name, "the root folder of torchvision.datasets.MNIST")
    from robuq_bench._compat import import_torchvision

    torchvision = import_torchvision()
    try:
        mnist = torchvision.datasets.MNIST(root=str(path), train=True, download=False)
    except RuntimeError as error:
        raise MissingResourceError(
            f"torchvision finds no MNIST under {path} ({error}); run "
            f"torchvision.datasets.MNIST({str(path)!r}, download=True) once, or use "
            "data.source=idx with your own IDX files"
        ) from error
    images = pad_to(mnist.data[:, None].to(torch.uint8), data.image_size)
    return images, mnist.targets.to(torch.int64), "mnist-torchvision:train"


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop to size x size as ADM does: halve with BOX while the short side is at least 2 size,
    resize it to `size` with BICUBIC, then cut the centre (offsets floor((side - size) / 2)).

    Source: openai/guided-diffusion, image_datasets.py (protocol only); EXIF rotation is ignored.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _load_imagefolder(data: DataSection, name: str | None) -> tuple[Tensor, Tensor, str]:
    """Images in one folder per class, in name order; a folder without subfolders is one class."""
    path = _existing_path(data, name, "a folder with one subfolder of images per class")
    if data.channels not in (1, 3):
        raise UsageError(f"imagefolder gives 1 or 3 channels, data.channels is {data.channels}")
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    items = [
        (file, label)
        for label, folder in enumerate(classes or [path])
        for file in sorted(folder.rglob("*") if classes else folder.iterdir())
        if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not items:
        raise MissingResourceError(
            f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); point data.path at them"
        )
    _require_memory(len(items) * data.channels * data.image_size**2, path)
    images = torch.empty(len(items), data.channels, data.image_size, data.image_size).byte()
    for row, (file, _) in enumerate(items):
        images[row] = _read_image(file, data.image_size, data.channels)
    labels = torch.tensor([label for _, label in items], dtype=torch.int64)
    return images, labels, f"imagefolder:{len(classes) or 1} classes"


def _read_image(file: Path, size: int, channels: int) -> Tensor:
    try:
        with Image.open(file) as opened:
            image = center_crop(opened.convert("RGB" if channels == 3 else "L"), size)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise CheckpointError(
            f"{file} is not a readable image ({error}); replace or remove it"
        ) from error
    pixels = np.asarray(image, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


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
    path = _existing_path(data, name, "a folder of *.safetensors latent shards")
    from robuq_bench.checkpointing import load_tensors

    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not shards:
        raise MissingResourceError(f"{path} holds no *.safetensors latent shards")
    latents, labels = [], []
    for shard in shards:
        sidecar = shard.with_name(shard.name + ".sha256")
        if not sidecar.is_file():
            raise CheckpointError(f"{shard} has no {sidecar.name}; write it with sha256sum")
        tensors, _ = load_tensors(shard)
        if not {"latents", "labels"} <= tensors.keys() or tensors["latents"].ndim != 4:
            raise CheckpointError(f"{shard} must hold latents [n,C,H,W] and labels [n]")
        latents.append(tensors["latents"].float())
        labels.append(tensors["labels"].to(torch.int64))
    if len({tuple(part.shape[1:]) for part in latents}) > 1:
        raise CheckpointError(f"the shards in {path} hold latents of different shapes")
    return torch.cat(latents), torch.cat(labels), f"latents:{len(shards)} shards"


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


def _existing_path(data: DataSection, name: str | None, what: str) -> Path:
    variable = f"ROBUQ_DATA_{name.upper().replace('-', '_')}" if name else "ROBUQ_DATA_<WORKLOAD>"
    text = data.path or (os.environ.get(variable) if name else None)
    hint = f"set {variable}=PATH or pass --set data.path=PATH"
    if not text:
        raise MissingResourceError(f"data source {data.source!r} needs {what}; {hint}")
    path = expand_user(text)
    if not path.exists():
        raise MissingResourceError(f"data path {path} does not exist; it should be {what}; {hint}")
    return path


_LOADERS = {
    "digits": _load_digits,
    "idx": _load_idx,
    "mnist-torchvision": _load_torchvision_mnist,
    "imagefolder": _load_imagefolder,
    "latents": _load_latents,
    "synthetic": _load_synthetic,
}
