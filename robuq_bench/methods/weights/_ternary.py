"""What the ternary methods share: codes and scale, and fake quantization for training."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kernels import cpu_library
from kernels.plain import is_plain
from robuq_bench.methods import WeightMethod, method_class, method_names
from robuq_bench.methods.base import SCALE_BITS
from robuq_bench.methods.weights._codes import Codes, working

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site

TERNARY_BITS = math.log2(3)


class TernaryMethod(WeightMethod):
    """Base of the ternary rules, which are computed from the weight in every pass.

    Subclasses give `codes_and_scale`; `clamps` says whether the straight-through gradient is
    clamped element-wise to [-1, 1], and `scale_per_row` whether each output channel has a scale.
    """

    clamps: ClassVar[bool] = False
    scale_per_row: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def codes_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (as floats) and scale of a weight [out, in], float32 or float64."""

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """Nothing to fit: the rule reads the weight as it is trained."""
        return TernaryWeight(type(self), self.method)

    def nominal_bits(self) -> float:
        """log2(3)."""
        return TERNARY_BITS

    def storage_bits(self, out_features: int, in_features: int) -> float:
        """Codes at log2(3) bits, and a scale per row or tensor."""
        scales = out_features if self.scale_per_row else 1
        return TERNARY_BITS * out_features * in_features + SCALE_BITS * scales


class TernaryWeight(nn.Module):
    """Fills the slot `weight` with a ternary rule; the fast paths know it by `rule`.

    Attributes:
        clamps_in_backward: whether a clamp that the rule asks for acts inside the backward pass;
            False leaves it to `clamp_gradients_`.
    """

    def __init__(self, method: type[TernaryMethod], rule: str) -> None:
        super().__init__()
        self.method, self.rule = method, rule
        self.clamps_in_backward = True

    def forward(
        self, weight: Tensor, dtype: torch.dtype | None = None, up: Tensor | None = None
    ) -> Tensor:
        """Differentiable `codes(weight).dequantize()` in `dtype`, by default the weight's.

        Args:
            weight: [out, in].
            dtype: of the result.
            up: [out, r] to stand to the right of it.
        """
        dtype = dtype or weight.dtype
        clamp = self.clamps_in_backward and self.method.clamps
        if self.is_compiled(work := working(weight)):
            from kernels.ternary_weight import cpu

            up = None if up is None else up.to(work.dtype)
            return cpu.ternary_weight(work, self.rule, up=up, clamp=clamp).to(dtype)
        if torch.compiler.is_compiling():
            result = _compiled_ternary(weight, self.rule, dtype, clamp)
        else:
            rule = self.method.codes_and_scale
            result = _TernaryFakeQuantize.apply(weight, rule, dtype, clamp)
        return beside(result, up)

    def is_compiled(self, weight: Tensor) -> bool:
        """Whether a compiled CPU kernel serves the rule and the weight."""
        if not is_plain(weight) or not cpu_library.is_usable():
            return False
        from kernels.ternary_weight import cpu

        is_ours = self.rule in method_names("weight") and self.method is method_class(
            "weight", self.rule
        )
        return is_ours and cpu.takes(weight, self.rule)

    def codes(self, weight: Tensor) -> Codes:
        """Codes in {-1, 0, 1} and scale [out, 1] or [1, 1]."""
        weight = working(weight.detach())
        if self.is_compiled(weight):
            from kernels.ternary_weight import cpu

            return Codes(*cpu.ternary_codes(weight, self.rule))
        codes, scale = self.method.codes_and_scale(weight)
        return Codes(codes.to(torch.int8), scale)

    def extra_repr(self) -> str:
        return self.rule


def beside(weight: Tensor, up: Tensor | None) -> Tensor:
    """[weight | up], [out, in + r] in the dtype of the weight; the weight where `up` is None."""
    return weight if up is None else torch.cat([weight, up.to(weight.dtype)], 1)


class _TernaryFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        rule: Callable[[Tensor], tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        clamp: bool,
    ) -> Tensor:
        ctx.dtype, ctx.clamp = weight.dtype, clamp
        codes, scale = rule(working(weight))
        return codes.mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.to(ctx.dtype)
        return (grad.clamp(-1, 1) if ctx.clamp else grad), None, None, None


# An operator that `torch.compile` leaves whole: torch 2.11 traces the function above to a gradient
# of zero.


@torch.library.custom_op("robuq_bench::fake_quantize_weight", mutates_args=())
def _compiled_ternary(weight: Tensor, rule: str, dtype: torch.dtype, clamp: bool) -> Tensor:
    method: Any = method_class("weight", rule)
    result: Tensor = _TernaryFakeQuantize.apply(weight, method.codes_and_scale, dtype, clamp)
    return result


@_compiled_ternary.register_fake
def _(weight: Tensor, rule: str, dtype: torch.dtype, clamp: bool) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _remember_rule(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.clamp = inputs[0].dtype, inputs[3]


def _ternary_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    grad = grad.to(ctx.dtype)
    return (grad.clamp(-1, 1) if ctx.clamp else grad), None, None, None


torch.library.register_autograd(
    "robuq_bench::fake_quantize_weight", _ternary_gradient, setup_context=_remember_rule
)
