"""What a run's config says, read from its settings and never from the plan's name.

A plan here is one that `reports.plans.read_plan` has read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from reports.plans import EVERY, given, rules_of
from robuq_bench.methods import SLOTS, Slot, is_packaged, method_class

FULL_PRECISION = "full precision"
AMPN = "rotation, AMPN bits"
ALLOCATED = "rotation, bits allocated otherwise"
UNIFORM = "rotation, uniform bits"
PARTIAL = "rotation of some layers"
UNROTATED = "no rotation"
FROM_FILE = "rotation, bits from a file"
FAMILIES = (FULL_PRECISION, AMPN, ALLOCATED, FROM_FILE, UNIFORM, PARTIAL, UNROTATED)

Rule = Mapping[str, Any]


def is_full_precision(plan: Mapping[str, Any]) -> bool:
    return not plan.get("layers")


def family(plan: Mapping[str, Any]) -> str:
    """The kind of plan, read from its settings and never from its name."""
    rotated = ["rotation" in rule for rule in _quantizing(plan)]
    if is_full_precision(plan):
        return FULL_PRECISION
    if not any(rotated):
        return UNROTATED
    if not all(rotated):
        return PARTIAL
    bits = section(plan, "bits")
    if bits.get("of") != "activation":
        return UNIFORM
    if "path" in bits:
        return FROM_FILE
    return AMPN if _is_ampn(bits) else ALLOCATED


def activation_bits(plan: Mapping[str, Any]) -> float | None:
    """Nominal activation bits of the layers of the blocks, a mean where they are allocated.

    None when not quantized, when read from a file, and when rules differ: a mean would need the
    layers' MACs.
    """
    rules = [rule for rule in _quantizing(plan) if "activation" in rule]
    bits = section(plan, "bits")
    if not rules or (bits.get("of") == "activation" and "path" in bits):
        return None
    if bits.get("of") == "activation":
        return float(bits["mean"])
    found = {_bits_of(rule) for rule in rules if not rule["fixed_bits"]} or {
        _bits_of(rule) for rule in rules
    }
    return float(found.pop()) if len(found) == 1 else None


def allocated(plan: Mapping[str, Any]) -> str:
    """Whose bits the records of a plan's runs tell: "activation" or "weight"."""
    return str(section(plan, "bits").get("of", "activation"))


def weight_precision(plan: Mapping[str, Any]) -> tuple[str, ...]:
    """What the codes of weights in the blocks are: "ternary", "4 bits", another method's name."""

    def precision(rule: Rule) -> str:
        table = rule.get("weight", {})
        method = str(table.get("method", FULL_PRECISION))
        return f"{table['bits']} bits" if "bits" in table else method.partition("-")[0]

    found = sorted({precision(rule) for rule in _quantizing(plan)})
    if allocated(plan) == "weight":
        found.append(_allocation(section(plan, "bits")))
    return tuple(found)


def qat_steps(plan: Mapping[str, Any], workload: Mapping[str, Any]) -> int | None:
    """Steps of training, the plan's or the workload's; 0 is PTQ, None not recorded."""
    own = section(plan, "train").get("steps", section(workload, "training").get("steps"))
    return None if own is None else int(own)


