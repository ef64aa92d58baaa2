"""What sections of configs and methods share: frozen, no unknown keys, no silent conversion."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

from robuq_bench.errors import suggest


def none_word(value: Any) -> Any:
    """TOML has no null, so the word 'none' stands for it wherever a field may be absent."""
    return None if value == "none" else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Folder names are built from it, so nothing that could leave the runs folder.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
OptionalInt = Annotated[int | None, BeforeValidator(none_word)]
OptionalFloat = Annotated[float | None, BeforeValidator(none_word)]
OptionalText = Annotated[str | None, BeforeValidator(none_word)]

# Inputs among a study's settings, with the flag of `study` that names them. A field
# `<field>_sha256` beside one identifies its content.
RunInput = Annotated[str | None, BeforeValidator(none_word), "--checkpoint"]
FolderInput = Annotated[str | None, BeforeValidator(none_word), "--activations"]

# What an input that is named by its path holds: None where it is not known by content, "" where
# it could not be read when the config was resolved.
Digest = Annotated[str | None, Field(pattern=r"^([0-9a-f]{64})?$"), BeforeValidator(none_word)]
# The same where an older format knows only "" for both.
TextDigest = Annotated[
    str,
    Field(pattern=r"^([0-9a-f]{64})?$"),
    BeforeValidator(lambda value: "" if value == "none" else value),
]


class Section(BaseModel):
    """A frozen group of fields. `true` is not 1 and "4" is not 4: a slip is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"must be a number of 64 bits, got {value}")
        return value


def ascends(values: tuple[int, ...], least: int) -> bool:
    """Whether there are values, each above the one before, the first at least `least`."""
    return bool(values) and list(values) == sorted(set(values)) and values[0] >= least


def check_choices(field: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """ValueError naming `field` unless `values` are some of `known`, none twice."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{field} must not be empty nor repeat a value: {list(values)}")
    for value in values:
        if value not in known:
            raise ValueError(f"{field}: unknown {value!r}{suggest(value, known)}")


def check_shard(part: str | None) -> str | None:
    """Return `part` if it reads i/n with 1 <= i <= n, or is absent; ValueError otherwise."""
    if part is not None:
        index, slash, count = part.partition("/")
        whole = index.isdecimal() and count.isdecimal()
        if not (slash and whole and 1 <= int(index) <= int(count)):
            raise ValueError(f"shard must be 'i/n' with 1 <= i <= n, such as '1/4'; got {part!r}")
    return part
