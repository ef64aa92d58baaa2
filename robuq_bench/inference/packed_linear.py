"""`PackedLinear`: a quantized layer at two bits a weight, and its three arithmetics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kernels.hadamard_quantize.reference import Quantized, Rotation
from kernels.ternary_matmul.layout import pack_planes, unpack_planes
from robuq_bench.errors import UsageError
from robuq_bench.methods.activations._token_grid import GridQuantizer, token_grid
from robuq_bench.methods.branches.svd import LowRankBranch
from robuq_bench.methods.rotations._hadamard import HadamardRotation
from robuq_bench.methods.weights._ternary import TernaryWeight
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.bits import QuantizedInput
from robuq_bench.quantization.grids import grid_of, kernel_rotation
from robuq_bench.quantization.guard import GuardedWeight, guarded_weight
from robuq_bench.quantization.linear import QuantizedLinear, rename_old_state
from robuq_bench.quantization.module_tree import exchange_layers, names_of

BACKENDS = ("reference", "integer", "triton")
"""reference: dequantized floats, bit for bit what training evaluates · integer: the kernels'
arithmetic in plain PyTorch, exact integer sums · triton: the kernels."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of the layers that can be packed."""
_LIKE = "like"


class PackedLinear(QuantizedInput):
    """The inference form of a `QuantizedLinear`, same function, same attributes.

    Buffers: `planes` uint8 [out, 32 ceil(in / 128)] (kernels.ternary_matmul.layout), `scale`
    float32 [out] (float64 for a float64 layer), `weight_sums` int32 [out] (sum of the ternary
    codes of a channel). `scale` keeps its dtype when the model is cast. Frozen parameters: `like`
    [0] and `bias` [out] or None. Rotation, branch and activation quantizer are modules as in
    `QuantizedLinear`; `signs`, `low_rank_up` and `low_rank_down` are theirs.

    Attributes:
        like: carries the dtype and device of the layer this one stands in for, because models
            read `next(module.parameters()).dtype` before they call a linear layer. Not in
            `state_dict`.
        backend: one of BACKENDS.
    """

    planes: Tensor
    scale: Tensor
    weight_sums: Tensor
    like: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        name: str,
        activation_quantizer: str,
        activation_bits: int | None,
        rotated: bool,
        signs: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Pack ternary codes int8 [out, in] with scales of one or `out` values.

        `dtype` is that of the layer: what "reference" multiplies in and returns.

        Raises:
            ValueError: codes are not ternary, or a part has another shape.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.name = name
        self.activation_method = activation_quantizer
        if activation_quantizer != "none":
            self.activation_quantizer = GridQuantizer(token_grid(activation_quantizer))
        self.activation_bits = activation_bits
        self.backend = "reference"
        up, down = (None, None) if low_rank is None else low_rank
        scale = scale.detach().reshape(-1)
        scale = scale if scale.dtype == torch.float64 else scale.float()
        if scale.numel() == 1:
            scale = scale.expand(self.out_features)
        rank = 0 if down is None else len(down)
        parts = {
            "scale": (scale, (self.out_features,)),
            "bias": (bias, (self.out_features,)),
            "low_rank_up": (up, (self.out_features, rank)),
            "low_rank_down": (down, (rank, self.in_features)),
            "signs": (signs, (self.in_features,)),
        }
        for part, (value, shape) in parts.items():
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}.{part} is {list(value.shape)}, not {list(shape)}")
        self.register_buffer("planes", pack_planes(codes))
        self.register_buffer("scale", _own(scale))
        self.register_buffer("weight_sums", codes.sum(1, dtype=torch.int32))
        # First, so that it is what `next(module.parameters())` gives.
        self.register_parameter(_LIKE, _frozen(codes.new_empty(0, dtype=dtype)))
        self.register_parameter("bias", _frozen(bias))
        if rotated:
            self.rotation = HadamardRotation(_own(signs))
        if up is not None and down is not None:
            self.branch = LowRankBranch(_copy(up), _copy(down)).requires_grad_(False)

    @classmethod
    def from_quantized(cls, layer: QuantizedLinear) -> PackedLinear:
        """Pack a trained layer.

        Raises:
            UsageError: its weight is not ternary, of another dtype than `DTYPES`, or one of its
                tensors has NaN or infinite values.
        """
        _check_packable(layer)
        dtype = layer.master_weight.dtype
        if dtype not in DTYPES:
            raise UsageError(
                f"layer {layer.name!r} is {dtype}, which cannot be packed; cast the model to "
                "float32 first"
            )
        for part, value in layer.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise UsageError(
                    f"{part!r} of layer {layer.name!r} has NaN or infinite values; such a model "
                    "cannot be packed. Go back to a checkpoint from before they arose"
                )
        quantizer: Any = layer.weight_quantizer
        codes, scale = quantizer.codes(layer.master_weight)
        rotation: Any = layer.rotation
        branch: Any = layer.branch
        activation = layer.methods.get("activation")
        return cls(
            codes,
            scale,
            layer.bias,
            name=layer.name,
            activation_quantizer="none" if activation is None else activation.method,
            activation_bits=layer.activation_bits,
            rotated=rotation is not None,
            signs=None if rotation is None else rotation.signs,
            low_rank=None if branch is None else (branch.up, branch.down),
            dtype=dtype,
        ).train(layer.training)

    @property
    def weight(self) -> GuardedWeight:
        """Shape, dtype and device of the weight it stands in for; arithmetic is a UsageError."""
        return guarded_weight(self.like, (self.out_features, self.in_features), self.name)

    @property
    def rotated(self) -> bool:
        """Whether the input is rotated."""
        return self.rotation is not None

    @property
    def signs(self) -> Tensor | None:
        """Random signs [in] of the rotation."""
        return None if self.rotation is None else self.rotation.signs  # type: ignore[return-value]

    @property
    def low_rank_up(self) -> Tensor | None:
        """[out, r] of the branch."""
        return None if self.branch is None else self.branch.up  # type: ignore[return-value]

    @property
    def low_rank_down(self) -> Tensor | None:
        """[r, in] of the branch."""
        return None if self.branch is None else self.branch.down  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.low_rank_down is None else len(self.low_rank_down)

    def codes(self) -> Tensor:
        """Ternary codes [out, in] int8."""
        return unpack_planes(self.planes, self.in_features)

    def check_backend(self, backend: str) -> None:
        """Raise UsageError unless this layer can run on `backend`."""
        if backend not in BACKENDS:
            raise UsageError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        if backend == "reference":
            return
        try:
            if self.activation_bits is None:
                raise UsageError("activations are not quantized, so there are no integer products")
            grid_of(self.activation_method, self.activation_bits)
            self._rotation()
        except UsageError as error:
            raise UsageError(f"layer {self.name!r}, backend {backend!r}: {error}") from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        # Half precision would change every product.
        if scale.is_meta:
            self.scale = torch.empty_like(self.scale, dtype=scale.dtype)
        else:
            self.scale = scale.to(self.scale.device)
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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: the layer's dtype on "reference", else the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"layer {self.name!r} takes {self.in_features} features, got {tuple(x.shape)}"
            )
        if self.backend == "reference":
            return self._reference(x)
        tokens = x.reshape(-1, self.in_features)
        y = self.product(self.quantize(tokens), out_dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _reference(self, x: Tensor) -> Tensor:
        """Exactly what `QuantizedLinear` computes in eval mode; unpacks the weight every time."""
        path = fast_paths.path_for(self, x)
        return path.product(self, x, path.weight(self))

    def product_weight(self, dtype: torch.dtype | None) -> Tensor:
        """The dequantized weight [out, in] in `dtype`; None is the layer's."""
        weight = self.codes().to(self.scale.dtype) * self.scale[:, None]
        return weight.to(dtype or self.like.dtype)

    def _rotation(self) -> Rotation | None:
        return kernel_rotation(self.in_features, self.planes.device) if self.rotated else None

    def quantize(self, x: Tensor, **prologue: Any) -> Quantized:
        """Integer codes of tokens [M, in]; `prologue` as in `hadamard_quantize`."""
        module = kernel_module("hadamard_quantize", self.backend)
        result: Quantized = module.hadamard_quantize(
            x,
            grid_of(self.activation_method, self.activation_bits or 0),
            rotation=self._rotation(),
            signs=self.signs if self.rotated else None,
            down=self.low_rank_down,
            **prologue,
        )
        return result

    def product(self, tokens: Quantized, **epilogue: Any) -> Tensor:
        """[M, out] from the codes of `quantize`; `epilogue` as in `ternary_matmul`."""
        module = kernel_module("ternary_matmul", self.backend)
        result: Tensor = module.ternary_matmul(**product_operands(tokens, self), **epilogue)
        return result

    def extra_repr(self) -> str:
        bits = "fp" if self.activation_bits is None else f"{self.activation_bits} bits"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ternary, "
            f"activations={self.activation_method} {bits}, rotated={self.rotated}, "
            f"rank={self.rank}, backend={self.backend}"
        )


