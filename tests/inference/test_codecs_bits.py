"""Codes of 2 to 8 bits as one stream of bits, against numpy's own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robuq_bench.inference import codecs

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


def signed(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    half, generator = 2 ** (bits - 1), torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, generator=generator).to(torch.int8)


@given(shape=SHAPES, bits=st.integers(2, 8), seed=st.integers(0, 999))
def test_codes_round_trip_in_numpys_bytes(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = signed(shape, bits, seed)
    packed = codecs.encode_bits(codes, bits)
    stored = codes.numpy().reshape(-1).astype(np.int64) + 2 ** (bits - 1)
    stream = (stored[:, None] >> np.arange(bits)) & 1
    assert packed.tolist() == np.packbits(stream.astype(np.uint8), bitorder="little").tolist()
    assert packed.is_contiguous()
    assert packed.untyped_storage().nbytes() == packed.numel(), "nothing more is kept in memory"
    found = codecs.decode_bits(packed, bits, shape)
    assert found.dtype == torch.int8
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_both_ends_of_the_range_are_codes_and_no_more(bits: int) -> None:
    half = 2 ** (bits - 1)
    ends = torch.tensor([[-half, half - 1] * 5], dtype=torch.int8)
    assert torch.equal(codecs.decode_bits(codecs.encode_bits(ends, bits), bits, (1, 10)), ends)
    if bits < 8:
        for code in (-half - 1, half):
            with pytest.raises(ValueError, match=f"codes of {bits} bits must be int8 between"):
                codecs.encode_bits(torch.tensor([0, code], dtype=torch.int8), bits)
    with pytest.raises(ValueError, match="must be int8"):
        codecs.encode_bits(torch.zeros(3), bits)


@given(bits=st.integers(2, 8), count=st.integers(1, 40), size=st.integers(0, 60))
def test_bytes_of_another_length_are_refused(bits: int, count: int, size: int) -> None:
    packed = torch.zeros(size, dtype=torch.uint8)
    if size == -(-count * bits // 8):
        assert codecs.decode_bits(packed, bits, (count,)).tolist() == [-(2 ** (bits - 1))] * count
        return
    with pytest.raises(ValueError, match=rf"\[{count}\] codes of {bits} bits take uint8"):
        codecs.decode_bits(packed, bits, (count,))


def test_what_is_no_stream_of_bytes_is_refused() -> None:
    for packed in (torch.zeros(4, dtype=torch.int8), torch.zeros(1, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"take uint8 \[4\], got"):
            codecs.decode_bits(packed, 4, (8,))
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
            codecs.encode_bits(torch.zeros(2, dtype=torch.int8), bits)
        with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
            codecs.decode_bits(torch.zeros(2, dtype=torch.uint8), bits, (2,))
