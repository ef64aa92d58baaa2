"""What may not be given to the compiled CPU kernels by address, and second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from compiled import operands
from making import quantized
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.fake_quantize import cpu as fake_quantize
from kernels.hadamard_quantize import cpu as hadamard_quantize
from kernels.launch import KernelInputError
from kernels.normality_sums.cpu import normality_sums
from kernels.plain import is_plain
from kernels.quantized_attention.cpu import quantized_attention
from kernels.ternary_matmul.cpu import ternary_matmul
from kernels.ternary_weight import cpu as ternary_weight
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.fast_paths import path_for
from robuq_bench.quantization.grids import grid_of, kernel_rotation

GRID = grid_of("robust-midtread", 4)

pytestmark = pytest.mark.usefixtures("library")


def tokens(rows: int = 6, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


_, PLANES, VECTORS = operands(6, 8, 24)


def _product(x: Tensor) -> Tensor:
    return ternary_matmul(x.mul(3).round().to(torch.int8), PLANES, **VECTORS)


def _codes(x: Tensor) -> Tensor:
    rotation = kernel_rotation(x.shape[-1], torch.device("cpu"))
    found = hadamard_quantize.hadamard_quantize(x, GRID, rotation=rotation)
    return found.codes * found.scale[:, None]


LAYER = quantized(nn.Linear(24, 10), rank=3)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: fake_quantize.fake_quantize(x, GRID, rotation=None),
    "ternary_weight": lambda x: ternary_weight.ternary_weight(x, "ternary-twn"),
    "hadamard_quantize": _codes,
    "quantized_attention": lambda x: quantized_attention(x[None], heads=2, limit=127),
    "ternary_matmul": _product,
    "layer": LAYER,
    "attention operands": lambda x: matmul_quantizer(8)(x[None, None]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_trace_computes_with_its_own_input(name: str) -> None:
    call, x = CALLS[name], tokens(seed=2)
    call(x)  # constants are made outside the trace
    with torch.no_grad():
        traced = make_fx(call)(tokens())
        torch.testing.assert_close(traced(x), call(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_and_default_devices(name: str) -> None:
    """Both crashed the process."""
    call, x = CALLS[name], tokens()
    expected = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)
    with torch.device("meta"):
        assert torch.equal(call(x), expected)
    assert torch.equal(call(x), expected)


def test_what_has_no_operator_is_refused() -> None:
    x = tokens().sort(1).values
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        weights = mode.from_tensor(torch.ones(24).double())
        density = mode.from_tensor(torch.ones(25).double())
        with pytest.raises(KernelInputError, match="cannot be traced"):
            normality_sums(fake, weights, density, 2)
        with pytest.raises(KernelInputError, match="cannot be traced"):
            ternary_weight.ternary_codes(fake, "ternary-twn")
        with pytest.raises(KernelInputError, match="cannot be traced"):
            fake_quantize.absmax_fake_quantize(fake[None, None], 127)


def test_what_is_plain() -> None:
    class Subclass(Tensor):
        pass

    x = tokens()
    assert is_plain(x, None, nn.Parameter(x), nn.Buffer(x))
    assert not is_plain(x, x.as_subclass(Subclass))
    assert not is_plain(x.to("meta"))
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(is_plain(x))
        return x + 1

    torch.vmap(note)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(note, x, check_trace=False)
    assert len(seen) >= 2
    assert not any(seen)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()])
@pytest.mark.parametrize("activation", ["minmax", "robust-midtread"])
def test_second_derivatives_are_refused(
    activation: str, loss: Callable[[Tensor], Tensor], rank: int
) -> None:
    layer = quantized(nn.Linear(24, 10), rank=rank, activation=(activation, 4))
    x = tokens().requires_grad_()
    path = path_for(layer, x)
    assert path.name == "compiled CPU"
    y = layer(x)
    (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (grad.square().sum() + y.sum()).backward()


def test_the_second_derivative_of_a_weight_is_refused() -> None:
    weight = tokens().requires_grad_()
    y = ternary_weight.ternary_weight(weight, "ternary-twn", clamp=True)
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()
