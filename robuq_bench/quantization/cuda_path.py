"""The CUDA path of `QuantizedLinear`: Triton kernels of `kernels/` as differentiable operators.

On a CUDA device, layers whose width, quantizer and dtype the kernels take use them without being
asked; `kernel_support(layer)` says why a layer does not. `ROBUQ_KERNELS=off` in the environment,
read when this module is imported, turns them off everywhere. On the CPU they run in Triton's
interpreter and only inside `forced()`, for tests.

Against the plain lines of `fast_paths.py` a layer reads its activations in the dtype they come in,
takes statistics in float32, and hands values of the product's dtype to the product; under autocast
no float32 copy of activations or weights is made. Operators are opaque to `torch.compile` and have
no second derivative. What they keep for the backward pass is one byte per rotated entry, nothing
for quantizers with a straight-through gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.methods.activations._token_grid import TokenGrid, token_grid

if TYPE_CHECKING:
    from kernels.hadamard_quantize.reference import Grid, Rotation
    from robuq_bench.quantization.linear import QuantizedLinear

VARIABLE = "ROBUQ_KERNELS"
SWITCHED_OFF = os.environ.get(VARIABLE, "").lower() == "off"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of activations and products; float64 keeps the plain lines."""
KNOWN_METHODS = {
    "centring": ("mean",),
    "scaling": (),
    "rotation": ("hadamard", "randomized-hadamard"),
    "branch": ("svd",),
    "activation": ("robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet"),
}
WEIGHT_RULES = ("ternary-twn", "ternary-absmean")
MIN_CAPABILITY = (8, 0)
"""First CUDA compute capability with bfloat16."""

_forced = False
_Reason = TypeVar("_Reason", bound=Callable[..., str | None])


@contextmanager
def forced() -> Iterator[None]:
    """Use the kernels on the CPU too, in Triton's interpreter: exact, and far slower.

    Raises:
        UsageError: Triton is missing, or not in its interpreter (TRITON_INTERPRET=1 has to be set
            before Python imports it).
    """
    global _forced
    if _triton_is_missing():
        raise UsageError("kernels need Triton, which is not installed")
    from kernels.launch import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        raise UsageError("kernels on the CPU need TRITON_INTERPRET=1 set before Python starts")
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def kernel_support(layer: QuantizedLinear) -> str | None:
    """Why a layer does not use all kernels that serve it; None if it does."""
    weight = layer.master_weight
    reason = _device_reason(weight.device)
    if reason is not None:
        return reason
    if layer.activation_bits is None:
        return "its activations are not quantized"
    if weight.dtype not in DTYPES:
        return f"it computes in {weight.dtype}"
    for slot, known in KNOWN_METHODS.items():
        method = layer.methods.get(slot)
        if method is not None and method.method not in known:
            return f"there is no kernel for {slot} {method.method!r}"
    activation = layer.methods["activation"].method
    rotated = layer.rotation is not None
    reason = _tokens_reason(layer.in_features, rotated, activation, layer.activation_bits)
    if reason is None and "weight" in layer.methods:
        reason = weight_reason(weight, layer.methods["weight"].method)
    return reason


def takes_tokens(
    x: Tensor,
    weight: Tensor,
    rotated: bool,
    quantizer: TokenGrid | None,
    bits: int | Tensor,
) -> bool:
    """Whether `fake_quantize` serves a product of x [..., n] with weight [out, n or more]."""
    if isinstance(bits, Tensor) and quantizer is not None:
        bits = quantizer.max_bits  # any will do: the layer has checked its own
    return (
        quantizer is not None
        and _device_reason(x.device) is None
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and _tokens_reason(x.shape[-1], rotated, quantizer.name, int(bits)) is None
    )


def weight_reason(weight: Tensor, rule: str) -> str | None:
    """Why `ternary_weight` does not serve a master weight [out, in]; None if it does."""
    reason = _device_reason(weight.device)
    if reason is not None:
        return reason
    if rule not in WEIGHT_RULES:
        return f"there is no kernel for weight {rule!r}"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}; kernels take float32"
    return _weight_width_reason(weight.shape[1])


