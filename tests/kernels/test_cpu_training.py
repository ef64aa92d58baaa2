"""The compiled kernels of training against the plain lines that define them, and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compiled import available, force, rotation_of, signs_of, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fake_quantize import cpu as quantizing
from kernels.hadamard_quantize.reference import Grid, Rotation
from kernels.launch import KernelInputError
from kernels.ternary_weight import cpu as ternary
from kernels.ternary_weight import reference as ternary_reference
from robuq_bench.hadamard.rotation import rotate
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.quantization.attention import _AbsmaxFakeQuantize
from robuq_bench.quantization.grids import grid_of

WIDTHS = (24, 36, 144, 352, 384, 768, 1024, 1152, 1536, 3072, 4608)
NAMES = ("robust-midtread", "robust-midrise", "minmax", "bitnet")
SETTINGS = [(name, b) for name in NAMES for b in range(2 if name == "bitnet" else 1, 9)]
MISMATCH = 1e-3
"""Share of codes that may differ: those nearer to the next code than sums are accurate."""

pytestmark = pytest.mark.usefixtures("library")


def upstream(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def plain(
    x: Tensor, name: str, bits: int, rotated: bool, down: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Values and gradients by autograd through the lines that define them."""
    x = x.clone().requires_grad_()
    parts = [rotate(x, signs_of(x.shape[-1]).to(x.dtype)) if rotated else x]
    if down is not None:
        down = down.to(x.dtype).requires_grad_()
        parts.append(parts[0] @ down.T)
    parts[0] = token_grid(name).fake_quantize(parts[0], bits)
    y = torch.cat(parts, -1)
    y.backward(grad.to(x.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *([] if down is None else [down.grad])]  # type: ignore[list-item]


def compiled(
    x: Tensor, grid: Grid | None, rotated: bool, down: Tensor | None, grad: Tensor
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    down = None if down is None else down.clone().requires_grad_()
    width = x.shape[-1]
    y = quantizing.fake_quantize(
        x,
        grid,
        rotation=rotation_of(width) if rotated else None,
        signs=signs_of(width),
        down=down,
    )
    y.backward(grad)
    assert x.grad is not None
    return [y.detach(), x.grad, *([] if down is None else [down.grad])]  # type: ignore[list-item]


def assert_near(found: list[Tensor], expected: list[Tensor], width: int) -> None:
    """Codes but for a few, and gradients of the tokens whose codes are all the same."""
    values = expected[0][:, :width]
    size = values.square().mean().sqrt()
    flipped = (found[0][:, :width].double() - values).abs() > 1e-4 * size
    assert flipped.count_nonzero() <= max(1, MISMATCH * flipped.numel())
    same = ~flipped.any(1)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        scale = float(theirs.double().square().mean().sqrt())
        torch.testing.assert_close(
            ours[same].double(), theirs[same].double(), rtol=1e-4, atol=2e-5 * scale
        )
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.double().norm()


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, instructions: str) -> None:
    """352 has a factor that is not symmetric; 19 tokens leave lanes empty."""
    x, down, grad = tokens(19, width), upstream(5, width) / 9, upstream(19, width + 5)
    found = compiled(x, grid_of("robust-midtread", 4), True, down, grad)
    assert_near(found, plain(x.double(), "robust-midtread", 4, True, down, grad), width)


@pytest.mark.parametrize(("name", "bits"), SETTINGS)
@pytest.mark.parametrize("rotated", [True, False])
def test_grids(name: str, bits: int, rotated: bool, instructions: str) -> None:
    """Where nothing is summed, values are those of the plain lines bit for bit."""
    x, down, grad = tokens(35, 144), upstream(17, 144) / 9, upstream(35, 161)
    x[3, 5] *= 40
    found = compiled(x, grid_of(name, bits), rotated, down, grad)
    assert_near(found, plain(x.double(), name, bits, rotated, down, grad), 144)
    if not rotated and (name == "minmax" or (name, bits) == ("bitnet", 8)):
        values = plain(x, name, bits, False, None, grad[:, :144])[0]
        assert torch.equal(found[0][:, :144], values)


@pytest.mark.parametrize("name", NAMES)
def test_infinite_nan_constant_and_zero_tokens(name: str, instructions: str) -> None:
    x, grad = tokens(20, 40), upstream(20, 40)
    x[1], x[3] = 0.0, 2.5
    x[5, 7], x[6, 39], x[7] = math.inf, -math.inf, math.inf
    x[8, 0], x[8, 1], x[17, 0] = math.inf, -math.inf, math.nan
    found = compiled(x, grid_of(name, 3), False, None, grad)
    expected = plain(x, name, 3, False, None, grad)
    odd = [1, 3, 5, 6, 7, 8, 17]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[odd], theirs[odd], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_without_a_grid_it_is_an_orthonormal_map(instructions: str) -> None:
    """<g, R x> = <R.T g, x>: the gradient is the transpose, also of a factor that has another."""
    x, grad = tokens(5, 352), upstream(5, 352)
    y, of_x = compiled(x, None, True, None, grad)
    torch.testing.assert_close(y, rotate(x, signs_of(352)), rtol=1e-5, atol=1e-5)
    inner = float((y.double() * grad).sum())
    assert inner == pytest.approx(float((of_x.double() * x).sum()), rel=1e-5)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 1, 4)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    grid, down = grid_of("robust-midtread", 3), upstream(2, 24)
    x = tokens(12, 48)[:, ::2].reshape(-1)[: math.prod(shape) * 24].reshape(*shape, 24)
    for tokens_ in (x, torch.stack([x, x], -1)[..., 0]):
        y = tokens_.detach().requires_grad_()
        out = quantizing.fake_quantize(y, grid, rotation=rotation_of(24), down=down)
        assert out.shape == (*shape, 26)
        out.sum().backward()
        assert y.grad is not None
        assert y.grad.shape == y.shape
    every_other = tokens(6, 24)[::2]
    one_by_one = [quantizing.fake_quantize(t, grid, rotation=None) for t in every_other]
    together = quantizing.fake_quantize(every_other, grid, rotation=None)
    assert torch.equal(together, torch.stack(one_by_one))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    order=st.integers(1, 45),
    log_outer=st.integers(0, 4),
    rank=st.integers(0, 20),
    statistic=st.sampled_from(["mean-mad", "min-max", "absmax", "absmean"]),
    floor=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_all_instruction_sets_and_threads_give_the_same_bits(
    rows: int,
    order: int,
    log_outer: int,
    rank: int,
    statistic: Any,
    floor: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    width = order * 2**log_outer
    grid = Grid(statistic, 0.3, -4, 3, floor=floor and statistic == "mean-mad", epsilon=0.0)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, 2, (order, order), generator=generator).mul(2.0).sub(1.0)
    down = torch.randn(rank, width, generator=generator) if rank else None
    x, grad = tokens(rows, width, seed % 1000), upstream(rows, width + rank)
    results: list[list[Tensor]] = []
    for name in available():
        force(name, monkeypatch)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = x.clone().requires_grad_()
            rotation = Rotation(inner, 2**log_outer)
            out = quantizing.fake_quantize(
                y, grid, rotation=rotation, signs=signs_of(width), down=down
            )
            out.backward(grad)
            weight = upstream(rows, width)
            results.append(
                [
                    out.detach(),
                    y.grad,  # type: ignore[list-item]
                    *(
                        ternary.ternary_weight(weight, r, up=down.T if rows == width else None)  # type: ignore[union-attr]
                        if down is not None and rows == width
                        else ternary.ternary_weight(weight, r)
                        for r in ternary_reference.RULES
                    ),
                    quantizing.absmax_fake_quantize(x[None, None], 7),
                    quantizing.absmax_fake_quantize(x.T[None, None], 7),
                ]
            )
    torch.set_num_threads(1)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.transpose(-2, -1),
    "heads of tokens": lambda x: x.transpose(1, 2),
    "columns of heads": lambda x: x.permute(0, 2, 3, 1),
    "every other row": lambda x: x[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 3, 17, 36), (1, 1, 1, 1), (2, 1, 5, 7), (0, 2, 3, 4)])
