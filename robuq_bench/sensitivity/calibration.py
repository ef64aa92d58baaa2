"""The fixed set of diffused real images on which every metric is measured."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError
from robuq_bench.training import Batch


class ModelInputs(Protocol):
    """What a model is called with: a `CalibrationBatch` or a training `Batch`."""

    @property
    def x_t(self) -> Tensor: ...
    @property
    def t(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...


class CalibrationBatch(NamedTuple):
    """Model inputs: noisy images [B, C, H, W] float32, timesteps [B] and labels [B] int64."""

    x_t: Tensor
    t: Tensor
    y: Tensor


def calibration_set(
    images: Tensor,
    labels: Tensor,
    diffusion: Diffusion,
    num_samples: int,
    batch_size: int,
    seed: int,
) -> list[Batch]:
    """Return a fixed set of diffused real images, the same for every batch size.

    Timesteps are stratified: the schedule is cut into `num_samples` equal strata with one uniform
    draw in each, so that the set covers it evenly however small it is. Images are drawn without
    replacement until all have been used.

    Args:
        images: clean images [N, C, H, W], float, in the model's range.
        labels: their classes [N], integer.
        diffusion: the noise schedule.
        num_samples: size of the set.
        batch_size: samples per batch; the last batch may be smaller.
        seed: everything drawn here is a function of it.

    Returns:
        Training batches, which carry the clean images and the noise that a denoising loss needs.

    Raises:
        UsageError: empty or mismatched tensors, integer images, or a size below 1.
    """
    if num_samples < 1 or batch_size < 1:
        raise UsageError(
            "calibration needs at least one sample and a positive batch size, got "
            f"{num_samples} samples and batch size {batch_size}"
        )
    if len(images) == 0 or len(images) != len(labels):
        raise UsageError(
            f"calibration needs as many labels as images, got {len(images)} images and "
            f"{len(labels)} labels"
        )
    if not images.is_floating_point():
        raise UsageError(f"calibration images must be floats in the model's range: {images.dtype}")
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(num_samples / len(images))
    order = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
    picked = torch.cat(order)[:num_samples].to(images.device)
    steps = diffusion.num_train_timesteps
    jitter = torch.rand(num_samples, generator=generator, dtype=torch.float64)
    strata = torch.arange(num_samples, dtype=torch.float64)
    # The sum can round up to the end of its stratum, which for the last one is past the schedule.
    t = ((strata + jitter) * steps / num_samples).long().clamp(max=steps - 1)
    t = t[torch.randperm(num_samples, generator=generator)].to(images.device)
    noise = torch.randn((num_samples, *images.shape[1:]), generator=generator).to(images.device)
    x0 = images[picked].float()
    x_t = diffusion.q_sample(x0, t, noise)
    y = labels[picked.to(labels.device)].to(images.device, torch.int64)
    fields = (tensor.split(batch_size) for tensor in (x0, noise, x_t, t, y))
    return [Batch(*parts) for parts in zip(*fields, strict=True)]


def calibration_batches(
    images: Tensor,
    labels: Tensor,
    diffusion: Diffusion,
    num_samples: int,
    batch_size: int,
    seed: int,
) -> list[CalibrationBatch]:
    """Return the model inputs of `calibration_set`, which see; enough for most metrics."""
    batches = calibration_set(images, labels, diffusion, num_samples, batch_size, seed)
    return [CalibrationBatch(batch.x_t, batch.t, batch.y) for batch in batches]
