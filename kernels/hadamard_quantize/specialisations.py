"""What `kernels.offline` compiles of this operation: the inputs of DiT-XL/2, L, B and S."""

from __future__ import annotations

from kernels.hadamard_quantize.reference import OP
from kernels.hadamard_quantize.triton import (
    MAX_ITERATIONS,
    NUM_STAGES,
    RANK_STEP,
    constants,
    hadamard_quantize_kernel,
    num_warps_of,
)
from kernels.hadamard_tile import TILE, fold
from kernels.launch import next_power_of_2
from kernels.offline import Specialisation


def compile_specs() -> list[Specialisation]:
    """What DiT-XL/2, L, B and S launch, for `kernels.offline`."""
    return [
        _spec("LN modulate 1152", 32, 36, modulated=True),
        _spec("residual LN modulate 1152", 32, 36, modulated=True, residual=True),
        _spec("LN modulate 1152 rank 16", 32, 36, modulated=True, rank=16),
        _spec("LN modulate 1152 mixed images", 32, 36, modulated=True, one_image=False),
        _spec("1152", 32, 36),
        _spec("4608", 128, 36),
        _spec("4608 rank 16", 128, 36, rank=16),
        _spec("LN modulate 768", 64, 12, modulated=True),
        _spec("LN modulate 1024", 32, 32, modulated=True),
        _spec("4096", 128, 32),
        _spec("LN modulate 384", 32, 12, modulated=True),
        _spec("SiLU 1152 grouped rank 16", 32, 36, silu=True, rank=16, iterations=1),
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
    iterations: int = MAX_ITERATIONS,
    statistic: str = "mean-mad",
    floor: bool = False,
) -> Specialisation:
    """bfloat16 tokens with float32 signs; `outer` = 0 stands for tokens that are not rotated."""
    width = max(outer, 1) * m
    rotated = outer > 0
    folded, columns = fold(outer, m) if rotated else (next_power_of_2(-(-m // TILE)), TILE)
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
    return Specialisation(
        f"{OP}/{name}",
        hadamard_quantize_kernel,
        {
            **pointers,
            **dict.fromkeys(("rows", "tokens_per_image", *strides), "i32"),
            **dict.fromkeys(floats, "fp32"),
        },
        {
            **constants(width, folded, columns, m if rotated else TILE, rotated),
            "ITERATIONS": iterations,
            "SIGNED": True,
            "RESIDUAL": residual,
            "MODULATED": modulated,
            "ONE_IMAGE": one_image,
            "SILU": silu,
            "STATISTIC": statistic,
            "FLOOR": floor,
            "RANK": rank,
            "RANK_STEP": RANK_STEP,
            "RANK_STEPS": -(-rank // RANK_STEP),
        },
        aligned=("tokens_per_image", *strides),
        num_warps=num_warps_of(folded),
        num_stages=NUM_STAGES,
        tensor_cores=rotated or rank > 0,
    )
