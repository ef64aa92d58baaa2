"""Hadamard matrices by construction, and the orthonormal transform as small Kronecker factors.

The transform of order n = 2^k * m is `Sylvester(2^k) (x) H_m`, with H_m a Paley matrix (156 and
172, which have none, are Goethals-Seidel matrices): the width 1152 of DiT-XL/2 is 32 (x) 36, and
4608 is 128 (x) 36. With `x` viewed as [rows, 2^k, m] it is one GEMM over the last axis and one
small batched product over the middle one: (2^k + m) multiplications per element instead of n. This
order of factors is the faster one on CPU by 1.3 to 4 times.

QuaRot and its descendants use `H_m (x) Sylvester` with tables H_m of their own: other matrices of
these orders. What they rotated does not load here; `other_rotations` brings it into this basis.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.hadamard.goethals_seidel import GOETHALS_SEIDEL_ORDERS, goethals_seidel
from robuq_bench.hadamard.paley import paley_construction, prime_power

MAX_PALEY_ORDER = 1024
"""Largest Paley factor: past it a factor would cost as much as the dense product it replaces."""

MAX_SYLVESTER_FACTOR = 64
"""Largest single power-of-two factor applied as one product; larger powers of two are split."""


class UnsupportedHadamardOrder(ConfigError):  # noqa: N818 - the name says what happened
    """No Hadamard matrix of this order is constructed here; the message names the nearest ones."""


def _is_paley_order(order: int) -> bool:
    q = order // 2 - 1
    second = order % 4 == 0 and q % 4 == 1 and prime_power(q) is not None
    return second or (order % 4 == 0 and prime_power(order - 1) is not None)


@functools.cache
def _decompose(order: int) -> tuple[int, ...] | None:
    """`(2^k, m, ...)`, with every m a Paley order and the product equal to order; None if none."""
    if order < 1:
        return None
    odd = order
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return (order,)
    base = 4 * odd
    while base <= min(order, MAX_PALEY_ORDER):
        if order % base == 0 and _is_paley_order(base):
            return (order // base, base)
        base *= 2
    # No single Paley matrix carries the odd part: try a product of two, smallest divisor first.
    for divisor in range(3, math.isqrt(odd) + 1, 2):
        if odd % divisor:
            continue
        small = 4 * divisor
        while order % small == 0 and small <= MAX_PALEY_ORDER:
            rest = _decompose(order // small) if _is_paley_order(small) else None
            if rest is not None and order // small > 2:
                return (rest[0], small, *rest[1:])
            small *= 2
    return None


def _decomposition(order: int) -> tuple[int, ...] | None:
    """`_decompose`, then what only other constructions reach: no older matrix may change."""
    return _decompose(order) or ((1, order) if order in GOETHALS_SEIDEL_ORDERS else None)


def _split_power_of_two(order: int) -> tuple[int, ...]:
    """Split 2^k into the fewest factors of at most `MAX_SYLVESTER_FACTOR`, as equal as possible."""
    k = order.bit_length() - 1
    if k == 0:
        return ()
    parts = -(-k // (MAX_SYLVESTER_FACTOR.bit_length() - 1))
    return tuple(2 ** (k // parts + (1 if i >= parts - k % parts else 0)) for i in range(parts))


@functools.cache
def hadamard_factors(n: int) -> tuple[int, ...]:
    """Orders of the Kronecker factors of `hadamard_matrix(n)`, first factor first.

    Rule: write n = 2^k * m with m the smallest Paley order holding the whole odd part of n (m = 1
    for a power of two; two Paley orders if no single one exists). The factors are 2^k, split into
    the fewest near-equal powers of two of at most 64, then m. Examples: 144 = 4*36, 768 = 64*12,
    1152 = 32*36, 4608 = 8*16*36, 1024 = 32*32. Only 156 and 172 are Goethals-Seidel matrices.

    Raises:
        UnsupportedHadamardOrder: no construction is known here; never padded to a larger order.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise UsageError(f"the order of a Hadamard matrix is a whole number, got {n!r}")
    found = _decomposition(n)
    if found is None:
        raise UnsupportedHadamardOrder(
            f"no Hadamard matrix of order {n} can be constructed (Sylvester, Paley I and II, "
            f"their Kronecker products, 156, 172); nearest supported orders: {_nearest(n)}"
        )
    power_of_two, *paley = found
    factors = (*_split_power_of_two(power_of_two), *paley)
    return factors or (1,)


