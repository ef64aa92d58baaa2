"""Rotate and quantize tokens by the compiled CPU kernel `cpu.cpp`.

The same function as `reference.py`; all numbers of threads give the same bits.
"""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.hadamard_quantize.reference import (
    OP,
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
    check_inputs,
)
from kernels.launch import KernelInputError
from kernels.plain import is_plain

STATISTICS = ("mean-mad", "min-max", "absmax", "absmean")
"""In the order of `Statistic` in cpu.cpp."""

NOT_SIGNS = 2
"""Status of the kernel: the factor has another entry than ±1."""


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "x shift scale signs inner down codes token_scale token_offset code_sums branch",
        "rows width order outer rank tokens_per_image x_stride shift_stride scale_stride",
        "norm layer_norm_eps factor epsilon low high",
        "statistic floor threads instruction_set",
    )


def _hadamard_quantize(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    signs: Tensor | None,
    inner: Tensor | None,
    down: Tensor | None,
    tokens_per_image: int,
    layer_norm_eps: float,
    statistic: int,
    factor: float,
    epsilon: float,
    low: int,
    high: int,
    floor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    rank = 0 if down is None else down.shape[0]
    codes = torch.empty((rows, width), dtype=torch.int8, device="cpu")
    token_scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    token_offset = torch.empty(rows, dtype=torch.float32, device="cpu")
    code_sums = torch.empty(rows, dtype=torch.int32, device="cpu")
    branch = torch.empty((rows, rank), dtype=torch.float32, device="cpu")
    order = 1 if inner is None else len(inner)
    pointers = (x, shift, scale, signs, inner, down)
    outputs = (codes, token_scale, token_offset, code_sums, branch)
    arguments = _Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*pointers, *outputs)),
        rows,
        width,
        order,
        width // order,
        rank,
        tokens_per_image,
        x.stride(0),
        0 if shift is None else shift.stride(0),
        0 if scale is None else scale.stride(0),
        1.0 if inner is None else 1 / math.sqrt(width),
        layer_norm_eps,
        factor,
        epsilon,
        low,
        high,
        statistic,
        floor,
        torch.get_num_threads(),
        instruction_set(),
    )
    if call("robuq_hadamard_quantize", arguments) == NOT_SIGNS:
        raise KernelInputError(f"{OP}: rotation.inner must hold 1 and -1 only")
    return outputs


_operator = torch.library.custom_op(
    "robuq::cpu_hadamard_quantize", _hadamard_quantize, mutates_args=()
)


@_operator.register_fake
def _(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    signs: Tensor | None,
    inner: Tensor | None,
    down: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty(rows),
        x.new_empty(rows),
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty((rows, 0 if down is None else down.shape[0])),
    )


def hadamard_quantize(
    x: Tensor,
    grid: Grid,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    modulation: Modulation | None = None,
    gated_residual: GatedResidual | None = None,
    silu: bool = False,
    down: Tensor | None = None,
) -> Quantized:
    """`reference.hadamard_quantize` for bfloat16, float16 and float32 tokens on the CPU.

    Scale, offset and branch are float32 and carry no gradient. Where neither rotation, modulation
    nor a mean is asked for, codes, scale and offset equal the reference's bit for bit. Otherwise
    float32 sums are added in another order, which moves a value by a few units in its last place,
    so that a code within that distance of the next one may be it: at most 0.1 % of the codes
    differ, by 1.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or exclusive options.
        MissingKernels: the library is not built, see `kernels.cpu_library`.
    """
    check_inputs(x, grid, rotation, signs, modulation, gated_residual, silu, down, anywhere=True)
    if x.device.type != "cpu":
        raise KernelInputError(f"{OP}: x is on {x.device}; this kernel needs the CPU")
    if x.dtype == torch.float64:
        raise KernelInputError(f"{OP}: x must not be float64; reference.py takes it")
    residual = None
    if gated_residual is not None:
        gate = gated_residual.gate.float().repeat_interleave(gated_residual.tokens_per_image, 0)
        x = residual = (x.float() + gate * gated_residual.value.float()).to(x.dtype)
    tokens = F.silu(x.float()) if silu else x.float()
    inner = None if rotation is None else rotation.inner.float()

    def quantize(signs: Tensor | None, down: Tensor | None) -> tuple[Tensor, ...]:
        tensors = (
            tokens,
            None if modulation is None else modulation.shift.float(),
            None if modulation is None else modulation.scale.float(),
            None if signs is None else signs.float(),
            inner,
            None if down is None else down.float(),
        )
        compute = _hadamard_quantize if is_plain(*tensors) else _operator
        return compute(
            *tensors,
            1 if modulation is None else modulation.tokens_per_image,
            0.0 if modulation is None else modulation.eps,
            STATISTICS.index(grid.statistic),
            grid.factor,
            grid.epsilon,
            grid.low,
            grid.high,
            grid.floor,
        )

    if signs is None or signs.dim() == 1:
        parts = quantize(signs, down)
    else:
        groups = [quantize(s, None if down is None else down[g]) for g, s in enumerate(signs)]
        parts = tuple(torch.stack(part) for part in zip(*groups, strict=True))
    codes, token_scale, token_offset, code_sums, branch = parts
    kept = None if down is None else branch
    return Quantized(codes, token_scale, token_offset, code_sums, kept, residual)
