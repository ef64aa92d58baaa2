"""What `kernels.offline` compiles of this operation: the widths of DiT-XL/2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernels.fake_quantize.kernel import backward_kernel, forward_kernel
from kernels.fake_quantize.triton import OP, TILE_ELEMENTS, Tile, schedule
from kernels.offline import TOKENS, Specialisation, Work


def compile_specs() -> list[Specialisation]:
    """Both directions at the widths of DiT-XL/2, with the low-rank branch's rotated tokens.

    float32 results at 4608 hold both halves of a long row and spill some 50 bytes a thread.
    """
    specs = []
    for width, outer, dtype in [
        (1152, 32, "bf16"),
        (4608, 128, "bf16"),
        (1152, 32, "fp32"),
        (4608, 128, "fp32"),
    ]:
        tile = Tile(width, 36, outer, 64, max(1, TILE_ELEMENTS // (outer * 64)))
        for direction, kernel, rest in (
            (
                "forward",
                forward_kernel,
                {"STATISTIC": 0, "FLOOR": False, "WANT_ROTATED": True, "SAVE": True},
            ),
            ("backward", backward_kernel, {"STATE": True, "ADD_ROTATED": True}),
        ):
            constants: dict[str, Any] = {
                **tile.constants,
                "ITERATIONS": schedule(TOKENS, tile)[1],
                "ROTATED": True,
                "SIGNED": True,
                "PRECISE": dtype == "fp32",
                **rest,
            }
            specs.append(
                Specialisation(
                    f"{OP}/{direction} {width} {dtype}",
                    kernel,
                    _signature(kernel.arg_names, constants, dtype),
                    constants,
                    _work(tile, 2 if dtype == "bf16" else 4),
                    aligned=["grad_stride", "grad_rotated_stride"],
                    num_warps=tile.num_warps,
                    tensor_cores=True,
                )
            )
    return specs


def _work(tile: Tile, value_bytes: int) -> Work:
    """Either direction: two tensors in and one out or the reverse, and a byte of state a value."""
    programs, iterations = schedule(TOKENS, tile)
    return Work(
        rows=TOKENS,
        elements=TOKENS * tile.width,
        bytes_moved=TOKENS * tile.width * (3 * value_bytes + 1),
        programs=programs,
        loop_trips=iterations,
        operations=2 * TOKENS * tile.width * (tile.inner + tile.constants["DOT"]),
    )


def _signature(names: Sequence[str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    pointers = {"signs_ptr": "fp32", "inner_ptr": "fp16", "outer_ptr": "fp16", "state_ptr": "i8"}
    integers = ("rows", "grad_stride", "grad_rotated_stride")
    return {
        name: f"*{pointers.get(name, dtype)}"
        if name.endswith("_ptr")
        else ("i32" if name in integers else "fp32")
        for name in names
        if name not in constants
    }
