"""What every metric does to a model, and undoes: modes, hooks, and one layer's arithmetic.

Notation of a quantized layer: a is its rotated input, y = Q_b(a) W^T + branch(a) + bias with the
dequantized weight W. Only the quantized product sees Q_b(a), so a perturbation of it by d changes
the output by d W^T exactly, whatever the low-rank branch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import RobuqError, UsageError, suggest
from robuq_bench.judging.sampling import evaluation_mode
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity.calibration import ModelInputs

#: {layer: {activation bits: sensitivity}}.
Table = dict[str, dict[int, float]]
#: Results of an earlier, interrupted call.
Done = Mapping[str, Mapping[int, float]]
#: Called with (layer, bits, value) as soon as a new value is known.
OnItem = Callable[[str, int, float], None]
#: (name, layer, input, output) of a call -> another output, or None to leave it.
LayerHook = Callable[[str, QuantizedLinear, Tensor, Tensor], Tensor | None]


def named_layers(
    model: nn.Module, layers: Sequence[str], batches: Sequence[ModelInputs]
) -> dict[str, QuantizedLinear]:
    """Return the named layers; UsageError for an unknown one, or nothing to measure."""
    modules = quantized_layers(model)
    for layer in layers:
        if layer not in modules:
            raise UsageError(f"no quantized layer {layer!r} to measure{suggest(layer, modules)}")
    if not (layers and batches):
        raise UsageError("sensitivity needs at least one layer, bit width and calibration batch")
    return {layer: modules[layer] for layer in layers}


def check_request(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
) -> dict[str, QuantizedLinear]:
    """Return the named layers; as `named_layers`, and their quantizers must take the bits.

    Raises:
        UsageError: an unknown layer, or nothing to measure.
        ConfigError: a layer's quantizer is not defined at one of the bit widths.
    """
    modules = named_layers(model, layers, batches)
    if not bit_choices:
        raise UsageError("sensitivity needs at least one layer, bit width and calibration batch")
    for module in modules.values():
        for bits in bit_choices:
            module.check_activation_bits(bits)
    return modules


def resumable(
    label: str,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    compute: Callable[[list[str]], Table],
    done: Done | None,
    on_item: OnItem | None,
    *,
    layer_by_layer: bool = False,
) -> Table:
    """Complete `done` by the layers that lack a bit width, and report what is new.

    Raises:
        RobuqError: a value that is negative or not finite, naming layer and bits.
    """
    result: Table = {name: dict((done or {}).get(name, {})) for name in layers}
    missing = [name for name in layers if any(bits not in result[name] for bits in bit_choices)]
    for group in [[name] for name in missing] if layer_by_layer else [missing]:
        values = compute(group) if group else {}
        for name in group:
            for bits in [bits for bits in bit_choices if bits not in result[name]]:
                value = values[name][bits]
                if not (math.isfinite(value) and value >= 0):
                    raise RobuqError(
                        f"{label} of layer {name!r} at {bits} bits is {value}; the model has "
                        "diverged, so measure an earlier checkpoint"
                    )
                result[name][bits] = value
                if on_item is not None:
                    on_item(name, bits, value)
    return {name: {bits: result[name][bits] for bits in bit_choices} for name in layers}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters; restores flags, parameters' flags and bits.

    No gradient can reach a frozen parameter, and its quantized weight is computed once.
    """
    parameters = {parameter: parameter.requires_grad for parameter in model.parameters()}
    bits = {layer: layer.activation_bits for layer in quantized_layers(model).values()}
    try:
        with evaluation_mode(model):
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, required in parameters.items():
            parameter.requires_grad_(required)
        for layer, present in bits.items():
            layer.activation_bits = present


@contextmanager
def layer_hooks(modules: Mapping[str, QuantizedLinear], hook: LayerHook) -> Iterator[None]:
    """Call `hook` after every forward pass of these layers."""

    def adapter(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]:
        return lambda module, inputs, output: hook(name, modules[name], inputs[0], output)

    handles = [module.register_forward_hook(adapter(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predict(model: nn.Module, batch: ModelInputs) -> Tensor:
    """Noise prediction [B, C, H, W] of one batch, on the model's device, float32."""
    prediction: Tensor = run_model(model, batch)[:, : batch.x_t.shape[1]].float()
    return prediction


def run_model(model: nn.Module, batch: ModelInputs) -> Tensor:
    """Every output channel of one batch, on the model's device."""
    device = next(model.parameters()).device
    output: Tensor = model(batch.x_t.to(device), batch.t.to(device), batch.y.to(device))
    return output


def squared_sum(tensor: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(tensor.double().square().sum())


def rotated_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer's a = R((x - c) / s) [..., in], float32 (float64 for float64 input)."""
    return layer.rotate_input(layer.centre_input(x if x.dtype == torch.float64 else x.float()))


def activation_error(layer: QuantizedLinear, a: Tensor, bits: int) -> Tensor:
    """Q_b(a) - a [..., in], without gradient."""
    if layer.activation_quantizer is None:
        raise UsageError(f"layer {layer.name!r} has no activation quantizer")
    with torch.no_grad():
        error: Tensor = layer.activation_quantizer(a.detach(), bits) - a.detach()
    return error


def product_weight(layer: QuantizedLinear, like: Tensor) -> Tensor:
    """The dequantized weight W [out, in] in the dtype of `like`, without gradient."""
    return layer.quantized_weight().detach().to(like.dtype)


def layer_output(layer: QuantizedLinear, a: Tensor, operand: Tensor) -> Tensor:
    """operand W^T + branch(a) + bias from plain operations, which differentiate any order."""
    y = F.linear(operand, product_weight(layer, a))
    if layer.branch is not None:
        y = y + layer.branch(a.to(layer.master_weight.dtype)).to(a.dtype)
    return y if layer.bias is None else y + layer.bias.to(a.dtype)
