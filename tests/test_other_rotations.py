"""Weights rotated by another program's Hadamard matrices, against its transform spelled out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.models.other_rotations import (
    read_hadamard_table,
    rebase_weight,
    table_rotation,
    unrotate_weight,
)


def other_table(order: int, seed: int = 0) -> Tensor:
    """A Hadamard matrix of this order that is not ours: rows and columns permuted and negated."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(order, generator=generator) for _ in range(2))
    signs = 1 - 2 * torch.randint(2, (2, order), generator=generator).double()
    table = signs[0][:, None] * hadamard_matrix(order)[rows][:, columns] * signs[1]
    assert not torch.equal(table, hadamard_matrix(order))
    assert not torch.equal(table, table.T)
    return table


def quarot_transform(x: Tensor, table: Tensor) -> Tensor:
    """QuaRot's transform of the last axis: butterflies of neighbours, then the table from the left.

    Each butterfly halves the first axis and doubles the second, until the table's order is left.
    """
    n, order = x.shape[-1], len(table)
    y = x.reshape(-1, n, 1)
    while y.shape[1] > order:
        pairs = y.reshape(len(y), y.shape[1] // 2, 2, y.shape[2])
        y = torch.cat([pairs.sum(2), pairs[:, :, 0] - pairs[:, :, 1]], dim=-1)
    return (table @ y).reshape(x.shape) / n**0.5


@pytest.mark.parametrize(("order", "n"), [(12, 12), (12, 96), (20, 40), (36, 144), (4, 4)])
def test_table_rotation_is_quarots_transform(order: int, n: int) -> None:
    table = other_table(order)
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    signs = random_signs(n, "layer", 3)
    torch.testing.assert_close(x @ table_rotation(table, n), quarot_transform(x, table))
    signed = x @ table_rotation(table, n, signs)
    torch.testing.assert_close(signed, quarot_transform(x * signs, table))
    rows = table_rotation(table, n, transpose=False)
    torch.testing.assert_close(rows, table_rotation(table.T, n))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), with_signs=st.booleans(), power=st.integers(0, 3))
def test_a_rebased_weight_is_ours(seed: int, with_signs: bool, power: int) -> None:
    n = 12 * 2**power
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, n, generator=generator)
    theirs = random_signs(n, "theirs", seed % 7) if with_signs else None
    ours = random_signs(n, "ours", seed % 5) if with_signs else None
    table = other_table(12, seed)
    stored = quarot_transform(weight if theirs is None else weight * theirs, table.float())
    rotation = table_rotation(table, n, theirs)
    rebased = rebase_weight(stored, rotation, ours)
    assert rebased.dtype == torch.float32
    torch.testing.assert_close(rebased, rotate(weight, ours), rtol=0, atol=1e-5)
    torch.testing.assert_close(unrotate_weight(stored, rotation), weight, rtol=0, atol=1e-5)
    # Unchanged, it would be another layer altogether.
    assert (stored - rotate(weight, ours)).abs().max() > 0.1


def saved(suffix: str) -> Callable[[Path, Tensor], Path]:
    def save(folder: Path, table: Tensor) -> Path:
        path = folder / f"table{suffix}"
        if suffix == ".npy":
            np.save(path, table.numpy().astype(np.int8))
        elif suffix == ".safetensors":
            save_file({"had36": table.to(torch.float16)}, path)
        else:
            torch.save(table.float() if suffix == ".pt" else {"had36": table}, path)
        return path

    return save


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pth", ".safetensors"])
def test_tables_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    table = other_table(36)
    assert torch.equal(read_hadamard_table(saved(suffix)(tmp_path, table)), table)


def spoiled(table: Tensor) -> Tensor:
    table = table.clone()
    table[3, 5] *= -1
    return table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (spoiled(other_table(12)), r"no Hadamard matrix: H H\^T is not 12 I"),
        (other_table(12)[:5], r"holds \[5, 12\]; a Hadamard table is square"),
        (torch.ones(3), r"holds \[3\]; a Hadamard table is square"),
        (other_table(12) / 12**0.5, "other values than"),
        (torch.full((4, 4), torch.nan), "other values than"),
        ({"a": torch.ones(1, 1), "b": torch.ones(1, 1)}, "exactly one real tensor"),
        ({"a": 3}, "exactly one real tensor"),
        ([1.0, -1.0], "exactly one real tensor"),
        (torch.ones(1, 1, dtype=torch.complex64), "exactly one real tensor"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "table.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_hadamard_table(path)
    assert str(path) in str(caught.value)


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match="does not exist"):
        read_hadamard_table(tmp_path / "none.npy")
    for name in ("cut.npy", "cut.pt"):
        path = tmp_path / name
        path.write_bytes(b"\x93NUMPY\x01")
        with pytest.raises(CheckpointError, match="cannot be read as a tensor"):
            read_hadamard_table(path)
    buffer = io.StringIO("1 -1")
    path = tmp_path / "table.txt"
    path.write_text(buffer.getvalue(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"is a \.npy, \.pt, \.pth or \.safetensors file"):
        read_hadamard_table(path)


def test_what_does_not_fit_is_refused() -> None:
    table = other_table(12)
    for n in (6, 36, 13):
        with pytest.raises(UsageError, match=f"width {n} is no power of two times .* order 12"):
            table_rotation(table, n)
    with pytest.raises(UsageError, match=r"must have shape \(24,\), got \(12,\)"):
        table_rotation(table, 24, torch.ones(12))
    weight = torch.zeros(3, 24)
    with pytest.raises(UsageError, match=r"needs a rotation \[24, 24\], got \[12, 12\]"):
        unrotate_weight(weight, table)
    with pytest.raises(UsageError, match=r"not orthonormal .* divide a Hadamard matrix by sqrt"):
        rebase_weight(torch.zeros(3, 12), table)
    with pytest.raises(UsageError, match="not orthonormal"):
        unrotate_weight(torch.zeros(3, 12), torch.full((12, 12), torch.nan))
