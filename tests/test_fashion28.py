"""The embedded part of Fashion-MNIST, held-out images, and statistics of a whole data set."""

from __future__ import annotations

import json
import lzma
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from robuq_bench.config import DataConfig, asset_path, load_workload
from robuq_bench.data import fashion28
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout, make_image_data
from robuq_bench.data.idx import read_idx, write_idx
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import sha256_file
from robuq_bench.judging.feature_networks import load_classifier, load_feature_network
from robuq_bench.judging.features import features_asset, load_features
from robuq_bench.judging.reference_statistics import load_statistics

SECTION = load_workload("fashion28").data
CLASSES = 10


@pytest.fixture(scope="module")
def clothes() -> ImageData:
    return load_dataset(SECTION)


@pytest.fixture(scope="module")
def heldout() -> ImageData:
    found = load_heldout(SECTION)
    assert found is not None
    return found


def section(source: str, path: Path | None, **fields: int) -> DataConfig:
    text = None if path is None else str(path)
    return SECTION.model_copy(update={"source": source, "path": text, **fields})


def small_set(folder: Path, *splits: str, suffix: str = "") -> dict[str, NDArray[np.uint8]]:
    """IDX files of 40 random images a split, four of each class; returns the images."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, split in enumerate(splits):
        rng = np.random.default_rng(seed)
        made[split] = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", made[split])
        labels = (np.arange(40) % CLASSES).astype(np.uint8)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)
    return made


def test_every_class_has_as_many_images(clothes: ImageData, heldout: ImageData) -> None:
    assert clothes.images.shape == (10_000, 1, 28, 28)
    assert heldout.images.shape == (2_000, 1, 28, 28)
    assert torch.bincount(clothes.labels).tolist() == [1_000] * CLASSES
    assert torch.bincount(heldout.labels).tolist() == [200] * CLASSES
    assert (clothes.source, heldout.source) == ("fashion28:train", "fashion28:t10k")


def test_no_held_out_image_is_trained_on(clothes: ImageData, heldout: ImageData) -> None:
    seen = {image.numpy().tobytes() for image in clothes.images}
    assert not any(image.numpy().tobytes() in seen for image in heldout.images)
    assert len(seen) == 10_000


def test_the_card_says_what_lies_there_and_a_licence_stands_beside_it(
    clothes: ImageData, heldout: ImageData
) -> None:
    card = json.loads((fashion28.FOLDER / "card.json").read_text("utf-8"))
    assert card["files"] == {
        path.name: sha256_file(path) for path in sorted(fashion28.FOLDER.glob("*.xz"))
    }
    assert len(card["files"]) == 4
    assert card["train"]["content_sha256"] == clothes.sha256 == fashion28.SHA256["train"]
    assert card["t10k"]["content_sha256"] == heldout.sha256 == fashion28.SHA256["t10k"]
    assert card["train"]["chosen_from"] == clothes.part_of == fashion28.WHOLE_SHA256
    licence = (fashion28.FOLDER / "LICENSE").read_text("utf-8")
    assert "MIT License" in licence
    assert "Zalando SE" in licence
    assert sum(path.stat().st_size for path in fashion28.FOLDER.iterdir()) < 5_000_000


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_other_images_or_labels_are_refused(tmp_path: Path, split: str) -> None:
    folder = tmp_path / "fashion28"
    shutil.copytree(fashion28.FOLDER, folder)
    labels = folder / f"{split}-labels-idx1-ubyte.xz"
    swapped = read_idx(labels, 0x0801)
    swapped[[0, 1]] = swapped[[1, 0]]
    assert swapped[0] != swapped[1]
    write_idx(labels, swapped)
    with pytest.raises(CheckpointError, match=f"the {split} images .* install the package anew"):
        fashion28.read(split, folder)
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=labels.name):
        fashion28.read(split, folder)
    labels.unlink()
    with pytest.raises(MissingResourceError, match=f"{split}-labels"):
        fashion28.read(split, folder)


def test_the_first_images_of_every_class_are_chosen_in_their_order() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2, 1])
    assert fashion28.first_of_every_class(labels, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert fashion28.first_of_every_class(labels, 1).tolist() == [0, 1, 3]
    with pytest.raises(UsageError, match="3 images, and 4"):
        fashion28.first_of_every_class(labels, 4)


def test_the_asset_is_made_from_fashion_mnist_alone(tmp_path: Path) -> None:
    small_set(tmp_path / "other", "train", "t10k")
    with pytest.raises(CheckpointError, match="are not those of Fashion-MNIST"):
        fashion28.write(tmp_path / "other", tmp_path / "made")
    small_set(tmp_path / "half", "train")
    with pytest.raises(MissingResourceError, match="t10k-images"):
        fashion28._pair(tmp_path / "half", "t10k")


def test_the_asset_is_made_by_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_set(tmp_path / "raw", "train", "t10k")
    whole = load_dataset(section("idx", tmp_path / "raw"))
    tested = load_heldout(section("idx", tmp_path / "raw"))
    assert tested is not None
    monkeypatch.setattr(fashion28, "WHOLE_SHA256", whole.sha256)
    monkeypatch.setattr(fashion28, "WHOLE_TEST_SHA256", tested.sha256)
    monkeypatch.setattr(fashion28, "PER_CLASS", {"train": 3, "t10k": 2})
    card = fashion28.write(tmp_path / "raw", tmp_path / "asset")
    digests = {split: card[split]["content_sha256"] for split in ("train", "t10k")}
    monkeypatch.setattr(fashion28, "SHA256", digests)
    for split, rows in (("train", 30), ("t10k", 20)):  # labels go 0..9 round and round
        images, labels = fashion28.read(split, tmp_path / "asset")
        assert np.array_equal(images[:, 0].numpy(), made[split][:rows])
        assert labels.tolist() == [row % CLASSES for row in range(rows)]


@pytest.mark.parametrize("suffix", ["", ".xz"])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_folder_with_both_sets_holds_one_out(tmp_path: Path, below: str, suffix: str) -> None:
    made = small_set(tmp_path / below, "train", "t10k", suffix=suffix)
    found = section("idx", tmp_path)
    heldout = load_heldout(found)
    assert heldout is not None
    assert np.array_equal(heldout.images[:, 0].numpy(), made["t10k"])
    assert np.array_equal(load_dataset(found).images[:, 0].numpy(), made["train"])
    assert heldout.source == "idx:t10k"


def test_what_has_no_test_set_holds_none_out(tmp_path: Path) -> None:
    small_set(tmp_path / "train", "train")
    small_set(tmp_path / "t10k", "t10k")
    assert load_heldout(section("idx", tmp_path / "train")) is None
    # There the test set is what is trained on.
    assert load_heldout(section("idx", tmp_path / "t10k")) is None
    by_file = tmp_path / "train" / "train-images-idx3-ubyte"
    assert load_heldout(section("idx", by_file)) is None
    assert load_heldout(load_workload("digits").data) is None
    assert load_heldout(section("synthetic", None)) is None


def test_held_out_images_are_never_those_of_another_data_set(tmp_path: Path) -> None:
    digits, clothes = tmp_path / "MNIST" / "raw", tmp_path / "FashionMNIST" / "raw"
    small_set(digits, "train")
    small_set(clothes, "train", "t10k")
    both = section("idx", tmp_path)
    for load in (load_dataset, load_heldout):
        with pytest.raises(UsageError, match=f"{digits}, {clothes}.*; point data.path at one"):
            load(both)
    assert load_heldout(section("idx", digits)) is None
    assert load_heldout(section("mnist-torchvision", tmp_path)) is None  # that is MNIST alone
    assert load_heldout(section("idx", clothes)) is not None
    for file in clothes.glob("train-*"):
        file.unlink()
    with pytest.raises(UsageError, match="in 2 folders"):
        load_heldout(both)
    for file in digits.iterdir():
        file.unlink()
    assert load_dataset(both).source == "idx:t10k"
    assert load_heldout(both) is None


def test_held_out_images_are_those_of_the_section(tmp_path: Path) -> None:
    small_set(tmp_path, "train", "t10k")
    with pytest.raises(UsageError, match="num_classes"):
        load_heldout(section("idx", tmp_path, num_classes=9))
    with pytest.raises(UsageError, match="image_size"):
        load_heldout(section("fashion28", None, image_size=32))
    padded = load_heldout(section("idx", tmp_path, image_size=32))
    assert padded is not None
    assert padded.images.shape == (40, 1, 32, 32)


def test_xz_holds_the_bytes_of_an_idx_file(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    write_idx(tmp_path / "a.xz", array)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 2])
    assert lzma.decompress((tmp_path / "a.xz").read_bytes()) == header + bytes(range(12))
    assert np.array_equal(read_idx(tmp_path / "a.xz", 0x0803), array)


# feature networks and what they say of all 60,000 images


@pytest.fixture(params=["fashion28", "fashion28b"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def card_of(name: str) -> dict[str, Any]:
    return dict(json.loads(features_asset(name).with_suffix(".json").read_text("utf-8")))


def test_networks_name_clothes_that_they_never_saw(
    name: str, clothes: ImageData, heldout: ImageData
) -> None:
    network, metadata, digest = load_features(features_asset(name))
    card = card_of(name)
    assert digest == card["sha256"]
    assert {key: str(card[key]) for key in metadata} == metadata
    assert card["dataset_sha256"] == clothes.part_of
    assert (card["heldout"], card["heldout_images"]) == ("idx:t10k", 10_000)
    assert card["heldout_accuracy"] >= {"fashion28": 0.93, "fashion28b": 0.92}[name]
    guesses = torch.cat([network(part)[2].argmax(1) for part in torch.split(heldout.images, 250)])
    accuracy = (guesses == heldout.labels).double().mean().item()
    # A fifth of those that the card counts: within four standard errors of their share.
    error = math.sqrt(accuracy * (1 - accuracy) / len(heldout))
    assert accuracy == pytest.approx(card["heldout_accuracy"], abs=4 * error)


def test_the_second_network_differs_in_more_than_its_seed() -> None:
    first, second = card_of("fashion28"), card_of("fashion28b")
    for key in ("seed", "widths", "flip", "shift", "sha256"):
        assert first[key] != second[key]


def test_networks_are_found_by_name_and_name_their_metrics(name: str) -> None:
    evaluation = load_workload("fashion28").evaluation
    network = load_feature_network(evaluation.model_copy(update={"features": name}))
    assert (network.name, network.suffix) == (name, f"_{name}")
    assert network.fits(1, 28, 28)
    assert network.dimensions is not None
    assert network.dimensions[0] <= 128  # FID of 3,000 samples


def test_the_reference_is_of_all_60000_images(name: str, clothes: ImageData) -> None:
    evaluation = load_workload("fashion28").evaluation
    assert evaluation.reference is not None
    path = asset_path(evaluation.reference)
    assert sha256_file(path) == evaluation.reference_sha256
    some = make_image_data(clothes.images[:1000], clothes.labels[:1000], "some")
    network = load_classifier(features_asset(name))
    reference = load_statistics(path, network, replace(some, part_of=clothes.part_of))
    assert reference.num_images == 60_000
    assert reference.features is not None
    pool = reference.features.pool.numpy()
    variances = reference.pool.sigma.diagonal()
    scores = (pool.mean(0) - reference.pool.mu) / np.sqrt(variances / len(pool))
    assert np.abs(scores).max() < 5
    assert pool.var(0).sum() == pytest.approx(variances.sum(), rel=0.1)
    with pytest.raises(UsageError, match="is of other images"):
        load_statistics(path, network, some)
