"""Per-token activation quantizers: integer codes, and fake quantization for training.

A token is the last axis, or the axis given as `dim`. Every quantizer maps a token to int8 codes c
in [-2^(b-1), 2^(b-1) - 1] and back to `scale * level(c) + offset`, one scale and one offset per
token; `level` is the identity except for Lloyd-Max, where it is a codebook. Fake quantization runs
the very same floating-point operations, so it equals `dequantize(quantize(x))` bit for bit.

Corner cases, all quantizers:
- constant, all-zero and one-element tokens come back as the constant;
- a token with an infinite entry, or whose statistics overflow, is quantized with mean 0 and unit
  scale: the infinite entry saturates at the outermost level and the statistics pass no gradient;
- NaN stays NaN in fake quantization, and `quantize` refuses it because a code cannot carry it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from robuq_bench.errors import ConfigError, RobuqError, suggest
from robuq_bench.quantization.lloyd_max import lloyd_max_codebook

#: Steps Δ_b of the RobustQuantizer in units of σ̂ for bits 2 to 8: the optimal uniform mid-rise
#: steps of N(0, 1) (Max 1960), as in the public RobuQ deployment fork.
ROBUST_STEPS = (0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)
#: E|x| of N(0, 1), the optimal level of one bit in units of σ̂: the levels are μ ± mean|x - μ|.
ONE_BIT_LEVEL = math.sqrt(2 / math.pi)
#: σ of a Gaussian is its mean absolute deviation times this.
MAD_TO_SIGMA = math.sqrt(math.pi / 2)
#: Added to the denominator by BitNet so that an all-zero token has codes 0.
BITNET_EPS = 1e-5


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


class ActivationQuantizer(ABC):
    """Base of the quantizers. Subclasses give the normalisation and, if not uniform, the levels.

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
                f"activations.quantizer {self.name!r} takes {self.min_bits} to {self.max_bits} "
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
        state = self.normalise(_working(x.detach()), bits)
        if bool(state.t.isnan().any()):
            raise RobuqError("cannot quantize activations that contain NaN; find where they arise")
        codes = self.encode(state.t, bits).to(torch.int8)
        return QuantizedActivation(codes, state.scale, state.offset, bits)

    def dequantize(self, quantized: QuantizedActivation) -> Tensor:
        """`scale * level(codes) + offset`, [..., n] in the dtype of the scale."""
        codes = quantized.codes.to(quantized.scale.dtype)
        levels = self.levels_(codes, quantized.bits)
        return torch.addcmul(quantized.offset, levels, quantized.scale)

    def fake_quantize(self, x: Tensor, bits: int) -> Tensor:
        """Differentiable `dequantize(quantize(x, bits))` in the dtype of x [..., n]."""
        self.check_bits(bits)
        if torch.compiler.is_compiling():
            from robuq_bench.quantization import compiled

            return compiled.fake_quantize_tokens(x, self.name, torch.tensor(bits))
        result: Tensor = _FakeQuantize.apply(x, self, bits)
        return result