def test_operands_of_attention(layout: str, size: tuple[int, ...], instructions: str) -> None:
    """Bit for bit, in place of every layout that attention makes."""
    x = upstream(*size)
    if x.numel() > 20:
        x[0, 0, 0], x[0, 0, 1, 2], x[-1, 0, 2, 1] = 0.0, math.nan, math.inf
    x = LAYOUTS[layout](x).requires_grad_()
    for limit in (1, 7, 127):
        found = quantizing.absmax_fake_quantize(x, limit)
        expected = _AbsmaxFakeQuantize.apply(x, limit) if x.numel() else x
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    grad = upstream(*found.shape)
    (passed,) = torch.autograd.grad(found, x, grad)
    assert torch.equal(passed, grad)


@pytest.mark.parametrize("rule", ternary_reference.RULES)
@pytest.mark.parametrize("shape", [(33, 144), (7, 1152), (5, 4608), (1, 1), (40, 37)])
def test_ternary_weights(rule: str, shape: tuple[int, int], instructions: str) -> None:
    weight, up = upstream(*shape).requires_grad_(), upstream(shape[0], 3).requires_grad_()
    found = ternary.ternary_weight(weight, rule, up=up, clamp=rule == "ternary-twn")
    width = shape[1]
    expected = ternary_reference.ternary_weight(weight.detach(), rule)
    off = (found[:, :width] - expected).abs() > 1e-5 * expected.abs().max()
    assert off.count_nonzero() <= max(1, 1e-5 * off.numel())
    assert torch.equal(found[:, width:], up)
    codes, scale = ternary.ternary_codes(weight.detach(), rule)
    assert torch.equal(codes * scale, found[:, :width])
    grad = 2 * upstream(*found.shape)
    found.backward(grad)
    of_weight = ternary_reference.ternary_weight_backward(grad[:, :width], rule, torch.float32)
    assert weight.grad is not None
    assert up.grad is not None
    assert torch.equal(weight.grad, of_weight)
    assert torch.equal(up.grad, grad[:, width:])


