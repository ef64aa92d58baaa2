"""Real images in place of samples, the second feature space, accuracy, held-out validation."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robuq_bench.config import Config, load_workload, resolve
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout, make_image_data
from robuq_bench.errors import CheckpointError, ConfigError, UsageError
from robuq_bench.judging.evaluation import validation_losses
from robuq_bench.judging.feature_networks import load_classifier
from robuq_bench.judging.feature_recipe import FeatureRecipe
from robuq_bench.judging.features import ASSET, Features, save_features, train_feature_network
from robuq_bench.judging.fidelity import as_reference
from robuq_bench.judging.real_images import (
    DRAWS,
    ENOUGH_HELDOUT,
    Draw,
    Floor,
    RealImages,
    classifier_record,
    draw_real_images,
)
from robuq_bench.judging.spaces import FeatureSpace, accuracy
from robuq_bench.judging.summary import metric_names
from robuq_bench.judging.teacher import load_judged
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run, open_existing
from robuq_bench.runs.study import run_study
from studies import teacher_eval
from studies.train_and_eval import study as train_and_eval

HELDOUT = 497  # of the 1,797 digits


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset(load_workload("digits").data)


@pytest.fixture(scope="module")
def second(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another feature network, barely trained."""
    path = tmp_path_factory.mktemp("features") / "other.safetensors"
    trained = train_feature_network(digits, FeatureRecipe(epochs=3), seed=1)
    save_features(path, trained, name="other", command="-")
    return path


@pytest.fixture(scope="module")
def idx_folder(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as IDX files, the last of them held out."""
    folder = tmp_path_factory.mktemp("idx")
    for split, rows in (("train", slice(-HELDOUT)), ("t10k", slice(-HELDOUT, None))):
        images, labels = digits.images[rows, 0].numpy(), digits.labels[rows].numpy()
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return folder


@pytest.fixture(scope="module")
def overrides(idx_folder: Path, second: Path) -> list[str]:
    return ["data.source=idx", f"data.path={idx_folder}", f"evaluation.second_features={second}"]


def context() -> Context:
    return Context.create(device="cpu", threads=1, progress=Progress(quiet=True), argv=["test"])


def config_of(workload: Path, overrides: Sequence[str], plan: str = "fp") -> Config:
    study = "teacher-eval" if plan == "fp" else "train-and-eval"
    version = teacher_eval.VERSION if plan == "fp" else train_and_eval.VERSION
    return resolve(study, version, plan, str(workload), 0, list(overrides))


@pytest.fixture(scope="module")
def finished(
    tiny_workload: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A plan's run, and beside it the teacher's, on data with held-out images in two spaces."""
    config = config_of(tiny_workload, overrides, "a2")
    return open_existing(run_study(config, tmp_path_factory.mktemp("runs"), context()).path)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The distance by its formula; the trace of a matrix's root is the sum of its roots."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(scipy.linalg.eigvals(s @ t)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * roots.sum())


def images_of(run: Run, name: str) -> Tensor:
    with np.load(run.path / "samples" / f"{name}.npz") as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)


