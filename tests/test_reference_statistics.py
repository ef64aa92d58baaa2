"""Statistics of a whole data set for those who hold a part: values, ties by digest, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.config import Workload, load_workload
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.judging.evaluation import check_features, load_reference
from robuq_bench.judging.feature_networks import FeatureNetwork, load_classifier
from robuq_bench.judging.reference_statistics import load_statistics, save_statistics


@pytest.fixture(scope="module")
def whole() -> ImageData:
    data = load_dataset(load_workload("digits").data)
    return make_image_data(data.images[:300], data.labels[:300], "digits")


@pytest.fixture(scope="module")
def subset(whole: ImageData) -> ImageData:
    rows = make_image_data(whole.images[::3], whole.labels[::3], "digits")
    return dataclasses.replace(rows, part_of=whole.sha256)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_classifier()


@pytest.fixture
def path(
    whole: ImageData, network: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "reference.safetensors"
    other = dataclasses.replace(network, name="other", sha256="1" * 64)
    save_statistics(file, whole, [network, other], command="none")
    return file


def workload(reference: Path, digest: str | None = None) -> Workload:
    digits = load_workload("digits")
    fields = {"reference": str(reference), "reference_sha256": digest}
    return digits.model_copy(update={"evaluation": digits.evaluation.model_copy(update=fields)})


def test_statistics_are_of_the_whole_and_features_of_the_part(
    path: Path, whole: ImageData, subset: ImageData, network: FeatureNetwork
) -> None:
    reference = load_reference(workload(path), subset, network)
    features = network.extract(whole.images)
    for found, values in (
        (reference.pool, features.pool.numpy()),
        (reference.spatial, features.spatial.numpy()),
    ):
        assert found is not None
        np.testing.assert_allclose(found.mu, values.mean(0), rtol=1e-10)
        np.testing.assert_allclose(found.sigma, np.cov(values, rowvar=False), atol=1e-10)
    assert reference.num_images == 300
    assert reference.features is not None
    assert torch.equal(reference.features.pool, network.extract(subset.images).pool)
    assert reference.labels is not None
    assert torch.equal(reference.labels, subset.labels)


def test_other_networks_and_other_images_are_refused(
    path: Path, whole: ImageData, subset: ImageData, network: FeatureNetwork
) -> None:
    assert load_statistics(path, network, whole).num_images == 300
    stranger = dataclasses.replace(network, name="mine", sha256="2" * 64)
    with pytest.raises(UsageError, match=r"in features of digits, other, not in .*'mine'"):
        load_statistics(path, stranger, subset)
    with pytest.raises(UsageError, match=r"is of other images .*evaluation\.reference=none"):
        load_statistics(path, network, dataclasses.replace(subset, part_of=""))
    load_reference(workload(path, load_digest(path)), subset, network)
    with pytest.raises(CheckpointError, match=r"evaluation\.reference .*changed"):
        load_reference(workload(path, "0" * 64), subset, network)


def load_digest(path: Path) -> str:
    return json.loads(path.with_suffix(".json").read_text("utf-8"))["sha256"]


def test_files_of_another_kind_or_damaged_are_named(
    path: Path, subset: ImageData, network: FeatureNetwork, tmp_path: Path
) -> None:
    tensors, facts = load_tensors(path)
    bad = tmp_path / "bad.safetensors"
    for kept, said, message in (
        (tensors, {}, "holds no"),
        (tensors, {**facts, "networks": "{"}, "is no"),
        ({"x": torch.zeros(1)}, facts, "lacks"),
    ):
        save_tensors(bad, kept, said)
        with pytest.raises(CheckpointError, match=rf"bad\.safetensors {message}"):
            load_statistics(bad, network, subset)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"reference\.safetensors"):
        load_statistics(path, network, subset)


def test_a_network_of_the_whole_set_is_no_stranger_to_a_part(
    whole: ImageData,
    subset: ImageData,
    network: FeatureNetwork,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = dataclasses.replace(network, trained_on=whole.sha256)
    check_features(trained, (1, 8, 8), subset)
    assert caplog.messages == []
    check_features(trained, (1, 8, 8), dataclasses.replace(subset, part_of=""))
    assert "was trained on other images" in caplog.text
