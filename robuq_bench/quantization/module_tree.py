"""Modules of a model under every name they have: `named_modules` gives a shared one only once."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = tuple(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs"))
)
"""The dictionaries in which `nn.Module` keeps hooks, those of `state_dict` among them."""


def names_of(model: nn.Module, kind: type[Module]) -> dict[Module, list[str]]:
    """Modules of `kind` in module order, each with all its names; the root is called ''."""
    found: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            found.setdefault(module, []).append(name)
    return found


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put every value in the place of its key, under all names of the key.

    Returns:
        `model`, changed in place, or the replacement of `model` itself.
    """
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
    target._is_full_backward_hook = source._is_full_backward_hook
