"""What every launcher shares: where kernels run, and checks of their inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Whether kernels run in Triton's interpreter, which follows the CPU and needs no GPU."""


class KernelInputError(ValueError):
    """A kernel does not take this input; the message says what it takes."""


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Raise KernelInputError unless `tensor` has this shape, dtype, device and layout.

    Args:
        op, name: what the message calls the operation and its argument.
        shape: expected size of every dimension; None takes any.
        dtypes: those supported.
        like: tensor whose device `tensor` must share; None asks for a device where kernels run.
        contiguous: whether the tensor must be contiguous.
    """
    if len(shape) != tensor.dim() or any(
        want is not None and want != have for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelInputError(f"{op}: {name} must be [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelInputError(f"{op}: {name} must be {names}, got {tensor.dtype}")
    if contiguous and not tensor.is_contiguous():
        raise KernelInputError(
            f"{op}: {name} must be contiguous, its strides are {list(tensor.stride())}; "
            "call .contiguous() on it"
        )
    if like is not None:
        if tensor.device != like.device:
            raise KernelInputError(
                f"{op}: {name} is on {tensor.device}, the other inputs are on {like.device}"
            )
    elif tensor.device.type != "cuda" and not INTERPRETED:
        raise KernelInputError(
            f"{op}: {name} is on {tensor.device}; kernels need a CUDA device, or Triton's "
            "interpreter (set TRITON_INTERPRET=1 before Python starts)"
        )


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
