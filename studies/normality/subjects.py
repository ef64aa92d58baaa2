"""Whose activations are looked at, and how they are captured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from robuq_bench import seeds
from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.normality.capture import (
    Captured,
    load_shard,
    load_weights,
    record,
    save_shard,
)
from robuq_bench.normality.output import input_weight
from robuq_bench.qat import convert_teacher, prepare_training
from robuq_bench.quantization.convert import (
    quantized_layers,
    set_activation_bits,
    target_layers,
)
from robuq_bench.resumable import resume, train_with_checkpoints
from robuq_bench.runs.digests import walk
from robuq_bench.runs.run import Run
from robuq_bench.students import load_student, read_student
from studies.normality.parts import Capture, part_path, slug
from studies.normality.settings import BEFORE, STUDENT, TEACHER, Settings

CALIBRATION = "calibration"
CALIBRATION_IMAGES = 16
CALIBRATION_TOKENS = 8


def live(config: Config, run: Run, context: Context) -> Iterator[Capture]:
    """Run every subject on the same diffused images; finished timesteps are not run again."""
    options, workload = config.settings_of(Settings), config.workload
    data = load_dataset(workload.data, name=workload.name)
    run.add_input_digest("data", data.sha256, source=data.source)
    wanted = options.images + CALIBRATION_IMAGES
    if len(data) < wanted:
        raise UsageError(
            f"workload {workload.name!r} has {len(data)} images; the study needs "
            f"normality.images + {CALIBRATION_IMAGES} = {wanted}"
        )
    generator = seeds.generator("normality/images", config.seed, 0)
    order = torch.randperm(len(data), generator=generator)[:wanted].tolist()
    diffusion = Diffusion.from_config(workload.diffusion)
    steps = diffusion.num_train_timesteps
    timesteps = [int((i + 0.5) * steps / options.timesteps) for i in range(options.timesteps)]
    for subject, model in subjects(config, run, context, data):
        model.eval()
        layers: dict[str, nn.Module] = {**quantized_layers(model)}
        layers = layers or {**target_layers(model, config.plan)}
        weights = {name: input_weight(layer) for name, layer in layers.items()}
        folder = run.path / "activations" / slug(subject)
        mixed = [int((i + 0.5) * steps / CALIBRATION_IMAGES) for i in range(CALIBRATION_IMAGES)]
        plans = [(-1, order[options.images :], mixed, CALIBRATION_TOKENS)]
        plans += [
            (t, order[: options.images], [t] * options.images, options.tokens_per_image)
            for t in timesteps
        ]
        for timestep, images, ts, per_image in plans:
            if timestep >= 0 and part_path(run, subject, timestep).exists():
                continue
            captured = run_model(
                model, list(layers), data, diffusion, images, ts, per_image, config, context
            )
            if options.save_activations:
                name = CALIBRATION if timestep < 0 else f"t{timestep:04d}"
                facts = {"subject": subject, "timestep": str(timestep), "model": workload.name}
                path = folder / f"{name}.safetensors"
                save_shard(path, captured, facts, weights if timestep < 0 else None)
            yield Capture(subject, timestep, captured, weights)


def subjects(
    config: Config, run: Run, context: Context, data: ImageData
) -> Iterator[tuple[str, nn.Module]]:
    """The models to look at, by name: those of `Settings.wanted`, then the plan while it trains."""
    options, workload = config.settings_of(Settings), config.workload
    wanted, trained = options.wanted, Path(options.student or "")
    if wanted != (STUDENT,):
        teacher, digest = load_teacher(workload, context.device)
        run.add_input_digest("teacher", digest)
        if TEACHER in wanted:
            yield TEACHER, teacher
        if BEFORE in wanted:
            yield BEFORE, untrained_student(trained, config, context, teacher, data, digest)
    if STUDENT in wanted:
        yield STUDENT, load_student(trained, workload).to(context.device)
    if not options.qat_steps:
        return
    trainer, source, loss_function = prepare_training(config, context, teacher, data)
    store = CheckpointStore(run.checkpoint_folder / "training", keep=len(options.qat_steps) + 1)
    for steps in options.qat_steps:
        resume(trainer, store, at_most=steps)
        train_with_checkpoints(
            trainer, source, loss_function, steps, run, store, context, phase="normality"
        )
        yield f"{config.plan.name} after {steps} steps", trainer.model


def untrained_student(
    path: Path,
    config: Config,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    teacher_sha256: str,
) -> nn.Module:
    """The plan of a finished run at its bits, applied to the teacher as before the first step.

    Raises:
        UsageError: the run had another teacher or other data than the workload names.
    """
    run, _, bits, weight_bits, _ = read_student(path, config.workload)
    for name, sha256 in (("teacher", teacher_sha256), ("data", data.sha256)):
        known = run.manifest["inputs"].get(name, {}).get("sha256", sha256)
        if known != sha256:
            raise UsageError(
                f"{run.id} began from another {name} (SHA-256 {known[:16]}, here {sha256[:16]}): "
                'name its workload with --on, or leave "before" out of normality.subjects'
            )
    student = convert_teacher(
        run.config, context, teacher, data, weight_bits_by_layer=weight_bits or None
    )
    set_activation_bits(student, bits)
    return student


def run_model(
    model: nn.Module,
    layers: list[str],
    data: ImageData,
    diffusion: Diffusion,
    images: list[int],
    timesteps: list[int],
    tokens_per_image: int,
    config: Config,
    context: Context,
) -> Captured:
    """Sample the layers' inputs while the model predicts the noise of diffused images.

    An image has the same noise at every timestep, so that images stay the only clusters.
    """
    batch_size = config.workload.evaluation.batch_size
    stream = "/".join(map(str, sorted(set(timesteps))))
    with record(model, layers, tokens_per_image, config.seed, stream) as recorder, torch.no_grad():
        for start in range(0, len(images), batch_size):
            index = images[start : start + batch_size]
            x0 = data.model_inputs(torch.tensor(index))
            noise = torch.stack(
                [
                    torch.randn(
                        x0.shape[1:], generator=seeds.generator("normality", config.seed, i)
                    )
                    for i in index
                ]
            )
            t = torch.tensor(timesteps[start : start + batch_size])
            inputs = (diffusion.q_sample(x0, t, noise), t, data.labels[index])
            recorder.images = index
            model(*(part.to(context.device) for part in inputs))
    return recorder.result()


def saved_captures(options: Settings, run: Run) -> Iterator[Capture]:
    """Shards of activations from a folder, calibration first."""
    folder = Path(str(options.captured))
    found: dict[tuple[str, int], Path] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    for path in sorted(path for path in walk(folder) if path.suffix == ".safetensors"):
        run.add_input(path)
        _, metadata = load_shard(path)
        try:
            key = metadata["subject"], int(metadata["timestep"])
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{path}: its metadata must name `subject` and `timestep` (-1: calibration)"
            ) from None
        if key in found:
            raise CheckpointError(f"{path} and {found[key]} are both {key[0]}, timestep {key[1]}")
        found[key] = path
        weights.setdefault(key[0], {}).update(load_weights(path))
    for (subject, timestep), path in sorted(found.items()):
        yield Capture(subject, timestep, load_shard(path)[0], weights[subject])