def product_dtype(weight: Tensor) -> torch.dtype | None:
    """Dtype that autocast gives the product, where kernels can produce it at once; else None."""
    kind = weight.device.type
    if (
        weight.dtype not in DTYPES
        or _device_reason(weight.device) is not None
        or not torch.is_autocast_enabled(kind)
    ):
        return None
    return torch.get_autocast_dtype(kind)


def fake_quantize(
    x: Tensor,
    signs: Tensor | None,
    rotated: bool,
    quantizer: TokenGrid,
    bits: int | Tensor,
    dtype: torch.dtype,
    want_rotated: bool,
) -> tuple[Tensor, Tensor]:
    """Q_a(x R) and, if wanted, x R, in one kernel; differentiable in x.

    Args:
        x: [..., n] of one of `DTYPES`.
        signs: [n] or None; only read when `rotated`.
        rotated: whether x is rotated.
        quantizer: of the rotated activations, with bits.
        bits: of the quantizer; a tensor of one element on the CPU keeps a compiled graph.
        dtype: of the results.
        want_rotated: whether the second result is needed; it is empty otherwise.

    Returns:
        Two tensors like x in `dtype`. Gradients as those of `quantizer.fake_quantize`.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    signs = signs.float() if rotated and signs is not None else None
    save = torch.is_grad_enabled() and x.requires_grad
    bits = bits if isinstance(bits, Tensor) else torch.tensor(bits)
    values, tokens, _ = torch.ops.robuq_bench.fake_quantize(
        rows, signs, rotated, quantizer.name, bits, dtype, want_rotated, save
    )
    return values.view(x.shape), tokens.view(x.shape) if want_rotated else tokens


def ternary_weight(weight: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """Fake-quantized weight [out, in] in `dtype`; straight-through gradient in weight's dtype."""
    result: Tensor = torch.ops.robuq_bench.ternary_weight(weight.contiguous(), rule, dtype)
    return result


