"""The account of a plan against PyTorch's FLOP counter, published sizes and hand counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from robuq_bench.accounting.account import (
    account,
    dit_layer_macs,
    layer_macs,
    packing_table,
    with_branch_rank,
)
from robuq_bench.allocation import mean_bits, mean_bits_by_type
from robuq_bench.config import ModelConfig, Plan, load_plan, load_workload
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder
from robuq_bench.models.dit import SIZES, DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, quantized_layers

LINEAR_UNITS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 4}


def changed(plan: Plan, rule: str = "block", **slots: object) -> Plan:
    """The plan with other methods in the slots of one rule."""
    rules = [
        {**own.model_dump(), **slots} if own.name == rule else own.model_dump()
        for own in plan.layers
    ]
    return Plan.model_validate({**plan.model_dump(), "layers": rules})


def dit_config(size: str = "XL", **changes: object) -> ModelConfig:
    fields = {**load_workload("imagenet256").model.model_dump(), **SIZES[size], **changes}
    return ModelConfig.model_validate(fields)


def tiny_config(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 2, "input_size": 8, "in_channels": 1}
    return dit_config("S", **{**sizes, "num_classes": 10, "learn_sigma": False, **changes})


def rows(config: ModelConfig, plan: Plan) -> dict[str, dict[str, object]]:
    return {str(row["packing"]): row for row in packing_table(config, plan)}


@pytest.fixture(scope="module")
def robuq() -> Plan:
    """RobuQ at the published rank of 16."""
    return with_branch_rank(load_plan("a4"), 16)


@pytest.mark.parametrize(("size", "millions"), [("S", 32.96), ("B", 130.5), ("L", 458.1)])
def test_parameters_of_the_published_sizes(size: str, millions: float) -> None:
    parameters = account(dit_config(size), load_plan("fp"))["parameters"]
    assert parameters / 1e6 == pytest.approx(millions, rel=4e-4)


def test_dit_xl_2_parameters_by_group(robuq: Plan) -> None:
    found = account(dit_config(), robuq)
    assert round(found["parameters"] / 1e6, 2) == 675.13
    groups = {name: round(count / 1e6, 2) for name, count in found["parameters_by_group"].items()}
    assert groups == {"block_linears": 445.91, "adaln_linears": 222.95, "rest": 6.27}
    assert found["full_precision_bytes"] / 2**20 == pytest.approx(2575.4, abs=0.05)
    assert (
        account(dit_config(), load_plan("fp"))["parameters_by_group"]
        == (found["parameters_by_group"])
    )


def test_dit_xl_2_macs_are_the_published_gflops() -> None:
    found = account(dit_config(), load_plan("fp"))
    assert round(found["macs"] / 1e9) == 119
    assert found["published"]["macs"]["value"] == 119e9
    # The DiT paper's table gives 118.64.
    assert found["macs"] / 1e9 == pytest.approx(118.64, rel=5e-4)


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(learn_sigma=True, patch_size=4)])
def test_macs_equal_pytorchs_flop_counter(config: ModelConfig) -> None:
    model = DiT.from_config(config)
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size)
    index = torch.zeros(3, dtype=torch.int64)
    # Only the plain attention is made of products that the counter knows on a CPU.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(x, index, index)
    found = account(config, load_plan("fp"))
    assert 2 * 3 * found["macs"] == counter.get_total_flops()


def test_layer_macs_per_image_do_not_depend_on_batch_or_quantization() -> None:
    config = tiny_config()
    model = DiT.from_config(config)

    def count(batch: int) -> dict[str, int]:
        x = torch.zeros(batch, 1, 8, 8)
        index = torch.zeros(batch, dtype=torch.int64)
        return layer_macs(model, (x, index, index))

    expected = dit_layer_macs(config)
    assert count(1) == count(5) == expected
    quantize_(model, load_plan("a4"))
    assert count(2) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_block_linears_cost_three_one_four_four() -> None:
    macs = dit_layer_macs(dit_config())
    for name, unit in LINEAR_UNITS.items():
        assert macs[f"blocks.27.{name}"] == unit * 256 * 1152**2
    assert macs["blocks.0.adaLN_modulation.1"] == 6 * 1152**2


def test_published_size_reductions_are_reproduced(robuq: Plan) -> None:
    table = rows(dit_config(), robuq)
    theory, checkpoint = table["reading-13.2x"], table["reading-15.2x"]
    assert theory["total_mib"] == pytest.approx(195.2, abs=0.05)
    assert round(float(theory["size_reduction"]), 1) == theory["published"] == 13.2
    assert checkpoint["size_reduction"] == pytest.approx(15.23, abs=0.005)
    assert checkpoint["total_mib"] == pytest.approx(169.1, abs=0.05)
    assert checkpoint["published"] == 15.2
    assert table["bound-2bit"]["size_reduction"] == pytest.approx(15.0, abs=0.05)


def test_another_rank_than_the_published_one_is_stated_with_the_numbers_at_that_one() -> None:
    plan = with_branch_rank(load_plan("a2"), 8)
    found, published = (
        account(dit_config(), plan),
        account(dit_config(), with_branch_rank(plan, 16)),
    )
    assert (found["low_rank_rank"], published["low_rank_rank"]) == (8, 16)
    names = ("low_rank_rank", "compute_reduction", "packed_bytes", "size_reduction")
    assert found["at_published_rank"] == {name: published[name] for name in names}
    for row, other in zip(found["packing_table"], published["packing_table"], strict=True):
        assert row["size_reduction_at_rank_16"] == other["size_reduction"]
    reading = {row["packing"]: row for row in found["packing_table"]}["reading-13.2x"]
    assert round(reading["size_reduction"], 2) == 14.93
    assert round(reading["size_reduction_at_rank_16"], 1) == reading["published"] == 13.2
    # Nothing to say where nothing is published: at that rank, of another model, of no ternary plan.
    for model, other_plan in (
        (dit_config(), with_branch_rank(plan, 16)),
        (tiny_config(), plan),
        (dit_config(), load_plan("fp")),
    ):
        quiet = account(model, other_plan)
        assert quiet["at_published_rank"] == {}
        assert not any("size_reduction_at_rank_16" in row for row in quiet["packing_table"])


def test_weight_bits_are_those_of_the_block_linears() -> None:
    plan = load_plan("a4")
    found = account(tiny_config(), plan)
    assert found["weight_bits"] == found["adaln_weight_bits"] == math.log2(3)
    found = account(tiny_config(), changed(plan, weight="none"))
    assert (found["weight_bits"], found["adaln_weight_bits"]) == (32, math.log2(3))
    assert found["bit_ops_by_part"]["block_linears"] == 0


def test_packed_parts_add_up_and_shrink_with_precision(robuq: Plan) -> None:
    table = rows(dit_config(), robuq)
    for row in table.values():
        parts = [v for k, v in row.items() if k.endswith("_bytes") and k != "total_bytes"]
        assert sum(parts) == row["total_bytes"]
    base3 = table["base3/fp32/fp32"]
    # Five codes fill a byte; DiT-XL/2's weights are all multiples of five codes away from that.
    weights = 28 * (12 + 6) * 1152**2
    assert weights / 5 <= base3["codes_bytes"] < weights / 5 + 28 * 5
    assert table["2bit/fp32/fp32"]["codes_bytes"] == weights / 4
    assert base3["scales_bytes"] == 4 * 28 * (3 + 1 + 4 + 1 + 6) * 1152
    assert base3["low_rank_bytes"] == 4 * 28 * 16 * (4 + 2 + 5 + 5 + 7) * 1152
    assert base3["signs_bytes"] == 28 * (1152 // 8) * 8
    ideal, packed = table["ideal/fp16/fp16"], table["base3/fp16/fp16"]
    assert ideal["total_bytes"] < packed["total_bytes"] < base3["total_bytes"]
    assert packed["low_rank_bytes"] * 2 == base3["low_rank_bytes"]


def test_packed_parts_match_the_quantized_model() -> None:
    config, plan = tiny_config(), with_branch_rank(load_plan("a4"), 4)
    model = quantize_(DiT.from_config(config), plan)
    layers = quantized_layers(model).values()
    row = rows(config, plan)["base3/fp32/fp32"]
    assert row["codes_bytes"] == sum(math.ceil(layer.weight.numel() / 5) for layer in layers)
    low_rank = [p for n, p in model.named_parameters() if n.endswith((".up", ".down"))]
    assert row["low_rank_bytes"] == 4 * sum(p.numel() for p in low_rank)
    assert row["signs_bytes"] == sum(
        math.ceil(layer.rotation.signs.numel() / 8)  # type: ignore[union-attr, operator]
        for layer in layers
    )
    assert row["scales_bytes"] == 4 * sum(layer.out_features for layer in layers)
    codes = {id(layer.master_weight) for layer in layers} | {id(p) for p in low_rank}
    others = [p for p in model.parameters() if id(p) not in codes]
    assert row["rest_bytes"] == 4 * sum(p.numel() for p in others)


@pytest.mark.parametrize("name", ["a4", "baseline-a2", "bitnetv2-a4"])
def test_layer_groups_match_the_quantized_model(name: str) -> None:
    config, plan = tiny_config(), with_branch_rank(load_plan(name), 0)
    model = quantize_(DiT.from_config(config), plan)
    (own,) = {rule.activation.bits for rule in plan.layers if rule.name != "adaln"}  # type: ignore[union-attr]
    bits = dict.fromkeys(allocatable_layers(model), own)
    assert account(config, plan, bits)["mean_activation_bits"] == own
    scales = rows(config, plan)["base3/fp32/fp32"]["scales_bytes"]
    per_tensor = name == "bitnetv2-a4"
    layers = quantized_layers(model).values()
    assert scales == 4 * sum(1 if per_tensor else layer.out_features for layer in layers)


def test_full_precision_costs_what_it_costs() -> None:
    found = account(dit_config(), load_plan("fp"))
    assert found["compute_reduction"] == found["size_reduction"] == 1.0
    assert found["bit_ops"] == found["rotation_additions"] == 0
    assert found["effective_flops"] == found["macs"]
    assert found["mean_activation_bits"] == found["weight_bits"] == 32
    table = rows(dit_config(), load_plan("fp"))
    assert {name: row["size_reduction"] for name, row in table.items()} == {"fp32": 1, "fp16": 2}


def test_bit_operations_by_hand(robuq: Plan) -> None:
    found = account(dit_config(), robuq)
    linear, adaln, attention = 28 * 12 * 256 * 1152**2, 28 * 6 * 1152**2, 28 * 2 * 256**2 * 1152
    ternary = math.log2(3)
    assert found["bit_ops_by_part"] == pytest.approx(
        {
            "block_linears": linear * ternary * 4,
            "adaln_linears": adaln * ternary * 4,
            "attention": attention * 8 * 8,
        }
    )
    low_rank = 28 * 16 * 1152 * (256 * (4 + 2 + 5 + 5) + 7)
    other = found["macs_by_part"]["other"]
    assert found["macs_by_part"]["low_rank"] == low_rank
    assert found["effective_flops"] == pytest.approx(found["bit_ops"] / 64 + low_rank + other)
    assert found["compute_reduction"] == found["macs"] / found["effective_flops"]
    # 1152 = 32 * 36 and 4608 = 8 * 16 * 36: three inputs of the first width, one of the second.
    rotated = 256 * (3 * 1152 * (32 + 36) + 4608 * (8 + 16 + 36)) + 1152 * (32 + 36)
    assert found["rotation_additions"] == 28 * rotated
    assert found["compute_reduction_with_rotation"] < found["compute_reduction"]


def test_unquantized_parts_stay_full_precision(robuq: Plan) -> None:
    config = tiny_config()
    bitnet = account(config, load_plan("bitnetv2-a4"))
    assert bitnet["bit_ops_by_part"]["attention"] == 0
    assert bitnet["effective_flops_by_part"]["attention"] == bitnet["macs_by_part"]["attention"]
    plain = robuq.model_copy(
        update={"layers": tuple(rule for rule in robuq.layers if rule.name != "adaln")}
    )
    found = account(config, plain)
    assert found["bit_ops_by_part"]["adaln_linears"] == 0
    assert found["effective_flops_by_part"]["adaln_linears"] == 2 * 6 * 48**2
    assert found["macs_by_part"]["low_rank"] < account(config, robuq)["macs_by_part"]["low_rank"]
    weights_only = changed(plain, activation="none", rotation="none")
    attention = weights_only.attention.model_copy(update={"matmul_bits": None})
    found = account(config, weights_only.model_copy(update={"attention": attention}))
    assert found["bit_ops"] == 0
    assert found["mean_activation_bits"] == 32
    assert found["size_reduction"] > 1


def test_a_spent_budget_gives_the_bit_operations_of_any_allocation() -> None:
    config, plan = tiny_config(), load_plan("a2")
    macs = {n: m for n, m in dit_layer_macs(config).items() if n.endswith(tuple(LINEAR_UNITS))}
    by_type = {"attn.qkv": 2, "attn.proj": 2, "mlp.fc1": 3, "mlp.fc2": 1}
    bits = {name: by_type[name.split(".", 2)[2]] for name in macs}
    assert mean_bits(bits, macs) == 2.0
    allocated, budget = account(config, plan, bits), account(config, plan)
    assert allocated["bit_ops"] == pytest.approx(budget["bit_ops"])
    assert allocated["mean_activation_bits"] == budget["mean_activation_bits"] == 2.0
    assert budget["mean_activation_bits_by_type"] is None
    assert allocated["mean_activation_bits_by_type"] == mean_bits_by_type(bits)
    sources = [found["activation_bits_source"] for found in (allocated, budget)]
    assert sources == ["allocation", "budget"]
    thrifty = {**bits, "blocks.0.mlp.fc1": 1}
    assert account(config, plan, thrifty)["bit_ops"] < budget["bit_ops"]


@pytest.mark.parametrize("name", ["fp", "a8", "a2", "baseline-a3", "bitnetv2-a3"])
def test_account_is_json(name: str) -> None:
    found = account(tiny_config(), load_plan(name))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["published"] == {}
    assert not {"key", "kind"} & found.keys()


def drop_one(bits: dict[str, int]) -> dict[str, int]:
    return {name: b for name, b in bits.items() if name != "blocks.1.mlp.fc2"}


def misspell(bits: dict[str, int]) -> dict[str, int]:
    return {**bits, "blocks.1.mlp.fc3": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"no bits for layer 'blocks\.1\.mlp\.fc2'"),
        (misspell, r"unknown layer 'blocks\.1\.mlp\.fc3'; did you mean"),
    ],
)
def test_allocation_must_name_every_layer(
    change: Callable[[dict[str, int]], dict[str, int]], message: str
) -> None:
    bits = {f"blocks.{i}.{name}": 2 for i in range(2) for name in LINEAR_UNITS}
    account(tiny_config(), load_plan("a2"), bits)
    with pytest.raises(UsageError, match=message):
        account(tiny_config(), load_plan("a2"), change(bits))


def test_plan_with_an_allocation_file_needs_its_bits(robuq: Plan) -> None:
    plan = Plan.model_validate({**robuq.model_dump(), "bits": {"path": "bits.toml"}})
    with pytest.raises(UsageError, match="reads its bits from a file: pass bits_by_layer"):
        account(tiny_config(), plan)
    assert packing_table(tiny_config(), plan) == packing_table(tiny_config(), robuq)


def test_width_without_a_hadamard_matrix_is_refused(robuq: Plan) -> None:
    config = tiny_config(hidden_size=4 * 47, num_heads=2)
    with pytest.raises(UnsupportedHadamardOrder, match="188"):
        account(config, robuq)


def test_a_dual_rotation_costs_products_of_full_precision() -> None:
    rule = {"weight": {"method": "rtn", "bits": 4}, "activation": {"method": "rtn", "bits": 4}}
    dual = {**rule, "rotation": {"method": "dual-rotation", "block": 36}}
    model = load_workload("digits").model
    without, with_it = (
        account(model, Plan.model_validate({"name": "a", "layers": [each]}))
        for each in (rule, dual)
    )
    tokens, width, depth = 16, 144, model.depth
    macs = depth * tokens * (3 * 2 * width * 36 + 2 * 4 * width * 36)  # qkv, proj, fc1; fc2
    assert with_it["macs_by_part"]["rotation"] == macs
    assert with_it["effective_flops"] == pytest.approx(without["effective_flops"] + macs)
    assert with_it["rotation_additions"] == 0
