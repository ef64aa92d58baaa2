"""Hadamard matrices and their fast transform against scipy, the definition and dense products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.hadamard.goethals_seidel import goethals_seidel
from robuq_bench.hadamard.paley import (
    paley_1,
    paley_2,
    paley_construction,
    prime_power,
    quadratic_residue_matrix,
)
from robuq_bench.hadamard.transform import (
    UnsupportedHadamardOrder,
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
    is_supported,
)

#: Multiples of 4 up to 256 that no Sylvester, Paley or Kronecker construction reaches: the
#: classical list of orders left to Williamson and others, less 156 and 172, which QuaRot has too.
UNREACHABLE = [92, 116, 184, 188, 232, 236]
SMALL_ORDERS = [1, 2, *(n for n in range(4, 257, 4) if n not in UNREACHABLE)]
TRANSFORM_ORDERS = [
    1,
    2,
    4,
    12,
    20,
    28,
    36,
    44,
    68,
    72,
    132,
    144,
    156,
    172,
    180,
    256,
    384,
    576,
    768,
    1152,
]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("n", [2**k for k in range(13)])
def test_powers_of_two_are_scipys(n: int) -> None:
    np.testing.assert_array_equal(hadamard_matrix(n).numpy(), scipy_hadamard(n))


def test_supported_orders_up_to_256() -> None:
    assert [n for n in range(1, 257) if is_supported(n)] == SMALL_ORDERS


@pytest.mark.parametrize("n", [*SMALL_ORDERS, 384, 576, 768, 1152, 4608])
def test_rows_are_orthogonal_signs(n: int) -> None:
    """Sums of ±1 are exact in float32 up to 2^24, so the comparison is exact too."""
    H = hadamard_matrix(n)
    assert H.shape == (n, n)
    assert H.dtype == torch.float64
    assert torch.equal(H.abs(), torch.ones_like(H))
    H = H.float()
    assert torch.equal(H @ H.T, n * torch.eye(n))


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (1, (1,)),
        (64, (64,)),
        (144, (4, 36)),
        (576, (16, 36)),
        (768, (64, 12)),
        (1024, (32, 32)),
        (1152, (32, 36)),
        (4608, (8, 16, 36)),
    ],
)
def test_documented_factorisations(n: int, factors: tuple[int, ...]) -> None:
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", [*SMALL_ORDERS, 1152, 4608])
def test_factors_multiply_to_the_order(n: int) -> None:
    assert math.prod(hadamard_factors(n)) == n


@pytest.mark.parametrize("n", TRANSFORM_ORDERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_transform_is_the_dense_product(n: int, dtype: torch.dtype, tolerance: float) -> None:
    x = randn(5, n, dtype=dtype)
    H = hadamard_matrix(n) / math.sqrt(n)
    for inverse, matrix in [(False, H), (True, H.T)]:
        y = hadamard_transform(x, inverse=inverse)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ matrix, rtol=0, atol=tolerance)


def test_widest_transform_is_the_dense_product() -> None:
    x = randn(2, 4608)
    expected = x @ hadamard_matrix(4608) / math.sqrt(4608)
    torch.testing.assert_close(hadamard_transform(x), expected, rtol=0, atol=1e-12)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    n=st.sampled_from(TRANSFORM_ORDERS[:-4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_inverse_and_norm(shape: list[int], n: int, seed: int) -> None:
    """Any leading shape, also an empty one; the input is not written to."""
    x = randn(*shape, n, seed=seed)
    before = x.clone()
    y = hadamard_transform(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [4, 12, 44, 72])
def test_gradient(n: int, inverse: bool) -> None:
    """Order 44 is not symmetric, so a gradient that forgets to transpose fails."""
    x = randn(2, n).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hadamard_transform(x, inverse), (x,))
    assert torch.autograd.gradgradcheck(lambda x: hadamard_transform(x, inverse), (x,))


def test_non_contiguous_input() -> None:
    x = randn(36, 3, 2)
    torch.testing.assert_close(
        hadamard_transform(x.permute(2, 1, 0)), hadamard_transform(x.permute(2, 1, 0).contiguous())
    )


@pytest.mark.parametrize(
    ("n", "neighbours"),
    [(3, "2 and 4"), (6, "4 and 8"), (92, "88 and 96"), (1150, "1144 and 1152")],
)
def test_unsupported_order_names_its_neighbours(n: int, neighbours: str) -> None:
    assert not is_supported(n)
    for call in (hadamard_matrix, hadamard_factors, lambda n: hadamard_transform(torch.ones(2, n))):
        with pytest.raises(UnsupportedHadamardOrder, match=neighbours) as caught:
            call(n)
        assert f"order {n} " in str(caught.value)
        assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("n", [0, -4])
def test_order_must_be_positive(n: int) -> None:
    with pytest.raises(UnsupportedHadamardOrder, match="nearest supported orders: 1"):
        hadamard_factors(n)


def test_prime_powers_by_brute_force() -> None:
    expected = {p**k: (p, k) for p in range(2, 400) for k in range(1, 9) if is_prime(p)}
    for q in range(-2, 400):
        assert prime_power(q) == expected.get(q)


def is_prime(p: int) -> bool:
    return all(p % d for d in range(2, p))


@pytest.mark.parametrize("p", [3, 5, 7, 11, 13])
def test_residues_of_a_prime_field(p: int) -> None:
    squares = {a * a % p for a in range(1, p)}
    character = [0, *(1 if a in squares else -1 for a in range(1, p))]
    expected = [[character[(a - b) % p] for b in range(p)] for a in range(p)]
    np.testing.assert_array_equal(quadratic_residue_matrix(p), expected)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 121, 125])
def test_residues_of_an_extension_field(q: int) -> None:
    """Q Qᵀ = qI − J and QJ = 0, Paley's identities; Q is symmetric iff q = 1 (mod 4)."""
    Q = quadratic_residue_matrix(q).astype(np.int64)
    np.testing.assert_array_equal(Q @ Q.T, q * np.eye(q) - np.ones((q, q)))
    assert not Q.sum(0).any()
    np.testing.assert_array_equal(Q.T, Q if q % 4 == 1 else -Q)


