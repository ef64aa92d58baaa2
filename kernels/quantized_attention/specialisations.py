"""What `kernels.offline` compiles of this operation: DiT-XL/2 and DiT-L/2, at three resolutions."""

from __future__ import annotations

from typing import Any

from kernels.offline import Specialisation, Work
from kernels.quantized_attention.kernel import attention_kernel, keys_values_kernel
from kernels.quantized_attention.triton import constants

_TYPES = {
    "out_ptr": "*bf16",
    "qkv_ptr": "*bf16",
    "keys_ptr": "*i8",
    "key_scale_ptr": "*fp32",
    "values_ptr": "*i8",
    "value_scale_ptr": "*fp32",
}


def compile_specs() -> list[Specialisation]:
    """16 heads of 72 and 64 channels; few images take smaller blocks of queries."""
    specs = []
    for head_dim, tokens, batch in (
        (72, 256, 128),
        (72, 256, 2),
        (72, 1024, 128),
        (64, 64, 128),
        (64, 256, 128),
        (64, 1024, 128),
    ):
        shape = f"D {head_dim} T {tokens} batch {batch}"
        first, second = constants(tokens, 16, head_dim, 127, batch)
        heads = batch * 16
        values = heads * tokens * head_dim
        parts = first["KEY_BLOCKS"] + -(-head_dim // first["BLOCK_C"])
        # Keys and values in, their codes and two scales a token or a channel out.
        work = Work(
            rows=batch * tokens,
            elements=2 * values,
            bytes_moved=2 * 2 * values + 2 * values + 4 * heads * (tokens + head_dim),
            programs=heads * parts,
        )
        specs.append(_specialisation(f"keys and values {shape}", keys_values_kernel, first, work))
        blocks = -(-tokens // int(second["BLOCK_Q"]))
        work = Work(
            rows=batch * tokens,
            elements=values,
            bytes_moved=2 * values + 2 * values + 4 * heads * (tokens + head_dim) + 2 * values,
            programs=heads * blocks,
            loop_trips=-(-tokens // int(second["BLOCK_K"])),
            operations=2 * 2 * values * tokens,
            operand_bits=8,
        )
        specs.append(_specialisation(f"attention {shape}", attention_kernel, second, work))
    return specs


def _specialisation(
    name: str, kernel: Any, launch: dict[str, Any], work: Work
) -> Specialisation:
    constants = {n: value for n, value in launch.items() if n in kernel.arg_names}
    return Specialisation(
        name=f"quantized_attention/{name}",
        kernel=kernel,
        signature={n: _TYPES[n] for n in kernel.arg_names if n not in constants},
        constants=constants,
        work=work,
        num_warps=launch["num_warps"],
        tensor_cores=kernel is attention_kernel,
    )
