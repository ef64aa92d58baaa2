"""torch's own 8-bit linears for a CPU, which studies time beside packed models."""

from __future__ import annotations

import importlib.util
import warnings
from importlib import import_module

import torch
from torch import nn

from robuq_bench.errors import MissingResourceError


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy of a float32 model whose linears multiply in 8 bits, quantizing tokens as they come.

    Raises:
        MissingResourceError: this torch has none, or no engine for this CPU.
    """
    if importlib.util.find_spec("torch.ao.quantization") is None:
        raise MissingResourceError("not installed: this torch has no torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still what torch itself has
        quantization = import_module("torch.ao.quantization")
        try:
            found: nn.Module = quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        except RuntimeError as error:
            raise MissingResourceError(f"not supported: {str(error).splitlines()[0]}") from error
    return found
