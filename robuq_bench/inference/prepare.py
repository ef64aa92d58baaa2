"""`prepare_for_inference`: choose the arithmetic of a packed model and fuse what it allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.launch import INTERPRETED
from robuq_bench.errors import MissingResourceError, UsageError
from robuq_bench.inference.fused_blocks import FusedBlocks
from robuq_bench.inference.packed_linear import PackedLinear, pack_, packed_layers
from robuq_bench.models.dit import Blocks
from robuq_bench.quantization.convert import quantized_layers

DEFAULT_DTYPE = {
    "reference": torch.float32,
    "integer": torch.float32,
    "triton": torch.bfloat16,
}


def prepare_for_inference(
    model: nn.Module,
    backend: str = "reference",
    dtype: torch.dtype | None = None,
    *,
    fuse: bool = True,
) -> nn.Module:
    """Pack a quantized model if it is not packed yet, and make it run on `backend`, in place.

    Works on any module: our DiT and diffusers' transformers alike. In a DiT whose block linears
    are all packed, "integer" and "triton" also fuse LayerNorm, modulation, GELU, gates and
    residuals into the two operations around them, and compute the modulation of all blocks at
    once; diffusers' models have their linears exchanged.

    Args:
        model: converted by `quantize_`, or loaded by `load_packed`; move it to its device first.
        backend: "reference" (dequantized floats, bit for bit what training evaluates), "integer"
            (the kernels' arithmetic in plain PyTorch), or "triton" (a CUDA device, or anywhere
            with TRITON_INTERPRET=1).
        dtype: of everything but codes and scales, and of the inputs the model then takes; None is
            float32, and bfloat16 for "triton".
        fuse: False leaves the blocks of a DiT as they are and exchanges their linears only.

    Returns:
        `model`, in eval mode, with gradients off.

    Raises:
        UsageError: nothing is quantized, or a layer cannot run on `backend`; no layer was changed.
        MissingResourceError: "triton" without a CUDA device or the interpreter.
    """
    if any(isinstance(module, FusedBlocks) for module in model.modules()):
        raise UsageError("the model is prepared already; load it again for another backend")
    if quantized_layers(model):
        pack_(model)
    layers = packed_layers(model)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no quantized layers; convert it with quantize_, or load "
            "it with load_packed"
        )
    for layer in layers.values():
        layer.check_backend(backend)
    device = next(iter(layers.values())).planes.device
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise MissingResourceError(
            f'the model is on {device}; backend "triton" needs a CUDA device, or Triton\'s '
            'interpreter (set TRITON_INTERPRET=1 before Python starts). "integer" does the same '
            "arithmetic anywhere"
        )
    model.eval().requires_grad_(False)
    dtype = DEFAULT_DTYPE[backend] if dtype is None else dtype
    scales = {id(layer.scale) for layer in layers.values()}
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if any(tensor.dtype != dtype and id(tensor) not in scales for tensor in floats):
        model.to(dtype)
    for layer in layers.values():
        layer.backend = backend
    if fuse and backend != "reference":
        for name, module in list(model.named_children()):
            if isinstance(module, Blocks) and _all_packed(module):
                setattr(model, name, FusedBlocks(module))
    return model


def _all_packed(blocks: Blocks) -> bool:
    members: Any = blocks  # nn.ModuleList does not say what it holds
    return all(
        isinstance(linear, PackedLinear)
        for block in members
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; one that two names share counts once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
