"""Peak GPU memory, split into weights, activations and workspace.

Workspace is cuBLAS's: PyTorch allocates it from its own pool, so it is what becomes free when the
workspaces are cleared. Activations are the rest of the peak: tensors that live during a step,
those that a CUDA graph keeps included. What the allocator holds without using (`reserved`) and the
CUDA context stand beside them and are part of neither.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; storage that two names share counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def split_peak(
    *, weights: int, resident_before: int, peak: int, workspace: int, reserved: int
) -> dict[str, Any]:
    """Columns of a table from counters in bytes.

    Args:
        weights: parameters and buffers of the model.
        resident_before: allocated before the model came, which is not its own.
        peak: most that was allocated at once, all of it.
        workspace: of cuBLAS.
        reserved: most that the allocator held at once.
    """
    own = peak - resident_before
    return {
        "peak_bytes": own,
        "weights_bytes": weights,
        "workspace_bytes": workspace,
        "activations_bytes": own - weights - workspace,
        "allocator_unused_bytes": reserved - peak,
        "other_resident_bytes": resident_before,
    }


def resident_bytes() -> int:
    """Bytes allocated on the current CUDA device, after dropping cuBLAS's workspaces.

    A workspace that was there before a model would count as nobody's when it is cleared after it.
    """
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def measure_peak(
    step: Callable[[], object], model: nn.Module, resident_before: int
) -> dict[str, Any]:
    """Peak memory of `step` on the current CUDA device, with the model resident.

    Time first, measure memory last: a CUDA graph captured before may hold a workspace that is
    cleared here.

    Args:
        step: one step of inference, called twice: the first may allocate what later ones reuse. For
            a CUDA graph, its capture: a replay allocates nothing that the counters see.
        model: whose weights are counted.
        resident_before: `resident_bytes()` before the model was made.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    before_clearing = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspace = before_clearing - torch.cuda.memory_allocated()
    return split_peak(
        weights=weight_bytes(model),
        resident_before=resident_before,
        peak=peak,
        workspace=workspace,
        reserved=reserved,
    )
