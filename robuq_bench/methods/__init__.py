"""Methods by name: files of this package, registered classes, and "module:Class" from anywhere.

A file `methods/<slot>s/<name>.py` is the method <name>, with dashes for underscores; it is imported
when a plan names it. Adding one takes no other edit. A name that starts with an underscore is
shared code and no method.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from robuq_bench.errors import ConfigError, suggest
from robuq_bench.files import sha256_file
from robuq_bench.methods.base import (
    SLOTS,
    ActivationMethod,
    BranchMethod,
    CentringMethod,
    Method,
    RotationMethod,
    ScalingMethod,
    Slot,
    WeightMethod,
)

__all__ = [
    "SLOTS",
    "ActivationMethod",
    "BranchMethod",
    "CentringMethod",
    "Method",
    "RotationMethod",
    "ScalingMethod",
    "Slot",
    "WeightMethod",
    "check_sources",
    "is_packaged",
    "method_class",
    "method_names",
    "read_method",
    "register_method",
]

BASES: dict[Slot, type[Method]] = {
    "centring": CentringMethod,
    "scaling": ScalingMethod,
    "rotation": RotationMethod,
    "branch": BranchMethod,
    "weight": WeightMethod,
    "activation": ActivationMethod,
}
_FOLDERS: dict[Slot, str] = {slot: "branches" if slot == "branch" else f"{slot}s" for slot in SLOTS}
_LOG = logging.getLogger(__name__)

_registered: dict[tuple[Slot, str], type[Method]] = {}

MethodT = TypeVar("MethodT", bound=type[Method])


def register_method(name: str, method: MethodT) -> MethodT:
    """Let plans of this process call the class `method` by `name`; returns the class.

    A name registered again takes the new class, as a notebook's cell that is run again would.

    Raises:
        ConfigError: not a class of methods, or the name of one of this package.
    """
    _check_class(method, f"register_method({name!r})")
    if name in _packaged(method.slot):
        raise ConfigError(f"{name!r} is a {method.slot} method of the suite; choose another name")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,63}", name) or name == "none":
        raise ConfigError(f"a method cannot be called {name!r}; use letters, digits and dashes")
    _registered[method.slot, name] = method
    return method


def method_names(slot: Slot) -> list[str]:
    """Names that a plan may give `slot`, sorted, "none" left out."""
    return sorted({*_packaged(slot), *(name for kind, name in _registered if kind == slot)})


def is_packaged(slot: Slot, name: str) -> bool:
    """Whether `name` is a method of this package, which any installation of the suite has."""
    return name in _packaged(slot)


def method_class(slot: Slot, name: str) -> type[Method]:
    """The class that a plan calls `name` in `slot`; its file is imported.

    Raises:
        ConfigError: no such method; one that cannot be imported; one of another slot.
    """
    if (slot, name) in _registered:
        return _registered[slot, name]
    if ":" in name:
        return _imported(slot, name)
    if name not in _packaged(slot):
        elsewhere = [other for other in SLOTS if name in method_names(other)]
        hint = f"; it is a method for {' and '.join(elsewhere)}" if elsewhere else ""
        raise ConfigError(
            f"unknown {slot} method {name!r}{hint or suggest(name, method_names(slot))}"
        )
    return _packaged_class(slot, name)


@functools.cache
def _packaged_class(slot: Slot, name: str) -> type[Method]:
    stem = name.replace("-", "_")
    module = importlib.import_module(f"robuq_bench.methods.{_FOLDERS[slot]}.{stem}")
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__ and _is_method(value):
            return cast(type[Method], value)
    raise ConfigError(f"{module.__file__} defines no method")


def read_method(slot: Slot, values: Any) -> Method | None:
    """The method that a plan's table, name or "none" means; None for "none" or one that is empty.

    Raises:
        ConfigError: unknown method, or not a table; parameters are checked by its class
            (pydantic.ValidationError).
    """
    if isinstance(values, Method):
        if values.slot != slot:
            raise ConfigError(f"{values.method!r} is a method for {values.slot}, not {slot}")
        return values
    if values is None or values == "none":
        return None
    if isinstance(values, str):
        values = {"method": values}
    if not isinstance(values, Mapping) or not isinstance(values.get("method"), str):
        raise ConfigError(
            f'write "none", or a table with a method, such as {slot} = '
            f'{{ method = "{method_names(slot)[0]}" }}'
        )
    if values["method"] == "none":
        if len(values) > 1:
            raise ConfigError(f'{slot} method "none" has no parameters')
        return None
    found = method_class(slot, values["method"])
    if values["method"] not in _packaged(slot):
        values = {**values, "sha256": _source_digest(found, values)}
    method = found.model_validate(dict(values))
    return None if method.is_empty else method


def _source_digest(method: type[Method], values: Mapping[str, Any]) -> Any:
    """SHA-256 of the file that a method from outside is in; a stated one is kept.

    What a notebook defines is in no file, and has none.
    """
    try:
        source = Path(inspect.getsourcefile(method) or "")
        digest = sha256_file(source) if source.is_file() else ""
    except (OSError, TypeError):  # TypeError is how `inspect` says "no file"
        digest = ""
    stated = values.get("sha256")
    if stated in (None, "", "none"):
        return digest
    if stated != digest:
        # An error would make old runs unreadable.
        _LOG.warning(
            "method %r: its source is not the one this plan was written with; it computes as the "
            "new one does",
            values["method"],
        )
    return stated


def check_sources(methods: Iterable[Method]) -> None:
    """Refuse methods whose code is not what a run's identity would say of it.

    Raises:
        ConfigError: a method from outside whose source changed since the plan was written, or that
            is defined in no file.
    """
    for method in methods:
        if method.method in _packaged(method.slot):
            continue
        digest = _source_digest(type(method), {})
        if not digest:
            raise ConfigError(
                f"{method.slot} method {method.method!r} is defined in no file, so a run of it "
                "could not be told from one of another; put it into a module"
            )
        if method.sha256 != digest:
            raise ConfigError(
                f"{method.slot} method {method.method!r}: its source is not the one whose sha256 "
                "the plan states; leave the sha256 out to use what is there"
            )


@functools.cache
def _packaged(slot: Slot) -> list[str]:
    folder = Path(__file__).parent / _FOLDERS[slot]
    stems = (path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return [stem.replace("_", "-") for stem in stems]


def _imported(slot: Slot, name: str) -> type[Method]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's file raises, with its name
        raise ConfigError(
            f"{slot} method {name!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); it must be importable from where you are, or "
            "installed"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_method(value)]
        raise ConfigError(
            f"{slot} method {name!r}: {module_name} has no {class_name!r}"
            f"{suggest(class_name, classes)}"
        )
    _check_class(found, f"{slot} method {name!r}")
    if found.slot != slot:
        raise ConfigError(f"method {name!r} is for {found.slot}, not {slot}")
    method: type[Method] = found
    return method


def _is_method(value: Any) -> bool:
    bases = tuple(BASES.values())
    return inspect.isclass(value) and issubclass(value, bases) and value not in bases


def _check_class(method: Any, origin: str) -> None:
    if not _is_method(method):
        raise ConfigError(
            f"{origin}: {method!r} is not a subclass of "
            f"{', '.join(base.__name__ for base in BASES.values())}"
        )
