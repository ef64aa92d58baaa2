"""Times on a CPU: calls that take turns, threads, instruction sets, and what the machine can do."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kernels import build, cpu_library
from robuq_bench.errors import UsageError
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.provenance import cpu_label

METHOD = "wall clock around calls that take turns"
CPU_METHOD = "process time of the same calls, all threads together"
MATMUL_SIZE = 2048
COPY_BYTES = 2**27
PEAK_STEPS = 2**20


@dataclass(frozen=True)
class CpuTiming:
    """Seconds per call by the wall clock, and by the processor time of the process."""

    wall: Timing
    processor: Timing


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 3, sample_s: float = 0.05
) -> dict[str, CpuTiming]:
    """Time every call in each of `rounds` rounds, in order and then backwards (A B B A).

    A drift of the machine's speed that is linear over a round hits all alike. A sample is as many
    calls as take `sample_s` seconds together, at least one; a round has two of each.

    Returns:
        Seconds per call, by name.
    """
    counts = {name: _count(call, sample_s) for name, call in calls.items()}
    wall: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    processor: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for _ in range(rounds):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for name in (*calls, *reversed(list(calls))):
            found[name].append(_sample(calls[name], counts[name]))
        for name, samples in found.items():
            wall[name].append(tuple(sample[0] for sample in samples))
            processor[name].append(tuple(sample[1] for sample in samples))
    return {
        name: CpuTiming(
            Timing(tuple(wall[name]), METHOD), Timing(tuple(processor[name]), CPU_METHOD)
        )
        for name in calls
    }


def _count(call: Callable[[], object], sample_s: float) -> int:
    """How many calls take `sample_s`, by the second of two: the first one allocates."""
    call()
    return math.ceil(sample_s / max(_sample(call, 1)[0], 1e-7))


def _sample(call: Callable[[], object], count: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def check_threads(key: str, counts: Sequence[int]) -> None:
    """Raise UsageError if the setting `key` asks for more threads than this process has cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if usable is not None and max(counts) > usable:
        raise UsageError(
            f"{key} asks for {max(counts)} threads, and this machine runs {usable} at once; "
            f"--set '{key}=[{', '.join(str(count) for count in counts if count <= usable) or 1}]'"
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the compiled kernels use `count` threads, for the length of a block."""
    kept = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


@contextmanager
def instructions(name: str | None) -> Iterator[None]:
    """Force an instruction set of `available_instructions()` on the compiled kernels; None: any."""
    kept = os.environ.get(cpu_library.SET_VARIABLE)
    if name is not None:
        os.environ[cpu_library.SET_VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(cpu_library.SET_VARIABLE)
            if kept is not None:
                os.environ[cpu_library.SET_VARIABLE] = kept


def available_instructions() -> tuple[str, ...]:
    """The instruction sets that this CPU has for the compiled kernels, best first.

    None where the kernels are not built.
    """
    try:
        best = cpu_library.best_instruction_set()
    except cpu_library.MissingKernels:
        return ()
    return cpu_library.INSTRUCTION_SETS[best::-1]


@dataclass(frozen=True)
class CpuPeaks:
    """What this CPU reached on plain work with a number of threads, the best sample of each.

    Attributes:
        integer_ops_s: operations per second of a loop in registers, by instruction set.
        fp32_ops_s, bf16_ops_s: of a product of matrices, 2048 cubed.
        copy_bytes_s: bytes read plus bytes written by a copy of 128 MiB.
    """

    threads: int
    integer_ops_s: Mapping[str, float]
    fp32_ops_s: float
    bf16_ops_s: float
    copy_bytes_s: float

    def row(self) -> dict[str, Any]:
        """Columns of a table, in 10^9 a second."""
        sets = {f"{name}_gop_s": rate / 1e9 for name, rate in self.integer_ops_s.items()}
        rest = {"fp32_gop_s": self.fp32_ops_s / 1e9, "bf16_gop_s": self.bf16_ops_s / 1e9}
        return {"threads": self.threads, **sets, **rest, "copy_gb_s": self.copy_bytes_s / 1e9}


def measure_peaks(sets: Sequence[str], *, rounds: int = 3, sample_s: float = 0.05) -> CpuPeaks:
    """Measure them with torch's threads as they are set.

    Args:
        sets: of `available_instructions()`.
        rounds, sample_s: as of `time_in_turns`.
    """
    from kernels.peak import integer_operations

    n = MATMUL_SIZE
    a, b = torch.randn(2, n, n).unbind(0)
    half, other = a.bfloat16(), b.bfloat16()
    source = torch.randint(-128, 128, (COPY_BYTES,), dtype=torch.int8)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: a @ b,
        "bf16": lambda: half @ other,
        "copy": lambda: target.copy_(source),
    }
    work = {"fp32": 2.0 * n**3, "bf16": 2.0 * n**3, "copy": 2.0 * COPY_BYTES}
    for name in sets:

        def loop(name: str = name) -> int:
            with instructions(name):
                return integer_operations(PEAK_STEPS)

        calls[name], work[name] = loop, loop()
    times = time_in_turns(calls, rounds=rounds, sample_s=sample_s)
    rates = {name: work[name] / min(timing.wall.samples_s) for name, timing in times.items()}
    return CpuPeaks(
        threads=torch.get_num_threads(),
        integer_ops_s={name: rates[name] for name in sets},
        fp32_ops_s=rates["fp32"],
        bf16_ops_s=rates["bf16"],
        copy_bytes_s=rates["copy"],
    )


def machine() -> dict[str, Any]:
    """What timings on this CPU depend on: columns of a table with one row."""
    program = build.compiler()
    version = "none"
    if program is not None:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        version = (said.stdout.splitlines() or ["unknown"])[0]
    return {
        "device_name": cpu_label(),
        "instruction_sets": " ".join(available_instructions()) or "kernels not built",
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "compiler": version,
    }


def cache_bytes() -> int:
    """Size of a core's second-level cache; 1 MiB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (AttributeError, ValueError, OSError):
        return 2**20
