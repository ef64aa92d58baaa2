"""Features must fit the images: size, channels, and (as far as it can be known) what they show."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from robuq_bench.checkpointing import save_tensors, sidecar_path
from robuq_bench.config import Workload, load_workload, resolve
from robuq_bench.config.workload import EvaluationConfig
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.errors import CheckpointError, ConfigError, UsageError
from robuq_bench.files import sha256_file
from robuq_bench.judging import feature_networks
from robuq_bench.judging.evaluation import check_features, load_reference
from robuq_bench.judging.feature_networks import (
    FeatureNetwork,
    load_classifier,
    load_feature_network,
)
from robuq_bench.judging.feature_recipe import FeatureRecipe
from robuq_bench.judging.features import (
    ARCHITECTURE,
    ASSET,
    load_features,
    save_features,
    train_feature_network,
)
from robuq_bench.judging.fidelity import compute_metrics
from robuq_bench.progress import Progress
from robuq_bench.runs.study import run_study
from studies.train_features import study as train_features


def evaluation_section(**fields: object) -> EvaluationConfig:
    return load_workload("digits").evaluation.model_copy(update=fields)


def pictures(channels: int, height: int, width: int | None = None, count: int = 60) -> ImageData:
    shape = (count, channels, height, width or height)
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return make_image_data(values.byte(), torch.arange(count) % 3, "imagefolder:3 classes")


def workload(**evaluation: Any) -> Workload:
    digits = load_workload("digits")
    return digits.model_copy(update={"evaluation": digits.evaluation.model_copy(update=evaluation)})


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset(load_workload("digits").data)


@pytest.mark.parametrize("shape", [(3, 16), (3, 8), (1, 16), (1, 8, 16), (2, 8), (1, 32)])
def test_images_of_another_shape_are_refused_by_every_way_in(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path))
    data, network = pictures(*shape), load_classifier()
    found = f"these have {shape[0]} of {shape[1]}x{shape[-1]}"
    for attempt in (
        lambda: network.extract(data.images),
        lambda: load_reference(workload(), data, network),
    ):
        with pytest.raises(UsageError, match=r"'digits' is for .* 1 channel\(s\) of 8x8") as caught:
            attempt()
        assert found in str(caught.value)
        for way_out in ("train-features", "evaluation.features=inception", "adapt_images=true"):
            assert way_out in str(caught.value)


def test_adapted_images_give_metrics_of_another_name_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path))
    adapting = workload(adapt_images=True)
    network, data = load_feature_network(adapting.evaluation), pictures(3, 16)
    with caplog.at_level(logging.WARNING):
        reference = load_reference(adapting, data, network)
    assert "3x16x16 images are adapted to feature network 'digits' (1 channel(s), 8x8)" in (
        caplog.text
    )
    assert "fid_digits_adapted" in caplog.text
    metrics = compute_metrics(network.extract(data.images), reference, network.suffix)
    assert {"fid_digits_adapted", "kid_digits_adapted_torch_fidelity_std"} <= metrics.keys()
    assert not any("_digits_adapted" not in name for name in metrics)


@pytest.mark.parametrize("features", ["digits", "inception"])
def test_what_needs_no_adapting_says_how_to_switch_it_off(
    digits: ImageData, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a workload that sets it, as mnist32 does, where nothing can be left out."""

    def check(*settings: str) -> None:
        config = resolve("toy", "1", "a2", "mnist32", 0, settings)
        check_features(load_feature_network(config.workload.evaluation), (1, 8, 8), digits)

    network = load_classifier()
    monkeypatch.setattr(feature_networks, "load_inception", lambda *args, **kwargs: network)
    chosen = f"evaluation.features={features}"
    with pytest.raises(UsageError) as caught:
        check(chosen)
    (way_out,) = re.findall(r"--set ([\w.]+=\w+)", str(caught.value))
    check(chosen, way_out)


def test_the_switch_is_on_or_not_written_down() -> None:
    for text in ("false", "none"):
        config = resolve("toy", "1", "a2", "mnist32", 0, [f"evaluation.adapt_images={text}"])
        assert config.workload.evaluation.adapt_images is None
    for text in ("1", "yes", "'true'"):
        with pytest.raises(ConfigError, match="adapt_images"):
            resolve("toy", "1", "a2", "mnist32", 0, [f"evaluation.adapt_images={text}"])
    assert load_workload("mnist32").evaluation.adapt_images is True


