"""Fake quantization of a ternary weight in one pass (TWN) or two (absmean); see `reference.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import KernelInputError, check_tensor, next_power_of_2
from kernels.ternary_weight.reference import ABSMEAN_EPS, RULES

OP = "ternary_weight"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 16384
"""Widest row held in registers."""
TILE_ELEMENTS = 4096

_ABSMEAN_EPS = tl.constexpr(ABSMEAN_EPS)


@triton.jit
def _load_rows(pointer, rows, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = row.to(tl.int64) * K + column
    mask = (row < rows) & (column < K)
    return tl.load(pointer + place, mask=mask, other=0.0), place, mask


@triton.jit
def twn_kernel(weight_ptr, out_ptr, rows, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """TWN: fake-quantized rows [rows, K], ROWS of them by one program; WIDTH is K padded."""
    weight, place, mask = _load_rows(weight_ptr, rows, K, ROWS, WIDTH)
    size = tl.abs(weight)
    mean = tl.sum(size, 1) / K
    # Padding passes the threshold of all-zero rows alone, whose scale is 0 either way.
    kept = size >= 0.5 * mean[:, None]
    total = tl.sum(tl.where(kept, size, 0.0), 1)
    scale = total / tl.maximum(tl.sum(kept.to(tl.float32), 1), 1.0)
    # No entry is kept in a row with NaN; it has to stay visible.
    scale = tl.where(mean == mean, scale, mean)[:, None]
    code = tl.where(kept & (size > 0), tl.where(weight < 0, -1.0, 1.0), 0.0)
    tl.store(out_ptr + place, (code * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def absolute_sums_kernel(
    weight_ptr, sums_ptr, rows, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """One float32 sum of |w| for every ROWS rows, for the mean over the whole tensor."""
    weight, _, _ = _load_rows(weight_ptr, rows, K, ROWS, WIDTH)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(tl.abs(weight), 1), 0))


@triton.jit
def absmean_kernel(
    weight_ptr, scale_ptr, out_ptr, rows, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Absmean: fake-quantized rows by the one scale in memory, mean |w| of the tensor."""
    weight, place, mask = _load_rows(weight_ptr, rows, K, ROWS, WIDTH)
    scale = tl.load(scale_ptr)
    # round(w / (scale + eps)), half to even and clipped, is the sign past one half.
    kept = tl.abs(weight) > 0.5 * (scale + _ABSMEAN_EPS)
    code = tl.where(kept, tl.where(weight < 0, -1.0, 1.0), 0.0)
    tl.store(out_ptr + place, (code * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def clamp_kernel(grad_ptr, out_ptr, elements, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    """Straight-through gradient, clamped to [-1, 1] where CLAMP; also converts the dtype."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if CLAMP:
        # Comparisons keep NaN, which minimum and maximum swallow.
        grad = tl.where(grad > 1.0, 1.0, tl.where(grad < -1.0, -1.0, grad))
    tl.store(out_ptr + place, grad.to(out_ptr.dtype.element_ty), mask=mask)


def tile_of(width: int) -> tuple[dict[str, int], int]:
    """Constants and warps of a launch over rows of this width."""
    padded = next_power_of_2(width)
    rows = max(1, TILE_ELEMENTS // padded)
    return {"K": width, "ROWS": rows, "WIDTH": padded}, max(4, min(16, rows * padded // 512))


def _check(rule: str, out_dtype: torch.dtype) -> None:
    if rule not in RULES:
        raise KernelInputError(f"{OP}: unknown rule {rule!r}; supported: {', '.join(RULES)}")
    if out_dtype not in DTYPES:
        raise KernelInputError(f"{OP}: out_dtype {out_dtype}; supported: {DTYPES}")


def ternary_weight(weight: Tensor, rule: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """`reference.ternary_weight` of weight [N, K] float32, contiguous, K up to 16384; N may be 0.

    Args:
        weight: master weight.
        rule: "ternary-twn" or "ternary-absmean".
        out_dtype: float32, bfloat16 or float16; default float32.

    Raises:
        KernelInputError: anything else.
    """
    check_tensor(OP, "weight", weight, shape=[None, None], dtypes=[torch.float32])
    out_dtype = out_dtype or torch.float32
    _check(rule, out_dtype)
    rows, width = weight.shape
    if width > MAX_WIDTH:
        raise KernelInputError(f"{OP}: rows of {width} entries; supported: up to {MAX_WIDTH}")
    out = torch.empty(rows, width, dtype=out_dtype, device=weight.device)
    if out.numel() == 0:
        return out
    constants, warps = tile_of(width)
    programs = triton.cdiv(rows, constants["ROWS"])
    if rule == "ternary-twn":
        twn_kernel[(programs,)](weight, out, rows, **constants, num_warps=warps)
        return out
    sums = torch.empty(programs, dtype=torch.float32, device=weight.device)
    absolute_sums_kernel[(programs,)](weight, sums, rows, **constants, num_warps=warps)
    scale = sums.sum() / (rows * width)
    absmean_kernel[(programs,)](weight, scale, out, rows, **constants, num_warps=warps)
    return out


def ternary_weight_backward(grad: Tensor, rule: str, out_dtype: torch.dtype) -> Tensor:
    """`reference.ternary_weight_backward` of grad [N, K], one pass, cast to `out_dtype`.

    Raises:
        KernelInputError: a dtype other than float32, bfloat16 and float16, or an unknown rule.
    """
    _check(rule, out_dtype)
    check_tensor(OP, "grad", grad, shape=[None, None], dtypes=DTYPES, contiguous=False)
    grad = grad.contiguous()
    out = torch.empty(grad.shape, dtype=out_dtype, device=grad.device)
    if out.numel():
        programs = triton.cdiv(out.numel(), TILE_ELEMENTS)
        clamp = rule == "ternary-twn"
        clamp_kernel[(programs,)](
            grad, out, out.numel(), CLAMP=clamp, BLOCK=TILE_ELEMENTS, num_warps=8
        )
    return out