def _working(x: Tensor) -> Tensor:
    """Statistics of half-precision tokens are taken in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: ActivationQuantizer, bits: int) -> Tensor:
        state = quantizer.normalise(_working(x), bits)
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


class RobustQuantizer(ActivationQuantizer):
    """RobuQ's quantizer: per-token mean μ and σ̂ = sqrt(pi/2) mean|x - μ|, fixed Gaussian grid.

    Source: RobuQ (arXiv 2509.23582) as coded in its public deployment fork. Straight-through
    rounding sits inside the normalisation, so with y = (x - μ)/σ̂, q its level and m = 1 inside
    the clip: d x̂ = (1 - m) dμ + m dx + (q - m y) dσ̂.
    """

    needs_state = True

    def step(self, bits: int) -> float:
        """Grid step in units of σ̂."""
        return 2 * ONE_BIT_LEVEL if bits == 1 else ROBUST_STEPS[bits - 2]

    @abstractmethod
    def clip_range(self, bits: int) -> tuple[float, float]:
        """Range of t outside of which no gradient passes directly."""

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Value of code 0."""
        return mean

    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        mean = x.mean(dim, keepdim=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        t = torch.sub(x, mean, out=out)
        magnitude = torch.abs(t, out=scratch)
        scale = magnitude.mean(dim, keepdim=True).mul_(self.step(bits) * MAD_TO_SIGMA)
        dead = scale == math.inf
        scale = scale.nan_to_num_(nan=1.0, posinf=1.0)
        inverse = _reciprocal(scale)
        t.mul_(inverse)
        return Normalised(t, scale, inverse, self.offset(mean, scale, bits), mean, dead)

    def input_gradient(
        self,
        grad: Tensor,
        values: Tensor,
        state: Normalised,
        bits: int,
        dim: int = -1,
        scratch: Tensor | None = None,
    ) -> Tensor:
        t, _, inverse, _, mean, dead = state
        low, high = self.clip_range(bits)
        # One vectorised pass; boolean masks are several times slower on CPU.
        passed = torch.ops.aten.hardtanh_backward(grad, t, low, high)
        grad_sum = grad.sum(dim, keepdim=True)
        grad_mean = grad_sum - passed.sum(dim, keepdim=True)
        work = torch.mul(grad, values, out=scratch)
        grad_scale = work.sum(dim, keepdim=True).sub_(mean * grad_sum).mul_(inverse)
        work = torch.mul(passed, t, out=work)
        grad_scale.sub_(work.sum(dim, keepdim=True)).masked_fill_(dead, 0.0)
        grad_mean.masked_fill_(dead, 0.0)
        # d scale / d x_j = step sqrt(pi/2) / n (sign_j - mean sign); d mean / d x_j = 1 / n.
        n = t.shape[dim]
        slope = grad_scale.mul_(self.step(bits) * MAD_TO_SIGMA / n)
        sign = torch.sign(t, out=work)
        constant = grad_mean.mul_(1 / n).sub_(sign.mean(dim, keepdim=True).mul_(slope))
        return passed.addcmul_(sign, slope).add_(constant)


def _reciprocal(scale: Tensor) -> Tensor:
    """1/scale with 1/0 = 0, so that a constant token sits on code 0 of a grid of scale 0."""
    return scale.reciprocal().nan_to_num_(posinf=0.0)


class RobustMidrise(RobustQuantizer):
    """Levels ±Δ/2, ±3Δ/2, ...: the grid for which the steps Δ_b are optimal."""

    name = "robust-midrise"

    def clip_range(self, bits: int) -> tuple[float, float]:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1)

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        return mean + scale / 2

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        return torch.floor(t, out=out).clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class RobustMidtread(RobustMidrise):
    """Levels 0, ±Δ, ... with one extra negative level, as the deployment fork rounds.

    One bit has no level at 0: μ ± sqrt(2/pi) σ̂, the same as mid-rise.
    """

    name = "robust-midtread"

    def clip_range(self, bits: int) -> tuple[float, float]:
        low, high = super().clip_range(bits)
        return (low, high) if bits == 1 else (low - 0.5, high - 0.5)

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        return super().offset(mean, scale, bits) if bits == 1 else mean

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        if bits == 1:
            return super().encode(t, bits, out)
        return ActivationQuantizer.encode(self, t, bits, out)


class LloydMax(RobustQuantizer):
    """Minimum-MSE non-uniform levels of N(0, 1), normalised as RobuQ's quantizer.

    Gradient passes up to as far beyond the outermost level as its threshold lies inside it, which
    is the half step of the uniform mid-rise grid.
    """

    name = "lloyd-max"

    def step(self, bits: int) -> float:
        return 1.0

    def clip_range(self, bits: int) -> tuple[float, float]:
        levels, thresholds = lloyd_max_codebook(bits)
        reach = float(2 * levels[-1] - thresholds[-1])
        return -reach, reach

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        _, thresholds = _codebook(bits, t.dtype, t.device)
        # right=True counts thresholds <= t. NaN sorts last, so it is added back.
        index = torch.bucketize(t, thresholds, out_int32=True, right=True)
        nan = torch.where(t.isnan(), t, -(2.0 ** (bits - 1)))
        return torch.add(index, nan, out=out)

    def levels_(self, codes: Tensor, bits: int) -> Tensor:
        levels, _ = _codebook(bits, codes.dtype, codes.device)
        index = codes.nan_to_num(nan=0.0).to(torch.int32) + 2 ** (bits - 1)
        return codes.copy_(torch.where(codes.isnan(), codes, levels[index]))


