"""What a packed file says about itself: storage, model, plan and layers, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, model_validator

from robuq_bench.config import Plan, modern_plan
from robuq_bench.config.files import validate
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, ConfigError, UsageError, suggest
from robuq_bench.inference.stored_tensors import FLOATS
from robuq_bench.methods import SLOTS, Method, is_packaged
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.weights._ternary import TernaryMethod
from robuq_bench.sections import Ints, Section

FORMAT = "robuq-bench packed model"
FORMAT_VERSIONS = ("1", "2", "3")
"""2 adds `tied` and `dtypes`, 3 layers of other methods than ternary weights, Hadamard rotations,
low-rank branches and grids per token; a file is written in the first that holds it."""
CODE_STORAGE = ("base3", "2bit")
FLOAT_STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
DEFAULT_STORAGE = "base3/fp32/fp32"
_FIELDS = ("format", "format_version", "storage", "source", "plan", "model", "layers", "parameters")

_SectionT = TypeVar("_SectionT", bound=Section)


@dataclass(frozen=True)
class Storage:
    """How a file stores codes, low-rank factors, and the rest (scales, biases, other layers).

    "fp32" keeps float64 as it is; "int8" is meant for matrices, vectors beside them are fp16.
    """

    codes: str
    low_rank: str
    rest: str

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Read "base3/fp16/fp16"; UsageError for anything else."""
        parts = text.split("/")
        if len(parts) != 3:
            raise UsageError(
                f"storage {text!r} is not CODES/LOW_RANK/REST, such as {DEFAULT_STORAGE!r}"
            )
        for part, known in zip(parts, (CODE_STORAGE, FLOAT_STORAGE, FLOAT_STORAGE), strict=True):
            if part not in known:
                raise UsageError(f"storage {text!r}: unknown {part!r}{suggest(part, known)}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.codes}/{self.low_rank}/{self.rest}"


class LayerFacts(Section):
    """What the file says of a packed layer beside its tensors."""

    shape: Ints
    activation_quantizer: str
    activation_bits: int | None
    rotated: bool

    @property
    def weight_bits(self) -> int | None:
        """None: ternary."""
        return None

    @model_validator(mode="after")
    def _consistent(self) -> LayerFacts:
        _check_shape(self.shape)
        if ":" in self.activation_quantizer:
            raise ValueError("activation_quantizer names a method from outside the suite")
        try:
            quantizer = None
            if self.activation_quantizer != "none":
                quantizer = token_grid(self.activation_quantizer)
            if self.activation_bits is None:
                return self
            if quantizer is None:
                raise ValueError(f"activation_bits {self.activation_bits} without a quantizer")
            quantizer.check_bits(self.activation_bits)
        except ConfigError as error:
            raise ValueError(f"activation_bits: {error}") from None
        return self


class RuledFacts(Section):
    """The same of a layer that formats 1 and 2 cannot hold: its methods are those of a rule.

    Attributes:
        rule: its name in the plan.
        weight_bits: of a code, which an allocation may have changed; None: ternary.
    """

    shape: Ints
    rule: str
    weight_bits: int | None = Field(ge=2, le=8)
    activation_bits: int | None

    @model_validator(mode="after")
    def _consistent(self) -> RuledFacts:
        _check_shape(self.shape)
        return self

    def methods(self, plan: Plan) -> dict[str, Method]:
        """What fills the slots, by slot.

        Raises:
            ValueError: the plan has no such rule, or it does not fit these facts. Whether it fits
                the shape is known once that of the codes is.
        """
        rules = {rule.name: rule for rule in plan.layers}
        if self.rule not in rules:
            raise ValueError(f"the plan has no rule {self.rule!r}{suggest(self.rule, rules)}")
        methods: dict[str, Any] = dict(rules[self.rule].slots())
        for method in methods.values():
            if not is_packaged(method.slot, method.method):
                raise ValueError(f"{method.slot} method {method.method!r} is not one of the suite")
        weight, activation = methods.get("weight"), methods.get("activation")
        if weight is None or isinstance(weight, TernaryMethod) != (self.weight_bits is None):
            bits = "ternary" if self.weight_bits is None else f"of {self.weight_bits} bits"
            raise ValueError(f"rule {self.rule!r} does not make weights {bits}")
        try:
            if self.weight_bits is not None and weight.nominal_bits() != self.weight_bits:
                methods["weight"] = weight.with_bits(self.weight_bits)
            if self.activation_bits is not None:
                if activation is None:
                    raise ValueError(f"activation_bits {self.activation_bits} without a quantizer")
                activation.check_bits(self.activation_bits)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return methods


Facts = LayerFacts | RuledFacts


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be [out, in], got {list(shape)}")


@dataclass(frozen=True)
class Header:
    """The metadata of a packed file.

    Attributes:
        storage: of its tensors.
        source: where the weights are from.
        plan: how the model was quantized.
        model: of our DiT; None for another model.
        layers: the packed layers by their first name.
        parameters: of the model before packing.
        tied: further names of layers and tensors -> the name they are stored under.
        dtypes: of tensors that were not float32, by name; of a layer under `<layer>.codes`.
    """

    storage: Storage
    source: str
    plan: Plan
    model: ModelConfig | None
    layers: dict[str, Facts]
    parameters: int
    tied: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As text, without the digest."""
        extra = {key: json.dumps(getattr(self, key)) for key in ("tied", "dtypes")}
        extra = {key: text for key, text in extra.items() if text != "{}"}
        is_ruled = any(isinstance(facts, RuledFacts) for facts in self.layers.values())
        return extra | {
            "format": FORMAT,
            "format_version": "3" if is_ruled else "2" if extra else "1",
            "storage": str(self.storage),
            "source": self.source,
            "plan": self.plan.model_dump_json(),
            "model": "" if self.model is None else self.model.model_dump_json(),
            "layers": json.dumps(
                {name: facts.model_dump(mode="json") for name, facts in self.layers.items()}
            ),
            "parameters": str(self.parameters),
        }

    @classmethod
    def parse(cls, path: Path, metadata: dict[str, str]) -> Header:
        """Read the metadata of `path`, without its digest, after `check_format`.

        Raises:
            CheckpointError: a field is missing, unknown or invalid; names file and field.
        """
        known = _FIELDS if metadata["format_version"] == "1" else (*_FIELDS, "tied", "dtypes")
        missing = [key for key in _FIELDS if key not in metadata]
        unknown = [key for key in metadata if key not in known]
        if missing or unknown:
            raise _invalid(path, f"metadata {'lacks' if missing else 'has an unknown'} "
                           f"{(missing or unknown)[0]!r}")  # fmt: skip
        try:
            storage = Storage.parse(metadata["storage"])
        except UsageError as error:
            raise _invalid(path, str(error)) from None
        plan = _plan(path, _table(path, "plan", metadata["plan"]))
        is_ruled = metadata["format_version"] == "3"
        layers = {
            name: _layer(path, f"layers[{name}]", facts, plan if is_ruled else None)
            for name, facts in _table(path, "layers", metadata["layers"]).items()
        }
        parameters = metadata["parameters"]
        if not (parameters.isascii() and parameters.isdecimal()) or len(parameters) > 18:
            raise _invalid(path, f"parameters is {parameters[:20]!r}, not a number")
        model = metadata["model"] and _table(path, "model", metadata["model"])
        dtypes = _texts(path, "dtypes", metadata)
        for name, dtype in dtypes.items():
            if dtype not in FLOATS:
                raise _invalid(path, f"dtypes[{name}] is {dtype!r}{suggest(dtype, FLOATS)}")
        return cls(
            storage,
            metadata["source"],
            plan,
            _section(path, "model", model, ModelConfig) if model else None,
            layers,
            int(parameters),
            _texts(path, "tied", metadata),
            dtypes,
        )


def check_format(path: Path, metadata: dict[str, str]) -> None:
    """Raise CheckpointError unless the metadata is a packed file's, of a version known here."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no packed model; make one with `python bench.py export RUN -o FILE`"
        )
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise CheckpointError(
            f"{path} has format version {version}, this code reads "
            f"{', '.join(FORMAT_VERSIONS[:-1])} and {FORMAT_VERSIONS[-1]}; export it again"
        )