def _check_packable(layer: QuantizedLinear) -> None:
    """Raise UsageError, naming the method, for a layer that has no packed form."""
    if layer.weight_quantizer is None:
        raise UsageError(
            f"layer {layer.name!r} quantizes its activations but not its weight; packing takes "
            "quantized weights"
        )
    packable: dict[str, tuple[type, ...]] = {
        "rotation": (HadamardRotation,),
        "branch": (LowRankBranch,),
        "activation_quantizer": (GridQuantizer,),
        "weight_quantizer": (TernaryWeight,),
        "scaling": (),
    }
    for slot, kinds in packable.items():
        module = getattr(layer, slot)
        if module is not None and not isinstance(module, kinds):
            method = layer.methods[slot.removesuffix("_quantizer")]
            raise UsageError(
                f"layer {layer.name!r}: {method.slot} method {method.method!r} has no packed form; "
                "such a model cannot be packed"
            )


def product_operands(tokens: Quantized, weights: Any) -> dict[str, Tensor | None]:
    """What `ternary_matmul` and its grouped form read of tokens and of a module with the buffers
    of `PackedLinear`, stacked or not."""
    return {
        "codes": tokens.codes,
        "planes": weights.planes,
        "token_scale": tokens.scale,
        "token_offset": tokens.offset,
        "code_sums": tokens.code_sums,
        "channel_scale": weights.scale.float(),
        "weight_sums": weights.weight_sums,
        "bias": weights.bias,
        "branch": tokens.branch,
        "up": weights.low_rank_up,
    }


