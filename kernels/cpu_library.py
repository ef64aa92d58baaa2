"""The compiled library of CPU kernels: where it is, what it runs with, calls into it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any

from kernels.build import LIBRARY, source_hash

INSTRUCTION_SETS = ("portable", "avx2", "avx512-vnni", "amx-int8")
"""Slowest first; a CPU that has one has those before it."""

PATH_VARIABLE = "ROBUQ_CPU_KERNELS"
"""Environment variable: another library file, or "off", for everything to go without."""

OFF = "off"

SET_VARIABLE = "ROBUQ_CPU_INSTRUCTIONS"
"""Environment variable: one of `INSTRUCTION_SETS`, for tests and comparisons."""


class MissingKernels(RuntimeError):  # noqa: N818 - the name says what happened
    """The compiled kernels cannot be used; the message says why and what to do."""


def load() -> ctypes.CDLL:
    """The library, looked for once for each value of `PATH_VARIABLE`, which is read at every call.

    Raises:
        MissingKernels: it was not built, was built from other sources, cannot be loaded, or is
            switched off.
    """
    found = _load(_chosen())
    if isinstance(found, str):
        raise MissingKernels(found)
    return found


def _chosen() -> str:
    """What `PATH_VARIABLE` says; "off" in any case is one word."""
    text = os.environ.get(PATH_VARIABLE, "")
    return OFF if text.strip().lower() == OFF else text


@functools.cache
def _load(chosen: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if chosen == OFF:
        return f"the CPU kernels are switched off by {PATH_VARIABLE}=off"
    if chosen:
        path = Path(chosen)
    else:
        if not LIBRARY.is_file():
            return (
                "the CPU kernels are not built: run python -m kernels.build, which needs a C++ "
                "compiler"
            )
        path = LIBRARY
    try:
        library = ctypes.CDLL(str(path))
        library.robuq_source.restype = ctypes.c_char_p
        source = library.robuq_source().decode()
    except (OSError, AttributeError) as error:
        return f"the CPU kernels in {path} cannot be loaded ({error}); run python -m kernels.build"
    if source_hash() not in (None, source):
        return f"{path} was built from other sources; run python -m kernels.build again"
    return library


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
    """Whether there is a library; False where it is switched off.

    Raises:
        MissingKernels: the file that `PATH_VARIABLE` names cannot be used.
    """
    chosen = _chosen()
    found = _load(chosen)
    if isinstance(found, str) and chosen not in ("", OFF):
        raise MissingKernels(found)
    return not isinstance(found, str)


def why_not() -> str | None:
    """Why there is no library; None where there is one, or where it was switched off."""
    chosen = _chosen()
    found = _load(chosen)
    return found if isinstance(found, str) and chosen != OFF else None


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
