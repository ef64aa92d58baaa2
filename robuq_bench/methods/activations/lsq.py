"""LSQ: static symmetric quantization with a step that is trained with the model.

Source: Esser et al., "Learned Step Size Quantization" (ICLR 2020). With v = x/s, Q_n = 2^(b-1) and
Q_p = 2^(b-1) - 1,

    x̂ = s round(clamp(v, -Q_n, Q_p)),    s starts at 2 mean|x| / sqrt(Q_p)

over the calibration tokens, one s per tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError
from robuq_bench.methods._observed import finite
from robuq_bench.methods.activations._uniform import ActivationModule, working
from robuq_bench.methods.base import ActivationMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class LearnedStep(ActivationMethod):
    """LSQ with the signed grid, whose step is learned for the bits that the plan gives.

    One bit is refused: Q_p would be 0.
    """

    needs = frozenset({"tokens"})
    min_bits: ClassVar[int] = 2
    bits_are_fitted: ClassVar[bool] = True

    def scales_per_token(self, in_features: int) -> float:
        """None: the step is the layer's."""
        return 0.0

    def fit(self, weight: Tensor, site: Site) -> LearnedStepQuantizer:
        """The quantizer at its starting step; a layer that saw only zeros starts at 1.

        Raises:
            UsageError: no tokens, or some that are not finite.
        """
        magnitude = float(finite(site, "tokens").double().abs().mean())
        step = 2 * magnitude / math.sqrt(2 ** (self.bits - 1) - 1) or 1.0
        return LearnedStepQuantizer(self, weight.new_tensor(step), site.name)


class LearnedStepQuantizer(ActivationModule):
    """x [..., in] to x̂, same shape and dtype; half precision is computed in float32.

    Parameter `step` []. Gradients, from g at x̂: x gets g where -Q_n <= v <= Q_p and 0 elsewhere; s
    gets Σ g (round(v) - v) inside, g times -Q_n or Q_p outside, all times 1 / sqrt(N Q_p) with N
    the features of a token, in. An infinite entry saturates; NaN stays NaN and makes the gradient
    of the step NaN. A step that training drives below 0 counts by its size, one of exactly 0 as
    the smallest positive number.
    """

    method: LearnedStep

    def __init__(self, method: LearnedStep, step: Tensor, name: str) -> None:
        super().__init__(method)
        self.name = name
        self.step = nn.Parameter(step)

    def check_bits(self, bits: int) -> None:
        """Raise ConfigError at other bits than the step is learned for."""
        if isinstance(bits, bool) or bits != self.method.bits:
            raise ConfigError(
                f"layer {self.name!r}: its {self.method.method!r} activation step is learned for "
                f"{self.method.bits} bits and cannot serve {bits!r}; give the layer a rule with "
                f"bits = {bits!r} and quantize anew, or use a method that takes any bits"
            )

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantize x; ConfigError at other bits than the fitted ones."""
        self.check_bits(bits)
        tokens = working(x)
        top = 2 ** (bits - 1) - 1
        share = 1 / math.sqrt(x.shape[-1] * top)
        step = self.step.to(tokens.dtype)
        # Scales the gradient alone: what is added is 0.
        step = step.detach() + (step - step.detach()) * share
        step = step.abs().clamp_min(torch.finfo(step.dtype).tiny)
        # Clamped before the division, so that an infinite v has no part in the step's gradient.
        v = torch.clamp(tokens, -(top + 1) * step, top * step) / step
        # Exact: round(v) - v is a float, as its terms lie within a factor of 2 or round(v) is 0.
        codes = v + (v.round() - v).detach()
        return (codes * step).to(x.dtype)
