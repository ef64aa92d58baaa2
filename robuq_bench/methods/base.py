"""What a method is: one choice for one slot of a quantized layer, as a plan's TOML writes it.

A layer computes, for input x [..., in] and weight W [out, in],

    y = Q_a(x') Q_w(W' - L)^T + x' L^T + (b + W c),    x' = R((x - c) / s),    W' = R(W s)

Centring (c), scaling (s), rotation (R), branch (L), weight (Q_w) and activation (Q_a) are its
slots, fitted in this order; every slot may be empty. A method is a frozen section of a plan, its
fields are its TOML keys, and `fit` makes the module that fills the slot. Free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.sections import Section, TextDigest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from robuq_bench.methods.site import Site

Slot = Literal["centring", "scaling", "rotation", "branch", "weight", "activation"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
"""In the order in which they are fitted."""

Need = Literal["tokens", "absmax", "mean", "gram"]
"""What `fit` reads of the inputs that a layer saw in calibration; see `Site`."""

FULL_PRECISION_BITS = 32.0
SCALE_BITS = 16
"""Bits of one stored scale or zero point in every account, fp16 as its files have them."""


class Method(Section):
    """Base of all methods. Subclasses set `slot`, add their parameters, and define `fit`.

    Attributes:
        method: what the plan calls it: a name of this package, a registered one, or
            "module:Class".
        sha256: of the source file of a "module:Class", so that a changed method is another run.
    """

    slot: ClassVar[Slot]
    needs: ClassVar[frozenset[Need]] = frozenset()

    method: str
    sha256: TextDigest = ""

    @property
    def is_empty(self) -> bool:
        """Whether it does nothing, so that a plan leaves the slot empty."""
        return False

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError when the method cannot serve a weight [out, in]. Reads no tensor."""

    def fit(self, weight: Tensor, site: Site) -> nn.Module | tuple[nn.Module, Tensor]:
        """The module that fills the slot; of a weight method, with another weight if it finds one.

        `weight` is [out, in] float64 as the earlier slots left it. What the module must offer
        is said by the base class of its slot.
        """
        raise UsageError(
            f"{self.slot} method {self.method!r}: {type(self).__name__} defines no fit"
        )

    def unknown(self, what: str) -> UsageError:
        """The error of a method that cannot say `what` of itself."""
        return UsageError(
            f"{self.slot} method {self.method!r} does not say its {what}; define "
            f"{type(self).__name__}.{what}"
        )


class CentringMethod(Method):
    """c: a module with the buffer `centre` [in] and `forward(x)` = x - c.

    W c, of the weight in full precision, is added to the layer's bias once, when it is fitted:
    exact before training, without the rounding of the codes. A bias that trains then goes its own
    way, so W c need not follow W, and c stays. Needs a layer with a bias.
    """

    slot = "centring"

    def stored_bits(self, in_features: int) -> float:
        """Bits that a layer stores for it."""
        return 16.0 * in_features

    def additions(self, in_features: int) -> int:
        """Additions of centring one token."""
        return in_features


class ScalingMethod(Method):
    """s: a module with `forward(x)` = x / s and `weight(w)` = w s.

    weight(w) @ forward(x) must equal w @ x in full precision.
    """

    slot = "scaling"

    def stored_bits(self, in_features: int) -> float:
        """Bits that a layer stores for it."""
        return 16.0 * in_features


class RotationMethod(Method):
    """R: a module with `forward(x)` and `weight(w)`, orthogonal, so that w @ x stays."""

    slot = "rotation"

    def stored_bits(self, in_features: int) -> float:
        """Bits that a layer stores for it."""
        raise self.unknown("stored_bits")

    def additions(self, in_features: int) -> int:
        """Additions of rotating one token by a matrix of ±1."""
        raise self.unknown("additions")

    def macs(self, in_features: int) -> int:
        """Multiply-adds in full precision of rotating one token; 0 where additions do."""
        return 0


class BranchMethod(Method):
    """L: a module with `forward(x)` [..., out] and `weight(w)`, the rest W' - L to quantize."""

    slot = "branch"

    def values(self, out_features: int, in_features: int) -> int:
        """Full-precision numbers of the branch; as many multiply-adds a token."""
        raise self.unknown("values")

    def rank_of(self, out_features: int, in_features: int) -> int | None:
        """Rank of a branch of two factors, [out, rank] and [rank, in]; None for any other."""
        return None


class WeightMethod(Method):
    """Q_w: a module with `forward(w)`, differentiable, and for packing `codes(w)` -> `Codes`.

    `fit` returns (module, weight) where the weight to quantize is not the one it was given: values
    that the module's grid returns unchanged, as GPTQ finds them.
    """

    slot = "weight"

    def nominal_bits(self) -> float:
        """Bits of a code, as in "W4A4"; log2(3) for ternary. Also what a bit operation counts."""
        raise self.unknown("nominal_bits")

    def storage_bits(self, out_features: int, in_features: int) -> float:
        """All bits of a stored weight: codes, and `SCALE_BITS` for each scale and zero point."""
        raise self.unknown("storage_bits")

    def with_bits(self, bits: int) -> WeightMethod:
        """The same method at other bits; ConfigError if it has none to choose, or not these."""
        if "bits" not in type(self).model_fields:
            raise ConfigError(f"weight method {self.method!r} has no bits to choose")
        try:
            return type(self).model_validate({**self.model_dump(), "bits": bits})
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(
                f"weight method {self.method!r} does not take {bits!r} bits: {why}"
            ) from None


class ActivationMethod(Method):
    """Q_a: a module with `forward(x, bits)`, differentiable, on x [..., in] of one dtype.

    `bits` are the layer's, an int, and may change at any time (an allocation sets them);
    `check_bits` says which the fitted module takes. `codes(x, bits)` is optional.
    """

    slot = "activation"
    min_bits: ClassVar[int] = 1
    max_bits: ClassVar[int] = 8
    bits_are_fitted: ClassVar[bool] = False
    """Whether what `fit` finds is for these bits alone, so that no allocation may change them."""

    bits: int = Field(default=8, ge=1, le=8)

    def check_bits(self, bits: int) -> None:
        """Raise ConfigError unless this quantizer is defined at `bits`."""
        if isinstance(bits, bool) or not self.min_bits <= bits <= self.max_bits:
            raise ConfigError(
                f"activation method {self.method!r} takes {self.min_bits} to {self.max_bits} "
                f"bits, got {bits!r}"
            )

    def scales_per_token(self, in_features: int) -> float:
        """Scales and zero points that go with one quantized token; 0 for static ones."""
        raise self.unknown("scales_per_token")

    def model_post_init(self, context: Any) -> None:
        """Refuse bits the method has no grid for when the plan is read."""
        try:
            self.check_bits(self.bits)
        except ConfigError as error:
            raise ValueError(str(error)) from None
