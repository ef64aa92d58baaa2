"""Settings of `study survival`: `--set survival.budgets=[0,500]`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from robuq_bench.sections import (
    Ints,
    OptionalText,
    Section,
    Strings,
    ascends,
    check_choices,
    check_shard,
)
from studies.survival.choices import NAMES


class Settings(Section):
    """What `study survival` trains: both arms of every choice, at every budget, from every seed.

    `budgets` are steps of training, each with the whole schedule of the learning rate; they begin
    with 0, the model before training; `training.steps` is the last of them. Fewer than five
    `seeds` are not judged.
    """

    OWN_TRAINING: ClassVar[dict[str, str]] = {"steps": "budgets"}

    choices: Strings = NAMES
    budgets: Ints = (0, 100, 500, 2000)
    seeds: int = Field(default=8, ge=1)
    shard: OptionalText = None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("choices", self.choices, NAMES)
        if not ascends(self.budgets, 0) or self.budgets[0] != 0 or len(self.budgets) < 2:
            raise ValueError(
                f"budgets must ascend from 0, before training, to one or more numbers of steps; "
                f"got {list(self.budgets)}"
            )
        check_shard(self.shard)
        return self
