"""What a quantized layer answers when somebody reads its `.weight` past its `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from robuq_bench.errors import UsageError

_PROPERTIES = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad")
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
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
    `nn.TransformerEncoderLayer`, turn to the layer's `forward` when they meet such a tensor. It has
    no memory of its own, so that nothing can be read around this class either.
    """

    layer: str

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], layer: str) -> GuardedWeight:
        guarded: GuardedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        guarded.layer = layer
        return guarded

    def __init__(self, like: Tensor, shape: tuple[int, ...], layer: str) -> None:
        """As `guarded_weight`."""

    def _refuse(self, operation: object) -> NoReturn:
        raise UsageError(
            f"layer {self.layer!r} is quantized: its weight is stored rotated, without its "
            f"low-rank branch, or packed, and cannot be used outside the layer ({operation}). Call "
            "the layer, or keep it in full precision by a rule without methods in [[layers]]; its "
            "parameter is `master_weight`"
        )

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
        owner = getattr(func, "__self__", None)  # of a property: its descriptor
        _first(args, kwargs)._refuse(getattr(owner, "__name__", getattr(func, "__name__", func)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _first(args, kwargs)._refuse(func)

    def __hash__(self) -> int:
        # A set of weights would look for parameters by identity, and find none.
        self._refuse("hash")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GuardedWeight({self.layer!r}, {list(self.shape)}, {self.dtype}, {self.device})"


def _first(*found: Any) -> GuardedWeight:
    """The guarded weight among nested arguments."""
    pending = list(found)
    while pending:
        value = pending.pop(0)
        if isinstance(value, GuardedWeight):
            return value
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, tuple | list):
            pending += value
    raise AssertionError("an operation on guarded weights has none among its arguments")


def guarded_weight(like: Tensor, shape: tuple[int, ...], layer: str) -> GuardedWeight:
    """A weight of `shape` with dtype, device and `requires_grad` of `like`, without values.

    `layer` is named when it is used for more.
    """
    return GuardedWeight(like, shape, layer)
