"""Hooks on what layers see, and how a model is run under them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError, suggest

Forward = Callable[[nn.Module, Any], object]
"""How to call a model on a batch."""


def find_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Modules by any of their names; UsageError on a name that the model does not have."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(names)
    for name in names:
        if name not in modules:
            raise UsageError(f"no layer {name!r} to observe{suggest(name, modules)}")
    return {name: modules[name] for name in names}


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, x)` with the input x of each module, its first argument, before it runs."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter([*args, *kwargs.values()]), None)
            if not isinstance(x, Tensor):
                raise UsageError(
                    f"layer {name!r}: called on no tensor but {type(x).__name__}; leave it out"
                )
            see(name, x)

        return hook

    hooks = []
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class AllSeen(Exception):  # noqa: N818 - a signal, not an error
    """Raised from a hook to leave a forward pass.

    An Exception, so that hooks which torch calls even when a forward fails (`always_call`) run.
    """


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a while; the mode of every module is restored."""
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled code does not see hooks that come later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def run_on(model: nn.Module, batch: Any, forward: Forward | None = None) -> None:
    """Call `model` on a batch: a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        raise UsageError(
            f"a batch must be a tensor, a tuple or a mapping, got {type(batch).__name__}; give "
            "`forward` to say how the model is called on it"
        )


def calls_of(
    model: nn.Module, layers: Iterable[str], batch: Any, forward: Forward | None = None
) -> list[str]:
    """Names of the `layers` in the order in which one pass calls them, each as often as it does."""
    order: list[str] = []
    modules = find_layers(model, layers)
    with evaluating(model), watching(modules, lambda name, _x: order.append(name)):
        run_on(model, batch, forward)
    return order


def refuse_missing(names: Iterable[str], found: Collection[str], what: str) -> None:
    """UsageError on the first of the layers `names` that is not in `found`, saying `what`."""
    for name in names:
        if name not in found:
            raise UsageError(
                f"layer {name!r} {what}: nothing can be observed of it; give other calibration "
                "samples, or leave the layer out"
            )
