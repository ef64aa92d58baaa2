"""Ternary weight times int8 codes on a CPU: `torch._int_mm` on weights that are unpacked once.

Where the CPU has no AVX-512 VNNI, torch computes `_int_mm` in a plain loop, 10 to 100 times slower
than a float32 product; integer-valued float32 matrices are multiplied there, which is exact too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.ternary_matmul.operands import Operands, check_operands
from kernels.ternary_matmul.reference import EXACT_WIDTH

AT_ONCE = 2**17
"""Outputs that the epilogue computes at once: they stay in the cache from step to step."""


def has_fast_int_mm() -> bool:
    """Whether `torch._int_mm` is fast here: oneDNN is on, and the CPU has AVX-512 VNNI."""
    mkldnn = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled and torch.cpu._is_vnni_supported())


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact sum_k w_nk c_mk.

    Args:
        codes: int8 [M, K].
        weight: int8 [N, K], values -1, 0 and 1.

    Returns:
        [M, N] int32, or integer-valued float32 without a fast `_int_mm`.

    Raises:
        KernelInputError: K is so large that float32 sums need not be exact.
    """
    width = codes.shape[-1]
    if width >= EXACT_WIDTH:
        raise KernelInputError(
            f"ternary_matmul on a CPU: K = {width} is not exact in float32; K < {EXACT_WIDTH} is"
        )
    if width > 1 and has_fast_int_mm():  # at K = 1 torch 2.13 returns what was in memory
        return torch._int_mm(codes, weight.mT)
    return codes.float() @ weight.float().mT


@torch.no_grad()
def ternary_matmul(codes: Tensor, planes: Tensor, **operands: Any) -> Tensor:
    """`reference.ternary_matmul` with `planes` unpacked, the ternary codes int8 [N, K].

    Integer sums are the reference's, floats are within 1e-6 of the largest; nothing has a gradient.
    """
    return _product(_checked("ternary_matmul", codes, planes, grouped=False, **operands))


def grouped_ternary_matmul(codes: Tensor, planes: Tensor, **operands: Any) -> Tensor:
    """`reference.grouped_ternary_matmul` with `planes` unpacked, int8 [G, N, K]."""
    _checked("grouped_ternary_matmul", codes, planes, grouped=True, **operands)
    tensors = {name: value for name, value in operands.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in operands.items() if name not in tensors}
    groups = []
    for group in range(len(codes)):
        own = {name: value[group] for name, value in tensors.items()}
        groups.append(ternary_matmul(codes[group], planes[group], **own, **rest))
    return torch.stack(groups)


def _checked(op: str, codes: Tensor, planes: Tensor, **operands: Any) -> Operands:
    optional = {"bias": None, "branch": None, "up": None, "out_dtype": torch.bfloat16}
    given = optional | operands
    checked = check_operands(op, codes, planes, **given, anywhere=True, unpacked=True)
    if codes.device.type != "cpu":
        raise KernelInputError(f"{op}: codes are on {codes.device}; this one runs on a CPU only")
    return checked


def _product(x: Operands) -> Tensor:
    sums = integer_product(x.codes, x.planes)
    # Branch, offset and bias are one product [M, r + 2] [r + 2, N].
    columns = [x.token_offset[:, None], torch.ones(x.rows, 1)]
    rows = [(x.channel_scale * x.weight_sums)[None]]
    rows.append(torch.zeros_like(rows[0]) if x.bias is None else x.bias.float()[None])
    if x.branch is not None and x.up is not None:
        columns.append(x.branch.to(x.up.dtype).float())
        rows.append(x.up.float().mT)
    of_tokens, of_channels = torch.cat(columns, 1), torch.cat(rows)
    out = torch.empty(sums.shape)
    at_once = max(1, AT_ONCE // max(x.outputs, 1))
    for first in range(0, x.rows, at_once):
        chosen = slice(first, first + at_once)
        y = torch.mul(sums[chosen], x.token_scale[chosen, None], out=out[chosen])
        y.mul_(x.channel_scale).addmm_(of_tokens[chosen], of_channels)
        if x.gelu:
            y.copy_(F.gelu(y, approximate="tanh"))
        if x.gate is not None:
            image = torch.arange(first, first + len(y)) // x.tokens_per_image
            y.mul_(x.gate[image].float())
        if x.residual is not None:
            y.add_(x.residual[chosen])
    return out.to(x.out_dtype)
