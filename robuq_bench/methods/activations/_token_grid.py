"""Per-token grids: integer codes, and fake quantization for training.

A token is the last axis, or the axis given as `dim`. Every grid maps a token to int8 codes c
in [-2^(b-1), 2^(b-1) - 1] and back to `scale * level(c) + offset`, one scale and one offset per
token; `level` is the identity except for Lloyd-Max, where it is a codebook. Fake quantization runs
the very same floating-point operations, so it equals `dequantize(quantize(x))` bit for bit.

Corner cases, all grids:
- constant, all-zero and one-element tokens come back as the constant;
- a token with an infinite entry, or whose statistics overflow, is quantized with mean 0 and unit
  scale: the infinite entry saturates at the outermost level and the statistics pass no gradient;
- NaN stays NaN in fake quantization, and `quantize` refuses it because a code cannot carry it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError, RobuqError
from robuq_bench.methods import ActivationMethod, method_class, method_names

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class QuantizedActivation(NamedTuple):
    """int8 `codes` like the input; `scale`, `offset` of size 1 along the token's axis; `bits`."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int


class Normalised(NamedTuple):
    """Tokens in grid units, t = (x - shift) * inverse, and what maps codes back.

    `inverse` is 1/scale, or 0 for scale 0. `dead` marks tokens whose statistics are infinite.
    """

    t: Tensor
    scale: Tensor
    inverse: Tensor
    offset: Tensor
    shift: Tensor
    dead: Tensor


