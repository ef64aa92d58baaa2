"""What an account makes of what methods say: hand counts, converted models, and silence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.accounting.account import (
    account,
    dit_layer_macs,
    packing_table,
    with_branch_rank,
)
from robuq_bench.config import ModelConfig, Plan, load_plan, load_workload
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods import (
    ActivationMethod,
    BranchMethod,
    RotationMethod,
    WeightMethod,
    register_method,
)
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_, quantized_layers

WIDTH, DEPTH, TOKENS = 48, 2, 16  # of `model_config`
# Rows and columns of each layer of a block, in units of the width.
SIZES = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
TERNARY = math.log2(3)
W4_GROUP_16 = {"method": "rtn", "bits": 4, "group": 16, "symmetric": False}
A8 = {"method": "rtn", "bits": 8}


def plan_of(*rules: dict[str, Any], **sections: Any) -> Plan:
    named = [{"name": f"rule{i}", **rule} for i, rule in enumerate(rules)]
    return Plan.model_validate({"name": "mine", "layers": named, **sections})


def rows(config: ModelConfig, plan: Plan) -> dict[str, dict[str, Any]]:
    return {row["packing"]: row for row in packing_table(config, plan)}


def test_groups_of_sixteen_with_zero_points_cost_two_bits_a_weight(
    model_config: ModelConfig,
) -> None:
    """4 bits a code, and per 16 codes a scale and a zero point of 16 bits each: 4 + 32/16 = 6."""
    plan = plan_of({"weight": W4_GROUP_16, "activation": {**A8, "symmetric": False}})
    found = account(model_config, plan)
    block = found["bits_by_kind"]["block"]
    assert (block["layers"], block["quantized"]) == (8, 8)
    assert (block["weight_bits"], block["effective_weight_bits"]) == (4, 6)
    assert (found["weight_bits"], found["adaln_weight_bits"]) == (4, 32)
    weights = DEPTH * 12 * WIDTH**2
    assert found["bit_ops_by_part"]["block_linears"] == TOKENS * weights * 4 * 8
    # A scale and a zero point a token of 48, or of 192 in fc2, which has 4 of 12 parts of the MACs.
    effective = 8 + (32 / WIDTH) * 8 / 12 + (32 / (4 * WIDTH)) * 4 / 12
    assert block["effective_activation_bits"] == pytest.approx(effective, rel=1e-14)
    assert block["activation_bits"] == found["mean_activation_bits"] == 8
    assert found["packing"] == "dense/fp32/fp32"
    for name, row in rows(model_config, plan).items():
        assert row["codes_bytes"] == weights / 2
        size = 4 if name.endswith("fp32") else 2
        assert row["scales_bytes"] == size * 2 * weights / 16
    assert all(row["published"] is None for row in found["packing_table"])


@pytest.mark.parametrize(
    ("method", "scales"), [("ternary-twn", lambda out: out), ("ternary-absmean", lambda out: 1)]
)
def test_ternary_layers_by_hand(model_config: ModelConfig, method: str, scales: Any) -> None:
    found = account(model_config, plan_of({"weight": {"method": method}, "activation": A8}))
    counted = sum(scales(rows * WIDTH) for rows, _ in SIZES.values())
    effective = TERNARY + 16 * counted / (12 * WIDTH**2)
    assert found["weight_bits"] == TERNARY
    block = found["bits_by_kind"]["block"]
    assert block["effective_weight_bits"] == pytest.approx(effective, rel=1e-14)


@pytest.mark.parametrize(
    "weight",
    [
        {"method": "rtn", "bits": 3, "group": 24},
        {"method": "rtn", "bits": 5, "symmetric": False},
        {"method": "rtn", "bits": 8, "per": "tensor"},
        W4_GROUP_16,
        {"method": "ternary-twn"},
    ],
)
def test_codes_and_scales_are_those_of_the_converted_model(
    model_config: ModelConfig, weight: dict[str, Any]
) -> None:
    plan = plan_of({"weight": weight, "rotation": {"method": "block-hadamard", "block": 16,
                    "signs": True}})  # fmt: skip
    model = quantize_(DiT.from_config(model_config), plan)
    row = next(iter(rows(model_config, plan).values()))
    assert row["packing"] in ("dense/fp32/fp32", "ideal/fp32/fp32")  # neither rounds up to bytes
    codes, numbers = 0, 0
    assert len(quantized_layers(model)) == 8
    for layer in quantized_layers(model).values():
        found = layer.weight_quantizer.codes(layer.master_weight)  # type: ignore[union-attr, operator]
        bits = weight.get("bits", TERNARY)
        codes += math.ceil(found.codes.numel() * bits / 8)
        numbers += found.scale.numel()
        if getattr(found, "zero", None) is not None:
            numbers += found.zero.numel()
    assert (row["codes_bytes"], row["scales_bytes"]) == (codes, 4 * numbers)
    assert row["signs_bytes"] == sum(c * WIDTH for _, c in SIZES.values()) * DEPTH / 8
    parameters = dict(model.named_parameters())
    rest = sum(p.numel() for n, p in parameters.items() if not n.endswith("master_weight"))
    assert row["rest_bytes"] == 4 * rest


def test_means_are_over_weights_and_over_macs(model_config: ModelConfig) -> None:
    """Of all kinds: a modulation layer has 6 of a block's 18 units of weights, and one token."""
    plan = plan_of(
        {"kind": "adaLN", "weight": {"method": "rtn", "bits": 8}, "activation": A8},
        {"weight": W4_GROUP_16, "activation": {**A8, "bits": 4}},
    )
    every = account(model_config, plan)["bits_by_kind"]["all"]
    assert (every["layers"], every["quantized"]) == (10, 10)
    assert every["weight_bits"] == pytest.approx((12 * 4 + 6 * 8) / 18)
    assert every["effective_weight_bits"] == pytest.approx((12 * 6 + 6 * (8 + 16 / WIDTH)) / 18)
    macs = 12 * TOKENS, 6
    assert every["activation_bits"] == pytest.approx((macs[0] * 4 + macs[1] * 8) / sum(macs))


