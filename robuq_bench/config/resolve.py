"""One frozen `Config` from plan, workload and flags, its canonical text and its hash."""

from __future__ import annotations

import datetime
import difflib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import Field

from robuq_bench.config.files import (
    keys_of,
    load_plan,
    load_workload,
    parse_toml,
    section_of,
    sections_of,
    validate,
)
from robuq_bench.config.identity import (
    INPUTS_OF_EVALUATION,
    INPUTS_OF_STUDIES,
    identify,
    identify_data,
    identify_evaluation,
    identify_input,
)
from robuq_bench.config.older import NEW_NAMES, modern_plan
from robuq_bench.config.plan import Plan
from robuq_bench.config.studies import (
    STUDY_SETTINGS,
    OptionalAllocation,
    OptionalEfficiency,
    OptionalKernels,
    OptionalNormality,
    OptionalPacked,
    OptionalSensitivity,
    default_settings,
)
from robuq_bench.config.workload import Workload
from robuq_bench.errors import ConfigError, suggest
from robuq_bench.files import sha256_bytes
from robuq_bench.methods import SLOTS
from robuq_bench.sections import Name, Section, none_word

_STUDIES_WITHOUT_TEACHER = ("train-teacher", "train-features")
_STUDIES_WITHOUT_DATA = (
    "kernels",
    "efficiency",
    "step-time",
    "allocation-speed",
    "normality-speed",
    "sample",
    "export",
    "account",
)
_MAIN_JOB = "train-and-eval"  # the one study that trains by `training.sensitivity_steps`
# Settings that say how far into the workload's training a study looks.
_STEPS_OF_STUDIES = {
    "allocation": "warmup_steps",
    "normality": "qat_steps",
    "sensitivity": "qat_steps",
}

Override = tuple[str, list[str], Any]  # "plan", "workload" or the study, key path, value


class Config(Section):
    """Everything that decides a result. Equal configs have equal hashes, and share a run folder."""

    study: Name
    study_version: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    plan: Plan
    workload: Workload
    normality: OptionalNormality = None
    sensitivity: OptionalSensitivity = None
    allocation: OptionalAllocation = None
    kernels: OptionalKernels = None
    efficiency: OptionalEfficiency = None
    packed: OptionalPacked = None