@pytest.mark.parametrize("q", [3, 7, 11, 19, 27, 243])
def test_paley_1_is_skew(q: int) -> None:
    H = paley_1(q).astype(np.int64)
    np.testing.assert_array_equal(H @ H.T, (q + 1) * np.eye(q + 1))
    np.testing.assert_array_equal(H + H.T, 2 * np.eye(q + 1))


@pytest.mark.parametrize("q", [5, 9, 13, 17, 25, 49, 81, 125])
def test_paley_2_is_symmetric(q: int) -> None:
    H = paley_2(q).astype(np.int64)
    np.testing.assert_array_equal(H @ H.T, 2 * (q + 1) * np.eye(2 * (q + 1)))
    np.testing.assert_array_equal(H, H.T)


@pytest.mark.parametrize("n", [156, 172])
def test_goethals_seidel_matrices(n: int) -> None:
    """H Hᵀ = nI, made of four circulants whose autocorrelations cancel at every shift but 0."""
    assert hadamard_factors(n) == (n,)
    H = hadamard_matrix(n).numpy()
    np.testing.assert_array_equal(H @ H.T, n * np.eye(n))
    m = n // 4
    reverse = np.eye(m)[::-1]
    blocks = [H[:m, :m], *(H[:m, i * m : (i + 1) * m] @ reverse for i in (1, 2, 3))]
    for block in blocks:
        for row in range(m):
            np.testing.assert_array_equal(block[row], np.roll(block[0], row))
    total = sum(block @ block.T for block in blocks)
    np.testing.assert_array_equal(total, n * np.eye(m))


def test_new_constructions_leave_older_orders_alone() -> None:
    """312 = 2 * 156 and 344 = 2 * 172 have Paley matrices, which earlier checkpoints used."""
    assert hadamard_factors(624) == (2, 312)
    assert hadamard_factors(688) == (2, 344)
    assert goethals_seidel(312) is None


def test_no_paley_matrix() -> None:
    assert paley_construction(92) is None
    for q in (2, 4, 15):
        with pytest.raises(ValueError, match="not an odd prime power"):
            quadratic_residue_matrix(q)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_only_floating_point_is_transformed(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=str(dtype)):
        hadamard_transform(torch.ones(2, 4).to(dtype))


@pytest.mark.parametrize("order", [True, 4.0, torch.tensor(4), "4", None])
def test_an_order_is_a_whole_number(order: object) -> None:
    with pytest.raises(UsageError, match="whole number"):
        hadamard_factors(order)  # type: ignore[arg-type]
