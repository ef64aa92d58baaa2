"""`--set KEY=VALUE`: which key is meant, what its value is, and what it replaces."""

from __future__ import annotations

import datetime
import difflib
import json
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from robuq_bench.config.files import as_table, keys_of, merge, parse_toml, section_of, sections_of
from robuq_bench.config.older import NEW_NAMES
from robuq_bench.config.plan import Plan, Rule
from robuq_bench.config.workload import Workload
from robuq_bench.errors import ConfigError, suggest
from robuq_bench.methods import SLOTS, Slot, method_class
from robuq_bench.sections import Section
from robuq_bench.study_index import settings_class

Override = tuple[str, list[str], Any]  # "plan", "workload" or the study, key path, value


def apply_overrides(parts: dict[str, dict[str, Any]], study: str, overrides: Sequence[str]) -> None:
    """Set the keys of 'section.key=value' texts in the parts of a config, in place.

    Raises:
        ConfigError: unknown key, or a text that is no override; values are checked with the whole.
    """
    for text in sorted(overrides, key=_turn):
        _override(parts, _parse_override(text, study, parts["plan"]))


def refuse_unknown(study: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that no plan has, so that a typo is answered at once.

    Those of rules need the plan, whose methods import torch.
    """
    for text in overrides:
        if not text.strip().removeprefix("plan.").startswith("layers"):
            _parse_override(text, study, {"name": "", "layers": []})


def refuse_foreign(parts: dict[str, dict[str, Any]], study: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key of the workload or the plan: the study takes those of a run."""
    for text in overrides:
        part, keys, _ = _parse_override(text, study, parts["plan"])
        if part != study:
            raise ConfigError(
                f"--set {'.'.join(keys)}: has no effect on study {study}, which judges a run by "
                f"its own {part}; set it where that run is made. Only {study}.KEY can be set"
            )


def _turn(text: str) -> int:
    """When an override comes, whatever the order they are given in.

    Methods first, since other methods have other parameters; digests last, since other files have
    other digests, and the width that a rank is for, since a rank alone is of any.
    """
    key = text.partition("=")[0].strip().removeprefix("plan.")
    if key.endswith(("sha256", ".at_width")):
        return 2
    is_method = key.startswith("layers.") and key.removesuffix(".method").endswith(
        tuple(f".{slot}" for slot in SLOTS)
    )
    return 0 if is_method else 1


def _override(parts: dict[str, dict[str, Any]], override: Override) -> None:
    """Set one key of the parts of a config, in place."""
    part, keys, value = override
    target: Any = parts[part]
    for key in keys[:-1]:
        inner = target.get(key) if isinstance(target, dict) else rule_named(target, key)
        if key in SLOTS:
            inner = target[key] = as_table(inner)
        if not isinstance(inner, dict | list):
            # A section that may be absent begins with its first key.
            inner = target[key] = {}
        target = inner
    if part == "plan" and keys[-1] in SLOTS and isinstance(as_table(value), dict):
        # As in a file that extends the plan: parameters belong to their method.
        present = target[keys[-1]] if isinstance(target[keys[-1]], dict) else {}
        target[keys[-1]] = merge(present, as_table(value))
        return
    if part == "plan" and keys[-1] == "method" and len(keys) == 4 and target.get("method") != value:
        target.clear()
    target[keys[-1]] = value
    if keys[-1] == "rank" and "at_width" in target:
        target["at_width"] = None  # as in `merge`: a rank alone is that rank at any width
    # A digest belongs to the file it was given for.
    if keys[-1] in ("path", "checkpoint", "source") and "sha256" in target:
        target["sha256"] = None if keys[:-1] == ["data"] else ""
    if f"{keys[-1]}_sha256" in target:
        target[f"{keys[-1]}_sha256"] = None if part == "workload" else ""


def _parse_override(text: str, study: str, plan: dict[str, Any]) -> Override:
    if text.encode("utf-8", "ignore").decode() != text:
        # Bytes of a file name; neither config.toml nor the manifest could hold them.
        raise ConfigError(f"--set {text!a}: is not UTF-8 text; rename that file or folder")
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected section.key=value, e.g. training.steps=2000")
    part, _, inner = key.partition(".")
    models = _overridable(study)
    known = {name: keys_of(model) for name, model in models.items()}
    known["plan"] = [key for key in known["plan"] if not key.startswith("layers.")]
    known["plan"] += ["bits", *rule_keys(plan)]
    if part in known and inner in known[part]:
        return part, inner.split("."), _parse_value(value, models[part], inner)
    owners = [owner for owner, keys in known.items() if key in keys]
    if len(owners) > 1:
        full = " or ".join(f"{owner}.{key}" for owner in owners)
        raise ConfigError(f"--set {key}: is a key of both; write {full}")
    if owners:
        return owners[0], key.split("."), _parse_value(value, models[owners[0]], key)
    if key.removeprefix("plan.") in NEW_NAMES:
        raise ConfigError(f"--set {key}: is now {NEW_NAMES[key.removeprefix('plan.')]}")
    section, _, inner = key.removeprefix("plan.").partition(".")
    rule, rules = inner.partition(".")[0], [rule["name"] for rule in plan["layers"]]
    if section == "layers" and inner and rule not in rules:
        hint = suggest(rule, rules) or "; it has none"
        raise ConfigError(f"--set {key}: plan {plan['name']!r} has no rule {rule!r}{hint}")
    raise ConfigError(f"--set {key}: {_why_unknown(key, known, models)}")


def rule_named(rules: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The rule of a plan's `layers` that has this name."""
    return next(rule for rule in rules if rule["name"] == name)


def rule_keys(plan: dict[str, Any]) -> list[str]:
    """What `--set` can set of a plan's rules: layers.RULE.KEY and layers.RULE.SLOT.PARAMETER."""
    keys: list[str] = []
    for rule in plan["layers"]:
        here = f"layers.{rule['name']}"
        keys += [f"{here}.{key}" for key in Rule.model_fields if key != "name"]
        for slot in SLOTS:
            method = as_table(rule[slot])
            keys.append(f"{here}.{slot}.method")
            if isinstance(method, dict):
                keys += [f"{here}.{slot}.{key}" for key in _parameters(slot, method)]
    return keys


def _parameters(slot: Slot, values: dict[str, Any]) -> list[str]:
    """What a method has besides its name; nothing of one that does not exist."""
    try:
        found = method_class(slot, str(values.get("method")))
    except ConfigError:
        return []  # the plan is refused for it, when all overrides are in
    return [key for key in found.model_fields if key != "method"]


def _overridable(study: str) -> dict[str, type[Section]]:
    models: dict[str, type[Section]] = {"workload": Workload, "plan": Plan}
    settings = settings_class(study)
    if settings is not None:
        models[study] = settings
    return models


def _why_unknown(key: str, known: dict[str, list[str]], models: dict[str, type[Section]]) -> str:
    part, _, inner = key.partition(".")
    if key in known:
        return f"is a section, not a key; its keys: {', '.join(known[key])}"
    bare = inner if part in known else key
    for owner, model in models.items():
        if bare in sections_of(model):
            inside = [full for full in known[owner] if full.startswith(f"{bare}.")]
            return f"is a section, not a key; its keys: {', '.join(inside)}"
    every = list(dict.fromkeys(key for keys in known.values() for key in keys))
    if difflib.get_close_matches(bare, every, n=1, cutoff=0.8):
        return f"unknown key{suggest(bare, every)}"
    section, _, last = bare.rpartition(".")
    same = [full for full in every if full.rpartition(".")[2] == last]
    if same:
        return f"unknown key; did you mean {' or '.join(map(repr, same))}?"
    inside = [full for full in every if section and full.startswith(f"{section}.")]
    if inside:
        return f"unknown key; known there: {', '.join(inside)}"
    sections = {full.rpartition(".")[0] for full in every if "." in full}
    return f"unknown key{suggest(section or last, sections)}"


def _parse_value(text: str, model: type[Section], key: str) -> Any:
    """A TOML value where `text` is exactly one, else the text itself (dates stay text).

    A field that holds text takes it as typed, so that a folder may be called 2024; quotes around
    the whole are TOML's.
    """
    text = text.strip()
    if "\n" in text:
        return text
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
    if isinstance(value, str) and not text.startswith("#"):
        return value
    is_date = isinstance(value, datetime.date | datetime.time)
    return text if is_date or text.startswith("#") or _is_text(model, key) else value


def _is_text(model: type[Section], key: str) -> bool:
    """Whether the field `key` of a model holds text (or nothing) and nothing else."""
    *sections, last = key.split(".")
    if sections[:1] == ["layers"] and model is Plan:
        return last in ("name", "method")
    for name in sections:
        found = section_of(model.model_fields[name].annotation)
        model = model if found is None else found  # type: ignore[assignment]
    annotation = model.model_fields[last].annotation
    is_union = get_origin(annotation) in (Union, types.UnionType)
    options = get_args(annotation) if is_union else (annotation,)
    return all(
        option in (str, types.NoneType)
        or (get_origin(option) is Literal and all(isinstance(a, str) for a in get_args(option)))
        for option in options
    )


def quoted(text: str) -> str:
    """`text` as a TOML string: what `--set KEY=...` takes literally, whatever it holds."""
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
