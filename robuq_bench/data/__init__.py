"""Data sets as tensors, and the files they come from.

The loaders are named here; they are imported on first use, because configs read `data.files` and
stay free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout

__all__ = ["ImageData", "load_dataset", "load_heldout"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'robuq_bench.data' has no attribute {name!r}")
    from robuq_bench.data import datasets

    return getattr(datasets, name)