class TokenGrid(ABC):
    """Base of the grids. Subclasses give the normalisation and, if not uniform, the levels.

    Gradient of this base class: identity (straight-through, also outside the clip), as in BitNet;
    `needs_state` says that `input_gradient` reads the normalised tokens.
    """

    name: ClassVar[str]
    min_bits: ClassVar[int] = 1
    max_bits: ClassVar[int] = 8
    needs_state: ClassVar[bool] = False

    def check_bits(self, bits: int) -> None:
        """Raise ConfigError unless this quantizer is defined at `bits`."""
        if isinstance(bits, bool) or not self.min_bits <= bits <= self.max_bits:
            raise ConfigError(
                f"activation method {self.name!r} takes {self.min_bits} to {self.max_bits} "
                f"bits, got {bits!r}"
            )

    @abstractmethod
    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        """Statistics and normalised values of the tokens along `dim` (float32 or float64).

        `out` receives `t` and may be x itself; `scratch` is overwritten. Both only save memory.
        """

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        """Integer codes (as floats) of grid coordinates."""
        return torch.clamp(t, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, out=out).round_()

    def levels_(self, codes: Tensor, bits: int) -> Tensor:
        """Overwrite integer codes by their levels, in units of the scale."""
        return codes

    def values(self, state: Normalised, bits: int, out: Tensor | None = None) -> Tensor:
        """Fake-quantized values of normalised tokens."""
        codes = self.encode(state.t, bits, out)
        levels = self.levels_(codes, bits)
        # Fused multiply-add, one rounding; `dequantize` runs the same operation.
        return torch.addcmul(state.offset, levels, state.scale, out=levels)

    def input_gradient(
        self,
        grad: Tensor,
        values: Tensor,
        state: Normalised,
        bits: int,
        dim: int = -1,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Gradient at x from the gradient at the fake-quantized `values`; may be `grad` itself.

        `scratch` is overwritten with intermediate results; it may be `grad`.
        """
        return grad

    def quantize(self, x: Tensor, bits: int) -> QuantizedActivation:
        """Integer codes of x [..., n]; computed in float32, or float64 for float64 input.

        Raises:
            ConfigError: the quantizer is not defined at `bits`.
            RobuqError: x contains NaN.
        """
        self.check_bits(bits)
        state = self.normalise(working(x.detach()), bits)
        if bool(state.t.isnan().any()):
            raise RobuqError("cannot quantize activations that contain NaN; find where they arise")
        codes = self.encode(state.t, bits).to(torch.int8)
        return QuantizedActivation(codes, state.scale, state.offset, bits)

    def dequantize(self, quantized: QuantizedActivation) -> Tensor:
        """`scale * level(codes) + offset`, [..., n] in the dtype of the scale."""
        codes = quantized.codes.to(quantized.scale.dtype)
        levels = self.levels_(codes, quantized.bits)
        return torch.addcmul(quantized.offset, levels, quantized.scale)

    def fake_quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Differentiable `dequantize(quantize(x, bits))` in the dtype of x [..., n]."""
        if torch.compiler.is_compiling():
            held = bits if isinstance(bits, Tensor) else torch.tensor(bits)
            return _compiled_fake_quantize(x, self.name, held)
        self.check_bits(int(bits) if isinstance(bits, Tensor) else bits)
        result: Tensor = _FakeQuantize.apply(x, self, int(bits))
        return result


def working(x: Tensor) -> Tensor:
    """Statistics of half-precision tokens are taken in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: TokenGrid, bits: int) -> Tensor:
        state = quantizer.normalise(working(x), bits)
        ctx.quantizer, ctx.bits = quantizer, bits
        if not quantizer.needs_state:
            return quantizer.values(state, bits, out=state.t).to(x.dtype)
        values = quantizer.values(state, bits)
        ctx.save_for_backward(values, *state)
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.quantizer.needs_state:
            return grad, None, None
        values, *state = ctx.saved_tensors
        upstream = grad.to(values.dtype)
        result = ctx.quantizer.input_gradient(upstream, values, Normalised(*state), ctx.bits)
        return result.to(grad.dtype), None, None


def reciprocal(scale: Tensor) -> Tensor:
    """1/scale with 1/0 = 0, so that a constant token sits on code 0 of a grid of scale 0."""
    return scale.reciprocal().nan_to_num_(posinf=0.0)


class GridMethod(ActivationMethod):
    """A plan's choice of a `TokenGrid`, which has no parameters but the bits."""

    grid: ClassVar[TokenGrid]

    def check_bits(self, bits: int) -> None:
        """As the grid says."""
        self.grid.check_bits(bits)

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """Nothing to fit: every token brings its own statistics.

        Raises:
            ConfigError: the grid has the name of another, by which compiled graphs would find that.
        """
        name = self.grid.name
        if name in method_names("activation") and token_grid(name) is not self.grid:
            raise ConfigError(
                f"activation method {self.method!r}: its grid {type(self.grid).__name__} is called "
                f"{name!r}, which is another method's; give it a `name` of its own"
            )
        return GridQuantizer(self.grid)

    def scales_per_token(self, in_features: int) -> float:
        """A scale and an offset."""
        return 2


class GridQuantizer(nn.Module):
    """Fills the slot `activation` with a grid; the fast paths know it by `grid`."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantized tokens like x [..., n]; `bits` is a tensor in a compiled graph."""
        return self.grid.fake_quantize(x, bits)

    def codes(self, x: Tensor, bits: int) -> QuantizedActivation:
        """Integer codes of x [..., n]."""
        return self.grid.quantize(x, bits)

    def check_bits(self, bits: int) -> None:
        """Raise ConfigError unless the grid is defined at `bits`."""
        self.grid.check_bits(bits)

    def extra_repr(self) -> str:
        return self.grid.name


def token_grid(name: str) -> TokenGrid:
    """The grid of the activation method `name`; ConfigError for one that is no such grid."""
    found = method_class("activation", name)
    if not issubclass(found, GridMethod):
        raise ConfigError(f"activation method {name!r} is not a grid of one scale per token")
    return found.grid


# Operators that `torch.compile` leaves whole: torch 2.11 traces `_FakeQuantize` to a gradient of
# zero. Bits are a tensor of one element on the CPU, so that a new allocation is no new graph.


@torch.library.custom_op("robuq_bench::fake_quantize_tokens", mutates_args=())
def _compiled_fake_quantize(x: Tensor, grid: str, bits: Tensor) -> Tensor:
    return token_grid(grid).fake_quantize(x, int(bits))


@torch.library.custom_op("robuq_bench::fake_quantize_tokens_backward", mutates_args=())
def _compiled_backward(grad: Tensor, x: Tensor, grid: str, bits: Tensor) -> Tensor:
    with torch.enable_grad():
        tokens = x.detach().requires_grad_()
        values = token_grid(grid).fake_quantize(tokens, int(bits))
    (result,) = torch.autograd.grad(values, tokens, grad)
    return result.clone()  # an operator may not return its input, as the identity does


@_compiled_fake_quantize.register_fake
def _(x: Tensor, grid: str, bits: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_compiled_backward.register_fake
def _(grad: Tensor, x: Tensor, grid: str, bits: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _remember_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.grid, bits = inputs
    ctx.save_for_backward(x, bits)


def _tokens_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    x, bits = ctx.saved_tensors
    return _compiled_backward(grad, x, ctx.grid, bits), None, None


torch.library.register_autograd(
    "robuq_bench::fake_quantize_tokens", _tokens_gradient, setup_context=_remember_tokens
)
