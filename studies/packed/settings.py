"""Settings of `study packed`."""

from __future__ import annotations

from pydantic import model_validator

from robuq_bench.sections import Digest, RunInput, Section, Strings, check_choices

VARIANTS = ("reference", "integer", "cpu", "triton", "fp16", "int8")


class Settings(Section):
    """What `study packed` judges: variants of the student of the finished run in folder `run`.

    "cpu" needs the device cpu; "triton" a CUDA device, or Triton's interpreter and patience.
    """

    run: RunInput = None
    run_sha256: Digest = None
    variants: Strings = ("reference", "integer", "fp16", "int8")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("variants", self.variants, VARIANTS)
        return self