def test_ternary_and_uniform_layers_in_one_plan(model_config: ModelConfig) -> None:
    plan = plan_of(
        {"match": "*.mlp.*", "weight": {"method": "ternary-twn"}, "activation": A8},
        {"match": "*.proj", "weight": W4_GROUP_16, "activation": {**A8, "bits": 4}},
        {"match": "*.qkv", "weight": {"method": "rtn", "bits": 6}},
    )
    found = account(model_config, plan)
    unit = WIDTH**2
    macs = DEPTH * TOKENS * unit
    assert found["weight_bits"] is None
    assert found["bit_ops"] == pytest.approx(macs * (8 * TERNARY * 8 + 4 * 4))
    # The inputs of qkv are in full precision: so are its products.
    linears = found["effective_flops_by_part"]["block_linears"]
    assert linears == pytest.approx(macs * (8 * TERNARY * 8 + 16) / 64 + 3 * macs)
    assert found["mean_activation_bits"] == pytest.approx((8 * 8 + 4 + 3 * 32) / 12)
    assert found["mean_activation_bits_by_type"]["qkv"] == 32
    block = found["bits_by_kind"]["block"]
    assert block["weight_bits"] == pytest.approx((8 * TERNARY + 4 + 3 * 6) / 12)
    scales = 16 * (5 * WIDTH + 2 * unit / 16 + 3 * WIDTH)
    stored = 8 * TERNARY * unit + 4 * unit + 18 * unit + scales
    assert block["effective_weight_bits"] == pytest.approx(stored / (12 * unit))
    table = {row["packing"]: row for row in found["packing_table"]}
    assert found["packing"] == "base3/fp32/fp32"
    uniform = DEPTH * (unit * 4 + 3 * unit * 6) / 8
    assert table["base3/fp32/fp32"]["codes_bytes"] - uniform == DEPTH * 2 * math.ceil(4 * unit / 5)
    # Rows of 128 codes for the kernels: 48 inputs take one block, 192 take two.
    assert table["2bit/fp16/fp16"]["codes_bytes"] - uniform == DEPTH * 32 * (4 + 2) * WIDTH
    # The published readings are about ternary weights alone.
    assert not any(name.startswith(("reading", "bound")) for name in table)


PATTERNS = [
    {},
    {"weight": {"method": "ternary-absmean"}, "activation": A8},
    {"weight": {"method": "rtn", "bits": 2, "group": 8}},
    {"weight": {"method": "rtn", "bits": 7}, "activation": {"method": "lsq", "bits": 3}},
    {"activation": {"method": "minmax", "bits": 5}},
]


