"""Metrics against torch-fidelity end to end, closed forms, brute force and known directions."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch import Tensor
from torch.utils.data import Dataset

from robuq_bench import _compat
from robuq_bench.config import load_workload
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.errors import UsageError
from robuq_bench.judging import fidelity
from robuq_bench.judging.feature_networks import load_feature_network
from robuq_bench.judging.features import ASSET, load_features
from robuq_bench.judging.fidelity import (
    FeatureNetwork,
    Features,
    Statistics,
    compute_metrics,
    feature_statistics,
    frechet_distance,
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """The digits in random order: the file is ordered by writer."""
    data = load_dataset(load_workload("digits").data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return make_image_data(data.images[order], data.labels[order], data.source)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_feature_network(load_workload("digits").evaluation)


@pytest.fixture(scope="module")
def reference(digits: ImageData, network: FeatureNetwork) -> Features:
    return network.extract(digits.images[:600])


@pytest.fixture(scope="module")
def noisy(digits: ImageData) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = digits.images[700:1000].float()
    pixels += 30 * torch.randn(pixels.shape, generator=generator)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def random_features(count: int, dims: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dims, generator=generator, dtype=torch.float64)


def as_features(pool: Tensor) -> Features:
    return Features(pool, pool[:, :3], pool[:, :4])


class Images(Dataset[Tensor]):
    """A plain data set of uint8 images, as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def extractor() -> str:
    """The digit features under the name by which torch-fidelity knows them."""
    torch_fidelity = _compat.import_torch_fidelity()
    layers = ("pool", "spatial", "logits")

    class Extractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc, name-defined]
        def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
            super().__init__(name, features_list)
            self.network = load_features(ASSET)[0]

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(layers, self.network(images), strict=True))
            return tuple(values[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return layers

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"isc": "logits"}.get(metric, "pool")

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    torch_fidelity.register_feature_extractor("test-digits", Extractor)
    return "test-digits"


def test_equal_to_torch_fidelity_end_to_end(
    digits: ImageData, network: FeatureNetwork, reference: Features, noisy: Tensor, extractor: str
) -> None:
    ours = compute_metrics(network.extract(noisy), reference, "_digits")
    theirs = _compat.import_torch_fidelity().calculate_metrics(
        input1=Images(noisy),
        input2=Images(digits.images[:600]),
        feature_extractor=extractor,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=1,
        kid_subsets=fidelity.KID_SUBSETS,
        kid_subset_size=300,
        batch_size=50,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    pairs = {
        "fid_digits": "frechet_inception_distance",
        "is_digits": "inception_score_mean",
        "kid_digits": "kernel_inception_distance_mean",
        "kid_digits_std": "kernel_inception_distance_std",
        "precision_digits": "precision",
        "recall_digits": "recall",
    }
    for key, name in pairs.items():
        assert ours[key] == pytest.approx(theirs[name], rel=1e-9), key
    spatial = _compat.import_torch_fidelity().calculate_metrics(
        input1=Images(noisy),
        input2=Images(digits.images[:600]),
        feature_extractor=extractor,
        feature_layer_fid="spatial",
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["sfid_digits"] == pytest.approx(spatial["frechet_inception_distance"], rel=1e-9)
    assert ours["fid_digits"] > 1
    assert 0.2 < ours["precision_digits"] < 1


def test_fid_of_commuting_gaussians() -> None:
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(2, 6))
    variances = rng.uniform(0.1, 4, size=(2, 6))
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    one, two = (
        Statistics(m, basis @ np.diag(v) @ basis.T) for m, v in zip(mu, variances, strict=True)
    )
    exact = ((mu[0] - mu[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(exact, rel=1e-6)


def test_fid_matches_scipys_matrix_root_and_is_symmetric() -> None:
    x, y = random_features(400, 16, 0), random_features(300, 16, 1, scale=1.3) + 0.2
    one, two = feature_statistics(x), feature_statistics(y)
    root = scipy.linalg.sqrtm(one.sigma @ two.sigma)
    exact = ((one.mu - two.mu) ** 2).sum() + np.trace(one.sigma + two.sigma - 2 * root.real)
    assert frechet_distance(one, two) == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-8)


def test_statistics_are_unbiased_and_float64_even_for_float32_features() -> None:
    features = random_features(5000, 4, 0).float() + 1000
    stats = feature_statistics(features)
    assert stats.mu.dtype == stats.sigma.dtype == np.float64
    exact = features.double()
    assert np.allclose(stats.mu, exact.mean(0).numpy(), rtol=1e-13)
    assert np.allclose(stats.sigma, torch.cov(exact.T).numpy(), rtol=1e-10)
    with pytest.raises(UsageError, match="at least 2"):
        feature_statistics(features[:1])


def test_fid_to_itself_is_zero_where_the_rank_is_full(reference: Features) -> None:
    for features in (reference.pool, reference.spatial):
        stats = feature_statistics(features)
        assert abs(frechet_distance(stats, stats)) <= 1e-6 * np.trace(stats.sigma)


def test_rank_deficiency_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    many, few = as_features(random_features(40, 8, 0)), as_features(random_features(8, 8, 1))
    with caplog.at_level(logging.WARNING):
        assert compute_metrics(many, many)["fid_is_rank_deficient"] == 0
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        metrics = compute_metrics(few, many, "digits")
    assert metrics["fid_digits_is_rank_deficient"] == 1
    assert metrics["sfid_digits_is_rank_deficient"] == 0
    assert compute_metrics(many, few)["fid_is_rank_deficient"] == 1
    assert "8 images in 8 dimensions" in caplog.text


def test_metric_names() -> None:
    features = as_features(random_features(40, 8, 0))
    plain = {"fid", "sfid", "is", "kid", "precision", "recall"}
    assert plain <= compute_metrics(features, features, "").keys()
    suffixed = compute_metrics(features, features, "_digits")
    assert {f"{name}_digits" for name in plain} <= suffixed.keys()
    assert suffixed.keys() == compute_metrics(features, features, "digits").keys()
    assert all("_digits" in key for key in suffixed)


def test_inception_score_and_kid_by_brute_force() -> None:
    x, y = random_features(30, 8, 0), random_features(30, 8, 1) + 0.5
    metrics = compute_metrics(as_features(x), as_features(y))
    p = torch.softmax(x[:, :4], 1).numpy()
    divergence = (p * np.log(p / p.mean(0))).sum(1).mean()
    assert metrics["is"] == pytest.approx(np.exp(divergence), rel=1e-9)
    assert (metrics["is_splits"], metrics["is_std"]) == (1, 0)
    a, b = x.numpy(), y.numpy()
    kernel = [((u @ v.T) / 8 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
    within = sum((k.sum() - np.trace(k)) / (30 * 29) for k in kernel[:2])
    assert metrics["kid_subset_size"] == 30
    assert metrics["kid"] == pytest.approx(within - 2 * kernel[2].mean(), rel=1e-9)


def test_splits_follow_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "IMAGES_PER_SPLIT", 10)
    features = as_features(random_features(50, 8, 0))
    metrics = compute_metrics(features, features)
    assert metrics["is_splits"] == 5
    assert metrics["is_std"] > 0


def test_precision_and_recall_by_brute_force() -> None:
    x, y = random_features(60, 5, 0), random_features(80, 5, 1, scale=1.5)

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = np.sort(scipy.spatial.distance.cdist(centres, centres), axis=1)[:, 3]
        return (scipy.spatial.distance.cdist(points, centres) <= radii).any(1).mean()

    metrics = compute_metrics(as_features(x), as_features(y))
    assert metrics["precision"] == pytest.approx(covered(x, y), abs=1e-6)
    assert metrics["recall"] == pytest.approx(covered(y, x), abs=1e-6)


def test_a_collapsed_generator_has_precision_but_no_recall(
    digits: ImageData, network: FeatureNetwork, reference: Features
) -> None:
    ones = digits.images[:600][digits.labels[:600] == 1]
    metrics = compute_metrics(network.extract(ones), reference, "digits")
    assert metrics["precision_digits"] > 0.8
    assert metrics["recall_digits"] < 0.3
    swapped = compute_metrics(reference, network.extract(ones), "digits")
    assert swapped["precision_digits"] < 0.3
    assert swapped["recall_digits"] > 0.8


def test_batch_size_does_not_change_metrics(
    network: FeatureNetwork, reference: Features, noisy: Tensor
) -> None:
    images = noisy[:150]
    whole = compute_metrics(network.extract(images, len(images)), reference)
    for batch_size in (1, 7):
        metrics = compute_metrics(network.extract(images, batch_size), reference)
        for key, value in whole.items():
            assert metrics[key] == pytest.approx(value, rel=1e-9), key


def test_more_noise_is_worse(
    digits: ImageData, network: FeatureNetwork, reference: Features
) -> None:
    clean = digits.images[700:900]
    unit = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    rows = [
        compute_metrics(
            network.extract((clean + sd * unit).round().clamp(0, 255).to(torch.uint8)), reference
        )
        for sd in (0.0, 20.0, 40.0, 80.0)
    ]
    for metric in ("fid", "sfid", "kid"):
        values = [row[metric] for row in rows]
        assert values == sorted(values)
    for metric in ("is", "precision"):
        values = [row[metric] for row in rows]
        assert values == sorted(values, reverse=True)


def test_bad_requests_are_explained(network: FeatureNetwork) -> None:
    with pytest.raises(UsageError, match="uint8"):
        network.extract(torch.zeros(3, 1, 8, 8))
    with pytest.raises(UsageError, match="N > 0"):
        network.extract(torch.zeros(0, 1, 8, 8, dtype=torch.uint8))
    many, few = as_features(random_features(40, 8, 0)), as_features(random_features(4, 8, 1))
    with pytest.raises(UsageError, match="at least 5"):
        compute_metrics(few, many)
    with pytest.raises(UsageError, match="same feature network"):
        compute_metrics(many, as_features(random_features(40, 9, 0)))
    with pytest.raises(UsageError, match=r"known: digits, .*inception, FILE"):
        load_feature_network(
            load_workload("digits").evaluation.model_copy(update={"features": "vgg"})
        )
