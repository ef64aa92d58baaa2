"""Datasets: exact pixels, exact hashes, and errors that name the file and the fix."""

from __future__ import annotations

import gzip
import hashlib
import logging
import struct
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robuq_bench._compat import import_torchvision
from robuq_bench.checkpointing import save_tensors
from robuq_bench.config import DataConfig, load_workload
from robuq_bench.data.datasets import (
    center_crop,
    content_sha256,
    load_dataset,
    make_image_data,
    pad_to,
    to_model_range,
    to_uint8,
)
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError

# Counts of the ten digits in MNIST's test set, as published with the data set.
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

DIGITS = load_workload("digits").data


def section_of(source: str, path: str | None = None, **fields: int) -> DataConfig:
    """`Workload.data` with these fields, which are not validated."""
    return DIGITS.model_copy(update={"source": source, "path": path} | fields)


def idx_bytes(array: np.ndarray) -> bytes:
    """Encode uint8 as IDX, independently of the reader: magic 0x08 and rank, big-endian sizes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, split: str, count: int, *, suffix: str = "", size: int = 4) -> tuple:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        data = idx_bytes(array)
        (folder / f"{split}-{kind}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return images, labels


def test_digits_are_rounded_half_up() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset(section_of("digits"))
    bunch = load_digits()
    table = [
        int((Decimal(255) * v / 16).quantize(Decimal(1), rounding=ROUND_HALF_UP)) for v in range(17)
    ]
    expected = np.array(table, np.uint8)[bunch.images.astype(int)]
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0].numpy(), expected)
    assert data.labels.tolist() == bunch.target.tolist()
    assert not data.is_latent
    assert data.sha256 == "4318f5a27219c590b940ba973e958df4400d5d29c511695d051ee1f513e87fd9"


def test_other_digits_than_the_workloads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robuq_bench.data.datasets.DIGITS_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="install the pinned version"):
        load_dataset(section_of("digits"))


def test_pixel_ranges_are_inverse() -> None:
    pixels = torch.arange(256).to(torch.uint8)
    scaled = to_model_range(pixels)
    assert scaled.dtype == torch.float32
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert torch.equal(to_uint8(scaled), pixels)
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0, 128, 255]
    with pytest.raises(UsageError, match="uint8"):
        to_model_range(scaled)


def test_content_hash_covers_dtype_shape_and_values() -> None:
    pixels = torch.arange(12, dtype=torch.uint8)
    manual = hashlib.sha256(b"torch.uint8(3, 4);" + bytes(range(12))).hexdigest()
    assert content_sha256(pixels.view(3, 4)) == manual
    assert content_sha256(pixels.view(4, 3)) != manual
    assert content_sha256(pixels.view(3, 4).to(torch.int8)) != manual
    labels = torch.zeros(3, dtype=torch.int64)
    one = make_image_data(pixels.view(3, 1, 2, 2), labels, "x")
    two = make_image_data(pixels.view(3, 1, 2, 2), labels + 1, "x")
    assert one.sha256 != two.sha256
    assert torch.equal(one.model_inputs(torch.tensor([2])), to_model_range(one.images[2:]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sub", ["", "raw", "MNIST/raw"])
def test_idx_matches_torchvisions_reader(tmp_path: Path, sub: str, suffix: str) -> None:
    _, labels = write_idx(tmp_path / sub, "train", 12, suffix=suffix)
    data = load_dataset(section_of("idx", str(tmp_path), image_size=8))
    raw = tmp_path / "plain"
    write_idx(raw, "train", 12)
    reader = import_torchvision().datasets.mnist
    expected = reader.read_image_file(str(raw / "train-images-idx3-ubyte"))
    assert torch.equal(data.images[:, 0, 2:6, 2:6], expected)
    assert data.images.sum() == expected.sum()
    assert data.labels.tolist() == labels.tolist()
    assert data.source == "idx:train"


def test_idx_prefers_train_and_says_when_it_takes_the_test_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx(tmp_path, "t10k", 10)
    section = section_of("idx", str(tmp_path), image_size=4)
    with caplog.at_level(logging.WARNING):
        assert load_dataset(section).source == "idx:t10k"
    assert "no training set" in caplog.text
    write_idx(tmp_path, "train", 20)
    assert len(load_dataset(section)) == 20
    by_file = section_of("idx", str(tmp_path / "t10k-images-idx3-ubyte"), image_size=4)
    assert len(load_dataset(by_file)) == 10


def test_idx_path_comes_from_the_workloads_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path, "train", 10)
    section = section_of("idx", image_size=4)
    with pytest.raises(MissingResourceError, match="ROBUQ_DATA_MNIST32"):
        load_dataset(section, name="mnist32")
    monkeypatch.setenv("ROBUQ_DATA_MNIST32", str(tmp_path))
    assert len(load_dataset(section, name="mnist32")) == 10
    with pytest.raises(MissingResourceError, match=r"--set data\.path"):
        load_dataset(section)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_truncated_idx_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    write_idx(tmp_path, "train", 40, suffix=suffix)
    victim = tmp_path / f"train-images-idx3-ubyte{suffix}"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="train-images-idx3-ubyte"):
        load_dataset(section_of("idx", str(tmp_path), image_size=4))


def test_idx_refuses_what_is_not_idx(tmp_path: Path) -> None:
    section = section_of("idx", str(tmp_path), image_size=4)
    with pytest.raises(MissingResourceError, match="train-images-idx3-ubyte"):
        load_dataset(section)
    write_idx(tmp_path, "train", 10)
    labels = tmp_path / "train-labels-idx1-ubyte"
    images = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    labels.write_bytes(images)
    with pytest.raises(CheckpointError, match="train-labels"):
        load_dataset(section)
    labels.write_bytes(idx_bytes(np.zeros(9, np.uint8)))
    with pytest.raises(CheckpointError, match="10 images but 9 labels"):
        load_dataset(section)
    labels.unlink()
    with pytest.raises(MissingResourceError, match="train-labels"):
        load_dataset(section)
    with pytest.raises(MissingResourceError, match="does not exist"):
        load_dataset(section_of("idx", str(tmp_path / "absent"), image_size=4))


def test_padding_is_even_and_never_crops() -> None:
    images = torch.full((2, 1, 28, 28), 7, dtype=torch.uint8)
    padded = pad_to(images, 32)
    assert padded.shape == (2, 1, 32, 32)
    assert torch.equal(padded[:, :, 2:30, 2:30], images)
    assert padded.sum() == images.sum()
    assert torch.equal(pad_to(images, 28), images)
    for size in (27, 31):
        with pytest.raises(UsageError, match=f"image_size={size}"):
            pad_to(images, size)


def test_real_mnist(mnist_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_dataset(section_of("idx", str(mnist_folder), image_size=32))
    assert torch.bincount(data.labels).tolist()[:10] == MNIST_TEST_COUNTS or len(data) == 60_000
    assert data.images.shape[1:] == (1, 32, 32)
    assert data.images[:, :, :2].sum() == 0


def test_torchvision_mnist_is_read_but_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    section = section_of("mnist-torchvision", str(tmp_path), image_size=8)
    with pytest.raises(MissingResourceError, match="download=True"):
        load_dataset(section)
    images, labels = write_idx(tmp_path / "MNIST" / "raw", "train", 30)
    write_idx(tmp_path / "MNIST" / "raw", "t10k", 10)
    data = load_dataset(section)
    assert np.array_equal(data.images[:, 0, 2:6, 2:6].numpy(), images)
    assert data.labels.tolist() == labels.tolist()
    same = load_dataset(section_of("idx", str(tmp_path), image_size=8))
    assert data.sha256 == same.sha256


def pattern(height: int, width: int) -> np.ndarray:
    y, x, c = np.indices((height, width, 3))
    return ((x * x * 7 + y * 31 + c * 53 + (x * y) % 11 * 5) % 256).astype(np.uint8)


def box_halves(array: np.ndarray) -> np.ndarray:
    """2x2 means rounded half up after each of the two passes, columns first, as Pillow's are."""
    wide = array.astype(int)
    columns = (wide[:, 0::2] + wide[:, 1::2] + 1) // 2
    return ((columns[0::2] + columns[1::2] + 1) // 2).astype(np.uint8)


def test_center_crop_is_bit_defined() -> None:
    source = pattern(64, 96)
    expected = box_halves(box_halves(source))[:, 4:20]
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(source), 16)), expected)
    tall = center_crop(Image.fromarray(source.transpose(1, 0, 2).copy()), 64)
    assert np.array_equal(np.asarray(tall), source.transpose(1, 0, 2)[16:80])


