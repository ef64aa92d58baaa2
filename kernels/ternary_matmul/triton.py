"""Ternary weight times int8 codes on the GPU: launchers, choice of variant, and what to compile.

`reference.py` defines the result. Launchers neither read a tensor's values nor wait for the device,
so they run under CUDA graph capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import INTERPRETED, KernelInputError, next_power_of_2
from kernels.ternary_matmul.layout import PLANES, packed_width
from kernels.ternary_matmul.operands import Operands, check_operands
from kernels.ternary_matmul.scratch import STEP, dense_kernel, unpack_kernel
from kernels.ternary_matmul.skinny import combine_kernel, skinny_kernel
from kernels.ternary_matmul.tile import tile_kernel
from kernels.ternary_matmul.tiles import (
    ALIGNED_WIDTH,
    VARIANTS,
    WARPS,
    Tile,
    Variant,
    candidates,
    choose_variant,
    default_tile,
)

COMBINE_TILE = (64, 16)
"""Outputs and tokens of one program that adds splits of K."""

UNPACK_BLOCK = 4096
"""Packed bytes of one program that fills the scratch."""

_Shape = tuple[int, int, int, int, str]
_timed: dict[_Shape, tuple[Variant, Tile]] = {}
_tuning = False

_GROUPED_ARGUMENTS = ("token_scale", "token_offset", "code_sums", "channel_scale", "weight_sums",
                      "bias", "branch", "up", "out_dtype")  # fmt: skip
_ARGUMENTS = (*_GROUPED_ARGUMENTS, "gelu", "gate", "residual", "tokens_per_image")


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
    variant: Variant | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`reference.ternary_matmul` as a kernel; shapes and dtypes are described there.

    Args:
        variant: "tile" unpacks in registers, "skinny" splits K for few tokens, "scratch" unpacks
            to memory first; None takes what `autotune` found for the shape, or `choose_variant`.
        tile: block sizes and launch settings; None takes those of the variant's table.

    Returns:
        [M, N] in `out_dtype`.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, K beyond int32 sums,
            or an unknown variant.
    """
    x = check_operands(
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
    )
    return _product(x, variant, tile)


