"""What a run's config says, read from its settings and never from the plan's name.

A plan here is one that `reports.plans.read_plan` has read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import pandas as pd

from reports.plans import EVERY, rules_of
from robuq_bench.methods import SLOTS

FULL_PRECISION = "full precision"

Rule = Mapping[str, Any]


class Family(StrEnum):
    """The kinds of plans, in the order in which tables list them."""

    FULL_PRECISION = FULL_PRECISION
    AMPN = "rotation, AMPN bits"
    ALLOCATED = "rotation, bits allocated otherwise"
    FROM_FILE = "rotation, bits from a file"
    UNIFORM = "rotation, uniform bits"
    PARTIAL = "rotation of some layers"
    UNROTATED = "no rotation"


def family(plan: Mapping[str, Any]) -> Family:
    """The kind of plan, read from its settings and never from its name."""
    if not plan.get("layers"):
        return Family.FULL_PRECISION
    rotated = ["rotation" in rule for rule in _quantizing(plan)]
    if not all(rotated):
        return Family.PARTIAL if any(rotated) else Family.UNROTATED
    bits = section(plan, "bits")
    if bits.get("of") != "activation":
        return Family.UNIFORM
    if "path" in bits:
        return Family.FROM_FILE
    return Family.AMPN if _is_ampn(bits) else Family.ALLOCATED


def activation_bits(plan: Mapping[str, Any]) -> float | None:
    """Nominal activation bits of the layers of the blocks, a mean where they are allocated.

    None when not quantized, when read from a file, and when rules differ: a mean would need the
    layers' MACs.
    """
    rules = [rule for rule in _quantizing(plan) if "activation" in rule]
    bits = section(plan, "bits")
    if rules and bits.get("of") == "activation":
        return None if "path" in bits else float(bits["mean"])
    free = [rule for rule in rules if not rule["fixed_bits"]]
    found = {_bits_of(rule) for rule in free or rules}
    return float(found.pop()) if len(found) == 1 else None


def allocated(plan: Mapping[str, Any]) -> str:
    """Whose bits the records of a plan's runs tell: "activation" or "weight"."""
    return str(section(plan, "bits").get("of", "activation"))


def weight_precision(plan: Mapping[str, Any]) -> tuple[str, ...]:
    """What the codes of weights in the blocks are: "ternary", "4 bits", another method's name."""
    tables = [rule.get("weight", {"method": FULL_PRECISION}) for rule in _quantizing(plan)]
    found = {
        f"{table['bits']} bits" if "bits" in table else table["method"].partition("-")[0]
        for table in tables
    }
    return (*sorted(found), *_weight_allocation(plan))


def recipes(plans: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """How each plan quantizes, one entry per part; "full precision" where it does not.

    Bits and ranks are always said, another parameter where uses of its method differ in it.
    """
    tables = [
        {"slot": slot, **rule[slot]}
        for plan in plans
        for rule in plan.get("layers", [])
        for slot in SLOTS
        if slot in rule
    ]
    frame = pd.DataFrame(tables, columns=None if tables else ["slot", "method"]).astype(str)
    uses = frame.groupby(["slot", "method"]).nunique(dropna=False).stack().to_dict()
    return [_recipe(plan, uses) for plan in plans]


def _recipe(plan: Mapping[str, Any], uses: Mapping[Any, int]) -> dict[str, str]:
    blocks, matmul = _quantizing(plan), section(plan, "attention").get("matmul_bits")
    other = rules_of(plan, "other")

    def method(rule: Rule, slot: str) -> str:
        table = {"method": FULL_PRECISION, **rule.get(slot, {})}
        name = str(table.pop("method"))
        always = {"weight": "bits", "branch": "rank"}.get(slot, "")
        width = table.pop("at_width", "none") if slot == "branch" else "none"
        rank = f"rank {table.get('rank')}" + ("" if width == "none" else f" at width {width}")
        told = {"bits": f"{name}, {table.get('bits')} bits", "rank": rank}
        first = told[always] if always in table else name
        rest = {key: value for key, value in table.items() if key not in (*told, "sha256")}
        texts = [f"{k} = {_plain(v)}" for k, v in rest.items() if uses[slot, name, k] > 1]
        return ", ".join([first, *texts])

    def both(rule: Rule) -> str:
        return f"{method(rule, 'weight')}, " + (
            f"A{_bits_of(rule)}" if "activation" in rule else "activations full precision"
        )

    def of_blocks(slot: str, absent: str = FULL_PRECISION) -> str:
        return _by_rule(blocks, lambda rule: method(rule, slot) if slot in rule else absent, absent)

    return {
        "weights": ", ".join([of_blocks("weight"), *_weight_allocation(plan)]),
        "activations": of_blocks("activation"),
        "activation bits": _activation_bits(plan),
        "centring": of_blocks("centring", "none"),
        "scaling": of_blocks("scaling", "none"),
        "rotation": of_blocks("rotation", "none"),
        "low-rank branch": of_blocks("branch", "rank 0"),
        "adaLN": _by_rule(rules_of(plan, "adaLN"), both, both({})),
        "other layers": _by_rule(other if blocks != other else [], both, FULL_PRECISION),
        "attention products": FULL_PRECISION if matmul is None else f"{matmul} bits",
    }


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name, {})
    return value if isinstance(value, Mapping) else {}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For configs of one name, the settings that tell each from the others ("" if alone)."""
    texts = [""] * len(configs)
    for name in {config.get("name") for config in configs}:
        places = [place for place, config in enumerate(configs) if config.get("name") == name]
        flat = comparable([configs[place] for place in places])
        keys = differing(flat)
        for place, own in zip(places, flat, strict=True):
            texts[place] = ", ".join(f"{key} = {_plain(own.get(key))}" for key in keys)
    return texts


def differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which `comparable` ones differ, less those that others imply.

    Where one has no allocation, or another method in a slot, it also lacks the parameters.
    """
    every = {key for settings in flat for key in settings}
    keys = sorted(k for k in every if len({_plain(settings.get(k)) for settings in flat}) > 1)

    def is_implied(key: str) -> bool:
        head, _, last = key.rpartition(".")
        is_of_method = head.rpartition(".")[2] in (*SLOTS, "bits")
        if not is_of_method or last in ("method", "mean", "path"):
            return False
        having = [settings for settings in flat if key in settings]
        methods = {settings.get(f"{head}.method") for settings in having} - {None}
        # An optional parameter can be left out of the same method.
        is_optional = any(s.get(f"{head}.method") in methods for s in flat if key not in s)
        return not is_optional and len({_plain(settings[key]) for settings in having}) == 1

    return [key for key in keys if not is_implied(key)]


