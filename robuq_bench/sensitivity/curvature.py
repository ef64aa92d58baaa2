"""Metrics that weigh the perturbation of a layer's activations by the curvature of a loss.

Both perturb the layer's rotated input a as its quantized product sees it, by Q_b(a) - a: the bits
of an activation change nothing else. The loss is per sample, see `sensitivity.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robuq_bench import seeds
from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.local import local_errors
from robuq_bench.sensitivity.losses import SampleLoss
from robuq_bench.sensitivity.probing import (
    Done,
    OnItem,
    Table,
    activation_error,
    check_request,
    layer_hooks,
    layer_output,
    named_layers,
    product_weight,
    resumable,
    rotated_input,
    undisturbed,
)

#: Rademacher probes per layer and calibration batch.
PROBES = 4


class Curvature(NamedTuple):
    """Hutchinson's estimate of the mean Hessian eigenvalue, and its standard error over probes."""

    mean_eigenvalue: float
    standard_error: float


def fisher(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    loss: SampleLoss,
    done: Done | None = None,
    on_item: OnItem | None = None,
) -> Table:
    """Return the perturbation weighted by squared gradients (diagonal empirical Fisher),

        s_l(b) = mean over samples of  sum_j g_j^2 ( Q_b(a)_j - a_j )^2,   g = d loss / d Q(a),

    j over all entries of the layer's rotated input of a sample. The gradient is taken at the model
    as it is, through the straight-through estimators of the layers behind, as QAT takes it.

    Source: BRECQ (Li et al. 2021, arXiv 2102.05426, equation 10), there at the output of a block;
    here at the operand of the quantized product. One forward and one backward pass in all.

    Args:
        loss: `distillation_loss(teacher)` or `denoising_loss(diffusion)`; others as of
            `epsilon_mse`.
    """

    def compute(names: list[str]) -> Table:
        sums = _fisher_sums(model, names, bit_choices, batches, loss)
        samples = sum(len(batch.t) for batch in batches)
        return {n: {bits: total / samples for bits, total in sums[n].items()} for n in names}

    check_request(model, layers, bit_choices, batches)
    return resumable("Fisher sensitivity", layers, bit_choices, compute, done, on_item)


def _fisher_sums(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    loss: SampleLoss,
) -> Table:
    modules = check_request(model, layers, bit_choices, batches)
    sums = {name: dict.fromkeys(bit_choices, 0.0) for name in layers}
    names: list[str] = []
    inputs: list[Tensor] = []
    probes: list[Tensor] = []

    def hook(name: str, layer: QuantizedLinear, x: Tensor, output: Tensor) -> Tensor:
        names.append(name)
        inputs.append(rotated_input(layer, x.detach()))
        # A zero added to the output carries its gradient, whatever the parameters require.
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            for record in (names, inputs, probes):
                record.clear()
            with layer_hooks(modules, hook):
                total = loss(model, batch).sum()
            gradients = torch.autograd.grad(total, probes, materialize_grads=True)
            for name, a, grad in zip(names, inputs, gradients, strict=True):
                layer = modules[name]
                # dL/dQ(a) = dL/dy W.
                squared = (grad.to(a.dtype) @ product_weight(layer, a)).square()
                for bits in bit_choices:
                    weighted = squared * activation_error(layer, a, bits).square()
                    sums[name][bits] += float(weighted.double().sum())
    return sums


