from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.inference import codecs

shapes = st.lists(st.integers(0, 23), min_size=1, max_size=3).map(tuple)


def ternary(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@given(shape=shapes, seed=st.integers(0, 999))
def test_base3_round_trip_is_exact_for_any_shape(shape: tuple[int, ...], seed: int) -> None:
    codes = ternary(shape, seed)
    before = codes.clone()
    packed = codecs.encode_base3(codes)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-codes.numel() // 5)
    assert torch.equal(codecs.decode_base3(packed, shape), codes)
    assert torch.equal(codes, before)


def test_base3_bytes_are_positional() -> None:
    """Against numpy's own base conversion: digit i of a byte is code i plus one."""
    codes = ternary((100,), 3)
    for byte, group in zip(codecs.encode_base3(codes).tolist(), codes.view(-1, 5), strict=True):
        digits = np.base_repr(byte, 3).zfill(5)[::-1]
        assert [int(digit) - 1 for digit in digits] == group.tolist()


def test_base3_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="must be -1, 0 or 1"):
        codecs.encode_base3(torch.tensor([0, 2], dtype=torch.int8))
    with pytest.raises(ValueError, match="byte 243 is no base-3 code"):
        codecs.decode_base3(torch.tensor([243], dtype=torch.uint8), (5,))
    with pytest.raises(ValueError, match=r"\[7\] ternary codes take uint8 \[2\]"):
        codecs.decode_base3(torch.zeros(3, dtype=torch.uint8), (7,))


@given(n=st.integers(1, 200), seed=st.integers(0, 999))
def test_signs_round_trip_and_match_numpy(n: int, seed: int) -> None:
    signs = 1.0 - 2.0 * ternary((n,), seed).clamp(min=0).float()
    packed = codecs.encode_signs(signs)
    assert packed.tolist() == np.packbits(signs.numpy() < 0, bitorder="little").tolist()
    assert torch.equal(codecs.decode_signs(packed, n), signs)


def test_signs_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 signs take uint8 \[2\]"):
        codecs.decode_signs(torch.zeros(1, dtype=torch.uint8), 9)


@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (5, 5)])
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[0] = 0
    codes, scale = codecs.encode_int8(matrix)
    assert scale.shape == (min(shape),)
    error = (codecs.decode_int8(codes, scale) - matrix).abs()
    steps = scale[:, None] if shape[0] <= shape[1] else scale[None, :]
    assert bool((error <= 0.5001 * steps).all())
    with pytest.raises(ValueError, match="does not go with scales"):
        codecs.decode_int8(codes, scale[:-1])
