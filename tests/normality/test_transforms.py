"""Transforms against dense matrices, SciPy and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from robuq_bench.errors import UsageError
from robuq_bench.hadamard.rotation import random_signs
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.normality.transforms import (
    TRANSFORMS,
    NotApplicable,
    drawn_transforms,
    make_transform,
    matrix_name,
)

CALIBRATION = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))


def matrix_of(name: str, n: int = 128) -> torch.Tensor:
    transform = make_transform(name, n, layer="l", seed=3, calibration=CALIBRATION)
    return transform(torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"hadamard-without-dc"}))
def test_every_transform_is_orthogonal(name: str) -> None:
    matrix = matrix_of(name)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(128, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_hadamard_is_scipys_and_its_first_coordinate_is_the_mean() -> None:
    expected = hadamard(128) / np.sqrt(128)
    np.testing.assert_allclose(matrix_of("hadamard").numpy(), expected, atol=1e-12)
    x = torch.rand(5, 128, dtype=torch.float64)
    y = make_transform("hadamard", 128)(x)
    torch.testing.assert_close(y[:, 0], np.sqrt(128) * x.mean(1))
    torch.testing.assert_close(make_transform("hadamard-without-dc", 128)(x), y[:, 1:])


def test_randomized_hadamard_uses_the_signs_of_the_layer() -> None:
    signs = random_signs(128, "blocks.0.attn.qkv", 3).double()
    transform = make_transform("randomized-hadamard", 128, layer="blocks.0.attn.qkv", seed=3)
    x = torch.randn(4, 128, dtype=torch.float64)
    expected = (x * signs) @ torch.from_numpy(hadamard(128) / np.sqrt(128))
    torch.testing.assert_close(transform(x), expected)


def test_blocks_do_not_mix() -> None:
    matrix = matrix_of("block-hadamard-64")
    assert torch.count_nonzero(matrix[:64, 64:]) == 0
    np.testing.assert_allclose(matrix[:64, :64].numpy(), hadamard(64) / 8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("block-hadamard-64", 144, "multiple of 64, not 144"),
        ("dual-rotation", 144, "calibration"),
        ("hadamard", 50, "no Hadamard matrix of order 50"),
        ("randomized-hadamard", 50, "no Hadamard matrix of order 50"),
    ],
)
def test_what_does_not_apply_says_why(name: str, n: int, message: str) -> None:
    with pytest.raises(NotApplicable, match=message):
        make_transform(name, n)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'hadamard'"):
        make_transform("hadamar", 64)


def test_a_width_without_blocks_has_no_dual_rotation() -> None:
    with pytest.raises(NotApplicable, match="131 has no divisor"):
        make_transform("dual-rotation", 131, calibration=torch.randn(4, 131))


@pytest.mark.parametrize("n", [12, 64, 144])
def test_equivalent_matrices_are_hadamard_matrices_with_one_constant_column(n: int) -> None:
    found = [
        (rotate(torch.eye(n, dtype=torch.float64)) * np.sqrt(n)).numpy()
        for rotate in drawn_transforms("hadamard", n, seed=5, draws=4)
    ]
    np.testing.assert_allclose(found[0], hadamard_matrix(n).numpy(), atol=1e-10)
    for matrix in found:
        np.testing.assert_allclose(np.abs(matrix), 1, atol=1e-10)
        np.testing.assert_allclose(matrix @ matrix.T, n * np.eye(n), atol=1e-9)
    for matrix in found[1:]:
        assert (np.abs(matrix.sum(0)) > n - 1e-9).sum() == 1
    assert len({np.sign(matrix).tobytes() for matrix in found}) == 4


@pytest.mark.parametrize(
    ("transform", "n", "name"),
    [
        ("hadamard", 144, "Sylvester 4 x Paley II 36"),
        ("randomized-hadamard", 44, "Paley I 44"),
        ("hadamard-without-dc", 156, "Goethals-Seidel 156"),
        ("block-hadamard-64", 1152, "Sylvester 64"),
        ("identity", 144, ""),
    ],
)
def test_matrices_are_named_by_their_constructions(transform: str, n: int, name: str) -> None:
    assert matrix_name(transform, n) == name
