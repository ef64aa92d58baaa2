"""Plans of run folders: both schemas in one form, and what the report says of them."""

from __future__ import annotations

import hashlib
import json
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reports import build_report
from reports.loading import find_runs
from reports.plans import read_plan
from reports.protocols import group_runs
from reports.settings import (
    Family,
    activation_bits,
    comparable,
    differing,
    family,
    recipes,
    weight_precision,
)
from robuq_bench.config import load_workload, plan_names, resolve
from robuq_bench.config.plan import Plan
from robuq_bench.config.resolve import to_toml
from robuq_bench.errors import ConfigError
from robuq_bench.methods import read_method
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.selection import is_modulation

DIT = {"kind": "dit", "depth": 4}
TYPES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{i}.{name}" for i in range(4) for name in TYPES]
MODULATION = [f"blocks.{i}.adaLN_modulation.1" for i in range(4)]
PROJECTIONS = ["*.proj", "*.fc2", "*.to_out.0", "*.ff.net.2"]


def older(
    name,
    weight="ternary-twn",
    activation="robust-midtread",
    bits=4,
    rotation="randomized-hadamard",
    rotated=("*",),
    rank=8,
    matmul=8,
    adaln=4,
    allocation=None,
):
    """A resolved plan as version 0.1.0 wrote it into config.toml."""
    uniform = {"method": "uniform", "mean_bits": "none", "bit_choices": [1, 2, 3, 4]}
    uniform |= {"cost": "macs", "sensitivity_steps": "none", "path": "none", "sha256": ""}
    return {
        "name": name,
        "description": "written by version 0.1.0",
        "weights": {"quantizer": weight},
        "activations": {"quantizer": activation, "bits": bits},
        "rotation": {"kind": rotation, "layers": list(rotated)},
        "low_rank": {"rank": rank, "layers": "none"},
        "adaln": {"weight_quantizer": weight, "activation_bits": adaln},
        "attention": {"matmul_bits": matmul},
        "allocation": {**uniform, **(allocation or {})},
        "qat": {"distillation_weight": 1.0, "denoising_weight": 0.1},
        "layers": {"skip": [], "include": [], "adaln": "none"},
    }


def bitnet(name, bits):
    return older(
        name, "ternary-absmean", "bitnet", bits, "hadamard", PROJECTIONS, rank=0, matmul="none"
    )


OLDER = {
    "fp": older("fp", "none", "none", 8, "none", rank=0, matmul="none", adaln="none"),
    "a8": older("a8", bits=8),
    "a4": older("a4"),
    "a3": older("a3", allocation={"method": "ampn", "mean_bits": 3.0}),
    "a3-uniform": older("a3-uniform", bits=3),
    "a2": older("a2", allocation={"method": "ampn", "mean_bits": 2.0}),
    "a2-uniform": older("a2-uniform", bits=2),
    "baseline-a4": older("baseline-a4", activation="minmax", rotation="none"),
    "baseline-a3": older("baseline-a3", activation="minmax", rotation="none", bits=3),
    "baseline-a2": older("baseline-a2", activation="minmax", rotation="none", bits=2),
    "bitnetv2-a4": bitnet("bitnetv2-a4", 4),
    "bitnetv2-a3": bitnet("bitnetv2-a3", 3),
}
PTQ = {"rtn-w4a4", "quarot-w4a4"}
CENTRED = {"a2-centred", "a4-centred"}


