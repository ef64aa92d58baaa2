"""Judging a model under a workload's protocol: samples, metrics and losses, per seed range.

Every subject (teacher or student) is sampled from the same image seeds, so that differences
between rows are differences between models.
"""

from __future__ import annotations

import io
import logging
import time
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
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import (
    Reference,
    as_reference,
    compute_metrics,
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
from robuq_bench.training import BatchSource

if TYPE_CHECKING:
    from robuq_bench.config import Workload
    from robuq_bench.context import Context
    from robuq_bench.judging.shipped_samples import ShippedSamples
    from robuq_bench.runs.run import Run

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
VALIDATION_BATCH_SIZE = 128
SIDE_BY_SIDE_BYTES = 2 << 30
"""Activations that sampling may hold in batches side by side."""

LIVE_WIDTHS = 20  # measured for a DiT-XL/2 block in full precision
GRID_COLUMNS = 10
GRID_SCALE = 4


def seed_ranges(workload: Workload) -> list[range]:
    """Return the disjoint image-seed ranges of the protocol: [0, N), [N, 2N), ..."""
    count = workload.evaluation.num_samples
    return [range(i * count, (i + 1) * count) for i in range(workload.evaluation.seed_ranges)]


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


def record_inputs(run: Run, workload: Workload, data: ImageData, network: FeatureNetwork) -> None:
    """Record by SHA-256 what a run is measured on, or check it in a finished run.

    Raises:
        CheckpointError: an earlier session, or the finished run, was measured on something else.
    """
    evaluation = workload.evaluation
    digests = {
        "data": (data.sha256, {"source": data.source}),
        "features": (network.sha256, {"network": network.name}),
        "reference": (evaluation.reference_sha256, {}),
        "vae": (evaluation.vae_sha256, {}),
    }
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
    network: FeatureNetwork,
    reference: Features | Reference,
    shipped: ShippedSamples | None = None,
) -> list[dict[str, Any]]:
    """Sample and measure `model` in every seed range; finished ranges are taken from the run.

    Appends one `metrics/<subject>/<range>` record per range, and writes the first range's grid
    to samples/grid-<subject>.png and all images as uint8 NHWC `arr_0` (the ADM evaluator's
    layout) to samples/<subject>-<range>.npz. `shipped` samples are measured in place of new ones;
    their records name them as `samples` and have no `sample_seconds`.
    """
    rows: list[dict[str, Any]] = []
    for index, seeds in enumerate(seed_ranges(workload)):
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
            metrics = compute_metrics(
                network.extract(images, workload.evaluation.batch_size),
                reference,
                network.suffix,
                default_labels(seeds, workload.model.num_classes),
            )
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


def _sample(
    model: nn.Module, workload: Workload, context: Context, subject: str, index: int, seeds: range
) -> tuple[Tensor, dict[str, Any]]:
    """Images uint8 [N, C, H, W] of one seed range, and the time that they took."""
    start = time.perf_counter()
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
    return images, {"sample_seconds": round(time.perf_counter() - start, 3)}


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


@torch.no_grad()
def validation_losses(
    model: nn.Module, teacher: nn.Module, data: ImageData, workload: Workload, device: str
) -> dict[str, float]:
    """Return mean distillation and denoising loss on fixed batches, the same for every plan.

    The batches come from the training images with noise, timesteps and labels of their own
    stream; they measure fit to the teacher, not generalisation to unseen digits.
    """
    diffusion = Diffusion.from_config(workload.diffusion)
    source = BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        diffusion,
        teacher,
        batch_size=VALIDATION_BATCH_SIZE,
        seed=0,
        stream="validation",
        device=device,
    )
    distillation = denoising = 0.0
    with evaluation_mode(model):
        for step in range(VALIDATION_BATCHES):
            batch = source.batch(step)
            output = model(batch.x_t, batch.t, batch.y).float()
            target = teacher(batch.x_t, batch.t, batch.y).float()
            losses = diffusion.training_loss(output, batch.x0, batch.x_t, batch.t, batch.noise)
            distillation += float((output - target).square().mean()) / VALIDATION_BATCHES
            denoising += float(losses.mean()) / VALIDATION_BATCHES
    return {"distillation_loss": distillation, "denoising_loss": denoising}
