"""Fake quantization of training by the compiled CPU kernels `cpu.cpp`, with its gradient.

Values and gradient are those of `reference.py`, whose residuals are not rounded here: nothing is
kept for the backward pass but the tokens themselves, which are rotated again. All instruction sets
and numbers of threads give the same bits.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.hadamard_quantize.cpu import NOT_SIGNS, STATISTICS
from kernels.hadamard_quantize.reference import Grid, Rotation
from kernels.launch import KernelInputError, check_tensor
from kernels.plain import is_plain

OP = "fake_quantize"
UNQUANTIZED = -1
"""Stands for a statistic where tokens are only rotated, as in cpu.cpp."""


class _FakeQuantizeArguments(ctypes.Structure):
    _fields_ = fields(
        "x signs inner down grad out",
        "rows width order outer rank x_stride grad_stride",
        "norm factor divisor epsilon low high",
        "statistic floor threads instruction_set",
    )


class _AbsmaxArguments(ctypes.Structure):
    _fields_ = fields(
        "x out",
        "items groups n m item_stride group_stride row_stride",
        "limit",
        "by_column threads instruction_set",
    )


def _run(
    x: Tensor | None,
    grad: Tensor | None,
    signs: Tensor | None,
    inner: Tensor | None,
    down: Tensor | None,
    out: Tensor,
    statistic: int,
    factor: float,
    epsilon: float,
    low: int,
    high: int,
    floor: bool,
) -> Tensor:
    rank = 0 if down is None else down.shape[0]
    rows, width = out.shape[0], out.shape[1] - (0 if grad is not None else rank)
    order = 1 if inner is None else len(inner)
    arguments = _FakeQuantizeArguments(
        *(None if t is None else t.data_ptr() for t in (x, signs, inner, down, grad, out)),
        rows,
        width,
        order,
        width // order,
        rank,
        0 if x is None else x.stride(0),
        0 if grad is None else grad.stride(0),
        1 / math.sqrt(width),
        factor,
        1 / factor,
        epsilon,
        low,
        high,
        statistic,
        floor,
        torch.get_num_threads(),
        instruction_set(),
    )
    if call("robuq_fake_quantize", arguments) == NOT_SIGNS:
        raise KernelInputError(f"{OP}: rotation.inner must hold 1 and -1 only")
    return out


def _forward(
    x: Tensor,
    down: Tensor | None,
    signs: Tensor | None,
    inner: Tensor | None,
    statistic: int,
    factor: float,
    epsilon: float,
    low: int,
    high: int,
    floor: bool,
) -> Tensor:
    rank = 0 if down is None else down.shape[0]
    out = torch.empty((x.shape[0], x.shape[1] + rank), dtype=torch.float32, device="cpu")
    return _run(x, None, signs, inner, down, out, statistic, factor, epsilon, low, high, floor)


def _backward(
    grad: Tensor,
    x: Tensor | None,
    down: Tensor | None,
    signs: Tensor | None,
    inner: Tensor | None,
    statistic: int,
    factor: float,
    epsilon: float,
    low: int,
    high: int,
    floor: bool,
) -> Tensor:
    grad = _contiguous_rows(grad)
    rank = 0 if down is None else down.shape[0]
    out = torch.empty((grad.shape[0], grad.shape[1] - rank), dtype=torch.float32, device="cpu")
    return _run(x, grad, signs, inner, down, out, statistic, factor, epsilon, low, high, floor)


_forward_operator = torch.library.custom_op("robuq::cpu_fake_quantize", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "robuq::cpu_fake_quantize_backward", _backward, mutates_args=()
)


@_forward_operator.register_fake
def _(x: Tensor, down: Tensor | None, *others: object) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] + (0 if down is None else down.shape[0])))


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor | None, down: Tensor | None, *others: object) -> Tensor:
    rank = 0 if down is None else down.shape[0]
    return grad.new_empty((grad.shape[0], grad.shape[1] - rank))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, signs, inner, *ctx.grid = inputs
    ctx.is_read = down is not None or ctx.grid[0] == STATISTICS.index("mean-mad")
    ctx.save_for_backward(x if ctx.is_read else None, down, signs, inner)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, signs, inner = ctx.saved_tensors
    # Where the gradient is to be differentiated, the operator refuses it.
    plain = not torch.is_grad_enabled() and is_plain(grad, x, down, signs, inner)
    of_x = of_down = None
    if ctx.needs_input_grad[0]:
        backward = _backward if plain else _backward_operator
        of_x = backward(grad, x, down, signs, inner, *ctx.grid)
    if down is not None and ctx.needs_input_grad[1]:
        # d down = d branch.T (x R) = (d branch.T x) R: r rows are rotated in place of all tokens.
        of_down = grad[:, x.shape[1] :].T @ x
        forward = _forward if plain else _forward_operator
        if inner is not None:
            of_down = forward(of_down, None, signs, inner, UNQUANTIZED, *ctx.grid[1:])
    return (of_x, of_down, *(None,) * 8)


_forward_operator.register_autograd(_gradients, setup_context=_remember)


class _FakeQuantize(torch.autograd.Function):
    """The operator without the dispatcher, which costs more than a few tokens."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def fake_quantize(
    x: Tensor,
    grid: Grid | None,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """Rotated and fake-quantized tokens, with their projection beside them; differentiable.

    With z = (x * signs) H / sqrt(K): [Q(z) | z @ down.T]. Gradients reach x and `down`, by the
    straight-through rule of the grid; there is no second derivative. Without a rotation, and where
    no mean is taken ("min-max", "absmax"), values are those of the plain lines bit for bit.

    Args:
        x: [..., K] float32 on the CPU.
        grid: of the codes; None leaves the rotated tokens as they are.
        rotation: None leaves x as it is.
        signs: [K] float32 of ±1 before the rotation, or None; only read with a rotation.
        down: [r, K] float32, or None for r = 0.

    Returns:
        [..., K + r] float32.

    Raises:
        KernelInputError: a tensor of another shape, dtype or device.
        MissingKernels: the library cannot be used, see `kernels.cpu_library`.
    """
    width = x.shape[-1] if x.dim() else 0
    if x.device.type != "cpu" or x.dtype != torch.float32 or width == 0:
        raise KernelInputError(
            f"{OP}: x must be [..., K] float32 on the CPU with K > 0, got {list(x.shape)} "
            f"{x.dtype} on {x.device}"
        )
    inner = None
    if rotation is None:
        signs = None
    else:
        order = len(rotation.inner)
        check_tensor(
            OP,
            "rotation.inner",
            rotation.inner,
            shape=(order, order),
            dtypes=(torch.float16, torch.float32),
            like=x,
        )
        if rotation.outer & (rotation.outer - 1) or rotation.outer * order != width:
            raise KernelInputError(
                f"{OP}: rotation must be a power of two times a square matrix of order "
                f"K = {width}, got {rotation.outer} times {order}"
            )
        inner = rotation.inner.float()
    if signs is not None:
        check_tensor(OP, "signs", signs, shape=(width,), dtypes=(torch.float32,), like=x)
    if down is not None:
        check_tensor(OP, "down", down, shape=(None, width), dtypes=(torch.float32,), like=x)
    rows = _contiguous_rows(x.reshape(-1, width))
    inputs = (rows, down, signs, inner, *_settings(grid))
    compute: Any = _FakeQuantize.apply if is_plain(*inputs[:4]) else _forward_operator
    out: Tensor = compute(*inputs)
    return out.view(*x.shape[:-1], out.shape[-1])


