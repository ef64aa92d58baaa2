"""Static centring: exact without quantization, fast paths and packed forms, and what it costs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import changed
from torch import Tensor, nn

from robuq_bench.accounting.account import account
from robuq_bench.config import Plan, load_plan, load_workload
from robuq_bench.errors import UsageError
from robuq_bench.inference import export_packed, load_packed, pack_, prepare_for_inference
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.methods.site import Site
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_, quantized_layers
from robuq_bench.quantization.fast_paths import PATHS, PLAIN, path_for
from robuq_bench.quantization.linear import cached_weights
from robuq_bench.quantization.observing import observe
from robuq_bench.sensitivity.probing import layer_output, rotated_input

CENTRED = {"centring": {"method": "mean"}}
ROBUQ = {
    "rotation": {"method": "randomized-hadamard"},
    "branch": {"method": "svd", "rank": 2},
    "weight": {"method": "ternary-twn"},
    "activation": {"method": "robust-midtread", "bits": 2},
}


def plan_of(**slots: Any) -> Plan:
    rule = {"name": "all", "kind": ["block", "adaLN", "other"], **slots}
    return Plan.model_validate({"name": "test", "layers": [rule]})


def inputs(dtype: torch.dtype = torch.float32, batches: int = 3) -> list[Tensor]:
    """Tokens with a constant part of twice their spread."""
    generator = torch.Generator().manual_seed(1)
    constant = 2 * torch.randn(24, generator=generator)
    return [(torch.randn(32, 24, generator=generator) + constant).to(dtype) for _ in range(batches)]


def linear(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 36)).to(dtype)


def quantized(dtype: torch.dtype = torch.float32, **slots: Any) -> Any:
    return quantize_(linear(dtype), plan_of(**CENTRED, **slots), calibration=inputs(dtype))


@pytest.mark.parametrize(
    "slots",
    [
        {},
        {"rotation": "randomized-hadamard"},
        {"scaling": "smooth", "rotation": "hadamard", "branch": {"method": "svd", "rank": 2}},
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@torch.no_grad()
def test_without_quantization_the_layer_computes_what_it_did(
    slots: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    x = 3 * inputs(dtype, 4)[-1] + 1  # not what was observed
    expected, found = linear(dtype)(x), quantized(dtype, **slots)(x)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def test_the_centre_is_the_mean_of_all_that_was_seen() -> None:
    rows = torch.cat(inputs()).double().numpy()
    layer = quantized()[0]
    np.testing.assert_allclose(layer.centring.centre.numpy(), rows.mean(0), rtol=1e-6)
    before = linear()[0]
    expected = before.bias.double() + before.weight.double() @ torch.from_numpy(rows.mean(0))
    torch.testing.assert_close(layer.bias.double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.centring.centre.requires_grad is False
    assert layer.bias.requires_grad


def test_what_later_slots_observe_is_centred() -> None:
    x = torch.cat(inputs()).double()
    site = Site("a", tokens=x.float(), absmax=x.abs().amax(0), gram=x.T @ x, count=len(x))
    centre = torch.randn(24, generator=torch.Generator().manual_seed(5))
    with pytest.raises(UsageError, match=r"'a': its plan needs mean"):
        site.less(centre)
    moved, rest = Site(**{**vars(site), "mean": x.mean(0)}).less(centre), x - centre.double()
    torch.testing.assert_close(moved.gram, rest.T @ rest, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(moved.mean, rest.mean(0))
    torch.testing.assert_close(moved.absmax, rest.float().abs().amax(0))
    torch.testing.assert_close(moved.tokens, rest.float())


def test_gptq_and_smoothing_read_centred_inputs() -> None:
    """Fitted to inputs that were centred before, the layer gets the same scaling and codes."""
    slots = {"scaling": {"method": "smooth"}, "weight": {"method": "gptq", "bits": 3}}
    layer = quantized(torch.float64, **slots)[0]
    shifted = [x - layer.centring.centre for x in inputs(torch.float64)]
    other: Any = quantize_(linear(torch.float64), plan_of(**slots), calibration=shifted)
    torch.testing.assert_close(layer.scaling.scale, other[0].scaling.scale, rtol=1e-6, atol=0)
    codes = [each.weight_quantizer.codes(each.master_weight).codes for each in (layer, other[0])]
    assert torch.equal(*codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_paths_take_it_over(dtype: torch.dtype) -> None:
    """The path is that of the layer without a centre, for x - c, with the same gradients."""
    layer = quantized(dtype, **ROBUQ)[0]
    x = inputs(dtype)[0].requires_grad_()
    path = path_for(layer, x)
    assert path in PATHS
    y = layer(x)
    y.sum().backward()
    gradient, x.grad = x.grad, None
    layer.zero_grad()
    centred = x - layer.centring.centre
    expected = PLAIN.product(layer, centred, PLAIN.weight(layer))
    expected.sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(gradient, x.grad, **close)
    with torch.no_grad(), cached_weights(layer.eval()):
        torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)


def test_metrics_see_what_the_layer_computes() -> None:
    layer = quantized(torch.float64, **ROBUQ)[0].eval()
    x = inputs(torch.float64)[0]
    a = rotated_input(layer, x)
    torch.testing.assert_close(layer_output(layer, a, layer.activation_quantizer(a, 2)), layer(x))


@torch.no_grad()
def test_half_precision_is_rounded_once() -> None:
    layer = quantized(torch.bfloat16)[0]
    x = inputs(torch.bfloat16)[0]
    expected = (x.double() - layer.centring.centre.double()).to(torch.bfloat16)
    assert layer.centring.centre.dtype == torch.float32
    assert torch.equal(layer.centre_input(x), expected)


def test_a_constant_input_is_computed_exactly_whatever_the_bits() -> None:
    """Nothing of it is left to quantize: neither activations nor weights matter."""
    constant = [torch.randn(1, 24, generator=torch.Generator().manual_seed(2)).expand(16, 24)]
    layer: Any = quantize_(linear(), plan_of(**CENTRED, **ROBUQ), calibration=constant)
    torch.testing.assert_close(layer(constant[0]), linear()(constant[0]), rtol=1e-5, atol=1e-5)


def test_a_layer_without_a_bias_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24, bias=False))
    with pytest.raises(UsageError, match=r"layer '1': centring: it has no bias"):
        quantize_(model, plan_of(**CENTRED), calibration=inputs())
    assert not quantized_layers(model)


# On a DiT: packed models and accounts.


@pytest.fixture(scope="module")
def dit() -> tuple[DiT, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    small = {"hidden_size": 144, "depth": 2, "num_heads": 2}
    model = DiT.from_config(load_workload("digits").model.model_copy(update=small))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)  # DiT starts with gates of 0, which hide its blocks
    batch = (torch.randn(6, 1, 8, 8), torch.randint(0, 1000, (6,)), torch.randint(0, 10, (6,)))
    return model.eval(), [batch]


@pytest.mark.parametrize("everywhere", [False, True])
@torch.inference_mode()
def test_packed_models_agree_on_every_arithmetic(
    dit: tuple[DiT, Any], everywhere: bool, tmp_path: Path
) -> None:
    """Fused blocks subtract from a shift what layers subtract from their inputs."""
    teacher, batches = dit
    plan = changed("a4-centred", centring="mean") if everywhere else load_plan("a4-centred")
    model: Any = quantize_(copy.deepcopy(teacher), plan, calibration=batches).eval()
    expected = model(*batches[0])
    packed = pack_(copy.deepcopy(model))
    assert torch.equal(packed(*batches[0]), expected)
    path = tmp_path / "m.safetensors"
    export_packed(packed, path, plan=plan)
    loaded, _ = load_packed(path, into=copy.deepcopy(teacher))
    assert torch.equal(loaded(*batches[0]), expected)
    assert sum(layer.centring is not None for layer in packed_layers(loaded).values()) == (
        10 if everywhere else 8
    )
    uncentred = quantize_(copy.deepcopy(teacher), load_plan("a4")).eval()(*batches[0])
    for backend in ("integer", "cpu"):
        for fuse in (False, True):
            ready = prepare_for_inference(copy.deepcopy(loaded), backend, fuse=fuse)
            assert (getattr(ready.blocks, "modulations", None) is None) == (everywhere or not fuse)
            # Statistics summed in another order may move a code that lies on a threshold.
            distance = float((ready(*batches[0]) - expected).norm() / expected.norm())
            assert distance < 0.02 < float((uncentred - expected).norm() / expected.norm())


def test_what_it_costs_is_counted() -> None:
    model = load_workload("digits").model
    plain, centred = (account(model, load_plan(name)) for name in ("a2-uniform", "a2-centred"))
    inputs_of_blocks = model.depth * (3 + 4) * model.hidden_size  # qkv, proj, fc1; fc2 of 4 widths
    assert centred["centring_additions"] == 16 * inputs_of_blocks
    assert plain["centring_additions"] == 0
    scales = [
        {row["packing"]: row["scales_bytes"] for row in each["packing_table"]}
        for each in (plain, centred)
    ]
    for name, size in (("base3/fp16/fp32", 4), ("2bit/fp32/fp16", 2), ("base3/int8/int8", 2)):
        assert scales[1][name] - scales[0][name] == size * inputs_of_blocks
    assert centred["packed_bytes"] - plain["packed_bytes"] == 4 * inputs_of_blocks
    assert centred["effective_flops"] == plain["effective_flops"]
    assert centred["compute_reduction_with_rotation"] < plain["compute_reduction_with_rotation"]


def test_means_are_observed_over_all_tokens_and_groups() -> None:
    batches = inputs(batches=4)
    found = observe(linear(), ["0"], batches, ["mean"], groups=["a", "a", "b", "b"])
    torch.testing.assert_close(found["0"].mean, torch.cat(batches).double().mean(0))
    torch.testing.assert_close(
        found.by_group["b"]["0"].mean, torch.cat(batches[2:]).double().mean(0)
    )