@functools.cache
def _codebook(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    codebook = lloyd_max_codebook(bits)
    with torch.inference_mode(False):
        levels, thresholds = (torch.from_numpy(a).to(device, dtype) for a in codebook)
    return levels, thresholds


class MinMax(ActivationQuantizer):
    """Asymmetric per-token min-max: x̂ = min + Δ round((x - min)/Δ), Δ = (max - min)/(2^b - 1).

    Nothing is clipped; the gradient is the identity and the range is a constant (LLM-QAT style).
    """

    name = "minmax"

    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        # amin and amax: each vectorised, where aminmax is 5 times slower on CPU.
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        # An entry, or the range itself, is infinite: inf - inf, of a token all infinite, is NaN.
        dead = (scale == math.inf) | (low.isinf() & (low == high))
        scale = scale.nan_to_num_(nan=1.0, posinf=1.0)
        inverse = _reciprocal(scale)
        middle = low.add_(scale, alpha=2 ** (bits - 1)).masked_fill_(dead, 0.0)
        t = torch.sub(x, middle, out=out).mul_(inverse)
        return Normalised(t, scale, inverse, middle, middle, dead)


class BitNet(ActivationQuantizer):
    """BitNet b1.58 / v2: INT8 by absmax, fewer bits by absmean. Gradient: identity.

    8 bits: γ = max|x|, x̂ = γ/127 RoundClip(127 x/(γ + ε), -128, 127). 4 bits: β = mean|x|,
    x̂ = β/sqrt(7) RoundClip(sqrt(7) x/(β + ε), -8, 7). Other widths b generalise the 4-bit rule
    with sqrt(2^(b-1) - 1), which is 1 at 2 bits and leaves 1 bit undefined (ConfigError).
    Source: BitNet v2 (arXiv 2504.18415) equations 4 and 5; ε is 1e-5 as in transformers.
    """

    name = "bitnet"
    min_bits = 2

    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        magnitude = torch.abs(x, out=scratch)
        if bits == 8:
            statistic, divisor = magnitude.amax(dim, keepdim=True), 127.0
        else:
            statistic = magnitude.mean(dim, keepdim=True)
            divisor = math.sqrt(2 ** (bits - 1) - 1)
        dead = statistic == math.inf
        statistic = statistic.masked_fill_(dead, divisor)
        inverse = divisor / (statistic + BITNET_EPS)
        zero = torch.zeros_like(statistic)
        t = torch.mul(x, inverse, out=out)
        return Normalised(t, statistic / divisor, inverse, zero, zero, dead)


_QUANTIZERS: dict[str, ActivationQuantizer] = {
    q.name: q for q in (RobustMidtread(), RobustMidrise(), LloydMax(), MinMax(), BitNet())
}


def activation_quantizer(name: str) -> ActivationQuantizer | None:
    """The quantizer a plan calls `name`; None for "none". ConfigError for an unknown name."""
    if name == "none":
        return None
    if name not in _QUANTIZERS:
        raise ConfigError(
            f"unknown activations.quantizer {name!r}{suggest(name, [*_QUANTIZERS, 'none'])}"
        )
    return _QUANTIZERS[name]


class _AbsmaxFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: int) -> Tensor:
        del ctx
        scale = _working(x.abs().amax(-1, keepdim=True)) / limit
        return (x * _reciprocal(scale)).round_().mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@torch.library.custom_op("robuq_bench::absmax_fake_quantize", mutates_args=())
def _absmax_operator(x: Tensor, limit: int) -> Tensor:
    """The same for `torch.compile`, which in torch 2.11 gives the function a gradient of zero."""
    result: Tensor = _AbsmaxFakeQuantize.apply(x, limit)
    return result.contiguous()


@_absmax_operator.register_fake
def _(x: Tensor, limit: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_autograd("robuq_bench::absmax_fake_quantize", lambda ctx, grad: (grad, None))


class _MatmulQuantizer:
    """Per-row absmax fake quantization to integers of at most `limit`; pickles with its model."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _absmax_operator(x, self.limit)
        result: Tensor = _AbsmaxFakeQuantize.apply(x, self.limit)
        return result


def matmul_quantizer(bits: int) -> Callable[[Tensor], Tensor]:
    """Symmetric absmax fake quantizer per row (last axis) for attention operands, bits 2 to 8.

    x̂ = s round(x/s) with s = max|x| / (2^(bits-1) - 1). Nothing is clipped, so the
    straight-through gradient is the identity. RobuQ states 8 bits for these products but not
    which quantizer; absmax is the usual 8-bit choice.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"attention.matmul_bits must be 2 to 8, got {bits}")
    return _MatmulQuantizer(2 ** (bits - 1) - 1)
