"""Judging a model under a workload's protocol: samples, metrics and losses, per seed range.

Every subject (teacher or student) is sampled from the same image seeds, so that differences
between rows are differences between models.
"""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robuq_bench.config import asset_path
from robuq_bench.data.datasets import ImageData
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.judging.feature_networks import FeatureNetwork
from robuq_bench.judging.fidelity import (
    Reference,
    as_reference,
    load_adm_reference,
    reference_features,
)
from robuq_bench.judging.reference_statistics import load_statistics
from robuq_bench.judging.sampling import (
    decode_latents,
    default_labels,
    evaluation_mode,
    image_grid,
    sample_images,
)
from robuq_bench.runs.digests import require_digest
from robuq_bench.stopwatch import Stopwatch
from robuq_bench.training import BatchSource

if TYPE_CHECKING:
    from robuq_bench.config import Workload
    from robuq_bench.context import Context
    from robuq_bench.judging.shipped_samples import ShippedSamples
    from robuq_bench.judging.teacher import Judged
    from robuq_bench.runs.run import Run

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
VALIDATION_BATCH_SIZE = 128
SIDE_BY_SIDE_BYTES = 2 << 30
"""Activations that sampling may hold in batches side by side."""

LIVE_WIDTHS = 20  # measured for a DiT-XL/2 block in full precision
GRID_COLUMNS = 10
GRID_SCALE = 4


def seed_ranges(workload: Workload, training_seed: int) -> list[range]:
    """Return the disjoint image-seed ranges of the protocol: [0, N), [N, 2N), ...

    Where `evaluation.image_seeds` is "own", those of the next training seed go on from there.
    """
    count, ranges = workload.evaluation.num_samples, workload.evaluation.seed_ranges
    first = training_seed * ranges if workload.evaluation.image_seeds == "own" else 0
    return [range(i * count, (i + 1) * count) for i in range(first, first + ranges)]


def load_reference(workload: Workload, data: ImageData, network: FeatureNetwork) -> Reference:
    """Load what samples are compared with, and check that latents can become images.

    An ADM `.npz` or a file of `reference_statistics` when `evaluation.reference` names one, else
    features and labels of the training images.

    Raises:
        MissingResourceError: a latent workload without reference statistics or VAE.
        UsageError: features for images of another shape, or a reference of others or in others.
        CheckpointError: a damaged reference or VAE, or one that changed since the run was planned.
    """
    evaluation = workload.evaluation
    shape = tuple(data.images.shape[1:])
    if data.is_latent:
        if evaluation.reference is None:
            raise MissingResourceError(
                f"workload {workload.name!r} holds latents, which have no pixels to compare with; "
                "pass reference statistics: --set evaluation.reference=FILE.npz (ADM's format)"
            )
        # A VAE that is missing or damaged must show before the training, not after it.
        shape = tuple(decode_latents(torch.zeros(1, *shape), evaluation.vae).shape[1:])
        if evaluation.vae is not None:
            path = asset_path(evaluation.vae)
            require_digest(path, evaluation.vae_sha256, "evaluation.vae")
    check_features(network, shape, data)
    if evaluation.reference is None:
        features = reference_features(network, data, evaluation.batch_size)
        return replace(as_reference(features), labels=data.labels)
    path = asset_path(evaluation.reference)
    if path.suffix == ".safetensors":
        reference = load_statistics(path, network, data, evaluation.batch_size)
    else:
        reference = load_adm_reference(path, network, evaluation.batch_size, image_size=shape[-1])
    require_digest(path, evaluation.reference_sha256, "evaluation.reference")
    return reference


def check_features(network: FeatureNetwork, shape: tuple[int, ...], data: ImageData) -> None:
    """Refuse features that do not fit images of `shape` [C, H, W], or warn of how far they fit.

    Raises:
        UsageError: another shape, unless `evaluation.adapt_images` asks for it; or needlessly so.
    """
    network.check_fit(*shape)
    if network.adapts:
        if network.fits(*shape):
            raise UsageError(
                f"feature network {network.name!r} fits {shape[0]}x{shape[1]}x{shape[2]} images; "
                "pass --set evaluation.adapt_images=false: adapting nothing would only give its "
                "metrics another name"
            )
        logger.warning(
            "%s images are adapted to feature network %r (%d channel(s), %sx%s); metrics are "
            "called fid%s etc. and compare with no others",
            "x".join(map(str, shape)),
            network.name,
            network.channels[0],
            network.size,
            network.size,
            network.suffix,
        )
    if not data.is_latent and network.trained_on not in ("", data.sha256, data.part_of):
        logger.warning(
            "feature network %r was trained on other images (SHA-256 %.12s) than those judged "
            "(%s, %.12s); fid%s means something only if they show the same kind of thing",
            network.name,
            network.trained_on,
            data.source,
            data.sha256,
            network.suffix,
        )