@settings(max_examples=25)
@given(st.lists(st.sampled_from(range(len(PATTERNS))), min_size=8, max_size=8))
def test_any_mixture_is_the_sum_of_its_layers(choices: list[int]) -> None:
    config = ModelConfig.model_validate(
        {**load_workload("digits").model.model_dump(), "hidden_size": WIDTH, "depth": DEPTH,
         "num_heads": 2}
    )  # fmt: skip
    names = [f"blocks.{i}.{kind}" for i in range(DEPTH) for kind in SIZES]
    plan = plan_of(*({"match": n, **PATTERNS[c]} for n, c in zip(names, choices, strict=True)))
    bit_ops, full, codes = 0.0, 0, 0
    for name, choice in zip(names, choices, strict=True):
        out_units, in_units = SIZES[name.split(".", 2)[2]]
        weights = out_units * in_units * WIDTH**2
        bits = (0.0, TERNARY, 2.0, 7.0, 0.0)[choice]
        activation = (0, 8, 0, 3, 5)[choice]
        bit_ops += TOKENS * weights * bits * activation
        full += TOKENS * weights * (bits * activation == 0)
        width = 1.6 if choice == 1 else bits
        codes += math.ceil(round(weights * width, 6) / 8)
    found = account(config, plan)
    assert found["bit_ops_by_part"]["block_linears"] == pytest.approx(bit_ops)
    flops = found["effective_flops_by_part"]["block_linears"]
    assert flops == pytest.approx(bit_ops / 64 + full)
    chosen = next(r for r in found["packing_table"] if r["packing"] == found["packing"])
    assert chosen["codes_bytes"] == codes
    for entry in found["bits_by_kind"].values():
        for of in ("weight", "activation"):
            assert entry[f"effective_{of}_bits"] >= entry[f"{of}_bits"] > 0
        assert entry["quantized"] == sum(choice != 0 for choice in choices)


# Methods that say nothing, or nonsense.


class SilentWeight(WeightMethod):
    """Says nothing of itself."""


class HalfSilentWeight(WeightMethod):
    def nominal_bits(self) -> float:
        return 4.0


class ImpossibleWeight(HalfSilentWeight):
    def storage_bits(self, out_features: int, in_features: int) -> float:
        return 3.0 * out_features * in_features


class SilentRotation(RotationMethod):
    """Says nothing of itself."""


class SilentBranch(BranchMethod):
    """Says nothing of itself."""


class SilentActivation(ActivationMethod):
    """Says nothing of itself."""


class NegativeActivation(ActivationMethod):
    def scales_per_token(self, in_features: int) -> float:
        return -1.0


@pytest.fixture
def own_methods() -> Iterator[None]:
    from robuq_bench import methods

    known = dict(methods._registered)
    for name, method in (
        ("silent", SilentWeight),
        ("half-silent", HalfSilentWeight),
        ("impossible", ImpossibleWeight),
        ("silent", SilentRotation),
        ("silent", SilentBranch),
        ("silent", SilentActivation),
        ("negative", NegativeActivation),
    ):
        register_method(name, method)
    yield
    methods._registered.clear()
    methods._registered.update(known)


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize(
    ("slot", "method", "message"),
    [
        ("weight", "silent", r"weight method 'silent' does not say its nominal_bits; define "
         r"SilentWeight\.nominal_bits"),
        ("weight", "half-silent", "weight method 'half-silent' does not say its storage_bits"),
        ("weight", "impossible", "weight method 'impossible' says 20736 storage_bits for 144 x 48"),
        ("rotation", "silent", "rotation method 'silent' does not say its stored_bits"),
        ("branch", "silent", "branch method 'silent' does not say its values"),
        ("activation", "silent", "activation method 'silent' does not say its scales_per_token"),
        ("activation", "negative", "activation method 'negative' says -1 scales_per_token"),
    ],
)  # fmt: skip
def test_what_a_method_does_not_say_is_never_guessed(
    model_config: ModelConfig, slot: str, method: str, message: str
) -> None:
    plan = plan_of({"weight": {"method": "ternary-twn"}, slot: {"method": method}})
    for call in (account, packing_table):
        with pytest.raises(UsageError, match=rf"layer 'blocks\.0\.attn\.qkv': {message}"):
            call(model_config, plan)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"weight": {"method": "rtn", "group": 20}}, "group = 20 does not divide the 48 inputs"),
        ({"branch": {"method": "svd", "rank": 49}}, "branch.rank 49 exceeds the smaller side"),
    ],
)
def test_a_method_that_cannot_serve_a_layer_has_no_account(
    model_config: ModelConfig, slots: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"layer 'blocks\.0\.attn\.qkv': .*{message}"):
        account(model_config, plan_of(slots))


