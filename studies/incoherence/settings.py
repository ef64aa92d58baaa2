"""Settings of `study incoherence`: `--set incoherence.seeds=8`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from robuq_bench.sections import Floats, Ints, OptionalText, Section, Strings, ascends, check_shard

NONE = "none"
LAYER_IMAGES = 128
"""Images in a batch, and on which layers are measured one by one."""


class Settings(Section):
    """What `study incoherence` quantizes, and the budget of its trainings.

    Teachers have outliers of every one of `scales`, in `channels` channels of the inputs of qkv,
    proj and fc1. The plan is taken with each of `rotations` (methods' names, or "none") in all its
    rules, and at each of `bits` where its rules leave activation bits to an allocation. Every
    student is judged before training; those of `trained_scales` also after `steps` steps at
    `batch_size`, in place of the workload's. `block` is that of block-hadamard. Fewer than five
    `seeds` are not judged.
    """

    OWN_TRAINING: ClassVar[dict[str, str]] = {"steps": "steps", "batch_size": "batch_size"}

    scales: Floats = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    trained_scales: Floats = (1.0, 4.0, 16.0)
    channels: int = Field(default=2, ge=1)
    rotations: Strings = (NONE, "block-hadamard", "randomized-hadamard")
    block: int = Field(default=16, ge=2)
    bits: Ints = (2, 4)
    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)
    images: int = Field(default=512, ge=1)
    seeds: int = Field(default=5, ge=1)
    shard: OptionalText = None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for name in ("scales", "trained_scales"):
            values = getattr(self, name)
            if list(values) != sorted({*values}) or any(not value > 0 for value in values):
                raise ValueError(f"{name} must ascend, each above 0, got {list(values)}")
        if len(self.scales) < 2 or len(self.trained_scales) == 1:
            raise ValueError(
                "a response needs two scales at least (no trained_scales: no training)"
            )
        if not {*self.trained_scales} <= {*self.scales}:
            raise ValueError("trained_scales must be among scales")
        if not self.rotations or len({*self.rotations}) < len(self.rotations):
            raise ValueError(f"rotations must not be empty nor repeat: {list(self.rotations)}")
        if not ascends(self.bits, 1):
            raise ValueError(f"bits must ascend from 1 or more, got {list(self.bits)}")
        if self.images > LAYER_IMAGES and self.images % LAYER_IMAGES:
            raise ValueError(
                f"images above {LAYER_IMAGES} must be a multiple of it, got {self.images}"
            )
        check_shard(self.shard)
        return self
