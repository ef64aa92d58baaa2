"""Any metric resolved by diffusion timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from robuq_bench.errors import UsageError
from robuq_bench.sensitivity.calibration import CalibrationBatch, ModelInputs
from robuq_bench.sensitivity.probing import Done, OnItem, Table
from robuq_bench.training import Batch


class MetricFunction(Protocol):
    """The one interface of every metric."""

    def __call__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        bit_choices: Sequence[int],
        batches: Sequence[ModelInputs],
        *,
        done: Done | None = None,
        on_item: OnItem | None = None,
    ) -> Table: ...


def timestep_buckets(
    batches: Sequence[ModelInputs], buckets: int, num_train_timesteps: int
) -> list[list[ModelInputs]]:
    """Split the samples into equal ranges of t: bucket i holds T i / k <= t < T (i + 1) / k.

    Samples keep their order and their batches, less those of other buckets. Of a stratified set
    whose size is a multiple of k, with T a multiple of k, every bucket gets the same number.

    Raises:
        UsageError: fewer than one bucket, a timestep outside the schedule, or an empty bucket.
    """
    if buckets < 1:
        raise UsageError(f"timestep buckets must be at least 1, got {buckets}")
    parts: list[list[ModelInputs]] = [[] for _ in range(buckets)]
    for batch in batches:
        if bool(((batch.t < 0) | (batch.t >= num_train_timesteps)).any()):
            raise UsageError(f"calibration timesteps must lie in 0..{num_train_timesteps - 1}")
        index = torch.div(batch.t * buckets, num_train_timesteps, rounding_mode="floor")
        for bucket, part in enumerate(parts):
            chosen = (index == bucket).nonzero().squeeze(1)
            if len(chosen):
                part.append(_select(batch, chosen))
    empty = [bucket for bucket, part in enumerate(parts) if not part]
    if empty:
        raise UsageError(
            f"no calibration sample in timestep buckets {empty} of {buckets}; use fewer buckets or "
            "more calibration samples"
        )
    return parts


def _select(batch: ModelInputs, chosen: torch.Tensor) -> ModelInputs:
    x_t, t, y = batch.x_t[chosen], batch.t[chosen], batch.y[chosen]
    if isinstance(batch, Batch):
        return Batch(batch.x0[chosen], batch.noise[chosen], x_t, t, y)
    return CalibrationBatch(x_t, t, y)


def by_timestep(
    metric: MetricFunction,
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    buckets: int,
    num_train_timesteps: int,
    done: Mapping[int, Done] | None = None,
    on_item: Callable[[int, str, int, float], None] | None = None,
) -> dict[str, dict[int, list[float]]]:
    """Return {layer: {bits: [value of each timestep bucket, low t (little noise) first]}}.

    Buckets are those of `timestep_buckets`. A metric that is a mean over samples, such as
    `epsilon_mse` without a reference, is the mean of its buckets weighted by their samples.

    Args:
        metric: one of `METRICS`, bound to its options.
        done: results of an earlier call by bucket.
        on_item: called with (bucket, layer, bits, value); others as of `epsilon_mse`.
    """
    result: dict[str, dict[int, list[float]]] = {
        layer: {bits: [] for bits in bit_choices} for layer in layers
    }
    for bucket, part in enumerate(timestep_buckets(batches, buckets, num_train_timesteps)):
        report: OnItem | None = None
        if on_item is not None:
            report = _with_bucket(on_item, bucket)
        known = (done or {}).get(bucket)
        table = metric(model, layers, bit_choices, part, done=known, on_item=report)
        for layer in layers:
            for bits in bit_choices:
                result[layer][bits].append(table[layer][bits])
    return result


def _with_bucket(on_item: Callable[[int, str, int, float], None], bucket: int) -> OnItem:
    return lambda layer, bits, value: on_item(bucket, layer, bits, value)
