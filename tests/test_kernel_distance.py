"""KID with fixed class counts: exact over all samples of a small population, and by simulation."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robuq_bench._compat import import_torch_fidelity
from robuq_bench.errors import UsageError
from robuq_bench.judging import fidelity, kernel_distance
from robuq_bench.judging.fidelity import (
    Features,
    Reference,
    as_reference,
    compute_fid,
    compute_metrics,
)
from robuq_bench.judging.kernel_distance import mean_kernel_of_draws, stratified_kid
from robuq_bench.judging.sampling import default_labels


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def usual_estimate(x: np.ndarray) -> float:
    """Mean of k over i != j, as KID takes it for either side."""
    k = kernel(x, x)
    return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))


def test_the_mean_of_draws_is_exactly_unbiased_over_every_stratified_sample() -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(3, 2)) + shift for shift in (0.0, 2.0)]
    counts = (2, 3)
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    estimates, usual = [], []
    for rows in itertools.product(range(3), repeat=sum(counts)):
        x = np.stack([values[c][row] for c, row in zip(labels.tolist(), rows, strict=True)])
        usual.append(usual_estimate(x))
        estimates.append(mean_kernel_of_draws(torch.from_numpy(x), labels))
    # Two independent draws of the mixture, by their 6 x 6 joint probabilities.
    population = np.concatenate(values)
    weight = np.repeat(np.array(counts) / sum(counts) / 3, 3)
    expected = weight @ kernel(population, population) @ weight
    assert np.mean(estimates) == pytest.approx(expected, rel=1e-12)
    assert np.mean(usual) < 0.9 * expected


@pytest.mark.parametrize("subset_size", [4, 1000])
@pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
def test_kid_is_exactly_unbiased_whatever_n_and_the_subset_size(
    counts: tuple[int, int], subset_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over every stratified sample is the distance of the distributions themselves."""
    monkeypatch.setattr(fidelity, "KID_SUBSET_SIZE", subset_size)
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 2, 3)) + np.array([0.0, 1.5])[:, None, None]  # [class, image, d]
    classes = np.repeat([0, 1], counts)
    real = values[[0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1]] + 0.1 * rng.normal(size=(7, 3))
    real_classes = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    features = as_features(torch.from_numpy(real))
    known = as_reference(features)
    reference = Reference(known.pool, known.spatial, features, 7, real_classes)
    estimates = []
    for rows in itertools.product(range(2), repeat=6):
        samples = as_features(torch.from_numpy(values[classes, rows]))
        found = compute_metrics(samples, reference, "_x", torch.from_numpy(classes))
        assert found["kid_x_is_stratified"] == 1
        estimates.append(found["kid_x"])
    population = values.reshape(4, 3)
    weight = np.repeat(np.array(counts) / 12, 2)
    of_the_real = mean_kernel_of_draws(features.pool, real_classes)
    assert of_the_real is not None
    expected = weight @ kernel(population, population) @ weight + of_the_real
    expected -= 2 * weight @ kernel(population, real).mean(1)
    assert np.mean(estimates) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    reals=st.integers(2, 9),
    dims=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 200),
)
def test_kid_equals_the_mixture_of_class_means(
    counts: list[int], reals: int, dims: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.normal(size=(len(labels), dims)) + labels[:, None]
    y = rng.normal(size=(reals, dims))
    expected = usual_estimate(y) - 2 * kernel(x, y).mean()
    for c, d in itertools.product(range(len(counts)), repeat=2):
        k = kernel(x[labels == c], x[labels == d])
        mean = k.mean() if c != d else (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
        expected += counts[c] * counts[d] / len(labels) ** 2 * mean
    sides = torch.from_numpy(x), torch.from_numpy(y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_distance, "BLOCK_ELEMENTS", block)
        found = stratified_kid(*sides, torch.from_numpy(labels))
        turned = stratified_kid(*sides[::-1], None, torch.from_numpy(labels))
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-9)
    assert turned == pytest.approx(found, rel=1e-12, abs=1e-12)


CLASSES, DIMENSIONS, COUNT, REPEATS = 5, 4, 40, 300


def as_features(pool: Tensor) -> Features:
    return Features(pool, pool[:, :2], pool)


def draw(labels: Tensor, generator: torch.Generator) -> Features:
    """Unit Gaussians around five well separated class means."""
    means = 3 * torch.eye(CLASSES, DIMENSIONS, dtype=torch.float64)
    noise = torch.randn(len(labels), DIMENSIONS, generator=generator, dtype=torch.float64)
    return as_features(means[labels] + noise)


def kids(fixed_samples: bool, fixed_reference: bool) -> tuple[np.ndarray, np.ndarray]:
    """KID of equal distributions and the usual estimate for the same features, per repeat."""
    generator = torch.Generator().manual_seed(0)
    ours, usual = [], []
    for _ in range(REPEATS):
        drawn = torch.randint(CLASSES, (2, COUNT), generator=generator)
        balanced = default_labels(range(7, 7 + COUNT), CLASSES)
        labels = [
            balanced if fixed else row
            for fixed, row in zip((fixed_samples, fixed_reference), drawn, strict=True)
        ]
        pools = [draw(row, generator).pool for row in labels]
        usual.append(stratified_kid(*pools))
        known = [
            row if fixed else None
            for fixed, row in zip((fixed_samples, fixed_reference), labels, strict=True)
        ]
        ours.append(stratified_kid(*pools, *known))
    return np.array(ours), np.array(usual)


@pytest.mark.parametrize(
    ("fixed_samples", "fixed_reference"), [(True, False), (False, True), (True, True)]
)
def test_equal_mixtures_have_kid_zero_on_average(
    fixed_samples: bool, fixed_reference: bool
) -> None:
    ours, usual = kids(fixed_samples, fixed_reference)
    error = ours.std() / math.sqrt(REPEATS)
    assert abs(ours.mean()) < 3.5 * error
    # As if labels were random, it is low by far more than chance.
    assert usual.mean() < -3.5 * usual.std() / math.sqrt(REPEATS)


def torch_fidelity_kid(samples: Features, real: Features) -> dict[str, float]:
    import_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        samples.pool, real.pool, kid_subsets=10, kid_subset_size=COUNT, verbose=False
    )
    return {name.rsplit("_", 1)[1]: value for name, value in found.items()}


