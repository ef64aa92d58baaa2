"""What a packed file says about itself: storage, model, plan and layers, checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import model_validator

from robuq_bench.config import Plan, modern_plan
from robuq_bench.config.files import validate
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, ConfigError, UsageError, suggest
from robuq_bench.inference.stored_tensors import FLOATS
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.sections import Ints, Section

FORMAT = "robuq-bench packed model"
FORMAT_VERSIONS = ("1", "2")
"""2 adds `tied` and `dtypes`; a file that needs neither is written as 1."""
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

    @model_validator(mode="after")
    def _consistent(self) -> LayerFacts:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be [out, in], got {list(self.shape)}")
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
    layers: dict[str, LayerFacts]
    parameters: int
    tied: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As text, without the digest."""
        extra = {key: json.dumps(getattr(self, key)) for key in ("tied", "dtypes")}
        extra = {key: text for key, text in extra.items() if text != "{}"}
        return extra | {
            "format": FORMAT,
            "format_version": "2" if extra else "1",
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
        layers = {
            name: _section(path, f"layers[{name}]", facts, LayerFacts)
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
            _plan(path, _table(path, "plan", metadata["plan"])),
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
            f"{' and '.join(FORMAT_VERSIONS)}; export it again"
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


def _plan(path: Path, values: dict[str, Any]) -> Plan:
    """The plan of a file, of any version; a method from outside the suite is not imported."""
    try:
        values = modern_plan(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its plan is damaged: {error}") from error
    if any(":" in name for rule in values.get("layers") or () for name in _names(rule)):
        raise CheckpointError(f"{path}: its plan names a method from outside the suite")
    return _section(path, "plan", values, Plan)


def _names(rule: Any) -> list[str]:
    slots = rule.values() if isinstance(rule, dict) else ()
    return [str(slot.get("method")) for slot in slots if isinstance(slot, dict)]
