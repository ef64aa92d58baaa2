"""`PackedUniform`: a quantized layer whose weight has evenly spaced codes of 2 to 8 bits."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from robuq_bench.errors import UsageError
from robuq_bench.inference import codecs
from robuq_bench.inference.packed_layer import PackedLayer, Rest, own
from robuq_bench.methods.weights._codes import Codes


class PackedUniform(PackedLayer):
    """(codes − zero)·scale with a scale per tensor, row or group; on backend "reference" alone.

    Buffers: `packed` uint8 [ceil(out · in · bits / 8)] (`codecs.encode_bits`), `scale` [out,
    groups] or [1, 1] float32 (float64 for a float64 layer), `zero` alike, or None.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0 for all of a row.
    """

    exact = ("scale", "zero")

    packed: Tensor
    zero: Tensor | None

    def __init__(self, weight: Codes, bits: int, bias: Tensor | None, **rest: Unpack[Rest]) -> None:
        """Pack `weight`; `rest` as `PackedLayer` takes it.

        Raises:
            ValueError: codes are not of `bits` bits, or a part has another shape.
        """
        super().__init__(weight.codes, bias, **rest)
        self.bits, self.group = bits, weight.group
        groups = self.in_features // weight.group if weight.group else 1
        shape = (1, 1) if weight.scale.numel() == 1 else (self.out_features, groups)
        for part, value in (("scale", weight.scale), ("zero", weight.zero)):
            self._check_shape(part, value, shape)
        self.register_buffer("packed", codecs.encode_bits(weight.codes, bits))
        self.register_buffer("scale", own(weight.scale))
        self.register_buffer("zero", None if weight.zero is None else own(weight.zero))

    def codes(self) -> Tensor:
        """Codes of the weight [out, in] int8."""
        shape = (self.out_features, self.in_features)
        return codecs.decode_bits(self.packed, self.bits, shape)

    def product_weight(self, dtype: torch.dtype | None) -> Tensor:
        """The dequantized weight [out, in] in `dtype`; None is the layer's."""
        weight = Codes(self.codes(), self.scale, self.zero, self.group).dequantize()
        # By way of the layer's dtype, as its weight quantizer does.
        weight = weight.to(self.like.dtype)
        return weight.to(dtype or weight.dtype)

    def _check_kernels(self) -> None:
        raise UsageError(
            f"weight method {self.methods['weight'].method!r} has codes of {self.bits} bits, and "
            'integer products are for ternary codes; run this model on backend "reference"'
        )

    def _weight_repr(self) -> str:
        return f"{self.bits}-bit weight"
