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

from robuq_bench import kernel_distance
from robuq_bench._compat import import_torch_fidelity
from robuq_bench.errors import UsageError
from robuq_bench.fidelity import Features, Reference, as_reference, compute_metrics
from robuq_bench.kernel_distance import class_correction
from robuq_bench.sampling import default_labels


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def usual_estimate(x: np.ndarray) -> float:
    """Mean of k over i != j, as KID takes it for either side."""
    k = kernel(x, x)
    return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))


def test_the_corrected_mean_is_exactly_unbiased_over_every_stratified_sample() -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(3, 2)) + shift for shift in (0.0, 2.0)]
    counts = (2, 3)
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    estimates, usual = [], []
    for rows in itertools.product(range(3), repeat=sum(counts)):
        x = np.stack([values[c][row] for c, row in zip(labels.tolist(), rows, strict=True)])
        usual.append(usual_estimate(x))
        correction = class_correction(torch.from_numpy(x), labels)
        assert correction is not None
        estimates.append(usual[-1] + correction)
    # Two independent draws of the mixture, by their 6 x 6 joint probabilities.
    population = np.concatenate(values)
    weight = np.repeat(np.array(counts) / sum(counts) / 3, 3)
    expected = weight @ kernel(population, population) @ weight
    assert np.mean(estimates) == pytest.approx(expected, rel=1e-12)
    assert np.mean(usual) < 0.9 * expected


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    dims=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 200),
)
def test_correction_equals_the_mixture_of_class_means(
    counts: list[int], dims: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.normal(size=(len(labels), dims)) + labels[:, None]
    expected = 0.0
    for c, d in itertools.product(range(len(counts)), repeat=2):
        k = kernel(x[labels == c], x[labels == d])
        mean = k.mean() if c != d else (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
        expected += counts[c] * counts[d] / len(labels) ** 2 * mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_distance, "BLOCK_ELEMENTS", block)
        correction = class_correction(torch.from_numpy(x), torch.from_numpy(labels))
    assert correction == pytest.approx(expected - usual_estimate(x), rel=1e-8, abs=1e-9)


CLASSES, DIMENSIONS, COUNT, REPEATS = 5, 4, 40, 300


def draw(labels: Tensor, generator: torch.Generator) -> Features:
    """Unit Gaussians around five well separated class means."""
    means = 3 * torch.eye(CLASSES, DIMENSIONS, dtype=torch.float64)
    noise = torch.randn(len(labels), DIMENSIONS, generator=generator, dtype=torch.float64)
    pool = means[labels] + noise
    return Features(pool, pool[:, :2], pool)


def kids(fixed_samples: bool, fixed_reference: bool) -> tuple[np.ndarray, np.ndarray]:
    """KID of equal distributions and torch-fidelity's for the same features, per repeat."""
    import_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for _ in range(REPEATS):
        drawn = torch.randint(CLASSES, (2, COUNT), generator=generator)
        balanced = default_labels(range(7, 7 + COUNT), CLASSES)
        labels = [
            balanced if fixed else row
            for fixed, row in zip((fixed_samples, fixed_reference), drawn, strict=True)
        ]
        samples, real = (draw(row, generator) for row in labels)
        kid = kid_features_to_metric(
            samples.pool, real.pool, kid_subsets=1, kid_subset_size=COUNT, verbose=False
        )
        theirs.append(kid["kernel_inception_distance_mean"])
        corrections = [
            class_correction(features.pool, row)
            for features, row, fixed in zip(
                (samples, real), labels, (fixed_samples, fixed_reference), strict=True
            )
            if fixed
        ]
        ours.append(theirs[-1] + sum(c for c in corrections if c is not None))
    return np.array(ours), np.array(theirs)


@pytest.mark.parametrize(
    ("fixed_samples", "fixed_reference"), [(True, False), (False, True), (True, True)]
)
def test_equal_mixtures_have_kid_zero_on_average(
    fixed_samples: bool, fixed_reference: bool
) -> None:
    ours, theirs = kids(fixed_samples, fixed_reference)
    error = ours.std() / math.sqrt(REPEATS)
    assert abs(ours.mean()) < 3.5 * error
    # Uncorrected, it is low by far more than chance.
    assert theirs.mean() < -3.5 * theirs.std() / math.sqrt(REPEATS)


def test_random_labels_need_no_correction() -> None:
    """torch-fidelity alone is right then, and `compute_metrics` gives its value."""
    _, theirs = kids(fixed_samples=False, fixed_reference=False)
    assert abs(theirs.mean()) < 3.5 * theirs.std() / math.sqrt(REPEATS)

    generator = torch.Generator().manual_seed(1)
    samples, real = (
        draw(torch.randint(CLASSES, (COUNT,), generator=generator), generator) for _ in range(2)
    )
    import_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    direct = kid_features_to_metric(
        samples.pool, real.pool, kid_subsets=10, kid_subset_size=COUNT, verbose=False
    )
    metrics = compute_metrics(samples, real)
    assert metrics["kid_class_correction"] == 0
    assert metrics["kid"] == pytest.approx(direct["kernel_inception_distance_mean"], rel=1e-12)


def test_metrics_correct_every_side_that_has_labels(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = default_labels(range(COUNT), CLASSES)
    samples, real = draw(labels, generator), draw(labels, generator)
    reference = as_reference(real)
    labelled = Reference(reference.pool, reference.spatial, real, COUNT, labels)
    plain = compute_metrics(samples, real)["kid"]
    own, other = (class_correction(f.pool, labels) for f in (samples, real))
    assert own is not None
    assert other is not None
    both = compute_metrics(samples, labelled, "digits", labels)
    assert both["kid_digits_class_correction"] == pytest.approx(own + other, rel=1e-12)
    assert both["kid_digits"] == pytest.approx(plain + own + other, rel=1e-12)
    one = compute_metrics(samples, real, labels=labels)
    assert one["kid"] == pytest.approx(plain + own, rel=1e-12)

    # A class with one image: there is no unbiased estimate, and none is given.
    single = labels.clone()
    single[0] = CLASSES
    with caplog.at_level(logging.WARNING):
        assert not any(key.startswith("kid") for key in compute_metrics(samples, real, "", single))
    assert "single image" in caplog.text
    assert class_correction(samples.pool, single) is None
    with pytest.raises(UsageError, match=r"must have shape \(40,\), got \(39,\)"):
        compute_metrics(samples, real, labels=labels[1:])
