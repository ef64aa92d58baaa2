"""Reference features: the cache that answers by content, and ADM's `.npz` files."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robuq_bench.config import load_workload
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.judging import fidelity
from robuq_bench.judging.feature_networks import FeatureNetwork, load_classifier
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import (
    Reference,
    as_reference,
    compute_metrics,
    feature_statistics,
    load_adm_reference,
    reference_features,
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """The digits in random order: the file is ordered by writer."""
    data = load_dataset(load_workload("digits").data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return make_image_data(data.images[order], data.labels[order], data.source)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_classifier()


@pytest.fixture(scope="module")
def reference(digits: ImageData, network: FeatureNetwork) -> Features:
    return network.extract(digits.images[:600])


@pytest.fixture(scope="module")
def noisy(digits: ImageData) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = digits.images[700:1000].float()
    pixels += 30 * torch.randn(pixels.shape, generator=generator)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def part(digits: ImageData, start: int) -> ImageData:
    rows = slice(start, start + 20)
    return make_image_data(digits.images[rows], digits.labels[rows], "digits")


def counting(network: FeatureNetwork) -> tuple[FeatureNetwork, list[int]]:
    calls: list[int] = []

    def forward(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(images))
        return network.forward(images)

    return dataclasses.replace(network, forward=forward), calls


def equal(one: Features, two: Features) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
    )


def test_reference_is_computed_once_per_content(
    digits: ImageData, network: FeatureNetwork, tmp_path: Path
) -> None:
    counted, calls = counting(network)
    first = reference_features(counted, part(digits, 0), cache=tmp_path)
    again = reference_features(counted, part(digits, 0), cache=tmp_path)
    assert calls == [20]
    assert equal(first, again)
    assert equal(first, network.extract(digits.images[:20]))
    other = reference_features(counted, part(digits, 20), 256, cache=tmp_path)
    assert not equal(first, other)
    renamed = dataclasses.replace(counted, sha256="0" * 64)
    reference_features(renamed, part(digits, 0), cache=tmp_path)
    assert calls == [20, 20, 20]


def test_cache_folder_is_the_variable(
    digits: ImageData, network: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path))
    reference_features(network, part(digits, 0))
    assert len(list((tmp_path / "features").glob("digits-*.safetensors"))) == 1
    monkeypatch.delenv("ROBUQ_CACHE")
    assert fidelity.cache_folder() == Path.home() / ".cache" / "robuq-bench"


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_cache_is_reported_and_replaced(
    digits: ImageData,
    network: FeatureNetwork,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    expected = reference_features(network, part(digits, 0), cache=tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage == "truncate" else whole[:-9] + b"\7" + whole[-8:])
    with caplog.at_level(logging.WARNING):
        assert equal(reference_features(network, part(digits, 0), cache=tmp_path), expected)
    assert path.name in caplog.text
    assert path.read_bytes() == whole


def test_unwritable_cache_is_reported_and_done_without(
    digits: ImageData, network: FeatureNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        features = reference_features(network, part(digits, 0), cache=blocked)
    assert len(features) == 20
    assert "not cached" in caplog.text


def test_no_place_for_a_cache_is_reported_and_done_without(
    digits: ImageData,
    network: FeatureNetwork,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fidelity, "cache_folder", lambda: None)
    with caplog.at_level(logging.WARNING):
        features = reference_features(network, part(digits, 0))
    assert equal(features, network.extract(part(digits, 0).images))
    assert "features are not cached; set ROBUQ_CACHE" in caplog.text


def test_latents_have_no_reference_features(network: FeatureNetwork) -> None:
    latents = make_image_data(torch.zeros(9, 4, 8, 8), torch.zeros(9).long(), "latents:1 shards")
    with pytest.raises(UsageError, match="ADM reference"):
        reference_features(network, latents)


def write_adm(path: Path, features: Features, **extra: np.ndarray) -> None:
    known = as_reference(features)
    assert known.spatial is not None
    np.savez(
        path,
        mu=known.pool.mu.astype(np.float32),
        sigma=known.pool.sigma,
        mu_s=known.spatial.mu,
        sigma_s=known.spatial.sigma.astype(np.float32),
        **extra,
    )


def test_adm_reference_of_mixed_dtypes(
    tmp_path: Path, digits: ImageData, network: FeatureNetwork, reference: Features, noisy: Tensor
) -> None:
    samples = network.extract(noisy)
    path = tmp_path / "ref.npz"
    pixels = digits.images[:40].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    write_adm(path, reference, arr_0=pixels)
    metrics = compute_metrics(samples, load_adm_reference(path))
    exact = compute_metrics(samples, reference)
    assert metrics["fid"] == pytest.approx(exact["fid"], rel=1e-5)
    assert metrics["sfid"] == pytest.approx(exact["sfid"], rel=1e-4)
    assert not {"kid", "precision", "recall"} & metrics.keys()
    with_images = load_adm_reference(path, network)
    assert with_images.features is not None
    assert torch.allclose(with_images.features.pool, reference.pool[:40], atol=1e-9)
    assert {"kid", "precision", "recall"} <= compute_metrics(samples, with_images).keys()


def test_adm_reference_without_spatial_statistics(tmp_path: Path, reference: Features) -> None:
    path = tmp_path / "ref.npz"
    stats = feature_statistics(reference.pool)
    np.savez(path, mu=stats.mu, sigma=stats.sigma)
    known = load_adm_reference(path)
    assert known == Reference(known.pool, None, None, None)
    assert "sfid" not in compute_metrics(reference, known)


def test_damaged_adm_references_are_named(tmp_path: Path, reference: Features) -> None:
    path = tmp_path / "ref.npz"
    with pytest.raises(MissingResourceError, match=r"ref\.npz.*guided-diffusion"):
        load_adm_reference(path)
    write_adm(path, reference)
    whole = path.read_bytes()
    for share in (0, 0.1, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=r"ref\.npz"):
            load_adm_reference(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"ref\.npz"):
        load_adm_reference(path)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(CheckpointError, match="single array"):
        load_adm_reference(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(CheckpointError, match="sigma"):
        load_adm_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_adm_reference(path)


EYE, NAN = np.eye(64), np.full((64, 64), np.nan)
SKEWED, NEGATIVE = np.triu(np.ones((64, 64))), np.eye(64) * -1
IMAGES = np.zeros((9, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": NAN[0]}, "not finite"),
        ({"sigma": np.full((64, 64), np.inf)}, "not finite"),
        ({"sigma": NAN}, "not finite"),
        ({"sigma": SKEWED}, "symmetric"),
        ({"sigma": NEGATIVE}, "variances"),
        ({"mu": np.zeros(64, complex)}, "must be real"),
        ({"mu": np.array(["x"] * 64)}, "must be real"),
        ({"mu": np.array([None] * 64)}, "allow_pickle"),
        ({"mu": np.zeros(48), "sigma": np.eye(48)}, "mu has 48 values, .* gives 64"),
        ({"mu_s": np.zeros(64), "sigma_s": EYE}, "mu_s has 64 values, .* gives 112"),
        ({"mu_s": np.zeros(112)}, "sigma_s"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 must be uint8"),
        ({"arr_0": IMAGES[0]}, "arr_0 must be uint8"),
        ({"arr_0": IMAGES[:3]}, "n >= 5"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "arr_0 must be uint8"),
        ({"arr_0": np.zeros((9, 16, 16, 1), np.uint8)}, "16x16, those to judge 8x8"),
        ({"arr_0": np.arange(9 * 192).reshape(9, 8, 8, 3).astype(np.uint8)}, "3 of 8x8"),
    ],
)
def test_references_of_nonsense_are_named(
    tmp_path: Path, network: FeatureNetwork, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "ref.npz"
    sound = {"mu": np.zeros(64), "sigma": EYE, "arr_0": IMAGES}
    np.savez(path, **sound)
    assert load_adm_reference(path, network, image_size=8).features is not None
    np.savez(path, **{**sound, **arrays})
    with pytest.raises(CheckpointError, match=rf"ref\.npz.*{message}"):
        load_adm_reference(path, network, image_size=8)


def test_float32_statistics_may_be_asymmetric_in_their_last_bits(tmp_path: Path) -> None:
    sigma = EYE + 1e-7 * np.triu(np.ones((64, 64)))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=sigma)
    assert np.array_equal(load_adm_reference(tmp_path / "ref.npz").pool.sigma, sigma)


@given(st.data())
def test_any_bytes_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "ref.npz"
    stream = io.BytesIO()
    np.savez(stream, mu=np.zeros(3), sigma=np.eye(3))
    content = bytearray(stream.getvalue()[: data.draw(st.integers(0, len(stream.getvalue())))])
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert "ref.npz" in read_or_complain(path)


def read_or_complain(path: Path) -> str:
    try:
        load_adm_reference(path)
    except CheckpointError as error:
        return str(error)
    return f"{path} is sound"
