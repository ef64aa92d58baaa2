"""Settings of `study allocation`: `--set allocation.seeds=5`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from robuq_bench.errors import suggest
from robuq_bench.sections import (
    Floats,
    Ints,
    OptionalText,
    Section,
    Strings,
    ascends,
    check_shard,
)

#: Where `study allocation` takes its bits from.
CANDIDATES = (
    "uniform",
    "random",
    "ptq",
    "qat",
    "qat-teacher",
    "output-mse",
    "fisher",
    "resolved",
)


class Settings(Section):
    """What `study allocation` compares: trained networks whose bits come from `candidates`.

    Sensitivities are measured before training ("ptq" and the local ones) and after `warmup_steps`
    of it ("qat", "qat-teacher"); "resolved" solves again at each of `resolve_steps` of its own
    training. Every network trains `train_steps` steps, all of them at its own bits. Fewer than five
    `seeds` are not judged.
    """

    LAST_STEP: ClassVar[str] = "warmup_steps"

    budgets: Floats = (2.0, 3.0)
    choices: Ints = (1, 2, 3, 4)
    candidates: Strings = CANDIDATES
    warmup_steps: int = Field(default=100, ge=1)
    resolve_steps: Ints = (0, 50, 100)
    train_steps: int = Field(default=200, ge=1)
    seeds: int = Field(default=5, ge=1)
    samples: int = Field(default=500, ge=0)
    sampling_steps: int = Field(default=10, ge=1)
    timestep_buckets: int = Field(default=4, ge=1)
    shard: OptionalText = None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for name in self.candidates:
            if name not in CANDIDATES:
                raise ValueError(f"unknown candidate {name!r}{suggest(name, CANDIDATES)}")
        for name, values in (("candidates", self.candidates), ("budgets", self.budgets)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must not be empty nor repeat a value: {list(values)}")
        if "uniform" not in self.candidates:
            raise ValueError("candidates must include 'uniform', which the others are judged by")
        if not ascends(self.choices, 1):
            raise ValueError(f"choices must ascend from 1 or more, got {list(self.choices)}")
        if "resolved" in self.candidates and not ascends(self.resolve_steps, 0):
            raise ValueError(
                f"resolve_steps must ascend from 0 or more, got {list(self.resolve_steps)}"
            )
        for budget in self.budgets:
            if not self.choices[0] <= budget <= self.choices[-1]:
                raise ValueError(
                    f"a mean of {budget:g} bits cannot be met: choose between "
                    f"{self.choices[0]} and {self.choices[-1]}"
                )
        check_shard(self.shard)
        if max(self.resolve_steps, default=0) >= self.train_steps:
            raise ValueError("resolve_steps must lie within train_steps")
        return self
