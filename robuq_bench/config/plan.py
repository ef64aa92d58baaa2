"""`Plan`: how a model is quantized. Frozen, strict, and free of heavy imports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from robuq_bench.config.base import (
    Ints,
    Name,
    OptionalFloat,
    OptionalInt,
    OptionalStrings,
    OptionalText,
    Section,
    Strings,
    TextDigest,
)

WeightQuantizer = Literal["none", "ternary-twn", "ternary-absmean"]
ActivationQuantizer = Literal[
    "none", "robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet"
]
RotationKind = Literal["none", "hadamard", "randomized-hadamard"]


class WeightConfig(Section):
    """Weights: `ternary-twn` is per channel (RobuQ), `ternary-absmean` per tensor (BitNet)."""

    quantizer: WeightQuantizer = "none"


class ActivationConfig(Section):
    """Per-token activation quantizer; `bits` is also the warm-up width when bits are allocated."""

    quantizer: ActivationQuantizer = "none"
    bits: int = Field(default=8, ge=1, le=8)


class RotationConfig(Section):
    """Hadamard rotation of the input dimension, for layers whose name matches a pattern."""

    kind: RotationKind = "none"
    layers: Strings = ("*",)


class LowRankConfig(Section):
    """Full-precision branch A(Bx) from the SVD of the rotated weight; rank 0 means no branch.

    `layers` are fnmatch patterns of the layers that have one; None: every quantized layer.
    """

    rank: int = Field(default=0, ge=0)
    layers: OptionalStrings = None


class AdaLNConfig(Section):
    """The modulation linears, kept at fixed bits outside the allocation; None = not quantized."""

    weight_quantizer: WeightQuantizer = "none"
    activation_bits: OptionalInt = Field(default=None, ge=1, le=8)


class AttentionConfig(Section):
    """Bits of the operands of QK^T and attention·V; None keeps fused full-precision attention."""

    matmul_bits: OptionalInt = Field(default=None, ge=2, le=8)


class AllocationConfig(Section):
    """Bits per layer: the same everywhere, AMPN at a MAC-weighted mean, or read from a file.

    `sensitivity_steps` are the QAT steps before sensitivity is measured; None takes the
    workload's. `sha256` is filled in from `path` when a config is resolved, so that a changed
    file is a different run.
    """

    method: Literal["uniform", "ampn", "file"] = "uniform"
    mean_bits: OptionalFloat = Field(default=None, gt=0, le=8)
    bit_choices: Ints = (1, 2, 3, 4)
    cost: Literal["macs"] = "macs"
    sensitivity_steps: OptionalInt = Field(default=None, ge=0)
    path: OptionalText = None
    sha256: TextDigest = ""

    @model_validator(mode="after")
    def _consistent(self) -> AllocationConfig:
        choices = self.bit_choices
        if not choices or any(not 1 <= bits <= 8 for bits in choices):
            raise ValueError(f"bit_choices must be between 1 and 8, got {list(choices)}")
        if list(choices) != sorted(set(choices)):
            raise ValueError(f"bit_choices must ascend without repeats, got {list(choices)}")
        if self.method == "ampn":
            if self.mean_bits is None:
                raise ValueError("method 'ampn' needs mean_bits")
            if not choices[0] <= self.mean_bits <= choices[-1]:
                raise ValueError(
                    f"mean_bits {self.mean_bits:g} cannot be reached with bit_choices "
                    f"{list(choices)}; choose between {choices[0]} and {choices[-1]}"
                )
        elif self.mean_bits is not None:
            raise ValueError(
                f"mean_bits is only used by method 'ampn', but method is {self.method!r}; "
                "set method to 'ampn', or mean_bits to 'none'"
            )
        if (self.method == "file") != (self.path is not None):
            raise ValueError("method 'file' and path go together: give both or neither")
        return self


class QATConfig(Section):
    """Loss = distillation_weight·||eps_student − eps_teacher||² + denoising_weight·eps-loss."""

    distillation_weight: float = Field(default=1.0, ge=0)
    denoising_weight: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _some_loss(self) -> QATConfig:
        if self.distillation_weight == 0 and self.denoising_weight == 0:
            raise ValueError("one of distillation_weight and denoising_weight must be positive")
        return self


class LayersConfig(Section):
    """Which layers are quantized, beyond the rule by structure (`quantization/selection.py`).

    fnmatch patterns, each matching a layer's name from any of its components on. `skip` keeps
    layers in full precision; `include` quantizes layers that the rule keeps (embedders, heads);
    `adaln` replaces the rule that tells modulation layers, None is the rule.
    """

    skip: Strings = ()
    include: Strings = ()
    adaln: OptionalStrings = None


class Plan(Section):
    """How a model is quantized; packaged plans are `robuq_bench/plans/*.toml`."""

    name: Name
    description: str = ""
    weights: WeightConfig = WeightConfig()
    activations: ActivationConfig = ActivationConfig()
    rotation: RotationConfig = RotationConfig()
    low_rank: LowRankConfig = LowRankConfig()
    adaln: AdaLNConfig = AdaLNConfig()
    attention: AttentionConfig = AttentionConfig()
    allocation: AllocationConfig = AllocationConfig()
    qat: QATConfig = QATConfig()
    layers: LayersConfig = LayersConfig()

    @property
    def is_full_precision(self) -> bool:
        """True when neither weights nor activations are quantized: the teacher itself."""
        return self.weights.quantizer == "none" and self.activations.quantizer == "none"

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.is_full_precision:
            quantized = {
                "rotation.kind": self.rotation.kind != "none",
                "low_rank.rank": self.low_rank.rank > 0,
                "adaln.weight_quantizer": self.adaln.weight_quantizer != "none",
                "adaln.activation_bits": self.adaln.activation_bits is not None,
                "attention.matmul_bits": self.attention.matmul_bits is not None,
            }
            extra = [key for key, is_set in quantized.items() if is_set]
            if extra:
                raise ValueError(
                    f"weights and activations are full precision, so {', '.join(extra)} would "
                    "be ignored; leave it out, or choose a quantizer"
                )
        if self.activations.quantizer == "none" and self.allocation.method != "uniform":
            raise ValueError(
                f"allocation.method {self.allocation.method!r} needs an activations.quantizer"
            )
        if self.activations.quantizer == "none" and self.adaln.activation_bits is not None:
            raise ValueError("adaln.activation_bits needs an activations.quantizer")
        return self