def rewrite(path, **parts):
    """Put other parts into a finished run's config.toml, with checksums that agree."""
    config = tomllib.loads((path / "config.toml").read_text()) | parts
    text = tomli_w.dumps(config)
    (path / "config.toml").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["outputs"]["config.toml"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    sealed = json.dumps(manifest)
    (path / "manifest.json").write_text(sealed)
    (path / "DONE").write_text(f"{hashlib.sha256(sealed.encode()).hexdigest()}  manifest.json\n")


def today(name, *overrides):
    """A packaged plan as today's code writes it, read back."""
    config = tomllib.loads(to_toml(resolve("train-and-eval", "2", name, "digits", 0, overrides)))
    return read_plan(config["plan"], config["workload"]["model"])


def of_then(name):
    """Overrides that give a packaged plan the rank that it had in version 0.1.0."""
    rules = ("adaln", "block") if OLDER[name]["low_rank"]["rank"] else ()
    return [f"layers.{rule}.branch.rank={OLDER[name]['low_rank']['rank']}" for rule in rules]


def decisive(plan):
    return {key: value for key, value in plan.items() if key != "description"}


def group_of(fabricate):
    (group,) = group_runs(find_runs([fabricate.root]).runs)
    return group


def test_every_plan_of_version_0_1_is_here():
    assert OLDER.keys() | PTQ | CENTRED == set(plan_names())


@pytest.mark.parametrize("name", OLDER)
def test_a_plan_of_the_older_schema_reads_as_todays(name):
    assert decisive(read_plan(OLDER[name], DIT)) == decisive(today(name, *of_then(name)))


@pytest.mark.parametrize("name", ["a2", "a4", "baseline-a4", "bitnetv2-a4"])
def test_an_old_and_a_new_run_of_a_plan_are_one_row(fabricate, name):
    fabricate.run(name, overrides=of_then(name))
    rewrite(fabricate.run(name, 1), plan=OLDER[name])
    group = group_of(fabricate)
    (row,) = group.rows
    assert (row.label, row.seeds) == (name, [0, 1])
    assert group.found(row, "fid_digits") is not None
    assert group.summary.loc[(name, "fid_digits"), "values"] == 6


def test_rows_of_old_and_new_runs_stay_apart_where_a_setting_differs(fabricate):
    fabricate.run("a4", overrides=of_then("a4"))
    rewrite(fabricate.run("a4", 1), plan=older("a4", rank=16))
    fabricate.run("a4", 2)
    assert [row.label for row in group_of(fabricate).rows] == [
        "a4 (branch.at_width = 1152, branch.rank = 16)",
        "a4 (branch.at_width = not set, branch.rank = 16)",
        "a4 (branch.at_width = not set, branch.rank = 8)",
    ]


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("fp", Family.FULL_PRECISION, None),
        ("a2", Family.AMPN, 2.0),
        ("a3-uniform", Family.UNIFORM, 3.0),
        ("baseline-a2", Family.UNROTATED, 2.0),
        ("bitnetv2-a3", Family.PARTIAL, 3.0),
    ],
)
def test_family_and_bits_of_both_schemas(name, kind, bits):
    for plan in (read_plan(OLDER[name], DIT), today(name)):
        assert (family(plan), activation_bits(plan)) == (kind, bits)


def test_bits_from_a_file_and_of_another_solver_are_not_ampn():
    file = {"method": "file", "path": "bits.toml", "sha256": "a" * 64}
    plan = read_plan(older("x", allocation=file), DIT)
    assert (family(plan), activation_bits(plan)) == (Family.FROM_FILE, None)
    assert recipes([plan])[0]["activation bits"] == "from a file"
    greedy = today("a2", "bits.solver=greedy")
    assert (family(greedy), activation_bits(greedy)) == (Family.ALLOCATED, 2)
    assert recipes([greedy])[0]["activation bits"] == "epsilon_mse by greedy, mean 2.0"


def test_bits_of_another_solver_have_a_mark_of_their_own(fabricate, parse_page, tmp_path):
    fabricate.run("a2")
    html = tmp_path / "report.html"
    assert "allocated otherwise" not in parse_page(build_report([fabricate.root], html)).text
    fabricate.run("a2", overrides=["bits.solver=greedy"])
    page = parse_page(build_report([fabricate.root], html))
    assert "■ Hadamard, bits allocated otherwise" in page.text
    notes = [row[0].small for row in page.table("Plans and metrics").rows]
    assert notes[1:] == [
        f"500 QAT steps; seed 0; bits.solver = {solver}" for solver in ("exact", "greedy")
    ]


def test_the_recipe_says_what_it_said():
    for plan in (read_plan(OLDER["bitnetv2-a4"], DIT), today("bitnetv2-a4")):
        assert recipes([plan])[0] == {
            "weights": "ternary-absmean",
            "activations": "bitnet",
            "activation bits": "4 everywhere",
            "centring": "none",
            "scaling": "none",
            "rotation": "hadamard on *.proj, *.fc2, *.to_out.0, *.ff.net.2",
            "low-rank branch": "rank 0",
            "adaLN": "ternary-absmean, A4",
            "other layers": "full precision",
            "attention products": "full precision",
        }
    found = recipes([today("a2")])[0]
    assert found["activation bits"] == "AMPN, mean 2.0"
    assert found["rotation"] == "randomized-hadamard"
    assert found["low-rank branch"] == "rank 16 at width 1152"
    assert recipes([today("a2", *of_then("a2"))])[0]["low-rank branch"].startswith("rank 8")
    assert found["attention products"] == "8 bits"
    assert recipes([today("fp")])[0]["adaLN"] == "full precision, activations full precision"


