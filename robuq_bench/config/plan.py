"""`Plan`: how a model is quantized, as ordered rules. Frozen, strict, and free of heavy imports.

A plan's `[[layers]]` are rules; the first whose kind and patterns fit a layer says what fills the
slots of that layer (see `robuq_bench.methods.base`). A layer that no rule fits, or whose rule fills
no slot, stays in full precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from robuq_bench.errors import ConfigError, suggest
from robuq_bench.methods import (
    SLOTS,
    ActivationMethod,
    BranchMethod,
    CentringMethod,
    Method,
    RotationMethod,
    ScalingMethod,
    Slot,
    WeightMethod,
    method_class,
    read_method,
)
from robuq_bench.sections import (
    Ints,
    Name,
    OptionalFloat,
    OptionalInt,
    OptionalText,
    Section,
    Strings,
    TextDigest,
    none_word,
)

Kind = Literal["block", "adaLN", "other"]
"""Where a layer stands by the model's structure: in a block; in a norm or modulation there; or
elsewhere (embedders, heads, adapters, routers). See `quantization/selection.py`."""

METRICS = (
    "epsilon_mse",
    "epsilon_mse_teacher",
    "output_mse",
    "output_nsr",
    "fisher",
    "hessian_trace",
    "higgs",
)
SOLVERS = (
    "exact",
    "milp",
    "lagrangian",
    "greedy",
    "evolutionary",
    "random",
    "random-best-of-1000",
    "uniform",
)


BOTH = " & "
"""Between two patterns in one, both of which a name has to match."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether an fnmatch pattern matches `name` or what follows one of its dots.

    So a wrapper ("module.", "_orig_mod.", "dit.") changes nothing. "blocks.3.* & *.fc1" matches
    where both of its patterns do.
    """
    return any(_matches(name, pattern) for pattern in patterns)


@lru_cache(maxsize=65536)  # reports ask the same of every run
def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    suffixes = [".".join(parts[start:]) for start in range(len(parts))]
    return all(
        any(fnmatchcase(s, part) for s in suffixes) for part in re.split(r"\s*&\s*", pattern)
    )


class Rule(Section):
    """What fills the slots of the layers that it fits; "none" or no entry leaves a slot empty.

    `name` is what `extends` and `--set layers.NAME...` call the rule by. `match` are fnmatch
    patterns, each matching a layer's name from any of its components on ("A & B": both patterns
    do). `fixed_bits` keeps the layers out of the allocation of `[bits]`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=32)] = "layers"
    match: Strings = ("*",)
    kind: tuple[Kind, ...] = ("block",)
    fixed_bits: bool = False
    centring: SerializeAsAny[CentringMethod] | None = None
    scaling: SerializeAsAny[ScalingMethod] | None = None
    rotation: SerializeAsAny[RotationMethod] | None = None
    branch: SerializeAsAny[BranchMethod] | None = None
    weight: SerializeAsAny[WeightMethod] | None = None
    activation: SerializeAsAny[ActivationMethod] | None = None

    @field_validator("kind", "match", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and not value:
            raise ValueError("must not be empty: the rule would fit no layer; leave it out")
        return tuple(value) if isinstance(value, list) else value

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _methods_by_name(cls, value: Any, info: Any) -> Any:
        try:
            return read_method(info.field_name, value)
        except ValidationError as error:
            raise ValueError(_why_invalid(info.field_name, value, error)) from None
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def slots(self) -> dict[str, Method]:
        """The methods of the slots that are filled, in the order in which they are fitted."""
        found = {slot: getattr(self, slot) for slot in SLOTS}
        return {slot: method for slot, method in found.items() if method is not None}

    def has_choice(self, of: str) -> bool:
        """Whether an allocation may decide the bits of its activations, or weights."""
        method = getattr(self, of)
        return (
            method is not None
            and not self.fixed_bits
            and "bits" in type(method).model_fields
            and not getattr(method, "bits_are_fitted", False)
        )

    def fits(self, name: str, kind: Kind) -> bool:
        """Whether this rule is for the layer."""
        return kind in self.kind and matches(name, self.match)


def _why_invalid(slot: Slot, value: Any, error: ValidationError) -> str:
    name = value if isinstance(value, str) else value["method"]
    found = method_class(slot, name)
    fields = [key for key in found.model_fields if key not in ("method", "sha256")]
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            hint = suggest(key, fields) if fields else "; it has no parameters"
            lines.append(f"method {name!r} has no {key!r}{hint}")
        elif item["type"] == "missing":
            lines.append(f"method {name!r} needs {key!r}; add it")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return "; ".join(lines)


class AttentionConfig(Section):
    """Bits of the operands of QK^T and attention·V; None keeps fused full-precision attention."""

    matmul_bits: OptionalInt = Field(default=None, ge=2, le=8)


class BitsConfig(Section):
    """Bits per layer, decided by a metric and a solver under a mean, or read from a file.

    Without this section every layer has the bits that its rule says. `of` says whose bits; `mean`
    is over MACs for "macs", over weights for "weights" and over input elements for "inputs".
    `steps` are the QAT steps before the metric is measured, on top of those at the allocated bits;
    None takes the workload's, 0 measures the untrained student.
    `sha256` is filled in from `path` when a config is resolved, so that a changed file is a
    different run.
    """

    of: Literal["activation", "weight"] = "activation"
    mean: OptionalFloat = Field(default=None, gt=0, le=16)
    choices: Ints = (1, 2, 3, 4)
    metric: str = "epsilon_mse"
    solver: str = "exact"
    cost: Literal["macs", "weights", "inputs"] = "macs"
    steps: OptionalInt = Field(default=None, ge=0)
    path: OptionalText = None
    sha256: TextDigest = ""

    @model_validator(mode="before")
    @classmethod
    def _metric_of(cls, values: Any) -> Any:
        """The metric that is taken where none is named.

        Change from the model of the most bits says little about weights, all of which change it.
        """
        if isinstance(values, dict) and "metric" not in values and values.get("of") == "weight":
            return {**values, "metric": "epsilon_mse_teacher"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> BitsConfig:
        for key, known in (("metric", METRICS), ("solver", SOLVERS)):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"unknown {key} {value!r}{suggest(value, known)}")
        choices = self.choices
        if not choices or any(not 1 <= bits <= 16 for bits in choices):
            raise ValueError(f"choices must be between 1 and 16, got {list(choices)}")
        if list(choices) != sorted(set(choices)):
            raise ValueError(f"choices must ascend without repeats, got {list(choices)}")
        if (self.mean is None) == (self.path is None):
            raise ValueError("give a mean to allocate bits, or a path to read them from")
        if self.mean is not None and not choices[0] <= self.mean <= choices[-1]:
            raise ValueError(
                f"mean {self.mean:g} cannot be reached with choices {list(choices)}; choose "
                f"between {choices[0]} and {choices[-1]}"
            )
        if self.of == "weight" and self.metric not in ("epsilon_mse", "epsilon_mse_teacher"):
            raise ValueError(
                f"metric {self.metric!r} perturbs activations; bits of weights are measured by "
                "epsilon_mse or epsilon_mse_teacher"
            )
        return self


class CalibrationConfig(Section):
    """What is observed before methods that need it are fitted; read where one does.

    `samples` training images, each at one timestep drawn uniformly. Of every layer at most `tokens`
    tokens are kept. The layers go block by block; with `quantized_predecessors` a block sees the
    outputs of the quantized blocks before it, without it those of the full-precision model.
    """

    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=64, ge=1)
    tokens: int = Field(default=4096, ge=1)
    quantized_predecessors: bool = True