def hessian_trace(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    loss: SampleLoss,
    probes: int = PROBES,
    seed: int = 0,
    done: Done | None = None,
    on_item: OnItem | None = None,
    on_detail: Callable[[str, Curvature], None] | None = None,
) -> Table:
    """Return the perturbation weighted by the mean Hessian eigenvalue,

        s_l(b) = max(0, Tr(H_l) / n_l) * mean over samples of ||Q_b(a) - a||^2,

    H_l the Hessian of a sample's loss with respect to the n_l entries of the layer's rotated
    input, its trace averaged over the samples.

    Source: HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852): the metric Ω, in its form for mixed
    precision of activations, whose Hessian is taken with respect to the activations of one sample
    at a time. A negative trace predicts no harm, hence 0; `on_detail` receives the raw one. See
    `mean_eigenvalue` for the point at which H is taken. Arguments as of `fisher` and there.
    """
    samples = sum(len(batch.t) for batch in batches)

    def compute(names: list[str]) -> Table:
        found = local_errors(model, names, bit_choices, batches)
        table: Table = {}
        for name in names:
            curvature = mean_eigenvalue(model, name, batches, loss=loss, probes=probes, seed=seed)
            if on_detail is not None:
                on_detail(name, curvature)
            weight = max(0.0, curvature.mean_eigenvalue) / samples
            table[name] = {b: weight * error for b, error in found[name].input_error.items()}
        return table

    check_request(model, layers, bit_choices, batches)
    return resumable(
        "Hessian sensitivity", layers, bit_choices, compute, done, on_item, layer_by_layer=True
    )


def mean_eigenvalue(
    model: nn.Module,
    name: str,
    batches: Sequence[ModelInputs],
    *,
    loss: SampleLoss,
    probes: int = PROBES,
    seed: int = 0,
) -> Curvature:
    """Return Tr(H) / n of the loss with respect to one layer's rotated input, by Hutchinson.

    Tr(H) = E z^T H z for Rademacher z (Hutchinson 1990), averaged over samples. The quantizers are
    step functions whose gradient rules have no second derivative, so H is taken with the
    activation quantization of every layer off and the quantized weights held constant; quantizers
    of attention products stay, with their straight-through gradient. Probes are a function of
    seed, layer and batch number alone.

    Raises:
        UsageError: fewer than two probes, which give no standard error, or an unknown layer.
        RobuqError: an estimate that is not finite, or a layer that the model never calls.
    """
    if probes < 2:
        raise UsageError(f"the Hessian trace needs at least 2 probes, got {probes}")
    named_layers(model, [name], batches)
    zeros: list[Tensor] = []

    def hook(called: str, layer: QuantizedLinear, x: Tensor, output: Tensor) -> Tensor:
        a = rotated_input(layer, x)
        operand = a
        if called == name:
            zeros.append(torch.zeros_like(a, requires_grad=True))
            operand = a + zeros[-1]
        return layer_output(layer, a, operand).to(output.dtype)

    estimates = [0.0] * probes
    entries = 0
    with undisturbed(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        layers = quantized_layers(model)
        # The hooks compute the outputs anew; what they replace need not be quantized.
        for layer in layers.values():
            layer.activation_bits = None
        for index, batch in enumerate(batches):
            generator = seeds.generator(f"hessian/{name}", seed, index)
            zeros.clear()
            with layer_hooks(layers, hook):
                total = loss(model, batch).sum()
            if not zeros:
                raise RobuqError(f"the model never calls layer {name!r}; leave it out")
            entries += sum(zero.numel() for zero in zeros)
            gradients = torch.autograd.grad(total, zeros, create_graph=True, materialize_grads=True)
            for probe in range(probes):
                z = [_rademacher(zero, generator) for zero in zeros]
                estimates[probe] += _quadratic_form(gradients, zeros, z)
    # The samples' traces add up in `estimates` as their entries do in `entries`.
    values = torch.tensor(estimates, dtype=torch.float64) / entries
    result = Curvature(float(values.mean()), float(values.std()) / math.sqrt(probes))
    if not math.isfinite(result.mean_eigenvalue):
        raise RobuqError(f"the Hessian trace of layer {name!r} is not finite; the model diverged")
    return result


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * bits - 1).to(like)


def _quadratic_form(
    gradients: Sequence[Tensor], variables: Sequence[Tensor], z: Sequence[Tensor]
) -> float:
    """z^T H z from gradients that carry a graph; 0 where they are constant."""
    pairs = [(g, p) for g, p in zip(gradients, z, strict=True) if g.requires_grad]
    if not pairs:
        return 0.0
    products = torch.autograd.grad(
        [g for g, _ in pairs],
        list(variables),
        [p for _, p in pairs],
        retain_graph=True,
        materialize_grads=True,
    )
    return sum(float((p * h).double().sum()) for p, h in zip(z, products, strict=True))
