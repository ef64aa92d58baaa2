"""One frozen `Config` from plan, workload and flags, its canonical text and its hash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import (
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from robuq_bench.config.files import load_plan, load_workload, parse_toml, validate
from robuq_bench.config.identity import (
    INPUTS_OF_EVALUATION,
    identify,
    identify_data,
    identify_evaluation,
    identify_input,
)
from robuq_bench.config.older import NAMED_STUDIES, modern_plan
from robuq_bench.config.overrides import apply_overrides, refuse_foreign, refuse_unknown
from robuq_bench.config.plan import Plan
from robuq_bench.config.workload import TrainingConfig, Workload
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.files import sha256_bytes
from robuq_bench.methods import check_sources
from robuq_bench.sections import Name, Section, none_word
from robuq_bench.study_index import find_study, inputs_of, look_up, settings_class

SectionT = TypeVar("SectionT", bound=Section)

_MAIN_JOB = "train-and-eval"  # the one study that trains by `training.sensitivity_steps`
_NO_TRAINING = TrainingConfig(steps=0, batch_size=1, learning_rate=1.0)


class UnknownSettings(Section):
    """Settings of a study that is not here, as its run wrote them."""

    model_config = ConfigDict(extra="allow", strict=False)


class Config(Section):
    """Everything that decides a result. Equal configs have equal hashes, and share a run folder.

    Written down, `settings` are a section called as the study, such as `[normality]`.
    """

    study: Name
    study_version: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    plan: Plan
    workload: Workload
    settings: SerializeAsAny[Section] | None = None

    @model_serializer(mode="wrap")
    def _with_section(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        settings = values.pop("settings", None)
        return values if settings is None else {**values, self.study: settings}

    def settings_of(self, kind: type[SectionT]) -> SectionT:
        """The settings, which are a study's own class.

        Raises:
            UsageError: they are of another study.
        """
        if not isinstance(self.settings, kind):
            raise UsageError(
                f"this config is of study {self.study!r}, without {kind.__module__}.{kind.__name__}"
            )
        return self.settings


def resolve(
    study: str,
    version: str,
    plan: str | Path | Plan,
    workload: str | Path | Workload,
    seed: int = 0,
    overrides: Sequence[str] = (),
    *,
    uses_data: bool | None = None,
) -> Config:
    """Return the frozen config of one run; precedence is override > file > default.

    `overrides` are 'section.key=value' texts: a key is looked up in the workload, then in the
    plan; 'plan.', 'workload.' or the study's name in front say which. Files that exist (teacher,
    allocation, data, features, reference, VAE, and what a study names) are identified by their
    SHA-256, so that a change of content is another run; `uses_data=False` leaves out data and
    features, as commands do that write no run (None: as the study says).

    Raises:
        ConfigError: unknown name or key, invalid value, or seed out of range.
        CheckpointError: the teacher's folder does not say which file is meant.
    """
    refuse_unknown(study, overrides)
    parts: dict[str, dict[str, Any]] = {
        "plan": _dump(plan if isinstance(plan, Plan) else load_plan(plan)),
        "workload": _dump(workload if isinstance(workload, Workload) else load_workload(workload)),
    }
    info, kind = look_up(study), settings_class(study)
    if kind is not None:
        parts[study] = _defaults(study, kind)
    if info is not None and not info.uses_overrides:
        refuse_foreign(parts, study, overrides)
    apply_overrides(parts, study, overrides)
    _override_rate(parts["plan"], overrides)
    if kind is not None:
        _refuse_missing(study, kind, parts[study])
    origin = "--set" if overrides else "config"
    bits = parts["plan"]["bits"]
    if isinstance(bits, dict) and none_word(bits.get("path")):
        identify(bits, "path")
    if uses_data is None:
        uses_data = info is None or info.uses_data
    if info is not None and not info.uses_teacher:
        # What such a run makes must not decide which run it is.
        parts["workload"]["teacher"].update(checkpoint="", sha256="", outliers=None)
    elif uses_data:
        identify_evaluation(parts["workload"]["evaluation"])
    if uses_data:
        identify_data(parts["workload"])
    identify(parts["workload"]["teacher"], "checkpoint")
    if kind is not None:
        for path_key in inputs_of(kind):
            identify_input(parts[study], path_key)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    settings = None if kind is None else validate(kind, parts[study], f"{origin}: {study}")
    config = _narrowed(
        Config(
            study=study,
            study_version=version,
            seed=seed,
            plan=validate(Plan, parts["plan"], f"{origin}: plan"),
            workload=validate(Workload, parts["workload"], f"{origin}: workload"),
            settings=settings,
        )
    )
    check_sources(config.plan.methods())
    allocation = config.plan.bits
    if allocation is not None and allocation.path is not None and not allocation.sha256:
        raise ConfigError(f"bits.path: no such file: {allocation.path}")
    if study == _MAIN_JOB:
        sensitivity_steps(config)  # refuses here what would show only after the training
    _check_steps(config)
    return config


def _override_rate(plan: dict[str, Any], overrides: Sequence[str]) -> None:
    """Let `--set training.learning_rate` win over the rate in a plan's file; refuse both by --set.

    Raises:
        ConfigError: two rates are set.
    """
    keys = {text.partition("=")[0].strip() for text in overrides}
    if not keys & {"training.learning_rate", "workload.training.learning_rate"}:
        return
    if keys & {"train.learning_rate", "plan.train.learning_rate"}:
        raise ConfigError(
            "--set training.learning_rate and --set train.learning_rate give two learning rates of "
            "one training; leave one out"
        )
    plan["train"]["learning_rate"] = None


def config_for(study: str, config: Config) -> Config:
    """The config of another study, with its default settings, on the same plan, workload and seed.

    Raises:
        UsageError: there is no such study.
    """
    info, kind = find_study(study), settings_class(study)
    own = {"study": info.name, "study_version": info.version}
    if kind is None:
        return _narrowed(config.model_copy(update={**own, "settings": None}))
    values = _defaults(study, kind)
    _refuse_missing(study, kind, values)
    settings = validate(kind, values, f"config: {study}")
    return _narrowed(config.model_copy(update={**own, "settings": settings}))


def _defaults(study: str, kind: type[Section]) -> dict[str, Any]:
    """What a study's settings are before any is set; without the fields that have no default.

    Raises:
        ConfigError: a default that its class refuses.
    """
    values = kind.model_construct().model_dump(mode="json", warnings=False)
    if not _required(kind):
        validate(kind, values, f"study {_file_of(study)}: default of Settings")
    return values


def _required(kind: type[Section]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if field.is_required()]


def _refuse_missing(study: str, kind: type[Section], values: dict[str, Any]) -> None:
    for name in _required(kind):
        if name not in values:
            raise ConfigError(
                f"study {_file_of(study)}: Settings.{name} has no default; give "
                f"--set {study}.{name}=VALUE"
            )


def _file_of(study: str) -> Path:
    return find_study(study).path


def _narrowed(config: Config) -> Config:
    """`config` without what its study does not use, which must not decide which run it is."""
    info, changes = look_up(config.study), dict[str, Any]()
    if info is not None and not info.uses_plan:
        changes["plan"] = load_plan("fp")
    if info is not None and not info.uses_training:
        workload = config.workload.model_copy(update={"training": _NO_TRAINING})
        samples_by_seed = workload.evaluation.image_seeds == "own"
        changes |= {"workload": workload, "seed": config.seed if samples_by_seed else 0}
    own: dict[str, str] = getattr(config.settings, "OWN_TRAINING", {})
    if own:
        values = {name: getattr(config.settings, field) for name, field in own.items()}
        used = {name: max(v) if isinstance(v, tuple) else v for name, v in values.items()}
        training = config.workload.training.model_copy(update=used)
        changes["workload"] = config.workload.model_copy(update={"training": training})
    return config.model_copy(update=changes)


def _check_steps(config: Config) -> None:
    """ConfigError when a study asks for more steps than the training's learning rate lasts.

    `LAST_STEP` of its settings names the field that says how far into the training it looks.
    """
    key = getattr(config.settings, "LAST_STEP", None)
    if key is None:
        return
    value = getattr(config.settings, key, None)
    asked = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(step, int) for step in asked):
        raise ConfigError(
            f"study {_file_of(config.study)}: LAST_STEP names Settings.{key}, which must hold a "
            f"number of steps, or several; it is {value!r}"
        )
    most = max(asked, default=0)
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


def training_recipe(config: Config) -> TrainingConfig:
    """How the student trains: the workload's `training`, with the learning rate of a plan's own."""
    recipe, own = config.workload.training, config.plan.train.learning_rate
    return recipe if own is None else recipe.model_copy(update={"learning_rate": own})


def sensitivity_steps(config: Config) -> int:
    """Training steps at the bits of the rules, before an allocated plan measures sensitivity.

    They come on top of `training_steps`, which all plans spend at their final bits, and take the
    learning rates of the first of these.

    Raises:
        ConfigError: they are more than the training has, whose learning rate runs out there.
    """
    bits, training = config.plan.bits, config.workload.training
    steps_in_all = training_steps(config)
    if bits is None or bits.path is not None or steps_in_all == 0:
        return 0
    own = bits.steps is not None
    steps = bits.steps or 0 if own else training.sensitivity_steps
    key = "bits.steps" if own else "training.sensitivity_steps"
    total = "training.steps" if config.plan.train.steps is None else "train.steps"
    if steps > steps_in_all:
        # A quarter is what the packaged workloads spend at most.
        raise ConfigError(
            f"{total} is {steps_in_all}, but bits are allocated after {key} = {steps} "
            "steps, which take the learning rates of as many steps of the training; lower the "
            f"latter, e.g. --set {key}={steps_in_all // 4}, or raise {total} to {steps}"
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
    if config.study == _MAIN_JOB and training_steps(config) == 0:
        # Nothing is trained, so how it would be decides nothing.
        values["plan"]["train"] = {"steps": 0}
        kept = values["workload"]["training"]["calibration_samples"]
        values["workload"]["training"] = {"calibration_samples": kept}
    if not config.plan.needs:
        values["plan"].pop("calibration")  # it is read by no method
    if "learning_rate" in values["plan"]["train"]:
        # `training_recipe` takes it in place of the workload's: one training, one name.
        values["workload"]["training"]["learning_rate"] = values["plan"]["train"].pop(
            "learning_rate"
        )
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
    if config.settings is not None:
        settings = values[config.study]
        for path_key in [key for key in settings if settings.get(f"{key}_sha256")]:
            del settings[path_key]
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
    for name in NAMED_STUDIES:
        if none_word(values.get(name, "none")) is None:
            values.pop(name, None)
    study = values.get("study")
    if isinstance(study, str) and isinstance(values.get(study), dict):
        section = values.pop(study)
        kind = settings_class(study)
        if kind is None:
            kind, section = UnknownSettings, {k: none_word(v) for k, v in section.items()}
        values["settings"] = validate(kind, section, f"{origin}: {study}")
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
