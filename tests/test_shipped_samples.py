"""Samples that come with a teacher: what they are, when they serve, and what the run says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from robuq_bench.config import Config, Workload, asset_path, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.judging import evaluation, shipped_samples, teacher
from robuq_bench.judging.sampling import sample_images
from robuq_bench.judging.shipped_samples import ship_samples
from robuq_bench.judging.teacher import Judged, judge_teacher, load_judged
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run, open_existing
from robuq_bench.runs.study import run_study
from studies import teacher_eval

SHORT = ("evaluation.num_samples=20", "evaluation.sampling_steps=2", "evaluation.seed_ranges=2")


def config_of(*overrides: str) -> Config:
    return resolve("teacher-eval", teacher_eval.VERSION, "fp", "digits", 0, list(overrides))


def context() -> Context:
    return Context.create(device="cpu", threads=1, progress=Progress(quiet=True))


def shipped(workload: Workload, sha256: str | None = None) -> torch.Tensor | None:
    found = shipped_samples.shipped_samples(workload, sha256 or workload.teacher.sha256)
    return None if found is None else found.images


@pytest.mark.parametrize("start", [0, pytest.param(2750, marks=pytest.mark.slow)])
def test_they_are_what_the_teacher_draws(start: int) -> None:
    """To the bit on the processor that drew them; others round a few pixels to the next level."""
    workload = config_of().workload
    images = shipped(workload)
    assert images is not None
    assert images.shape == (3000, 1, 8, 8)
    model, _ = load_teacher(workload, "cpu")
    seeds = range(start, start + workload.evaluation.batch_size)
    drawn = sample_images(model, workload, seeds=seeds)
    change = (drawn.int() - images[seeds.start : seeds.stop].int()).abs()
    assert change.max() <= 1
    assert change.float().mean() <= 1e-3


@pytest.mark.parametrize(
    "changed",
    [
        "evaluation.sampling_steps=50", "evaluation.timestep_spacing=integer",
        "evaluation.sampler=ddpm", "evaluation.cfg_scale=1.5", "evaluation.num_samples=100",
        "evaluation.seed_ranges=2", "evaluation.batch_size=125", "diffusion.beta_end=0.03",
        "model.num_heads=2", "evaluation.sample_teacher=true",
    ],
)  # fmt: skip
def test_another_protocol_is_sampled(changed: str) -> None:
    assert shipped(config_of(changed).workload) is None


def test_another_teacher_is_sampled(tmp_path: Path) -> None:
    workload = config_of().workload
    assert shipped(workload, "0" * 64) is None
    own = workload.teacher.model_copy(update={"checkpoint": str(tmp_path / "x.safetensors")})
    assert shipped(workload.model_copy(update={"teacher": own})) is None


def test_another_version_of_sampling_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_samples, "SAMPLING_VERSION", "changed")
    assert shipped(config_of().workload) is None


def test_what_judges_them_is_free() -> None:
    assert shipped(config_of("evaluation.grid_images=3").workload) is not None
    assert shipped(config_of("training.steps=7", "data.source=synthetic").workload) is not None


def test_a_damaged_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asset = asset_path("asset:digits_teacher_samples.safetensors")
    for source in (asset, asset.with_name(f"{asset.name}.sha256")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    content = bytearray(asset.read_bytes())
    content[-1] ^= 1
    (tmp_path / asset.name).write_bytes(content)
    monkeypatch.setattr(
        shipped_samples, "asset_path", lambda name: tmp_path / name.removeprefix("asset:")
    )
    with pytest.raises(CheckpointError, match=r"digits_teacher_samples\.safetensors"):
        shipped(config_of().workload)


def test_a_run_judges_them_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was sampled")

    monkeypatch.setattr(evaluation, "sample_images", refuse)
    run = open_existing(run_study(config_of(), tmp_path, context()).path)
    name = "asset:digits_teacher_samples.safetensors"
    entry = run.manifest["inputs"]["teacher samples"]
    assert entry["note"].startswith(f"{name}, made by: python bench.py study teacher-eval")
    assert "--set evaluation.sample_teacher=true" in entry["note"]
    images = shipped(config_of().workload)
    assert images is not None
    record = run.get("metrics/teacher/0")
    assert record is not None
    assert record["samples"] == name
    assert "sample_seconds" not in record
    with np.load(run.path / "samples" / "teacher-0.npz") as file:
        written = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(written, images)
    assert len(images) == 3000
    # As measured when they were drawn.
    assert record["fid_digits"] == pytest.approx(0.1465, rel=1e-3)
    with pytest.raises(UsageError, match="sample_teacher=true"):
        ship_samples(run.path)


def test_they_can_be_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anew = config_of("evaluation.sample_teacher=true", *SHORT)
    run = open_existing(run_study(anew, tmp_path / "runs", context()).path)
    assert run.get("metrics/teacher/0")["sample_seconds"] > 0
    assert "teacher samples" not in run.manifest["inputs"]
    monkeypatch.setattr(
        shipped_samples, "asset_path", lambda name: tmp_path / name.removeprefix("asset:")
    )
    ship_samples(run.path)
    images = shipped(config_of(*SHORT).workload)
    assert images is not None
    with np.load(run.path / "samples" / "teacher-1.npz") as file:
        assert np.array_equal(images[20:].permute(0, 2, 3, 1).numpy(), file["arr_0"])


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("first", ["drawn", "shipped"])
def test_a_run_goes_on_as_it_began(
    first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workload = config_of(*SHORT).workload
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    given: Any = shipped_samples.ShippedSamples(images, "asset:it", "0" * 64, "here")
    offered = [None if first == "drawn" else given]
    monkeypatch.setattr(teacher, "shipped_samples", lambda *_: offered[0])
    measured = evaluation._measure

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(evaluation, "_measure", fail)
        return measured(*arguments)

    def fail(*arguments: Any) -> dict[str, float]:
        raise InterruptedRunError

    judged = load_judged(workload, "cpu")
    with Run.open(tmp_path, config_of(*SHORT), []) as run:
        monkeypatch.setattr(evaluation, "_measure", interrupted)
        with pytest.raises(InterruptedRunError):
            judge_teacher(workload, run, context(), judged)
        monkeypatch.setattr(evaluation, "_measure", measured)
        offered[0] = given if first == "drawn" else None
        if first == "shipped":
            with pytest.raises(CheckpointError, match="began with asset:it, which no longer comes"):
                judge_teacher(workload, run, context(), judged)
            offered[0] = given
        rows = judge_teacher(workload, run, context(), judged)
        assert [row.get("samples") for row in rows] == [
            None if first == "drawn" else "asset:it"
        ] * 2
        assert ("teacher samples" in run.manifest["inputs"]) == (first == "shipped")


def test_a_gpu_samples_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(teacher, "record_inputs", lambda *args, **named: None)
    monkeypatch.setattr(teacher, "judge_real_images", lambda *args: None)
    monkeypatch.setattr(
        teacher, "evaluate_samples", lambda *_, shipped, **__: given.append(shipped)
    )
    workload = config_of().workload
    nothing: Any = None
    new: Any = SimpleNamespace(get=lambda key: None)
    judged = Judged(nothing, None, (), None, nothing, workload.teacher.sha256)
    judge_teacher(workload, new, Context("cuda:0", 1, Progress(quiet=True), []), judged)
    assert given == [None]