def test_other_images_of_the_right_shape_are_judged_with_a_warning(
    digits: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    network = load_classifier()
    with caplog.at_level(logging.WARNING):
        check_features(network, (1, 8, 8), digits)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        check_features(network, (1, 8, 8), pictures(1, 8))
    assert "'digits' was trained on other images (SHA-256 4318f5a27219)" in caplog.text


def test_a_copy_of_the_packaged_network_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(ASSET.read_bytes())
    sidecar_path(path).write_text(f"{sha256_file(path)}  {path.name}\n")
    assert load_classifier(path).suffix == load_classifier().suffix == "_digits"


def test_inception_takes_grey_and_colour_of_any_size() -> None:
    network = FeatureNetwork("inception", "", "0" * 64, lambda x: (x, x, x), torch.device("cpu"))
    for shape in ((1, 28, 28), (3, 256, 256), (3, 64, 48)):
        network.check_fit(*shape)
    with pytest.raises(UsageError, match=r"'inception' .* 1 or 3 channel\(s\); these have 4"):
        network.check_fit(4, 32, 32)


@pytest.mark.parametrize(("channels", "size", "inner"), [(3, 16, 16), (1, 28, 32), (3, 12, 16)])
def test_features_can_be_trained_for_any_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    channels: int,
    size: int,
    inner: int,
) -> None:
    """The way out of the refusal leads somewhere."""
    data = pictures(channels, size)
    fields = [
        f"data.{key}={value}" for key, value in (("image_size", size), ("channels", channels))
    ]
    fields += [f"model.input_size={size}", f"model.in_channels={channels}"]
    fields += ["train-features.images_seen=100"]
    config = resolve("train-features", train_features.VERSION, "fp", "digits", 0, fields)
    monkeypatch.setattr(train_features, "load_dataset", lambda *_, **__: data)
    context = Context.create(device="cpu", progress=Progress(quiet=True))
    result = run_study(config, tmp_path, context)
    path = result.path / "checkpoints" / "features.safetensors"
    network = load_classifier(path)
    assert (network.channels, network.size) == ((channels,), size)
    digest = sha256_file(path)[:8]
    assert (network.name, network.suffix) == (f"digits-{digest}", f"_digits-{digest}")
    adapting = load_classifier(path, adapts=True)
    assert adapting.suffix == f"_digits-{digest}_adapted"
    assert load_features(path)[0].input_size == inner
    with caplog.at_level(logging.WARNING):
        check_features(network, (channels, size, size), data)
    assert caplog.messages == []
    features = network.extract(data.images)
    assert (features.pool.shape[1], features.spatial.shape[1]) == network.dimensions
    with pytest.raises(UsageError, match="is for images with"):
        network.extract(pictures(4 - channels, size).images)


def test_a_network_for_colour_sees_colour() -> None:
    data = pictures(3, 8)
    network = train_feature_network(data, FeatureRecipe(epochs=1)).network.eval()
    swapped = data.images.flip(1)  # the same mean over the channels
    assert not torch.allclose(network(data.images)[0], network(swapped)[0])
    grey = data.images[:, :1]
    same = network(grey)[0], network(grey.expand(-1, 3, -1, -1))[0]
    assert torch.equal(*same)
    with pytest.raises(UsageError, match="1 or 3 channels, not 2"):
        train_feature_network(pictures(2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "no name for metrics"),
        ({"name": None}, "name"),
        ({"input_size": "eight"}, "eight"),
        ({"input_size": "-8"}, "size of -8"),
        ({"input_size": "9" * 30}, "size of 9999"),
        ({"num_classes": "0"}, "size of 0"),
        ({"channels": "2"}, "1 or 3 channels"),
        ({"image_size": "x"}, "'x'"),
        ({"widths": "32,32,64,64,65"}, "weights"),
        ({"widths": "32,32,6"}, "third at least 7"),
        ({"widths": "32,32,9999999"}, "size of 9999999"),
        ({"widths": "32,32,64,64,60000"}, "1 to 1024"),
        ({"halvings": "4,2"}, "ascend"),
        ({"halvings": "2,5"}, "ascend"),
    ],
)
def test_feature_files_that_say_nonsense_are_named(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    trained = train_feature_network(pictures(1, 8), FeatureRecipe(epochs=1))
    path = tmp_path / "f.safetensors"
    save_features(path, trained, name="f", command="none")
    network, metadata, _ = load_features(path)
    metadata = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    save_tensors(path, network.float().state_dict(), metadata)
    with pytest.raises(CheckpointError, match=rf"f\.safetensors does not fit.*{message}"):
        load_features(path)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network, metadata, _ = load_features(ASSET)
    state = {name: tensor.clone() for name, tensor in network.float().state_dict().items()}
    state["norms.2.running_var"][3] = float("nan")
    save_tensors(tmp_path / "f.safetensors", state, metadata)
    with pytest.raises(
        CheckpointError, match=r"f\.safetensors .*not finite.*norms\.2\.running_var"
    ):
        load_features(tmp_path / "f.safetensors")


@settings(max_examples=60)
@given(st.data())
def test_any_bytes_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With a right checksum, as of a file that was damaged before it was listed."""
    path = tmp_path_factory.mktemp("fuzz") / "victim.safetensors"
    content = bytearray(ASSET.read_bytes())
    place = data.draw(st.integers(0, HEADER - 1))
    content[place] = data.draw(st.sampled_from(b'\0"{}[],:0919xX'))
    path.write_bytes(content)
    sidecar_path(path).write_text(f"{sha256_file(path)}  {path.name}\n")
    assert "victim.safetensors" in read_or_complain(path)


@pytest.mark.parametrize(
    "metadata", ["[]", '"x"', json.dumps({"architecture": ARCHITECTURE, "name": 5})]
)
def test_metadata_of_another_kind_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "victim.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"robuq_bench": metadata})
    sidecar_path(path).write_text(f"{sha256_file(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match=r"victim\.safetensors"):
        load_features(path)


HEADER = 8 + int.from_bytes(ASSET.read_bytes()[:8], "little")


def read_or_complain(path: Path) -> str:
    try:
        load_features(path)
    except CheckpointError as error:
        return str(error)
    return f"{path} is sound"