def test_scalings_and_branches_are_counted(model_config: ModelConfig) -> None:
    slots = {"weight": {"method": "rtn"}, "activation": A8}
    plain = rows(model_config, plan_of(slots))
    inputs = DEPTH * (3 + 4) * WIDTH
    scaled = rows(model_config, plan_of({**slots, "scaling": {"method": "smooth"}}))
    for name, size in (("dense/fp32/fp32", 4), ("dense/fp16/fp16", 2)):
        assert scaled[name]["scales_bytes"] - plain[name]["scales_bytes"] == size * inputs
        assert scaled[name]["codes_bytes"] == plain[name]["codes_bytes"]
    branched = plan_of({**slots, "branch": {"method": "svd", "rank": 3}})
    values = 3 * DEPTH * WIDTH * (4 + 2 + 5 + 5)
    found = account(model_config, branched)
    assert found["macs_by_part"]["low_rank"] == TOKENS * values
    assert found["low_rank_rank"] == 3
    table = rows(model_config, branched)
    assert table["dense/fp16/fp16"]["low_rank_bytes"] == 2 * values
    assert table["dense/int8/int8"]["low_rank_bytes"] == values + 8 * 3 * 4 * DEPTH


def test_a_branch_of_another_form_has_no_int8_packing(
    model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robuq_bench import methods

    class Sparse(BranchMethod):
        rank: int = 2  # of something, but not of two factors

        def values(self, out_features: int, in_features: int) -> int:
            return 7

    monkeypatch.setattr(methods, "_registered", {})
    register_method("sparse", Sparse)
    plan = plan_of({"weight": {"method": "ternary-twn"}, "branch": {"method": "sparse"}})
    found = account(model_config, plan)
    assert found["low_rank_rank"] is None
    assert found["macs_by_part"]["low_rank"] == TOKENS * 7 * 8
    assert not any("int8" in row["packing"] for row in found["packing_table"])
    # It says nothing of a rank, so none can be given to it.
    assert with_branch_rank(plan, 16) == plan
    big = {**load_workload("imagenet256").model.model_dump()}
    assert account(ModelConfig.model_validate(big), plan)["at_published_rank"] == {}


def test_layers_outside_the_blocks_count_once(model_config: ModelConfig) -> None:
    rule = {"weight": {"method": "rtn"}, "activation": A8}
    plain = account(model_config, plan_of(rule))
    head = {"match": "final_layer.linear", "kind": "other", **rule}
    found = account(model_config, plan_of(head, rule))
    macs = dit_layer_macs(model_config)["final_layer.linear"]
    assert found["macs"] == plain["macs"]
    assert found["macs_by_part"]["other_linears"] == macs
    assert found["macs_by_part"]["other"] == plain["macs_by_part"]["other"] - macs
    assert found["bit_ops"] - plain["bit_ops"] == macs * 4 * 8
    assert found["parameters_by_group"] == plain["parameters_by_group"]
    assert found["mean_activation_bits"] == 8
    assert found["bits_by_kind"]["other"]["quantized"] == 1
    assert found["packed_bytes"] < plain["packed_bytes"]


def test_ranks_go_to_the_branches_that_are_there() -> None:
    a4 = load_plan("a4")
    assert with_branch_rank(with_branch_rank(a4, 8), 8) == with_branch_rank(a4, 8)
    assert {rule.branch for rule in with_branch_rank(a4, 0).layers} == {None}
    ranks = [rule.branch.rank for rule in with_branch_rank(a4, 5).layers]  # type: ignore[union-attr]
    assert ranks == [5, 5]
    bitnet = with_branch_rank(load_plan("bitnetv2-a4"), 16)
    assert all(rule.branch is not None for rule in bitnet.layers)
    one = plan_of(
        {"match": "*.proj"},
        {"match": "*.qkv", "branch": {"method": "svd", "rank": 2}},
        {"weight": {"method": "rtn"}},
    )
    kept, changed, alone = with_branch_rank(one, 16).layers
    assert (kept, alone) == (one.layers[0], one.layers[2])
    assert changed.branch.rank == 16  # type: ignore[union-attr]
