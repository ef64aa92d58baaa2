"""What every metric promises, and the local metrics against explicit computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError, RobuqError, UsageError
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.sensitivity import (
    METRICS,
    CalibrationBatch,
    MetricFunction,
    MetricOptions,
    by_timestep,
    denoising_loss,
    distillation_loss,
    epsilon_mse,
    local_errors,
    metric_named,
    output_mse,
    output_nsr,
    timestep_buckets,
)

Table = dict[str, dict[int, float]]


def bound(name: str, subject: Any, **options: Any) -> MetricFunction:
    defaults = {"teacher": subject.teacher, "loss": distillation_loss(subject.teacher)}
    return METRICS[name].bind(MetricOptions(**{**defaults, **options}))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        [(m.training, len(m._forward_hooks)) for m in model.modules()],
        [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
        [layer.activation_bits for layer in quantized_layers(model).values()],
    )


def whole(subject: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_t, t, y = (torch.cat([getattr(b, f) for b in subject.batches]) for f in ("x_t", "t", "y"))
    return x_t, t, y


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_keeps_the_common_promises(name: str, subject: Any) -> None:
    model, _, layers, batches, _ = subject
    model.train()
    model.get_submodule(layers[1]).eval()
    quantized_layers(model)[layers[0]].activation_bits = 3
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = snapshot(model)
    random = torch.get_rng_state()
    metric = bound(name, subject)
    found = metric(model, layers, [1, 2, 4], batches)
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    values = [value for by_bits in found.values() for value in by_bits.values()]
    assert [*found] == layers
    assert all([*by_bits] == [1, 2, 4] for by_bits in found.values())
    assert all(isinstance(v, float) and math.isfinite(v) and v >= 0 for v in values)
    # Order of layers and bits, and frozen parameters, change nothing.
    model.requires_grad_(False)
    again = metric(model, layers[::-1], [2, 1], batches)
    for layer in layers:
        for bits in (1, 2):
            assert again[layer][bits] == pytest.approx(found[layer][bits], rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_resumes(name: str, subject: Any) -> None:
    model, _, layers, batches, _ = subject
    metric = bound(name, subject)
    stored: Table = {}

    def store(layer: str, bits: int, value: float) -> None:
        stored.setdefault(layer, {})[bits] = value
        if sum(map(len, stored.values())) == 3:
            raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        metric(model, layers, [1, 3], batches, on_item=store)
    assert snapshot(model) == before
    seen: list[tuple[str, int]] = []
    rest = metric(
        model,
        layers,
        [1, 3],
        batches,
        done=stored,
        on_item=lambda layer, bits, value: seen.append((layer, bits)),
    )
    assert seen == [(layer, bits) for layer in layers for bits in (1, 3)][3:]
    assert rest == metric(model, layers, [1, 3], batches)
    model.forward = None  # type: ignore[assignment]
    assert metric(model, layers, [1, 3], batches, done=rest) == rest


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_bad_requests(name: str, subject: Any) -> None:
    model, _, layers, batches, _ = subject
    metric = bound(name, subject)
    with pytest.raises(UsageError, match=r"no quantized layer 'blocks\.0\.mlp\.fc'"):
        metric(model, ["blocks.0.mlp.fc"], [1], batches)
    for args in (([], [1], batches), (layers, [], batches), (layers, [1], [])):
        with pytest.raises(UsageError, match="at least one layer"):
            metric(model, *args)
    with pytest.raises(ConfigError, match="9"):
        metric(model, layers, [9], batches)


@pytest.mark.parametrize("name", METRICS)
def test_a_diverged_model_is_an_error_that_names_the_layer(name: str, subject: Any) -> None:
    model, _, layers, batches, _ = subject
    before = snapshot(model)
    with torch.no_grad():
        model.get_parameter(f"{layers[0]}.bias").fill_(float("nan"))
    with pytest.raises(RobuqError, match=r"not finite|nan"):
        bound(name, subject)(model, layers, [1], batches)
    assert snapshot(model)[0] == before[0]
    assert snapshot(model)[2] == before[2]


def test_missing_options_and_unknown_names() -> None:
    assert {metric.name for metric in METRICS.values()} == set(METRICS)
    assert all(metric.label and metric.source for metric in METRICS.values())
    for name in ("epsilon_mse_teacher", "fisher", "hessian_trace"):
        with pytest.raises(UsageError, match=name):
            METRICS[name].bind(MetricOptions())
    with pytest.raises(UsageError, match="did you mean 'fisher'"):
        metric_named("fischer")


def test_denoising_loss_is_the_training_loss_and_needs_the_noise(subject: Any) -> None:
    model, _, _, batches, diffusion = subject
    batch = batches[0]
    model.eval()
    with torch.no_grad():
        found = denoising_loss(diffusion)(model, batch)
        eps = model(batch.x_t, batch.t, batch.y)
        torch.testing.assert_close(found, (eps - batch.noise).square().flatten(1).mean(1))
        with pytest.raises(UsageError, match="calibration_set"):
            denoising_loss(diffusion)(model, CalibrationBatch(batch.x_t, batch.t, batch.y))


def test_output_errors_match_the_layer_run_at_both_widths(subject: Any) -> None:
    model, _, layers, batches, _ = subject
    mse = output_mse(model, layers, [1, 2, 8], batches)
    nsr = output_nsr(model, layers, [1, 2, 8], batches)
    model.eval()
    for name in layers:
        layer = quantized_layers(model)[name]
        inputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda m, args, y, seen=inputs: seen.append(args[0]))
        with torch.no_grad():
            model(*whole(subject))
            handle.remove()
            layer.activation_bits = None
            exact = layer(inputs[0])
            for bits in (1, 2, 8):
                layer.activation_bits = bits
                error = (layer(inputs[0]) - exact).double().square()
                assert mse[name][bits] == pytest.approx(error.mean().item(), rel=1e-3)
                ratio = (error.sum() / exact.double().square().sum()).item()
                assert nsr[name][bits] == pytest.approx(ratio, rel=1e-3)
        layer.activation_bits = 4
        assert mse[name][1] > mse[name][2] > mse[name][8] > 0


def test_relative_error_matches_the_quantizer(subject: Any) -> None:
    model, _, layers, batches, _ = subject
    found = local_errors(model, layers, [1, 2, 4], batches)
    # Error of the optimal uniform grids for a Gaussian: 0.3634, 0.1188, 0.01154 of the variance.
    for sums in found.values():
        for bits, expected in ((1, 0.3634), (2, 0.1188), (4, 0.01154)):
            assert 0.3 * expected < sums.relative_error(bits) < 3 * expected


def test_a_layer_that_never_runs_is_named(subject: Any) -> None:
    model, _, layers, batches, _ = subject
    model.spare = model.get_submodule(layers[0])
    model.blocks[0].attn.qkv = nn.Linear(48, 144)
    for name in ("output_mse", "hessian_trace", "higgs"):
        with pytest.raises(RobuqError, match="never calls layer 'spare'"):
            bound(name, subject)(model, ["spare"], [1], batches)


def test_increase_of_the_error_against_a_teacher(subject: Any) -> None:
    model, teacher, layers, batches, _ = subject
    options: dict[str, Any] = {"reference": teacher}
    found = epsilon_mse(model, layers, [2, 8], batches, signed=True, **options)
    clipped = epsilon_mse(model, layers, [2, 8], batches, **options)
    inputs = whole(subject)
    model.eval()
    with torch.no_grad():
        target = teacher(*inputs)
        for name in layers:
            layer = quantized_layers(model)[name]
            layer.activation_bits = None
            before = nn.functional.mse_loss(model(*inputs), target).item()
            for bits in (2, 8):
                layer.activation_bits = bits
                increase = nn.functional.mse_loss(model(*inputs), target).item() - before
                assert found[name][bits] == pytest.approx(increase, rel=1e-3, abs=1e-6)
                assert clipped[name][bits] == max(0.0, found[name][bits])
            layer.activation_bits = 4
    assert min(found[name][8] for name in layers) < 0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_by_timestep(name: str, subject: Any) -> None:
    model, _, layers, batches, _ = subject
    metric, chosen = bound(name, subject), layers[:2]
    seen: dict[int, Table] = {}

    def on_item(bucket: int, layer: str, bits: int, value: float) -> None:
        seen.setdefault(bucket, {}).setdefault(layer, {})[bits] = value

    schedule = {"buckets": 4, "num_train_timesteps": 1000}
    found = by_timestep(metric, model, chosen, [1, 2], batches, on_item=on_item, **schedule)
    for layer in chosen:
        for bits in (1, 2):
            assert found[layer][bits] == [seen[bucket][layer][bits] for bucket in range(4)]
    if name in ("epsilon_mse", "output_mse", "fisher"):
        total = metric(model, chosen, [1, 2], batches)
        for layer in chosen:
            for bits in (1, 2):
                mean = sum(found[layer][bits]) / 4
                assert mean == pytest.approx(total[layer][bits], rel=1e-4)
    model.forward = None  # type: ignore[assignment]
    last = by_timestep(metric, model, chosen, [1, 2], batches, **schedule, done=seen)
    assert last == found


def test_timestep_buckets_partition_the_samples(subject: Any) -> None:
    parts = timestep_buckets(subject.batches, 4, 1000)
    t = [torch.cat([batch.t for batch in part]) for part in parts]
    assert [len(part) for part in t] == [4, 4, 4, 4]
    for bucket, part in enumerate(t):
        assert (part // 250 == bucket).all()
    all_t = torch.cat([batch.t for batch in subject.batches])
    assert torch.equal(torch.cat(t).sort().values, all_t.sort().values)
    batch = parts[2][0]
    source = next(b for b in subject.batches if int(batch.t[0]) in b.t.tolist())
    row = source.t.tolist().index(int(batch.t[0]))
    for field in ("x0", "noise", "x_t", "t", "y"):
        assert torch.equal(getattr(batch, field)[0], getattr(source, field)[row])
    with pytest.raises(UsageError, match="no calibration sample in timestep buckets"):
        timestep_buckets(subject.batches, 100, 1000)
    with pytest.raises(UsageError, match=r"0\.\.99"):
        timestep_buckets(subject.batches, 2, 100)
    with pytest.raises(UsageError, match="at least 1"):
        timestep_buckets(subject.batches, 0, 1000)
