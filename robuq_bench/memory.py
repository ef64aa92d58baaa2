"""Freed memory is kept for the next layer, which asks for as much, rather than given back.

Every forward pass on a CPU frees and asks for the same activations. glibc gives large ones back to
the system, which then clears their pages again: thousands of page faults in each pass.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLE = "ROBUQ_MALLOC"
"""Set to "off", it leaves the C library's allocation as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Some versions of glibc refuse a threshold above 32 MiB.
_MMAP_THRESHOLDS = (2**30, 2**25)
_TRIM_THRESHOLD = 2**31 - 1

_state: dict[str, int] | None = None


def keep_freed_memory() -> dict[str, int] | None:
    """Have glibc keep what is freed, for this process; return `malloc_settings()`.

    Nothing is done on other systems, with `ROBUQ_MALLOC=off`, or where the environment sets glibc's
    own `MALLOC_*_` variables or malloc tunables.
    """
    global _state
    if _state is None and _may_set():
        mallopt = ctypes.CDLL(None).mallopt
        taken = next((size for size in _MMAP_THRESHOLDS if mallopt(_M_MMAP_THRESHOLD, size)), None)
        if taken is not None and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD):
            _state = {"mmap_threshold": taken, "trim_threshold": _TRIM_THRESHOLD}
    return _state


def malloc_settings() -> dict[str, int] | None:
    """Thresholds in bytes that `keep_freed_memory` set; None while they are the system's."""
    return _state


def _may_set() -> bool:
    is_set_already = any(
        name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "glibc.malloc" in value)
        for name, value in os.environ.items()
    )
    is_glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    return is_glibc and not is_set_already and os.environ.get(VARIABLE) != "off"
