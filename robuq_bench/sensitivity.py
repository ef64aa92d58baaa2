"""Sensitivity of the noise prediction to the activation bits of one layer at a time.

    s_l(b) = mean over (x_t, t, y) and all elements of
             ( eps(x_t, t, y; layer l at b bits) - eps(x_t, t, y; every layer as it is) )^2

RobuQ measures its sensitivities about 1,000 QAT steps after the W1.58A4 start, because layers that
look bad on the post-training-quantized model recover in training. Its metric is not published;
this one is the direct reading of what the allocation is for. The state of training is the
caller's: this module measures the model as given and leaves it as found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import RobuqError, UsageError, suggest
from robuq_bench.quantization.convert import quantized_layers, set_activation_bits


class CalibrationBatch(NamedTuple):
    """Model inputs: noisy images [B, C, H, W] float32, timesteps [B] and labels [B] int64."""

    x_t: Tensor
    t: Tensor
    y: Tensor


def calibration_batches(
    images: Tensor,
    labels: Tensor,
    diffusion: Diffusion,
    num_samples: int,
    batch_size: int,
    seed: int,
) -> list[CalibrationBatch]:
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
    x_t = diffusion.q_sample(images[picked].float(), t, noise)
    y = labels[picked.to(labels.device)].to(images.device, torch.int64)
    return [
        CalibrationBatch(*parts)
        for parts in zip(
            x_t.split(batch_size), t.split(batch_size), y.split(batch_size), strict=True
        )
    ]


def measure_sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[CalibrationBatch],
    *,
    done: Mapping[str, Mapping[int, float]] | None = None,
    on_item: Callable[[str, int, float], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Return s_l(b) for every layer and bit width: {layer: {bits: mean squared change}}.

    The model runs in evaluation mode without gradients, on its own device; its activation bits
    and its training flags are restored afterwards, also after an error. A layer's present bit
    width changes nothing and costs no forward pass: its sensitivity is 0 by definition.

    Args:
        model: a model with `QuantizedLinear` layers, called as model(x_t, t, y) and returning
            [B, C or 2C, H, W], of which the first C channels are the noise prediction.
        layers: names of quantized layers, each measured alone.
        bit_choices: activation bit widths to try.
        batches: calibration set; the mean runs over all elements, so batch sizes matter only
            through rounding.
        done: results of an earlier, interrupted call, which are not measured again.
        on_item: called with (layer, bits, value) as soon as each new value is known.

    Raises:
        UsageError: an unknown layer, an empty calibration set, or no layers or bit widths.
        RobuqError: a prediction that is not finite, naming layer and bits.
    """
    modules = quantized_layers(model)
    for layer in layers:
        if layer not in modules:
            raise UsageError(f"no quantized layer {layer!r} to measure{suggest(layer, modules)}")
    if not (layers and bit_choices and batches):
        raise UsageError("sensitivity needs at least one layer, bit width and calibration batch")
    known = done or {}
    before = {name: module.activation_bits for name, module in modules.items()}
    result: dict[str, dict[int, float]] = {layer: {} for layer in layers}
    reference: list[Tensor] | None = None
    try:
        with _evaluation_mode(model), torch.no_grad():
            for layer in layers:
                for bits in bit_choices:
                    if bits in known.get(layer, {}):
                        result[layer][bits] = known[layer][bits]
                        continue
                    if reference is None:
                        reference = [_predict(model, batch) for batch in batches]
                        _check_finite(_squared_sum(reference), "with every layer as it is")
                    value = 0.0
                    if bits != before[layer]:
                        set_activation_bits(model, {**before, layer: bits})
                        value = _mean_squared_change(model, batches, reference)
                        _check_finite(value, f"with layer {layer!r} at {bits} bits")
                    result[layer][bits] = value
                    if on_item is not None:
                        on_item(layer, bits, value)
    finally:
        set_activation_bits(model, before)
    return result


def _predict(model: nn.Module, batch: CalibrationBatch) -> Tensor:
    """Noise prediction [B, C, H, W] of one batch, on the model's device."""
    device = next(model.parameters()).device
    output = model(*(part.to(device) for part in batch))
    prediction: Tensor = output[:, : batch.x_t.shape[1]].float()
    return prediction


def _squared_sum(parts: Sequence[Tensor]) -> float:
    return sum(part.double().square().sum().item() for part in parts)


def _mean_squared_change(
    model: nn.Module, batches: Sequence[CalibrationBatch], reference: Sequence[Tensor]
) -> float:
    changes = (_predict(model, batch) - eps for batch, eps in zip(batches, reference, strict=True))
    total = sum(change.double().square().sum().item() for change in changes)
    return total / sum(eps.numel() for eps in reference)


def _check_finite(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise RobuqError(
            f"the noise prediction is not finite {where}; the model has diverged, so lower the "
            "learning rate or start the sensitivities from an earlier checkpoint"
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and give every module its own training flag back afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