def test_weight_bits_are_nominal_and_parameters_that_differ_are_shown():
    found = recipes([today("quarot-w4a4")])[0]
    assert found["weights"] == "gptq, 4 bits"  # parameters in which uses differ are said
    quicker = today("quarot-w4a4", "layers.block.weight.shrink=20")
    assert [own["weights"] for own in recipes([today("quarot-w4a4"), quicker])] == [
        "gptq, 4 bits, shrink = 80",
        "gptq, 4 bits, shrink = 20",
    ]
    assert found["adaLN"].startswith("gptq, 4 bits")
    assert found["adaLN"].endswith(", A8")
    assert weight_precision(today("quarot-w4a4")) == weight_precision(today("rtn-w4a4"))
    assert weight_precision(today("a4")) == weight_precision(today("bitnetv2-a4")) == ("ternary",)
    allocated = today(
        "quarot-w4a4", "bits.of=weight", "bits.mean=3", "bits.choices=[2,3,4]", "bits.steps=0"
    )
    assert family(allocated) == Family.UNIFORM
    assert activation_bits(allocated) == 4
    assert recipes([allocated])[0]["weights"].endswith(", epsilon_mse_teacher by exact, mean 3.0")
    assert weight_precision(allocated) != weight_precision(today("quarot-w4a4"))


def test_rules_for_some_layers_are_said_by_their_patterns():
    plan = {
        "name": "x",
        "layers": [
            {"name": "wide", "match": ["*.fc2"], "activation": {"method": "rtn", "bits": 8}},
            {"name": "head", "kind": ["other"], "weight": {"method": "rtn", "bits": 8}},
            {
                "name": "rest",
                "kind": ["block", "adaLN"],
                "weight": {"method": "rtn", "bits": 4},
                "activation": {"method": "rtn", "bits": 4},
            },
        ],
    }
    read = read_plan(plan, DIT)
    assert [rule["name"] for rule in read["layers"]] == ["block[*.fc2]", "block", "adaLN", "other"]
    found = recipes([read])[0]
    assert found["weights"] == "rtn, 4 bits elsewhere"
    assert found["activation bits"] == "8 on *.fc2; 4 elsewhere"
    assert found["adaLN"] == "rtn, 4 bits, A4"
    assert found["other layers"] == "rtn, 8 bits, activations full precision"
    assert activation_bits(read) is None  # a mean would need the layers' MACs


def test_plans_that_do_the_same_read_the_same():
    """Rules split in two, under other names, behind one that takes all, and for layers of none."""
    four, eight = ({"weight": {"method": "rtn", "bits": bits}} for bits in (4, 8))
    plain = [
        {"name": "some", "match": ["*.proj", "*.fc2"], **eight},
        {"name": "block", **four, "activation": "none"},
    ]
    other = [
        {"name": "a", "match": ["*.proj"], "kind": ["block", "adaLN"], **eight},
        {"name": "b", "match": ["*.fc2"], "kind": "block", **eight, "rotation": "none"},
        {"name": "c", "match": "*.to_out.0", **four},
        {"name": "d", "match": ["x", "*"], "fixed_bits": False, **four},
        {"name": "e", **eight},
        {"name": "f", "kind": ["adaLN", "other"]},
    ]
    read = [read_plan({"name": "x", "layers": rules}, DIT) for rules in (plain, other)]
    assert read[0] == read[1]
    assert [rule["name"] for rule in read[0]["layers"]] == ["block[*.proj, *.fc2]", "block"]


METHODS = st.sampled_from(["none", {"method": "rtn", "bits": 4}, {"method": "rtn", "bits": 8}])
RULES = st.fixed_dictionaries(
    {
        "match": st.lists(
            st.sampled_from(["*", "*.proj", "*.fc2", "attn.*", "blocks.1.*", "*adaLN*", "*.x"]),
            min_size=1,
            max_size=3,
        ),
        "kind": st.lists(
            st.sampled_from(["block", "adaLN", "other"]), min_size=1, max_size=3, unique=True
        ),
        "weight": METHODS,
        "activation": METHODS,
    }
)


