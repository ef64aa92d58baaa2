"""Sensitivities against closed forms, and the promise to leave the model as it was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from making import quantized
from torch import Tensor, nn

from robuq_bench.config import ModelConfig, load_plan, load_workload
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import ConfigError, RobuqError, UsageError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, quantized_layers
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.sensitivity import CalibrationBatch, calibration_batches, measure_sensitivity

Sensitivity = dict[str, dict[int, float]]


class Gains(nn.Module):
    """eps = gain_a * Q_a(x) + gain_b * Q_b(x) along the last axis; sigma channels are noise."""

    def __init__(self, gain_a: float, gain_b: float) -> None:
        super().__init__()
        self.a, self.b = self._layer("a", gain_a), self._layer("b", gain_b)
        self.calls = 0
        self.fail_at: int | None = -1
        self.poison_at: int | None = -1

    @staticmethod
    def _layer(name: str, gain: float) -> QuantizedLinear:
        linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            linear.weight.copy_(gain * torch.eye(4))
        return quantized(
            linear, name, rotation="none", rank=0, weight="none", activation=("minmax", 2)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        bits = self.a.activation_bits
        if bits == self.fail_at:
            raise MemoryError("out of memory")
        eps = self.a(x) + self.b(x)
        if bits == self.poison_at:
            eps = eps * float("nan")
        return torch.cat([eps, 1000 * torch.rand_like(eps)], dim=1)


def staircase(count: int = 6) -> list[CalibrationBatch]:
    """Tokens (0, 1, 2, 3): min-max keeps them at 2 bits and gives (0, 0, 3, 3) at 1 bit."""
    x = torch.arange(4.0).expand(count, 1, 3, 4).contiguous()
    index = torch.zeros(count, dtype=torch.int64)
    parts = zip(x.split(4), index.split(4), index.split(4), strict=True)
    return [CalibrationBatch(*batch) for batch in parts]


@pytest.fixture(scope="module")
def student() -> tuple[nn.Module, list[str]]:
    """A tiny quantized DiT whose output layers are not zero."""
    fields = {"hidden_size": 16, "depth": 2, "num_heads": 2}
    config = ModelConfig.model_validate({**load_workload("digits").model.model_dump(), **fields})
    torch.manual_seed(0)
    model = DiT.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.2)
    plan = load_plan("a4")
    quantize_(model, plan)
    return model, allocatable_layers(model)


def digits_batches(num_samples: int = 12, batch_size: int = 5) -> list[CalibrationBatch]:
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return calibration_batches(
        images, torch.arange(20) % 10, Diffusion(), num_samples, batch_size, 7
    )


def test_closed_form_of_two_linear_layers() -> None:
    found = measure_sensitivity(Gains(2.0, 3.0), ["a", "b"], [1, 2], staircase())
    # (0, 1, 2, 3) -> (0, 0, 3, 3) changes two of four entries by one: 0.5 times the gain squared;
    # 2 bits keep these tokens as they are.
    assert found == {
        "a": {1: pytest.approx(2.0), 2: 0.0},
        "b": {1: pytest.approx(4.5), 2: 0.0},
    }


def test_change_is_against_the_layer_unquantized_whatever_its_present_bits() -> None:
    model = Gains(2.0, 3.0)
    model.b.activation_bits = 1
    found = measure_sensitivity(model, ["a", "b"], [1, 2], staircase())
    assert found["a"] == {1: pytest.approx(2.0), 2: 0.0}
    assert found["b"] == {1: pytest.approx(4.5), 2: 0.0}
    assert model.b.activation_bits == 1


def test_present_bits_of_a_layer_cost_what_they_lose() -> None:
    """By NumPy, on tokens that 2 bits do not keep: nothing is 0 for being what a layer has."""
    x = torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    index = torch.zeros(5, dtype=torch.int64)
    found = measure_sensitivity(
        Gains(2.0, 3.0), ["a", "b"], [2, 8], [CalibrationBatch(x, index, index)]
    )
    values = x.numpy().astype(np.float64)
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    for layer, gain in (("a", 2.0), ("b", 3.0)):
        for bits in (2, 8):
            step = (high - low) / (2**bits - 1)
            error = np.round((values - low) / step) * step + low - values
            assert found[layer][bits] == pytest.approx(gain**2 * (error**2).mean(), rel=1e-4)


def test_each_layer_costs_one_pass_more_than_its_bits() -> None:
    model = Gains(2.0, 3.0)
    measure_sensitivity(model, ["a", "b"], [1, 2], staircase())
    assert model.calls == 2 * (1 + 2) * 2  # layers, the layer unquantized and two widths, batches


def test_matches_a_direct_computation_on_a_dit(student: tuple[nn.Module, list[str]]) -> None:
    model, layers = student
    batches = digits_batches()
    found = measure_sensitivity(model, layers[:4], [1, 2, 4], batches)
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    module = quantized_layers(model)[layers[3]]
    model.eval()
    with torch.no_grad():
        module.activation_bits = None
        before = model(*whole)
        for bits in (1, 2, 4):
            module.activation_bits = bits
            expected = nn.functional.mse_loss(model(*whole), before).item()
            assert found[layers[3]][bits] == pytest.approx(expected, rel=1e-4)
    assert module.activation_bits == 4
    assert all(0.0 < found[layer][4] < found[layer][2] for layer in layers[:4])


def test_order_does_not_matter(student: tuple[nn.Module, list[str]]) -> None:
    model, layers = student
    chosen = layers[:3]
    first = measure_sensitivity(model, chosen, [1, 2], digits_batches())
    again = measure_sensitivity(model, chosen[::-1], [2, 1], digits_batches())
    assert again == first
    alone = measure_sensitivity(model, chosen[1:2], [1], digits_batches())
    assert alone[chosen[1]][1] == first[chosen[1]][1]


def test_uneven_batches_weigh_by_their_size() -> None:
    tokens = torch.randn(7, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    index = torch.zeros(7, dtype=torch.int64)
    found = []
    for size in (1, 3, 7):
        parts = zip(tokens.split(size), index.split(size), index.split(size), strict=True)
        batches = [CalibrationBatch(*batch) for batch in parts]
        found.append(measure_sensitivity(Gains(2.0, 3.0), ["a", "b"], [1, 3], batches))
    for other in found[1:]:
        for layer, by_bits in found[0].items():
            assert other[layer] == pytest.approx(by_bits, rel=1e-6)


def test_interrupted_measurement_continues_where_it_stopped() -> None:
    stored: Sensitivity = {}

    def store(layer: str, bits: int, value: float) -> None:
        stored.setdefault(layer, {})[bits] = value
        if sum(map(len, stored.values())) == 3:
            raise KeyboardInterrupt

    model = Gains(2.0, 3.0)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, ["a", "b"], [1, 2, 3], staircase(), on_item=store)
    assert (model.a.activation_bits, model.b.activation_bits) == (2, 2)
    seen: list[tuple[str, int]] = []
    rest = measure_sensitivity(
        model,
        ["a", "b"],
        [1, 2, 3],
        staircase(),
        done=stored,
        on_item=lambda layer, bits, value: seen.append((layer, bits)),
    )
    assert seen == [("b", 1), ("b", 2), ("b", 3)]
    assert rest == measure_sensitivity(model, ["a", "b"], [1, 2, 3], staircase())
    calls = model.calls
    assert measure_sensitivity(model, ["a", "b"], [1, 2, 3], staircase(), done=rest) == rest
    assert model.calls == calls


def test_model_is_left_as_it_was_found() -> None:
    model = Gains(2.0, 3.0)
    model.train()
    model.b.eval()
    model.a.activation_bits = 3
    weight = model.a.master_weight.clone()
    measure_sensitivity(model, ["a"], [1, 2], staircase())
    assert (model.a.activation_bits, model.b.activation_bits) == (3, 2)
    assert (model.training, model.a.training, model.b.training) == (True, True, False)
    assert torch.equal(model.a.master_weight, weight)
    assert model.a.master_weight.grad is None


def test_bits_and_flags_are_restored_after_an_error() -> None:
    model = Gains(2.0, 3.0).train()
    model.fail_at = 1
    with pytest.raises(MemoryError):
        measure_sensitivity(model, ["b", "a"], [3, 1], staircase())
    assert (model.a.activation_bits, model.b.activation_bits) == (2, 2)
    assert model.training


@pytest.mark.parametrize(
    ("poisoned", "where"),
    [(None, "with layer 'a' unquantized"), (1, r"with layer 'a' at 1 bits")],
)
def test_diverged_predictions_are_named(poisoned: int | None, where: str) -> None:
    model = Gains(2.0, 3.0)
    model.poison_at = poisoned
    with pytest.raises(RobuqError, match=where):
        measure_sensitivity(model, ["a"], [3, 1], staircase())
    assert model.a.activation_bits == 2


def test_bad_requests_are_refused() -> None:
    model = Gains(2.0, 3.0)
    with pytest.raises(UsageError, match="no quantized layer 'aa'"):
        measure_sensitivity(model, ["a", "aa"], [1], staircase())
    for layers, bits, batches in (
        ([], [1], staircase()),
        (["a"], [], staircase()),
        (["a"], [1], []),
    ):
        with pytest.raises(UsageError, match="at least one layer"):
            measure_sensitivity(model, layers, bits, batches)
    with pytest.raises(ConfigError, match="9"):
        measure_sensitivity(model, ["a"], [9], staircase())
    assert model.a.activation_bits == 2


def test_calibration_timesteps_cover_every_stratum() -> None:
    images, labels = torch.zeros(30, 1, 2, 2), torch.zeros(30, dtype=torch.int64)
    for count in (7, 64, 1000, 2500):
        batches = calibration_batches(images, labels, Diffusion(), count, 100, seed=count)
        t = torch.cat([batch.t for batch in batches])
        ordered = t.sort().values
        edges = torch.arange(count + 1, dtype=torch.float64) * 1000 / count
        assert (ordered >= edges[:-1].floor()).all()
        assert (ordered < edges[1:].ceil()).all()
        assert ordered[-1] < 1000
        assert not torch.equal(t, ordered)


def test_the_last_stratum_ends_with_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 1 - 2.0**-53
    monkeypatch.setattr(torch, "rand", lambda n, **options: torch.full((n,), largest).double())
    images, labels = torch.zeros(9, 1, 2, 2), torch.zeros(9, dtype=torch.int64)
    (batch,) = calibration_batches(images, labels, Diffusion(), 9, 9, seed=0)
    assert batch.t.max() == 999


def test_calibration_set_is_a_function_of_the_seed_alone() -> None:
    one, other = digits_batches(batch_size=12), digits_batches(batch_size=5)
    assert [len(batch.t) for batch in other] == [5, 5, 2]
    for a, b in zip(one[0], map(torch.cat, zip(*other, strict=True)), strict=True):
        assert torch.equal(a, b)
    images = torch.randn(20, 1, 8, 8)
    args = (images, torch.arange(20), Diffusion(), 12, 12)
    state = torch.get_rng_state()
    (first,), (second,) = calibration_batches(*args, seed=0), calibration_batches(*args, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.x_t, second.x_t)
    assert not torch.equal(first.y, second.y)


def test_calibration_images_are_diffused_and_not_repeated() -> None:
    images = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 1, 64, 64) / 20
    diffusion = Diffusion()
    (batch,) = calibration_batches(images, torch.arange(20), diffusion, 20, 64, seed=0)
    assert sorted(batch.y.tolist()) == list(range(20))
    abar = diffusion.alphas_cumprod[batch.t].view(-1, 1, 1, 1)
    noise = (batch.x_t - abar.sqrt() * images[batch.y]) / (1 - abar).sqrt()
    assert noise.mean() == pytest.approx(0.0, abs=0.02)
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    assert batch.x_t.dtype == torch.float32
    repeated = calibration_batches(images, torch.arange(20), diffusion, 50, 64, seed=0)[0].y
    assert torch.bincount(repeated).max() == 3
    assert torch.bincount(repeated).min() == 2


def test_calibration_refuses_what_it_cannot_use() -> None:
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UsageError, match="at least one sample"):
        calibration_batches(images, labels, Diffusion(), 0, 4, 0)
    with pytest.raises(UsageError, match="positive batch size"):
        calibration_batches(images, labels, Diffusion(), 4, 0, 0)
    with pytest.raises(UsageError, match="3 images and 2 labels"):
        calibration_batches(images, labels[:2], Diffusion(), 4, 4, 0)
    with pytest.raises(UsageError, match="uint8"):
        calibration_batches(images.to(torch.uint8), labels, Diffusion(), 4, 4, 0)
