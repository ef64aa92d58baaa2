"""Draw images from a workload's teacher, or from the student of a finished train-and-eval run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from robuq_bench.checkpointing import load_tensors
from robuq_bench.config import Config, Plan, Workload, modern_plan
from robuq_bench.context import Context
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import atomic_write_bytes
from robuq_bench.inference import load_packed, prepare_for_inference
from robuq_bench.judging.sampling import image_grid, sample_images
from robuq_bench.models.checkpoints import check_weights, load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.bits import BITS_KEY
from robuq_bench.quantization.convert import (
    quantize_,
    quantized_layers,
    set_activation_bits,
)
from robuq_bench.quantization.linear import rename_old_state
from robuq_bench.runs.run import open_existing

GRID_COLUMNS = 10
GRID_SCALE = 4
STUDENT_FILE = Path("checkpoints") / "student-ema.safetensors"


def load_student(run_path: Path, workload: Workload) -> nn.Module:
    """Rebuild the averaged-weights student of a train-and-eval run, fake-quantized, on the CPU.

    Raises:
        CheckpointError: the run is unfinished, or its weights are damaged or of another model.
    """
    run = open_existing(run_path)
    path = run.path / STUDENT_FILE
    if run.config.plan.is_full_precision:
        raise UsageError(f"{run.id} trained no student; leave out --checkpoint for the teacher")
    own = run.config.workload
    if own.model != workload.model:
        raise UsageError(
            f"{run.id} was trained on workload {own.name!r}, whose model is not that of "
            f"{workload.name!r}; name its workload with --on"
        )
    tensors, metadata = load_tensors(path)
    try:
        plan = Plan.model_validate(modern_plan(json.loads(metadata["plan"])))
        bits = json.loads(metadata["bits_by_layer"])
        weight_bits = json.loads(metadata.get("weight_bits_by_layer", "{}"))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say its plan and bits as this version does; begin its run anew "
            "with --force"
        ) from error
    model = DiT.from_config(workload.model)
    quantize_(model, plan, blank=True, weight_bits_by_layer=weight_bits)
    set_activation_bits(model, bits)
    # Runs of before kept the bits in the metadata alone.
    for name in quantized_layers(model):
        rename_old_state(tensors, f"{name}.")
    expected = {
        name: value
        for name, value in model.state_dict().items()
        if name in tensors or not name.endswith(f".{BITS_KEY}")
    }
    try:
        check_weights(expected, tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {error}; it belongs to another model than --on names"
        ) from error
    model.load_state_dict(tensors, strict=False)
    return model


def _check_model(path: Path, model: nn.Module, workload: Workload) -> None:
    for field in ("input_size", "in_channels", "num_classes"):
        found, wanted = getattr(model, field, None), getattr(workload.model, field)
        if found != wanted:
            raise UsageError(
                f"{path} holds a model with {field} {found}, but workload {workload.name!r} has "
                f"{wanted}; name its workload with --on"
            )


def run_sample(
    config: Config,
    context: Context,
    *,
    checkpoint: Path | None,
    packed: Path | None = None,
    backend: str = "reference",
    num: int,
    output: Path,
) -> Path:
    """Sample `num` images with seeds seed, seed + 1, ... and write one PNG grid.

    The model is the student of the train-and-eval run folder `checkpoint`, the packed model in the
    file `packed` on its `backend`, or else the workload's teacher.
    """
    workload = config.workload
    if workload.data.source == "latents":
        raise UsageError("sample needs a pixel workload; latents need a VAE to become images")
    model: nn.Module
    if packed is not None:
        model, _ = load_packed(packed)
        _check_model(packed, model, workload)
        model = prepare_for_inference(model.to(context.device), backend, torch.float32)
    elif checkpoint is not None:
        model = load_student(checkpoint, workload)
    else:
        model, _ = load_teacher(workload, context.device)
    with context.progress.task("sample", num) as task:
        images = sample_images(
            model,
            workload,
            seeds=range(config.seed, config.seed + num),
            batch_size=workload.evaluation.batch_size,
            device=context.device,
            progress=task.reach,
        )
    atomic_write_bytes(output, image_grid(images, GRID_COLUMNS, GRID_SCALE))
    return output