def test_center_crop_resizes_bicubically_after_halving() -> None:
    source = Image.fromarray(pattern(75, 101))
    cropped = center_crop(source, 24)
    halved = source.resize((50, 37), Image.Resampling.BOX)
    resized = halved.resize((32, 24), Image.Resampling.BICUBIC)  # 24/37 of 50 is 32.4
    assert np.array_equal(np.asarray(cropped), np.asarray(resized)[:, 4:28])
    digest = hashlib.sha256(np.asarray(cropped).tobytes()).hexdigest()
    assert digest == "56184e56012f2f6103c0d7e894787ce37f91a376eb5458b17c542aaf5fa5b446"


def test_imagefolder_orders_classes_and_files_by_name(tmp_path: Path) -> None:
    for folder, name, value in (("b", "2.png", 3), ("a", "z.png", 1), ("b", "10.PNG", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / folder / name)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    data = load_dataset(section_of("imagefolder", str(tmp_path), channels=3, num_classes=2))
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert data.labels.tolist() == [0, 1, 1]
    grey = load_dataset(section_of("imagefolder", str(tmp_path / "b"), channels=1, num_classes=1))
    assert grey.images.shape == (2, 1, 8, 8)
    assert grey.labels.tolist() == [0, 0]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_broken_image_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a").mkdir()
    good, bad = tmp_path / "a" / "good.png", tmp_path / "a" / "broken.png"
    Image.fromarray(pattern(32, 32)).save(good)
    whole = good.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "garbage": b"x" * 500, "empty": b""}[damage]
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.png.*replace or remove"):
        load_dataset(section_of("imagefolder", str(tmp_path), channels=3, num_classes=1))


