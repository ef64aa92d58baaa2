"""Attention in integers: the reference against fake quantization, the kernels against both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.quantized_attention import reference, triton
from robuq_bench.models.dit import Attention
from robuq_bench.quantization.attention import matmul_quantizer


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int, seed: int = 0) -> Tensor:
    """Tokens with channels of unequal size, so that scales differ and the softmax is peaked."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator)
    return qkv * torch.linspace(0.3, 3.0, 3 * heads * head_dim).roll(17)


def fake_quantized(qkv: Tensor, heads: int, bits: int) -> Tensor:
    """What the trained model evaluates."""
    attention = Attention(qkv.shape[-1] // 3, heads)
    attention.matmul_quantizer = matmul_quantizer(bits)
    return attention.attend(qkv)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation over the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "head_dim"), [(64, 64), (256, 72), (49, 24), (1200, 64)])
def test_the_reference_is_what_training_evaluates(tokens: int, head_dim: int, bits: int) -> None:
    qkv = random_qkv(2, tokens, 2, head_dim)
    limit = 2 ** (bits - 1) - 1
    ours = reference.quantized_attention(qkv, heads=2, limit=limit, out_dtype=torch.float32)
    # A value half way between two integers may go either way: a step of one probability.
    theirs = fake_quantized(qkv, 2, bits)
    error = (ours - theirs).abs() / theirs.abs().max()
    assert float((error > 1e-5).float().mean()) < 0.02
    assert float(error.max()) < 2 / limit


def test_it_is_attention_at_many_levels() -> None:
    qkv = random_qkv(1, 64, 2, 64)
    ours = reference.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert difference(ours, Attention(128, 2).attend(qkv)) < 0.05


def test_zeros_stay_zeros_and_what_is_not_finite_spreads() -> None:
    qkv = random_qkv(3, 16, 2, 8)
    qkv[:, :, 32:40] = 0  # the values of one head
    qkv[0, 5, 3] = math.inf  # a query
    qkv[1, 5, 17] = math.nan  # a key
    qkv[2, 5, 41] = -math.inf  # a channel of the values
    out = reference.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    expected = torch.zeros(3, 16, 2, 8, dtype=torch.bool)
    expected[0, 5, 0] = True
    expected[1, :, 0] = True
    expected[2, :, 1, 1] = True
    assert torch.equal(out.view(3, 16, 2, 8).isnan(), expected)
    assert torch.equal(out[2, :, :8], torch.zeros(16, 8))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [
        (2, 64, 2, 64),  # DiT-L/2 at 128 pixels
        (1, 256, 2, 64),
        (1, 256, 1, 72),  # DiT-XL/2 at 256 pixels: 64 + 8 channels
        (2, 64, 2, 72),
        (1, 1024, 1, 72),  # at 512 pixels: two passes over the keys
        (2, 16, 3, 12),  # fewer tokens and channels than the tensor core takes
        (2, 49, 2, 40),
        (1, 300, 2, 24),  # a last block of keys that is not full
    ],
)
def test_the_kernels_are_the_reference(
    device: torch.device, batch: int, tokens: int, heads: int, head_dim: int
) -> None:
    qkv = random_qkv(batch, tokens, heads, head_dim).to(device)
    for limit in (127, 7):
        arguments: dict[str, Any] = {"heads": heads, "limit": limit, "out_dtype": torch.float32}
        ours = triton.quantized_attention(qkv, **arguments)
        expected = reference.quantized_attention(qkv, **arguments)
        # A GPU divides and exponentiates less exactly than NumPy: integers half way may differ.
        assert float((ours - expected).norm() / expected.norm()) < 0.05 / limit
        assert difference(ours, expected) < 1 / limit


def test_many_images_take_large_blocks_of_queries(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = random_qkv(1, 200, 2, 72).to(device)
    few = triton.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert triton.constants(200, 2, 72, 127, 1)[1]["BLOCK_Q"] == 64
    monkeypatch.setattr(triton, "FEW_BLOCKS", 1)
    assert triton.constants(200, 2, 72, 127, 1)[1]["BLOCK_Q"] == 128
    many = triton.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert difference(many, few) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_and_goes(device: torch.device, dtype: torch.dtype) -> None:
    qkv = random_qkv(2, 64, 2, 72).to(device, dtype)
    ours = triton.quantized_attention(qkv, heads=2, limit=127, out_dtype=dtype)
    expected = reference.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert ours.dtype == dtype
    assert difference(ours, expected) < 0.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("tokens", [16, 260])
def test_the_kernels_treat_zeros_and_what_is_not_finite_alike(
    device: torch.device, tokens: int
) -> None:
    qkv = random_qkv(5, tokens, 2, 8).to(device)
    qkv[:, :, 32:40] = 0  # the values of one head
    qkv[0, 5, 3] = math.inf  # a query
    qkv[1, 5, 17] = math.nan  # a key
    qkv[2, 5, 41] = -math.inf  # a channel of the values
    qkv[3, 5, :8] = 0  # a query of zeros
    qkv[4, :, 16:32] *= 1e-42 / 127  # keys whose scale has no inverse in float32
    ours = triton.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    expected = reference.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert difference(ours.nan_to_num(), expected.nan_to_num()) < 1 / 127
    assert torch.equal(ours[3, :, :8], torch.zeros_like(ours[3, :, :8]))


def test_the_kernels_take_heads_of_256_channels_and_65535_of_them(device: torch.device) -> None:
    with pytest.raises(KernelInputError, match="heads of 257 channels; 256 work at most"):
        triton.quantized_attention(torch.zeros(1, 4, 771, device=device), heads=1, limit=127)
    with pytest.raises(KernelInputError, match="more than 65535; split the batch"):
        triton.quantized_attention(torch.zeros(65536, 1, 3, device=device), heads=1, limit=127)
    empty = triton.quantized_attention(torch.zeros(0, 4, 96, device=device), heads=2, limit=127)
    assert empty.shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.zeros(2, 16, 100)}, "C a multiple of heads = 2"),
        ({"qkv": torch.zeros(2, 16)}, r"qkv must be \[any, any, any\]"),
        ({"qkv": torch.zeros(2, 0, 96)}, "0 tokens are not supported"),
        ({"qkv": torch.zeros(2, 16, 96, dtype=torch.float64)}, "qkv must be float32"),
        ({"qkv": torch.zeros(16, 2, 96).transpose(0, 1)}, "qkv must be contiguous"),
        ({"heads": 0}, "multiple of heads = 0"),
        ({"limit": 0}, "limit must be 1 to 127"),
        ({"limit": 128}, "limit must be 1 to 127"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_what_is_not_supported_is_said(changed: dict[str, Any], message: str) -> None:
    inputs = {"qkv": torch.zeros(2, 16, 96), "heads": 2, "limit": 127}
    with pytest.raises(KernelInputError, match=message):
        reference.quantized_attention(**{**inputs, **changed})
