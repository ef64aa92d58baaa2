"""HIGGS: a layer's end-to-end error per relative perturbation, times the perturbation of its bits.

Source: Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem" (NAACL 2025, arXiv 2411.17525): the loss grows by sum_l alpha_l t_l^2, t_l the
relative error of layer l, and alpha_l is calibrated by Gaussian noise on one layer at a time. The
paper perturbs weights and reads perplexity; activation bits perturb activations, and the error is
that of the noise prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench import seeds
from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.local import local_errors
from robuq_bench.sensitivity.prefix import Prefix
from robuq_bench.sensitivity.probing import (
    Done,
    OnItem,
    Table,
    check_request,
    layer_hooks,
    named_layers,
    predict,
    product_weight,
    resumable,
    rotated_input,
    squared_sum,
    undisturbed,
)

#: Relative noise t; the quantizers' own t is about 0.1, 0.2, 0.35, 0.6 at 4, 3, 2, 1 bits.
NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class LinearFit:
    """Through-origin fit error = alpha * t^2 over the noise levels of one layer.

    Attributes:
        alpha: least-squares slope, sum t^2 e / sum t^4.
        r_squared: 1 - residual / total sum of squares about the mean; 1 if all errors are 0.
        relative: measured t^2 at each level.
        errors: mean squared change of the noise prediction at each level.
    """

    alpha: float
    r_squared: float
    relative: tuple[float, ...]
    errors: tuple[float, ...]


def fit_through_origin(relative: Sequence[float], errors: Sequence[float]) -> LinearFit:
    """Fit errors = alpha * relative; UsageError unless two of `relative` differ."""
    if len(relative) != len(errors) or len(set(relative)) < 2:
        raise UsageError("a linear fit needs as many errors as levels, and two different levels")
    x = torch.tensor(relative, dtype=torch.float64)
    e = torch.tensor(errors, dtype=torch.float64)
    alpha = (x @ e) / (x @ x)
    residual = (e - alpha * x).square().sum()
    total = (e - e.mean()).square().sum()
    r_squared = 1 - float(residual / total) if total > 0 else float(residual == 0)
    return LinearFit(float(alpha), r_squared, tuple(relative), tuple(errors))


@contextmanager
def unquantized_inputs(model: nn.Module) -> Iterator[None]:
    """The model around which HIGGS is linear: no layer's activations are quantized, no gradient."""
    with undisturbed(model), torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.activation_bits = None
        yield


def linearity(
    model: nn.Module,
    name: str,
    batches: Sequence[ModelInputs],
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    seed: int = 0,
    prefix: Prefix | None = None,
) -> LinearFit:
    """Fit one layer's linearity coefficient.

    The operand of the layer's quantized product becomes a + t ||a|| z / sqrt(n) for each token
    a [n] with Gaussian z, the same z at every level; the error is the mean squared change of the
    noise prediction. As in the paper the model around which this is linear is the unquantized one:
    no layer's activations are quantized, the weights are as they are. Quantizers behind the layer
    would answer the smallest noise with flipped codes, an error that does not vanish with t.

    With `prefix`, made within `unquantized_inputs` for these batches, passes begin at the layer's
    block.

    Raises:
        UsageError: an unknown layer, or levels that are not positive and different.
        RobuqError: a prediction that is not finite, or inputs of the layer that are all zero.
    """
    if any(level <= 0 for level in noise_levels) or len(set(noise_levels)) < 2:
        raise UsageError(f"HIGGS needs two different positive noise levels, got {noise_levels}")
    layer = named_layers(model, [name], batches)[name]
    change = [0.0] * len(noise_levels)
    noise_energy = energy = 0.0
    generators = [seeds.generator(f"higgs/{name}", seed, index) for index in range(len(batches))]
    shifts: list[list[Tensor]] = []
    references: list[Tensor] = []

    def draw(called: str, module: QuantizedLinear, x: Tensor, output: Tensor) -> None:
        nonlocal noise_energy, energy
        del called
        a = rotated_input(module, x)
        z = torch.randn(a.shape, generator=generators[len(references)]).to(a)
        noise = z * (a.norm(dim=-1, keepdim=True) / a.shape[-1] ** 0.5)
        noise_energy += squared_sum(noise)
        energy += squared_sum(a)
        shifts[-1].append(F.linear(noise, product_weight(module, a)).to(output.dtype))

    def begin_at_layer() -> AbstractContextManager[None]:
        return nullcontext() if prefix is None else prefix.reused(name)

    with unquantized_inputs(model):
        with begin_at_layer(), layer_hooks({name: layer}, draw):
            for batch in batches:
                shifts.append([])
                references.append(predict(model, batch))
        for position, level in enumerate(noise_levels):
            with begin_at_layer():
                for batch, shift, reference in zip(batches, shifts, references, strict=True):
                    with layer_hooks({name: layer}, _shifted(shift, level)):
                        change[position] += squared_sum(predict(model, batch) - reference)
    elements = sum(reference.numel() for reference in references)
    if not all(torch.tensor([*change, energy]).isfinite()):
        raise RobuqError(f"the noise prediction is not finite with noise on layer {name!r}")
    if energy == 0.0:
        raise RobuqError(f"the inputs of layer {name!r} are all zero; no relative noise exists")
    relative = [level**2 * noise_energy / energy for level in noise_levels]
    return fit_through_origin(relative, [total / elements for total in change])


def _shifted(
    shift: Sequence[Tensor], level: float
) -> Callable[[str, QuantizedLinear, Tensor, Tensor], Tensor]:
    """A hook that adds `level` times the shifts to the layer's calls, in their order."""
    remaining = iter(shift)
    return lambda name, module, x, output: output + level * next(remaining)


def higgs(
    model: nn.Module,
    layers: Sequence[str],
    bit_choices: Sequence[int],
    batches: Sequence[ModelInputs],
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    seed: int = 0,
    done: Done | None = None,
    on_item: OnItem | None = None,
    on_detail: Callable[[str, LinearFit], None] | None = None,
) -> Table:
    """Return HIGGS' predicted error of each layer and bit width,

        s_l(b) = alpha_l * t_l(b)^2,   t_l(b)^2 = ||Q_b(a) - a||^2 / ||a||^2,

    with alpha_l of `linearity` and a the layer's rotated input over the calibration set. Source:
    the module's. `on_detail` receives each layer's fit with its R^2; other arguments as of
    `epsilon_mse` and `linearity`.
    """

    prefix: Prefix | None = None

    def compute(names: list[str]) -> Table:
        nonlocal prefix
        if prefix is None:
            with unquantized_inputs(model):
                prefix = Prefix(model, modules, batches)
        found = local_errors(model, names, bit_choices, batches)
        table: Table = {}
        for name in names:
            fit = linearity(
                model, name, batches, noise_levels=noise_levels, seed=seed, prefix=prefix
            )
            if on_detail is not None:
                on_detail(name, fit)
            sums = found[name]
            table[name] = {b: fit.alpha * sums.relative_error(b) for b in bit_choices}
        return table

    modules = check_request(model, layers, bit_choices, batches)
    return resumable(
        "HIGGS sensitivity", layers, bit_choices, compute, done, on_item, layer_by_layer=True
    )
