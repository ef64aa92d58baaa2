"""Ternary weights of training by the compiled CPU kernel `cpu.cpp`, with their gradient.

The rules of `reference.py`; all instruction sets and numbers of threads give the same bits.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.launch import KernelInputError, check_tensor
from kernels.plain import is_plain
from kernels.ternary_weight.reference import ABSMEAN_EPS, RULES

OP = "ternary_weight"


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "weight up grad out scale",
        "outputs width rank weight_stride up_stride grad_stride",
        "epsilon",
        "per_row clamp threads instruction_set",
    )


def _run(
    weight: Tensor | None,
    up: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    width: int,
    per_row: bool,
    clamp: bool,
    scale: Tensor | None = None,
) -> Tensor:
    tensors = (weight, up, grad)
    arguments = _Arguments(
        *(None if t is None else t.data_ptr() for t in (*tensors, out, scale)),
        out.shape[0],
        width,
        out.shape[1] - width,
        *(0 if t is None else t.stride(0) for t in tensors),
        ABSMEAN_EPS,
        per_row,
        clamp,
        torch.get_num_threads(),
        instruction_set(),
    )
    call("robuq_ternary_weight", arguments)
    return out


def _forward(weight: Tensor, up: Tensor | None, per_row: bool, clamp: bool) -> Tensor:
    del clamp  # of the backward pass
    outputs, width = weight.shape
    rank = 0 if up is None else up.shape[1]
    out = torch.empty((outputs, width + rank), dtype=torch.float32, device="cpu")
    return _run(weight, up, None, out, width, per_row, False)


def _backward(grad: Tensor, width: int, clamp: bool) -> Tensor:
    grad = grad if grad.stride(-1) == 1 or grad.numel() == 0 else grad.contiguous()
    out = torch.empty((grad.shape[0], width), dtype=torch.float32, device="cpu")
    return _run(None, None, grad, out, width, False, clamp)


_forward_operator = torch.library.custom_op("robuq::cpu_ternary_weight", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "robuq::cpu_ternary_weight_backward", _backward, mutates_args=()
)


@_forward_operator.register_fake
def _(weight: Tensor, up: Tensor | None, per_row: bool, clamp: bool) -> Tensor:
    rank = 0 if up is None else up.shape[1]
    return weight.new_empty((weight.shape[0], weight.shape[1] + rank))


@_backward_operator.register_fake
def _(grad: Tensor, width: int, clamp: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], width))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, up, _, ctx.clamp = inputs
    ctx.width, ctx.has_up = weight.shape[1], up is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Where the gradient is to be differentiated, the operator refuses it.
    plain = not torch.is_grad_enabled() and is_plain(grad)
    backward = _backward if plain else _backward_operator
    of_weight = backward(grad, ctx.width, ctx.clamp) if ctx.needs_input_grad[0] else None
    return of_weight, grad[:, ctx.width :] if ctx.has_up else None, None, None


_forward_operator.register_autograd(_gradients, setup_context=_remember)


class _TernaryWeight(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def ternary_weight(
    weight: Tensor, rule: str, *, up: Tensor | None = None, clamp: bool = False
) -> Tensor:
    """`scale * code` of a weight, with `up` beside it; differentiable, without a second derivative.

    Sums are added in another order than torch adds them, so that a scale may differ in its last
    places, and the code of a weight that lies that near to the threshold.

    Args:
        weight: [N, K] float32 on the CPU, contiguous.
        rule: "ternary-twn" or "ternary-absmean".
        up: [N, r] float32 that stands to the right of the weight in the result, or None.
        clamp: whether the straight-through gradient of the weight is clamped to [-1, 1].

    Returns:
        [N, K + r] float32.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or an unknown rule.
        MissingKernels: the library cannot be used, see `kernels.cpu_library`.
    """
    _check(weight, rule)
    if up is not None:
        shape = (len(weight), None)
        check_tensor(OP, "up", up, shape=shape, dtypes=(torch.float32,), like=weight)
    inputs = (weight, up, rule == "ternary-twn", clamp)
    if not is_plain(weight, up):
        return _forward_operator(*inputs)
    result: Tensor = _TernaryWeight.apply(*inputs)
    return result


def ternary_codes(weight: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale [N, 1] or [1, 1], whose product is `ternary_weight` to the bit.

    Args and errors are those of `ternary_weight`.
    """
    _check(weight, rule)
    if not is_plain(weight):
        raise KernelInputError(f"{OP}: codes are of a weight in memory, and cannot be traced")
    per_row = rule == "ternary-twn"
    scale = torch.empty((len(weight) if per_row else 1, 1), dtype=torch.float32, device="cpu")
    values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    _run(weight, None, None, values, weight.shape[1], per_row, False, scale)
    return values.sign_().to(torch.int8), scale


def _check(weight: Tensor, rule: str) -> None:
    if rule not in RULES:
        raise KernelInputError(f"{OP}: unknown rule {rule!r}; supported: {', '.join(RULES)}")
    if weight.device.type != "cpu":
        raise KernelInputError(f"{OP}: weight is on {weight.device}; this kernel needs the CPU")
    check_tensor(OP, "weight", weight, shape=(None, None), dtypes=(torch.float32,), like=weight)


def takes(weight: Tensor, rule: str) -> bool:
    """Whether `ternary_weight` takes a weight of this rule."""
    return (
        rule in RULES
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and weight.is_contiguous()
    )
