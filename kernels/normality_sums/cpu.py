"""Sums of sorted tokens by the compiled CPU kernel `cpu.cpp`, on one thread."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.cpu_library import call, fields, instruction_set
from kernels.launch import KernelInputError, check_tensor
from kernels.plain import is_plain

OP = "normality_sums"
SUMS = (
    *("mean", "std", "shapiro_w", "skewness", "kurtosis", "anderson_a2", "ks_distance"),
    *("wasserstein", "entropy", "l3"),
)
"""In the order of `Sum` in cpu.cpp."""


class _Arguments(ctypes.Structure):
    _fields_ = fields("x weights density sums", "rows n window", "", "float64 instruction_set")


def normality_sums(x: Tensor, weights: Tensor, density: Tensor, window: int) -> Tensor:
    """Statistics of sorted tokens that need a pass over their entries, in float64.

    `entropy` is the mean of ln(x_(i + window) - x_(i - window)), indices clamped, of the
    token over its standard deviation. The others are columns of `TokenStatistics` in
    `robuq_bench.normality.statistics`. All instruction sets give the same bits.

    Args:
        x: [T, n] float32 or float64, each row sorted, NaN last; this is not checked.
        weights: [n] float64 of Shapiro and Wilk.
        density: [n + 1] float64, the standard normal density at the quantiles of i / n.
        window: half width of the spacings, at least 1.

    Returns:
        [T, SUMS] float64; NaN for a token that is constant, not finite, or of a spread that
        underflows.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or no window.
        MissingKernels: the library is not built, see `kernels.cpu_library`.
    """
    if x.device.type != "cpu":
        raise KernelInputError(f"{OP}: x is on {x.device}; this kernel needs the CPU")
    check_tensor(OP, "x", x, shape=(None, None), dtypes=(torch.float32, torch.float64), like=x)
    if not is_plain(x, weights, density):
        raise KernelInputError(f"{OP}: x must be in memory, and cannot be traced")
    rows, n = x.shape
    for name, tensor, size in (("weights", weights, n), ("density", density, n + 1)):
        check_tensor(OP, name, tensor, shape=(size,), dtypes=(torch.float64,), like=x)
    if n < 2 or window < 1:
        raise KernelInputError(f"{OP}: needs 2 entries and a window of 1, got {n} and {window}")
    sums = torch.empty((rows, len(SUMS)), dtype=torch.float64, device="cpu")
    pointers = (tensor.data_ptr() for tensor in (x, weights, density, sums))
    arguments = _Arguments(*pointers, rows, n, window, x.dtype == torch.float64, instruction_set())
    call("robuq_normality_sums", arguments)
    return sums
