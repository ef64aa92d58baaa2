"""Plans in the schema before `[[layers]]`, as run folders and packed files of older code hold them.

There a plan had one choice per part for all layers (`weights`, `activations`, `rotation`,
`low_rank`), `adaln` beside them, and `layers.skip/include/adaln` patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from robuq_bench.config.plan import BOTH
from robuq_bench.errors import suggest
from robuq_bench.sections import none_word

_KEYS = {
    "weights": ("quantizer",),
    "activations": ("quantizer", "bits"),
    "rotation": ("kind", "layers"),
    "low_rank": ("rank", "layers"),
    "adaln": ("weight_quantizer", "activation_bits"),
    "allocation": (
        "method",
        "mean_bits",
        "bit_choices",
        "cost",
        "sensitivity_steps",
        "path",
        "sha256",
    ),
    "qat": ("distillation_weight", "denoising_weight"),
    "layers": ("skip", "include", "adaln"),
}
#: Studies whose settings a `config.toml` named even where it was another study's: as "none".
NAMED_STUDIES = ("allocation", "efficiency", "kernels", "normality", "packed", "sensitivity")
OLD_SECTIONS = tuple(section for section in _KEYS if section != "layers")
_KEPT = ("name", "description", "attention")
# What called a layer a modulation, where no patterns did: as that code had it, whatever
# `quantization/selection.py` says today.
_MODULATION = re.compile(
    r"(^|_|layer|rms|group)norm(_|\d|s?$)|modulation|ada_?ln|scale_shift|(^|_)(mod|ada|ln)(_|\d|$)",
    re.IGNORECASE,
)
NEW_NAMES = {
    "weights.quantizer": "layers.block.weight.method",
    "activations.quantizer": "layers.block.activation.method",
    "activations.bits": "layers.block.activation.bits",
    "rotation.kind": "layers.block.rotation.method",
    "rotation.layers": "a rule of its own in [[layers]]",
    "low_rank.rank": "layers.block.branch.rank",
    "low_rank.layers": "a rule of its own in [[layers]]",
    "adaln.weight_quantizer": "layers.adaln.weight.method",
    "adaln.activation_bits": "layers.adaln.activation.bits",
    "layers.skip": "a first rule in [[layers]] with these patterns and no methods",
    "layers.include": 'a rule in [[layers]] with kind = "other"',
    "layers.adaln": "a rule in [[layers]] with these patterns",
    "allocation.method": "bits.mean (AMPN), bits.path (file) or no [bits] at all (uniform)",
    "allocation.mean_bits": "bits.mean",
    "allocation.bit_choices": "bits.choices",
    "allocation.cost": "bits.cost",
    "allocation.sensitivity_steps": "bits.steps",
    "allocation.path": "bits.path",
    "allocation.sha256": "bits.sha256",
    "qat.distillation_weight": "train.distillation_weight",
    "qat.denoising_weight": "train.denoising_weight",
}


def is_old(plan: Mapping[str, Any]) -> bool:
    """Whether a plan's values are in the older schema."""
    return any(key in plan for key in OLD_SECTIONS) or isinstance(plan.get("layers"), Mapping)


def old_keys(plan: Mapping[str, Any]) -> list[str]:
    """The keys of the older schema that `plan` has, dotted."""
    sections = {key: plan[key] for key in _KEYS if key in plan}
    return [
        f"{section}.{key}"
        for section, values in sections.items()
        if isinstance(values, Mapping)
        for key in values
    ]