def kernel_module(operation: str, backend: str) -> ModuleType:
    """The module that computes `operation` for a backend; Triton is imported when asked for."""
    from importlib import import_module

    return import_module(f"kernels.{operation}.{'triton' if backend == 'triton' else 'reference'}")


def _copy(value: Tensor) -> Tensor:
    """A contiguous copy."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _own(value: Tensor | None) -> Tensor | None:
    return None if value is None else _copy(value)


def _frozen(value: Tensor | None) -> nn.Parameter | None:
    own = _own(value)
    return None if own is None else nn.Parameter(own, requires_grad=False)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by their first name, in module order; the root is called ''."""
    return {names[0]: layer for layer, names in names_of(model, PackedLinear).items()}


def packed_replacements(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """A `PackedLinear` for each `QuantizedLinear` of a model, which is left as it is.

    Raises:
        UsageError: one cannot be packed.
    """
    return {layer: PackedLinear.from_quantized(layer) for layer in names_of(model, QuantizedLinear)}


def pack_(model: nn.Module) -> nn.Module:
    """Replace every `QuantizedLinear` of a model by its `PackedLinear`, in place.

    A layer with several names stays one layer with all of them; hooks go over to the packed layer.

    Returns:
        `model`, or the `PackedLinear` of a model that is itself a quantized layer.

    Raises:
        UsageError: the model has none, or one cannot be packed; nothing was changed.
    """
    replacements = packed_replacements(model)
    if not replacements:
        raise UsageError(
            f"{type(model).__name__} has no quantized layers; convert it with quantize_ first"
        )
    return exchange_layers(model, replacements)