@given(st.lists(RULES, max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_layer_keeps_its_first_rule(rules):
    plan = {"name": "x", "layers": [{"name": f"r{i}", **rule} for i, rule in enumerate(rules)]}
    read = read_plan(plan, DIT)
    numbered = [{**rule, "name": f"r{i}"} for i, rule in enumerate(read["layers"])]
    before, after = (Plan.model_validate(p) for p in (plan, {"name": "x", "layers": numbered}))
    places = [(name, "block") for name in LAYERS] + [(name, "adaLN") for name in MODULATION]
    for name, kind in [*places, ("final_layer.linear", "other"), ("x_embedder.proj", "other")]:
        found = [plan.rule_for(name, kind) for plan in (before, after)]
        slots = [{} if rule is None else rule.slots() for rule in found]
        assert slots[0] == slots[1], name


def test_the_named_layers_are_those_of_the_dit():
    section = load_workload("digits").model
    model = DiT(**section.model_dump(exclude={"kind"}))
    linear = [n for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
    by_kind = {"block": set(), "adaLN": set()}
    for name in linear:
        full = f"blocks.{name}"
        by_kind["adaLN" if is_modulation(full) else "block"].add(full)
    for kind, names in by_kind.items():
        for name in names:
            rule = {"name": "r", "kind": [kind], "match": [name], "weight": {"method": "rtn"}}
            (found,) = read_plan({"name": "x", "layers": [rule]}, section.model_dump())["layers"]
            assert found["match"] == [name]
        every = {"name": "r", "kind": [kind], "match": sorted(names), "weight": {"method": "rtn"}}
        (found,) = read_plan({"name": "x", "layers": [every]}, section.model_dump())["layers"]
        assert found["match"] == ["*"]


def test_settings_are_compared_by_what_rules_are_for():
    flat = comparable([today("a4"), today("baseline-a4")])
    keys = [key for key in differing(flat) if key not in ("name", "description")]
    assert keys == ["activation.method", "rotation.method"]
    flat = comparable([today("a4"), today("a2-uniform")])
    assert differing(flat)[0] == "block.activation.bits"
    keys = differing(comparable([today("a4"), today("bitnetv2-a4")]))
    assert {"weight.method", "activation.method", "branch.method"} < set(keys)
    assert "branch.rank" not in keys  # implied by the method


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers": "all"}, "layers must be tables"),
        ({"layers": [{"kind": 3}]}, "kind of a rule"),
        ({"layers": [{"weight": {"bits": 4}}]}, "weight of a rule of layers must name a method"),
        ({"layers": [{"activation": {"method": "rtn", "bits": "four"}}]}, "bits of activation"),
        ({"bits": 3}, "bits must be a section"),
        ({"bits": {"mean": "two"}}, r"bits.mean must be a number, got 'two'"),
        ({"train": {"steps": "many"}}, r"train.steps must be a number"),
        (
            {"weights": {"quantizer": "rtn"}, "rotation": 3},
            "rotation|before",
        ),
    ],
)
def test_what_is_no_plan_is_refused_by_its_key(plan, message):
    with pytest.raises(ValueError, match=message):
        read_plan({"name": "x", **plan}, DIT)


def test_a_run_without_a_valid_plan_is_left_out_and_named(fabricate, parse_page, tmp_path):
    fabricate.run("a4")
    wrong = fabricate.run("a2")
    rewrite(wrong, plan={"name": "a2", "layers": [{"weight": 3}]})
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    (row,) = page.table("Runs left out").rows
    assert row[0].text == str(wrong)
    assert "config.toml holds no valid plan: weight of a rule" in row[1].text
    assert [line[0].text for line in page.table("Plans and metrics").rows] == ["teacher", "a4"]


def test_the_provenance_shows_the_config_as_it_was_written(fabricate, parse_page, tmp_path):
    for seed in (0, 2):
        fabricate.run("a4", seed)
    rewrite(fabricate.run("a4", 1), plan=OLDER["a4"])
    text = parse_page(build_report([fabricate.root], tmp_path / "report.html")).text
    assert text.count("Resolved config") == 2
    assert text.count("Config and other facts: those of seed 0.") == 1
    assert 'plan.layers.block.activation.method = "robust-midtread"' in text
    assert 'plan.activations.quantizer = "robust-midtread"' in text


def test_a_run_of_a_method_that_is_not_here_is_read(fabricate):
    rewrite(
        fabricate.run("a4"),
        plan={"name": "mine", "layers": [{"name": "b", "weight": {"method": "my_code:Mine"}}]},
    )
    with pytest.raises(ConfigError, match="my_code"):
        read_method("weight", "my_code:Mine")
    (row,) = group_of(fabricate).rows
    assert recipes([row.plan])[0]["weights"] == "my_code:Mine"
