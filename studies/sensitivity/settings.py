"""Settings of `study sensitivity`: `--set sensitivity.pairs=16`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from robuq_bench.sections import Ints, OptionalText, Section, ascends, check_shard


class Settings(Section):
    """What `study sensitivity` measures, and the budget of its ground truth.

    Metrics are measured on the plan's model after each of `qat_steps` training steps (0: the
    post-training-quantized model). The truth is measured by training: for every layer, every one of
    `truth_bits` and every seed, `truth_steps` steps with that layer alone at those bits.
    """

    LAST_STEP: ClassVar[str] = "qat_steps"

    qat_steps: Ints = (0, 25, 50, 100, 200)
    bit_choices: Ints = (1, 2, 3, 4)
    truth_bits: Ints = (1, 2, 3)
    truth_steps: int = Field(default=100, ge=1)
    truth_seeds: int = Field(default=3, ge=1)
    truth_samples: int = Field(default=500, ge=0)
    truth_sampling_steps: int = Field(default=10, ge=1)
    pairs: int = Field(default=64, ge=0)
    allocations: int = Field(default=64, ge=0)
    timestep_buckets: int = Field(default=4, ge=1)
    top_k: int = Field(default=4, ge=1)
    bootstrap_draws: int = Field(default=1000, ge=100)
    shard: OptionalText = None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for name, least in (("qat_steps", 0), ("bit_choices", 1), ("truth_bits", 1)):
            values = getattr(self, name)
            if not ascends(values, least):
                raise ValueError(f"{name} must ascend from {least} or more, got {list(values)}")
        check_shard(self.shard)
        if self.qat_steps[0] != 0:
            raise ValueError("qat_steps must begin with 0, the post-training-quantized model")
        if not set(self.truth_bits) <= set(self.bit_choices):
            raise ValueError("truth_bits must be among bit_choices")
        return self