def comparable(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings of plans, flattened under keys that mean the same in all of them.

    `block.activation.bits` is of the rule for all layers of blocks; where another plan has a rule
    for some of them, those stand apart, by the rule for all in a plan that has none of its own.
    A setting that is the same in all rules of each plan is listed once, as `activation.bits`.
    """
    named = [{str(rule["name"]): rule for rule in config.get("layers", [])} for config in configs]
    names = list(dict.fromkeys(name for rules in named for name in rules))
    used = [s for s in SLOTS if any(s in rule for rules in named for rule in rules.values())]

    def settings(rules: Mapping[str, Rule], name: str) -> dict[str, Any]:
        rule = rules.get(name) or rules.get(name.partition("[")[0], {})
        slots: dict[str, Any] = {slot: rule.get(slot, {"method": "none"}) for slot in used}
        return flatten({**slots, "fixed_bits": bool(rule.get("fixed_bits", False))})

    by_rule = [{name: settings(rules, name) for name in names} for rules in named]
    found = [flatten({k: v for k, v in config.items() if k != "layers"}) for config in configs]
    for key in {key for own in by_rule for values in own.values() for key in values}:
        is_one = all(len({_plain(v.get(key)) for v in own.values()}) == 1 for own in by_rule)
        for flat, own in zip(found, by_rule, strict=True):
            for name, values in own.items():
                if key in values:
                    flat[key if is_one else f"{name}.{key}"] = values[key]
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values; tables of a list are told by their `name`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and value and all(_is_named(item) for item in value):
            value = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in value}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_named(item: object) -> bool:
    return isinstance(item, Mapping) and "name" in item


def _quantizing(plan: Mapping[str, Any]) -> list[Rule]:
    """The rules that fill a slot of layers in blocks; of other layers where there are none."""
    rules = rules_of(plan, "block") or plan.get("layers", [])
    return [rule for rule in rules if any(slot in rule for slot in SLOTS)]


def _bits_of(rule: Rule) -> int:
    return int(rule["activation"].get("bits", 8))


def _allocation(bits: Mapping[str, Any]) -> str:
    if "path" in bits:
        return "from a file"
    how = "AMPN" if _is_ampn(bits) else f"{bits.get('metric')} by {bits.get('solver')}"
    return f"{how}, mean {bits.get('mean')}"


def _weight_allocation(plan: Mapping[str, Any]) -> list[str]:
    return [_allocation(section(plan, "bits"))] if allocated(plan) == "weight" else []


def _is_ampn(bits: Mapping[str, Any]) -> bool:
    """Whether activation bits have the least sum of AMPN's metric, which two solvers find."""
    is_optimal = bits.get("solver") in ("exact", "milp")
    return bits.get("of") == "activation" and bits.get("metric") == "epsilon_mse" and is_optimal


def _activation_bits(plan: Mapping[str, Any]) -> str:
    rules, bits = _quantizing(plan), section(plan, "bits")
    if bits.get("of") == "activation" and any("activation" in rule for rule in rules):
        return _allocation(bits)

    def text(rule: Rule) -> str:
        return str(_bits_of(rule)) if "activation" in rule else FULL_PRECISION

    found = _by_rule(rules, text, FULL_PRECISION)
    return f"{found} everywhere" if found.isdecimal() else found


def _by_rule(rules: Sequence[Rule], text: Callable[[Rule], str], absent: str) -> str:
    """What a part is in every rule, said once where it is the same; `absent` where it is none."""
    texts = [(text(rule), rule["match"]) for rule in rules]
    if not texts or texts[-1][1] != EVERY:
        texts.append((absent, EVERY))
    *some, (rest, _) = texts
    if all(found == rest for found, _ in some):
        return rest
    parts = [f"{found} on {', '.join(match)}" for found, match in some if found != absent]
    return "; ".join(parts + [f"{rest} elsewhere"] * (rest != absent))


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "not set" if value is None else str(value)
