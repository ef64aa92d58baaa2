"""How a feature network is built and trained: settings that its file and its card record."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from robuq_bench.sections import Ints, OptionalInt, Section, ascends

WIDTHS = (32, 32, 64, 64, 64)
HALVINGS = (2, 4)
WIDEST = 1024


class FeatureRecipe(Section):
    """The defaults made the packaged `digits` features.

    Attributes:
        widths: channels of the 3x3 convolutions; the last is the dimension of FID.
        halvings: before which convolutions, counted from 0, the map is averaged to half its side.
        input_size: pixels that the network sees, a multiple of 2^len(halvings); None for the
            images' own, rounded up to a multiple of 8 by interpolation.
        epochs: None for as many as show the network `images_seen` images.
        shift: random shifts by up to so many pixels; None for an eighth of the input size.
        flip: mirror every second image at random, for things that have no left and right.
        heldout_fraction: of each class, where the data have no held-out images of their own.
        precision: "bf16" trains by autocast; what is stored, and judges, is float32.
    """

    widths: Ints = WIDTHS
    halvings: Ints = HALVINGS
    input_size: OptionalInt = Field(default=None, ge=8)
    epochs: OptionalInt = Field(default=None, ge=1)
    images_seen: int = Field(default=60_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    shift: OptionalInt = Field(default=None, ge=0)
    flip: bool = False
    heldout_fraction: float = Field(default=0.2, gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> FeatureRecipe:
        check_architecture(self.widths, self.halvings)
        return self


def check_architecture(widths: tuple[int, ...], halvings: tuple[int, ...]) -> None:
    """ValueError unless widths and halvings make a network with all its features.

    Spatial features are the first channels of the third convolution.
    """
    if len(widths) < 3 or not 1 <= min(widths) <= max(widths) <= WIDEST or widths[2] < 7:
        raise ValueError(
            f"widths must be 3 or more of 1 to {WIDEST}, the third at least 7: {list(widths)}"
        )
    if halvings and not (ascends(halvings, 1) and halvings[-1] < len(widths)):
        raise ValueError(f"halvings must ascend within 1..{len(widths) - 1}: {list(halvings)}")
