"""Settings of the studies that have some: `--set normality.images=64`. Free of heavy imports."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from robuq_bench.errors import suggest
from robuq_bench.sections import (
    Digest,
    Floats,
    Ints,
    OptionalText,
    Section,
    Strings,
    TextDigest,
    none_word,
)

MIN_IMAGES = 16
#: What `robuq_bench.normality.transforms` makes.
TRANSFORMS = (
    "identity",
    "hadamard",
    "hadamard-without-dc",
    "randomized-hadamard",
    "random-orthogonal",
    "block-hadamard-64",
    "block-hadamard-128",
    "dual-rotation",
)


def _ascend(values: tuple[int, ...], least: int) -> bool:
    return bool(values) and list(values) == sorted(set(values)) and values[0] >= least


class NormalityConfig(Section):
    """What `study normality` captures and how it tests; the defaults suit two CPU cores.

    images: clusters of the bootstrap, diffused to `timesteps` evenly spread timesteps each;
    tokens_per_image: reservoir of every (layer, timestep, image); `captured` is a folder of saved
    activations to analyse instead of a model, and `student` a train-and-eval run whose student is
    analysed instead of the teacher. `qat_steps` also trains the plan and looks at it after these
    numbers of steps. No `transforms` means all of them. The randomised transform is judged over
    `sign_draws` draws of its signs, of which the plan's own is the first.
    """

    images: int = Field(default=32, ge=MIN_IMAGES)
    timesteps: int = Field(default=10, ge=1)
    tokens_per_image: int = Field(default=4, ge=1)
    qat_steps: Ints = ()
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
    captured: OptionalText = None
    captured_sha256: TextDigest = ""
    student: OptionalText = None
    student_sha256: TextDigest = ""

    @model_validator(mode="after")
    def _consistent(self) -> NormalityConfig:
        if self.captured and (self.student or self.qat_steps or self.save_activations):
            raise ValueError(
                "captured activations need no model: leave out student, qat_steps and "
                "save_activations"
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


class SensitivityConfig(Section):
    """What `study sensitivity` measures, and the budget of its ground truth.

    Metrics are measured on the plan's model after each of `qat_steps` training steps (0: the
    post-training-quantized model). The truth is measured by training: for every layer, every one of
    `truth_bits` and every seed, `truth_steps` steps with that layer alone at those bits.
    """

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
    def _consistent(self) -> SensitivityConfig:
        for name, least in (("qat_steps", 0), ("bit_choices", 1), ("truth_bits", 1)):
            values = getattr(self, name)
            if not _ascend(values, least):
                raise ValueError(f"{name} must ascend from {least} or more, got {list(values)}")
        check_shard(self.shard)
        if self.qat_steps[0] != 0:
            raise ValueError("qat_steps must begin with 0, the post-training-quantized model")
        if not set(self.truth_bits) <= set(self.bit_choices):
            raise ValueError("truth_bits must be among bit_choices")
        return self


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


class AllocationStudyConfig(Section):
    """What `study allocation` compares: trained networks whose bits come from `candidates`.

    Sensitivities are measured before training ("ptq" and the local ones) and after `warmup_steps`
    of it ("qat", "qat-teacher"); "resolved" solves again at each of `resolve_steps` of its own
    training. Every network trains `train_steps` steps, all of them at its own bits.
    """

    budgets: Floats = (2.0, 3.0)
    choices: Ints = (1, 2, 3, 4)
    candidates: Strings = CANDIDATES
    warmup_steps: int = Field(default=100, ge=1)
    resolve_steps: Ints = (0, 50, 100)
    train_steps: int = Field(default=200, ge=1)
    seeds: int = Field(default=3, ge=1)
    samples: int = Field(default=500, ge=0)
    sampling_steps: int = Field(default=10, ge=1)
    timestep_buckets: int = Field(default=4, ge=1)
    shard: OptionalText = None

    @model_validator(mode="after")
    def _consistent(self) -> AllocationStudyConfig:
        for name in self.candidates:
            if name not in CANDIDATES:
                raise ValueError(f"unknown candidate {name!r}{suggest(name, CANDIDATES)}")
        for name, values in (("candidates", self.candidates), ("budgets", self.budgets)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must not be empty nor repeat a value: {list(values)}")
        if "uniform" not in self.candidates:
            raise ValueError("candidates must include 'uniform', which the others are judged by")
        if not _ascend(self.choices, 1):
            raise ValueError(f"choices must ascend from 1 or more, got {list(self.choices)}")
        if "resolved" in self.candidates and not _ascend(self.resolve_steps, 0):
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


class KernelsConfig(Section):
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
    def _consistent(self) -> KernelsConfig:
        _check_choices("models", self.models, ("S", "B", "L", "XL"))
        _check_choices("guidance", self.guidance, ("on", "off"))
        if not _ascend(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        return self


PACKED_VARIANTS = ("reference", "integer", "triton", "fp16", "int8")


class PackedConfig(Section):
    """What `study packed` judges: variants of the student of the finished run in folder `run`.

    "triton" needs a CUDA device, or Triton's interpreter and patience.
    """

    run: OptionalText = None
    run_sha256: Digest = None
    variants: Strings = ("reference", "integer", "fp16", "int8")

    @model_validator(mode="after")
    def _consistent(self) -> PackedConfig:
        _check_choices("variants", self.variants, PACKED_VARIANTS)
        return self


#: What `study efficiency` can time; `studies.efficiency_variants` says what each is.
EFFICIENCY_VARIANTS = (
    "fp32",
    "tf32",
    "bf16",
    "bf16-compile",
    "bf16-graph",
    "torchao-int8",
    "w1.58a8",
    "w1.58a4",
    "w1.58a2",
)


class EfficiencyConfig(Section):
    """What `study efficiency` times: every variant at every batch, one step and whole sampling.

    With `guidance` the network sees twice the batch. `rank` is that of the low-rank branch (the
    paper: 16). A variant and batch take one item of a few minutes at most; select parts by
    `variants` and `batches`. `hardware` as in `KernelsConfig`.
    """

    variants: Strings = EFFICIENCY_VARIANTS
    batches: Ints = (1, 8, 32)
    guidance: bool = True
    sampling_batches: Ints = (1, 8, 32)
    sampling_steps: int = Field(default=50, ge=1)
    rank: int = Field(default=16, ge=0)
    rounds: int = Field(default=3, ge=3)
    round_ms: float = Field(default=300.0, gt=0)
    hardware: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> EfficiencyConfig:
        _check_choices("variants", self.variants, EFFICIENCY_VARIANTS)
        if not _ascend(self.batches, 1):
            raise ValueError(f"batches must ascend from 1 or more, got {list(self.batches)}")
        if not set(self.sampling_batches) <= set(self.batches):
            raise ValueError("sampling_batches must be among batches")
        return self


def _check_choices(field: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{field} must not be empty nor repeat a value: {list(values)}")
    for value in values:
        if value not in known:
            raise ValueError(f"{field}: unknown {value!r}{suggest(value, known)}")


OptionalPacked = Annotated[PackedConfig | None, BeforeValidator(none_word)]
OptionalKernels = Annotated[KernelsConfig | None, BeforeValidator(none_word)]
OptionalEfficiency = Annotated[EfficiencyConfig | None, BeforeValidator(none_word)]
OptionalAllocation = Annotated[AllocationStudyConfig | None, BeforeValidator(none_word)]


def check_shard(part: str | None) -> str | None:
    """Return `part` if it reads i/n with 1 <= i <= n, or is absent; ValueError otherwise."""
    if part is not None:
        index, slash, count = part.partition("/")
        whole = index.isdecimal() and count.isdecimal()
        if not (slash and whole and 1 <= int(index) <= int(count)):
            raise ValueError(f"shard must be 'i/n' with 1 <= i <= n, such as '1/4'; got {part!r}")
    return part


OptionalNormality = Annotated[NormalityConfig | None, BeforeValidator(none_word)]
OptionalSensitivity = Annotated[SensitivityConfig | None, BeforeValidator(none_word)]

#: Study -> its settings, which `Config` holds in the field of the same name.
STUDY_SETTINGS: dict[str, type[Section]] = {
    "allocation": AllocationStudyConfig,
    "efficiency": EfficiencyConfig,
    "kernels": KernelsConfig,
    "normality": NormalityConfig,
    "packed": PackedConfig,
    "sensitivity": SensitivityConfig,
}


def default_settings(study: str) -> dict[str, Any] | None:
    """Fields and defaults of a study's settings, or None if it has none."""
    settings = STUDY_SETTINGS.get(study)
    return None if settings is None else settings().model_dump(mode="json")