@settings(max_examples=40)
@given(
    per_class=st.lists(st.integers(4, 30), min_size=2, max_size=5),
    heldout=st.lists(st.integers(4, 30), min_size=5, max_size=5) | st.none(),
    count=st.integers(5, 60),
)
def test_draws_are_balanced_as_samples_are_and_share_no_image(
    per_class: list[int], heldout: list[int] | None, count: int
) -> None:
    classes = len(per_class)

    def data(counts: list[int]) -> ImageData:
        labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(counts))
        return make_image_data(torch.zeros(len(labels), 1, 1, 1).byte(), labels, "made")

    held = data(heldout[:classes]) if heldout else None
    own = data(per_class)
    found = draw_real_images(own, held, count, classes)
    smallest = min(heldout[:classes]) if heldout else min(per_class)
    size = min(count, smallest // 2 * classes)
    if heldout and size < count:
        smallest, held = min(per_class), None
        size = min(count, smallest // 2 * classes)
    if size < 5:
        assert found is None
        return
    assert found is not None
    assert found.images == ("held-out" if held else "training")
    assert (found.count, len(found.draws)) == (size, DRAWS)
    for draw in found.draws:
        assert torch.equal(found.data.labels[draw.rows], torch.arange(size) % classes)
        assert len(set(draw.rows.tolist())) == size
        if held:
            assert draw.rest is None
            continue
        assert draw.rest is not None
        assert not set(draw.rows.tolist()) & set(draw.rest.tolist())
        rest = own.labels[draw.rest].bincount(minlength=classes)
        each = -(-size // classes)
        assert rest.tolist() == [smallest - each] * classes
    for start in range(0, DRAWS - found.disjoint + 1, found.disjoint):
        together = [d.rows.tolist() for d in found.draws[start : start + found.disjoint]]
        assert len(set(itertools.chain(*together))) == size * found.disjoint
    if held:
        assert found.disjoint == min(DRAWS, smallest // -(-size // classes)) >= 2
    again = draw_real_images(own, held, count, classes)
    assert again is not None
    assert all(map(torch.equal, (d.rows for d in found.draws), (d.rows for d in again.draws)))


def test_few_heldout_images_serve_where_they_are_enough() -> None:
    def data(each: int) -> ImageData:
        labels = torch.arange(10).repeat_interleave(each)
        return make_image_data(torch.zeros(10 * each, 1, 1, 1).byte(), labels, "made")

    found = draw_real_images(data(1000), data(200), 3000, 10)
    assert found is not None
    assert (found.images, found.count, found.disjoint) == ("held-out", ENOUGH_HELDOUT, 2)
    found = draw_real_images(data(1000), data(190), 3000, 10)
    assert found is not None
    assert (found.images, found.count) == ("training", 3000)
    assert found.draws[0].rest is not None
    assert len(found.draws[0].rest) == 7000


def test_latents_and_absent_classes_have_no_floor() -> None:
    labels = torch.arange(40) % 4
    latents = make_image_data(torch.zeros(40, 4, 2, 2), labels, "latents")
    assert draw_real_images(latents, None, 10, 4) is None
    images = make_image_data(torch.zeros(40, 1, 2, 2).byte(), labels, "made")
    assert draw_real_images(images, None, 10, 5) is None


def test_the_floor_of_the_digits_is_that_of_halves(digits: ImageData) -> None:
    """870 against 870 with equal class counts, by SciPy; samples meet the very same halves."""
    network = load_classifier(ASSET)
    real = draw_real_images(digits, None, 1000, 10)
    assert real is not None
    assert real.count == 870
    features = network.extract(digits.images)
    reference = as_reference(features)
    space = FeatureSpace(network, reference, digits, None, 250)
    real = dataclasses.replace(real, draws=real.draws[:4])
    records = [real.record(draw, [space]) for draw in real.draws]
    assert len({record["fid_digits"] for record in records}) == 4, "no half comes twice"
    pool = features.pool.numpy()
    samples = features.pool[:1000]
    expected = []
    for record, draw in zip(records, real.draws, strict=True):
        assert draw.rest is not None
        assert (record["images"], record["num_images"], record["num_reference"]) == (
            "training", 870, 870,
        )  # fmt: skip
        value = frechet(pool[draw.rows], pool[draw.rest])
        assert record["fid_digits"] == pytest.approx(value, rel=1e-6)
        expected.append(frechet(samples[:870].numpy(), pool[draw.rest]))
    mean = np.mean([record["fid_digits"] for record in records])
    assert 0.09 < mean < 0.14, "as measured by other code: 0.115"
    given_samples = Features(samples, features.spatial[:1000], features.logits[:1000])
    found = Floor(space, real).fid_of(given_samples)
    assert found == pytest.approx(np.mean(expected), rel=1e-6)
    assert Floor(space, real).fid_of(given_samples[slice(0, 869)]) is None


def test_a_reference_of_the_workload_is_met_where_images_are_held_out() -> None:
    rng = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(60, n, generator=rng).double() for n in (3, 4, 2)))
    rows = torch.arange(20)
    real = RealImages("held-out", None, (Draw(rows, None),) * DRAWS, 1, 2)  # type: ignore[arg-type]
    space = FeatureSpace(None, as_reference(features[slice(20, 60)]), None, None, 9)  # type: ignore[arg-type]
    expected = frechet(features.pool[:20].numpy(), features.pool[20:].numpy())
    assert Floor(space, real).fid_of(features) == pytest.approx(expected, rel=1e-6)


def test_records_of_a_run_with_heldout_images(finished: Run, idx_folder: Path) -> None:
    """Everything that a run says of real images and of both spaces, recomputed from its files."""
    workload = finished.config.workload
    data = load_dataset(workload.data)
    heldout = load_heldout(workload.data)
    assert heldout is not None
    assert len(heldout) == HELDOUT
    assert finished.manifest["inputs"]["held-out data"]["sha256"] == heldout.sha256
    networks = [load_classifier(ASSET), load_classifier(Path(workload.evaluation.second_features))]
    names = [network.name for network in networks]
    assert names[0] == "digits"
    assert names[1].startswith("other-")
    assert finished.manifest["inputs"]["second features"]["network"] == names[1]
    real = draw_real_images(data, heldout, workload.evaluation.num_samples, 10)
    assert real is not None
    of_data = {network.name: network.extract(data.images).pool.numpy() for network in networks}
    assert finished.has(f"floor/{DRAWS - 1}")
    for index, draw in enumerate(real.draws[:3]):
        record = finished.get(f"floor/{index}")
        assert record is not None
        assert record["source_run"].startswith("teacher-eval/")
        assert (record["images"], record["num_images"]) == ("held-out", 130)
        assert (record["num_reference"], record["reference"]) == (len(data), "its own")
        for name, network in zip(names, networks, strict=True):
            pool = network.extract(heldout.images[draw.rows]).pool.numpy()
            assert record[f"fid_{name}"] == pytest.approx(frechet(pool, of_data[name]), rel=1e-6)
    for name, network in zip(names, networks, strict=True):
        samples = images_of(finished, "student-1")
        features = network.extract(samples)
        record = finished.get("metrics/student/1")
        assert record is not None
        asked = torch.arange(130, 260) % 10
        right = (features.logits.argmax(1) == asked).sum().item()
        assert record[f"accuracy_{name}"] == right / 130
        assert record[f"fid_{name}_at_floor"] == record[f"fid_{name}"], "N and reference are equal"
        assert {f"{m}_{name}" for m in ("fid", "sfid", "is", "kid", "recall")} <= record.keys()
        known = finished.get(f"classifier/{name}")
        assert known is not None
        logits = network.extract(heldout.images).logits
        assert known["accuracy"] == (logits.argmax(1) == heldout.labels).double().mean().item()
        assert known["images"] == "held-out (idx:t10k)"
    assert record["images_searched"] == len(data)
    shown = metric_names([record])
    assert "images_searched" not in shown
    assert {"accuracy_digits", "nn_ratio_pixels", f"fid_{names[1]}"} <= set(shown)
    assert shown.index("fid_digits") < shown.index(f"fid_{names[1]}")
    assert not [name for name in shown if name.endswith("_at_floor")]


def test_validation_is_on_heldout_images(finished: Run) -> None:
    record = finished.get("validation")
    assert record is not None
    assert record["validation_images"] == "held-out"
    workload = finished.config.workload
    data, heldout = load_dataset(workload.data), load_heldout(workload.data)
    teacher, _ = load_teacher(workload, "cpu")
    on_training = validation_losses(teacher, teacher, data, workload, "cpu")
    assert on_training["validation_images"] == "training"
    assert heldout is not None
    as_data = validation_losses(teacher, teacher, heldout, workload, "cpu")
    on_heldout = validation_losses(teacher, teacher, data, workload, "cpu", heldout)
    assert on_heldout["denoising_loss"] == as_data["denoising_loss"]
    assert on_heldout["denoising_loss"] != on_training["denoising_loss"]


def test_other_heldout_images_are_not_the_runs(
    finished: Run, digits: ImageData, tiny_workload: Path, overrides: list[str]
) -> None:
    judged = load_judged(config_of(tiny_workload, overrides).workload, "cpu")
    judged.record_inputs(finished, finished.config.workload)
    other = dataclasses.replace(judged, heldout=digits)
    with pytest.raises(CheckpointError, match="measured with other held-out data"):
        other.record_inputs(finished, finished.config.workload)


def test_second_features_must_be_others(tiny_workload: Path, second: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="second_features are the features themselves"):
        config_of(tiny_workload, ["evaluation.second_features=digits"])
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        config_of(tiny_workload, ["evaluation.second_features=inceptio"])
    with pytest.raises(ConfigError, match="second_reference needs second_features"):
        config_of(tiny_workload, ["evaluation.second_reference=x.npz"])
    copy = tmp_path / "copy.safetensors"
    for suffix in ("", ".sha256"):
        text = Path(f"{second}{suffix}").read_bytes().replace(b"other.", b"copy.")
        Path(f"{copy}{suffix}").write_bytes(text)
    named = [f"evaluation.features={second}", f"evaluation.second_features={copy}"]
    with pytest.raises(UsageError, match="hold the network of"):
        load_judged(config_of(tiny_workload, named).workload, "cpu")


def test_accuracy_is_left_out_where_classes_are_others(digits: ImageData) -> None:
    network = load_classifier(ASSET)
    features = network.extract(digits.images[:50])
    space = FeatureSpace(network, as_reference(features), digits, None, 50)
    labels = digits.labels[:50]
    assert "accuracy_digits" not in space.measure(features, labels, 11, space.reference)
    found = space.measure(features, labels, 10, space.reference)
    assert found["accuracy_digits"] == accuracy(features, labels)
    assert accuracy(features, (labels + 1) % 10) < 0.1 < 0.9 < accuracy(features, labels)


def test_a_classifier_without_heldout_images_says_what_its_file_says(digits: ImageData) -> None:
    space = FeatureSpace(load_classifier(ASSET), None, digits, None, 50)  # type: ignore[arg-type]
    record = classifier_record(space, 10)
    assert record == {
        "features": "digits",
        "accuracy": 0.994429,
        "images": "held out of the classifier's training",
    }
    unknown = dataclasses.replace(space.network, heldout_accuracy=None)
    assert classifier_record(dataclasses.replace(space, network=unknown), 10) is None


def test_only_a_folder_with_both_sets_has_heldout_images(idx_folder: Path, tmp_path: Path) -> None:
    section = load_workload("digits").data

    def heldout(path: Path, source: str = "idx") -> ImageData | None:
        return load_heldout(section.model_copy(update={"source": source, "path": str(path)}))

    found = heldout(idx_folder)
    assert found is not None
    assert (found.source, len(found)) == ("idx:t10k", HELDOUT)
    assert heldout(idx_folder / "train-images-idx3-ubyte") is None
    assert heldout(idx_folder, "digits") is None
    for split in ("t10k", "train"):
        for file in idx_folder.glob(f"{split}-*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if split == "t10k":
            assert heldout(tmp_path) is None, "it stands in for the training set"
    assert heldout(tmp_path) is not None
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(Exception, match=r"t10k-labels-idx1-ubyte.* is missing"):
        heldout(tmp_path)
