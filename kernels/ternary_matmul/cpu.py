"""Ternary weight times int8 codes by the compiled CPU kernel `cpu.cpp`.

The same functions as `reference.py`; all instruction sets and numbers of threads give the same
bits, but for the last places of the low-rank sum on a CPU without fused multiply-add.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.launch import KernelInputError
from kernels.plain import is_plain
from kernels.ternary_matmul.operands import check_operands


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "codes planes token_scale token_offset code_sums channel_scale weight_sums bias branch up "
        "gate residual out",
        "rows outputs width rank tokens_per_image",
        "",
        "gelu threads instruction_set",
    )


def _ternary_matmul(
    codes: Tensor,
    planes: Tensor,
    token_scale: Tensor,
    token_offset: Tensor,
    code_sums: Tensor,
    channel_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    branch: Tensor | None,
    up: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    tokens_per_image: int,
) -> Tensor:
    out = torch.empty((codes.shape[0], planes.shape[0]), dtype=torch.float32, device="cpu")
    arguments = _Arguments(
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (
                codes,
                planes,
                token_scale,
                token_offset,
                code_sums,
                channel_scale,
                weight_sums,
                bias,
                branch,
                up,
                gate,
                residual,
                out,
            )
        ),
        codes.shape[0],
        planes.shape[0],
        codes.shape[1],
        0 if up is None else up.shape[1],
        tokens_per_image,
        gelu,
        torch.get_num_threads(),
        instruction_set(),
    )
    call("robuq_ternary_matmul", arguments)
    return out


_operator = torch.library.custom_op("robuq::cpu_ternary_matmul", _ternary_matmul, mutates_args=())


@_operator.register_fake
def _(codes: Tensor, planes: Tensor, *others: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], planes.shape[0]), dtype=torch.float32)


def ternary_matmul(
    codes: Tensor,
    planes: Tensor,
    *,
    token_scale: Tensor,
    token_offset: Tensor,
    code_sums: Tensor,
    channel_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens_per_image: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`reference.ternary_matmul` for tensors on the CPU.

    Without branch and GELU it equals the reference bit for bit; with them, to within the rounding
    of a float32 sum over the rank, and to 1e-6 of GELU's result. The result carries no gradient.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout.
        MissingKernels: the library is not built, see `kernels.cpu_library`.
    """
    _check_cpu("ternary_matmul", codes)
    check_operands(
        "ternary_matmul",
        codes,
        planes,
        token_scale=token_scale,
        token_offset=token_offset,
        code_sums=code_sums,
        channel_scale=channel_scale,
        weight_sums=weight_sums,
        bias=bias,
        branch=branch,
        up=up,
        gelu=gelu,
        gate=gate,
        residual=residual,
        tokens_per_image=tokens_per_image,
        out_dtype=out_dtype,
        grouped=False,
        anywhere=True,
    )
    if branch is not None and up is not None:
        branch, up = branch.to(up.dtype).float(), up.float()
    tensors = (codes, planes, token_scale, token_offset, code_sums, channel_scale, weight_sums)
    plain = is_plain(*tensors, bias, branch, up, gate, residual)
    compute = _ternary_matmul if plain else _operator
    y: Tensor = compute(
        codes,
        planes,
        token_scale,
        token_offset,
        code_sums,
        channel_scale,
        weight_sums,
        None if bias is None else bias.float(),
        branch,
        up,
        gelu,
        None if gate is None else gate.float(),
        None if residual is None else residual.float(),
        tokens_per_image if gate is not None else 1,
    )
    return y.to(out_dtype)


def grouped_ternary_matmul(
    codes: Tensor,
    planes: Tensor,
    *,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    **vectors: Tensor,
) -> Tensor:
    """`reference.grouped_ternary_matmul` for tensors on the CPU, layer by layer.

    Args:
        vectors: token_scale, token_offset, code_sums, channel_scale, weight_sums.

    Raises:
        KernelInputError, MissingKernels: as `ternary_matmul`.
    """
    _check_cpu("grouped_ternary_matmul", codes)
    operands: dict[str, Any] = {**vectors, "bias": bias, "branch": branch, "up": up}
    x = check_operands(
        "grouped_ternary_matmul",
        codes,
        planes,
        **operands,
        out_dtype=out_dtype,
        grouped=True,
        anywhere=True,
    )
    out = torch.empty((x.groups, x.rows, x.outputs), dtype=out_dtype, device="cpu")
    for g in range(x.groups):
        layer: Any = {
            name: None if tensor is None else tensor[g] for name, tensor in operands.items()
        }
        out[g] = ternary_matmul(codes[g], planes[g], **layer, out_dtype=out_dtype)
    return out


def _check_cpu(op: str, codes: Tensor) -> None:
    if codes.device.type != "cpu":
        raise KernelInputError(f"{op}: codes is on {codes.device}; this kernel needs the CPU")
