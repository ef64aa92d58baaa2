"""The integer operations that a CPU does at most: what the compiled products are held against."""

from __future__ import annotations

import ctypes

import torch

from kernels.cpu_library import instruction_set, load


def integer_operations(steps: int) -> int:
    """Multiply and add in registers on torch's threads; two operations a multiply-accumulate.

    Args:
        steps: of each thread, 0 or more; one takes about 2 (portable) to 30 ns (amx-int8).

    Returns:
        Operations done by all threads.

    Raises:
        MissingKernels: the library cannot be used, see `kernels.cpu_library`.
    """
    instructions = instruction_set()
    peak = load().robuq_peak
    peak.restype = ctypes.c_int64
    peak.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    return int(peak(instructions, torch.get_num_threads(), steps))
