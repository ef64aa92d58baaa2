"""Compile every kernel for sm_90 without a GPU, and read what came out.

`python -m kernels.offline [--json] [NAME ...]`. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import INTERPRETED

OPERATIONS = (
    "hadamard_quantize",
    "ternary_matmul",
    "quantized_attention",
    "fake_quantize",
    "ternary_weight",
)
TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Specialisation:
    """One kernel with the constants it is launched with.

    Attributes:
        name: "operation/what it is".
        kernel: the jitted function.
        signature: Triton type of every run-time argument, e.g. {"x_ptr": "*bf16", "rows": "i32"}.
        constants: value of every constexpr argument.
        aligned: run-time arguments divisible by 16 (pointers are taken to be).
        num_warps, num_stages: as launched.
        tensor_cores: whether the machine code must use them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a specialisation holds.

    `opcodes` counts instructions by mnemonic without suffixes; `spill_bytes` is the stack frame;
    `tensor_cores` is what the specialisation says, `tensor_core_instructions` what was found.
    """

    name: str
    tensor_cores: bool
    triton: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    instructions: int
    loop_instructions: int
    tensor_core_instructions: int
    opcodes: dict[str, int] = field(default_factory=dict)


def compile_offline(spec: Specialisation) -> Compiled:
    """Compile for sm_90 and disassemble with the tools that ship with Triton."""
    names = list(spec.kernel.arg_names)
    signature = {n: "constexpr" if n in spec.constants else spec.signature[n] for n in names}
    attrs = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in names
        if n not in spec.constants and (signature[n].startswith("*") or n in spec.aligned)
    }
    source = ASTSource(
        fn=spec.kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in spec.constants.items()},
        attrs=attrs,
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("cuobjdump", "-sass", str(cubin))
    opcodes, loop = _read_sass(sass)
    return Compiled(
        name=spec.name,
        tensor_cores=spec.tensor_cores,
        triton=triton.__version__,
        registers=int(_find(r"REG:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        spill_bytes=int(_find(r"STACK:(\d+)", usage)),
        instructions=sum(opcodes.values()),
        loop_instructions=loop,
        tensor_core_instructions=sum(n for op, n in opcodes.items() if op.endswith("MMA")),
        opcodes=dict(sorted(opcodes.items())),
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed nothing that matches {pattern}:\n{text}")
    return match.group(1)


def _read_sass(sass: str) -> tuple[dict[str, int], int]:
    """Opcodes of the kernel, and the instructions of its longest loop (0 without one)."""
    opcodes: dict[str, int] = {}
    addresses: list[int] = []
    jumps: list[tuple[int, int]] = []
    pattern = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
    for address, opcode, rest in pattern.findall(sass):
        position = int(address, 16)
        addresses.append(position)
        if opcode == "NOP":
            continue
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode == "BRA" and target and int(target.group(1), 16) < position:
            jumps.append((int(target.group(1), 16), position))
    loops = [sum(start <= a <= end for a in addresses) for start, end in jumps]
    return opcodes, max(loops, default=0)


def specialisations() -> list[Specialisation]:
    """Those of every operation, as `compile_specs()` of its `specialisations.py` lists them."""
    found: list[Specialisation] = []
    for operation in OPERATIONS:
        found += import_module(f"kernels.{operation}.specialisations").compile_specs()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.offline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("names", nargs="*", help="only names that begin with one of these")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: its kernels cannot be compiled; unset it")
    known = specialisations()
    for name in options.names:
        if not any(spec.name.startswith(name) for spec in known):
            parser.error(f"no kernel begins with {name!r}; operations: {', '.join(OPERATIONS)}")
    chosen = [s for s in known if not options.names or s.name.startswith(tuple(options.names))]
    rows = [compile_offline(spec) for spec in chosen]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    for row in rows:
        print(
            f"{row.name:56} {row.registers:4} registers  {row.spill_bytes:5} B spilled  "
            f"{row.shared_bytes / 1024:6.1f} KiB shared  {row.instructions:5} instructions  "
            f"loop {row.loop_instructions:5}  tensor core {row.tensor_core_instructions:4}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