def is_supported(n: int) -> bool:
    """Whether `hadamard_matrix(n)` exists."""
    return _decomposition(n) is not None


def _nearest(n: int) -> str:
    below = next((m for m in range(n - 1, 0, -1) if is_supported(m)), None)
    above = n + 1
    while not is_supported(above):
        above += 1
    return f"{above}" if below is None else f"{below} and {above}"


@functools.cache
def _factor_matrix(order: int) -> NDArray[np.int8]:
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1), dtype=np.int8)
        while matrix.shape[0] < order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    constructed = paley_construction(order)
    if constructed is None:
        constructed = goethals_seidel(order)
    assert constructed is not None
    return constructed


def hadamard_matrix(n: int) -> Tensor:
    """Hadamard matrix of order n: [n, n] float64 of +-1 with H @ H.T = n I.

    Equals `scipy.linalg.hadamard(n)` for powers of two. Symmetric unless a factor is Paley I's
    (orders such as 44, 68 or 132) or Goethals and Seidel's (156, 172).

    Raises:
        UnsupportedHadamardOrder: no construction is known here.
    """
    matrix = functools.reduce(np.kron, (_factor_matrix(f) for f in hadamard_factors(n)))
    return torch.from_numpy(matrix.astype(np.float64))


@functools.cache
def transform_factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Orthonormal factors F_1, F_2, ... with hadamard_matrix(n)/sqrt(n) = F_1 (x) F_2 (x) ..."""
    with torch.inference_mode(False):
        return tuple(
            torch.from_numpy(_factor_matrix(order) / math.sqrt(order)).to(device, dtype)
            for order in hadamard_factors(n)
        )


def _apply_factors(x: Tensor, inverse: bool) -> Tensor:
    # Under torch.jit.trace a size is a tensor, and no key of a cache.
    *leading, last = transform_factors(int(x.shape[-1]), x.dtype, x.device)
    inner = last.shape[0]
    # Half precision would round the factors, which the quantizer behind would see as noise.
    with torch.autocast(x.device.type, enabled=False):
        y = torch.mm(x.reshape(-1, inner), last.T if inverse else last)
        for factor in reversed(leading):
            order = factor.shape[0]
            left = factor if inverse else factor.T
            y = torch.matmul(left, y.view(-1, order, inner))
            inner *= order
    return y.view(x.shape)


class _HadamardTransform(torch.autograd.Function):
    """y = x H / sqrt(n); the gradient is the transposed transform of the output's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, inverse: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.inverse = inverse
        return _apply_factors(x, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _HadamardTransform.apply(grad, not ctx.inverse), None


def hadamard_transform(x: Tensor, inverse: bool = False) -> Tensor:
    """Multiply the last axis by the orthonormal Hadamard matrix: y = x @ (H / sqrt(n)).

    Args:
        x: [..., n] floating point; n must be a supported order.
        inverse: multiply by the transpose (the inverse) instead; identical for symmetric H.

    Returns:
        [..., n], same dtype; norms of the last axis are kept.

    Raises:
        UnsupportedHadamardOrder: n has no matrix here; the input is never padded.
        UsageError: x is not floating point.
    """
    if not x.is_floating_point():
        raise UsageError(f"hadamard_transform takes floating-point tensors, got {x.dtype}")
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _apply_factors(x, inverse)  # the tracer loses cached tensors within a Function
    if torch.compiler.is_compiling():
        return _compiled_transform(x, inverse)
    result: Tensor = _HadamardTransform.apply(x, inverse)
    return result


# An operator that `torch.compile` leaves whole: torch 2.11 traces the function above to a gradient
# of zero.


@torch.library.custom_op("robuq_bench::hadamard_transform", mutates_args=())
def _compiled_transform(x: Tensor, inverse: bool) -> Tensor:
    return hadamard_transform(x, inverse)


@_compiled_transform.register_fake
def _(x: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember_direction(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _transform_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _compiled_transform(grad, not ctx.inverse), None


torch.library.register_autograd(
    "robuq_bench::hadamard_transform", _transform_gradient, setup_context=_remember_direction
)
