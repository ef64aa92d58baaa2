"""What `kernels.offline` compiles of this operation: the inputs of DiT-XL/2, L, B and S."""

from __future__ import annotations

import torch

from kernels.hadamard_quantize.kernel import hadamard_quantize_kernel
from kernels.hadamard_quantize.reference import OP, Rotation
from kernels.hadamard_quantize.triton import NUM_STAGES, tile_of
from kernels.offline import TOKENS, Specialisation, Work

_GROUPS = 28
"""Blocks of DiT-XL/2, whose adaLN inputs are quantized together."""
_BATCH = 64


def compile_specs() -> list[Specialisation]:
    """What DiT-XL/2, L, B and S launch, for `kernels.offline`."""
    return [
        _spec("LN modulate 1152", 32, 36, modulated=True),
        _spec("residual LN modulate 1152", 32, 36, modulated=True, residual=True),
        _spec("LN modulate 1152 rank 16", 32, 36, modulated=True, rank=16),
        _spec("residual LN modulate 1152 rank 16", 32, 36, modulated=True, residual=True, rank=16),
        _spec("LN modulate 1152 rank 32", 32, 36, modulated=True, rank=32),
        _spec("LN modulate 1152 mixed images", 32, 36, modulated=True, one_image=False),
        _spec("1152", 32, 36),
        _spec("1152 rank 16", 32, 36, rank=16),
        _spec("4608", 128, 36),
        _spec("4608 rank 16", 128, 36, rank=16),
        _spec("4608 rank 32", 128, 36, rank=32),
        _spec("LN modulate 768", 64, 12, modulated=True),
        _spec("LN modulate 1024", 32, 32, modulated=True),
        _spec("3072 rank 16", 256, 12, rank=16),
        _spec("4096", 128, 32),
        _spec("LN modulate 384", 32, 12, modulated=True),
        _spec("LN modulate 384 rank 16", 32, 12, modulated=True, rank=16),
        _spec("SiLU 1152 grouped rank 16", 32, 36, silu=True, rank=16),
        _spec("1152 midrise", 32, 36, floor=True),
        _spec("1152 minmax", 32, 36, statistic="min-max"),
        _spec("LN modulate 1152 not rotated", 0, 1152, modulated=True),
    ]


def _spec(
    name: str,
    outer: int,
    m: int,
    *,
    modulated: bool = False,
    residual: bool = False,
    one_image: bool = True,
    silu: bool = False,
    rank: int = 0,
    statistic: str = "mean-mad",
    floor: bool = False,
) -> Specialisation:
    """bfloat16 tokens with float32 signs; `outer` = 0 stands for tokens that are not rotated."""
    width = max(outer, 1) * m
    rotation = Rotation(torch.empty(m, m), outer) if outer else None
    rows, groups = (_BATCH, _GROUPS) if silu else (TOKENS, 1)
    tile = tile_of(width, rotation, rank, rows)
    iterations = tile.iterations(rows)
    pointers = {
        **dict.fromkeys(("x_ptr", "value_ptr", "gate_ptr", "residual_ptr"), "*bf16"),
        **dict.fromkeys(("shift_ptr", "scale_ptr", "down_ptr"), "*bf16"),
        **dict.fromkeys(("inner_ptr", "outer_ptr"), "*fp16"),
        **dict.fromkeys(("signs_ptr", "token_scale_ptr", "token_offset_ptr"), "*fp32"),
        "branch_ptr": "*fp32",
        "codes_ptr": "*i8",
        "code_sums_ptr": "*i32",
    }
    strides = [f"{of}_stride" for of in ("x", "value", "gate", "shift", "scale")]
    floats = ("factor", "epsilon", "low", "high", "norm_eps")
    # Tokens in (residual: branch in, sum out), codes, scale, offset and sum of codes, branch; the
    # projection once.
    read = rows * width * 2 * (3 if residual else 1)
    written = groups * (rows * (width + 12 + 4 * rank) + 2 * rank * width)
    return Specialisation(
        f"{OP}/{name}",
        hadamard_quantize_kernel,
        {
            **pointers,
            **dict.fromkeys(("rows", "tokens_per_image", *strides), "i32"),
            **dict.fromkeys(floats, "fp32"),
        },
        {
            **tile.constants,
            "ITERATIONS": iterations,
            "ROTATED": rotation is not None,
            "SIGNED": True,
            "RESIDUAL": residual,
            "MODULATED": modulated,
            "ONE_IMAGE": one_image,
            "SILU": silu,
            "STATISTIC": statistic,
            "FLOOR": floor,
            "RANK": rank,
        },
        aligned=("tokens_per_image", *strides),
        num_warps=tile.num_warps,
        num_stages=NUM_STAGES,
        tensor_cores=rotation is not None or rank > 0,
        work=Work(
            rows=rows,
            elements=groups * rows * width,
            bytes_moved=read + written,
            programs=groups * -(-rows // (tile.tokens * iterations)),
            loop_trips=iterations,
            operations=2 * groups * rows * width * ((tile.products if rotation else 0) + rank),
        ),
    )
