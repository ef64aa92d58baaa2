"""Layers and plans for tests, made from the names of methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from robuq_bench.config import Plan, load_plan
from robuq_bench.config.plan import Rule
from robuq_bench.methods import SLOTS, Method, read_method
from robuq_bench.methods.site import Site
from robuq_bench.quantization.linear import QuantizedLinear

KINDS = ("block", "adaLN", "other")


def slots(
    *, rank: int | None = None, activation: Any = "none", **others: Any
) -> dict[str, Method | None]:
    """Methods by slot; each a name, a table, a method, or "none".

    `activation` may be ("name", bits) too, and `rank` is short for an SVD branch (0: none).
    """
    if isinstance(activation, tuple):
        activation = {"method": activation[0], "bits": activation[1]}
    if rank is not None:
        others["branch"] = {"method": "svd", "rank": rank} if rank else "none"
    values = {"activation": activation, **others}
    return {slot: read_method(slot, values[slot]) for slot in SLOTS if slot in values}


def quantized(
    linear: nn.Linear,
    name: str = "layer",
    *,
    seed: int = 0,
    rotation: Any = "randomized-hadamard",
    rank: int = 16,
    weight: Any = "ternary-twn",
    activation: Any = ("robust-midtread", 4),
    **others: Any,
) -> QuantizedLinear:
    """A layer of RobuQ's methods unless others are given; bits of None leave a quantizer idle."""
    idle = isinstance(activation, tuple) and activation[1] is None
    found = slots(
        rotation=rotation,
        rank=rank,
        weight=weight,
        activation=activation[0] if idle else activation,
        **others,
    )
    methods = {slot: method for slot, method in found.items() if method is not None}
    layer = QuantizedLinear.from_linear(linear, methods, Site(name, seed))
    if idle:
        layer.activation_bits = None
    return layer


def rule(name: str, match: Any = ("*",), kind: Any = KINDS, **filled: Any) -> Rule:
    """A rule; without slots it keeps what it fits."""
    return Rule.model_validate({"name": name, "match": match, "kind": kind, **slots(**filled)})


def of(plan: Plan, name: str) -> Rule:
    """The rule of a plan that is called `name`."""
    return next(rule for rule in plan.layers if rule.name == name)


def like(original: Rule, **changes: Any) -> Rule:
    """A rule with other fields; `activation` may be bits alone, `rank` an SVD branch."""
    fields = {key: changes.pop(key) for key in ("name", "match", "kind") if key in changes}
    if isinstance(changes.get("activation"), int):
        was = original.activation
        assert was is not None
        changes["activation"] = (was.method, changes["activation"])
    elif "activation" not in changes:
        changes["activation"] = original.activation
    return Rule.model_validate({**dict(original), **fields, **slots(**changes)})


def changed(
    plan: Plan | str = "a4",
    only: str | None = None,
    *,
    first: Iterable[Rule] = (),
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    **filled: Any,
) -> Plan:
    """A plan with slots filled otherwise in its rules (or in the one called `only`).

    `first` are rules put before its own; `sections` are changed fields of other sections.
    """
    plan = load_plan(plan) if isinstance(plan, str) else plan
    rules = [like(each, **filled) if only in (None, each.name) else each for each in plan.layers]
    values = {**dict(plan), "layers": (*first, *rules)}
    for section, fields in (sections or {}).items():
        values[section] = {**dict(values[section] or {}), **fields}
    return Plan.model_validate(values)