def test_imagefolder_refuses_what_it_cannot_hold_or_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingResourceError, match="does not exist") as caught:
        load_dataset(section_of("imagefolder", str(tmp_path / "absent"), channels=3))
    assert caught.value.exit_code == 4
    with pytest.raises(MissingResourceError, match="no images"):
        load_dataset(section_of("imagefolder", str(tmp_path), channels=3))
    with pytest.raises(UsageError, match="channels is 2"):
        load_dataset(section_of("imagefolder", str(tmp_path), channels=2))
    Image.fromarray(pattern(8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(UsageError, match="source=latents"):
        load_dataset(section_of("imagefolder", str(tmp_path), channels=3))


def latent_section(path: Path) -> DataConfig:
    return section_of("latents", str(path), image_size=4, channels=2, num_classes=3)


def test_latents_are_read_in_shard_order(tmp_path: Path) -> None:
    values = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.tensor([0, 1, 2, 1, 0])
    for name, rows in (("b", slice(3, 5)), ("a", slice(0, 3))):
        tensors = {"latents": values[rows], "labels": labels[rows]}
        save_tensors(tmp_path / f"{name}.safetensors", tensors, {})
    data = load_dataset(latent_section(tmp_path))
    assert data.is_latent
    assert torch.equal(data.images, values.float())
    assert torch.equal(data.model_inputs(torch.tensor([4])), values[4:].float())
    assert data.labels.tolist() == labels.tolist()


def test_damaged_latents_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match=r"no .*shards"):
        load_dataset(latent_section(tmp_path))
    shard = tmp_path / "a.safetensors"
    save_tensors(shard, {"latents": torch.zeros(3, 2, 4, 4), "labels": torch.arange(3)}, {})
    whole = bytearray(shard.read_bytes())
    whole[-5] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_dataset(latent_section(tmp_path))
    (tmp_path / "a.safetensors.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors\.sha256"):
        load_dataset(latent_section(tmp_path))
    save_tensors(shard, {"latents": torch.zeros(3, 2, 4, 4)}, {})
    with pytest.raises(CheckpointError, match="labels"):
        load_dataset(latent_section(tmp_path))


def test_synthetic_images_are_reproducible_mixtures() -> None:
    section = section_of("synthetic", image_size=16, channels=3, num_classes=4)
    data, again = load_dataset(section), load_dataset(section)
    assert data.sha256 == again.sha256
    assert torch.bincount(data.labels).tolist() == [512] * 4
    values = data.images.double()
    means = torch.stack([values[data.labels == k].mean(0) for k in range(4)])
    distances = torch.cdist(values.flatten(1), means.flatten(1))
    assert torch.equal(distances.argmin(1), data.labels)


def test_a_section_that_does_not_fit_is_explained() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        load_dataset(section_of("digts"))
    with pytest.raises(UsageError, match=r"data\.num_classes=10"):
        load_dataset(section_of("digits", num_classes=9))
    with pytest.raises(UsageError, match=r"data\.channels is 3"):
        load_dataset(section_of("digits", channels=3))
    with pytest.raises(UsageError, match=r"8x8 images, but data\.image_size is 16"):
        load_dataset(section_of("digits", image_size=16))