def resolve(
    study: str,
    version: str,
    plan: str | Path | Plan,
    workload: str | Path | Workload,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the frozen config of one run; precedence is override > file > default.

    `overrides` are 'section.key=value' texts: a key is looked up in the workload, then in the
    plan; 'plan.', 'workload.' or the study's name in front say which. Files that exist (teacher,
    allocation, data, features, reference, VAE, and what a study names) are identified by their
    SHA-256, so that a change of content is another run.

    Raises:
        ConfigError: unknown name or key, invalid value, or seed out of range.
        CheckpointError: the teacher's folder does not say which file is meant.
    """
    parts: dict[str, dict[str, Any]] = {
        "plan": _dump(plan if isinstance(plan, Plan) else load_plan(plan)),
        "workload": _dump(workload if isinstance(workload, Workload) else load_workload(workload)),
    }
    settings = default_settings(study)
    if settings is not None:
        parts[study] = settings
    for text in overrides:
        # Digests last, whatever the order they are given in.
        if text.partition("=")[0].strip().endswith("sha256"):
            continue
        _override(parts, _parse_override(text, study, parts["plan"]))
    for text in overrides:
        if text.partition("=")[0].strip().endswith("sha256"):
            _override(parts, _parse_override(text, study, parts["plan"]))
    origin = "--set" if overrides else "config"
    bits = parts["plan"]["bits"]
    if isinstance(bits, dict) and none_word(bits.get("path")):
        identify(bits, "path")
    if study in _STUDIES_WITHOUT_TEACHER:
        # What these runs make must not decide which run they are.
        parts["workload"]["teacher"].update(checkpoint="", sha256="")
    elif study not in _STUDIES_WITHOUT_DATA:
        identify_evaluation(parts["workload"]["evaluation"])
    if study not in _STUDIES_WITHOUT_DATA:
        identify_data(parts["workload"])
    identify(parts["workload"]["teacher"], "checkpoint")
    if settings is not None:
        for path_key in INPUTS_OF_STUDIES:
            identify_input(settings, path_key)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    sections: dict[str, Any] = {
        name: validate(STUDY_SETTINGS[name], values, f"{origin}: {name}")
        for name, values in parts.items()
        if name in STUDY_SETTINGS
    }
    config = Config(
        study=study,
        study_version=version,
        seed=seed,
        plan=validate(Plan, parts["plan"], f"{origin}: plan"),
        workload=validate(Workload, parts["workload"], f"{origin}: workload"),
        **sections,
    )
    if study == _MAIN_JOB:
        sensitivity_steps(config)  # refuses here what would show only after the training
    _check_steps(config)
    return config


def _override(parts: dict[str, dict[str, Any]], override: Override) -> None:
    """Set one key of the parts of a config, in place."""
    part, keys, value = override
    target: Any = parts[part]
    for key in keys[:-1]:
        inner = target.get(key) if isinstance(target, dict) else rule_named(target, key)
        if inner is None:  # a section that may be absent begins with its first key
            inner = target[key] = {}
        target = inner
    target[keys[-1]] = value
    # A digest belongs to the file it was given for.
    if keys[-1] in ("path", "checkpoint", "source") and "sha256" in target:
        target["sha256"] = None if keys[:-1] == ["data"] else ""
    if f"{keys[-1]}_sha256" in target:
        target[f"{keys[-1]}_sha256"] = None if part == "workload" else ""
    if part == "plan" and keys[-1] == "method" and len(keys) == 4:
        # Parameters belong to their method.
        target.clear()
        target["method"] = value


def _check_steps(config: Config) -> None:
    """ConfigError when a study asks for more steps than the training's learning rate lasts."""
    key, most = _STEPS_OF_STUDIES.get(config.study), 0
    if key is not None:
        value = getattr(getattr(config, config.study), key)
        most = max(value, default=0) if isinstance(value, tuple) else value
    steps = config.workload.training.steps
    if most > steps:
        raise ConfigError(
            f"{config.study}.{key} asks for the model after {most} steps, but the learning rate "
            f"has run out after training.steps = {steps}: the rest would not be trained as meant; "
            f"set training.steps={most}, or lower {config.study}.{key}"
        )


def training_steps(config: Config) -> int:
    """QAT steps of the main job: the plan's, or the workload's; 0 is post-training quantization."""
    own = config.plan.train.steps
    return config.workload.training.steps if own is None else own


def sensitivity_steps(config: Config) -> int:
    """Training steps at the bits of the rules, before an allocated plan measures sensitivity.

    Raises:
        ConfigError: they leave no step of the training for the allocated bits.
    """
    bits, training = config.plan.bits, config.workload.training
    steps_in_all = training_steps(config)
    if bits is None or bits.path is not None or steps_in_all == 0:
        return 0
    own = bits.steps is not None
    steps = bits.steps or 0 if own else training.sensitivity_steps
    key = "bits.steps" if own else "training.sensitivity_steps"
    total = "training.steps" if config.plan.train.steps is None else "train.steps"
    if steps >= steps_in_all and steps > 0:
        # A quarter is what the packaged workloads spend at most.
        raise ConfigError(
            f"{total} is {steps_in_all}, but bits are allocated after {key} = {steps} "
            "steps, so nothing would be trained at the allocated bits; lower the latter, e.g. "
            f"--set {key}={steps_in_all // 4}, or raise {total} above {steps}"
        )
    return steps


