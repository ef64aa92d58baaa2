"""RobuQ-Bench: quantize a Diffusion Transformer by a plan, judge it on a workload, keep the run.

    from robuq_bench import load_plan, quantize_
    quantize_(model, load_plan("a4"))

Names are loaded on first use, so that `import robuq_bench` and every `--help` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robuq_bench._compat import import_torchvision
    from robuq_bench.config import Plan, Workload, load_plan, load_workload
    from robuq_bench.inference import (
        cuda_graph,
        export_packed,
        load_packed,
        pack_,
        prepare_for_inference,
    )
    from robuq_bench.methods import Method, register_method
    from robuq_bench.quantization.convert import quantize_
    from robuq_bench.quantization.fitting import Calibration
    from robuq_bench.quantization.gradient_clamp import clamp_gradients_, defer_gradient_clamp
    from robuq_bench.quantization.linear import cached_weights
    from robuq_bench.quantization.selection import select_layers

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Method",
    "Plan",
    "Workload",
    "__version__",
    "cached_weights",
    "clamp_gradients_",
    "cuda_graph",
    "defer_gradient_clamp",
    "export_packed",
    "import_torchvision",
    "load_packed",
    "load_plan",
    "load_workload",
    "pack_",
    "prepare_for_inference",
    "quantize_",
    "register_method",
    "select_layers",
]

_HOME = {
    "Calibration": "robuq_bench.quantization.fitting",
    "Method": "robuq_bench.methods",
    "register_method": "robuq_bench.methods",
    "Plan": "robuq_bench.config",
    "Workload": "robuq_bench.config",
    "cached_weights": "robuq_bench.quantization.linear",
    "clamp_gradients_": "robuq_bench.quantization.gradient_clamp",
    "cuda_graph": "robuq_bench.inference",
    "defer_gradient_clamp": "robuq_bench.quantization.gradient_clamp",
    "export_packed": "robuq_bench.inference",
    "import_torchvision": "robuq_bench._compat",
    "load_packed": "robuq_bench.inference",
    "load_plan": "robuq_bench.config",
    "load_workload": "robuq_bench.config",
    "pack_": "robuq_bench.inference",
    "prepare_for_inference": "robuq_bench.inference",
    "quantize_": "robuq_bench.quantization.convert",
    "select_layers": "robuq_bench.quantization.selection",
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
