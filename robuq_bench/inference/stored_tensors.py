"""Tensors as a packed file stores them: floats in fp32, fp16 or int8, whole numbers as they are.

A matrix stored in int8 has its scales beside it as `<tensor>.int8_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robuq_bench.errors import UsageError
from robuq_bench.inference import codecs

INT8_SCALE = ".int8_scale"
FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
"""Floats that come back in the dtype they had, by name."""
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def problem_of(value: Tensor, may_be_infinite: bool = False) -> str:
    """Why a tensor cannot be part of a packed model; empty when it can."""
    if not value.is_floating_point():
        return "" if value.dtype in WHOLE else f"is {value.dtype}"
    if value.dtype not in FLOATS.values():
        return f"is {value.dtype}"
    value = value.detach() if value.dtype == torch.float64 else value.detach().float()
    if bool((value.isnan() if may_be_infinite else ~value.isfinite()).any()):
        return "has NaN or infinite values"
    return ""


def stored(name: str, value: Tensor, kind: str) -> dict[str, Tensor]:
    """The tensors that a file holds of one without `problem_of`, as "fp32", "fp16" or "int8".

    Raises:
        UsageError: it has a value that fp16 cannot hold.
    """
    if not value.is_floating_point():
        return {name: value}
    value = value if value.dtype == torch.float64 else value.float()
    if kind == "fp32":
        return {name: value}
    if (
        kind == "int8"
        and value.dim() >= 2
        and value.numel()
        and bool(value.float().isfinite().all())
    ):
        codes, scale = codecs.encode_int8(_as_matrix(value))
        return {name: codes.view(value.shape), f"{name}{INT8_SCALE}": scale}
    half = value.half()
    if bool((half.isinf() & value.isfinite()).any()):
        raise UsageError(
            f"{name} has a value beyond fp16 (largest {float(value.abs().max()):g}); "
            "store this model with fp32"
        )
    return {name: half}


def restored(name: str, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> Tensor:
    """A stored tensor in its own dtype, which `dtypes` names where it is not float32.

    Raises:
        ValueError: it is not there, or its scales are not its own.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    value = tensors[name]
    if is_int8(name, tensors):
        matrix = codecs.decode_int8(_as_matrix(value), tensors[f"{name}{INT8_SCALE}"])
        value = matrix.view(value.shape)
    return value.to(FLOATS[dtypes.get(name, "float32")]) if value.is_floating_point() else value


def is_int8(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a stored tensor is a matrix in int8; a model's own integers have no scales."""
    value = tensors.get(name)
    has_scale = f"{name}{INT8_SCALE}" in tensors
    return has_scale and value is not None and value.dtype == torch.int8 and value.dim() >= 2


def holds_signs(value: Tensor) -> bool:
    """Whether a slot's tensor is of the kind that is stored as bits where all of it is ±1."""
    return value.dim() == 1 and value.is_floating_point()


def _as_matrix(value: Tensor) -> Tensor:
    """A table [1, T, C] by rows; a convolution [out, in, p, p] as [out, in p p]."""
    return value.flatten(0, -2) if value.dim() == 3 else value.flatten(1)
