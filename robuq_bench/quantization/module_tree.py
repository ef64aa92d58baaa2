"""Modules of a model under every name they have: `named_modules` gives a shared one only once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
"""The dictionaries in which `nn.Module` keeps hooks, those of `state_dict` among them."""


def names_of(model: nn.Module, kind: type[Module]) -> dict[Module, list[str]]:
    """Modules of `kind` in module order, each with all its names; the root is called ''."""
    found: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            found.setdefault(module, []).append(name)
    return found


def exchange_layers(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> nn.Module:
    """Put every value in the place of its key, under all names of the key and with its hooks.

    Returns:
        `model`, changed in place, or the replacement of `model` itself.
    """
    for source, target in replacements.items():
        move_hooks(source, target)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])
    return replacements.get(model, model)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Make the hooks of `source` run on `target`; the handles of both sides stay valid."""
    for name in _HOOKS:
        # The very dictionary: a handle removes its hook from the one it was made for.
        setattr(target, name, getattr(source, name))
    hooks: dict[int, Any] = target._load_state_dict_pre_hooks
    for hook in hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(target)
    target._is_full_backward_hook = source._is_full_backward_hook


def hidden_references(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[str, str]]:
    """Where modules hold one of `layers` besides registering it: (attribute, name of the layer).

    In a list, a dictionary, a bound method or a partial, and in what `torch.compile` made of it.
    Such a place would go on calling the layer after it was replaced.
    """
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _REGISTERED or attribute in _HOOKS:
                continue
            place = f"{module_name}.{attribute}" if module_name else attribute
            found += [(place, names[layer]) for layer in _held(value) if layer in layers]
    return found


_REGISTERED = ("_modules", "_parameters", "_buffers")


def _held(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Modules in a value, in what it contains, and in what a method or a partial is bound to."""
    if isinstance(value, nn.Module):
        yield value
    elif depth == 0:
        return
    elif isinstance(value, dict):
        for member in value.values():
            yield from _held(member, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for member in value:
            yield from _held(member, depth - 1)
    elif isinstance(value, functools.partial):
        yield from _held([value.func, *value.args, *value.keywords.values()], depth - 1)
    elif callable(value):
        # A method, or a function that torch.compile or functools.wraps made of one.
        yield from _held(getattr(value, "__self__", None), depth - 1)
        yield from _held(getattr(value, "__wrapped__", None), depth - 1)
