"""From a teacher to a student: convert and calibrate it, and set up its training."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.config import Config, training_recipe
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError
from robuq_bench.quantization.convert import quantize_
from robuq_bench.quantization.fitting import Calibration
from robuq_bench.sensitivity.calibration import ModelInputs, calibration_batches, calibration_set
from robuq_bench.training import BatchSource, LossFunction, Trainer, qat_loss


class CalibrationStates(MutableMapping[str, dict[str, Tensor]]):
    """States of calibrated blocks as files of a folder, so that a killed calibration goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, block: str) -> Path:
        return self.folder / f"{hashlib.sha256(block.encode()).hexdigest()[:16]}.safetensors"

    def __getitem__(self, block: str) -> dict[str, Tensor]:
        try:
            tensors, metadata = load_tensors(self._path(block))
        except CheckpointError:
            raise KeyError(block) from None  # missing or damaged: the block is fitted again
        if metadata.get("block") != block:
            raise KeyError(block)
        return tensors

    def __setitem__(self, block: str, state: dict[str, Tensor]) -> None:
        save_tensors(self._path(block), state, {"block": block})

    def __delitem__(self, block: str) -> None:
        self._path(block).unlink()

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("*.safetensors")):
            yield load_tensors(path)[1]["block"]

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))


def metric_batches(config: Config, context: Context, data: ImageData) -> list[ModelInputs]:
    """The batches that sensitivity is measured on, with the noise that some metrics need."""
    return list(
        calibration_set(
            data.model_inputs(torch.arange(len(data))).to(context.device),
            data.labels,
            Diffusion.from_config(config.workload.diffusion),
            num_samples=config.workload.training.calibration_samples,
            batch_size=config.workload.evaluation.batch_size,
            seed=config.seed,
        )
    )


def convert_teacher(
    config: Config,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    states: Path | None = None,
    weight_bits_by_layer: Mapping[str, int] | None = None,
) -> nn.Module:
    """A quantized copy of the teacher, calibrated on training images where the plan's methods ask.

    `states` is a folder that keeps what is calibrated. The teacher is left as it is, frozen.
    """
    plan = config.plan
    teacher.requires_grad_(False).eval()
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.get_parameter("pos_embed").requires_grad_(False)
    calibration = None
    if plan.needs:
        batches = calibration_batches(
            data.model_inputs(torch.arange(len(data))).to(context.device),
            data.labels,
            Diffusion.from_config(config.workload.diffusion),
            num_samples=plan.calibration.samples,
            batch_size=plan.calibration.batch_size,
            seed=config.seed,
        )
        calibration = Calibration(
            [tuple(batch) for batch in batches],
            tokens=plan.calibration.tokens,
            quantized_predecessors=plan.calibration.quantized_predecessors,
            done=None if states is None else CalibrationStates(states),
        )
    if calibration is None:
        return quantize_(student, plan, seed=config.seed, weight_bits_by_layer=weight_bits_by_layer)
    with context.progress.task("calibration: blocks", 1) as task:
        calibration.on_block = task.reach
        return quantize_(
            student,
            plan,
            seed=config.seed,
            calibration=calibration,
            weight_bits_by_layer=weight_bits_by_layer,
        )


def prepare_training(
    config: Config,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    states: Path | None = None,
    weight_bits_by_layer: Mapping[str, int] | None = None,
) -> tuple[Trainer, BatchSource, LossFunction]:
    """Convert a copy of the teacher (`trainer.model`) and set up its training at step 0."""
    student = convert_teacher(config, context, teacher, data, states, weight_bits_by_layer)
    return training_of(student, config, context, teacher, data)


def training_of(
    student: nn.Module,
    config: Config,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    stream: str = "qat",
) -> tuple[Trainer, BatchSource, LossFunction]:
    """Set up the training of a student as it is, at step 0: its averages begin at its weights.

    Batches are a function of (stream, seed, step), so all plans of a seed see the same ones.
    """
    plan, recipe = config.plan, training_recipe(config)
    diffusion = Diffusion.from_config(config.workload.diffusion)
    source = BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        diffusion,
        student,
        batch_size=recipe.batch_size,
        seed=config.seed,
        stream=stream,
        device=context.device,
    )
    loss_function = qat_loss(
        diffusion, teacher, plan.train.distillation_weight, plan.train.denoising_weight
    )
    trainer = Trainer(student, recipe, context.device, recipe.low_rank_learning_rate)
    return trainer, source, loss_function