def _invalid(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no valid packed model: {reason}; export it again with this version"
    )


def _table(path: Path, key: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid(path, f"{key} is not JSON") from None
    if not isinstance(values, dict):
        raise _invalid(path, f"{key} is not a JSON object")
    return values


def _texts(path: Path, key: str, metadata: dict[str, str]) -> dict[str, str]:
    values = _table(path, key, metadata.get(key, "{}"))
    if not all(isinstance(value, str) for value in values.values()):
        raise _invalid(path, f"{key} must map names to text")
    return values


def _section(path: Path, key: str, values: Any, kind: type[_SectionT]) -> _SectionT:
    if not isinstance(values, dict):
        raise _invalid(path, f"{key} is not a JSON object")
    try:
        return validate(kind, values, key)
    except ConfigError as error:
        raise _invalid(path, str(error).replace("\n", "; ")) from None


def _layer(path: Path, key: str, values: Any, plan: Plan | None) -> Facts:
    """Facts of a layer; those with a rule, which format 3 knows, are checked against its plan."""
    if plan is None or not isinstance(values, dict) or "rule" not in values:
        return _section(path, key, values, LayerFacts)
    facts = _section(path, key, values, RuledFacts)
    try:
        facts.methods(plan)
    except ValueError as error:
        raise _invalid(path, f"{key}: {error}".replace("\n", "; ")) from None
    return facts


def _plan(path: Path, values: dict[str, Any]) -> Plan:
    """The plan of a file, of any version; a method from outside the suite is not imported."""
    try:
        values = modern_plan(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its plan is damaged: {error}") from error
    if any(":" in name for name in _method_names(values.get("layers"))):
        raise CheckpointError(f"{path}: its plan names a method from outside the suite")
    return _section(path, "plan", values, Plan)


def _method_names(rules: Any) -> Iterator[str]:
    """What a plan of whatever content calls its methods: read as text, before any is imported."""
    for rule in rules if isinstance(rules, list | tuple) else ():
        for slot in SLOTS if isinstance(rule, dict) else ():
            value = rule.get(slot)
            yield str(value.get("method") if isinstance(value, dict) else value)
