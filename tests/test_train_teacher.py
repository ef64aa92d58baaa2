"""Training a teacher: exact resume, the exported file with its card, and the shipped teacher."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from robuq_bench.checkpointing import load_tensors
from robuq_bench.cli.app import main
from robuq_bench.config import Config, load_workload, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.data.datasets import load_dataset
from robuq_bench.judging.evaluation import validation_losses
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.progress import Progress
from robuq_bench.runs.study import run_study
from robuq_bench.training import Trainer
from studies import train_teacher

TINY = (
    "model.hidden_size=48",
    "model.depth=1",
    "model.num_heads=2",
    "teacher.training.steps=6",
    "teacher.training.batch_size=4",
    "teacher.training.checkpoint_every_steps=2",
    "teacher.training.log_every_steps=2",
)


def config() -> Config:
    return resolve("train-teacher", train_teacher.VERSION, "fp", "digits", 0, list(TINY))


def run_job(root: Path) -> RunResult:
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True), argv=["test"])
    return run_study(config(), root, context)


def test_interrupted_training_continues_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(tmp_path / "whole")
    train = Trainer.train

    def interrupted(self, *args):  # type: ignore[no-untyped-def]
        for values in train(self, *args):
            if self.step == 5:
                raise KeyboardInterrupt
            yield values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(tmp_path / "part")
    assert run_job(tmp_path / "part").table[0]["sha256"] == whole.table[0]["sha256"]


def test_progress_does_not_call_it_quantization_aware(tmp_path: Path) -> None:
    stream = io.StringIO()
    context = Context.create(
        device="cpu", threads=1, progress=Progress(stream=stream, interval_s=0.0), argv=["test"]
    )
    run_study(config(), tmp_path, context)
    assert "training teacher: 6/6" in stream.getvalue()
    assert "QAT" not in stream.getvalue()


def test_export_writes_weights_checksum_and_card(tmp_path: Path) -> None:
    overrides = [word for text in TINY for word in ("--set", text)]
    target = tmp_path / "teacher.safetensors"
    command = ["train-teacher", "--export", str(target), "-o", str(tmp_path / "runs"), "--quiet"]
    assert main([*command, "--device", "cpu", "--threads", "1", *overrides]) == 0
    tensors, metadata = load_tensors(target)
    card = json.loads(target.with_suffix(".json").read_text())
    assert card["command"] == metadata["command"]
    assert json.loads(metadata["model"])["hidden_size"] == 48
    model = DiT.from_config(config().workload.model)
    model.load_state_dict(tensors)


def test_the_shipped_teacher_is_the_one_its_card_describes() -> None:
    workload = load_workload("digits")
    teacher, sha256 = load_teacher(workload, "cpu")
    card = json.loads(
        (
            Path(train_teacher.__file__).parents[1] / "robuq_bench/assets/digits_teacher.json"
        ).read_text()
    )
    assert sha256 == card["sha256"] == workload.teacher.sha256
    assert json.loads(card["training"])["steps"] == workload.teacher.training.steps
    data = load_dataset(workload.data)
    assert data.sha256 in card["data"]
    losses = validation_losses(teacher, teacher, data, workload, "cpu")
    assert losses["denoising_loss"] < 0.075, "the shipped weights denoise as when recorded"
    untrained = DiT.from_config(workload.model)
    torch.manual_seed(0)
    worse = validation_losses(untrained, teacher, data, workload, "cpu")
    assert worse["denoising_loss"] > 0.5
