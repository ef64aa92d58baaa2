"""Compile every kernel for sm_90 without a GPU, read what came out, and model its time on an H100.

`python -m kernels.offline [--json] [--keep FOLDER] [NAME ...]`. Run it without TRITON_INTERPRET.

The model: a launch takes at least the longest of
    memory  bytes moved / 3.35 TB/s
    issue   instructions of all warps / (132 multiprocessors x 4 schedulers x 1.7 GHz)
    tensor  operations of the products / 989 (16-bit) or 1979 (8-bit) TOPS
where a warp runs its longest loop as often as stated and every other instruction once, those of
branches that are hardly ever taken included. Nothing waits in it, so a GPU is slower, most of all
where few warps fit a multiprocessor. Data-sheet rates of H100 SXM; 1.7 GHz is an assumption.
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

TOKENS = 32768
"""Tokens of a launch that is modelled: 64 images of DiT-XL/2 with guidance."""
MULTIPROCESSORS = 132
ISSUE_RATE = MULTIPROCESSORS * 4 * 1.7e9
"""Instructions of a warp per second."""
BYTE_RATE = 3.35e12
TENSOR_RATES = {16: 989.4e12, 8: 1978.9e12}
"""Dense operations per second, by the bits of the operands."""
WARP = 32
REGISTERS = 65536
SHARED_BYTES = 227 * 1024
MAX_WARPS = 64


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        rows: tokens, or rows of a weight.
        elements: values that instructions are counted by.
        bytes_moved: least bytes from and to memory.
        programs: of the launch.
        loop_trips: times that a program runs its longest loop.
        operations: of its matrix products, two per multiply-accumulate, without padding.
        operand_bits: of the products, 16 or 8.
    """

    rows: int
    elements: int
    bytes_moved: int
    programs: int
    loop_trips: int = 1
    operations: int = 0
    operand_bits: int = 16


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
        work: of a typical launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    work: Work
    aligned: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a specialisation holds.

    `opcodes` counts instructions by mnemonic without suffixes; `spill_bytes` is the stack frame;
    `tensor_cores` is what the specialisation says, `tensor_core_instructions` what was found;
    `resident_warps` fit a multiprocessor; `instructions_per_element` is of threads. Times are those
    of the model, `least_us` the longest and `limit` its name.
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
    resident_warps: int
    rows: int
    bytes_moved: int
    instructions_per_element: float
    memory_us: float
    issue_us: float
    tensor_us: float
    least_us: float
    limit: str
    opcodes: dict[str, int] = field(default_factory=dict)


def compile_offline(spec: Specialisation, keep: Path | None = None) -> Compiled:
    """Compile for sm_90 and disassemble with the tools that ship with Triton.

    Args:
        keep: folder for the TTGIR, PTX and SASS, in files named after the specialisation.
    """
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
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", spec.name)
        for kind, text in {**compiled.asm, "sass": sass}.items():
            if kind in ("ttgir", "ptx", "sass"):
                (keep / f"{name}.{kind}").write_text(text)
    opcodes, loop = _read_sass(sass)
    registers, shared = int(_find(r"REG:(\d+)", usage)), compiled.metadata.shared
    issued = sum(opcodes.values()) + (spec.work.loop_trips - 1) * loop
    issued *= spec.work.programs * spec.num_warps
    times = {
        "memory": spec.work.bytes_moved / BYTE_RATE * 1e6,
        "issue": issued / ISSUE_RATE * 1e6,
        "tensor": spec.work.operations / TENSOR_RATES[spec.work.operand_bits] * 1e6,
    }
    limit = max(times, key=lambda name: times[name])
    return Compiled(
        name=spec.name,
        tensor_cores=spec.tensor_cores,
        triton=triton.__version__,
        registers=registers,
        shared_bytes=shared,
        spill_bytes=int(_find(r"STACK:(\d+)", usage)),
        instructions=sum(opcodes.values()),
        loop_instructions=loop,
        tensor_core_instructions=sum(n for op, n in opcodes.items() if op.endswith("MMA")),
        resident_warps=_resident_warps(registers, shared, spec.num_warps),
        rows=spec.work.rows,
        bytes_moved=spec.work.bytes_moved,
        instructions_per_element=issued * WARP / spec.work.elements,
        memory_us=times["memory"],
        issue_us=times["issue"],
        tensor_us=times["tensor"],
        least_us=times[limit],
        limit=limit,
        opcodes=dict(sorted(opcodes.items())),
    )


def _resident_warps(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Warps of one multiprocessor; registers are given out by eight a thread, memory by 1 KiB."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * WARP * num_warps)
    by_memory = SHARED_BYTES // (shared_bytes + 1024)
    return min(by_registers, by_memory, MAX_WARPS // num_warps) * num_warps


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
    parser.add_argument("--keep", type=Path, help="folder for TTGIR, PTX and SASS", metavar="FOLDER")
    parser.add_argument("names", nargs="*", help="only names that begin with one of these")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: its kernels cannot be compiled; unset it")
    known = specialisations()
    for name in options.names:
        if not any(spec.name.startswith(name) for spec in known):
            parser.error(f"no kernel begins with {name!r}; operations: {', '.join(OPERATIONS)}")
    chosen = [s for s in known if not options.names or s.name.startswith(tuple(options.names))]
    rows = [compile_offline(spec, options.keep) for spec in chosen]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print(
        f"{'least time on an H100, modelled, not measured':60}   rows   least us by      memory  "
        "issue tensor  per element   MB  registers spilled shared KiB  warps  instructions  loop"
    )
    for row in rows:
        print(
            f"{row.name:60} {row.rows:6} {row.least_us:10.1f} {row.limit:7} {row.memory_us:6.1f} "
            f"{row.issue_us:6.1f} {row.tensor_us:6.1f} {row.instructions_per_element:12.1f} "
            f"{row.bytes_moved / 1e6:5.0f} {row.registers:9} {row.spill_bytes:7} "
            f"{row.shared_bytes / 1024:10.1f} {row.resident_warps:6} {row.instructions:13} "
            f"{row.loop_instructions:5}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
