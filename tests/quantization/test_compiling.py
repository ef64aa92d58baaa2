"""Quantized layers under `torch.compile` (whole graphs, no recompilation) and `torch.jit.trace`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robuq_bench.config import load_plan
from robuq_bench.hadamard.rotation import rotate
from robuq_bench.hadamard.transform import hadamard_transform
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.weights._ternary import TernaryWeight
from robuq_bench.methods.weights.ternary_absmean import TernaryAbsmean
from robuq_bench.methods.weights.ternary_twn import TernaryTWN
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import quantize_, quantized_layers

robust, minmax = token_grid("robust-midtread"), token_grid("minmax")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PLANS = ("a4", "baseline-a4", "bitnetv2-a4")


def model(plan: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(144, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 12)
    )
    return quantize_(layers, load_plan(plan))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("plan", PLANS)
def test_one_whole_graph_serves_every_allocation_forward_and_backward(plan: str) -> None:
    eager = model(plan)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    lowest = 2 if plan.startswith("bitnet") else 1
    for first in range(lowest, 9):
        for second in (2, 3):
            eager[0].activation_bits, eager[4].activation_bits = first, second
            assert_same(eager, compiled, torch.randn(7, 144))
    assert counter.frame_count == 1


def assert_same(eager: nn.Module, compiled: nn.Module, x: Tensor) -> None:
    """Outputs and gradients agree up to the rounding that flips no code in these examples."""
    results = []
    for run in (eager, compiled):
        given = x.clone().requires_grad_()
        y = run(given)
        eager.zero_grad()
        y.square().sum().backward()
        results.append([y, given.grad, *(p.grad for p in eager.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_whole_dit_compiles_without_a_break_and_trains() -> None:
    torch.manual_seed(0)
    dit = DiT(
        input_size=4, in_channels=1, hidden_size=48, depth=2, num_heads=2, num_classes=3
    ).eval()
    for parameter in dit.parameters():  # gates that start at zero would pass no gradient
        nn.init.normal_(parameter, std=0.1)
    quantize_(dit, load_plan("a8"))
    inputs = (torch.randn(2, 1, 4, 4), torch.tensor([1, 900]), torch.tensor([0, 2]))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dit, fullgraph=True, backend=counter)  # raises at a break
    results = []
    for run in (dit, compiled):
        dit.zero_grad()
        y = run(*inputs)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in dit.parameters() if p.requires_grad)])
    assert counter.frame_count == 1
    for a, b in zip(*results, strict=True):
        assert bool(a.any())
        # A code that flips moves a few entries by a step of 8 bits.
        assert float((a - b).norm() / a.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
def test_a_trace_ends_and_serves_other_batch_sizes(plan: str, dtype: torch.dtype) -> None:
    layers = model(plan).eval().to(dtype)
    for layer in quantized_layers(layers).values():
        assert layer.training is False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every size it takes for constant
        traced = torch.jit.trace(layers, torch.randn(5, 144, dtype=dtype), check_trace=False)
        for tokens in (5, 1, 4200):
            x = torch.randn(tokens, 144, dtype=dtype)
            found, expected = traced(x), layers(x)
            if dtype == torch.float64:
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            # In float32 a value on a threshold may fall to either side.
            close = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(-1)
            assert int((~close).sum()) <= tokens // 1000


@pytest.mark.parametrize(
    "function",
    [
        lambda x: hadamard_transform(x),
        lambda x: rotate(x, torch.ones(48)),
        lambda x: TernaryWeight(TernaryTWN, "ternary-twn")(x),
        lambda x: TernaryWeight(TernaryAbsmean, "ternary-absmean")(x),
        lambda x: robust.fake_quantize(x, 3),
        lambda x: minmax.fake_quantize(x, 3),
        lambda x: matmul_quantizer(8)(x),
    ],
)
def test_compiled_functions_keep_their_gradients(function: Callable[[Tensor], Tensor]) -> None:
    """torch 2.11 traces some of PyTorch's own autograd functions to gradients of zero."""
    x = torch.randn(6, 48, requires_grad=True)
    upstream = torch.randn(6, 48) / 3
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(function(x), x, upstream)
    (found,) = torch.autograd.grad(compiled(x), x, upstream)
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