def modern_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The same plan in today's schema; one that is in it already comes back as it is.

    Raises:
        ValueError: a key that the older schema did not have, a combination that it refused, or one
            that rules cannot say.
    """
    if not is_old(plan):
        return dict(plan)
    _check_keys(plan)
    modern: dict[str, Any] = {key: plan[key] for key in _KEPT if key in plan}
    modern["layers"] = _rules(plan)
    bits = _bits(plan.get("allocation", {}))
    if bits is not None:
        modern["bits"] = bits
    if "qat" in plan:
        modern["train"] = dict(plan["qat"])
    return modern


def _check_keys(plan: Mapping[str, Any]) -> None:
    """What is not translated is refused: nothing of a plan may be lost."""
    for section, values in plan.items():
        if section in _KEPT:
            continue
        if section not in _KEYS:
            old = ", ".join(f"[{key}]" for key in plan if key in _KEYS)
            raise ValueError(
                f"{section}: unknown key beside {old}{suggest(section, [*_KEPT, *_KEYS])}"
            )
        if not isinstance(values, Mapping):
            of_today = "; rules are [[layers]]" if section == "layers" else ""
            raise ValueError(f"{section} must be a section [{section}], got {values!r}{of_today}")
        for key in values:
            if key not in _KEYS[section]:
                rules = "; rules are [[layers]], in two brackets" if section == "layers" else ""
                raise ValueError(
                    f"{section}.{key}: unknown key{suggest(key, _KEYS[section])}{rules}"
                )


def _patterns(section: Mapping[str, Any], key: str, default: list[str] | None) -> list[str] | None:
    value = none_word(section.get(key, default))
    if value is not None and not (
        isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    ):
        raise ValueError(f"{key} must be a list of patterns, got {value!r}")
    return None if value is None else list(value)


def _rules(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    weights, activations = plan.get("weights", {}), plan.get("activations", {})
    adaln, layers = plan.get("adaln", {}), plan.get("layers", {})
    quantizer = activations.get("quantizer", "none")
    block_weight = weights.get("quantizer", "none")
    bits = activations.get("bits", 8)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"activations.bits must be 1 to 8, got {bits!r}")
    adaln_bits = none_word(adaln.get("activation_bits", "none"))
    adaln_weight = adaln.get("weight_quantizer", "none")
    is_quantized = adaln_weight != "none" or adaln_bits is not None
    if quantizer == "none" and adaln_bits is not None:
        raise ValueError("adaln.activation_bits needs an activations.quantizer")
    if quantizer == "none" and block_weight == "none":
        extra = {
            "rotation.kind": plan.get("rotation", {}).get("kind", "none") != "none",
            "low_rank.rank": plan.get("low_rank", {}).get("rank", 0) != 0,
            "adaln": is_quantized,
        }
        ignored = [key for key, is_set in extra.items() if is_set]
        if ignored:
            raise ValueError(
                f"weights and activations are full precision, so {', '.join(ignored)} would be "
                "ignored; leave it out, or choose a quantizer"
            )
        return []
    block = {
        "weight": {"method": block_weight},
        "activation": _activation(quantizer, bits),
    }
    modulation = {
        "fixed_bits": True,
        "weight": {"method": adaln_weight},
        "activation": _activation("none" if adaln_bits is None else quantizer, adaln_bits),
    }

    def rules_for(name: str, kind: list[str], match: list[str], is_adaln: bool) -> None:
        """Add the rules of layers that are modulations, or are not."""
        if not match:
            return
        rule = {"name": name, "kind": kind, "match": match}
        if is_adaln and not is_quantized:
            rules.append(rule)
        else:
            rules.extend(_by_pattern(plan, {**rule, **(modulation if is_adaln else block)}))

    rules: list[dict[str, Any]] = []
    skip = _patterns(layers, "skip", [])
    if skip:
        every = ["block", "adaLN", "other"]
        rules.append({"name": "skip", "match": skip, "kind": every})
    patterns = _patterns(layers, "adaln", None)
    include = _patterns(layers, "include", []) or []
    inside = ["block"] if patterns is None else ["block", "adaLN"]
    if patterns is not None:
        rules_for("adaln", inside, patterns, True)
        included = _both(include, patterns)
    else:
        if is_quantized:
            rules_for("adaln", ["adaLN"], ["*"], True)
        included = [pattern for pattern in include if _names_modulation(pattern)]
    rules_for("included-adaln", ["other"], included, True)
    rules_for("included", ["other"], [p for p in include if p not in included], False)
    rules_for("block", inside, ["*"], False)
    return rules


def _names_modulation(pattern: str) -> bool:
    """Whether what an `include` pattern matches is a modulation, where one can tell."""
    if any(map(_MODULATION.search, pattern.split("."))):
        return True
    if _literal_end(pattern) != pattern:
        raise ValueError(
            f"layers.include: {pattern!r} may match modulation layers and others, which it would "
            "not treat alike; name the layers, or write the plan as [[layers]]"
        )
    return False


def _activation(quantizer: str, bits: int | None) -> Any:
    return "none" if quantizer == "none" else {"method": quantizer, "bits": bits}


def _by_pattern(plan: Mapping[str, Any], rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The rule with its rotation and branch; split where these are for some of its layers only."""
    rotation, low_rank = plan.get("rotation", {}), plan.get("low_rank", {})
    kind, rank = rotation.get("kind", "none"), low_rank.get("rank", 0)
    rotated = (_patterns(rotation, "layers", ["*"]) or []) if kind != "none" else []
    branched = _patterns(low_rank, "layers", None) if rank else []
    branched = ["*"] if branched is None else branched
    turn: dict[str, Any] = {"rotation": {"method": kind}}
    branch: dict[str, Any] = {"branch": {"method": "svd", "rank": rank}}
    match, name = rule["match"], rule["name"]
    cases: list[dict[str, Any]] = []
    for suffix, patterns, extra in (
        ("-rotated-branch", _both(rotated, branched), {**turn, **branch}),
        ("-rotated", rotated, turn),
        ("-branch", branched, branch),
        ("", ["*"], {}),
    ):
        found = _both(match, patterns)
        if found:
            cases.append({**rule, "name": name + suffix, "match": found, **extra})
            if found == match:
                break
    cases[-1]["name"] = name
    return cases


