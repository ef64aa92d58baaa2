"""Packed planes: exact round trips, and the documented place of every weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.launch import KernelInputError
from kernels.ternary_matmul.layout import pack_planes, packed_width, unpack_planes


@given(
    shape=st.lists(st.integers(0, 3), max_size=2),
    rows=st.integers(0, 5),
    width=st.one_of(st.integers(0, 300), st.sampled_from([127, 128, 129, 384, 1152])),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_exact_and_leaves_its_input_alone(
    shape: list[int], rows: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (*shape, rows, width), generator=generator, dtype=torch.int8)
    before = codes.clone()
    planes = pack_planes(codes)
    assert planes.dtype == torch.uint8
    assert planes.shape == (*shape, rows, -(-width // 128) * 32)
    packed = planes.clone()
    back = unpack_planes(planes, width)
    assert back.dtype == torch.int8
    assert torch.equal(back, before)
    assert torch.equal(codes, before)
    assert torch.equal(planes, packed)


def test_every_weight_lies_where_the_kernel_looks_for_it() -> None:
    codes = torch.randint(-1, 2, (3, 200), generator=torch.Generator().manual_seed(0))
    planes = pack_planes(codes.to(torch.int8))
    for n in range(3):
        for k in range(256):
            block, inside = divmod(k, 128)
            plane, byte = divmod(inside, 32)
            stored = int(planes[n, 32 * block + byte]) >> (2 * plane) & 3
            assert stored == (int(codes[n, k]) + 1 if k < 200 else 1)


def test_non_contiguous_codes_pack_as_their_copy_does() -> None:
    codes = torch.randint(-1, 2, (130, 6), generator=torch.Generator().manual_seed(1))
    transposed = codes.to(torch.int8).T
    assert torch.equal(pack_planes(transposed), pack_planes(transposed.contiguous()))


@pytest.mark.parametrize(("width", "size"), [(0, 0), (1, 32), (128, 32), (129, 64), (4608, 1152)])
def test_packed_width(width: int, size: int) -> None:
    assert packed_width(width) == size


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 4), "int8"),
        (torch.zeros(4, dtype=torch.int8), r"\[\.\.\., N, K\]"),
        (torch.full((2, 4), 2, dtype=torch.int8), "-1, 0 or 1"),
        (torch.full((2, 4), -2, dtype=torch.int8), "-1, 0 or 1"),
    ],
)
def test_pack_refuses_what_is_not_ternary(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        pack_planes(codes)


@pytest.mark.parametrize(
    ("planes", "width", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.int8), 128, "uint8"),
        (torch.zeros(2, 32, dtype=torch.uint8), 129, "64 bytes"),
        (torch.zeros(2, 33, dtype=torch.uint8), 128, "got 33"),
        (torch.zeros(2, 32, dtype=torch.uint8), -1, "width -1"),
    ],
)
def test_unpack_refuses_planes_of_another_width(
    planes: torch.Tensor, width: int, message: str
) -> None:
    with pytest.raises(KernelInputError, match=message):
        unpack_planes(planes, width)
