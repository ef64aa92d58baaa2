"""The plan of a run, as every part of the report reads it: in one form, whatever wrote it.

A run folder holds the plan in the schema of its time, with or without defaults, under the rule
names of whoever wrote it. Here it becomes today's schema in a form that is equal for plans that do
the same: rules of one kind each, fitting some layer of the run's model, named by what they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from robuq_bench.config.older import modern_plan
from robuq_bench.config.plan import (
    AttentionConfig,
    BitsConfig,
    CalibrationConfig,
    Kind,
    TrainConfig,
    matches,
)
from robuq_bench.methods import SLOTS
from robuq_bench.sections import Section, none_word

KINDS: tuple[str, ...] = get_args(Kind)
EVERY = ["*"]

_SECTIONS: dict[str, type[Section]] = {
    "attention": AttentionConfig,
    "bits": BitsConfig,
    "calibration": CalibrationConfig,
    "train": TrainConfig,
}
# Layers of a block of the suite's DiT, which is the one model that runs have.
_DIT_LAYERS = {
    "block": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "adaLN": ("adaLN_modulation.1",),
}


def read_plan(values: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as a run's config.toml has it, in the form of this module.

    `model` is the run's `workload.model`. In the result every rule has one `kind`, a `name` that is
    the kind with the patterns it is limited to, and only the slots that it fills; a rule that fits
    no layer is gone. Absent values have no key, and what was left out has its default. `bits` is
    absent where no bits are allocated.

    Raises:
        ValueError: it is no plan of any schema; says which key is wrong.
    """
    try:
        plan = modern_plan(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"in the schema before [[layers]]: {error!r}") from error
    rules = plan.get("layers", [])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise ValueError(f"layers must be tables, got {rules!r}")
    for name, kind in _SECTIONS.items():
        own = none_word(plan.get(name, None if name == "bits" else {}))
        if own is None:
            plan.pop(name, None)
        elif isinstance(own, Mapping):
            defaults = {key: field.get_default() for key, field in kind.model_fields.items()}
            plan[name] = given({**defaults, **own})
            _check_numbers(name, plan[name])
        else:
            raise ValueError(f"{name} must be a section, got {own!r}")
    plan["layers"] = [rule for kind in KINDS for rule in _rules_of(kind, rules, model)]
    return plan


def rules_of(plan: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The rules of a read plan for layers of one kind, in order."""
    return [rule for rule in plan.get("layers", []) if rule["kind"] == [kind]]


def _rules_of(
    kind: str, rules: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> list[dict[str, Any]]:
    layers = _layers_of(kind, model)
    found: list[tuple[list[str], dict[str, Any]]] = []
    for rule in rules:
        match = _words(rule, "match", EVERY)
        fitting = [name for name in layers if matches(name, match)]
        if kind not in _words(rule, "kind", ["block"]) or (layers and not fitting):
            continue
        if "*" in match or (layers and fitting == layers):
            match = EVERY
        tables = {slot: _method(rule, slot) for slot in SLOTS}
        content: dict[str, Any] = {slot: table for slot, table in tables.items() if table}
        if content:
            content["fixed_bits"] = bool(rule.get("fixed_bits", False))
        if found and found[-1][1] == content:
            before, _ = found.pop()
            match = EVERY if match == EVERY else [*before, *match]
        found.append((match, content))
        if match == EVERY:
            break  # no layer is left for the rules behind it
    while found and not found[-1][1]:
        found.pop()  # as if there were no rule
    return [
        {"name": _label(kind, match), "kind": [kind], "match": match, **content}
        for match, content in found
    ]


def _check_numbers(section: str, values: Mapping[str, Any]) -> None:
    """ValueError unless what the report computes with is a number."""
    for key in ("mean", "steps", "matmul_bits"):
        value = values.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{section}.{key} must be a number, got {value!r}")


def _layers_of(kind: str, model: Mapping[str, Any]) -> list[str]:
    """Names of the model's layers of a kind; none where they are not known."""
    depth = model.get("depth")
    if model.get("kind", "dit") != "dit" or not isinstance(depth, int):
        return []
    return [f"blocks.{i}.{name}" for i in range(depth) for name in _DIT_LAYERS.get(kind, ())]


def _label(kind: str, match: Sequence[str]) -> str:
    return kind if match == EVERY else f"{kind}[{', '.join(match)}]"


def _words(rule: Mapping[str, Any], key: str, default: Sequence[str]) -> list[str]:
    value = rule.get(key, default)
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{key} of a rule of layers must be texts, got {value!r}")
    return list(words)


def _method(rule: Mapping[str, Any], slot: str) -> dict[str, Any]:
    """The table of a slot without what is absent; empty for a slot that is not filled."""
    value = none_word(rule.get(slot))
    if value is None:
        return {}
    table = {"method": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("method"), str):
        raise ValueError(f"{slot} of a rule of layers must name a method, got {value!r}")
    bits = table.get("bits", 8)
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise ValueError(f"bits of {slot} must be a whole number, got {bits!r}")
    return {} if table["method"] == "none" else given(table)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is absent: None, the word for it, and the digest of a file there is none of."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value is not None and value != "none" and (key, value) != ("sha256", "")
    }