class TrainConfig(Section):
    """QAT: loss = distillation_weight·||eps_student − eps_teacher||² + denoising_weight·eps-loss.

    `steps` None takes the workload's; 0 is post-training quantization. So does `learning_rate`, the
    peak of the schedule; `--set training.learning_rate` overrides a plan's own.
    """

    steps: OptionalInt = Field(default=None, ge=0)
    learning_rate: OptionalFloat = Field(default=None, gt=0)
    distillation_weight: float = Field(default=1.0, ge=0)
    denoising_weight: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _some_loss(self) -> TrainConfig:
        if self.distillation_weight == 0 and self.denoising_weight == 0:
            raise ValueError("one of distillation_weight and denoising_weight must be positive")
        return self


class Plan(Section):
    """How a model is quantized; packaged plans are `robuq_bench/plans/*.toml`."""

    name: Name
    description: str = ""
    layers: tuple[Rule, ...] = ()
    attention: AttentionConfig = AttentionConfig()
    bits: BitsConfig | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    train: TrainConfig = TrainConfig()

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("bits", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return none_word(value)

    def rule_for(self, name: str, kind: Kind) -> Rule | None:
        """The first rule that fits the layer `name`; None keeps it in full precision."""
        return next((rule for rule in self.layers if rule.fits(name, kind)), None)

    def methods(self) -> list[Method]:
        """Every method that some rule names."""
        return [method for rule in self.layers for method in rule.slots().values()]

    @property
    def is_full_precision(self) -> bool:
        """True when no rule fills a slot: the teacher itself."""
        return not self.methods()

    @property
    def uniform_bits(self) -> int | None:
        """Activation bits of the layers that an allocation may change, where all have the same."""
        rules = [rule for rule in self.layers if rule.activation and not rule.fixed_bits]
        found = {rule.activation.bits for rule in rules if rule.activation}
        return found.pop() if len(found) == 1 else None

    @property
    def needs(self) -> frozenset[str]:
        """What its methods read of calibration inputs."""
        return frozenset().union(*(method.needs for method in self.methods()))

    def _check_choices(self, bits: BitsConfig) -> None:
        """Refuse bits that nothing takes, or that a method has no grid for."""
        methods = [getattr(rule, bits.of) for rule in self.layers if rule.has_choice(bits.of)]
        if not methods:
            raise ValueError(
                f"bits of {bits.of}s are to be allocated, but no rule without fixed_bits has a "
                f"{bits.of} method with bits to choose"
            )
        for method in methods if bits.mean is not None else ():
            for choice in bits.choices:
                try:
                    method.model_validate({**method.model_dump(), "bits": choice})
                except (ValidationError, ConfigError):
                    raise ValueError(
                        f"bits.choices: {bits.of} method {method.method!r} does not take {choice} "
                        "bits; leave them out"
                    ) from None

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names = [rule.name for rule in self.layers]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two rules of layers are called {repeated!r}; give each a name")
        if self.is_full_precision:
            extra = [
                key
                for key, is_set in (
                    ("attention.matmul_bits", self.attention.matmul_bits is not None),
                    ("bits", self.bits is not None),
                )
                if is_set
            ]
            if extra:
                raise ValueError(
                    f"no rule of layers quantizes anything, so {', '.join(extra)} would be "
                    "ignored; leave it out, or choose a method"
                )
        if self.bits is not None:
            self._check_choices(self.bits)
        if self.train.steps == 0 and self.bits is not None and self.bits.steps:
            raise ValueError(
                f"bits.steps = {self.bits.steps} QAT steps cannot come before the metric when "
                "train.steps = 0; set bits.steps = 0"
            )
        return self