def record_inputs(
    run: Run,
    workload: Workload,
    data: ImageData,
    *networks: FeatureNetwork,
    heldout: ImageData | None = None,
) -> None:
    """Record by SHA-256 what a run is measured on, or check it in a finished run.

    `networks` are the feature network and, where there is one, the second.

    Raises:
        CheckpointError: an earlier session, or the finished run, was measured on something else.
    """
    evaluation = workload.evaluation
    digests = {
        "data": (data.sha256, {"source": data.source}),
        "held-out data": (heldout.sha256 if heldout else None, {}),
        "reference": (evaluation.reference_sha256, {}),
        "second reference": (evaluation.second_reference_sha256, {}),
        "vae": (evaluation.vae_sha256, {}),
    }
    for name, network in zip(("features", "second features"), networks, strict=False):
        digests[name] = (network.sha256, {"network": network.name})
    for name, (digest, fields) in digests.items():
        if not digest:
            continue
        if not run.is_done:
            run.add_input_digest(name, digest, **fields)
            continue
        known = run.manifest["inputs"].get(name)  # older runs recorded none
        if known is not None and known["sha256"] != digest:
            raise CheckpointError(
                f"run {run.id} was measured with other {name} (SHA-256 {known['sha256']}) than "
                f"these ({digest}); restore them, or move {run.path} away"
            )


def evaluate_samples(
    model: nn.Module,
    workload: Workload,
    run: Run,
    context: Context,
    *,
    subject: str,
    judged: Judged,
    shipped: ShippedSamples | None = None,
) -> list[dict[str, Any]]:
    """Sample and measure `model` in every seed range; finished ranges are taken from the run.

    Appends one `metrics/<subject>/<range>` record per range, and writes the first range's grid
    to samples/grid-<subject>.png, some of it with the nearest training images to
    samples/neighbours-<subject>.png, and all images as uint8 NHWC `arr_0` (the ADM evaluator's
    layout) to samples/<subject>-<range>.npz. `shipped` samples are measured in place of new ones;
    their records name them as `samples` and have no `sample_seconds`.
    """
    rows: list[dict[str, Any]] = []
    for index, seeds in enumerate(seed_ranges(workload, run.config.seed)):
        key = f"metrics/{subject}/{index}"
        if not run.has(key):
            if shipped is None:
                images, origin = _sample(model, workload, context, subject, index, seeds)
            else:
                images = shipped.images[seeds.start : seeds.stop]
                origin = {"samples": shipped.source}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).numpy())
            run.write_bytes(f"samples/{subject}-{index}.npz", buffer.getvalue())
            if index == 0 and workload.evaluation.grid_images:
                grid = image_grid(
                    images[: workload.evaluation.grid_images], GRID_COLUMNS, GRID_SCALE
                )
                run.write_bytes(f"samples/grid-{subject}.png", grid)
            metrics, pool = _measure(images, seeds, workload, judged)
            if index == 0 and workload.evaluation.grid_images and judged.training is not None:
                shown = slice(workload.evaluation.grid_images)
                picture = judged.training.picture(
                    images[shown], pool[shown], GRID_COLUMNS, GRID_SCALE
                )
                run.write_bytes(f"samples/neighbours-{subject}.png", picture)
            run.append(
                key,
                kind="metrics",
                subject=subject,
                seed_range=index,
                seed_start=seeds.start,
                num_samples=len(seeds),
                **origin,
                **metrics,
            )
        rows.append(run.get(key) or {})
    return rows


