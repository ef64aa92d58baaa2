"""`QuantizedLinear`: rotation, low-rank branch, ternary weight and quantized activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.quantization import cuda_path
from robuq_bench.quantization.activations import ActivationQuantizer, activation_quantizer
from robuq_bench.quantization.fused import fused_linear
from robuq_bench.quantization.rotations import random_signs, rotate
from robuq_bench.quantization.weights import fake_quantize_weight


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
    """Whether the CPU path applies; a GPU, half precision and `torch.compile` take the other."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    signs: Tensor | None,
    rotated: bool,
    quantizer: ActivationQuantizer | None,
    bits: int,
) -> Tensor:
    """[Q_a(x R) | x R down^T] weight^T + bias: what a quantized layer computes, on any device.

    Arguments as of `fused_linear`, which does it for floats on the CPU; `cuda_path` does it with
    kernels where it can, and what remains is composed of PyTorch's operations.
    """
    if quantizer is not None and cuda_path.takes_tokens(x, weight, rotated, quantizer, bits):
        dtype = cuda_path.product_dtype(weight) or weight.dtype
        operand, tokens = cuda_path.fake_quantize(
            x, signs, rotated, quantizer, bits, dtype, want_rotated=down is not None
        )
        if down is not None:
            operand = torch.cat([operand, F.linear(tokens, down).to(dtype)], -1)
        return F.linear(operand, weight, bias)
    if _fusible(x, weight):
        return fused_linear(x, weight, bias, down, signs, rotated, quantizer, bits)
    tokens = x if x.dtype == torch.float64 else x.float()
    if rotated:
        tokens = rotate(tokens, None if signs is None else signs.to(tokens.dtype))
    operand = tokens if quantizer is None else quantizer.fake_quantize(tokens, bits)
    if down is not None:
        branch = F.linear(tokens.to(weight.dtype), down)
        operand = torch.cat([operand.to(branch.dtype), branch], -1)
    return F.linear(operand.to(weight.dtype), weight, bias)


class QuantizedLinear(nn.Module):
    """y = Q_a(x D H) Q_w(W)^T + (x D H) down^T up^T + bias.

    `weight` [out, in] is the rotated weight less the low-rank branch up [out, r] @ down [r, in],
    which reads the rotated activation before quantization. `signs` [in] is the diagonal of D
    (buffer; None without random signs). In eval mode the ternary weight is cached until the
    weight changes: any in-place operation, `load_state_dict`, `train()` or a move invalidates it,
    but writing through `weight.data` does not.

    Attributes:
        name: layer name in its model, the seed of its signs.
        activation_bits: bits per activation, None = not quantized; may be changed at any time.
    """

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
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        up, down = (None, None) if low_rank is None else low_rank
        self.register_parameter("low_rank_up", None if up is None else nn.Parameter(up))
        self.register_parameter("low_rank_down", None if down is None else nn.Parameter(down))
        self.register_buffer("signs", signs)
        self._cached: tuple[Any, Tensor] | None = None

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
        return layer.train(linear.training)

    def check_activation_bits(self, bits: int | None) -> None:
        """Raise ConfigError unless this layer's activation quantizer is defined at `bits`."""
        quantizer = activation_quantizer(self.activation_quantizer)
        if bits is None:
            return
        if bits != int(bits):
            raise ConfigError(
                f"layer {self.name!r}: activation bits must be a whole number: {bits}"
            )
        if quantizer is None:
            raise ConfigError(f"layer {self.name!r} has no activation quantizer to give bits to")
        quantizer.check_bits(bits)

    def train(self, mode: bool = True) -> QuantizedLinear:
        self._cached = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def quantized_weight(self) -> Tensor:
        """Dequantized ternary weight [out, in], differentiable."""
        return fake_quantize_weight(self.weight, self.weight_quantizer)

    def _wide_weight(self) -> Tensor:
        """[quantized weight | up], [out, in + r]: both products of the layer in one."""
        dtype = cuda_path.product_dtype(self.weight)
        weight = fake_quantize_weight(self.weight, self.weight_quantizer, dtype)
        if self.low_rank_up is None:
            return weight
        return torch.cat([weight, self.low_rank_up.to(weight.dtype)], 1)

    def _cached_wide_weight(self) -> Tensor:
        sources = [p for p in (self.weight, self.low_rank_up) if p is not None]
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in sources)
        if self.training or needs_grad or any(p.is_inference() for p in sources):
            return self._wide_weight()
        # The kernels make it in the dtype of the product, which autocast decides.
        dtype = cuda_path.product_dtype(self.weight)
        key = (dtype, *((p.data_ptr(), p._version, p.dtype) for p in sources))
        if self._cached is None or self._cached[0] != key:
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cached = (key, self._wide_weight())
        return self._cached[1]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"layer {self.name!r} takes {self.in_features} features, got {tuple(x.shape)}"
            )
        weight = self._cached_wide_weight()
        bits = self.activation_bits
        quantizer = None if bits is None else activation_quantizer(self.activation_quantizer)
        if quantizer is not None:
            quantizer.check_bits(bits or 0)
        return linear_product(
            x,
            weight,
            self.bias,
            self.low_rank_down,
            self.signs,
            self.rotated,
            quantizer,
            bits or 0,
        )

    def extra_repr(self) -> str:
        rank = 0 if self.low_rank_up is None else self.low_rank_up.shape[1]
        bits = "fp" if self.activation_bits is None else f"{self.activation_bits} bits"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight={self.weight_quantizer}, activations={self.activation_quantizer} {bits}, "
            f"rotated={self.rotated}, rank={rank}"
        )
