"""Accounts of plans that allocate bits: by the mean, by layer, and where a mean is not enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from robuq_bench.accounting.account import (
    account,
    dit_layer_inputs,
    dit_layer_weights,
    dit_structure,
    packing_table,
)
from robuq_bench.accounting.structure import allocatable
from robuq_bench.config import ModelConfig, Plan, load_plan
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_

WIDTH, TOKENS = 48, 16  # of `model_config`
A8 = {"method": "rtn", "bits": 8}


def plan_of(*rules: dict[str, Any], **sections: Any) -> Plan:
    named = [{"name": f"rule{i}", **rule} for i, rule in enumerate(rules)]
    return Plan.model_validate({"name": "mine", "layers": named, **sections})


def test_bits_that_a_quantizer_is_not_defined_at_have_no_account(
    model_config: ModelConfig,
) -> None:
    plan = load_plan("bitnetv2-a4")
    names = [layer.name for layer in allocatable(dit_structure(model_config, plan), "activation")]
    assert account(model_config, plan, dict.fromkeys(names, 2))["mean_activation_bits"] == 2
    message = r"layer 'blocks\.0\.attn\.qkv': activation method 'bitnet' takes 2 to 8 bits, got 1"
    with pytest.raises(ConfigError, match=message):
        account(model_config, plan, dict.fromkeys(names, 1))


def weight_plan(cost: str = "weights", **activation: Any) -> Plan:
    bits = {"of": "weight", "mean": 3.0, "choices": [2, 3, 4], "cost": cost}
    adaln = {"kind": "adaLN", "fixed_bits": True, "weight": {"method": "rtn", "bits": 8}}
    block = {"weight": {"method": "rtn", "group": 16}, "activation": {**A8, **activation}}
    return plan_of(adaln, block, bits=bits)


def test_a_weight_budget_gives_what_any_allocation_that_spends_it_costs(
    model_config: ModelConfig,
) -> None:
    plan = weight_plan()
    sizes = dit_layer_weights(model_config)
    names = [layer.name for layer in allocatable(dit_structure(model_config, plan), "weight")]
    budget = account(model_config, plan)
    assert (budget["weight_bits"], budget["weight_bits_source"]) == (3, "budget")
    assert (budget["activation_bits_source"], budget["mean_activation_bits"]) == ("uniform", 8)
    assert budget["bits_by_kind"]["block"]["effective_weight_bits"] == 3 + 16 / 16
    assert budget["adaln_weight_bits"] == 8
    by_type = {"attn.qkv": 4, "attn.proj": 4, "mlp.fc1": 2, "mlp.fc2": 3}
    bits = {name: by_type[name.split(".", 2)[2]] for name in names}
    assert np.average(list(bits.values()), weights=[sizes[n] for n in names]) == 3
    found = account(model_config, plan, bits)
    assert found["weight_bits_source"] == "allocation"
    assert found["weight_bits"] is None
    for key in ("bit_ops", "effective_flops", "packed_bytes", "mean_activation_bits"):
        assert found[key] == pytest.approx(budget[key], rel=1e-12)
    for key, value in budget["bits_by_kind"]["block"].items():
        assert found["bits_by_kind"]["block"][key] == pytest.approx(value, rel=1e-12)
    other = account(model_config, plan, {**bits, "blocks.0.mlp.fc1": 3})
    assert other["bit_ops"] > budget["bit_ops"]
    with pytest.raises(UsageError, match=r"no bits for layer 'blocks\.1\.mlp\.fc2'"):
        account(model_config, plan, {n: b for n, b in bits.items() if n != names[-1]})
    with pytest.raises(ConfigError, match=r"'blocks\.0\.mlp\.fc1': .*'rtn' does not take 11 bits"):
        account(model_config, plan, {**bits, "blocks.0.mlp.fc1": 11})


def test_a_budget_that_does_not_decide_a_figure_is_refused(model_config: ModelConfig) -> None:
    """Means over inputs; and where the other operand's bits differ between the layers."""
    message = r"a mean of 3 weight bits over inputs does not decide bit operations"
    with pytest.raises(UsageError, match=message):
        account(model_config, weight_plan("inputs"))
    plan = weight_plan("macs")
    assert account(model_config, plan)["weight_bits"] == 3
    first, block = plan.layers
    uneven = [first.model_dump(), {**block.model_dump(), "name": "q", "match": ["*.qkv"],
              "activation": {**A8, "bits": 4}}, block.model_dump()]  # fmt: skip
    uneven_plan = Plan.model_validate({**plan.model_dump(), "layers": uneven})
    with pytest.raises(UsageError, match="a mean of 3 weight bits over macs does not decide"):
        account(model_config, uneven_plan)
    names = [layer.name for layer in allocatable(dit_structure(model_config, plan), "weight")]
    assert account(model_config, uneven_plan, dict.fromkeys(names, 3))["weight_bits"] == 3
    # Bits of activations over inputs: the same, but files hold none of them.
    over_inputs = Plan.model_validate(
        {**load_plan("a2").model_dump(), "bits": {"mean": 2.0, "cost": "inputs"}}
    )
    with pytest.raises(UsageError, match="a mean of 2 activation bits over inputs"):
        account(model_config, over_inputs)
    assert packing_table(model_config, over_inputs) == packing_table(model_config, load_plan("a2"))


@pytest.mark.parametrize("of", ["activation", "weight"])
def test_allocatable_layers_are_those_of_the_converted_model(
    model_config: ModelConfig, of: str
) -> None:
    plan = plan_of(
        {"match": "*.qkv", "weight": {"method": "ternary-twn"}, "activation": A8},
        {"match": "*.proj", "fixed_bits": True, "weight": {"method": "rtn"}, "activation": A8},
        {"match": "*.fc1", "weight": {"method": "rtn"}},
        {"activation": A8},
    )
    model = quantize_(DiT.from_config(model_config), plan)
    found = allocatable(dit_structure(model_config, plan), of)  # type: ignore[arg-type]
    assert [layer.name for layer in found] == allocatable_layers(model, of)


def test_costs_of_an_allocation_by_layer(model_config: ModelConfig) -> None:
    weights, inputs = dit_layer_weights(model_config), dit_layer_inputs(model_config)
    linears = {
        name: module
        for name, module in DiT.from_config(model_config).named_modules()
        if hasattr(module, "in_features")
    }
    assert weights == {name: module.weight.numel() for name, module in linears.items()}  # type: ignore[union-attr]
    assert inputs["blocks.1.mlp.fc2"] == TOKENS * 4 * WIDTH
    assert inputs["blocks.1.adaLN_modulation.1"] == WIDTH
