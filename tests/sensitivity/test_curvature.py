"""Fisher and Hessian metrics against explicit loops, exact Hessians and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import UsageError
from robuq_bench.hadamard.rotation import rotate
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity import (
    CalibrationBatch,
    Curvature,
    curvature,
    distillation_loss,
    fisher,
    hessian_trace,
    local_errors,
    mean_eigenvalue,
)


class TanhMlp(nn.Module):
    """eps = second(tanh(first(x))), rotated, with a low-rank branch, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = self._layer("first", 4, 8), self._layer("second", 8, 4)

    @staticmethod
    def _layer(name: str, inputs: int, outputs: int) -> QuantizedLinear:
        linear = nn.Linear(inputs, outputs).double()
        return quantized(linear, name, activation=("robust-midtread", 2), rank=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def batches_of(x: Tensor, *sizes: int) -> list[CalibrationBatch]:
    index = torch.zeros(len(x), dtype=torch.int64)
    parts = zip(x.split(sizes), index.split(sizes), index.split(sizes), strict=True)
    return [CalibrationBatch(*part) for part in parts]


@pytest.fixture
def toy() -> tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]]:
    model, target = TanhMlp(), TanhMlp(seed=5)
    for layer in quantized_layers(target).values():
        layer.activation_bits = None
    x = torch.randn(5, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            goal = target(*batch)
        return (m(*batch) - goal).square().flatten(1).mean(1)

    return model, x, loss, batches_of(x, 2, 3)


def run(layer: QuantizedLinear, x: Tensor, operand: Tensor) -> Tensor:
    """The layer from its published formula, with the operand of the quantized product given."""
    a = rotate(x, layer.rotation.signs)
    main = F.linear(operand, layer.quantized_weight())
    return main + F.linear(F.linear(a, layer.branch.down), layer.branch.up) + layer.bias


def operands(model: TanhMlp, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
    """Rotated input of both layers for one sample."""
    quantizer = token_grid("robust-midtread")
    a = rotate(x, model.first.rotation.signs)
    hidden = run(model.first, x, quantizer.fake_quantize(a, 2) if quantized else a)
    return a, rotate(torch.tanh(hidden), model.second.rotation.signs)


def test_fisher_matches_a_loop_over_samples(
    toy: tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]],
) -> None:
    model, x, _, batches = toy
    quantizer = token_grid("robust-midtread")
    target = TanhMlp(seed=5)
    found = fisher(model, ["first", "second"], [1, 3], batches, loss=distillation_loss(target))
    expected = {name: {1: 0.0, 3: 0.0} for name in ("first", "second")}
    zero = torch.zeros(1, dtype=torch.int64)
    for sample in x:
        goal = target(sample[None], zero, zero)[0].float().detach()
        model.zero_grad()
        a, b = operands(model, sample, quantized=True)
        first = quantizer.fake_quantize(a, 2).detach().requires_grad_()
        hidden = torch.tanh(run(model.first, sample, first))
        second = quantizer.fake_quantize(rotate(hidden, model.second.rotation.signs), 2)
        second.retain_grad()
        ((run(model.second, hidden, second).float() - goal).square().mean()).backward()
        for name, operand, tokens in (("first", first, a), ("second", second, b)):
            for bits in (1, 3):
                error = (quantizer.fake_quantize(tokens, bits) - tokens).detach()
                expected[name][bits] += float((operand.grad * error).square().sum()) / len(x)
    for name, by_bits in expected.items():
        assert found[name] == pytest.approx(by_bits, rel=1e-6)
    whole = fisher(model, ["second"], [1], batches_of(x, 5), loss=distillation_loss(target))
    assert whole["second"][1] == pytest.approx(expected["second"][1], rel=1e-6)


def exact_trace(model: TanhMlp, x: Tensor, loss: Any, name: str) -> float:
    """Mean over samples of the trace of the full Hessian, which torch builds row by row."""
    total = 0.0
    zero = torch.zeros(1, dtype=torch.int64)
    target = loss.__closure__[0].cell_contents
    for sample in x:
        goal = target(sample[None], zero, zero)[0].detach()
        a, b = operands(model, sample, quantized=False)

        def value(shift: Tensor, sample: Tensor = sample, goal: Tensor = goal) -> Tensor:
            tokens = rotate_plain(sample, model.first)
            moved = tokens + shift if name == "first" else tokens
            hidden = torch.tanh(run_plain(model.first, tokens, moved))
            tokens = rotate_plain(hidden, model.second)
            moved = tokens + shift if name == "second" else tokens
            return (run_plain(model.second, tokens, moved) - goal).square().mean()

        entries = torch.zeros_like(a if name == "first" else b).detach()
        hessian = torch.autograd.functional.hessian(value, entries)
        total += float(hessian.reshape(entries.numel(), entries.numel()).trace())
    return total / len(x)


