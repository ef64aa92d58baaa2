"""The [-1, 1] clamp that some rules put on the gradient of a weight, and when it would be wrong.

Inside a backward pass the clamp acts on that pass's gradient. With a loss that is scaled (float16)
or gradients accumulated over several passes that is another number than the rule means; it is
refused, and `defer_gradient_clamp` with `clamp_gradients_` is the way out.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.methods.weights._ternary import TernaryWeight

if TYPE_CHECKING:
    from robuq_bench.quantization.linear import QuantizedLinear

logger = logging.getLogger(__name__)

MANY_CLAMPED = 0.05
"""Share of clamped gradients past which a scaled loss is more likely than a large one."""


def clamps_gradient(layer: QuantizedLinear) -> bool:
    """Whether a backward pass would clamp the gradient of the weight."""
    rule = layer.weight_quantizer
    return (
        isinstance(rule, TernaryWeight)
        and rule.method.clamps
        and rule.clamps_in_backward
        and layer.master_weight.requires_grad
    )


def check_gradients(layer: QuantizedLinear, x: Tensor) -> None:
    """Refuse what would make the clamp wrong; a forward pass of a training step calls it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        _refuse(layer, "training under float16 autocast scales the loss")
    _watch_accumulation(layer)


def _watch_accumulation(layer: QuantizedLinear) -> None:
    """Refuse gradients that are added up over backward passes, or scaled as float16 needs."""
    weight = layer.master_weight
    if not weight.is_leaf or (layer._watched is not None and layer._watched() is weight):
        return
    layer._watched = weakref.ref(weight)  # itself it would become a second parameter
    last: tuple[weakref.ref[Tensor], int] | None = None

    looks = 3  # the first passes show a scaled loss; looking at all of them costs time

    def check(parameter: Tensor) -> None:
        nonlocal last, looks
        grad = parameter.grad
        if grad is None or not clamps_gradient(layer):
            return
        if grad.dtype == torch.float16:
            _refuse(layer, "training in float16 scales the loss")
        # Added to in place since the last pass, and nothing else: not zeroed, nor replaced.
        if last is not None and last[0]() is grad and grad._version == last[1] + 1:
            _refuse(layer, "gradients are accumulated over several backward passes")
        last = (weakref.ref(grad), grad._version)
        if looks > 0:
            looks -= 1
            clamped = float((grad.abs() >= 1).float().mean())
            if clamped > MANY_CLAMPED:
                looks = 0
                logger.warning(
                    "layer %r: %.0f %% of its gradients were clamped to [-1, 1]; if the loss "
                    "is scaled (a GradScaler), they are wrong: see defer_gradient_clamp",
                    layer.name,
                    100 * clamped,
                )

    weight.register_post_accumulate_grad_hook(check)


def _refuse(layer: QuantizedLinear, situation: str) -> NoReturn:
    raise UsageError(
        f"layer {layer.name!r}: {situation}, and a clamp of ternary-twn gradients to [-1, 1] "
        "inside the pass would act on scaled, or on partial, ones. Call "
        "defer_gradient_clamp(model) once, and clamp_gradients_(model) before every step of "
        "the optimizer (after scaler.unscale_(optimizer), if there is a scaler)"
    )


def defer_gradient_clamp(model: nn.Module) -> None:
    """Leave the [-1, 1] clamp of ternary-twn gradients to `clamp_gradients_`.

    For training with a loss scaler or with gradients accumulated over several backward passes,
    where a clamp inside each pass would act on scaled, or partial, gradients.
    """
    for module in model.modules():
        if isinstance(module, TernaryWeight):
            module.clamps_in_backward = False


@torch.no_grad()
def clamp_gradients_(model: nn.Module) -> None:
    """Clamp the accumulated gradients of ternary-twn weights to [-1, 1], in place.

    Call it before the optimizer's step, and after `scaler.unscale_(optimizer)` where there is one.
    """
    for module in model.modules():
        rule = getattr(module, "weight_quantizer", None)
        if isinstance(rule, TernaryWeight) and rule.method.clamps:
            gradient = module.master_weight.grad
            if isinstance(gradient, Tensor):
                gradient.clamp_(-1, 1)
