"""The file of claims: its schema, and the digest that says whether a claim was changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from robuq_bench.config.files import parse_toml, plan_names, validate, workload_names
from robuq_bench.errors import ConfigError, UsageError, suggest
from robuq_bench.files import read_text, sha256_bytes
from robuq_bench.sections import Floats, Ints, Name, OptionalFloat, Section, Strings, ascends
from robuq_bench.study_index import find_study

CLAIMS_FILE = Path(__file__).with_name("claims.toml")

Expected = Literal["better", "equivalent", "worse"]


def _check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """ValueError unless a plan or workload is packaged, or a file that is there."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ValueError(f"{kind} file not found: {name}")
    elif name not in known:
        raise ValueError(f"unknown {kind} {name!r}{suggest(name, known)}")


def _digest(values: Any) -> str:
    return sha256_bytes(json.dumps(values, sort_keys=True).encode())


class Arm(Section):
    """What is trained: a plan (name or file), and settings as `--set` has them.

    `extra_steps` are trained on top of a claim's budget, as another arm spends in a warm-up.
    """

    plan: str
    set: Strings = ()
    extra_steps: int = Field(default=0, ge=0)

    @field_validator("set")
    @classmethod
    def _no_budget(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        own = {"training.steps": "budgets of claims", "training.learning_rate": "`claims tune`"}
        own["train.learning_rate"] = own["training.learning_rate"]
        for text in value:
            key, equals, _ = text.partition("=")
            key = key.strip().removeprefix("workload.").removeprefix("plan.")
            if not equals or not key:
                raise ValueError(f"{text!r} is not KEY=VALUE, as `--set` has it")
            if key in own:
                raise ValueError(f"{key} is what {own[key]} decide; leave it out of the arm")
        return value


class Defaults(Section):
    """What a claim takes where it says nothing else.

    workloads: each is judged on its own, as every one of `budgets` is (`training.steps`; none: the
        workload's).
    metric: a metric of `train-and-eval`, or its name without the feature space ("fid").
    seeds: of training; runs are paired by them.
    margin: ratios from 1 − margin to its reciprocal are of no consequence.
    difference_margin: compare by differences instead, within this margin in the metric's unit.
    """

    workloads: Strings = ("digits",)
    metric: str = "fid"
    seeds: Ints = tuple(range(8))
    budgets: Ints = ()
    margin: float = Field(default=0.03, gt=0, lt=1)
    difference_margin: OptionalFloat = Field(default=None, gt=0)

    @field_validator("workloads")
    @classmethod
    def _known_workloads(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"must name workloads, none twice: {list(value)}")
        for name in value:
            _check_name("workload", name, workload_names())
        return value

    @field_validator("seeds", "budgets")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and not ascends(value, 0):
            raise ValueError(f"must ascend from 0 or more without repeats: {list(value)}")
        return value


class Claim(Defaults):
    """A sentence about arms, and what is expected of them.

    candidate, baseline: an arm, or two, [a, b], of which the ratio a ÷ b (or difference) counts:
        the gain of an arm beside another arm's.
    expect: of the candidate beside the baseline; less is better for metrics such as FID.
    family: claims whose p-values are corrected together, on each workload.
    """

    text: str
    candidate: Strings
    baseline: Strings
    expect: Expected
    family: Name

    @field_validator("candidate", "baseline", mode="before")
    @classmethod
    def _one_or_two(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if not len(self.candidate) == len(self.baseline) <= 2:
            raise ValueError("candidate and baseline name one arm each, or two each")
        if not self.weights:
            raise ValueError("the candidate is compared with itself")
        if not self.seeds:
            raise ValueError("seeds must not be empty")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Arm -> weight of its logarithm (or value); they add up to 0."""
        found: dict[str, float] = {}
        for names, sign in ((self.candidate, 1.0), (self.baseline, -1.0)):
            for name in names:
                found[name] = found.get(name, 0.0) + sign
                sign = -sign
        return {name: weight for name, weight in found.items() if weight}


class Finding(Section):
    """A claim that a study judges: one row of the table `verdicts` of a finished run of it.

    claim, subject: of that row, as fnmatch patterns.
    expect: its verdict.
    """

    text: str
    study: str
    workload: str = "digits"
    claim: str = "*"
    subject: str = "*"
    expect: str

    @field_validator("study")
    @classmethod
    def _known_study(cls, value: str) -> str:
        try:
            find_study(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("workload")
    @classmethod
    def _known_workload(cls, value: str) -> str:
        _check_name("workload", value, workload_names())
        return value


class Tuning(Section):
    """How `claims tune` chooses learning rates: by the mean metric over seeds of their own.

    factors: of the rate that the workload says. `set`: settings on top of an arm's. `steps`: of the
    trainings; 0 takes the workload's. The chosen rate serves all budgets.
    """

    factors: Floats = (0.5, 1.0, 2.0)
    seeds: Ints = (100, 101)
    metric: str = "fid"
    steps: int = Field(default=0, ge=0)
    set: Strings = ()

    @model_validator(mode="after")
    def _consistent(self) -> Tuning:
        if not self.factors or min(self.factors) <= 0 or len({*self.factors}) < len(self.factors):
            raise ValueError(f"factors are above 0, none twice: {list(self.factors)}")
        if not ascends(self.seeds, 0):
            raise ValueError(f"seeds must ascend without repeats: {list(self.seeds)}")
        return self


class Declared(Section):
    """All that a file of claims says."""

    defaults: Defaults = Defaults()
    tuning: Tuning = Tuning()
    arms: dict[Name, Arm] = Field(default_factory=dict)
    claims: dict[Name, Claim] = Field(default_factory=dict)
    studies: dict[Name, Finding] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Declared:
        for name, arm in self.arms.items():
            try:
                _check_name("plan", arm.plan, plan_names())
            except ValueError as error:
                raise ValueError(f"arms.{name}: {error}") from None
        for key, claim in self.claims.items():
            for arm_name in (*claim.candidate, *claim.baseline):
                if arm_name not in self.arms:
                    hint = suggest(arm_name, self.arms)
                    raise ValueError(f"claims.{key}: unknown arm {arm_name!r}{hint}")
            if shared := sorted({*claim.seeds} & {*self.tuning.seeds}):
                raise ValueError(
                    f"claims.{key}: seeds {shared} are those that learning rates are chosen on "
                    "(tuning.seeds); a claim needs others"
                )
        if both := sorted(self.claims.keys() & self.studies.keys()):
            raise ValueError(f"{both[0]!r} is both in claims and in studies; name one otherwise")
        return self

    def chosen(self, only: Sequence[str] = (), on: Sequence[str] = ()) -> Declared:
        """These claims and workloads alone; all where none is named.

        Raises:
            UsageError: a claim or workload that is not in the file; names the nearest.
        """
        for name in only:
            if name not in self.claims and name not in self.studies:
                hint = suggest(name, [*self.claims, *self.studies])
                raise UsageError(f"unknown claim {name!r}{hint}")
        known = {name for claim in self.claims.values() for name in claim.workloads}
        known |= {finding.workload for finding in self.studies.values()}
        for name in on:
            if name not in known:
                raise UsageError(f"no claim is about workload {name!r}{suggest(name, known)}")
        claims = {}
        for key, claim in self.claims.items():
            workloads = tuple(name for name in claim.workloads if not on or name in on)
            if workloads and (not only or key in only):
                claims[key] = claim.model_copy(update={"workloads": workloads})
        studies = {
            key: finding
            for key, finding in self.studies.items()
            if (not on or finding.workload in on) and (not only or key in only)
        }
        return self.model_copy(update={"claims": claims, "studies": studies})

    def says(self, key: str, place: tuple[str, int | None] | None) -> bool:
        """Whether a claim is made of a workload at a budget (None: of a study)."""
        claim = self.claims.get(key)
        if place is None or claim is None:
            return place is None and key in self.studies
        workload, steps = place
        return workload in claim.workloads and steps in (claim.budgets or (None,))

    def digest(self, key: str, workload: str = "") -> str:
        """SHA-256 of what decides a claim's verdict on a workload: claim, arms and family.

        Of its family count the claims on the workload with their budgets, over which p-values are
        corrected.
        """
        if key in self.studies:
            return _digest(self.studies[key].model_dump(mode="json"))
        claim = self.claims[key]
        own = claim.model_dump(mode="json", exclude={"workloads", "budgets"})
        family = {
            name: one.budgets
            for name, one in self.claims.items()
            if one.family == claim.family and workload in one.workloads
        }
        arms = {name: self.arm_digest(name) for name in claim.weights}
        return _digest({**own, "arms": arms, "of_family": family})

    def arm_digest(self, name: str) -> str:
        """SHA-256 of what an arm says."""
        return _digest(self.arms[name].model_dump(mode="json"))


def load_claims(path: Path | None = None) -> Declared:
    """Read a file of claims, the packaged one if none is named.

    Raises:
        ConfigError: it cannot be read, or a key, arm, plan, study or workload is unknown.
    """
    path = CLAIMS_FILE if path is None else path
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse_claims(text, str(path))


def parse_claims(text: str, origin: str) -> Declared:
    """The same of a file's text; `origin` names it in errors."""
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    defaults, claims = values.get("defaults", {}), values.get("claims", {})
    if isinstance(defaults, dict) and isinstance(claims, dict):
        merged = {k: {**defaults, **c} if isinstance(c, dict) else c for k, c in claims.items()}
        validate(Defaults, defaults, f"{origin}: defaults")  # so that no claim is blamed for them
        values = {**values, "claims": merged}
    return validate(Declared, values, origin)
