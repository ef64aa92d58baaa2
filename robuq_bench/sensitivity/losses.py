"""Losses per sample, whose derivatives the Fisher and Hessian metrics take.

One value per sample and not their mean: samples do not interact, so the gradient of the sum holds
every sample's own gradient, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.probing import run_model
from robuq_bench.training import Batch

#: (model, batch) -> loss of every sample [B].
SampleLoss = Callable[[nn.Module, ModelInputs], Tensor]


def distillation_loss(teacher: nn.Module) -> SampleLoss:
    """Mean squared distance to the teacher's output, all channels: the loss of QAT, per sample."""

    def loss(model: nn.Module, batch: ModelInputs) -> Tensor:
        with torch.no_grad():
            target = run_model(teacher, batch).float()
        return (run_model(model, batch).float() - target).square().flatten(1).mean(1)

    return loss


def denoising_loss(diffusion: Diffusion) -> SampleLoss:
    """Training loss of the full-precision model; needs the batches of `calibration_set`."""

    def loss(model: nn.Module, batch: ModelInputs) -> Tensor:
        if not isinstance(batch, Batch):
            raise UsageError(
                "the denoising loss needs clean images and noise; use calibration_set in place of "
                "calibration_batches"
            )
        output = run_model(model, batch).float()
        rest = (part.to(output.device) for part in (batch.x0, batch.x_t, batch.t, batch.noise))
        return diffusion.training_loss(output, *rest)

    return loss
