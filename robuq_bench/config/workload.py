"""`Workload`: what is quantized and judged. Frozen, strict, and free of heavy imports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from robuq_bench.errors import suggest
from robuq_bench.sections import (
    Digest,
    Name,
    OptionalFloat,
    OptionalText,
    Section,
    Strings,
    TextDigest,
    check_choices,
    none_word,
)

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FEATURES_SUFFIX = "_features.safetensors"
#: Layers whose inputs can have outliers without a change of what the teacher computes.
OUTLIER_LAYERS = ("qkv", "proj", "fc1")
# A setting that is off is not written down, so that it changes no older run's name.
OnOrNothing = Annotated[
    bool | None,
    BeforeValidator(lambda value: None if value is False else none_word(value)),
]


def feature_names() -> list[str]:
    """Names that `evaluation.features` may have: the packaged networks, and Inception."""
    packaged = sorted(path.name for path in ASSETS.glob(f"*{FEATURES_SUFFIX}"))
    return [*(name.removesuffix(FEATURES_SUFFIX) for name in packaged), "inception"]


class ModelConfig(Section):
    """A DiT in the shapes of facebookresearch/DiT; `input_size` is what the model sees."""

    kind: Literal["dit"] = "dit"
    input_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    in_channels: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    num_classes: int = Field(ge=1)
    learn_sigma: bool = False
    class_dropout_prob: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4, which the two-dimensional "
                "sin-cos position embedding needs"
            )
        return self


class TeacherTraining(Section):
    """Budget of the full-precision teacher (`train-teacher`)."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=1.0, gt=0)
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    log_every_steps: int = Field(default=100, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False


class OutliersConfig(Section):
    """Outliers put into a teacher that leave its function as it is, see `models/outliers.py`.

    At the input of every one of `layers`, `channels` channels drawn by `seed` are multiplied by
    `scale`, and their weights divided by it.
    """

    scale: float = Field(gt=0)
    channels: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0)
    layers: Strings = OUTLIER_LAYERS

    @field_validator("layers")
    @classmethod
    def _possible(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "fc2" in value:
            raise ValueError(
                "fc2 cannot have outliers that leave the function as it is: GELU stands between "
                f"fc1 and fc2; choose among {', '.join(OUTLIER_LAYERS)}"
            )
        check_choices("layers", value, OUTLIER_LAYERS)
        return tuple(name for name in OUTLIER_LAYERS if name in value)  # one order, one identity


class TeacherConfig(Section):
    """Where the full-precision weights are; an empty checkpoint must be trained or given."""

    checkpoint: str = ""
    sha256: TextDigest = ""
    outliers: Annotated[OutliersConfig | None, BeforeValidator(none_word)] = None
    training: TeacherTraining


class DataConfig(Section):
    """Training images or latents, in the shape that the model sees.

    `sha256` is the digest of their files (`data_files.data_digest`); nobody needs to state it.
    """

    source: Literal[
        "digits", "fashion28", "idx", "mnist-torchvision", "imagefolder", "latents", "synthetic"
    ]
    path: OptionalText = None
    sha256: Digest = None
    image_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    num_classes: int = Field(ge=1)


class DiffusionConfig(Section):
    """The forward process; the defaults are those of facebookresearch/DiT.

    `cdf_approximation` is for the likelihood of the data at t = 0, part of the loss where sigma is
    learned: None integrates the Gaussian exactly, "tanh" by the approximation of Page (1977), as
    improved diffusion and DiT do.
    """

    num_train_timesteps: int = Field(default=1000, ge=2)
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear"] = "linear"
    cdf_approximation: Annotated[Literal["tanh"] | None, BeforeValidator(none_word)] = None

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        if self.beta_start >= self.beta_end:
            raise ValueError("beta_start must be below beta_end")
        return self


class TrainingConfig(Section):
    """Budget of quantization-aware training; without its own rate the branch shares the main."""

    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    low_rank_learning_rate: OptionalFloat = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    checkpoint_every_steps: int = Field(default=500, ge=1)
    sensitivity_steps: int = Field(default=0, ge=0)
    calibration_samples: int = Field(default=128, ge=1)
    log_every_steps: int = Field(default=50, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False


class EvaluationConfig(Section):
    """How samples are drawn and judged; `num_samples` is the size of each seed range.

    `timestep_spacing` takes every k-th timestep from 0 ("integer", "ddim50" of improved diffusion)
    or spreads them from 0 to T - 1 ("fractional", its "50": 0, 20, 41, ...). None is integer for
    ddim, where the steps must divide T, and fractional for ddpm.

    `features` is the name of a packaged network ('digits'), 'inception', or a .safetensors file of
    `train-features`. With `adapt_images` it may be one for images of another size or number of
    channels. `reference` is a file of ADM's format (.npz) or of `judging.reference_statistics`.

    `second_features`, likewise, measure everything once more in a feature space of their own, to
    see whether plans keep their order there; they are compared with `second_reference`, or with the
    training images. Their images are never adapted.

    `image_seeds` of None: every training is sampled from the same images' seeds. "own": training
    seed s has the s-th of disjoint sets of them, which all plans share, so that a spread over
    training seeds is one over images too.

    With `sample_teacher` a teacher is sampled although samples of it come with the suite.
    """

    sampler: Literal["ddim", "ddpm"] = "ddim"
    sampling_steps: int = Field(ge=1)
    timestep_spacing: Annotated[
        Literal["integer", "fractional"] | None, BeforeValidator(none_word)
    ] = None
    cfg_scale: float = Field(default=1.0, ge=0)
    num_samples: int = Field(ge=2)
    seed_ranges: int = Field(default=3, ge=1)
    image_seeds: Annotated[Literal["own"] | None, BeforeValidator(none_word)] = None
    batch_size: int = Field(default=100, ge=1)
    features: str
    features_sha256: Digest = None
    second_features: OptionalText = None
    second_features_sha256: Digest = None
    adapt_images: OnOrNothing = None
    sample_teacher: OnOrNothing = None
    inception_weights: OptionalText = None
    reference: OptionalText = None
    reference_sha256: Digest = None
    second_reference: OptionalText = None
    second_reference_sha256: Digest = None
    vae: OptionalText = None
    vae_sha256: Digest = None
    grid_images: int = Field(default=40, ge=0)

    @model_validator(mode="after")
    def _known_features(self) -> EvaluationConfig:
        names = feature_names()
        for key in ("features", "second_features"):
            name = getattr(self, key)
            if name is None or name in names or name.endswith(".safetensors"):
                continue
            raise ValueError(
                f"{key} {name!r} is neither a .safetensors file of `train-features` "
                f"nor a known name{suggest(name, names)}"
            )
        if self.second_features == self.features:
            raise ValueError("second_features are the features themselves; name another network")
        if self.second_reference is not None and self.second_features is None:
            raise ValueError("second_reference needs second_features, which it is compared in")
        return self


class Workload(Section):
    """What is quantized and judged; packaged workloads are `robuq_bench/workloads/*.toml`."""

    name: Name
    description: str = ""
    model: ModelConfig
    teacher: TeacherConfig
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        pairs = (
            ("data.image_size", self.data.image_size, "model.input_size", self.model.input_size),
            ("data.channels", self.data.channels, "model.in_channels", self.model.in_channels),
            (
                "data.num_classes",
                self.data.num_classes,
                "model.num_classes",
                self.model.num_classes,
            ),
        )
        for data_key, data_value, model_key, model_value in pairs:
            if data_value != model_value:
                raise ValueError(f"{data_key} is {data_value} but {model_key} is {model_value}")
        steps = self.evaluation.sampling_steps
        if steps > self.diffusion.num_train_timesteps:
            raise ValueError(
                f"evaluation.sampling_steps {steps} exceeds diffusion.num_train_timesteps "
                f"{self.diffusion.num_train_timesteps}"
            )
        return self
