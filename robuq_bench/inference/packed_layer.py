"""`PackedLayer`: what the packed layers share, whatever the codes of their weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.methods import Method
from robuq_bench.methods.activations._token_grid import GridQuantizer
from robuq_bench.methods.branches.svd import LowRankBranch
from robuq_bench.methods.centrings.mean import Centre
from robuq_bench.methods.rotations._hadamard import HadamardRotation
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.bits import QuantizedInput
from robuq_bench.quantization.guard import GuardedWeight, guarded_weight
from robuq_bench.quantization.linear import rename_old_state

BACKENDS = ("reference", "integer", "cpu", "triton")
"""reference: dequantized floats, bit for bit what training evaluates · integer: the kernels'
arithmetic in plain PyTorch, exact integer sums · cpu: the same, fast on a CPU, with a byte a weight
besides · triton: the kernels."""

_LIKE = "like"
_KNOWN = {"rotation": HadamardRotation, "branch": LowRankBranch, "activation": GridQuantizer}
_COMPUTED = {**_KNOWN, "centring": Centre}
"""Slots that the integer backends compute: a centre is subtracted before the kernels."""


class Rest(TypedDict, total=False):
    """A layer without its weight and bias: `name`, and what is not at its default.

    Keys:
        name: of the layer in its model.
        slots: modules by slot, all but the weight's; they are kept, not copied. Default none.
        methods: by slot, what the plan chose. Default none.
        activation_bits: default None.
        dtype: of the layer: what "reference" multiplies in and returns. Default float32.
    """

    name: Required[str]
    slots: Mapping[str, nn.Module]
    methods: Mapping[str, Method]
    activation_bits: int | None
    dtype: torch.dtype


class PackedLayer(QuantizedInput, ABC):
    """The inference form of a `QuantizedLinear`: same function, slots and attributes.

    The weight is kept as codes; the other slots hold modules as in `QuantizedLinear`, frozen.
    Frozen parameters of its own: `like` [0] and `bias` [out] or None.

    Attributes:
        methods: by slot, what the plan chose; empty where a file of format 1 or 2 does not say.
        like: carries the dtype and device of the layer this one stands in for, because models
            read `next(module.parameters()).dtype` before they call a linear layer. Not in
            `state_dict`.
        backend: one of BACKENDS.
        exact: names of the buffers that keep their dtype when the model is cast: half precision
            would change every product.
    """

    exact: ClassVar[tuple[str, ...]] = ("scale",)

    scale: Tensor
    like: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, bias: Tensor | None, **rest: Unpack[Rest]) -> None:
        """Everything but the weight, of whose `codes` [out, in] shape and device are read.

        Raises:
            ValueError: a bias [out] of another shape.
            ConfigError: the activation quantizer is not defined at the bits.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.name = rest["name"]
        self.methods = dict(rest.get("methods", {}))
        self.backend = "reference"
        self._check_shape("bias", bias, (self.out_features,))
        # First, so that it is what `next(module.parameters())` gives.
        like = codes.new_empty(0, dtype=rest.get("dtype", torch.float32))
        self.register_parameter(_LIKE, _frozen(like))
        self.register_parameter("bias", _frozen(bias))
        for slot, module in rest.get("slots", {}).items():
            attribute = "activation_quantizer" if slot == "activation" else slot
            setattr(self, attribute, module.eval().requires_grad_(False))
        self.activation_bits = rest.get("activation_bits")

    @abstractmethod
    def codes(self) -> Tensor:
        """Codes of the weight [out, in] int8."""

    @abstractmethod
    def product_weight(self, dtype: torch.dtype | None) -> Tensor:
        """The dequantized weight [out, in] in `dtype`; None is the layer's."""

    @abstractmethod
    def _check_kernels(self) -> None:
        """Raise UsageError, saying why, unless the integer backends compute this layer."""

    def _check_shape(self, part: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{self.name}.{part} is {list(value.shape)}, not {list(shape)}")

    @property
    def weight(self) -> GuardedWeight:
        """Shape, dtype and device of the weight it stands in for; arithmetic is a UsageError."""
        return guarded_weight(self.like, (self.out_features, self.in_features), self.name)

    def slots(self) -> dict[str, nn.Module]:
        """The modules of the slots that are filled, but the weight's."""
        found = {
            "centring": self.centring,
            "scaling": self.scaling,
            "rotation": self.rotation,
            "branch": self.branch,
            "activation": self.activation_quantizer,
        }
        return {slot: module for slot, module in found.items() if module is not None}

    def other_slots(self) -> dict[str, nn.Module]:
        """Those of them that files of format 1 and 2 do not know."""
        return {slot: m for slot, m in self.slots().items() if type(m) is not _KNOWN.get(slot)}

    @property
    def activation_method(self) -> str:
        """Name of the activation method, "none" without one."""
        quantizer = self.activation_quantizer
        if isinstance(quantizer, GridQuantizer):
            return quantizer.grid.name
        return "none" if quantizer is None else str(self.methods["activation"].method)

    @property
    def rotated(self) -> bool:
        """Whether the input is rotated."""
        return self.rotation is not None

    @property
    def signs(self) -> Tensor | None:
        """Random signs [in] of a Hadamard rotation over the whole width."""
        return self.rotation.signs if isinstance(self.rotation, HadamardRotation) else None

    @property
    def low_rank_up(self) -> Tensor | None:
        """[out, r] of the low-rank branch."""
        return self.branch.up if isinstance(self.branch, LowRankBranch) else None

    @property
    def low_rank_down(self) -> Tensor | None:
        """[r, in] of the low-rank branch."""
        return self.branch.down if isinstance(self.branch, LowRankBranch) else None

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.low_rank_down is None else len(self.low_rank_down)

    def check_backend(self, backend: str) -> None:
        """Raise UsageError unless this layer can run on `backend`."""
        if backend not in BACKENDS:
            raise UsageError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        if backend == "reference":
            return
        if backend == "cpu" and self.like.device.type != "cpu":
            raise UsageError(
                f'the model is on {self.like.device}; move it with .cpu() for backend "cpu"'
            )
        try:
            for slot, module in self.slots().items():
                if type(module) is _COMPUTED.get(slot):
                    continue
                raise UsageError(
                    f"{slot} method {self.methods[slot].method!r} is not computed by the kernels; "
                    'run this model on backend "reference"'
                )
            self._check_kernels()
        except UsageError as error:
            raise UsageError(f"layer {self.name!r}, backend {backend!r}: {error}") from None

    def run_on(self, backend: str) -> None:
        """Compute on `backend` from now on, which `check_backend` has let pass."""
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the layer's dtype.

        Exactly what `QuantizedLinear` computes in eval mode; unpacks the weight every time.
        """
        self._check_width(x)
        x = self.centre_input(x)
        path = fast_paths.path_for(self, x)
        result: Tensor = path.product(self, x, path.weight(self))
        return result

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"layer {self.name!r} takes {self.in_features} features, got {tuple(x.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        before = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if value is None:
                continue
            is_meta = value.is_meta
            exact = torch.empty_like(now, dtype=value.dtype) if is_meta else value.to(now.device)
            setattr(self, name, exact)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + _LIKE]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_state(state_dict, prefix)
        args = (state_dict, prefix, *args)
        super()._load_from_state_dict(*args)
        _, prefix, _, _, missing_keys, *_ = args
        if prefix + _LIKE in missing_keys:
            missing_keys.remove(prefix + _LIKE)

    def extra_repr(self) -> str:
        bits = "fp" if self.activation_bits is None else f"{self.activation_bits} bits"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self._weight_repr()}, activations={self.activation_method} {bits}, "
            f"rotated={self.rotated}, rank={self.rank}, backend={self.backend}"
        )

    @abstractmethod
    def _weight_repr(self) -> str:
        """The codes in a word."""


def own(value: Tensor) -> Tensor:
    """A contiguous copy."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _frozen(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(own(value), requires_grad=False)
