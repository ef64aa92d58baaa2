"""The compiled ternary product against its reference, on every instruction set here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import WIDTHS, available, force, operands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.ternary_matmul import cpu as product
from kernels.ternary_matmul import reference as product_reference

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("width", [1, 3, 127, 129, 577, *WIDTHS])
def test_product_is_exact(width: int, instructions: str) -> None:
    codes, planes, rest = operands(37, 75, width, bias=True, per_image=37)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    assert torch.equal(product.ternary_matmul(codes, planes, **rest), want)


@pytest.mark.parametrize("rows", [0, 1, 11, 12, 13, 31, 32, 33, 64, 100, 500])
def test_product_of_any_rows(rows: int, instructions: str) -> None:
    codes, planes, rest = operands(rows, 33, 130, seed=rows)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    assert torch.equal(product.ternary_matmul(codes, planes, **rest), want)


@pytest.mark.parametrize(
    "epilogue",
    [
        {"rank": 16, "bias": True},
        {"rank": 5},
        {"gelu": True},
        {"rank": 32, "bias": True, "gelu": True, "per_image": 8},
    ],
)
def test_epilogue(epilogue: dict[str, Any], instructions: str) -> None:
    codes, planes, rest = operands(40, 75, 384, **epilogue)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    got = product.ternary_matmul(codes, planes, **rest)
    size = float(want.square().mean().sqrt())
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * size)


def test_gelu_is_the_one_of_torch(instructions: str) -> None:
    """Over all of its range, through a product whose results are the bias."""
    x = torch.linspace(-30, 30, 6001)
    codes, planes, rest = operands(1, len(x), 4)
    rest |= {"token_scale": torch.zeros(1), "token_offset": torch.zeros(1)}
    got = product.ternary_matmul(codes, planes, **rest | {"bias": x, "gelu": True})[0]
    want = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands(dtype: torch.dtype) -> None:
    codes, planes, rest = operands(24, 40, 144, rank=8, bias=True, per_image=6)
    for name in ("bias", "branch", "up", "gate", "residual"):
        rest[name] = rest[name].to(dtype)
    rest["out_dtype"] = dtype
    want = product_reference.ternary_matmul(codes, planes, **rest)
    got = product.ternary_matmul(codes, planes, **rest)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 70),
    width=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape_agree(
    rows: int, outputs: int, width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, planes, rest = operands(rows, outputs, width, seed=seed)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    for name in available():
        force(name, monkeypatch)
        assert torch.equal(product.ternary_matmul(codes, planes, **rest), want), name


def test_grouped_product_is_layer_by_layer() -> None:
    layers = [operands(3, 40, 144, seed=seed, rank=4, bias=True) for seed in range(3)]
    names = [name for name in layers[0][2] if name not in ("out_dtype", "gelu")]
    stacked = {name: torch.stack([rest[name] for _, _, rest in layers]) for name in names}
    got = product.grouped_ternary_matmul(
        torch.stack([codes for codes, _, _ in layers]),
        torch.stack([planes for _, planes, _ in layers]),
        out_dtype=torch.float32,
        **stacked,
    )
    want = [product.ternary_matmul(codes, planes, **rest) for codes, planes, rest in layers]
    assert torch.equal(got, torch.stack(want))
