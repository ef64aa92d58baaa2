"""`prepare_for_inference`: choose the arithmetic of a packed model and fuse what it allows."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from kernels import cpu_library
from kernels.launch import INTERPRETED
from robuq_bench.errors import MissingResourceError, UsageError
from robuq_bench.inference.fused_blocks import FusedBlocks
from robuq_bench.inference.packed_layer import PackedLayer
from robuq_bench.inference.packed_linear import packed_layers, packed_replacements
from robuq_bench.models.dit import Blocks
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, move_hooks

logger = logging.getLogger(__name__)

DEFAULT_DTYPE = {
    "reference": None,
    "integer": torch.float32,
    "cpu": torch.float32,
    "triton": torch.bfloat16,
}


def prepare_for_inference(
    model: nn.Module,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    fuse: bool = True,
) -> nn.Module:
    """Pack a quantized model if it is not packed yet, and make it run on `backend`, in place.

    Works on any module: our DiT and diffusers' transformers alike. In a DiT whose block linears
    are all packed, all but "reference" also fuse LayerNorm, modulation, GELU, gates and
    residuals into the two operations around them, and compute the modulation of all blocks at
    once; diffusers' models have their linears exchanged.

    Args:
        model: converted by `quantize_`, or loaded by `load_packed`; move it to its device first.
        backend: "reference" (dequantized floats, bit for bit what training evaluates; any packed
            layer), "integer" (the kernels' arithmetic in plain PyTorch), "cpu" (the same by
            compiled CPU kernels; without them by `torch._int_mm`, which is said, on weights
            unpacked to a byte each), or "triton" (a CUDA device, or anywhere with
            TRITON_INTERPRET=1). None is "cpu" for a model on the CPU all of whose layers are
            float32 and can run so, else "reference".
        dtype: of everything but codes and scales, and of the inputs the model then takes; None
            leaves them as they are for "reference", and is float32 for "integer" and "cpu" and
            bfloat16 for "triton".
        fuse: False leaves the blocks of a DiT as they are and exchanges their linears only.

    Returns:
        `model`, or what replaces a model that is itself a quantized layer; in eval mode, with
        gradients off.

    Raises:
        UsageError: nothing is quantized, a layer cannot run on `backend`, or fusing would drop a
            hook; nothing was changed.
        MissingResourceError: "triton" without a CUDA device or the interpreter.
        MissingKernels: "cpu" with a library that ROBUQ_CPU_KERNELS names and that cannot be used.
    """
    if any(isinstance(module, FusedBlocks) for module in model.modules()):
        raise UsageError("the model is prepared already; load it again for another backend")
    replacements = packed_replacements(model)
    new: list[Any] = list(replacements.values())
    layers: list[PackedLayer] = [*packed_layers(model).values(), *new]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no quantized layers; convert it with quantize_, or load "
            "it with load_packed"
        )
    backend = _default_backend(layers) if backend is None else backend
    for layer in layers:
        layer.check_backend(backend)
    device = layers[0].like.device
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise MissingResourceError(
            f'the model is on {device}; backend "triton" needs a CUDA device, or Triton\'s '
            'interpreter (set TRITON_INTERPRET=1 before Python starts). "integer" does the same '
            "arithmetic anywhere"
        )
    fusible: list[tuple[str, Blocks]] = []
    if fuse and backend != "reference":
        fusible = [
            (name, module)
            for name, module in model.named_children()
            if isinstance(module, Blocks) and _all_packed(module)
        ]
    for name, blocks in fusible:
        _check_hooks(name, blocks)
    model = exchange_layers(model, replacements)
    model.eval().requires_grad_(False)
    dtype = DEFAULT_DTYPE[backend] if dtype is None else dtype
    exact = {id(getattr(layer, name)) for layer in layers for name in layer.exact}
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if dtype and any(tensor.dtype != dtype and id(tensor) not in exact for tensor in floats):
        model.to(dtype)
    if backend == "cpu" and (missing := cpu_library.why_not()):
        logger.warning(
            "%s. Packed models run slower; `study kernels --device cpu` times both", missing
        )
    for layer in layers:
        layer.run_on(backend)
    for name, blocks in fusible:
        fused = FusedBlocks(blocks)
        move_hooks(blocks, fused)
        setattr(model, name, fused)
    return model


def _default_backend(layers: list[PackedLayer]) -> str:
    """ "cpu" if all layers are float32 and can run so, else "reference"."""
    try:
        for layer in layers:
            layer.check_backend("cpu")
    except UsageError:
        return "reference"
    return "cpu" if all(layer.like.dtype == torch.float32 for layer in layers) else "reference"


def _check_hooks(name: str, blocks: Blocks) -> None:
    """UsageError if a module of `blocks` has a forward hook: a fused block calls no module."""
    for inner, module in blocks.named_modules():
        if inner and (module._forward_hooks or module._forward_pre_hooks):
            raise UsageError(
                f"{name}.{inner} has a hook, which would not run in a fused block; remove it, or "
                "pass fuse=False"
            )


def _all_packed(blocks: Blocks) -> bool:
    """Whether all linears of the blocks are packed, or quantized and about to be."""
    members: Any = blocks  # nn.ModuleList does not say what it holds
    return all(
        isinstance(linear, PackedLayer | QuantizedLinear)
        for block in members
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; one that two names share counts once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
