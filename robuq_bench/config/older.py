"""Plans in the schema before `[[layers]]`, as run folders and packed files of older code hold them.

There a plan had one choice per part for all layers (`weights`, `activations`, `rotation`,
`low_rank`), `adaln` beside them, and `layers.skip/include/adaln` patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robuq_bench.sections import none_word

OLD_SECTIONS = ("weights", "activations", "rotation", "low_rank", "adaln", "allocation", "qat")
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
    sections = {key: plan[key] for key in (*OLD_SECTIONS, "layers") if key in plan}
    return [
        f"{section}.{key}"
        for section, values in sections.items()
        if isinstance(values, Mapping)
        for key in values
    ]


def modern_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The same plan in today's schema; one that is in it already comes back as it is."""
    if not is_old(plan):
        return dict(plan)
    kept = ("name", "description", "attention")
    modern: dict[str, Any] = {key: plan[key] for key in kept if key in plan}
    modern["layers"] = _rules(plan)
    bits = _bits(plan.get("allocation", {}))
    if bits is not None:
        modern["bits"] = bits
    if "qat" in plan:
        modern["train"] = dict(plan["qat"])
    return modern


def _rules(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    weights, activations = plan.get("weights", {}), plan.get("activations", {})
    adaln, layers = plan.get("adaln", {}), plan.get("layers", {})
    quantizer = activations.get("quantizer", "none")
    block_weight = weights.get("quantizer", "none")
    if quantizer == "none" and block_weight == "none":
        return []
    block = {
        "weight": {"method": block_weight},
        "activation": _activation(quantizer, activations.get("bits", 8)),
    }
    adaln_bits = none_word(adaln.get("activation_bits", "none"))
    adaln_weight = adaln.get("weight_quantizer", "none")
    modulation = {
        "fixed_bits": True,
        "weight": {"method": adaln_weight},
        "activation": _activation("none" if adaln_bits is None else quantizer, adaln_bits),
    }
    is_quantized = adaln_weight != "none" or adaln_bits is not None
    patterns = none_word(layers.get("adaln", "none"))
    rules: list[dict[str, Any]] = []
    if layers.get("skip"):
        every = ["block", "adaLN", "other"]
        rules.append({"name": "skip", "match": list(layers["skip"]), "kind": every})
    kinds = ["adaLN"] if patterns is None else ["block", "adaLN"]
    where = {"kind": kinds} if patterns is None else {"kind": kinds, "match": list(patterns)}
    if is_quantized:
        rules += _by_pattern(plan, {"name": "adaln", **where, **modulation})
    elif patterns is not None:
        rules.append({"name": "adaln", **where})
    inside = {"kind": ["block"] if patterns is None else ["block", "adaLN"]}
    if layers.get("include"):
        included = {"kind": ["other"], "match": list(layers["include"])}
        rules += _by_pattern(plan, {"name": "included", **included, **block})
    return rules + _by_pattern(plan, {"name": "block", **inside, **block})


def _activation(quantizer: str, bits: int | None) -> Any:
    return "none" if quantizer == "none" else {"method": quantizer, "bits": bits}


def _by_pattern(plan: Mapping[str, Any], rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The rule with its rotation and branch; split where these are for some of its layers only."""
    rotation, low_rank = plan.get("rotation", {}), plan.get("low_rank", {})
    kind, rank = rotation.get("kind", "none"), low_rank.get("rank", 0)
    rotated = list(rotation.get("layers", ["*"])) if kind != "none" else []
    branched = none_word(low_rank.get("layers", "none")) if rank else []
    branched = ["*"] if branched is None else list(branched)
    turn: dict[str, Any] = {"rotation": {"method": kind}}
    branch: dict[str, Any] = {"branch": {"method": "svd", "rank": rank}}
    match = rule.get("match", ["*"])
    name = rule["name"]
    cases = []
    for suffix, patterns, extra in (
        ("-rotated-branch", _both(rotated, branched), {**turn, **branch}),
        ("-rotated", rotated, turn),
        ("-branch", branched, branch),
        ("", ["*"], {}),
    ):
        found = _both(match, patterns)
        if found:
            cases.append({**rule, "name": name + suffix, "match": found, **extra})
            if patterns == ["*"]:
                break
    cases[-1]["name"] = name
    return cases


def _both(a: list[str], b: list[str]) -> list[str]:
    """Patterns of names that match one of `a` and one of `b`, where that can be said by one list.

    Two lists that are neither the same nor for all layers have no such list: those of the older
    schema were joined with "*" only, and others are refused.
    """
    if a == b or b == ["*"]:
        return a
    if a == ["*"]:
        return b
    if not a or not b:
        return []
    raise ValueError(
        f"patterns {a} and {b} of the older schema cannot be joined; write the plan as [[layers]]"
    )


def _bits(allocation: Mapping[str, Any]) -> dict[str, Any] | None:
    names = {"mean_bits": "mean", "bit_choices": "choices", "sensitivity_steps": "steps"}
    method = allocation.get("method", "uniform")
    if method == "uniform":
        return None
    keys = {"ampn": (*names, "cost"), "file": ("path", "sha256")}[method]
    return {names.get(key, key): allocation[key] for key in keys if key in allocation}
