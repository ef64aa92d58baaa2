"""`cuda_graph`: what it takes and refuses, and on a GPU that a replay is the call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from robuq_bench import cuda_graph
from robuq_bench.config import Plan
from robuq_bench.errors import MissingResourceError, UsageError
from robuq_bench.inference import graph, prepare_for_inference
from robuq_bench.models.dit import DiT

Student = Callable[..., tuple[DiT, Plan]]


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that computes on the CPU: into the memory of its first results, from its inputs."""

    def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        held = call()

        def replay() -> None:
            parts = [held] if isinstance(held, Tensor) else held
            found = call()
            for part, new in zip(parts, [found] if len(parts) == 1 else found, strict=True):
                part.copy_(new)

        return replay, held

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(graph, "_capture", capture)
    monkeypatch.setattr(graph, "_check_inputs", lambda _: None)


class Toy(nn.Module):
    def forward(self, x: Tensor, t: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale + t[:, None]


@pytest.mark.usefixtures("pretend_gpu")
@torch.inference_mode()
def test_a_replay_takes_new_values_and_gives_results_that_stay() -> None:
    x, t = torch.randn(3, 4), torch.randn(3)
    step = cuda_graph(Toy(), x, t, scale=3.0)
    first = step(x, t, 3.0)  # by position or by name
    second = step(t=t, x=-x, scale=3.0)
    assert torch.equal(second, x * -3 + t[:, None])
    assert torch.equal(first, x * 3 + t[:, None])
    pair = cuda_graph(lambda *both: (both[0] + both[1], both[1]), x, x)
    assert [torch.equal(part, whole) for part, whole in zip(pair(x, -x), (0 * x, -x), strict=True)]


@pytest.mark.usefixtures("pretend_gpu")
def test_a_step_without_inputs_works_on_memory_of_its_own() -> None:
    state = torch.zeros(2)
    step = cuda_graph(lambda: state.add_(1))
    assert step().tolist() == [2, 2]
    assert step().tolist() == [3, 3]


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize(
    ("inputs", "named", "message"),
    [
        (
            (torch.zeros(2, 4), torch.zeros(2)),
            {},
            r"x is \[2, 4\] float32 on cpu, captured was \[3",
        ),
        ((torch.zeros(3, 4).double(), torch.zeros(3)), {}, r"x is \[3, 4\] float64 on cpu, capt"),
        ((torch.zeros(3, 4), torch.zeros(3, device="meta")), {}, "t is .* on meta, captured was"),
        ((torch.zeros(3, 4), 5), {}, "t is 5, captured was tensor"),
        ((torch.zeros(3, 4), torch.zeros(3), 3.0), {}, "captured with the inputs x, t, called wi"),
        ((torch.zeros(3, 4),), {"y": 1}, "cuda_graph: .*'t'"),
    ],
)
def test_what_was_not_captured_is_refused_by_name(
    inputs: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    step = cuda_graph(Toy(), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(UsageError, match=message):
        step(*inputs, **named)
    fixed = cuda_graph(Toy(), torch.zeros(3, 4), torch.zeros(3), 2.0)
    with pytest.raises(UsageError, match=r"scale is 3\.0, captured was 2\.0"):
        fixed(torch.zeros(3, 4), torch.zeros(3), 3.0)


def test_the_weights_live_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads them by address: freed, they would be any other tensor's memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("device", "Stream", "current_stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(graph, "_check_inputs", lambda _: None)
    model = nn.Linear(4, 4)
    weight = weakref.ref(model.weight)
    step = cuda_graph(model, torch.zeros(1, 4))
    del model
    gc.collect()
    assert weight() is not None
    del step
    gc.collect()
    assert weight() is None


@pytest.mark.usefixtures("pretend_gpu")
def test_results_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(UsageError, match="<lambda> returns dict; a tensor or a tuple"):
        cuda_graph(lambda x: {"sample": x}, torch.zeros(1))


def test_inputs_must_be_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with pytest.raises(UsageError, match="x is on cpu; inputs must be on one CUDA device"):
        cuda_graph(Toy(), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(UsageError, match=r"x holds tensors in a dict, .*; wrap the model"):
        cuda_graph(lambda x: x["it"], {"it": torch.zeros(3, 4)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(MissingResourceError, match="cuda_graph needs a CUDA device"):
        cuda_graph(Toy(), torch.zeros(3, 4), torch.zeros(3))


@pytest.mark.gpu
def test_a_graph_of_a_packed_model_is_the_model(student: Student) -> None:
    model = prepare_for_inference(student("a4")[0].cuda(), "triton")
    x = torch.randn(4, 1, 8, 8, device="cuda").bfloat16()
    t, y = torch.full((4,), 7, device="cuda"), torch.tensor([0, 1, 10, 10], device="cuda")
    guided = partial(model.forward_with_cfg, cfg_scale=1.5)
    for call in (model, guided):
        step = cuda_graph(call, x, t, y)
        for _ in range(2):
            x, t = torch.randn_like(x), t + 100
            assert torch.equal(step(x, t, y), call(x, t, y))
