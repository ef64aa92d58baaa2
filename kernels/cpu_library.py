"""The compiled library of CPU kernels: where it is, what it runs with, calls into it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any

from kernels.build import FOLDER, LIBRARY, source_hash

INSTRUCTION_SETS = ("portable", "avx2", "avx512-vnni", "amx-int8")
"""Slowest first; a CPU that has one has those before it."""

PATH_VARIABLE = "ROBUQ_CPU_KERNELS"
"""Environment variable: another library file."""

SET_VARIABLE = "ROBUQ_CPU_INSTRUCTIONS"
"""Environment variable: one of `INSTRUCTION_SETS`, for tests and comparisons."""


class MissingKernels(RuntimeError):  # noqa: N818 - the name says what happened
    """The compiled kernels cannot be used; the message says why and what to do."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once.

    Raises:
        MissingKernels: it was not built, was built from other sources, or cannot be loaded.
    """
    path = _path()
    try:
        library = ctypes.CDLL(str(path))
        library.robuq_source.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise MissingKernels(
            f"the CPU kernels in {path} cannot be loaded ({error}); run python -m kernels.build"
        ) from error
    if source_hash() not in (None, library.robuq_source().decode()):
        raise MissingKernels(
            f"{path} was built from other sources; run python -m kernels.build again"
        )
    return library


def _path() -> Path:
    chosen = os.environ.get(PATH_VARIABLE)
    if chosen:
        return Path(chosen)
    found = [LIBRARY] if LIBRARY.is_file() else sorted(FOLDER.glob("_cpu.*.so"))
    if not found:
        raise MissingKernels(
            "the CPU kernels are not built: run python -m kernels.build, which needs a C++ compiler"
        )
    return found[0]


@functools.cache
def best_instruction_set() -> int:
    """Index into `INSTRUCTION_SETS` of the best that this CPU has."""
    return int(load().robuq_instruction_set())


def instruction_set() -> int:
    """Index into `INSTRUCTION_SETS` of what a kernel runs with now.

    Raises:
        MissingKernels: the library cannot be used, or this CPU lacks what the variable asks for.
    """
    best = best_instruction_set()
    chosen = os.environ.get(SET_VARIABLE)
    if not chosen:
        return best
    if chosen not in INSTRUCTION_SETS[: best + 1]:
        raise MissingKernels(
            f"{SET_VARIABLE}={chosen}: this CPU ({platform.machine()}) has "
            f"{', '.join(INSTRUCTION_SETS[: best + 1])}"
        )
    return INSTRUCTION_SETS.index(chosen)


def is_usable() -> bool:
    """Whether there is a library.

    Raises:
        MissingKernels: the file that `PATH_VARIABLE` names cannot be used.
    """
    try:
        load()
    except MissingKernels:
        if os.environ.get(PATH_VARIABLE):
            raise
        return False
    return True


def describe() -> str:
    """What the kernels run with, for a report.

    Raises:
        MissingKernels: as `instruction_set`.
    """
    threads = "OpenMP" if load().robuq_has_openmp() else "one thread, built without OpenMP"
    return f"{INSTRUCTION_SETS[instruction_set()]}, {threads}"


def call(function: str, arguments: ctypes.Structure) -> int:
    """Run `function`, which releases the GIL, and return its status, other than out of memory.

    Raises:
        MemoryError: there is no room for the scratch memory of the kernel.
    """
    run: Any = getattr(load(), function)
    status = int(run(ctypes.byref(arguments)))
    if status == 1:
        raise MemoryError(f"{function}: no memory for its scratch space")
    return status


def fields(pointers: str, int64: str, float32: str, int32: str) -> list[tuple[str, Any]]:
    """Fields of a `ctypes.Structure` in this order, names separated by spaces."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int64) for name in int64.split()),
        *((name, ctypes.c_float) for name in float32.split()),
        *((name, ctypes.c_int32) for name in int32.split()),
    ]
