"""What `kernels.offline` compiles of this operation: weights of DiT-XL/2."""

from __future__ import annotations

from typing import Any

from kernels.offline import Specialisation, Work
from kernels.ternary_weight.triton import (
    OP,
    TILE_ELEMENTS,
    absmean_kernel,
    absolute_sums_kernel,
    clamp_kernel,
    tile_of,
    twn_kernel,
)


def compile_specs() -> list[Specialisation]:
    """Both rules on the weights of DiT-XL/2's feed-forward network, bfloat16 results."""
    specs = []
    for rows, width in [(4608, 1152), (1152, 4608)]:
        constants, warps = tile_of(width)
        for name, kernel, pointers in (
            ("twn", twn_kernel, {"weight_ptr": "*fp32", "out_ptr": "*bf16"}),
            ("absmean sums", absolute_sums_kernel, {"weight_ptr": "*fp32", "sums_ptr": "*fp32"}),
            (
                "absmean",
                absmean_kernel,
                {"weight_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*bf16"},
            ),
        ):
            signature: dict[str, Any] = {**pointers, "rows": "i32"}
            specs.append(
                Specialisation(
                    f"{OP}/{name} {rows}x{width}",
                    kernel,
                    signature,
                    constants,
                    Work(
                        rows=rows,
                        elements=rows * width,
                        # float32 in; bfloat16 out, or nothing but a sum of every program
                        bytes_moved=rows * width * (4 if kernel is absolute_sums_kernel else 6),
                        programs=-(-rows // constants["ROWS"]),
                    ),
                    aligned=["rows"],
                    num_warps=warps,
                )
            )
    specs.append(
        Specialisation(
            f"{OP}/backward",
            clamp_kernel,
            {"grad_ptr": "*bf16", "out_ptr": "*fp32", "elements": "i32"},
            {"CLAMP": True, "BLOCK": TILE_ELEMENTS},
            Work(
                rows=4608,
                elements=4608 * 1152,
                bytes_moved=4608 * 1152 * 6,
                programs=-(-4608 * 1152 // TILE_ELEMENTS),
            ),
            aligned=["elements"],
            num_warps=8,
        )
    )
    return specs
