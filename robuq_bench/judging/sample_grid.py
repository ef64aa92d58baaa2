"""Draw images from a workload's teacher, a trained student or a packed model into one grid."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from robuq_bench.config import Config, Workload
from robuq_bench.context import Context
from robuq_bench.errors import UsageError
from robuq_bench.files import atomic_write_bytes
from robuq_bench.inference import load_packed, prepare_for_inference
from robuq_bench.inference.packed_layer import PackedLayer
from robuq_bench.judging.sampling import image_grid, sample_images
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.students import load_student

GRID_COLUMNS = 10
GRID_SCALE = 4


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
    backend: str | None = None,
    num: int,
    output: Path,
) -> Path:
    """Sample `num` images with seeds seed, seed + 1, ... and write one PNG grid.

    The model is the student of the train-and-eval run folder `checkpoint`, the packed model in the
    file `packed` on `backend` (None as for `prepare_for_inference`), or else the workload's
    teacher.
    """
    workload = config.workload
    if workload.data.source == "latents":
        raise UsageError("sample needs a pixel workload; latents need a VAE to become images")
    model: nn.Module
    if packed is not None:
        model, facts = load_packed(packed)
        _check_model(packed, model, workload)
        model = prepare_for_inference(model.to(context.device), backend, torch.float32)
        chosen = {layer.backend for layer in model.modules() if isinstance(layer, PackedLayer)}
        context.progress.log(
            f"{packed}: plan {facts['plan'].name} of {facts['source']}, {facts['storage']}, "
            f"{packed.stat().st_size / 1e6:.2f} MB; backend {', '.join(sorted(chosen))}"
        )
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
