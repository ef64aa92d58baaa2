"""The compiled attention in integers against its reference, on every instruction set here."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import available, force
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.quantized_attention import cpu, reference
from robuq_bench.models.dit import Attention
from robuq_bench.quantization.attention import matmul_quantizer

pytestmark = pytest.mark.usefixtures("library")


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    """Channels of unequal size, so that scales differ and the softmax is peaked."""
    generator = torch.Generator().manual_seed(tokens * 1009 + head_dim)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator)
    return qkv * torch.linspace(0.3, 3.0, qkv.shape[-1]).roll(17)


def compiled(qkv: Tensor, heads: int, limit: int = 127) -> Tensor:
    return cpu.quantized_attention(qkv, heads=heads, limit=limit, out_dtype=torch.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    # DiT-XL/2 and -B/2 at 256 and 512 pixels; tails of every vector; one of everything
    [(256, 2, 72), (1024, 1, 72), (256, 1, 64), (16, 4, 24), (17, 3, 5), (49, 2, 33), (1, 1, 1)],
)
def test_it_is_the_reference(
    tokens: int, heads: int, head_dim: int, bits: int, instructions: str
) -> None:
    qkv, limit = random_qkv(2, tokens, heads, head_dim), 2 ** (bits - 1) - 1
    got = compiled(qkv, heads, limit)
    want = reference.quantized_attention(qkv, heads=heads, limit=limit, out_dtype=torch.float32)
    error = (got - want).abs() / want.abs().max()
    # A probability half way between two codes may have either.
    assert float((error > 1e-5).float().mean()) < 0.01
    assert float(error.max()) < 2 / limit


def test_instruction_sets_and_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = random_qkv(2, 49, 3, 40)
    first = compiled(qkv, 3)
    for name in available():
        force(name, monkeypatch)
        assert torch.equal(compiled(qkv, 3), first), name
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(compiled(qkv, 3), first)
    finally:
        torch.set_num_threads(threads)


def test_it_is_what_training_evaluates() -> None:
    attention = Attention(144, 2)
    attention.matmul_quantizer = matmul_quantizer(8)
    qkv = random_qkv(2, 64, 2, 72)
    want = attention.attend(qkv)
    assert float((compiled(qkv, 2) - want).abs().max() / want.abs().max()) < 2 / 127


def test_zeros_stay_zeros_and_what_is_not_finite_spreads(instructions: str) -> None:
    qkv = random_qkv(3, 16, 2, 8)
    qkv[:, :, 32:40] = 0  # the values of one head
    qkv[0, 5, 3] = math.inf  # a query
    qkv[1, 5, 17] = math.nan  # a key
    qkv[2, 5, 41] = -math.inf  # a channel of the values
    got = compiled(qkv, 2)
    want = reference.quantized_attention(qkv, heads=2, limit=127, out_dtype=torch.float32)
    assert torch.equal(got.isnan(), want.isnan())
    assert int(got.isnan().sum()) == 8 + 16 * 8 + 16
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_out(dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 16, 2, 24).to(dtype)
    got = cpu.quantized_attention(qkv, heads=2, limit=127, out_dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, compiled(qkv.float(), 2).to(dtype))


def test_tracing_sees_one_operator() -> None:
    def attend(qkv: Tensor) -> Tensor:
        return compiled(qkv, 2) * 2

    qkv = random_qkv(1, 16, 2, 24)
    traced = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(qkv), attend(qkv))


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(KernelInputError, match="qkv is on meta; this kernel needs the CPU"):
        compiled(torch.zeros(1, 16, 144, device="meta"), 2)
    with pytest.raises(KernelInputError, match="C a multiple of heads = 5"):
        compiled(torch.zeros(1, 16, 144), 5)
    with pytest.raises(KernelInputError, match="limit must be 1 to 127, got 128"):
        compiled(torch.zeros(1, 16, 144), 2, limit=128)
    assert compiled(torch.zeros(0, 16, 144), 2).shape == (0, 16, 48)
