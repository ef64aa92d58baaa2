"""Settings of `study kernels`: `--set kernels.rounds=5`."""

from __future__ import annotations

from pydantic import Field, model_validator

from kernels.cpu_library import INSTRUCTION_SETS
from robuq_bench.sections import Ints, Section, Strings, ascends, check_choices

SIZES = ("S", "B", "L", "XL")


class CpuSettings(Section):
    """What `study kernels` times on a CPU: `--set 'kernels.cpu.models=["S"]'`.

    Inference kernels at the shapes of the DiT sizes in `models` (none: nothing is timed) at
    `batches` images, with each number of `threads`. `instructions` are the sets that the compiled
    kernels are forced to, none of them means all that the CPU has. A sample is as many calls as
    take `sample_ms`; a round has two of each implementation.
    """

    models: Strings = ("XL", "L", "B", "S")
    batches: Ints = (1, 8)
    threads: Ints = (1, 2)
    instructions: Strings = ()
    rounds: int = Field(default=3, ge=3)
    sample_ms: float = Field(default=20.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> CpuSettings:
        if self.models:
            check_choices("cpu.models", self.models, SIZES)
        if self.instructions:
            check_choices("cpu.instructions", self.instructions, INSTRUCTION_SETS)
        for name in ("batches", "threads"):
            if not ascends(getattr(self, name), 1):
                raise ValueError(
                    f"cpu.{name} must ascend from 1 or more, got {list(getattr(self, name))}"
                )
        return self


class Settings(Section):
    """What `study kernels` checks and times.

    Shapes are those of the DiT sizes in `models` at `batches`, with guidance "on" (twice the
    images), "off" or both, `tokens_per_image` each; no `kernels` means all. `autotune` lets
    products choose their tiles by timing first. Without a GPU every Triton kernel is checked at its
    true widths, `check_rows` rows and at most `check_outputs` outputs, and the CPU is timed as
    `cpu` says: both for the sizes that are in `models` and in `cpu.models`, if that names any.
    `hardware` keeps runs of several machines apart; the command line fills it in.
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
    cpu: CpuSettings = CpuSettings()
    hardware: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("models", self.models, SIZES)
        check_choices("guidance", self.guidance, ("on", "off"))
        if not sizes_on_cpu(self):
            raise ValueError(
                f"cpu.models {list(self.cpu.models)} and models {list(self.models)} have no size "
                "in common, and a CPU checks and times what is in both"
            )
        if not ascends(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        return self


def sizes_on_cpu(options: Settings) -> list[str]:
    """The sizes that are checked without a GPU, and timed if `cpu.models` names any."""
    return [size for size in options.models if size in (options.cpu.models or options.models)]
