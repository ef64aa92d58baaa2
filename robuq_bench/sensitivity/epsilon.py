"""Sensitivity of the noise prediction to the activation bits of one layer at a time.

    s_l(b) = mean over (x_t, t, y) and all elements of
             ( eps(x_t, t, y; layer l at b bits) - eps(x_t, t, y; layer l unquantized) )^2

Every other layer is as it is. RobuQ measures its sensitivities about 1,000 QAT steps after the
W1.58A4 start, because layers that look bad on the post-training-quantized model recover in
training. Its metric is not published; this one is the direct reading of what the allocation is for.
Compared with the layer at its present bits instead, these would cost nothing, and an allocation
that may choose them would be drawn to them. The state of training is the caller's: this module
measures the model as given and leaves it as found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from robuq_bench.errors import RobuqError
from robuq_bench.judging.sampling import evaluation_mode
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.prefix import Prefix
from robuq_bench.sensitivity.probing import (
    Done,
    OnItem,
    Table,
    check_request,
    predict,
    squared_sum,
)


def measure_sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """Return s_l(b) of the module's formula, `epsilon_mse` without a reference model."""
    return epsilon_mse(model, layers, bit_choices, batches, done=done, on_item=on_item)


def epsilon_mse(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    reference: nn.Module | None = None,
    signed: bool = False,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """Return s_l(b) for every layer and bit width: {layer: {bits: mean squared change}}.

    With a reference model R (the teacher) it is the increase of the end-to-end error instead,

        s_l(b) = E (eps(layer l at b bits) - eps_R)^2 - E (eps(layer l unquantized) - eps_R)^2,

    what a direct search over allocations minimises. An increase may be negative, since more bits,
    and sometimes fewer, help: then the sensitivity is 0, unless `signed`. The quantizers behind a
    layer answer any change by flipped codes; the first form counts these as error however small
    the change, the second only where they lead away from R.

    The model runs in evaluation mode without gradients, on its own device; its activation bits
    and its training flags are restored afterwards, also after an error. "Unquantized" are the
    activations of the layer; its weight stays. Passes skip the blocks before their layer where
    `Prefix` finds that they may.

    Args:
        model: a model with `QuantizedLinear` layers, called as model(x_t, t, y) and returning
            [B, C or 2C, H, W], of which the first C channels are the noise prediction.
        layers: names of quantized layers, each measured alone.
        bit_choices: activation bit widths to try.
        batches: calibration set; the mean runs over all elements, so batch sizes matter only
            through rounding.
        reference: model to compare with, on the same device; None compares with `model` itself,
            the layer unquantized.
        signed: return negative increases as they are.
        done: results of an earlier, interrupted call, which are not measured again.
        on_item: called with (layer, bits, value) as soon as each new value is known.

    Raises:
        UsageError: an unknown layer, an empty calibration set, or no layers or bit widths.
        RobuqError: a prediction that is not finite, naming layer and bits.
    """
    modules = check_request(model, layers, bit_choices, batches)
    known = done or {}
    before = {layer: layer.activation_bits for layer in quantized_layers(model).values()}
    result: Table = {layer: dict(known.get(layer, {})) for layer in layers}
    target: list[Tensor] | None = None
    prefix: Prefix | None = None
    try:
        with evaluation_mode(model), torch.no_grad():
            for name, module in modules.items():
                missing = [bits for bits in bit_choices if bits not in result[name]]
                if not missing:
                    continue
                if reference is not None and target is None:
                    with evaluation_mode(reference):
                        target = [predict(reference, batch) for batch in batches]
                    _check_finite(sum(map(squared_sum, target)), "of the reference model")
                prefix = prefix or Prefix(model, modules, batches)
                module.activation_bits = None
                with prefix.reused(name):
                    unquantized = [predict(model, batch) for batch in batches]
                present = unquantized if target is None else target
                least = _mean_square(unquantized, present)
                _check_finite(
                    sum(map(squared_sum, unquantized)), f"with layer {name!r} unquantized"
                )
                for bits in missing:
                    module.activation_bits = bits
                    with prefix.reused(name):
                        error = mean_squared_error(model, batches, present)
                    _check_finite(error, f"with layer {name!r} at {bits} bits")
                    value = error - least if signed else max(0.0, error - least)
                    result[name][bits] = value
                    if on_item is not None:
                        on_item(name, bits, value)
                module.activation_bits = before[module]
    finally:
        for module, bits_before in before.items():
            module.activation_bits = bits_before
    return {name: {bits: result[name][bits] for bits in bit_choices} for name in layers}


def mean_squared_error(
    model: nn.Module, batches: Sequence[ModelInputs], target: Sequence[Tensor]
) -> float:
    """Mean over all elements of the squared distance of the predictions to `target`."""
    return _mean_square((predict(model, batch) for batch in batches), target)


def _mean_square(predictions: Iterable[Tensor], target: Sequence[Tensor]) -> float:
    pairs = zip(predictions, target, strict=True)
    total = sum(squared_sum(eps - other) for eps, other in pairs)
    return total / sum(eps.numel() for eps in target)


def _check_finite(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise RobuqError(
            f"the noise prediction is not finite {where}; the model has diverged, so lower the "
            "learning rate or start the sensitivities from an earlier checkpoint"
        )
