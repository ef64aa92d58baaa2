"""Whether a compiled CPU kernel may be called on tensors directly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors in this machine's memory, and nothing watches what is done to them.

    Only then may a kernel be given their addresses. Tracing, compiling, fake tensors and function
    transforms need its registered operator, which costs more than a few tokens.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    ):
        return False
    for tensor in tensors:  # all() takes twice as long
        if tensor is not None and not (type(tensor) in _PLAIN_TYPES and tensor.is_cpu):
            return False
    return True