def rotate_plain(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """The rotation as a matrix product."""
    return x @ rotate(torch.eye(layer.in_features, dtype=x.dtype), layer.rotation.signs)


def run_plain(layer: QuantizedLinear, a: Tensor, operand: Tensor) -> Tensor:
    main = operand @ layer.quantized_weight().detach().T
    return main + a @ layer.branch.down.T @ layer.branch.up.T + layer.bias


@pytest.mark.parametrize("name", ["first", "second"])
def test_hutchinson_estimates_the_exact_trace(
    name: str, toy: tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]]
) -> None:
    model, x, loss, batches = toy
    entries = 2 * (4 if name == "first" else 8)
    exact = exact_trace(model, x, loss, name) / entries
    found = mean_eigenvalue(model, name, batches, loss=loss, probes=200, seed=1)
    assert abs(found.mean_eigenvalue - exact) < 4 * found.standard_error
    assert found.standard_error < 0.2 * exact
    other = mean_eigenvalue(model, name, batches, loss=loss, probes=200, seed=2)
    spread = abs(other.mean_eigenvalue - found.mean_eigenvalue)
    assert 0 < spread < 6 * found.standard_error
    assert mean_eigenvalue(model, name, batches, loss=loss, probes=200, seed=1) == found


@pytest.mark.parametrize("name", ["first", "second"])
def test_probing_every_coordinate_gives_the_trace_exactly(
    name: str,
    toy: tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, loss, batches = toy
    entries = 2 * (4 if name == "first" else 8)
    exact = exact_trace(model, x, loss, name)
    queue: list[int] = []

    def coordinate(like: Tensor, generator: torch.Generator) -> Tensor:
        if not queue:
            queue.extend(range(entries))
        z = torch.zeros(len(like), entries, dtype=like.dtype)
        z[:, queue.pop()] = entries**0.5
        return z.view_as(like)

    monkeypatch.setattr(curvature, "_rademacher", coordinate)
    found = mean_eigenvalue(model, name, batches, loss=loss, probes=entries)
    assert found.mean_eigenvalue * entries == pytest.approx(exact, rel=1e-9)


def test_the_metric_is_trace_times_perturbation(
    toy: tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]],
) -> None:
    model, x, loss, batches = toy
    details: dict[str, Curvature] = {}
    found = hessian_trace(
        model,
        ["first", "second"],
        [1, 3],
        batches,
        loss=loss,
        probes=8,
        on_detail=details.__setitem__,
    )
    errors = local_errors(model, ["first", "second"], [1, 3], batches)
    for name in ("first", "second"):
        assert details[name] == mean_eigenvalue(model, name, batches, loss=loss, probes=8)
        for bits in (1, 3):
            expected = details[name].mean_eigenvalue * errors[name].input_error[bits] / len(x)
            assert found[name][bits] == pytest.approx(expected)

    def negative(m: nn.Module, batch: Any) -> Tensor:
        return -loss(m, batch)

    raw: dict[str, Curvature] = {}
    flat = hessian_trace(
        model, ["second"], [1], batches, loss=negative, probes=8, on_detail=raw.__setitem__
    )
    assert flat == {"second": {1: 0.0}}
    assert raw["second"].mean_eigenvalue == -details["second"].mean_eigenvalue


def test_a_linear_loss_has_no_curvature(
    toy: tuple[TanhMlp, Tensor, Any, list[CalibrationBatch]],
) -> None:
    model, _, _, batches = toy

    def linear(m: nn.Module, batch: Any) -> Tensor:
        return m(*batch).flatten(1).sum(1)

    assert mean_eigenvalue(model, "second", batches, loss=linear) == Curvature(0.0, 0.0)
    with pytest.raises(UsageError, match="at least 2 probes"):
        mean_eigenvalue(model, "second", batches, loss=linear, probes=1)


def test_quadratic_form_on_a_dit_matches_finite_differences(
    subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher, layers, batches, _ = subject
    model.double()
    teacher.double()
    batch = CalibrationBatch(batches[0].x_t.double(), batches[0].t, batches[0].y)

    def loss(m: nn.Module, inputs: Any) -> Tensor:
        with torch.no_grad():
            goal = teacher(*inputs)
        return (m(*inputs) - goal).square().flatten(1).mean(1)

    probes: list[Tensor] = []

    def record(like: Tensor, generator: torch.Generator) -> Tensor:
        probes.append(torch.randn(like.shape, generator=generator, dtype=like.dtype))
        return probes[-1]

    monkeypatch.setattr(curvature, "_rademacher", record)
    for name in layers:
        probes.clear()
        found = mean_eigenvalue(model, name, [batch], loss=loss, probes=2)
        values = [finite_difference(model, name, batch, loss, z) for z in probes]
        mean = sum(values) / 2 / probes[0].numel()
        assert found.mean_eigenvalue == pytest.approx(mean, rel=1e-4)
        assert abs(mean) > 1e-9


def finite_difference(model: nn.Module, name: str, batch: Any, loss: Any, z: Tensor) -> float:
    """z^T H z by central differences of the loss, activations unquantized."""
    layers = quantized_layers(model)
    step = 1e-3
    for layer in layers.values():
        layer.activation_bits = None
    model.eval()
    weight = layers[name].quantized_weight().detach()

    def at(h: float) -> float:
        move = layers[name].register_forward_hook(lambda m, i, y: y + F.linear(h * z, weight))
        with torch.no_grad():
            value = float(loss(model, batch).sum())
        move.remove()
        return value

    second = (at(step) - 2 * at(0.0) + at(-step)) / step**2
    for layer in layers.values():
        layer.activation_bits = 4
    return second
