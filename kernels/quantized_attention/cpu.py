"""Attention with both products in integers by the compiled CPU kernel `cpu.cpp`.

The same function as `reference.py`; all instruction sets and numbers of threads give the same bits.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.launch import KernelInputError
from kernels.plain import is_plain
from kernels.quantized_attention.reference import OP, check_inputs


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "qkv out",
        "batch tokens heads head_dim",
        "score_scale",
        "limit threads instruction_set",
    )


def _quantized_attention(qkv: Tensor, heads: int, limit: int) -> Tensor:
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    out = torch.empty((batch, tokens, width // 3), dtype=torch.float32, device="cpu")
    arguments = _Arguments(
        qkv.data_ptr(),
        out.data_ptr(),
        batch,
        tokens,
        heads,
        head_dim,
        math.log2(math.e) / math.sqrt(head_dim),
        limit,
        torch.get_num_threads(),
        instruction_set(),
    )
    call("robuq_quantized_attention", arguments)
    return out


_operator = torch.library.custom_op(
    "robuq::cpu_quantized_attention", _quantized_attention, mutates_args=()
)


@_operator.register_fake
def _(qkv: Tensor, heads: int, limit: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def quantized_attention(
    qkv: Tensor, *, heads: int, limit: int, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`reference.quantized_attention` for tensors on the CPU.

    Scores are rounded in another order, so that a probability within a few units in the last place
    of the threshold between two codes may have the other one.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or a limit out of
            range.
        MissingKernels: the library is not built, see `kernels.cpu_library`.
    """
    check_inputs(qkv, heads, limit, out_dtype, anywhere=True)
    if qkv.device.type != "cpu":
        raise KernelInputError(f"{OP}: qkv is on {qkv.device}; this kernel needs the CPU")
    compute = _quantized_attention if is_plain(qkv) else _operator
    result: Tensor = compute(qkv.float(), heads, limit)
    return result.to(out_dtype)
