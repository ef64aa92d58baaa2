"""What this device reaches on plain work: the ceilings that kernels are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from robuq_bench.measuring.timing import GraphReplay, time_interleaved

COPY_BYTES = 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on one device; a rate that cannot be measured there is None.

    Attributes:
        copy_bytes_s: bytes read plus bytes written per second by a copy of COPY_BYTES.
        bf16_ops_s: operations (two per multiply-accumulate) per second of cuBLAS, 8192 cubed.
        int8_ops_s: the same of torch._int_mm, which need not be the fastest int8 product there is.
    """

    copy_bytes_s: float
    bf16_ops_s: float
    int8_ops_s: float | None

    def row(self) -> dict[str, Any]:
        """Columns of a table, in GB/s and TFLOP/s (10^9, 10^12)."""
        return {
            "copy_gb_s": self.copy_bytes_s / 1e9,
            "bf16_tflop_s": self.bf16_ops_s / 1e12,
            "int8_top_s": None if self.int8_ops_s is None else self.int8_ops_s / 1e12,
        }


def measure_ceilings(
    device: torch.device | str, *, rounds: int = 3, round_s: float = 0.1
) -> Ceilings:
    """Measure copy bandwidth and matrix products on random data, interleaved."""
    source = torch.randint(-128, 128, (COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    n = MATMUL_SIZE
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    watches = {
        "copy": GraphReplay([lambda: target.copy_(source)]),
        "bf16": GraphReplay([lambda: a @ b]),
    }
    # The second operand column-major, the layout that int8 tensor cores read.
    x, w = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    try:
        watches["int8"] = GraphReplay([lambda: torch._int_mm(x, w.t())])
    except RuntimeError:
        torch.cuda.synchronize()
    times = time_interleaved(watches, rounds=rounds, round_s=round_s)
    rates = {name: 2.0 * n**3 / timing.median_s for name, timing in times.items()}
    return Ceilings(
        copy_bytes_s=2 * COPY_BYTES / times["copy"].median_s,
        bf16_ops_s=rates["bf16"],
        int8_ops_s=rates.get("int8"),
    )