def _settings(grid: Grid | None) -> tuple[int, float, float, int, int, bool]:
    if grid is None:
        return UNQUANTIZED, 1.0, 0.0, 0, 0, False
    statistic = STATISTICS.index(grid.statistic)
    return statistic, grid.factor, grid.epsilon, grid.low, grid.high, grid.floor


def _absmax(x: Tensor, limit: int) -> Tensor:
    """Of x [B, H, n, m] whose last axis is contiguous, or whose next to last is."""
    by_column = x.stride(-1) != 1 and x.shape[-1] != 1
    matrices = x.transpose(-2, -1) if by_column else x
    items, groups, n, m = matrices.shape
    out = torch.empty((items, groups, n, m), dtype=torch.float32, device="cpu")
    arguments = _AbsmaxArguments(
        matrices.data_ptr(),
        out.data_ptr(),
        items,
        groups,
        n,
        m,
        *matrices.stride()[:3],
        limit,
        by_column,
        torch.get_num_threads(),
        instruction_set(),
    )
    call("robuq_absmax_fake_quantize", arguments)
    return out.transpose(-2, -1) if by_column else out


class _Absmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: int) -> Tensor:
        del ctx
        return _absmax(x, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def takes_absmax(x: Tensor) -> bool:
    """Whether `absmax_fake_quantize` takes x: its matrices are rows or columns in memory."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and 1 in (x.stride(-1), x.stride(-2), x.shape[-1])
    )


def absmax_fake_quantize(x: Tensor, limit: int) -> Tensor:
    """x̂ = s round(x / s) with s = max|x| / limit over the last axis; the gradient is the identity.

    Equal to the plain lines of `robuq_bench.quantization.attention` bit for bit.

    Args:
        x: [B, H, n, m] float32 on the CPU, with the last axis or the one before it contiguous.
        limit: the largest code.

    Raises:
        KernelInputError: another tensor, see `takes_absmax`.
        MissingKernels: the library cannot be used, see `kernels.cpu_library`.
    """
    if not takes_absmax(x):
        raise KernelInputError(
            f"absmax_fake_quantize: x must be [B, H, n, m] float32 on the CPU with one of its last "
            f"two axes contiguous, got {list(x.shape)} {x.dtype} of strides {list(x.stride())}"
        )
    if not is_plain(x):
        raise KernelInputError("absmax_fake_quantize: x must be in memory, and cannot be traced")
    result: Tensor = _Absmax.apply(x, limit)
    return result
