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
from robuq_bench.quantization.activations import activation_quantizer
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.quantization.grids import grid_of, kernel_rotation
from robuq_bench.quantization.linear import QuantizedLinear, linear_product
from robuq_bench.quantization.weights import quantize_weight

BACKENDS = ("reference", "integer", "triton")
"""reference: dequantized floats, bit for bit what training evaluates · integer: the kernels'
arithmetic in plain PyTorch, exact integer sums · triton: the kernels."""


class PackedLinear(nn.Module):
    """The inference form of a `QuantizedLinear`, same function, same attributes.

    Buffers: `planes` uint8 [out, 32 ceil(in / 128)] (kernels.ternary_matmul.layout), `scale`
    float32 [out], `weight_sums` int32 [out] (sum of the ternary codes of a channel), `bias` [out],
    `low_rank_up` [out, r], `low_rank_down` [r, in], `signs` [in] (±1); the last four may be None.
    `scale` stays float32 when the model is cast.

    Attributes:
        backend: one of BACKENDS.
    """

    planes: Tensor
    scale: Tensor
    weight_sums: Tensor
    bias: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None
    signs: Tensor | None

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
    ) -> None:
        """Pack ternary codes int8 [out, in] with scales of one or `out` values."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.name = name
        self.activation_quantizer = activation_quantizer
        self.activation_bits = activation_bits
        self.rotated = rotated
        self.backend = "reference"
        up, down = (None, None) if low_rank is None else low_rank
        scale = scale.detach().float().reshape(-1).expand(self.out_features)
        for buffer, value in {
            "planes": pack_planes(codes),
            "scale": scale.contiguous(),
            "weight_sums": codes.sum(1, dtype=torch.int32),
            "bias": bias,
            "low_rank_up": up,
            "low_rank_down": down,
            "signs": signs,
        }.items():
            kept = (
                None
                if value is None
                else value.detach().clone(memory_format=torch.contiguous_format)
            )
            self.register_buffer(buffer, kept)

    @classmethod
    def from_quantized(cls, layer: QuantizedLinear) -> PackedLinear:
        """Pack a trained layer.

        Raises:
            UsageError: its weight is not ternary.
        """
        if layer.weight_quantizer == "none":
            raise UsageError(
                f"layer {layer.name!r} quantizes its activations but not its weight; packing takes "
                "ternary weights (weights.quantizer, adaln.weight_quantizer)"
            )
        codes, scale = quantize_weight(layer.master_weight, layer.weight_quantizer)
        low_rank = None
        if layer.low_rank_up is not None and layer.low_rank_down is not None:
            low_rank = (layer.low_rank_up, layer.low_rank_down)
        return cls(
            codes,
            scale,
            layer.bias,
            name=layer.name,
            activation_quantizer=layer.activation_quantizer,
            activation_bits=layer.activation_bits,
            rotated=layer.rotated,
            signs=layer.signs,
            low_rank=low_rank,
        ).train(layer.training)

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
            grid_of(self.activation_quantizer, self.activation_bits)
            self._rotation()
        except UsageError as error:
            raise UsageError(f"layer {self.name!r}, backend {backend!r}: {error}") from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # half precision would change every product
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
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
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight = self.codes().to(dtype) * self.scale.to(dtype)[:, None]
        wide = [weight] if self.low_rank_up is None else [weight, self.low_rank_up.to(dtype)]
        down = None if self.low_rank_down is None else self.low_rank_down.to(dtype)
        quantizer = activation_quantizer(self.activation_quantizer)
        y = linear_product(
            x.to(dtype),
            torch.cat(wide, 1),
            None if self.bias is None else self.bias.to(dtype),
            down,
            None if self.signs is None else self.signs.to(dtype),
            self.rotated,
            None if self.activation_bits is None else quantizer,
            self.activation_bits or 0,
        )
        return y.to(x.dtype)

    def _rotation(self) -> Rotation | None:
        return kernel_rotation(self.in_features, self.planes.device) if self.rotated else None

    def quantize(self, x: Tensor, **prologue: Any) -> Quantized:
        """Integer codes of tokens [M, in]; `prologue` as in `hadamard_quantize`."""
        module = kernel_module("hadamard_quantize", self.backend)
        result: Quantized = module.hadamard_quantize(
            x,
            grid_of(self.activation_quantizer, self.activation_bits or 0),
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
            f"activations={self.activation_quantizer} {bits}, rotated={self.rotated}, "
            f"rank={self.rank}, backend={self.backend}"
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
        "channel_scale": weights.scale,
        "weight_sums": weights.weight_sums,
        "bias": weights.bias,
        "branch": tokens.branch,
        "up": weights.low_rank_up,
    }


def kernel_module(operation: str, backend: str) -> ModuleType:
    """The module that computes `operation` for a backend; Triton is imported when asked for."""
    from importlib import import_module

    return import_module(f"kernels.{operation}.{'triton' if backend == 'triton' else 'reference'}")


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def pack_(model: nn.Module) -> nn.Module:
    """Replace every `QuantizedLinear` of a model by its `PackedLinear`, in place.

    Raises:
        UsageError: the model has none, or one cannot be packed; nothing was changed.
    """
    layers = quantized_layers(model)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no quantized layers; convert it with quantize_ first"
        )
    packed = {name: PackedLinear.from_quantized(layer) for name, layer in layers.items()}
    for name, layer in packed.items():
        replace_module(model, name, layer)
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
