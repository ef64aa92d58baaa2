"""Nearest training images against brute force and scikit-learn; ratios against SciPy."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from robuq_bench.config import load_workload
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.judging import neighbours
from robuq_bench.judging.feature_networks import load_classifier
from robuq_bench.judging.features import ASSET
from robuq_bench.judging.fidelity import as_reference
from robuq_bench.judging.neighbours import TrainingImages, nearest
from robuq_bench.judging.real_images import draw_real_images
from robuq_bench.judging.sampling import GRID_GAP_PIXELS
from robuq_bench.judging.spaces import FeatureSpace


@settings(max_examples=40)
@given(
    n=st.integers(1, 9), m=st.integers(2, 12), d=st.integers(1, 5), block=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_nearest_is_brute_forces(n: int, m: int, d: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.integers(0, 256, (n, d)).astype(np.uint8)
    images = rng.integers(0, 256, (m, d)).astype(np.uint8)
    expected = cdist(queries.astype(float), images.astype(float))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK_ELEMENTS", block)
        distances, rows = nearest(torch.from_numpy(queries), torch.from_numpy(images))
        own = torch.from_numpy(rng.integers(0, m, n))
        others, other_rows = nearest(torch.from_numpy(queries), torch.from_numpy(images), own)
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-12)
    assert rows.tolist() == expected.argmin(1).tolist()
    expected[np.arange(n), own] = np.inf
    np.testing.assert_allclose(others, expected.min(1), rtol=1e-12)
    assert other_rows.tolist() == expected.argmin(1).tolist()


def training_images(data: ImageData, heldout: ImageData | None, count: int) -> TrainingImages:
    network = load_classifier(ASSET)
    reference = as_reference(network.extract(data.images))
    real = draw_real_images(data, heldout, count, 10)
    assert real is not None
    space = FeatureSpace(network, reference, data, heldout, 250)
    return TrainingImages(data, space, real)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset(load_workload("digits").data)


@pytest.mark.parametrize("has_heldout", [True, False])
def test_ratios_are_those_of_medians(digits: ImageData, has_heldout: bool) -> None:
    parts = (slice(0, 1297), slice(1297, None))
    data, rest = (make_image_data(digits.images[p], digits.labels[p], "part") for p in parts)
    training = training_images(data, rest if has_heldout else None, 200)
    rows = training.real.draws[0].rows
    noise = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    samples = torch.cat([noise.byte(), data.images[:70]])
    network = training.space.network
    pool = network.extract(samples).pool
    found = training.ratios(samples, pool)
    real = (rest if has_heldout else data).images[rows]
    spaces = {
        "nn_ratio_pixels": lambda images: images.flatten(1).double(),
        "nn_ratio_digits": lambda images: network.extract(images).pool.double(),
    }
    assert found.keys() == {*spaces, "images_searched"}
    assert found["images_searched"] == len(data)
    for name, mapped in spaces.items():
        tree = NearestNeighbors(n_neighbors=2, algorithm="kd_tree").fit(mapped(data.images))
        of_samples = tree.kneighbors(mapped(samples))[0][:, 0]
        # An image of the training set is its own nearest neighbour; no digit is there twice.
        of_real = tree.kneighbors(mapped(real))[0][:, 0 if has_heldout else 1]
        assert found[name] == pytest.approx(np.median(of_samples) / np.median(of_real), rel=1e-6)


def test_copies_have_ratio_0_and_duplicates_none(digits: ImageData) -> None:
    training = training_images(digits, None, 200)
    copies = digits.images[:50]
    found = training.ratios(copies, training.space.network.extract(copies).pool)
    assert found["nn_ratio_pixels"] == 0
    assert found["nn_ratio_digits"] < 1e-6
    twice = make_image_data(digits.images.repeat(2, 1, 1, 1), digits.labels.repeat(2), "twice")
    doubled = training_images(twice, None, 200)
    assert "nn_ratio_pixels" not in doubled.ratios(
        copies, training.space.network.extract(copies).pool
    )


def test_the_picture_has_samples_above_what_is_nearest(digits: ImageData) -> None:
    training = training_images(digits, None, 200)
    samples = digits.images[[3, 5, 8, 13, 21]] // 2
    pool = training.space.network.extract(samples).pool
    with Image.open(io.BytesIO(training.picture(samples, pool, 2, 1))) as picture:
        pixels = np.asarray(picture)
    step = 8 + GRID_GAP_PIXELS
    assert pixels.shape == (6 * step - GRID_GAP_PIXELS, 2 * step - GRID_GAP_PIXELS)
    by_pixels = cdist(samples.flatten(1).double(), digits.images.flatten(1).double()).argmin(1)
    features = training.space.training_features.pool
    by_features = cdist(pool, features).argmin(1)
    for index in range(4):
        row, column = divmod(index, 2)
        shown = (samples[index], digits.images[by_pixels[index]], digits.images[by_features[index]])
        for line, image in enumerate(shown):
            top, left = (3 * row + line) * step, column * step
            assert np.array_equal(pixels[top : top + 8, left : left + 8], image[0].numpy())


def test_one_sample_has_a_picture(digits: ImageData, tmp_path: Path) -> None:
    training = training_images(digits, None, 200)
    pool = training.space.network.extract(digits.images[:1]).pool
    with Image.open(io.BytesIO(training.picture(digits.images[:1], pool, 10, 2))) as picture:
        assert picture.size == (16, 3 * 16 + 2 * GRID_GAP_PIXELS)
