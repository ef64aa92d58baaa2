"""RobuQ-Bench: quantize a Diffusion Transformer by a plan, judge it on a workload, keep the run.

    from robuq_bench import load_plan, quantize_
    quantize_(model, load_plan("a4"))

Names are loaded on first use, so that `import robuq_bench` and every `--help` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Workload, load_plan, load_workload
    from robuq_bench.quantization.convert import quantize_

__version__ = "0.1.0"

__all__ = ["Plan", "Workload", "__version__", "load_plan", "load_workload", "quantize_"]

_HOME = {
    "Plan": "robuq_bench.config",
    "Workload": "robuq_bench.config",
    "load_plan": "robuq_bench.config",
    "load_workload": "robuq_bench.config",
    "quantize_": "robuq_bench.quantization.convert",
}


def __getattr__(name: str) -> object:
    """Import the module that holds the public name `name`; AttributeError for any other."""
    if name not in _HOME:
        raise AttributeError(f"module 'robuq_bench' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