def canonical_json(config: Config) -> str:
    """Return sorted, compact JSON of everything that decides the result.

    Descriptions decide nothing; nor does the place of a file that is known by its SHA-256, stated
    or pinned.
    """
    # Leaving out what is not set keeps old runs' names when a new optional field appears.
    values = config.model_dump(
        mode="json",
        exclude={"plan": {"description"}, "workload": {"description"}},
        exclude_none=True,
    )
    teacher = values["workload"]["teacher"]
    for section, path_key in ((values["plan"].get("bits", {}), "path"), (teacher, "checkpoint")):
        if section.get("sha256"):
            section.pop(path_key, None)
    if not config.plan.needs:
        values["plan"].pop("calibration")  # it is read by no method
    data, evaluation = values["workload"]["data"], values["workload"]["evaluation"]
    if data.get("sha256"):
        data.pop("path", None)
    for path_key in INPUTS_OF_EVALUATION:
        if evaluation.get(f"{path_key}_sha256"):
            evaluation.pop(path_key, None)
    if evaluation.get("features_sha256"):
        # Runs from when metrics did not say which of several networks they are of.
        evaluation["features_name_metrics"] = True
    evaluation.pop("inception_weights", None)  # only one content is accepted: INCEPTION_SHA256
    training = values["workload"]["training"]
    if "low_rank_learning_rate" in training:
        # Runs from before the rate was obeyed must not answer for those that obey it.
        training["low_rank_learning_rate_is_used"] = True
    for name in STUDY_SETTINGS.keys() & values.keys():
        for path_key in INPUTS_OF_STUDIES:
            if values[name].get(f"{path_key}_sha256"):
                values[name].pop(path_key, None)
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_hash(config: Config) -> str:
    """Return the SHA-256 of `canonical_json` as 64 hex digits; folders use the first 12."""
    return sha256_bytes(canonical_json(config).encode())


def to_toml(config: Section) -> str:
    """Return the resolved config as TOML; absent values are written as "none"."""
    return tomli_w.dumps(_none_as_word(config.model_dump(mode="json")))


def config_from_toml(text: str, origin: str) -> Config:
    """Read back what `to_toml` wrote; `origin` names the file in errors.

    Raises:
        ConfigError: not TOML, or not a config of this version of the suite.
    """
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    if isinstance(values.get("plan"), dict):
        try:
            values["plan"] = modern_plan(values["plan"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{origin}: plan of older code: {error}") from None
    return validate(Config, values, origin)


def _none_as_word(value: Any) -> Any:
    """`value` with what TOML cannot say, None, replaced at any depth; `none_word` reads it back."""
    if isinstance(value, dict):
        return {key: _none_as_word(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_none_as_word(item) for item in value]
    return "none" if value is None else value


def _dump(part: Plan | Workload) -> dict[str, Any]:
    return part.model_dump(mode="json")


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
    known["plan"] = [key for key in known["plan"] if key != "layers"] + rule_keys(plan)
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
    raise ConfigError(f"--set {key}: {_why_unknown(key, known, models)}")


def rule_named(rules: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The rule of a plan's `layers` that has this name."""
    return next(rule for rule in rules if rule["name"] == name)


def rule_keys(plan: dict[str, Any]) -> list[str]:
    """What `--set` can set of a plan's rules: layers.RULE.KEY and layers.RULE.SLOT.PARAMETER."""
    keys: list[str] = []
    for rule in plan["layers"]:
        for key, value in rule.items():
            keys.append(f"layers.{rule['name']}.{key}")
            if isinstance(value, dict):
                keys += [f"layers.{rule['name']}.{key}.{inner}" for inner in value]
            elif key in SLOTS:
                keys.append(f"layers.{rule['name']}.{key}.method")
    return keys


def _overridable(study: str) -> dict[str, type[Section]]:
    models: dict[str, type[Section]] = {"workload": Workload, "plan": Plan}
    if study in STUDY_SETTINGS:
        models[study] = STUDY_SETTINGS[study]
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
