"""Metrics of one layer's own error, which no other layer and no loss enters.

Every layer and bit width is read off one pass of the model as it is: the quantized product is
linear, so Q_b(a) for another b needs no second pass. Full precision means the activations of this
layer alone; what reaches it comes through the other layers as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import RobuqError
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.probing import (
    Done,
    OnItem,
    Table,
    activation_error,
    check_request,
    layer_hooks,
    layer_output,
    product_weight,
    resumable,
    rotated_input,
    run_model,
    squared_sum,
    undisturbed,
)


@dataclass
class LocalErrors:
    """Sums of squares over a calibration set, of one layer.

    Attributes:
        input_energy: ||a||^2 of the rotated inputs.
        output_energy: ||y||^2 of the output with full-precision activations.
        output_elements: entries of y.
        output_sum: sum of y over tokens, [out] float64.
        input_error: ||Q_b(a) - a||^2 by bits.
        output_error: ||(Q_b(a) - a) W^T||^2 by bits.
    """

    input_energy: float = 0.0
    output_energy: float = 0.0
    output_elements: int = 0
    output_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    input_error: dict[int, float] = field(default_factory=dict)
    output_error: dict[int, float] = field(default_factory=dict)

    def relative_error(self, bits: int) -> float:
        """t^2 = ||Q_b(a) - a||^2 / ||a||^2; 0 for a layer whose inputs are all zero."""
        return _ratio(self.input_error[bits], self.input_energy)

    def varying_error(self, bits: int) -> float:
        """||(Q_b(a) - a) W^T||^2 / ||y - E y||^2, E the mean over tokens.

        Error beside the part of the output that tells tokens apart: one vector that all of them
        share, often most of the energy, is left out.
        """
        tokens = self.output_elements / self.output_sum.numel()
        constant = float(self.output_sum.square().sum()) / tokens
        return _ratio(self.output_error[bits], max(self.output_energy - constant, 0.0))


def _ratio(noise: float, signal: float) -> float:
    """Noise to signal: 0 without noise, infinite where only the signal is 0."""
    if noise == 0.0:
        return 0.0
    return noise / signal if signal != 0.0 else float("inf")


def local_errors(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
) -> dict[str, LocalErrors]:
    """Return the error sums of every layer from one pass over the calibration set.

    Raises:
        UsageError: an unknown layer, or nothing to measure.
        RobuqError: a layer that the model never calls.
    """
    modules = check_request(model, layers, bit_choices, batches)
    zeros = dict.fromkeys(bit_choices, 0.0)
    errors = {n: LocalErrors(input_error={**zeros}, output_error={**zeros}) for n in layers}

    def hook(name: str, layer: QuantizedLinear, x: Tensor, output: Tensor) -> None:
        del output
        a = rotated_input(layer, x)
        weight, sums = product_weight(layer, a), errors[name]
        y = layer_output(layer, a, a)
        sums.input_energy += squared_sum(a)
        sums.output_energy += squared_sum(y)
        sums.output_elements += y.numel()
        sums.output_sum = sums.output_sum + y.flatten(0, -2).double().sum(0).cpu()
        for bits in bit_choices:
            error = activation_error(layer, a, bits)
            sums.input_error[bits] += squared_sum(error)
            sums.output_error[bits] += squared_sum(F.linear(error, weight))

    with undisturbed(model), torch.no_grad(), layer_hooks(modules, hook):
        for batch in batches:
            run_model(model, batch)
    for name, sums in errors.items():
        if sums.output_elements == 0:
            raise RobuqError(f"the model never calls layer {name!r}; leave it out of the metrics")
    return errors


def output_mse(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """Return the mean squared error of each layer's own output,

        s_l(b) = mean over samples and entries of ( y_l(b) - y_l(full precision) )^2.

    Source: the layer-wise objective of post-training quantization, AdaRound (Nagel et al. 2020,
    arXiv 2004.10568), here for activations. Arguments as of `epsilon_mse`.
    """

    def compute(names: list[str]) -> Table:
        found = local_errors(model, names, bit_choices, batches)
        return {name: _mean_errors(sums) for name, sums in found.items()}

    check_request(model, layers, bit_choices, batches)
    return resumable("output MSE", layers, bit_choices, compute, done, on_item)


def _mean_errors(sums: LocalErrors) -> dict[int, float]:
    return {bits: error / sums.output_elements for bits, error in sums.output_error.items()}


def output_nsr(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """Return the noise-to-signal ratio of each layer's own output,

        s_l(b) = sum ( y_l(b) - y_l(full precision) )^2 / sum y_l(full precision)^2
               = 10^(-SQNR / 10) with the SQNR in dB.

    Source: Lin et al., "Fixed Point Quantization of Deep Convolutional Networks" (ICML 2016,
    arXiv 1511.06393), which allocates bits by the SQNR of the layers. The signal
    includes low-rank branch and bias. Arguments as of `epsilon_mse`.
    """

    def compute(names: list[str]) -> Table:
        found = local_errors(model, names, bit_choices, batches)
        return {name: _noise_ratios(sums) for name, sums in found.items()}

    check_request(model, layers, bit_choices, batches)
    return resumable("noise-to-signal ratio", layers, bit_choices, compute, done, on_item)


def _noise_ratios(sums: LocalErrors) -> dict[int, float]:
    noise: Mapping[int, float] = sums.output_error
    return {bits: _ratio(value, sums.output_energy) for bits, value in noise.items()}
