"""What `kernels.offline` compiles of this operation: the layers of DiT-XL/2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernels.launch import next_power_of_2
from kernels.offline import TOKENS, Specialisation, Work
from kernels.ternary_matmul.layout import packed_width
from kernels.ternary_matmul.scratch import STEP, dense_kernel, unpack_kernel
from kernels.ternary_matmul.skinny import combine_kernel, skinny_kernel
from kernels.ternary_matmul.tile import tile_kernel
from kernels.ternary_matmul.tiles import (
    MULTIPROCESSORS,
    TALL,
    TILES,
    WARPS,
    WIDE,
    Tile,
    Variant,
    default_tile,
)

_TYPES = {
    "out_ptr": "*bf16",
    "partial_ptr": "*i32",
    "codes_ptr": "*i8",
    "planes_ptr": "*u8",
    "weight_ptr": "*i8",
    "token_scale_ptr": "*fp32",
    "token_offset_ptr": "*fp32",
    "code_sums_ptr": "*i32",
    "channel_scale_ptr": "*fp32",
    "weight_sums_ptr": "*i32",
    "bias_ptr": "*bf16",
    "branch_ptr": "*fp32",
    "up_ptr": "*bf16",
    "gate_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "rows": "i32",
    "size": "i32",
}

_LAYERS: dict[str, tuple[int, int]] = {
    "qkv": (3456, 1152),
    "proj": (1152, 1152),
    "fc1": (4608, 1152),
    "fc2": (1152, 4608),
    "adaln": (6912, 1152),
}
"""Outputs and inputs of the linear layers of DiT-XL/2."""


def _work(
    layer: str, tile: Tile, rank: int, rows: int, groups: int, *, resident: int = 0
) -> Work:
    """Packed weight, codes and 12 bytes a token, branch in; bfloat16 out, with residual in.

    `resident` programs take block after block, at least one step of K each; 0: one each, all steps.
    """
    outputs, width = _LAYERS[layer]
    packed = packed_width(width)
    tokens = rows * (width + 12 + 4 * rank + 2 * outputs * (2 if layer in ("proj", "fc2") else 1))
    blocks = groups * -(-outputs // tile.block_n) * -(-rows // tile.block_m)
    steps = -(-packed // tile.step_bytes)
    return Work(
        rows=rows,
        elements=groups * rows * outputs,
        bytes_moved=groups * (tokens + outputs * (packed + 10 + 2 * rank)),
        programs=min(resident or blocks, blocks) * tile.splits,
        loop_trips=-(-blocks // resident) if resident else -(-steps // tile.splits),
        operations=2 * groups * rows * outputs * width,
        operand_bits=8,
    )


def _specialisation(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    work: Work,
    types: Mapping[str, str] = _TYPES,
    *,
    warps: int = 4,
    stages: int = 3,
) -> Specialisation:
    names = [n for n in kernel.arg_names if n not in constants]
    return Specialisation(
        name=f"ternary_matmul/{name}",
        kernel=kernel,
        signature={n: types.get(n) or _TYPES[n] for n in names},
        constants=constants,
        work=work,
        aligned=("rows", "size"),
        num_warps=warps,
        num_stages=stages,
        tensor_cores="K" in constants,
    )


def _epilogue(layer: str, rank: int, tile: Tile) -> dict[str, Any]:
    """Bias and low rank everywhere, GELU after fc1, gate and residual after proj and fc2."""
    gated = layer in ("proj", "fc2")
    constants: dict[str, Any] = {
        "N": _LAYERS[layer][0],
        "RANK": rank,
        "BLOCK_RANK": max(16, next_power_of_2(max(rank, 1))),
        "GELU": layer == "fc1",
        "TOKENS_PER_IMAGE": 256 if gated else 1,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "PLAIN": False,
    }
    constants |= {} if gated else {"gate_ptr": None, "residual_ptr": None}
    return constants | ({} if rank else {"branch_ptr": None, "up_ptr": None})


def _main(
    kind: Variant, layer: str, tile: Tile, rank: int = 16, rows: int = TOKENS, groups: int = 1
) -> Specialisation:
    width = _LAYERS[layer][1]
    steps = -(-packed_width(width) // tile.step_bytes)
    constants = _epilogue(layer, rank, tile) | {"K": width}
    label = f"{kind} {layer} {tile.block_n}x{tile.block_m}x{4 * tile.step_bytes}"
    if kind == "scratch":
        programs = MULTIPROCESSORS * WARPS // tile.num_warps
        work = _work(layer, tile, rank, rows, groups, resident=programs)
        constants |= {"PROGRAMS": programs, "TURNS": work.loop_trips}
        blocks = {"codes_blocks": tile.block_m, "weight_blocks": tile.block_n}
        types = {name: f"tensordesc<i8[{rows}, {STEP.value}]>" for name, rows in blocks.items()}
        return _specialisation(
            label, dense_kernel, constants, work, types,
            warps=tile.num_warps, stages=tile.num_stages,
        )  # fmt: skip
    constants |= {"STEPS": -(-steps // tile.splits), "STEP_BYTES": tile.step_bytes}
    kernel = tile_kernel
    if kind == "skinny":
        kernel = skinny_kernel
        label += f" splits {tile.splits}"
        constants["SPLITS"] = tile.splits
        if tile.splits == 1:
            constants["partial_ptr"] = None
    work = _work(layer, tile, rank, rows, groups)
    return _specialisation(
        label, kernel, constants, work, warps=tile.num_warps, stages=tile.num_stages
    )


def compile_specs() -> list[Specialisation]:
    """Every layer with the tiles it takes without tuning, and the listed tiles on fc2."""
    kinds: tuple[Variant, ...] = ("tile", "scratch")
    specs = [
        _main(kind, layer, default_tile(kind, TOKENS, *_LAYERS[layer]))
        for kind in kinds
        for layer in ("qkv", "proj", "fc1")
    ]
    specs += [_main("tile", "fc1", tile) for tile in (TALL, WIDE)]
    for kind in kinds:
        specs += [_main(kind, "fc2", tile) for tile in TILES[kind]]
    for rows, groups in ((2, 28), (64, 28), (16, 1), (128, 1)):
        tile = default_tile("skinny", rows, *_LAYERS["adaln"], groups)
        specs.append(_main("skinny", "adaln", tile, rows=rows, groups=groups))
    tile = default_tile("skinny", 256, *_LAYERS["fc2"])
    specs.append(_main("skinny", "fc2", tile, rows=256))
    outputs, width = _LAYERS["fc2"]
    tile, splits = Tile(64, 16, 32, 4, 3), 4
    combine = _epilogue("fc2", 16, tile) | {"SPLITS": splits}
    work = Work(
        rows=256,
        elements=256 * outputs,
        bytes_moved=256 * (outputs * (4 * splits + 2 + 2) + 12 + 4 * 16) + outputs * (10 + 2 * 16),
        programs=-(-outputs // tile.block_n) * (256 // tile.block_m),
    )
    specs.append(_specialisation("combine fc2 64x16", combine_kernel, combine, work))
    size = outputs * packed_width(width)
    work = Work(outputs, 4 * size, 5 * size, programs=-(-size // 4096))
    specs.append(_specialisation("unpack", unpack_kernel, {"BLOCK": 4096}, work))
    return specs
