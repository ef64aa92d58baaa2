"""What quantized and packed layers share: the slots of the input, and activation bits.

Bits are an attribute, part of the state, and a tensor for compiled graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError
from robuq_bench.methods.activations._token_grid import GridQuantizer

BITS_KEY = "activation_bits"
"""Of a layer's bits in a state dict: uint8, 0 for activations that are not quantized."""


def check_bits(bits: object, quantizer: Any, layer: str) -> None:
    """Raise ConfigError unless `bits` is a whole number that the quantizer's `check_bits` takes."""
    # bool is an int to Python, and True would mean one bit.
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise ConfigError(f"layer {layer!r}: activation bits must be a whole number, got {bits!r}")
    if quantizer is None:
        raise ConfigError(f"layer {layer!r} has no activation quantizer to give bits to")
    try:
        quantizer.check_bits(bits)
    except ConfigError as error:
        raise ConfigError(f"layer {layer!r}: {error}") from None


class QuantizedInput(nn.Module):
    """Base of layers with slots for their input, and `activation_bits` to change at any time."""

    name: str
    centring: nn.Module | None
    scaling: nn.Module | None
    rotation: nn.Module | None
    branch: nn.Module | None
    activation_quantizer: nn.Module | None
    methods: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.centring = self.scaling = self.rotation = self.branch = None
        self.activation_quantizer = None
        self._bits: int | None = None
        self._bits_tensor: Tensor | None = None

    @property
    def activation_bits(self) -> int | None:
        """Bits per activation; None: not quantized. ConfigError for bits that cannot be."""
        return self._bits

    @activation_bits.setter
    def activation_bits(self, bits: int | None) -> None:
        self.check_activation_bits(bits)
        self._bits = bits
        if bits is None:
            self._bits_tensor = None
            return
        with torch.inference_mode(False):
            if self._bits_tensor is None:
                self._bits_tensor = torch.zeros((), dtype=torch.int64)
            self._bits_tensor.fill_(bits)  # in place: a compiled model reads this very tensor

    def check_activation_bits(self, bits: int | None) -> None:
        """Raise ConfigError unless this layer's activation quantizer is defined at `bits`."""
        if bits is not None:
            quantizer: Any = self.activation_quantizer
            if quantizer is not None and not hasattr(quantizer, "check_bits"):
                quantizer = self.methods["activation"]
            check_bits(bits, quantizer, self.name)

    def current_bits(self) -> int | Tensor | None:
        """The bits; a tensor for a grid in a compiled graph, where every int would be a new one."""
        if torch.compiler.is_compiling() and isinstance(self.activation_quantizer, GridQuantizer):
            return self._bits_tensor
        return self._bits

    def centre_input(self, x: Tensor) -> Tensor:
        """x - c [..., in], which paths take for the layer's input."""
        return x if self.centring is None else self.centring(x)

    def rotate_input(self, x: Tensor) -> Tensor:
        """R(x / s) of centred x [..., in]: what the branch and the activation quantizer read."""
        if self.scaling is not None:
            x = self.scaling(x)
        return x if self.rotation is None else self.rotation(x)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A tensor, because files of tensors hold nothing else.
        destination[prefix + BITS_KEY] = torch.tensor(self._bits or 0, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + BITS_KEY
        stored = state_dict.pop(key, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if stored is None:
            missing_keys.append(key)
            return
        # An average of states (EMA) holds a float, and 2.9999998 is 3.
        value = float(stored)
        bits = round(value)
        if abs(value - bits) > 1e-3:
            raise ConfigError(f"layer {self.name!r}: {key} is {value:g}, not a number of bits")
        self.activation_bits = bits or None