def _constant(function: _Reason) -> _Reason:
    """`torch.compiler.assume_constant_result`, whose import of the compiler takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _device_reason(device: torch.device) -> str | None:
    if _forced:
        return None
    if device.type != "cuda":
        return f"it is on {device}, kernels run on CUDA"
    if SWITCHED_OFF:
        return f"{VARIABLE}=off"
    return _cuda_reason(device.index)


@_constant
def _cuda_reason(index: int | None) -> str | None:
    if _triton_is_missing():
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"the device has compute capability {capability}, kernels need {MIN_CAPABILITY}"
    return None


@_constant
def _tokens_reason(width: int, rotated: bool, quantizer: str, bits: int) -> str | None:
    return _cached_tokens_reason(width, rotated, quantizer, bits)


@functools.cache
def _cached_tokens_reason(width: int, rotated: bool, quantizer: str, bits: int) -> str | None:
    from kernels.fake_quantize.triton import unsupported

    try:
        _, rotation = _settings(width, rotated, quantizer, bits, torch.device("cpu"))
    except RobuqError as error:
        return str(error)
    if rotation is None:
        return unsupported(width, None, 1)
    return unsupported(width, len(rotation.inner), rotation.outer)


@_constant
def _weight_width_reason(width: int) -> str | None:
    from kernels.ternary_weight.triton import MAX_WIDTH

    return None if width <= MAX_WIDTH else f"its width {width} exceeds the kernels' {MAX_WIDTH}"


@functools.cache
def _triton_is_missing() -> bool:
    return importlib.util.find_spec("triton") is None


def _settings(
    width: int, rotated: bool, quantizer: str, bits: int, device: torch.device
) -> tuple[Grid, Rotation | None]:
    """Grid and rotation in the terms of the kernels; RobuqError where they have none."""
    # Not at the top: the inference package imports this one.
    from robuq_bench.quantization.grids import grid_of, kernel_rotation

    return grid_of(quantizer, bits), kernel_rotation(width, device) if rotated else None


@torch.library.custom_op(
    "robuq_bench::fake_quantize",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? signs, bool rotated, str quantizer, Tensor bits, ScalarType dtype, "
        "bool want_rotated, bool save) -> (Tensor, Tensor, Tensor)"
    ),
)
def _fake_quantize(
    x: Tensor,
    signs: Tensor | None,
    rotated: bool,
    quantizer: str,
    bits: Tensor,
    dtype: torch.dtype,
    want_rotated: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.fake_quantize import triton

    grid, rotation = _settings(x.shape[-1], rotated, quantizer, int(bits), x.device)
    values, tokens, state = triton.fake_quantize(
        x,
        grid,
        rotation=rotation,
        signs=signs,
        out_dtype=dtype,
        want_rotated=want_rotated,
        save=save,
    )
    # An operator returns tensors only: empty stands for absent.
    tokens = x.new_empty(0, dtype=dtype) if tokens is None else tokens
    return values, tokens, x.new_empty(0, dtype=torch.int8) if state is None else state


@_fake_quantize.register_fake
def _(
    x: Tensor,
    signs: Tensor | None,
    rotated: bool,
    quantizer: str,
    bits: Tensor,
    dtype: torch.dtype,
    want_rotated: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    has_state = save and _has_state(quantizer)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape if want_rotated else (0,), dtype=dtype),
        x.new_empty(x.shape if has_state else (0,), dtype=torch.int8),
    )


def _has_state(quantizer: str) -> bool:
    return token_grid(quantizer).needs_state


@torch.library.custom_op(
    "robuq_bench::fake_quantize_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_rotated, Tensor state, Tensor? signs, bool rotated, "
        "str quantizer, Tensor bits, ScalarType dtype) -> Tensor"
    ),
)
def _fake_quantize_backward(
    grad: Tensor,
    grad_rotated: Tensor | None,
    state: Tensor,
    signs: Tensor | None,
    rotated: bool,
    quantizer: str,
    bits: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    from kernels.fake_quantize import triton

    grid, rotation = _settings(grad.shape[-1], rotated, quantizer, int(bits), grad.device)
    return triton.fake_quantize_backward(
        grad,
        state if _has_state(quantizer) else None,
        grid,
        rotation=rotation,
        signs=signs,
        grad_rotated=grad_rotated,
        out_dtype=dtype,
    )


@_fake_quantize_backward.register_fake
def _(
    grad: Tensor,
    grad_rotated: Tensor | None,
    state: Tensor,
    signs: Tensor | None,
    rotated: bool,
    quantizer: str,
    bits: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _remember_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, signs, rotated, quantizer, bits, _, _, _ = inputs
    ctx.save_for_backward(output[2], signs, bits)
    ctx.settings = (rotated, quantizer, x.dtype)
    ctx.set_materialize_grads(False)


def _tokens_gradient(
    ctx: Any, grad: Tensor | None, grad_rotated: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    state, signs, bits = ctx.saved_tensors
    rotated, quantizer, dtype = ctx.settings
    if grad_rotated is not None and grad_rotated.numel() == 0:
        grad_rotated = None
    if grad is None:
        if grad_rotated is None:
            return (None,) * 8
        grad = torch.zeros_like(grad_rotated)
    result = torch.ops.robuq_bench.fake_quantize_backward(
        grad, grad_rotated, state, signs, rotated, quantizer, bits, dtype
    )
    return (result, *(None,) * 7)


torch.library.register_autograd(
    "robuq_bench::fake_quantize", _tokens_gradient, setup_context=_remember_tokens
)


@torch.library.custom_op(
    "robuq_bench::ternary_weight",
    mutates_args=(),
    schema="(Tensor weight, str rule, ScalarType dtype) -> Tensor",
)
def _ternary_weight(weight: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    from kernels.ternary_weight import triton

    return triton.ternary_weight(weight, rule, dtype)


@torch.library.custom_op(
    "robuq_bench::ternary_weight_backward",
    mutates_args=(),
    schema="(Tensor grad, str rule, ScalarType dtype) -> Tensor",
)
def _ternary_weight_backward(grad: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    from kernels.ternary_weight import triton

    return triton.ternary_weight_backward(grad, rule, dtype)


@_ternary_weight.register_fake
@_ternary_weight_backward.register_fake
def _(tensor: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=dtype)


def _remember_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.rule, _ = inputs
    ctx.dtype = weight.dtype


def _weight_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    result = torch.ops.robuq_bench.ternary_weight_backward(grad, ctx.rule, ctx.dtype)
    return result, None, None


torch.library.register_autograd(
    "robuq_bench::ternary_weight", _weight_gradient, setup_context=_remember_weight
)
