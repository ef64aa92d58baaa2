"""Settings of `study kernels`: `--set kernels.rounds=5`."""

from __future__ import annotations

from pydantic import Field, model_validator

from robuq_bench.sections import Ints, Section, Strings, ascends, check_choices


class Settings(Section):
    """What `study kernels` checks and times.

    Shapes are those of the DiT sizes in `models` at `batches`, with guidance "on" (twice the
    images), "off" or both, `tokens_per_image` each; no `kernels` means all. `autotune` lets
    products choose their tiles by timing first. Without a GPU every kernel is checked at its true
    widths, `check_rows` rows and at most `check_outputs` outputs. `hardware` keeps runs of
    several machines apart; the command line fills it in on a GPU.
    """

    models: Strings = ("XL", "L", "B", "S")
    batches: Ints = (1, 8, 32, 64)
    guidance: Strings = ("on", "off")
    kernels: Strings = ()
    tokens_per_image: int = Field(default=256, ge=1)
    bits: int = Field(default=8, ge=1, le=8)
    rank: int = Field(default=16, ge=0)
    autotune: bool = True
    rounds: int = Field(default=3, ge=3)
    round_ms: float = Field(default=100.0, gt=0)
    check_rows: int = Field(default=16, ge=2)
    check_outputs: int = Field(default=160, ge=1)
    hardware: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("models", self.models, ("S", "B", "L", "XL"))
        check_choices("guidance", self.guidance, ("on", "off"))
        if not ascends(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        return self
