"""The quantizer of attention's operands against its formula."""

from __future__ import annotations

import pytest
import torch

from robuq_bench.errors import ConfigError
from robuq_bench.quantization.attention import matmul_quantizer


@pytest.mark.parametrize("bits", range(2, 9))
def test_matmul_quantizer(bits: int) -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    limit = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / limit
    expected = torch.where(scale > 0, torch.round(x / scale) * scale, 0.0)
    leaf = x.clone().requires_grad_()
    y = matmul_quantizer(bits)(leaf)
    torch.testing.assert_close(y, expected)
    y.backward(x)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, x)


@pytest.mark.parametrize("bits", [1, 9])
def test_matmul_quantizer_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"matmul_bits must be 2 to 8, got {bits}"):
        matmul_quantizer(bits)
