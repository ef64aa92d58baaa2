"""Symmetric fake quantization of the operands of attention's two products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import cpu_library
from kernels.fake_quantize import cpu
from kernels.plain import is_plain
from robuq_bench.errors import ConfigError
from robuq_bench.methods.activations._token_grid import reciprocal, working


class _AbsmaxFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: int) -> Tensor:
        del ctx
        scale = working(x.abs().amax(-1, keepdim=True)) / limit
        return (x * reciprocal(scale)).round_().mul_(scale).to(x.dtype)

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
        if is_plain(x) and cpu_library.is_usable() and cpu.takes_absmax(x):
            return cpu.absmax_fake_quantize(x, self.limit)
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


def integer_limit(quantizer: object) -> int | None:
    """Largest integer of a quantizer of `matmul_quantizer`; None for no quantizer or another."""
    return quantizer.limit if isinstance(quantizer, _MatmulQuantizer) else None
