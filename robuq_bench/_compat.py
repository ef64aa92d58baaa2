"""The one place that works around third-party packages that break on import."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# Schemas as torchvision 0.28 registers them from C++; only their presence is needed.
_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a CPU-only torch.

    PyPI's x86-64 torchvision links CUDA libraries; with a CPU torch its C++ operators stay
    unregistered and its import fails on the missing `torchvision::nms` (pytorch/vision#9085).
    Declaring the schemas is enough for datasets, transforms and torch-fidelity, which never call
    them. Nothing is declared when the ordinary import works.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it fails for any other reason than the missing operators.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[module]
    import torch

    library: Any = torch.library.Library("torchvision", "DEF")
    for schema in _TORCHVISION_OPERATORS:
        library.define(schema)
    _keep_alive.append(library)
    return _import()


# A library unregisters its operators when it is garbage-collected.
_keep_alive: list[Any] = []


def _import() -> ModuleType:
    with warnings.catch_warnings():
        # Only the optional C++ image decoder is missing; PIL decodes here.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        return importlib.import_module("torchvision")


@functools.cache
def import_torch_fidelity() -> ModuleType:
    """Import torch_fidelity (which imports torchvision) under the workaround above."""
    import_torchvision()
    return importlib.import_module("torch_fidelity")
