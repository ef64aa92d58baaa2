"""The digit classifier behind `fid_digits`: its packaged weights, its training, its refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from robuq_bench.checkpointing import save_tensors
from robuq_bench.config import load_workload, resolve
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.judging.feature_recipe import FeatureRecipe
from robuq_bench.judging.features import (
    ASSET,
    FeatureCNN,
    _random_shift,
    _stratified_rows,
    load_features,
    save_features,
    train_feature_network,
)
from robuq_bench.progress import Progress
from robuq_bench.runs.study import run_study
from studies.train_features import study as train_features

ASSET_SHA256 = "b2aaef0a1f1b76cc4054549f0a4e8d4c27b08d43a662e32c525296e9cf4ee31a"


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset(load_workload("digits").data)


@pytest.fixture(scope="module")
def network() -> FeatureCNN:
    return load_features()[0]


def copy_asset(folder: Path) -> Path:
    for path in (ASSET, ASSET.with_name(ASSET.name + ".sha256")):
        shutil.copy(path, folder / path.name)
    return folder / ASSET.name


def test_packaged_file_is_the_pinned_one() -> None:
    assert hashlib.sha256(ASSET.read_bytes()).hexdigest() == ASSET_SHA256
    assert ASSET.stat().st_size < 1 << 20
    _, metadata, digest = load_features()
    card = json.loads(ASSET.with_suffix(".json").read_text())
    assert digest == card["sha256"] == ASSET_SHA256
    assert {key: str(card[key]) for key in metadata} == metadata
    assert card["command"].startswith("python bench.py train-features")


def test_heldout_accuracy_is_the_cards(digits: ImageData, network: FeatureCNN) -> None:
    card = json.loads(ASSET.with_suffix(".json").read_text())
    assert digits.sha256 == card["dataset_sha256"]
    heldout = _stratified_rows(
        digits.labels, card["heldout_fraction"], torch.Generator().manual_seed(card["seed"])
    )
    guesses = network(digits.images[heldout])[2].argmax(1)
    accuracy = (guesses == digits.labels[heldout]).double().mean().item()
    assert int(heldout.sum()) == card["heldout_images"] == 359
    assert accuracy == pytest.approx(card["heldout_accuracy"], abs=1e-6)
    assert accuracy >= 0.985


def test_feature_shapes_and_scale(digits: ImageData, network: FeatureCNN) -> None:
    pool, spatial, logits = network(digits.images)
    assert pool.shape == (1797, 64)
    assert spatial.shape == (1797, 112)
    assert logits.shape == (1797, 10)
    assert pool.dtype == spatial.dtype == logits.dtype == torch.float64
    assert pool.var(0).mean().item() == pytest.approx(1, rel=0.02)
    assert spatial.var(0).mean().item() == pytest.approx(1, rel=0.02)
    assert pool.var(0).min() > 0.1  # no dead feature


def test_logits_follow_from_the_pooled_features(digits: ImageData, network: FeatureCNN) -> None:
    pool, _, logits = network(digits.images[:9])
    assert torch.allclose(network.classifier(pool / network.pool_scale), logits, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_matter(
    digits: ImageData, network: FeatureCNN, batch_size: int
) -> None:
    images = digits.images[:29]
    whole = network(images)
    parts = [network(part) for part in torch.split(images, batch_size)]
    for all_at_once, column in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(torch.cat(column), all_at_once, rtol=1e-10, atol=1e-10)


def test_colour_and_size_are_normalised(digits: ImageData, network: FeatureCNN) -> None:
    images, labels = digits.images[:300], digits.labels[:300]
    grey = network(images)
    colour = network(images.expand(-1, 3, -1, -1))
    for one, three in zip(grey, colour, strict=True):
        assert torch.allclose(one, three, rtol=1e-9, atol=1e-9)
    large = F.interpolate(images.float(), (24, 24), mode="bilinear").round().to(torch.uint8)
    guesses = network(large)[2].argmax(1)
    assert (guesses == labels).double().mean() > 0.95
    shrunk = network.prepare(torch.full((1, 1, 20, 20), 255, dtype=torch.uint8))
    assert torch.allclose(shrunk, torch.ones(1, 1, 8, 8, dtype=torch.float64))


def test_only_uint8_images_are_accepted(network: FeatureCNN) -> None:
    for bad in (torch.zeros(2, 1, 8, 8), torch.zeros(2, 2, 8, 8).byte(), torch.zeros(8, 8).byte()):
        with pytest.raises(UsageError, match="uint8"):
            network(bad)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_weights_are_named(tmp_path: Path, share: float) -> None:
    path = copy_asset(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=str(path)):
        load_features(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.9999])
def test_flipped_bit_is_named(tmp_path: Path, share: float) -> None:
    path = copy_asset(tmp_path)
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        load_features(path)


def test_other_files_need_a_checksum_and_the_right_content(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_features(tmp_path / "absent.safetensors")
    path = copy_asset(tmp_path)
    assert load_features(path)[2] == ASSET_SHA256
    with pytest.raises(CheckpointError, match=path.name):
        load_features(path, expected_sha256="0" * 64)
    path.with_name(path.name + ".sha256").unlink()
    with pytest.raises(CheckpointError, match="sha256"):
        load_features(path)
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"x": torch.zeros(1)}, {"architecture": "something/1"})
    with pytest.raises(CheckpointError, match="feature network"):
        load_features(other)
    metadata = {"architecture": "robuq-digits-cnn/1", "name": "x"}
    metadata |= {"input_size": "8", "num_classes": "10"}
    save_tensors(other, {"x": torch.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_features(other)
    state = FeatureCNN().state_dict()
    state["classifier.bias"][0] = float("nan")
    save_tensors(other, state, metadata)
    with pytest.raises(CheckpointError, match=r"1 not finite: classifier\.bias"):
        load_features(other)
    save_tensors(other, state, metadata | {"input_size": "nine"})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_features(other)


def small(digits: ImageData, count: int = 400) -> ImageData:
    return make_image_data(digits.images[:count], digits.labels[:count], "digits")


ONCE = FeatureRecipe(epochs=1)


def weights(
    data: ImageData, recipe: FeatureRecipe = ONCE, **settings: int
) -> dict[str, torch.Tensor]:
    return train_feature_network(data, recipe, **settings).network.state_dict()


def test_training_is_reproducible_and_never_sees_the_heldout_images(digits: ImageData) -> None:
    data = small(digits, 120)
    first, second, other = weights(data), weights(data), weights(data, seed=1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    heldout = _stratified_rows(data.labels, 0.2, torch.Generator().manual_seed(0))
    assert 0.15 < heldout.double().mean() < 0.25
    spoiled = data.images.clone()
    spoiled[heldout] = 99
    third = weights(make_image_data(spoiled, data.labels, "digits"))
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_training_learns_and_round_trips_through_a_file(digits: ImageData, tmp_path: Path) -> None:
    data = small(digits)
    epochs: list[int] = []
    recipe = FeatureRecipe(epochs=6, batch_size=16)
    trained = train_feature_network(
        data, recipe, progress=lambda epoch, total, values: epochs.append(epoch)
    )
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert trained.heldout_accuracy > 0.6
    path = tmp_path / "few.safetensors"
    digest = save_features(path, trained, name="few", command="none")
    network, metadata, loaded = load_features(path)
    assert loaded == digest
    assert metadata["name"] == "few"
    assert metadata["epochs"] == "6"
    expected = trained.network.double()(data.images[:5])
    assert all(torch.equal(a, b) for a, b in zip(network(data.images[:5]), expected, strict=True))


def test_training_accepts_larger_images(digits: ImageData) -> None:
    images = F.interpolate(digits.images[:100].float(), (28, 28)).to(torch.uint8)
    data = make_image_data(images, digits.labels[:100], "large")
    network = train_feature_network(data, FeatureRecipe(epochs=1, input_size=16)).network
    pool, spatial, _ = network(images)
    assert pool.shape == (100, 64)
    assert spatial.shape == (100, 112)
    with pytest.raises(UsageError, match="input size"):
        FeatureCNN(input_size=10)


def test_training_refuses_latents_and_too_few_images(digits: ImageData) -> None:
    latents = make_image_data(torch.zeros(10, 4, 8, 8), torch.arange(10), "latents")
    with pytest.raises(UsageError, match="latents"):
        train_feature_network(latents)
    with pytest.raises(UsageError, match="too few"):
        train_feature_network(small(digits, 10))


def test_shifts_fill_with_background_and_cover_every_offset() -> None:
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4).expand(400, -1, -1, -1)
    shifted = _random_shift(x, 1, torch.Generator().manual_seed(0))
    framed = F.pad(x[:1], (1, 1, 1, 1), value=-1.0)[0, 0]
    allowed = [framed[dy : dy + 4, dx : dx + 4] for dy in range(3) for dx in range(3)]
    counts = [int((shifted[:, 0] == window).all((1, 2)).sum()) for window in allowed]
    assert sum(counts) == 400
    assert min(counts) > 20


def test_the_command_keeps_weights_and_card_in_its_run(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ["train-features.epochs=1"]
    config = resolve("train-features", train_features.VERSION, "fp", "digits", 0, once)
    monkeypatch.setattr(train_features, "load_dataset", lambda data, name: small(digits, 100))
    context = Context.create(device="cpu", progress=Progress(quiet=True))
    result = run_study(config, tmp_path, context)
    weights_file = result.path / "checkpoints" / "features.safetensors"
    assert load_features(weights_file)[2] == result.table[0]["sha256"]
    card = json.loads(weights_file.with_suffix(".json").read_text())
    assert card["name"] == "digits"
    again = run_study(config, tmp_path, context)
    assert again.was_complete
    assert again.table == result.table


def test_a_share_is_not_kept_back_of_data_that_have_heldout_images() -> None:
    share = ["train-features.heldout_fraction=0.1"]
    with pytest.raises(UsageError, match="no share of the others is kept back"):
        train_features.check(
            resolve("train-features", train_features.VERSION, "fp", "fashion28", 0, share)
        )
    train_features.check(
        resolve("train-features", train_features.VERSION, "fp", "digits", 0, share)
    )