@pytest.mark.parametrize("rule", ternary_reference.RULES)
def test_ternary_weights_that_are_not_finite_or_zero(rule: str, instructions: str) -> None:
    weight = upstream(6, 37)
    weight[1] = 0.0
    weight[2, 36] = math.nan
    found = ternary.ternary_weight(weight, rule)
    if rule == "ternary-absmean":
        assert found.isnan().all()
        return
    assert not found[1].any()
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4, 5]].isfinite().all()


def test_compiled_graphs_have_the_same_gradients() -> None:
    x, down, weight, up = tokens(8, 144), upstream(3, 144), upstream(20, 144), upstream(20, 3)
    grid, rotation = grid_of("robust-midtread", 4), rotation_of(144)

    def layer(*inputs: Tensor) -> Tensor:
        x, down, weight, up = inputs
        wide = ternary.ternary_weight(weight, "ternary-twn", up=up, clamp=True)
        operand = quantizing.fake_quantize(x, grid, rotation=rotation, down=down)
        return (operand @ wide.T).square()

    inputs = [t.requires_grad_() for t in (x, down, weight, up)]
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_operators_are_what_torch_takes_them_for() -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    passed = dict.fromkeys(checks, "SUCCESS")
    x, down = tokens(4, 36).requires_grad_(), upstream(2, 36)
    tail = quantizing._settings(grid_of("robust-midtread", 4))
    inner = rotation_of(36).inner.float()
    arguments = (x, down, signs_of(36), inner, *tail)
    found = torch.library.opcheck(quantizing._forward_operator, arguments, test_utils=checks)
    assert found == passed
    arguments = (upstream(4, 36), None, False, True)
    assert torch.library.opcheck(ternary._forward_operator, arguments, test_utils=checks) == passed


def test_misuse_is_refused() -> None:
    x, grid = tokens(4, 144), grid_of("minmax", 4)
    for bad in (x.double(), x.to("meta"), torch.tensor(1.0), x[:, :0]):
        with pytest.raises(KernelInputError, match=r"x must be \[..., K\] float32 on the CPU"):
            quantizing.fake_quantize(bad, grid, rotation=None)
    with pytest.raises(KernelInputError, match="of order K = 144"):
        quantizing.fake_quantize(x, grid, rotation=rotation_of(72))
    with pytest.raises(KernelInputError, match="must hold 1 and -1 only"):
        quantizing.fake_quantize(x, grid, rotation=Rotation(torch.zeros(36, 36), 4))
    with pytest.raises(KernelInputError, match=r"down must be \[any, 144\], got \[2, 36\]"):
        quantizing.fake_quantize(x, grid, rotation=None, down=upstream(2, 36))
    with pytest.raises(KernelInputError, match="with one of its last two axes contiguous"):
        quantizing.absmax_fake_quantize(upstream(2, 3, 4, 6)[:, :, :, ::2], 7)
    with pytest.raises(KernelInputError, match="unknown rule 'binary'"):
        ternary.ternary_weight(x, "binary")
    with pytest.raises(KernelInputError, match="weight is on meta"):
        ternary.ternary_weight(x.to("meta"), "ternary-twn")
    with pytest.raises(KernelInputError, match="weight must be contiguous"):
        ternary.ternary_weight(x.T, "ternary-twn")
