"""Compile the CPU kernels: `python -m kernels.build [FILE [FLAG...]]`, or when installing.

One shared library without any of torch's headers. It holds the code of every instruction set and
chooses when it runs, so that it is never compiled for the machine at hand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (
    "cpu.cpp",
    "fake_quantize/cpu.cpp",
    "hadamard_quantize/cpu.cpp",
    "normality_sums/cpu.cpp",
    "peak.cpp",
    "quantized_attention/cpu.cpp",
    "ternary_matmul/cpu.cpp",
    "ternary_weight/cpu.cpp",
)
HEADERS = ("cpu.hpp", "hadamard.hpp")
LIBRARY = FOLDER / "_cpu.so"
"""The library, in a checkout and in an installation."""

# Contracted or reordered sums would differ between instruction sets; neither errno nor floating
# point traps are looked at, and they would keep loops from being vectorised.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
OPENMP = "-fopenmp"


class BuildError(RuntimeError):
    """The library was not built; the message says why and what to do."""


def source_hash() -> str | None:
    """Identify the C++ sources; None where they are not installed."""
    paths = [FOLDER / name for name in (*SOURCES, *HEADERS)]
    if not all(path.is_file() for path in paths):
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler: `CXX`, or the first of c++, g++ and clang++ that is installed."""
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def build(target: Path = LIBRARY, extra_flags: Sequence[str] = ()) -> Path:
    """Compile the library, single-threaded where the compiler has no OpenMP, and return `target`.

    Args:
        target: file to write; it is replaced at once, or left as it is.
        extra_flags: for the compiler, behind our own.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    program = compiler()
    if program is None:
        raise BuildError(
            f"no C++ compiler: {os.environ['CXX']!r}, named by CXX, is not on PATH"
            if os.environ.get("CXX")
            else "no C++ compiler: install g++ or clang++, or name one with CXX"
        )
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(FOLDER / name) for name in SOURCES]
    definition = f'-DROBUQ_SOURCE="{source_hash()}"'
    try:
        for openmp in ([OPENMP], []):
            command = [program, *FLAGS, *openmp, definition, *extra_flags, *sources]
            result = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
            if result.returncode == 0:
                os.replace(fresh, target)
                return target
    finally:
        fresh.unlink(missing_ok=True)
    raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")


if __name__ == "__main__":
    target, *flags = sys.argv[1:] or [str(LIBRARY)]
    print(f"compiling {len(SOURCES)} files, half a minute to a minute", file=sys.stderr, flush=True)
    try:
        print(build(Path(target), flags))
    except BuildError as error:
        sys.exit(str(error))
