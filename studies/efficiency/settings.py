"""Settings of `study efficiency`: `--set efficiency.rounds=5`."""

from __future__ import annotations

from pydantic import Field, model_validator

from kernels.cpu_library import INSTRUCTION_SETS
from robuq_bench.sections import Ints, Section, Strings, ascends, check_choices

SIZES = ("S", "B", "L", "XL")
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


#: What it can time on a CPU; `cpu_variants.py` says what each is.
CPU_VARIANTS = ("fp32", "fp32-compile", "bf16", "bf16-compile", "int8-dynamic",
                "w1.58a8", "w1.58a4", "w1.58a2")  # fmt: skip
OWN = "own"


class CpuSettings(Section):
    """What `study efficiency` times on a CPU: `--set 'efficiency.cpu.models=["XL"]'`.

    `models` are sizes of DiT at 256x256 pixels, or "own", the workload's; none: nothing is timed. A
    block at `batches` images and a whole step at `step_batches`, with each number of `threads`.
    `instructions`, best first, are the sets that the compiled kernels are forced to: blocks run
    with each of them that the CPU has, steps with the first. With `memory`, the peak of a step of
    each variant is measured in a process of its own, at the fewest images. A sample is as many
    calls as take `sample_ms`; a round has two of each variant.
    """

    models: Strings = ("S", "B", "L", "XL")
    batches: Ints = (1, 2, 8)
    step_batches: Ints = (1, 2)
    threads: Ints = (1, 2)
    variants: Strings = CPU_VARIANTS
    instructions: Strings = ("amx-int8", "avx512-vnni", "avx2")
    memory: bool = True
    rounds: int = Field(default=3, ge=3)
    sample_ms: float = Field(default=50.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> CpuSettings:
        if self.models:
            check_choices("cpu.models", self.models, (*SIZES, OWN))
        check_choices("cpu.variants", self.variants, CPU_VARIANTS)
        check_choices("cpu.instructions", self.instructions, INSTRUCTION_SETS)
        for name in ("batches", "step_batches", "threads"):
            if not ascends(getattr(self, name), 1):
                raise ValueError(
                    f"cpu.{name} must ascend from 1 or more, got {list(getattr(self, name))}"
                )
        return self


class Settings(Section):
    """What `study efficiency` times: every variant at every batch, one step and whole sampling.

    With `guidance` the network sees twice the batch. `rank` is that of the low-rank branch (the
    paper: 16). A variant and batch take one item of a few minutes at most; select parts by
    `variants` and `batches`. Without a GPU the CPU is timed as `cpu` says. `hardware` keeps runs of
    several machines apart; the command line fills it in.
    """

    variants: Strings = VARIANTS
    batches: Ints = (1, 8, 32)
    guidance: bool = True
    sampling_batches: Ints = (1, 8, 32)
    sampling_steps: int = Field(default=50, ge=1)
    rank: int = Field(default=16, ge=0)
    rounds: int = Field(default=3, ge=3)
    round_ms: float = Field(default=300.0, gt=0)
    cpu: CpuSettings = CpuSettings()
    hardware: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check_choices("variants", self.variants, VARIANTS)
        if not ascends(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        if not set(self.sampling_batches) <= set(self.batches):
            raise ValueError("sampling_batches must be among batches")
        return self