def test_random_labels_leave_kid_to_torch_fidelity() -> None:
    _, usual = kids(fixed_samples=False, fixed_reference=False)
    assert abs(usual.mean()) < 3.5 * usual.std() / math.sqrt(REPEATS)

    generator = torch.Generator().manual_seed(1)
    samples, real = (
        draw(torch.randint(CLASSES, (COUNT,), generator=generator), generator) for _ in range(2)
    )
    metrics = compute_metrics(samples, real)
    direct = torch_fidelity_kid(samples, real)
    assert metrics["kid_is_stratified"] == 0
    assert metrics["kid"] == pytest.approx(direct["mean"], rel=1e-12)
    assert metrics["kid_std"] == pytest.approx(direct["std"], abs=1e-12)
    assert "kid_torch_fidelity" not in metrics


def test_metrics_use_the_labels_of_every_side_that_has_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = default_labels(range(COUNT), CLASSES)
    samples, real = draw(labels, generator), draw(labels, generator)
    reference = as_reference(real)
    labelled = Reference(reference.pool, reference.spatial, real, COUNT, labels)
    pools = samples.pool, real.pool
    both = compute_metrics(samples, labelled, "digits", labels)
    assert both["kid_digits"] == pytest.approx(stratified_kid(*pools, labels, labels), rel=1e-12)
    direct = torch_fidelity_kid(samples, real)
    assert both["kid_digits_torch_fidelity"] == pytest.approx(direct["mean"], rel=1e-12)
    assert both["kid_digits_torch_fidelity_std"] == pytest.approx(direct["std"], abs=1e-12)
    assert "kid_digits_std" not in both, "it would be of another estimate"
    one = compute_metrics(samples, real, labels=labels)
    assert one["kid"] == pytest.approx(stratified_kid(*pools, labels), rel=1e-12)
    other = compute_metrics(samples, labelled)
    assert other["kid"] == pytest.approx(stratified_kid(*pools, None, labels), rel=1e-12)

    # A class with one image: there is no unbiased estimate, and none is given.
    single = labels.clone()
    single[0] = CLASSES
    with caplog.at_level(logging.WARNING):
        assert not any(key.startswith("kid") for key in compute_metrics(samples, real, "", single))
    assert "num_samples of at least 2 x classes" in caplog.text
    assert mean_kernel_of_draws(samples.pool, single) is None
    assert stratified_kid(*pools, None, single) is None
    with pytest.raises(UsageError, match=r"must have shape \(40,\), got \(39,\)"):
        compute_metrics(samples, real, labels=labels[1:])


def test_fid_alone_is_that_of_all_metrics() -> None:
    generator = torch.Generator().manual_seed(3)
    samples, real = (draw(default_labels(range(COUNT), CLASSES), generator) for _ in range(2))
    every = compute_metrics(samples, real, "_digits")
    names = ("fid_digits", "fid_digits_is_rank_deficient")
    assert compute_fid(samples, real, "_digits") == {name: every[name] for name in names}