def _both(a: list[str], b: list[str]) -> list[str]:
    """Patterns of the names that match one of `a` and one of `b`."""
    if a == b:
        return a
    found: list[str] = []
    for one in a:
        for other in b:
            if _covers(other, one):
                found.append(one)
            elif _covers(one, other):
                found.append(other)
            elif not _are_apart(one, other):
                found.append(f"{one}{BOTH}{other}")
    return list(dict.fromkeys(found))


def _literal_end(pattern: str) -> str:
    """What follows the last wildcard: every name that matches ends so."""
    return re.split(r"[*?\]]", pattern)[-1]


def _covers(wide: str, narrow: str) -> bool:
    """Whether `wide` surely matches all that `narrow` does."""
    end, narrow_end = _literal_end(wide), _literal_end(narrow)
    if wide == f"*{end}":  # which matches whatever ends so, dots included
        return narrow_end.endswith(end)
    return wide == end and (narrow == end or narrow_end.endswith(f".{end}"))


def _are_apart(one: str, other: str) -> bool:
    """Whether no name can match both."""
    # Without a wildcard it matches whole components.
    ends = [f".{end}" if end == p else end for p in (one, other) for end in [_literal_end(p)]]
    return not ends[0].endswith(ends[1]) and not ends[1].endswith(ends[0])


def _bits(allocation: Mapping[str, Any]) -> dict[str, Any] | None:
    names = {"mean_bits": "mean", "bit_choices": "choices", "sensitivity_steps": "steps"}
    keys_of: dict[str, tuple[str, ...]] = {
        "uniform": (),
        "ampn": (*names, "cost"),
        "file": ("path", "sha256"),
    }
    method = allocation.get("method", "uniform")
    if method not in keys_of:
        raise ValueError(f"allocation.method: {method!r} is none{suggest(str(method), keys_of)}")
    for key in ("mean_bits", "path"):
        if key not in keys_of[method] and none_word(allocation.get(key)) is not None:
            raise ValueError(f"allocation.{key} is not used by method {method!r}; leave it out")
    if method == "uniform":
        return None
    keys = keys_of[method]
    return {names.get(key, key): allocation[key] for key in keys if key in allocation}
