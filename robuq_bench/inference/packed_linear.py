"""`PackedLinear`, a quantized layer at two bits a weight, its arithmetics, and `pack_`."""

from __future__ import annotations

import copy
import dataclasses
from importlib import import_module
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from kernels import cpu_library
from kernels.hadamard_quantize.reference import Quantized, Rotation
from kernels.ternary_matmul.layout import pack_planes, unpack_planes
from robuq_bench.errors import UsageError
from robuq_bench.inference.packed_layer import PackedLayer, Rest, own
from robuq_bench.inference.packed_uniform import PackedUniform
from robuq_bench.methods import is_packaged
from robuq_bench.methods.weights._ternary import TernaryWeight
from robuq_bench.quantization.grids import grid_of, kernel_rotation
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, names_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of the layers that can be packed."""


class PackedLinear(PackedLayer):
    """A layer with ternary codes, which the kernels know.

    Buffers: `planes` uint8 [out, 32 ceil(in / 128)] (kernels.ternary_matmul.layout), `scale`
    float32 [out] (float64 for a float64 layer), `weight_sums` int32 [out] (sum of the ternary
    codes of a channel); on arithmetic "int-mm" also `unpacked` int8 [out, in], the codes, which no
    `state_dict` holds. `signs`, `low_rank_up` and `low_rank_down` are those of its slots.
    """

    planes: Tensor
    weight_sums: Tensor
    unpacked: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, **rest: Unpack[Rest]
    ) -> None:
        """Pack ternary codes int8 [out, in] with scales of one or `out` values.

        `rest` as `PackedLayer` takes it.

        Raises:
            ValueError: codes are not ternary, or a part has another shape.
        """
        super().__init__(codes, bias, **rest)
        self.arithmetic = self.backend
        scale = scale.detach().reshape(-1)
        scale = scale if scale.dtype == torch.float64 else scale.float()
        if scale.numel() == 1:
            scale = scale.expand(self.out_features)
        self._check_shape("scale", scale, (self.out_features,))
        self.register_buffer("planes", pack_planes(codes))
        self.register_buffer("scale", own(scale))
        self.register_buffer("weight_sums", codes.sum(1, dtype=torch.int32))
        self.register_buffer("unpacked", None, persistent=False)

    def codes(self) -> Tensor:
        """Ternary codes [out, in] int8."""
        return unpack_planes(self.planes, self.in_features)

    def run_on(self, backend: str) -> None:
        super().run_on(backend)
        self.arithmetic = arithmetic_of(backend)
        self.unpacked = self.codes() if self.arithmetic == "int-mm" else None

    def product_weight(self, dtype: torch.dtype | None) -> Tensor:
        """The dequantized weight [out, in] in `dtype`; None is the layer's."""
        weight = self.codes().to(self.scale.dtype) * self.scale[:, None]
        return weight.to(dtype or self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: the layer's dtype on "reference", else the dtype of x."""
        if self.backend == "reference":
            return super().forward(x)
        self._check_width(x)
        tokens = x.reshape(-1, self.in_features)
        y = self.product(self.quantize(tokens), out_dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _check_kernels(self) -> None:
        if self.activation_bits is None:
            raise UsageError("activations are not quantized, so there are no integer products")
        grid_of(self.activation_method, self.activation_bits)
        self._kernel_rotation()

    def _kernel_rotation(self) -> Rotation | None:
        return kernel_rotation(self.in_features, self.planes.device) if self.rotated else None

    def quantize(self, x: Tensor, **prologue: Any) -> Quantized:
        """Integer codes of tokens [M, in]; `prologue` as in `hadamard_quantize`.

        A centre is subtracted from x, or from the shift of a modulation, which comes after.
        """
        modulation = prologue.pop("modulation", None)
        if modulation is None:
            x = self.centre_input(x)
        else:
            shift = self.centre_input(modulation.shift)
            prologue["modulation"] = dataclasses.replace(modulation, shift=shift)
        module = kernel_module("hadamard_quantize", self.arithmetic)
        result: Quantized = module.hadamard_quantize(
            x,
            grid_of(self.activation_method, self.activation_bits or 0),
            rotation=self._kernel_rotation(),
            signs=self.signs if self.rotated else None,
            down=self.low_rank_down,
            **prologue,
        )
        return result

    def product(self, tokens: Quantized, **epilogue: Any) -> Tensor:
        """[M, out] from the codes of `quantize`; `epilogue` as in `ternary_matmul`."""
        module = kernel_module("ternary_matmul", self.arithmetic)
        result: Tensor = module.ternary_matmul(**product_operands(tokens, self), **epilogue)
        return result

    def _weight_repr(self) -> str:
        return "ternary"


def product_operands(tokens: Quantized, weights: Any) -> dict[str, Tensor | None]:
    """What `ternary_matmul` and its grouped form read of tokens and of a module with the buffers
    of `PackedLinear`, stacked or not."""
    return {
        "codes": tokens.codes,
        "planes": weights.planes if weights.unpacked is None else weights.unpacked,
        "token_scale": tokens.scale,
        "token_offset": tokens.offset,
        "code_sums": tokens.code_sums,
        "channel_scale": weights.scale.float(),
        "weight_sums": weights.weight_sums,
        "bias": weights.bias,
        "branch": tokens.branch,
        "up": weights.low_rank_up,
    }


def arithmetic_of(backend: str) -> str:
    """How a backend computes here: "cpu" by "compiled" kernels, or by "int-mm" without them."""
    if backend != "cpu":
        return backend
    return "compiled" if cpu_library.is_usable() else "int-mm"


def kernel_module(operation: str, arithmetic: str) -> ModuleType:
    """The module that computes `operation`; Triton is imported when asked for."""
    own = {"triton": "triton", "compiled": "cpu"}
    if operation == "ternary_matmul":
        own["int-mm"] = "int_mm"
    return import_module(f"kernels.{operation}.{own.get(arithmetic, 'reference')}")


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by their first name, in module order; the root is called ''."""
    return {names[0]: layer for layer, names in names_of(model, PackedLayer).items()}  # type: ignore[type-abstract]


def packed_layer(layer: QuantizedLinear) -> PackedLayer:
    """The packed form of a quantized layer, which is left as it is.

    Raises:
        UsageError: one of its methods has no packed form, it is of another dtype than `DTYPES`,
            or one of its tensors has NaN or infinite values.
    """
    _check_packable(layer)
    dtype = layer.master_weight.dtype
    if dtype not in DTYPES:
        raise UsageError(
            f"layer {layer.name!r} is {dtype}, which cannot be packed; cast the model to "
            "float32 first"
        )
    for part, value in (*layer.named_parameters(), *layer.named_buffers()):
        if not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"{part!r} of layer {layer.name!r} has NaN or infinite values; such a model "
                "cannot be packed. Go back to a checkpoint from before they arose"
            )
    quantizer: Any = layer.weight_quantizer
    slots = {
        "centring": layer.centring,
        "scaling": layer.scaling,
        "rotation": layer.rotation,
        "branch": layer.branch,
        "activation": layer.activation_quantizer,
    }
    rest: Rest = {
        "name": layer.name,
        "slots": {slot: _copy(module) for slot, module in slots.items() if module is not None},
        "methods": layer.methods,
        "activation_bits": layer.activation_bits,
        "dtype": dtype,
    }
    weight = quantizer.codes(layer.master_weight)
    if isinstance(quantizer, TernaryWeight):
        ternary = PackedLinear(weight.codes, weight.scale, layer.bias, **rest)
        return ternary.train(layer.training)
    bits = int(layer.methods["weight"].nominal_bits())  # type: ignore[attr-defined]
    return PackedUniform(weight, bits, layer.bias, **rest).train(layer.training)


def _check_packable(layer: QuantizedLinear) -> None:
    """Raise UsageError, naming the method, for a layer that has no packed form."""
    if layer.weight_quantizer is None:
        raise UsageError(
            f"layer {layer.name!r} quantizes its activations but not its weight; packing takes "
            "quantized weights"
        )
    for method in layer.methods.values():
        where = f"layer {layer.name!r}: {method.slot} method {method.method!r}"
        if not is_packaged(method.slot, method.method):
            raise UsageError(
                f"{where} is from outside the suite and has no packed form: a packed file is read "
                "without importing code that it names. Keep this model as its checkpoint, or make "
                f"the method a file of robuq_bench/methods"
            )
        if method.slot == "weight" and not _has_codes(layer.weight_quantizer, method):
            raise UsageError(
                f"{where} has no packed form: packing takes ternary codes and codes of 2 to 8 bits"
            )


def _has_codes(quantizer: Any, method: Any) -> bool:
    is_uniform = hasattr(quantizer, "codes") and method.nominal_bits() in range(2, 9)
    return is_uniform or isinstance(quantizer, TernaryWeight)


def _copy(module: nn.Module) -> nn.Module:
    """A copy with contiguous tensors and without hooks."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for tensors in (part._parameters, part._buffers):
            for value in tensors.values():
                if value is not None:
                    value.data = value.data.contiguous()
    return copied


def packed_replacements(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """A `PackedLayer` for each `QuantizedLinear` of a model, which is left as it is.

    Raises:
        UsageError: one cannot be packed.
    """
    return {layer: packed_layer(layer) for layer in names_of(model, QuantizedLinear)}


def pack_(model: nn.Module) -> nn.Module:
    """Replace every `QuantizedLinear` of a model by its `PackedLayer`, in place.

    A layer with several names stays one layer with all of them; hooks go over to the packed layer.

    Returns:
        `model`, or the `PackedLayer` of a model that is itself a quantized layer.

    Raises:
        UsageError: the model has none, or one cannot be packed; nothing was changed.
    """
    replacements = packed_replacements(model)
    if not replacements:
        raise UsageError(
            f"{type(model).__name__} has no quantized layers; convert it with quantize_ first"
        )
    return exchange_layers(model, replacements)
