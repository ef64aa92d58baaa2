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
