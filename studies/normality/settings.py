"""Settings of `study normality`: `--set normality.images=64`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from robuq_bench.errors import suggest
from robuq_bench.normality.names import MIN_IMAGES, TRANSFORMS
from robuq_bench.sections import (
    FolderInput,
    Ints,
    RunInput,
    Section,
    Strings,
    TextDigest,
    check_choices,
)

TEACHER, BEFORE, STUDENT = "teacher", "student before training", "student"
#: What `subjects` may name, and what tables call it.
SUBJECTS = {"teacher": TEACHER, "before": BEFORE, "student": STUDENT}


class Settings(Section):
    """What `study normality` captures and how it tests; the defaults suit two CPU cores.

    images: clusters of the bootstrap, diffused to `timesteps` evenly spread timesteps each;
    tokens_per_image: reservoir of every (layer, timestep, image); `captured` is a folder of saved
    activations to analyse instead of a model, and `student` a train-and-eval run whose student is
    analysed beside the teacher. `subjects` then chooses among "teacher", "before" (the run's plan
    applied to the teacher, where its training began) and "student"; none named means all that there
    are. `qat_steps` also trains the plan and looks at it after these numbers of steps. No
    `transforms` means all of them. The randomised transform is judged over `sign_draws` draws of
    its signs, of which the plan's own is the first; as many Hadamard matrices give the range of
    the plain one.
    """

    LAST_STEP: ClassVar[str] = "qat_steps"

    images: int = Field(default=32, ge=MIN_IMAGES)
    timesteps: int = Field(default=10, ge=1)
    tokens_per_image: int = Field(default=4, ge=1)
    qat_steps: Ints = ()
    subjects: Strings = ()
    transforms: Strings = ()
    sign_draws: int = Field(default=8, ge=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    bootstrap_draws: int = Field(default=1000, ge=100)
    control_tokens: int = Field(default=512, ge=16)
    control_widths: Ints = (144, 576, 1152, 4608)
    bound_tokens: int = Field(default=50, ge=1)
    bound_draws: int = Field(default=2000, ge=100)
    decay_tokens: int = Field(default=4, ge=1)
    save_activations: bool = False
    captured: FolderInput = None
    captured_sha256: TextDigest = ""
    student: RunInput = None
    student_sha256: TextDigest = ""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.captured and (
            self.student or self.qat_steps or self.save_activations or self.subjects
        ):
            raise ValueError(
                "captured activations need no model: leave out student, qat_steps, subjects and "
                "save_activations"
            )
        if self.subjects:
            check_choices("subjects", self.subjects, tuple(SUBJECTS))
        trained = [name for name in self.subjects if name != TEACHER]
        if trained and not self.student:
            raise ValueError(
                f"subjects: {trained[0]!r} is of a finished train-and-eval run; name it with "
                "--checkpoint RUN, or train the plan here with qat_steps"
            )
        if self.student and self.qat_steps:
            raise ValueError("qat_steps trains the plan from its teacher; leave out student")
        if any(step < 0 for step in self.qat_steps) or list(self.qat_steps) != sorted(
            set(self.qat_steps)
        ):
            raise ValueError(f"qat_steps must ascend from 0 or more, got {list(self.qat_steps)}")
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise ValueError(f"unknown transform {name!r}{suggest(name, TRANSFORMS)}")
        if any(width < 8 for width in self.control_widths):
            raise ValueError("control_widths must be at least 8")
        return self

    @property
    def wanted(self) -> tuple[str, ...]:
        """The models to look at, as tables call them, in order."""
        named = self.subjects or (tuple(SUBJECTS) if self.student else ("teacher",))
        return tuple(label for name, label in SUBJECTS.items() if name in named)
