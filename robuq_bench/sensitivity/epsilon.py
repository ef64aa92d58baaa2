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
from collections.abc import Sequence

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

        s_l(b) = E (eps(layer l at b bits) - eps_R)^2 - E (eps(every layer as it is) - eps_R)^2,

    what a direct search over allocations minimises. An increase may be negative, since more bits,
    and sometimes fewer, help: then the sensitivity is 0, unless `signed`. The quantizers behind a
    layer answer any change by flipped codes; the first form counts these as error however small
    the change, the second only where they lead away from R.

    The model runs in evaluation mode without gradients, on its own device; its activation bits
    and its training flags are restored afterwards, also after an error. A layer's present bit
    width changes nothing and costs no forward pass: its sensitivity is 0 by definition. Others skip
    the blocks before their layer where `Prefix` finds that they may.

    Args:
        model: a model with `QuantizedLinear` layers, called as model(x_t, t, y) and returning
            [B, C or 2C, H, W], of which the first C channels are the noise prediction.
        layers: names of quantized layers, each measured alone.
        bit_choices: activation bit widths to try.
        batches: calibration set; the mean runs over all elements, so batch sizes matter only
            through rounding.
        reference: model to compare with, on the same device; None compares with `model` itself.
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
    result: Table = {layer: {} for layer in layers}
    target: list[Tensor] | None = None
    prefix: Prefix | None = None
    present_error = 0.0
    try:
        with evaluation_mode(model), torch.no_grad():
            for name, module in modules.items():
                for bits in bit_choices:
                    if bits in known.get(name, {}):
                        result[name][bits] = known[name][bits]
                        continue
                    if target is None:
                        target, present_error = _target(model, reference, batches)
                    value = 0.0
                    if bits != before[module]:
                        prefix = prefix or Prefix(model, modules, batches)
                        module.activation_bits = bits
                        with prefix.reused(name):
                            error = mean_squared_error(model, batches, target)
                        module.activation_bits = before[module]
                        _check_finite(error, f"with layer {name!r} at {bits} bits")
                        value = error - present_error
                        value = value if signed else max(0.0, value)
                    result[name][bits] = value
                    if on_item is not None:
                        on_item(name, bits, value)
    finally:
        for module, present in before.items():
            module.activation_bits = present
    return result


def _target(
    model: nn.Module, reference: nn.Module | None, batches: Sequence[ModelInputs]
) -> tuple[list[Tensor], float]:
    """Predictions to compare with, and the model's present error against them."""
    source = model if reference is None else reference
    with evaluation_mode(source):
        target = [predict(source, batch) for batch in batches]
    if reference is None:
        _check_finite(sum(map(squared_sum, target)), "with every layer as it is")
        return target, 0.0
    _check_finite(sum(map(squared_sum, target)), "of the reference model")
    error = mean_squared_error(model, batches, target)
    _check_finite(error, "with every layer as it is")
    return target, error


def mean_squared_error(
    model: nn.Module, batches: Sequence[ModelInputs], target: Sequence[Tensor]
) -> float:
    """Mean over all elements of the squared distance of the predictions to `target`."""
    pairs = zip(batches, target, strict=True)
    total = sum(squared_sum(predict(model, batch) - eps) for batch, eps in pairs)
    return total / sum(eps.numel() for eps in target)


def _check_finite(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise RobuqError(
            f"the noise prediction is not finite {where}; the model has diverged, so lower the "
            "learning rate or start the sensitivities from an earlier checkpoint"
        )
