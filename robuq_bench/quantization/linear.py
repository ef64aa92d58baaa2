"""`QuantizedLinear`: rotation, low-rank branch, ternary weight and quantized activations."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.quantization import compiled, cuda_path
from robuq_bench.quantization.activations import ActivationQuantizer, activation_quantizer
from robuq_bench.quantization.bits import ActivationBits
from robuq_bench.quantization.fused import fused_linear
from robuq_bench.quantization.guard import GuardedWeight, guarded_weight
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.quantization.weights import fake_quantize_weight

logger = logging.getLogger(__name__)

MANY_CLAMPED = 0.05
"""Share of clamped gradients past which a scaled loss is more likely than a large one."""


def rename_old_weight(state: dict[str, Any], prefix: str) -> None:
    """Call the weight of the layer at `prefix` in a state what it is called now, in place."""
    if prefix + "weight" in state:
        state.setdefault(prefix + "master_weight", state.pop(prefix + "weight"))


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation of weight [out, in] as up [out, r] @ down [r, in], float64.

    up = U sqrt(S), down = sqrt(S) V^T of the singular value decomposition; each column of V has
    its largest entry positive, so that the factors do not depend on the LAPACK build.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    sign = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    root = s.sqrt()
    return u * sign.T * root, vh * sign * root[:, None]


def _fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU path applies; a GPU, half precision and tracing take the composition."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        # A trace would keep the blocks of the batch it was made with.
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def linear_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    signs: Tensor | None,
    rotated: bool,
    quantizer: ActivationQuantizer | None,
    bits: int | Tensor,
) -> Tensor:
    """[Q_a(x R) | x R down^T] weight^T + bias: what a quantized layer computes, on any device.

    Arguments as of `fused_linear`, which does it for floats on the CPU; `cuda_path` does it with
    kernels where it can, and what remains is composed of PyTorch's operations. Under
    `torch.compile` bits may be a tensor of one element on the CPU.
    """
    if quantizer is not None and cuda_path.takes_tokens(x, weight, rotated, quantizer, bits):
        dtype = cuda_path.product_dtype(weight) or weight.dtype
        operand, tokens = cuda_path.fake_quantize(
            x, signs, rotated, quantizer, bits, dtype, want_rotated=down is not None
        )
        if down is not None:
            operand = torch.cat([operand, F.linear(tokens, down).to(dtype)], -1)
        return F.linear(operand, weight, bias)
    if torch.compiler.is_compiling() or isinstance(bits, Tensor):
        return _compiled_product(x, weight, bias, down, signs, rotated, quantizer, bits)
    if _fusible(x, weight):
        return fused_linear(x, weight, bias, down, signs, rotated, quantizer, bits)
    tokens = x if x.dtype == torch.float64 else x.float()
    if rotated:
        tokens = rotate(tokens, None if signs is None else signs.to(tokens.dtype))
    operand = tokens if quantizer is None else quantizer.fake_quantize(tokens, bits)
    return _composed_product(operand, tokens, weight, bias, down)


def _composed_product(
    operand: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None
) -> Tensor:
    if down is not None:
        branch = F.linear(tokens.to(weight.dtype), down)
        operand = torch.cat([operand.to(branch.dtype), branch], -1)
    return F.linear(operand.to(weight.dtype), weight, bias)


def _compiled_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    signs: Tensor | None,
    rotated: bool,
    quantizer: ActivationQuantizer | None,
    bits: int | Tensor,
) -> Tensor:
    """The composition of `linear_product` from operators that `torch.compile` keeps whole."""
    tokens = x if x.dtype == torch.float64 else x.float()
    if rotated:
        signed = tokens if signs is None else tokens * signs.to(tokens.dtype)
        tokens = compiled.transform(signed, inverse=False)
    operand = tokens
    if quantizer is not None:
        bits = bits if isinstance(bits, Tensor) else torch.tensor(bits)
        operand = compiled.fake_quantize_tokens(tokens, quantizer.name, bits)
    return _composed_product(operand, tokens, weight, bias, down)


class QuantizedLinear(ActivationBits):
    """y = Q_a(x D H) Q_w(W)^T + (x D H) down^T up^T + bias.

    W, the parameter `master_weight` [out, in], is the rotated weight less the low-rank branch
    up [out, r] @ down [r, in], which reads the rotated activation before quantization. `signs` [in]
    is the diagonal of D (buffer; None without random signs). The attribute `weight` tells shape,
    dtype and device and refuses arithmetic. The ternary weight is computed in every forward pass,
    but for a `cached_weights` block.

    Attributes:
        name: layer name in its model, the seed of its signs.
        activation_bits: bits per activation, None = not quantized; may be changed at any time,
            and kept in the state dict.
        clamps_in_backward: whether the gradient of a "ternary-twn" weight is clamped as it arises;
            see `defer_gradient_clamp`.
    """

    master_weight: nn.Parameter
    bias: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    signs: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        name: str,
        weight_quantizer: str,
        activation_quantizer: str,
        activation_bits: int | None,
        rotated: bool,
        signs: Tensor | None,
        low_rank: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.name = name
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer
        self.activation_bits = activation_bits
        self.rotated = rotated
        self.master_weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        up, down = (None, None) if low_rank is None else low_rank
        self.register_parameter("low_rank_up", None if up is None else nn.Parameter(up))
        self.register_parameter("low_rank_down", None if down is None else nn.Parameter(down))
        self.register_buffer("signs", signs)
        self.clamps_in_backward = True
        self._cache: list[tuple[Any, Tensor]] | None = None
        self._watched: weakref.ref[nn.Parameter] | None = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        name: str,
        weight_quantizer: str = "ternary-twn",
        activation_quantizer: str = "robust-midtread",
        activation_bits: int | None = 4,
        rotation: str = "randomized-hadamard",
        rank: int = 16,
        seed: int = 0,
    ) -> QuantizedLinear:
        """Convert a linear layer; the result computes the same function up to quantization.

        Raises:
            UnsupportedHadamardOrder: the rotation has no matrix for `in_features`.
            ConfigError: rank above min(in, out), or an unknown rotation.
        """
        if rotation not in ("none", "hadamard", "randomized-hadamard"):
            raise ConfigError(f"layer {name!r}: unknown rotation.kind {rotation!r}")
        if rank > min(linear.in_features, linear.out_features):
            raise ConfigError(
                f"layer {name!r} is {linear.out_features} x {linear.in_features}: low_rank.rank "
                f"{rank} exceeds its smaller side"
            )
        dtype, device = linear.weight.dtype, linear.weight.device
        weight = linear.weight.detach().double()
        signs = None
        if rotation == "randomized-hadamard":
            signs = random_signs(linear.in_features, name, seed).to(device, dtype)
        if rotation != "none":
            weight = rotate(weight, None if signs is None else signs.double())
        low_rank = None
        if rank > 0:
            up, down = low_rank_factors(weight, rank)
            weight = weight - up @ down
            low_rank = (up.to(dtype).contiguous(), down.to(dtype).contiguous())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(
            weight.to(dtype),
            bias,
            name=name,
            weight_quantizer=weight_quantizer,
            activation_quantizer=activation_quantizer,
            activation_bits=activation_bits,
            rotated=rotation != "none",
            signs=signs,
            low_rank=low_rank,
        )
        layer.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None and linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def weight(self) -> GuardedWeight:
        """Shape, dtype and device of the weight; arithmetic on it is a UsageError."""
        return guarded_weight(self.master_weight, tuple(self.master_weight.shape), self.name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in a `cached_weights` block would keep the cache for ever.
        return {**self.__dict__, "_cache": None, "_watched": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_weight(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def quantized_weight(self) -> Tensor:
        """Dequantized ternary weight [out, in], differentiable."""
        return self._fake_quantized(None)

    def _fake_quantized(self, dtype: torch.dtype | None) -> Tensor:
        return fake_quantize_weight(
            self.master_weight, self.weight_quantizer, dtype, clamp=self.clamps_in_backward
        )

    def _wide_weight(self) -> Tensor:
        """[quantized weight | up], [out, in + r]: both products of the layer in one."""
        weight = self._fake_quantized(cuda_path.product_dtype(self.master_weight))
        if self.low_rank_up is None:
            return weight
        return torch.cat([weight, self.low_rank_up.to(weight.dtype)], 1)

    def _cached_wide_weight(self) -> Tensor:
        if self._cache is None or torch.compiler.is_compiling():
            return self._wide_weight()
        sources = [p for p in (self.master_weight, self.low_rank_up) if p is not None]
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in sources)
        if self.training or needs_grad or any(p.is_inference() for p in sources):
            return self._wide_weight()
        # The kernels make it in the dtype of the product, which autocast decides. The sources are
        # held, so that no other tensor can take their place in memory.
        key = (cuda_path.product_dtype(self.master_weight), [(p, p._version) for p in sources])
        if not self._cache or not _is_same(self._cache[0][0], key):
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[:] = [(key, self._wide_weight())]
        return self._cache[0][1]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"layer {self.name!r} takes {self.in_features} features, got {tuple(x.shape)}"
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._clamps():
            self._check_autocast(x)
            self._watch_accumulation()
        weight = self._cached_wide_weight()
        bits = self.current_bits()
        quantizer = None if bits is None else activation_quantizer(self.activation_quantizer)
        return linear_product(
            x,
            weight,
            self.bias,
            self.low_rank_down,
            self.signs,
            self.rotated,
            quantizer,
            0 if bits is None else bits,
        )

    def _clamps(self) -> bool:
        """Whether a backward pass would clamp the gradient of the weight."""
        clamped = self.clamps_in_backward and self.weight_quantizer == "ternary-twn"
        return clamped and self.master_weight.requires_grad

    def _check_autocast(self, x: Tensor) -> None:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            self._refuse_clamp("training under float16 autocast scales the loss")

    def _watch_accumulation(self) -> None:
        """Refuse gradients that are added up over backward passes, or scaled as float16 needs."""
        weight = self.master_weight
        if not weight.is_leaf or (self._watched is not None and self._watched() is weight):
            return
        self._watched = weakref.ref(weight)  # itself it would become a second parameter
        last: tuple[weakref.ref[Tensor], int] | None = None

        looks = 3  # the first passes show a scaled loss; looking at all of them costs time

        def check(parameter: Tensor) -> None:
            nonlocal last, looks
            grad = parameter.grad
            if grad is None or not self._clamps():
                return
            if grad.dtype == torch.float16:
                self._refuse_clamp("training in float16 scales the loss")
            # Added to in place since the last pass, and nothing else: not zeroed, nor replaced.
            if last is not None and last[0]() is grad and grad._version == last[1] + 1:
                self._refuse_clamp("gradients are accumulated over several backward passes")
            last = (weakref.ref(grad), grad._version)
            if looks > 0:
                looks -= 1
                clamped = float((grad.abs() >= 1).float().mean())
                if clamped > MANY_CLAMPED:
                    looks = 0
                    logger.warning(
                        "layer %r: %.0f %% of its gradients were clamped to [-1, 1]; if the loss "
                        "is scaled (a GradScaler), they are wrong: see defer_gradient_clamp",
                        self.name,
                        100 * clamped,
                    )

        weight.register_post_accumulate_grad_hook(check)

    def _refuse_clamp(self, situation: str) -> NoReturn:
        raise UsageError(
            f"layer {self.name!r}: {situation}, and a clamp of ternary-twn gradients to [-1, 1] "
            "inside the pass would act on scaled, or on partial, ones. Call "
            "defer_gradient_clamp(model) once, and clamp_gradients_(model) before every step of "
            "the optimizer (after scaler.unscale_(optimizer), if there is a scaler)"
        )

    def extra_repr(self) -> str:
        rank = 0 if self.low_rank_up is None else self.low_rank_up.shape[1]
        bits = "fp" if self.activation_bits is None else f"{self.activation_bits} bits"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight={self.weight_quantizer}, activations={self.activation_quantizer} {bits}, "
            f"rotated={self.rotated}, rank={rank}"
        )


def _is_same(a: Any, b: Any) -> bool:
    """Whether two keys of the cache name the same tensors, unchanged."""
    return a[0] == b[0] and all(
        p is q and version == other for (p, version), (q, other) in zip(a[1], b[1], strict=True)
    )


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Compute the ternary weight of every layer once, for passes in eval mode inside the block.

    For loops that own the model. In-place operations, `load_state_dict` and `functional_call` are
    seen; writing through `.data` inside the block is not.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m._cache is None]
    for layer in layers:
        layer._cache = []
    try:
        yield
    finally:
        for layer in layers:
            layer._cache = None


def defer_gradient_clamp(model: nn.Module) -> None:
    """Leave the [-1, 1] clamp of ternary-twn gradients to `clamp_gradients_`.

    For training with a loss scaler or with gradients accumulated over several backward passes,
    where a clamp inside each pass would act on scaled, or partial, gradients.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.clamps_in_backward = False


@torch.no_grad()
def clamp_gradients_(model: nn.Module) -> None:
    """Clamp the accumulated gradients of ternary-twn weights to [-1, 1], in place.

    Call it before the optimizer's step, and after `scaler.unscale_(optimizer)` where there is one.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.weight_quantizer == "ternary-twn":
            gradient = module.master_weight.grad
            if gradient is not None:
                gradient.clamp_(-1, 1)
