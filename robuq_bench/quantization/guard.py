"""What a quantized layer answers when somebody reads its `.weight` past its `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robuq_bench.errors import UsageError

_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "layout",
        "is_cuda",
        "is_meta",
        "requires_grad",
    )
) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.get_device,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
}


class GuardedWeight(Tensor):
    """Shape, dtype and device of a layer's weight; anything that reads its values is refused.

    The stored weight is rotated and lacks the low-rank branch (or is packed), so that arithmetic
    on it gives wrong outputs without an error. PyTorch's fast paths, such as that of
    `nn.TransformerEncoderLayer`, turn to the layer's `forward` when they meet such a tensor.
    """

    layer: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        guarded = next((a for a in args if isinstance(a, GuardedWeight)), None)
        name = "" if guarded is None else guarded.layer
        operation = getattr(func, "__name__", func)
        raise UsageError(
            f"layer {name!r} is quantized: its weight is stored rotated, without its low-rank "
            f"branch, or packed, and cannot be used outside the layer ({operation}). Call the "
            "layer; keep it in full precision with layers.skip; or train it through parameters()"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GuardedWeight({self.layer!r}, {list(self.shape)}, {self.dtype}, {self.device})"


def guarded_weight(weight: Tensor, layer: str) -> GuardedWeight:
    """`weight` for its metadata only; `layer` is named when it is used otherwise."""
    guarded = weight.detach().as_subclass(GuardedWeight)
    guarded.layer = layer
    return guarded
