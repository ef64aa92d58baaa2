"""Quantized layers under `torch.compile` (whole graphs, no recompilation) and `torch.jit.trace`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robuq_bench.config import load_plan
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_, quantized_layers

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


def test_a_whole_dit_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    dit = DiT(
        input_size=4, in_channels=1, hidden_size=48, depth=2, num_heads=2, num_classes=3
    ).eval()
    quantize_(dit, load_plan("a2-uniform"))
    inputs = (torch.randn(2, 1, 4, 4), torch.tensor([1, 900]), torch.tensor([0, 2]))
    explained = torch._dynamo.explain(dit)(*inputs)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), dit(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_a_trace_ends_and_serves_other_batch_sizes(plan: str) -> None:
    layers = model(plan).eval()
    for layer in quantized_layers(layers).values():
        assert layer.training is False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every size it takes for constant
        traced = torch.jit.trace(layers, torch.randn(5, 144), check_trace=False)
        for tokens in (5, 1, 4200):
            x = torch.randn(tokens, 144)
            torch.testing.assert_close(traced(x), layers(x), rtol=1e-4, atol=1e-4)
