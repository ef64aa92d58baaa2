"""`plans show NAME` and `plans NAME --on WORKLOAD --layers`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import load_plan, load_workload
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_, quantized_layers

MIXED = """
[[layers]]
name = "keep"
match = "*.0.attn.*"

[[layers]]
name = "mlp"
match = "*.mlp.*"
rotation = { method = "block-hadamard", block = 16 }
branch = { method = "svd", rank = 4 }
weight = { method = "rtn", bits = 4, group = 16, symmetric = false }
activation = { method = "percentile", bits = 8, q = 0.999 }

[[layers]]
name = "rest"
weight = { method = "ternary-twn" }
"""


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    return str(path)


def lines(outcome: Any) -> dict[str, str]:
    """Lines of a table by their first word."""
    assert outcome.code == 0, outcome.err
    return {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}


def test_plans_show_prints_the_resolved_rules(bench: Any) -> None:
    outcome = bench("plans", "show", "a2")
    assert (outcome.code, outcome.out) == (0, bench("plans", "a2").out)
    plan = tomllib.loads(outcome.out)
    assert [rule["name"] for rule in plan["layers"]] == ["adaln", "block"]
    # what the plan's file does not say: a2 extends a4
    assert plan["layers"][1]["branch"]["rank"] == 16
    assert plan["layers"][1]["branch"]["at_width"] == 1152
    assert plan["bits"]["solver"] == "exact"
    assert (
        bench("plans", "show", "a2", "--json").document == bench("plans", "a2", "--json").document
    )


@pytest.mark.parametrize("name", ["a2", "bitnetv2-a4", "rtn-w4a4", "fp"])
def test_layers_are_those_of_the_converted_model(bench: Any, name: str) -> None:
    document = bench("plans", name, "--on", "digits", "--layers", "--json").document
    assert (document["plan"], document["workload"]) == (name, "digits")
    model = quantize_(DiT.from_config(load_workload("digits").model), load_plan(name))
    converted = quantized_layers(model)
    rows = {row["layer"]: row for row in document["layers"]}
    assert {key for key, row in rows.items() if row["kept"] is None} == set(converted)
    for layer_name, layer in converted.items():
        methods = {slot: method.model_dump() for slot, method in layer.methods.items()}
        assert rows[layer_name]["slots"] == methods
        assert rows[layer_name]["kind"] == ("adaLN" if "adaLN" in layer_name else "block")
        if name == "a2" and layer.chooses:
            assert rows[layer_name]["activation_bits"] is None
            assert rows[layer_name]["choices"] == [1, 2, 3, 4]
        else:
            assert rows[layer_name]["activation_bits"] == layer.activation_bits
            assert rows[layer_name]["choices"] is None
        rank = 0 if layer.branch is None else layer.branch.up.shape[1]
        assert rows[layer_name]["branch_rank"] == rank == (2 if name == "a2" else 0)
    assert len(rows) == 24
    assert rows["final_layer.linear"]["kept"] == "is outside the blocks (blocks)"


def test_the_table_says_methods_parameters_bits_and_why_a_layer_is_kept(
    bench: Any, mixed: str
) -> None:
    found = lines(bench("plans", mixed, "--layers"))  # digits: width 144, 16 tokens
    fc2 = found["blocks.1.mlp.fc2"]
    # 4 bits, and per 16 weights a scale and a zero point of 16 bits each
    for text in ("block-hadamard(block=16)", "svd(rank=4)", "rtn(symmetric=false, group=16)",
                 "4 (6)", "percentile(q=0.999)", "8 (8)"):  # fmt: skip
        assert text in fc2, text
    qkv = found["blocks.1.attn.qkv"]
    assert "ternary-twn" in qkv
    assert "1.585 (1.696)" in qkv  # log2(3) + 16 / 144
    assert "32 (32)" in qkv
    assert found["blocks.0.attn.qkv"].endswith("is kept by rule 'keep'")
    assert "of kind adaLN, and no rule" in found["blocks.0.adaLN_modulation.1"]
    assert "scaling" not in found["layer"]  # no layer has one
    assert found["14"] == "14 of 24 linear layers are quantized"


def test_what_an_allocation_decides_is_open_until_there_is_a_file(
    bench: Any, tmp_path: Path
) -> None:
    found = lines(bench("plans", "a2", "--layers"))
    assert found["blocks.0.mlp.fc2"].endswith("robust-midtread  1 to 4")
    assert "4 (4.222)" in found["blocks.0.adaLN_modulation.1"]  # fixed_bits
    assert found["bits"].startswith("bits of activations: 2 on average over MACs, by epsilon_mse")
    names = [f"blocks.{i}.{kind}" for i in range(4)
             for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
    path = tmp_path / "bits.csv"
    path.write_text("layer,bits\n" + "".join(f"{n},{1 + i % 3}\n" for i, n in enumerate(names)))
    (tmp_path / "p.toml").write_text(f'extends = "a4"\n[bits]\npath = "{path}"\n')
    rows = bench("plans", str(tmp_path / "p.toml"), "--layers", "--json").document["layers"]
    bits = {row["layer"]: row["activation_bits"] for row in rows if row["kept"] is None}
    assert [bits[name] for name in names] == [1 + i % 3 for i in range(16)]
    assert "bits" not in lines(bench("plans", str(tmp_path / "p.toml"), "--layers"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "a22"], "unknown plan 'a22'; did you mean 'a2'?"),
        (["a22", "--layers"], "unknown plan 'a22'; did you mean 'a2'?"),
        (["a2", "--on", "digit", "--layers"], "unknown workload 'digit'; did you mean 'digits'?"),
        (["a2", "--on", "digits"], "add --layers"),
        (["--layers"], "--layers shows one plan"),
        (["show"], "`plans show` needs the name or file of a plan"),
        (["a2", "a3"], "one plan at a time, got a2 a3"),
    ],
)
def test_slips_are_answered(bench: Any, arguments: list[str], message: str) -> None:
    outcome = bench("plans", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
