"""Settings of `study efficiency`: `--set efficiency.rounds=5`."""

from __future__ import annotations

from pydantic import Field, model_validator

from robuq_bench.sections import Ints, Section, Strings, ascends, check_choices

#: What `study efficiency` can time; `variants.py` says what each is.
VARIANTS = (
    "fp32",
    "tf32",
    "bf16",
    "bf16-compile",
    "bf16-graph",
    "torchao-int8",
    "fp8-rowwise",
    "w1.58a8",
    "w1.58a4",
    "w1.58a2",
)


class Settings(Section):
    """What `study efficiency` times: every variant at every batch, one step and whole sampling.

    With `guidance` the network sees twice the batch. `rank` is that of the low-rank branch (the
    paper: 16). A variant and batch take one item of a few minutes at most; select parts by
    `variants` and `batches`. `hardware` keeps runs of several
    machines apart; the command line fills it in on a GPU.
    """

    variants: Strings = VARIANTS
    batches: Ints = (1, 8, 32)
    guidance: bool = True
    sampling_batches: Ints = (1, 8, 32)
    sampling_steps: int = Field(default=50, ge=1)
    rank: int = Field(default=16, ge=0)
    rounds: int = Field(default=3, ge=3)
    round_ms: float = Field(default=300.0, gt=0)
    hardware: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("variants", self.variants, VARIANTS)
        if not ascends(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        if not set(self.sampling_batches) <= set(self.batches):
            raise ValueError("sampling_batches must be among batches")
        return self
