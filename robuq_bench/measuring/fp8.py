"""Linear layers in fp8, a scale per token and per output: the strongest 8-bit peer on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robuq_bench.quantization.module_tree import exchange_layers, names_of

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_CAPABILITY = (8, 9)
ALIGNED = 16
"""Inputs and outputs must be multiples of it."""


def has_fp8(device: torch.device | str) -> bool:
    """Whether a device multiplies fp8 matrices."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


class Fp8Linear(nn.Module):
    """`linear` with its weight in fp8, and tokens rounded to fp8 as they come; bfloat16 results."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scales(weight)
        self.bias = linear.bias  # first: models read the dtype of their first parameter
        self.register_buffer("weight", (weight / scale).to(FP8))
        self.register_buffer("scale", scale.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] bfloat16 -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        scale = _scales(rows)
        codes = (rows.float() / scale).to(FP8)
        y = torch._scaled_mm(
            codes, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16
        )
        return y.view(*x.shape[:-1], -1)


def _scales(rows: Tensor) -> Tensor:
    """Scales [N, 1] by which the largest value of each row becomes fp8's largest."""
    scale = rows.abs().amax(1, keepdim=True).float() / LARGEST
    return scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays zero


def fp8_(model: nn.Module) -> nn.Module:
    """Exchange every linear layer that fp8 products take, in place."""
    linears = [
        linear
        for linear in names_of(model, nn.Linear)
        if linear.in_features % ALIGNED == 0 and linear.out_features % ALIGNED == 0
    ]
    return exchange_layers(model, {linear: Fp8Linear(linear) for linear in linears})
