"""A run is named after the content of what it reads: other data are another run, never 'done'."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reports.loading import find_runs
from reports.protocols import group_runs
from robuq_bench.checkpointing import save_tensors, sidecar_path
from robuq_bench.config import Config, config_hash, load_workload, resolve
from robuq_bench.config.resolve import canonical_json, to_toml
from robuq_bench.data.datasets import load_dataset, make_image_data
from robuq_bench.errors import CheckpointError, ConfigError, MissingResourceError, UsageError
from robuq_bench.judging.evaluation import record_inputs
from robuq_bench.judging.feature_networks import load_classifier, load_feature_network
from robuq_bench.judging.features import ASSET
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.runs.digests import files_digest
from robuq_bench.runs.run import Run


def make(*overrides: str, study: str = "toy", plan: str = "a2") -> Config:
    return resolve(study, "1", plan, "digits", 0, list(overrides))


def images(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def idx(folder: Path, seed: int = 0, sub: str = "") -> Path:
    (folder / sub).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, 640, dtype=np.uint8).tobytes()
    header = b"\0\0\x08\x03\0\0\0\x0a\0\0\0\x08\0\0\0\x08"
    (folder / sub / "train-images-idx3-ubyte").write_bytes(header + pixels)
    (folder / sub / "train-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01\0\0\0\x0a" + bytes(range(10))
    )
    return folder


def torchvisions(folder: Path, seed: int = 0) -> Path:
    return idx(folder, seed, "MNIST/raw")


def latents(folder: Path, seed: int = 0) -> Path:
    values = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    tensors = {"latents": values, "labels": torch.arange(10)}
    save_tensors(folder / "a.safetensors", tensors, {})
    return folder


SOURCES = {
    "imagefolder": images,
    "idx": idx,
    "mnist-torchvision": torchvisions,
    "latents": latents,
}


def on(source: str, path: Path) -> list[str]:
    return [f"data.source={source}", f"data.path={json.dumps(str(path))}"]


@pytest.mark.parametrize("source", SOURCES)
def test_data_are_known_by_their_content_not_their_place(tmp_path: Path, source: str) -> None:
    write = SOURCES[source]
    first = make(*on(source, write(tmp_path / "a")))
    assert config_hash(make(*on(source, write(tmp_path / "b")))) == config_hash(first)
    assert str(tmp_path) not in canonical_json(first)
    assert load_dataset(first.workload.data).images.shape == (
        20 if source == "imagefolder" else 10,
        1,
        8,
        8,
    )
    write(tmp_path / "a", 1)
    changed = make(*on(source, tmp_path / "a"))
    assert config_hash(changed) != config_hash(first)
    with pytest.raises(CheckpointError, match=r"the data in .*changed"):
        load_dataset(first.workload.data)
    assert len(load_dataset(changed.workload.data)) > 0


def test_held_out_images_count_too_and_without_them_runs_keep_their_names(
    tmp_path: Path, idx_source: str
) -> None:
    def held_out(pixel: int) -> str:
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            content = (folder / f"train-{kind}").read_bytes()
            changed = content[:-1] + bytes([pixel]) if kind.startswith("images") else content
            (folder / f"t10k-{kind}").write_bytes(changed)
        return config_hash(make(*on(idx_source, tmp_path)))

    folder = SOURCES[idx_source](tmp_path) / ("" if idx_source == "idx" else "MNIST/raw")
    alone = make(*on(idx_source, tmp_path))
    files = [folder / f"train-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    assert alone.workload.data.sha256 == files_digest((file.name, file) for file in files)
    names = {config_hash(alone), held_out(1), held_out(2)}
    assert len(names) == 3
    assert held_out(1) in names
    planned = make(*on(idx_source, tmp_path)).workload.data
    held_out(2)
    with pytest.raises(CheckpointError, match=r"the data in .*changed"):
        load_dataset(planned)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingResourceError, match=r"t10k-labels-idx1-ubyte.* is missing"):
        load_dataset(make(*on(idx_source, tmp_path)).workload.data)


@pytest.fixture(params=["idx", "mnist-torchvision"])
def idx_source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_renamed_or_moved_image_is_other_data_and_a_stray_file_is_not(tmp_path: Path) -> None:
    folder = images(tmp_path / "d")
    hashes = {config_hash(make(*on("imagefolder", folder)))}
    for name in (".DS_Store", "notes.txt", "3/Thumbs.db", ".hidden.png"):
        (folder / name).write_text("")
    assert {config_hash(make(*on("imagefolder", folder)))} == hashes
    (folder / "3" / "1.png").rename(folder / "3" / "2.png")
    hashes.add(config_hash(make(*on("imagefolder", folder))))
    (folder / "3" / "2.png").rename(folder / "4" / "2.png")
    hashes.add(config_hash(make(*on("imagefolder", folder))))
    (folder / "3").rename(folder / "x")
    hashes.add(config_hash(make(*on("imagefolder", folder))))
    assert len(hashes) == 4


def test_data_named_by_the_environment_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config_hash(make("data.source=idx"))
    monkeypatch.setenv("ROBUQ_DATA_DIGITS", str(idx(tmp_path / "d")))
    first = make("data.source=idx")
    assert config_hash(first) != plain
    assert config_hash(make(*on("idx", tmp_path / "d"))) == config_hash(first)
    idx(tmp_path / "d", 1)
    assert config_hash(make("data.source=idx")) != config_hash(first)
    with pytest.raises(CheckpointError, match="changed"):
        load_dataset(first.workload.data, name="digits")
    assert make().workload.data.sha256 is None


def test_data_that_cannot_be_read_belong_to_no_finished_run(tmp_path: Path) -> None:
    folder = images(tmp_path / "d")
    config = make(*on("imagefolder", folder))
    (folder / "3" / "0.png").unlink()
    (folder / "3" / "0.png").symlink_to("/nowhere")
    broken = make(*on("imagefolder", folder))
    assert broken.workload.data.sha256 == ""
    by_path = broken.workload.data.model_copy(update={"sha256": None})
    older = broken.model_copy(
        update={"workload": broken.workload.model_copy(update={"data": by_path})}
    )
    assert len({config_hash(each) for each in (config, broken, older)}) == 3
    with pytest.raises(MissingResourceError, match="nowhere"):
        load_dataset(broken.workload.data)
    images(folder.with_name("e")).rename(tmp_path / "f")
    mended = broken.workload.data.model_copy(update={"path": str(tmp_path / "f")})
    with pytest.raises(CheckpointError, match="was not readable"):
        load_dataset(mended)


def test_a_stated_digest_of_data_is_checked_when_they_are_read(tmp_path: Path) -> None:
    stated = make(*on("idx", idx(tmp_path / "d")), f"data.sha256='{'0' * 64}'")
    assert stated.workload.data.sha256 == "0" * 64
    with pytest.raises(CheckpointError, match=r"had SHA-256 0{64}; now"):
        load_dataset(stated.workload.data)
    embedded = make(f"data.sha256='{'0' * 64}'")
    with pytest.raises(UsageError, match="leave it out"):
        load_dataset(embedded.workload.data)


def test_a_new_source_or_path_does_not_keep_the_old_digest(tmp_path: Path) -> None:
    workload = make(*on("idx", idx(tmp_path / "d"))).workload
    embedded = resolve("toy", "1", "a2", workload, 0, ["data.source=digits", "data.path=none"])
    assert embedded.workload.data.sha256 is None
    other = resolve("toy", "1", "a2", workload, 0, [f"data.path={idx(tmp_path / 'e', 1)}"])
    assert other.workload.data.sha256 not in (None, workload.data.sha256)


def features(path: Path, content: bytes) -> Path:
    path = path.with_suffix(".safetensors")
    path.write_bytes(content)
    return path


def npz(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def vae(path: Path, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("key", "write"), [("features", features), ("reference", npz), ("vae", vae)]
)
def test_what_judges_is_known_by_its_content(
    tmp_path: Path, key: str, write: Callable[[Path, bytes], Path]
) -> None:
    def config(path: Path) -> Config:
        return make(f"evaluation.{key}={json.dumps(str(path))}")

    path = write(tmp_path / "a", b"one")
    first = config(path)
    assert len(getattr(first.workload.evaluation, f"{key}_sha256")) == 64
    assert config_hash(config(write(tmp_path / "b", b"one"))) == config_hash(first)
    write(tmp_path / "a", b"two")
    second = config(path)
    absent = config(path.with_name("absent.safetensors"))
    assert getattr(absent.workload.evaluation, f"{key}_sha256") == ""
    assert len({config_hash(each) for each in (first, second, absent, make())}) == 4


def test_where_inceptions_weights_lie_makes_no_other_run(tmp_path: Path) -> None:
    """Their content is pinned: `load_inception` refuses any other."""
    text = f"evaluation.inception_weights={tmp_path / 'w.pth'}"
    assert config_hash(make(text, "evaluation.features=inception")) == config_hash(
        make("evaluation.features=inception")
    )
    assert str(tmp_path) not in canonical_json(make(text))
    (tmp_path / "w.pth").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="expected 6726825d"):
        load_feature_network(make(text, "evaluation.features=inception").workload.evaluation)


def tensor_file(path: Path, content: int) -> Path:
    save_tensors(path, {"x": torch.full((1,), content)}, {})
    return path


@pytest.mark.parametrize("word", ["none", "'none'", '""'])
@pytest.mark.parametrize(
    ("study", "key", "digest_key"),
    [
        ("toy", "data.path", "data.sha256"),
        ("toy", "teacher.checkpoint", "teacher.sha256"),
        ("toy", "bits.path", "bits.sha256"),
        ("toy", "evaluation.features", "evaluation.features_sha256"),
        ("toy", "evaluation.reference", "evaluation.reference_sha256"),
        ("toy", "evaluation.second_features", "evaluation.second_features_sha256"),
        ("toy", "evaluation.second_reference", "evaluation.second_reference_sha256"),
        ("toy", "evaluation.vae", "evaluation.vae_sha256"),
        ("normality", "normality.captured", "normality.captured_sha256"),
        ("normality", "normality.student", "normality.student_sha256"),
        ("packed", "packed.run", "packed.run_sha256"),
    ],
)
def test_a_digest_that_is_said_to_be_none_is_found_out(
    tmp_path: Path, study: str, key: str, digest_key: str, word: str
) -> None:
    """A dry run prints "none"; copied back, it must not stand for whatever the path holds."""
    extra = {
        "data.path": ["data.source=latents"],
        "bits.path": ["bits.mean=none"],
        "evaluation.second_reference": ["evaluation.second_features=inception"],
    }.get(key, [])
    file = tensor_file(tmp_path / "a.safetensors", 0)
    path = tmp_path if key in ("data.path", "normality.captured") else file

    def stated(*settings: str) -> Config:
        return make(*extra, f"{key}={json.dumps(str(path))}", *settings, study=study)

    first = stated(f"{digest_key}={word}")
    assert config_hash(first) == config_hash(stated())
    assert str(tmp_path) not in canonical_json(first)
    tensor_file(file, 1)
    assert config_hash(stated(f"{digest_key}={word}")) != config_hash(first)


def test_none_in_a_file_is_no_digest_either(tmp_path: Path) -> None:
    text = to_toml(make(*on("idx", idx(tmp_path / "d"))).workload)
    digests = re.sub(r'(sha256) = "[0-9a-f]*"', r'\1 = "none"', text)
    path = tmp_path / "w.toml"
    path.write_text(digests)
    assert load_workload(path).teacher.sha256 == ""
    first = resolve("toy", "1", "a2", path)
    assert len(first.workload.data.sha256 or "") == 64
    idx(tmp_path / "d", 1)
    assert config_hash(resolve("toy", "1", "a2", path)) != config_hash(first)


def test_a_file_called_none_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = config_hash(make("normality.student=none", study="normality"))
    tensor_file(tmp_path / "none", 0)
    assert config_hash(make("normality.student=none", study="normality")) == before


def test_runs_whose_metrics_do_not_name_their_own_features_are_no_answers(tmp_path: Path) -> None:
    path = features(tmp_path / "f", b"")
    own = json.loads(canonical_json(make(f"evaluation.features={path}")))
    packaged = json.loads(canonical_json(make()))
    assert own["workload"]["evaluation"]["features_name_metrics"] is True
    assert "features_name_metrics" not in packaged["workload"]["evaluation"]


def test_features_that_changed_after_planning_are_refused(tmp_path: Path) -> None:
    path = features(tmp_path / "f", ASSET.read_bytes())
    sidecar_path(path).write_bytes(sidecar_path(ASSET).read_bytes())
    evaluation = make(f"evaluation.features={path}").workload.evaluation
    assert load_feature_network(evaluation).name == "digits"
    other = evaluation.model_copy(update={"features_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"evaluation\.features .*changed"):
        load_feature_network(other)


@pytest.mark.parametrize("study", ["train-features", "train-teacher"])
def test_a_training_is_not_named_after_what_it_makes(tmp_path: Path, study: str) -> None:
    path = tmp_path / "f.safetensors"
    before = make(f"evaluation.features={path}", study=study)
    path.write_bytes(b"made by this run")
    assert config_hash(make(f"evaluation.features={path}", study=study)) == config_hash(before)


@pytest.mark.parametrize("study", ["kernels", "efficiency", "step-time"])
def test_a_study_without_data_is_not_named_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str
) -> None:
    before = config_hash(make("data.source=idx", study=study))
    monkeypatch.setenv("ROBUQ_DATA_DIGITS", str(idx(tmp_path / "d")))
    assert config_hash(make("data.source=idx", study=study)) == before


def test_the_run_that_study_packed_judges_is_known_by_its_files(tmp_path: Path) -> None:
    def config() -> Config:
        return make(f"packed.run={tmp_path}", study="packed")

    save_tensors(tmp_path / "checkpoints" / "s.safetensors", {"x": torch.zeros(1)}, {})
    first = config()
    path = tmp_path / "checkpoints" / "s.safetensors"
    save_tensors(path, {"x": torch.ones(1)}, {})
    assert config_hash(config()) != config_hash(first)
    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    (tmp_path / "other.safetensors").rename(path)
    with pytest.raises(ConfigError, match=r"s\.safetensors: differs from its checksum"):
        config()
    sidecar_path(path).write_text("nonsense")
    with pytest.raises(ConfigError, match="is not a SHA-256 file"):
        config()


def test_activations_behind_links_are_found_and_known_by_their_content(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return make(f"normality.captured={folder}", study="normality").settings.captured_sha256

    for name in ("a", "b"):
        tensor_file(tmp_path / "plain" / name / "t.safetensors", ord(name))
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b"):
        (linked / name).symlink_to(tmp_path / "plain" / name)
    assert digest(linked) == digest(tmp_path / "plain")
    # As it was when links were not followed: existing runs of folders without any keep their names.
    texts = [
        f"{name}/t.safetensors.sha256\n"
        + (tmp_path / "plain" / name / "t.safetensors.sha256").read_text()
        for name in ("a", "b")
    ]
    assert digest(linked) == hashlib.sha256("".join(texts).encode()).hexdigest()
    tensor_file(tmp_path / "plain" / "b" / "t.safetensors", 0)
    assert digest(linked) != hashlib.sha256("".join(texts).encode()).hexdigest()
    (linked / "c").symlink_to(linked)
    with pytest.raises(UsageError, match="is a link to a folder that it lies in"):
        digest(linked)


def test_shards_replaced_without_their_checksums_are_other_data(tmp_path: Path) -> None:
    """A finished run must not answer for them because the checksum is still the old one."""
    first = make(*on("latents", latents(tmp_path / "a")))
    latents(tmp_path / "b", 1)
    (tmp_path / "b" / "a.safetensors").rename(tmp_path / "a" / "a.safetensors")
    replaced = make(*on("latents", tmp_path / "a"))
    assert config_hash(replaced) != config_hash(first)
    with pytest.raises(CheckpointError, match="damaged or not the expected file"):
        load_dataset(replaced.workload.data)


def test_a_teacher_that_was_damaged_before_planning_is_refused(tmp_path: Path) -> None:
    """Its digest in the config is that of the damaged file; the one beside it is not."""
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.zeros(400)}, {})
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t\.safetensors is damaged"):
        load_teacher(make(f"teacher.checkpoint={path}").workload, "cpu")


def test_a_finished_run_of_other_inputs_is_not_cited(tmp_path: Path) -> None:
    config, network = make(), load_classifier()
    data = make_image_data(torch.zeros(9, 1, 8, 8).byte(), torch.arange(9), "digits")
    with Run.open(tmp_path, config, []) as run:
        record_inputs(run, config.workload, data, network)
        run.finish()
    record_inputs(run, config.workload, data, network)
    other = make_image_data(data.images + 1, data.labels, "digits")
    with pytest.raises(CheckpointError, match="measured with other data"):
        record_inputs(run, config.workload, other, network)
    with Run.open(tmp_path, make("training.steps=1"), []) as older:
        older.finish()
    record_inputs(older, config.workload, other, network)  # it says nothing of its data


SMALL = (
    "training.steps=2", "training.warmup_steps=0", "evaluation.num_samples=20",
    "evaluation.seed_ranges=1", "evaluation.sampling_steps=2", "evaluation.grid_images=0",
)  # fmt: skip


def test_changed_images_are_trained_on_judged_and_reported_anew(
    tmp_path: Path, tiny_workload: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "cache"))
    images(tmp_path / "A"), images(tmp_path / "B", 1)
    link = tmp_path / "data"
    fields = [*SMALL, "data.source=imagefolder", f"data.path={link}"]
    settings = [word for each in fields for word in ("--set", each)]

    def job(plan: str = "a4") -> dict[str, Any]:
        outcome = bench(
            "train-and-eval", "--plan", plan, "--on", str(tiny_workload), "--threads", "1",
            "--json", "--quiet", "-o", "runs", *settings,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return outcome.document

    link.symlink_to("A")
    first = job()
    link.unlink()
    link.symlink_to("B")
    second, third = job(), job("a8")
    assert not second["was_complete"]
    assert [row["fid_digits"] for row in second["table"]] != [
        row["fid_digits"] for row in first["table"]
    ]
    assert second["table"][0] == third["table"][0], "the teacher's row on B"
    link.unlink()
    link.symlink_to("A")
    again = job()
    assert again["was_complete"]
    assert again["table"] == first["table"]
    teachers = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("teacher-eval/*/man*")]
    assert len({teacher["inputs"]["data"]["sha256"] for teacher in teachers}) == 2
    assert all(len(teacher["inputs"]["features"]["sha256"]) == 64 for teacher in teachers)
    groups = group_runs(find_runs([tmp_path / "runs"]).runs)
    assert sorted(len(group.rows) for group in groups) == [1, 2]
    assert len({group.title for group in groups}) == 2


def test_workloads_of_the_package_name_no_content() -> None:
    for name in ("digits", "imagenet256"):
        assert load_workload(name).data.sha256 is None


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """In a folder they are as good as others; in a setting nothing could record them."""
    folder = images(tmp_path / "d")
    before = config_hash(make(*on("imagefolder", folder)))
    (folder / "3" / "1.png").rename(os.fsdecode(os.fsencode(folder / "3") + b"/\xff.png"))
    config = make(*on("imagefolder", folder))
    assert config_hash(config) != before
    assert len(load_dataset(config.workload.data)) == 20
    with pytest.raises(ConfigError, match=r"udcff.*is not UTF-8 text; rename"):
        make("data.path=d\udcff")