def grouped_ternary_matmul(
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
    out_dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> Tensor:
    """`reference.grouped_ternary_matmul` as one launch of the skinny kernel.

    Args:
        tile: block sizes and launch settings; None takes what `autotune` found, or the table's.

    Returns:
        [G, M, N] in `out_dtype`.

    Raises:
        KernelInputError: as `ternary_matmul`, and for more than 65535 groups.
    """
    x = check_operands(
        "grouped_ternary_matmul",
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
        out_dtype=out_dtype,
        grouped=True,
    )
    if x.groups > 65535:
        raise KernelInputError(f"grouped_ternary_matmul: {x.groups} groups, at most 65535 work")
    return _product(x, "skinny", tile, grouped=True)


def autotune(codes: Tensor, planes: Tensor, **arguments: Any) -> tuple[Variant, Tile]:
    """Time the pruned list of tiles on the GPU; later calls of that shape take the fastest.

    The result is held in memory, by the power of two at or above M, and N, K, G and device. Call
    it before capturing or compiling: it launches and waits.

    Args:
        codes, planes, arguments: as `ternary_matmul`, or `grouped_ternary_matmul` when `codes` has
            three dimensions.

    Returns:
        Fastest variant and tile.

    Raises:
        KernelInputError: no CUDA device; an empty product; as the timed function.
    """
    if codes.device.type != "cuda" or INTERPRETED:
        raise KernelInputError("ternary_matmul: autotune times kernels and needs a CUDA device")
    if 0 in codes.shape or 0 in planes.shape:
        raise KernelInputError("ternary_matmul: autotune cannot time an empty product")
    grouped = codes.dim() == 3
    rows, width = codes.shape[-2:]
    outputs, groups = planes.shape[-2], codes.shape[0] if grouped else 1
    product: Callable[..., Tensor] = grouped_ternary_matmul if grouped else ternary_matmul
    best: tuple[float, Variant, Tile] | None = None
    for variant, tile in candidates(rows, outputs, width):
        if grouped and variant != "skinny":
            continue
        chosen: dict[str, Any] = {"tile": tile} if grouped else {"variant": variant, "tile": tile}
        run = partial(product, codes, planes, **chosen, **arguments)
        try:
            elapsed = float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            continue
        if best is None or elapsed < best[0]:
            best = (elapsed, variant, tile)
    if best is None:
        found = default_choice(rows, outputs, width, groups, grouped=grouped)
    else:
        found = best[1:]
    _timed[_shape(rows, outputs, width, groups, codes.device)] = found
    return found


@contextmanager
def tuning() -> Iterator[None]:
    """Inside, a product of a shape that was not timed is timed first, as by `autotune`."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def default_choice(
    rows: int, outputs: int, width: int, groups: int = 1, *, grouped: bool = False
) -> tuple[Variant, Tile]:
    """Variant and tile of a shape that was not timed."""
    variant = "skinny" if grouped else choose_variant(rows, outputs, width)
    return variant, default_tile(variant, rows, outputs, width, groups)


def _shape(rows: int, outputs: int, width: int, groups: int, device: torch.device) -> _Shape:
    return next_power_of_2(rows), outputs, width, groups, str(device)


def _product(
    x: Operands, variant: Variant | None, tile: Tile | None, grouped: bool = False
) -> Tensor:
    shape = (x.groups, x.rows, x.outputs) if grouped else (x.rows, x.outputs)
    out = torch.empty(shape, dtype=x.out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    if x.outputs * packed_width(x.width) * PLANES >= 2**31:
        raise KernelInputError(
            f"ternary_matmul: a weight of {x.outputs} x {x.width} has more elements than int32 "
            "offsets reach; split its outputs"
        )
    if variant is None or (tile is None and grouped):
        key = _shape(x.rows, x.outputs, x.width, x.groups, x.codes.device)
        timed = _timed.get(key)
        if timed is None and _tuning:
            names = _GROUPED_ARGUMENTS if grouped else _ARGUMENTS
            timed = autotune(x.codes, x.planes, **{name: getattr(x, name) for name in names})
        if timed is None:
            timed = default_choice(x.rows, x.outputs, x.width, x.groups, grouped=grouped)
        variant, timed_tile = timed
        tile = timed_tile if tile is None else tile
    elif variant not in VARIANTS:
        raise KernelInputError(f"ternary_matmul: variant must be one of {', '.join(VARIANTS)}")
    if tile is None:
        tile = default_tile(variant, x.rows, x.outputs, x.width, x.groups)
    if variant == "skinny":
        _skinny(x, out, tile)
    elif variant == "scratch":
        _scratch(x, out, tile)
    else:
        _tile(x, out, tile)
    return out


def _vectors(x: Operands) -> tuple[Tensor | None, ...]:
    """Pointers of the epilogue, in the order of every kernel's arguments."""
    return (
        x.token_scale,
        x.token_offset,
        x.code_sums,
        x.channel_scale,
        x.weight_sums,
        x.bias,
        x.branch,
        x.up,
        x.gate,
        x.residual,
    )


def _epilogue(x: Operands) -> dict[str, Any]:
    """Constants of the epilogue."""
    return {
        "N": x.outputs,
        "RANK": x.rank,
        "BLOCK_RANK": max(16, next_power_of_2(max(x.rank, 1))),
        "GELU": x.gelu,
        "TOKENS_PER_IMAGE": x.tokens_per_image,
        "PLAIN": INTERPRETED,
    }


def _blocks(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _steps(width: int, tile: Tile) -> tuple[int, int]:
    """Steps per split of K, and the number of splits that have any work."""
    total = -(-packed_width(width) // tile.step_bytes)
    steps = -(-total // tile.splits)
    return steps, -(-total // steps)


def _tiles(x: Operands, block_n: int, block_m: int) -> int:
    return -(-x.outputs // block_n) * -(-x.rows // block_m)


def _tile(x: Operands, out: Tensor, tile: Tile) -> None:
    steps, _ = _steps(x.width, replace(tile, splits=1))
    tile_kernel[(_tiles(x, tile.block_n, tile.block_m),)](
        out,
        x.codes,
        x.planes,
        *_vectors(x),
        x.rows,
        K=x.width,
        STEPS=steps,
        STEP_BYTES=tile.step_bytes,
        **_epilogue(x),
        **_blocks(tile),
    )


def _skinny(x: Operands, out: Tensor, tile: Tile) -> None:
    steps, splits = _steps(x.width, tile)
    sums = None
    if splits > 1:
        sums = torch.empty(
            (x.groups, splits, x.rows, x.outputs), dtype=torch.int32, device=out.device
        )
    skinny_kernel[(_tiles(x, tile.block_n, tile.block_m), splits, x.groups)](
        out,
        sums,
        x.codes,
        x.planes,
        *_vectors(x),
        x.rows,
        K=x.width,
        SPLITS=splits,
        STEPS=steps,
        STEP_BYTES=tile.step_bytes,
        **_epilogue(x),
        **_blocks(tile),
    )
    if sums is not None:
        block_n, block_m = COMBINE_TILE
        combine_kernel[(_tiles(x, block_n, block_m), 1, x.groups)](
            out,
            sums,
            *_vectors(x),
            x.rows,
            SPLITS=splits,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            **_epilogue(x),
        )


def _scratch(x: Operands, out: Tensor, tile: Tile) -> None:
    if x.width % ALIGNED_WIDTH or x.codes.data_ptr() % ALIGNED_WIDTH:
        raise KernelInputError(
            f"ternary_matmul: variant scratch copies rows of a multiple of {ALIGNED_WIDTH} bytes "
            f"from memory aligned to them; K is {x.width}. Take variant tile"
        )
    weight = torch.empty((x.outputs, 4 * x.planes.shape[1]), dtype=torch.int8, device=out.device)
    unpack_kernel[(-(-x.planes.numel() // UNPACK_BLOCK),)](
        x.planes, weight, x.planes.numel(), BLOCK=UNPACK_BLOCK
    )
    programs, turns = _turns(x, tile)
    dense_kernel[(programs,)](
        out,
        TensorDescriptor.from_tensor(x.codes, [tile.block_m, STEP.value]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, STEP.value]),
        *_vectors(x),
        x.rows,
        K=x.width,
        PROGRAMS=programs,
        TURNS=turns,
        **_epilogue(x),
        **_blocks(tile),
    )


def _turns(x: Operands, tile: Tile) -> tuple[int, int]:
    """Programs that fill the device, and blocks that each takes."""
    blocks = _tiles(x, tile.block_n, tile.block_m)
    programs = min(blocks, _processors(x.codes.device) * WARPS // tile.num_warps)
    return programs, -(-blocks // programs)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter has one program at a time
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