def recipe(plan: Mapping[str, Any]) -> dict[str, str]:
    """How a plan quantizes, one entry per part; "full precision" where it does not."""
    blocks, matmul = _quantizing(plan), section(plan, "attention").get("matmul_bits")
    adaln, other = rules_of(plan, "adaLN"), rules_of(plan, "other")
    weights = _by_rule(blocks, lambda rule: _method(rule, "weight"), FULL_PRECISION)
    if allocated(plan) == "weight":
        weights += f", {_allocation(section(plan, 'bits'))}"
    return {
        "weights": weights,
        "activations": _by_rule(blocks, lambda rule: _method(rule, "activation"), FULL_PRECISION),
        "activation bits": _activation_bits(plan),
        "scaling": _by_rule(blocks, lambda rule: _method(rule, "scaling"), "none"),
        "rotation": _by_rule(blocks, lambda rule: _method(rule, "rotation"), "none"),
        "low-rank branch": _by_rule(blocks, lambda rule: _method(rule, "branch"), "rank 0"),
        "adaLN": _by_rule(adaln, _both, _both({})),
        "other layers": _by_rule(other if blocks != other else [], _both, FULL_PRECISION),
        "attention products": "full precision" if matmul is None else f"{matmul} bits",
    }


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name, {})
    return value if isinstance(value, Mapping) else {}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For configs of one name, the settings that tell each from the others ("" if alone)."""
    texts = [""] * len(configs)
    by_name: dict[object, list[int]] = {}
    for place, config in enumerate(configs):
        by_name.setdefault(config.get("name"), []).append(place)
    for places in by_name.values():
        flat = comparable([configs[place] for place in places]) if len(places) > 1 else []
        keys = differing(flat)
        for place, own in zip(places, flat, strict=False):
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
        if head.rpartition(".")[2] not in (*SLOTS, "bits") or last in ("method", "mean", "path"):
            return False
        return len({_plain(settings[key]) for settings in flat if key in settings}) == 1

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
        named = value if isinstance(value, list) and value else [{}]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif all(isinstance(item, Mapping) and "name" in item for item in named):
            for item in named:
                rest = {inner: setting for inner, setting in item.items() if inner != "name"}
                flat.update(flatten(rest, f"{prefix}{key}.{item['name']}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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


def _is_ampn(bits: Mapping[str, Any]) -> bool:
    """Whether activation bits have the least sum of AMPN's metric, which two solvers find."""
    is_optimal = bits.get("solver") in ("exact", "milp")
    return bits.get("of") == "activation" and bits.get("metric") == "epsilon_mse" and is_optimal


def _activation_bits(plan: Mapping[str, Any]) -> str:
    rules = _quantizing(plan)
    if not any("activation" in rule for rule in rules):
        return FULL_PRECISION
    bits = section(plan, "bits")
    if bits.get("of") == "activation":
        return _allocation(bits)

    def text(rule: Rule) -> str:
        return str(_bits_of(rule)) if "activation" in rule else FULL_PRECISION

    texts = {text(rule) for rule in rules}
    return f"{texts.pop()} everywhere" if len(texts) == 1 else _by_rule(rules, text, "")


def _by_rule(rules: Sequence[Rule], text: Callable[[Rule], str], absent: str) -> str:
    """What a part is in every rule, said once where it is the same; `absent` where it is none."""
    texts = [(text(rule) or absent, rule["match"]) for rule in rules]
    if not texts or texts[-1][1] != EVERY:
        texts.append((absent, EVERY))
    if len({found for found, _ in texts}) == 1:
        return texts[0][0]
    *some, (rest, _) = texts
    parts = [f"{found} on {', '.join(match)}" for found, match in some if found != absent]
    return "; ".join(parts + [f"{rest} elsewhere"] * (rest != absent))


def _both(rule: Rule) -> str:
    """Weights and activations in a few words."""
    weights = _method(rule, "weight") or FULL_PRECISION
    return f"{weights}, " + (
        f"A{_bits_of(rule)}" if "activation" in rule else "activations full precision"
    )


def _method(rule: Rule, slot: Slot) -> str:
    """A method with the parameters that are not its defaults; "" for a slot that is not filled."""
    table = dict(rule.get(slot, {}))
    method = str(table.pop("method", ""))
    table.pop("sha256", None)
    bits, rank = table.pop("bits", None), table.get("rank")
    defaults = _defaults(slot, method)
    table = {key: v for key, v in table.items() if key not in defaults or v != defaults[key]}
    if slot == "branch" and rank is not None:
        method, _ = f"rank {rank}", table.pop("rank", None)
    words = [f"{bits} bits"] if slot == "weight" and bits is not None else []
    words += [f"{key} = {_plain(value)}" for key, value in table.items()]
    return ", ".join([method, *words]) if method else ""


@cache
def _defaults(slot: Slot, method: str) -> Mapping[str, Any]:
    """Defaults of a method of the suite; nothing is known of others, whose code is not run here."""
    if not is_packaged(slot, method):
        return {}
    fields = method_class(slot, method).model_fields
    return given({key: field.get_default() for key, field in fields.items()})


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "not set" if value is None else str(value)
