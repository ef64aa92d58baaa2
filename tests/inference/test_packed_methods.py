"""Every packaged method packs: a loaded layer computes what its quantized one does, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.checkpointing import read_safetensors
from robuq_bench.config import Plan
from robuq_bench.errors import UsageError
from robuq_bench.inference import PackedLinear, export_packed, load_packed, pack_
from robuq_bench.inference import prepare_for_inference as prepare
from robuq_bench.inference.packed_file import describe, size_table
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.inference.packed_uniform import PackedUniform
from robuq_bench.methods import SLOTS, is_packaged, method_names, register_method
from robuq_bench.methods.base import ActivationMethod, WeightMethod
from robuq_bench.methods.weights._ternary import TernaryMethod
from robuq_bench.quantization.convert import quantize_

RTN4 = {"method": "rtn", "bits": 4}
TOKENS = {"method": "rtn", "bits": 4}
#: Methods with the parameters that make a difference here.
CASES: dict[str, dict[str, Any]] = {
    "rtn abs per tensor": {"weight": {"method": "rtn", "bits": 3, "per": "tensor"}},
    "rtn abs per row": {"weight": {"method": "rtn", "bits": 2}},
    "rtn abs per group": {"weight": {"method": "rtn", "bits": 4, "group": 6}},
    "rtn aff per tensor": {
        "weight": {"method": "rtn", "bits": 5, "per": "tensor", "symmetric": False}
    },
    "rtn aff per row": {
        "weight": {"method": "rtn", "bits": 8, "symmetric": False, "zero_in_range": False}
    },
    "rtn aff per group": {
        "weight": {"method": "rtn", "bits": 6, "symmetric": False, "group": 12, "shrink": 5}
    },
    "gptq": {"weight": {"method": "gptq", "bits": 4, "shrink": 8}},
    "gptq groups": {
        "weight": {"method": "gptq", "bits": 7, "group": 12, "symmetric": False, "act_order": True}
    },
    "lsq per row": {"weight": {"method": "lsq", "bits": 4}},
    "lsq per tensor": {"weight": {"method": "lsq", "bits": 3, "per": "tensor"}},
    "svd": {"weight": RTN4, "branch": {"method": "svd", "rank": 3}},
    "hadamard": {"weight": RTN4, "rotation": "hadamard"},
    "randomized-hadamard": {"weight": RTN4, "rotation": "randomized-hadamard"},
    "block-hadamard": {"weight": RTN4, "rotation": {"method": "block-hadamard", "block": 12}},
    "block-hadamard signs": {
        "weight": RTN4,
        "rotation": {"method": "block-hadamard", "block": 4, "signs": True},
    },
    "dual-rotation": {"weight": RTN4, "rotation": {"method": "dual-rotation", "steps": 8}},
    "smooth": {"weight": RTN4, "scaling": "smooth"},
    "mean": {"weight": RTN4, "centring": "mean"},
    "everything": {
        "weight": {"method": "gptq", "bits": 4, "group": 4, "symmetric": False},
        "centring": "mean",
        "scaling": "smooth",
        "rotation": {"method": "block-hadamard", "block": 4, "signs": True},
        "branch": {"method": "svd", "rank": 2},
        "activation": {"method": "percentile", "bits": 8},
    },
    "rtn activations": {"weight": RTN4, "activation": {"method": "rtn", "clip": 0.9, "group": 4}},
    "percentile": {"weight": RTN4, "activation": {"method": "percentile", "bits": 6}},
    "lsq activations": {"weight": RTN4, "activation": {"method": "lsq", "bits": 4}},
    "ternary, every other slot": {
        "weight": "ternary-twn",
        "scaling": "smooth",
        "rotation": {"method": "block-hadamard", "block": 4},
        "branch": {"method": "svd", "rank": 2},
        "activation": {"method": "percentile", "bits": 6},
    },
    "ternary at the optimum": {"weight": "ternary-optimal", "scaling": "smooth"},
    "ternary, dual rotation": {
        "weight": "ternary-absmean",
        "rotation": {"method": "dual-rotation", "steps": 8},
    },
}  # fmt: skip

NAMED = {
    (slot, value if isinstance(value, str) else value["method"])
    for slots in CASES.values()
    for slot, value in slots.items()
}
#: And every other method of the suite as it is by default.
CASES |= {
    f"{slot} {name}": {"weight": RTN4, slot: {"method": name}}
    for slot in SLOTS
    for name in method_names(slot)
    if is_packaged(slot, name) and (slot, name) not in NAMED
}


def plan_of(**slots: Any) -> Plan:
    rule = {"name": "all", "kind": ["block", "adaLN", "other"], **slots}
    if "centring" in slots:  # the second layer has no bias
        unbiased = {**rule, "name": "unbiased", "match": ["2"], "centring": "none"}
        return Plan.model_validate({"name": "a-test", "layers": [unbiased, rule]})
    return Plan.model_validate({"name": "a-test", "layers": [rule]})


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 24, bias=False), nn.LayerNorm(24))
    return nn.Sequential(*layers).to(dtype).eval()


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.2, 3, 24)
    return [(torch.randn(16, 24, generator=generator) * spread).to(dtype) for _ in range(2)]


def quantized(plan: Plan, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    return quantize_(make(dtype), plan, calibration=batches(dtype), **changes)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_method_packs_and_loads_bit_for_bit(case: str, tmp_path: Path) -> None:
    plan = plan_of(**CASES[case])
    model, x, path = quantized(plan), batches()[0], tmp_path / "m.safetensors"
    expected = model(x)
    packed = pack_(copy.deepcopy(model))
    assert torch.equal(packed(x), expected)
    export_packed(packed, path, plan=plan)
    loaded, facts = load_packed(path, into=make())
    assert torch.equal(loaded(x), expected)
    assert facts["plan"] == plan
    assert read_safetensors(path)[1]["format_version"] == "3"
    # What is written again is the same file, so nothing was lost on the way.
    again = tmp_path / "again.safetensors"
    export_packed(loaded, again, plan=plan)
    assert again.read_bytes() == path.read_bytes()
    first = packed_layers(loaded)["0"]
    assert isinstance(first, PackedLinear if case.startswith("ternary") else PackedUniform)
    if isinstance(first, PackedUniform):
        layer: Any = model[0]
        assert torch.equal(first.codes(), layer.weight_quantizer.codes(layer.master_weight).codes)
        assert first.packed.numel() == -(-24 * 36 * first.bits // 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", ["rtn aff per group", "gptq", "lsq per row", "smooth", "dual-rotation", "percentile"]
)
@torch.no_grad()
def test_every_dtype_comes_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plan = plan_of(**CASES[case])
    model, x, path = quantized(plan, dtype), batches(dtype)[0], tmp_path / "m.safetensors"
    expected = model(x)
    export_packed(pack_(model), path, plan=plan)
    loaded, _ = load_packed(path, into=make())
    found = loaded(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    layer = packed_layers(loaded)["0"]
    assert layer.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        scale = layer.scale
        assert torch.equal(copy.deepcopy(loaded).half()[0].scale, scale), "scales are not cast"


@torch.no_grad()
def test_a_layer_of_a_real_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(1152, 3456), torch.randn(7, 1152)
    plan = plan_of(
        weight={"method": "rtn", "bits": 4, "group": 128, "symmetric": False},
        rotation="randomized-hadamard", scaling="smooth", activation=TOKENS,
    )  # fmt: skip
    layer = quantize_(copy.deepcopy(linear), plan, calibration=[x]).eval()
    expected, path = layer(x), tmp_path / "m.safetensors"
    rows = {row["part"]: row for row in export_packed(pack_(layer), path, plan=plan)}
    assert rows["uniform codes"]["bytes"] == 3456 * 1152 // 2
    assert rows["scales"]["bytes"] == rows["zero points"]["bytes"] == 4 * 3456 * 9
    assert rows["signs"]["bytes"] == 1152 // 8
    assert rows["other slots"]["bytes"] == 4 * 1152
    assert rows["total"]["fp32_bytes"] == 4 * (3456 * 1152 + 3456)
    loaded, _ = load_packed(path, into=linear)
    assert torch.equal(loaded(x), expected)


def test_other_backends_refuse_uniform_codes_by_method() -> None:
    for weight, activation, message in (
        (RTN4, "bitnet", "weight method 'rtn' has codes of 4 bits.*backend \"reference\""),
        ("ternary-twn", {"method": "percentile"}, "activation method 'percentile' is not computed"),
    ):
        model = pack_(quantized(plan_of(weight=weight, activation=activation)))
        with pytest.raises(UsageError, match=f"layer '0', backend 'integer': {message}"):
            prepare(model, "integer")


@torch.no_grad()
def test_weight_bits_of_an_allocation_are_kept(tmp_path: Path) -> None:
    plan, path = plan_of(weight=RTN4), tmp_path / "m.safetensors"
    model = quantized(plan, weight_bits_by_layer={"0": 2, "2": 7})
    expected = model(batches()[0])
    export_packed(pack_(model), path, plan=plan)
    loaded, _ = load_packed(path, into=make())
    assert {name: layer.bits for name, layer in packed_layers(loaded).items()} == {"0": 2, "2": 7}  # type: ignore[attr-defined]
    assert torch.equal(loaded(batches()[0]), expected)
    assert describe(path)["mean_weight_bits"] == {"0": 2, "2": 7}


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 24)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_shared_layer_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    plan, path = plan_of(weight=RTN4, scaling="smooth"), tmp_path / "m.safetensors"
    model = quantize_(Twice().eval(), plan, calibration=batches())
    expected = model(batches()[0])
    export_packed(pack_(model), path, plan=plan)
    tensors, _ = read_safetensors(path)
    assert set(tensors) == {f"first.{part}" for part in ("codes", "scale", "bias", "scaling.scale")}
    loaded, _ = load_packed(path, into=Twice())
    assert loaded.first is loaded.second
    assert torch.equal(loaded(batches()[0]), expected)


@pytest.mark.parametrize("case", [case for case, slots in CASES.items() if "rtn a" in case])
def test_the_file_takes_the_bits_that_the_method_says(case: str, tmp_path: Path) -> None:
    plan, path = plan_of(weight=CASES[case]["weight"]), tmp_path / "m.safetensors"
    export_packed(pack_(quantized(plan)), path, plan=plan, storage="base3/fp16/fp16")
    rows = {row["part"]: row["bytes"] for row in size_table(path)}
    method: Any = plan.layers[0].weight
    stored = rows["uniform codes"] + rows["scales"] + rows.get("zero points", 0)
    said = sum(method.storage_bits(*shape) for shape in ((36, 24), (24, 36)))
    assert 0 <= 8 * stored - said < 16, "whole bytes per layer are all that is added"
    assert sum(size for part, size in rows.items() if part != "total") == path.stat().st_size


@pytest.mark.parametrize("storage", ["base3/fp16/fp16", "2bit/int8/int8"])
@torch.no_grad()
def test_coarser_storage_rounds_scales_and_no_codes(storage: str, tmp_path: Path) -> None:
    plan, path = plan_of(**CASES["everything"]), tmp_path / "m.safetensors"
    packed = pack_(quantized(plan))
    export_packed(packed, path, plan=plan, storage=storage)
    loaded, _ = load_packed(path, into=make())
    exact, rounded = packed.state_dict(), loaded.state_dict()
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        if name.endswith(("packed", "zero", "signs", "activation_bits")):
            assert torch.equal(rounded[name], value), name
        elif name.startswith(("0.scal", "0.activation", "2.scal", "2.activation")):
            error = (rounded[name] - value).abs()
            assert bool((error <= 2**-11 * value.abs()).all()), name


def test_a_plan_of_other_methods_is_refused(tmp_path: Path) -> None:
    packed = pack_(quantized(plan_of(weight=RTN4, scaling="smooth")))
    for other in (plan_of(weight=RTN4), plan_of(weight={**RTN4, "group": 6}, scaling="smooth")):
        with pytest.raises(UsageError, match="no rule of plan 'a-test' makes a layer like '0'"):
            export_packed(packed, tmp_path / "m.safetensors", plan=other)
    assert not list(tmp_path.iterdir())


class Halves(WeightMethod):
    """Rounds to halves, and says no codes."""

    def fit(self, weight: Tensor, site: Any) -> nn.Module:
        class Module(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return (2 * weight).round() / 2

        return Module()

    def nominal_bits(self) -> float:
        return 4.0


class Signs(ActivationMethod):
    """±1."""

    def fit(self, weight: Tensor, site: Any) -> nn.Module:
        class Module(nn.Module):
            def forward(self, x: Tensor, bits: int) -> Tensor:
                return x.sign()

        return Module()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr("robuq_bench.methods._registered", {})


@pytest.mark.usefixtures("registry")
def test_a_method_from_outside_is_refused_with_the_reason() -> None:
    register_method("halves", Halves)
    register_method("only-signs", Signs)
    for slots, message in (
        ({"weight": "halves"}, "weight method 'halves' is from outside the suite"),
        ({"weight": f"{__name__}:Halves"}, f"weight method '{__name__}:Halves' is from outside"),
        ({"weight": RTN4, "activation": "only-signs"}, "activation method 'only-signs' is from"),
    ):
        model = quantized(plan_of(**slots))
        with pytest.raises(UsageError, match=f"layer '0': {message}.*without importing code"):
            pack_(model)
        assert type(model[0]).__name__ == "QuantizedLinear", "nothing was changed"


@pytest.mark.usefixtures("registry")
def test_a_weight_method_without_codes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robuq_bench.inference.packed_linear.is_packaged", lambda *_: True)
    register_method("halves", Halves)
    with pytest.raises(UsageError, match="weight method 'halves' has no packed form"):
        pack_(quantized(plan_of(weight="halves")))


@pytest.mark.parametrize("name", ["ternary-twn", "ternary-absmean"])
def test_ternary_codes_dequantize_to_scale_times_code(name: str) -> None:
    model: Any = quantized(plan_of(weight=name))
    layer = model[0]
    assert isinstance(plan_of(weight=name).layers[0].weight, TernaryMethod)
    codes = layer.weight_quantizer.codes(layer.master_weight)
    assert torch.equal(codes.dequantize(), codes.codes.float() * codes.scale)
    assert torch.equal(codes.dequantize(), layer.quantized_weight())