def _measure(
    images: Tensor, seeds: range, workload: Workload, judged: Judged
) -> tuple[dict[str, float], Tensor]:
    """All metrics of images uint8 [N, C, H, W] in all spaces, and features [N, d] of the first."""
    classes = workload.model.num_classes
    labels = default_labels(seeds, classes)
    metrics: dict[str, float] = {}
    pools = []
    for space in judged.spaces:
        features = space.network.extract(images, space.batch_size)
        metrics |= space.measure(features, labels, classes, space.reference)
        pools.append(features.pool)
        floor = judged.floors.get(space.network.suffix)
        if floor is not None and (fid := floor.fid_of(features)) is not None:
            metrics[space.named("fid_at_floor")] = fid
    if judged.training is not None:
        metrics |= judged.training.ratios(images, pools[0])
    return metrics, pools[0]


def _sample(
    model: nn.Module, workload: Workload, context: Context, subject: str, index: int, seeds: range
) -> tuple[Tensor, dict[str, Any]]:
    """Images uint8 [N, C, H, W] of one seed range, and the time that they took."""
    watch = Stopwatch()
    label = f"sample {subject} {index + 1}/{workload.evaluation.seed_ranges}"
    with context.progress.task(label, len(seeds)) as task:
        images = sample_images(
            model,
            workload,
            seeds=seeds,
            batch_size=workload.evaluation.batch_size,
            device=context.device,
            progress=task.reach,
            workers=batches_side_by_side(workload, context.threads),
        )
    if workload.data.source == "latents":
        images = decode_latents(images, workload.evaluation.vae, device=context.device)
    return images, {f"sample_{name}": value for name, value in watch.lap().items()}


def batches_side_by_side(workload: Workload, threads: int) -> int:
    """Batches to sample at a time on a CPU, on shares of its threads.

    As many as threads, while their activations fit `SIDE_BY_SIDE_BYTES` together; at least one. A
    batch counts as `LIVE_WIDTHS` float32 values for each token and channel, twice with guidance.
    """
    section, evaluation = workload.model, workload.evaluation
    images = evaluation.batch_size * (1 if evaluation.cfg_scale == 1 else 2)
    tokens = images * (section.input_size // section.patch_size) ** 2
    batch_bytes = 4 * LIVE_WIDTHS * tokens * section.hidden_size
    return max(1, min(threads, SIDE_BY_SIDE_BYTES // batch_bytes))


def _validation_source(
    teacher: nn.Module, data: ImageData, workload: Workload, device: str
) -> BatchSource:
    """Batches 0 to `VALIDATION_BATCHES` - 1 of it are those of every validation."""
    return BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        Diffusion.from_config(workload.diffusion),
        teacher,
        batch_size=VALIDATION_BATCH_SIZE,
        seed=0,
        stream="validation",
        device=device,
    )


@torch.no_grad()
def validation_energy(
    teacher: nn.Module, data: ImageData, workload: Workload, device: str
) -> float:
    """Mean square of the teacher's output on the validation batches: the unit of its distance."""
    source, energy = _validation_source(teacher, data, workload, device), 0.0
    with evaluation_mode(teacher):
        for step in range(VALIDATION_BATCHES):
            batch = source.batch(step)
            output = teacher(batch.x_t, batch.t, batch.y).float()
            energy += float(output.square().mean()) / VALIDATION_BATCHES
    return energy


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    teacher: nn.Module,
    data: ImageData,
    workload: Workload,
    device: str,
    heldout: ImageData | None = None,
) -> dict[str, Any]:
    """Return mean distillation and denoising loss on fixed batches, the same for every plan.

    The batches come from the held-out images, or where a workload has none from the training
    images, as `validation_images` says ("held-out" or "training"), with noise, timesteps and labels
    of their own stream. On training images they measure fit to the teacher, not generalisation.
    """
    data, images = (data, "training") if heldout is None else (heldout, "held-out")
    diffusion = Diffusion.from_config(workload.diffusion)
    source = _validation_source(teacher, data, workload, device)
    distillation = denoising = 0.0
    with evaluation_mode(model):
        for step in range(VALIDATION_BATCHES):
            batch = source.batch(step)
            output = model(batch.x_t, batch.t, batch.y).float()
            target = teacher(batch.x_t, batch.t, batch.y).float()
            losses = diffusion.training_loss(output, batch.x0, batch.x_t, batch.t, batch.noise)
            distillation += float((output - target).square().mean()) / VALIDATION_BATCHES
            denoising += float(losses.mean()) / VALIDATION_BATCHES
    return {
        "distillation_loss": distillation,
        "denoising_loss": denoising,
        "validation_images": images,
    }
