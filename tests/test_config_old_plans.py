"""Plans of the schema before `[[layers]]`: what they said of every layer is what they say now."""

from __future__ import annotations

import logging
import shutil
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robuq_bench.accounting.account import with_branch_rank
from robuq_bench.config import (
    Plan,
    config_from_toml,
    config_hash,
    load_plan,
    modern_plan,
    plan_names,
)
from robuq_bench.config.older import NEW_NAMES
from robuq_bench.errors import CheckpointError, ConfigError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.selection import select_layers
from robuq_bench.runs.run import Run, run_folder, verify_run

Values = dict[str, Any]
OLD_FILES = Path(__file__).parent / "golden" / "assets" / "old"

OLD_CONFIGS = sorted(OLD_FILES.glob("*finished/*/*/config.toml"))

#: The packaged plans as they were in the older schema, less their descriptions.
ROBUQ: Values = {
    "weights": {"quantizer": "ternary-twn"},
    "activations": {"quantizer": "robust-midtread", "bits": 4},
    "rotation": {"kind": "randomized-hadamard", "layers": ["*"]},
    "low_rank": {"rank": 8},
    "adaln": {"weight_quantizer": "ternary-twn", "activation_bits": 4},
    "attention": {"matmul_bits": 8},
    "qat": {"distillation_weight": 1.0, "denoising_weight": 0.1},
}
BASELINE = ROBUQ | {
    "activations": {"quantizer": "minmax", "bits": 4},
    "rotation": {"kind": "none"},
}
BITNET: Values = {
    "weights": {"quantizer": "ternary-absmean"},
    "activations": {"quantizer": "bitnet", "bits": 4},
    "rotation": {"kind": "hadamard", "layers": ["*.proj", "*.fc2", "*.to_out.0", "*.ff.net.2"]},
    "low_rank": {"rank": 0},
    "adaln": {"weight_quantizer": "ternary-absmean", "activation_bits": 4},
    "attention": {"matmul_bits": "none"},
    "qat": {"distillation_weight": 1.0, "denoising_weight": 0.1},
}


def at(base: Values, bits: int) -> Values:
    return base | {"activations": base["activations"] | {"bits": bits}}


def ampn(mean: float) -> Values:
    allocation = {"method": "ampn", "mean_bits": mean, "bit_choices": [1, 2, 3, 4]}
    return ROBUQ | {"allocation": allocation}


PACKAGED: dict[str, Values] = {
    "a2": ampn(2.0),
    "a2-uniform": at(ROBUQ, 2),
    "a3": ampn(3.0),
    "a3-uniform": at(ROBUQ, 3),
    "a4": ROBUQ,
    "a8": at(ROBUQ, 8),
    "baseline-a2": at(BASELINE, 2),
    "baseline-a3": at(BASELINE, 3),
    "baseline-a4": BASELINE,
    "bitnetv2-a3": at(BITNET, 3),
    "bitnetv2-a4": BITNET,
    "fp": {"weights": {"quantizer": "none"}},
}
torch.manual_seed(0)
MODEL = DiT(
    input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3
)
NAMES = [name for name, module in MODEL.named_modules() if type(module) is torch.nn.Linear]


def today(values: Values) -> Plan:
    return Plan.model_validate({"name": "old", **modern_plan(values)})


def packaged(name: str) -> Plan:
    """A packaged plan, its branches of rank 8: since then they are of rank 16 at width 1152."""
    plan = load_plan(name)
    return with_branch_rank(plan, 8) if any(rule.branch for rule in plan.layers) else plan


def refused(values: Values) -> str:
    """Why a plan cannot be said in rules; '' where it can."""
    try:
        modern_plan(values)
    except ValueError as error:
        return str(error)
    return ""


def what_layers_get(plan: Plan) -> dict[str, Any]:
    """Per layer of `MODEL`: methods and bits; None in full precision."""
    found: dict[str, Any] = {}
    for name, layer in select_layers(MODEL, plan).items():
        rule = layer.rule
        found[name] = rule and {
            "weight": rule.weight and rule.weight.method,
            "activation": rule.activation and (rule.activation.method, rule.activation.bits),
            "rotation": rule.rotation and rule.rotation.method,
            "rank": getattr(rule.branch, "rank", 0),
            "allocated": not rule.fixed_bits,
        }
    return found


def fits(name: str, patterns: list[str]) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), p) for p in patterns for i in range(len(parts)))


def word(value: str) -> str | None:
    return None if value == "none" else value


def what_it_said(name: str, plan: Values) -> Any:
    """The selection rule of the older schema, for the names of a DiT."""
    layers, adaln = plan.get("layers", {}), plan.get("adaln", {})
    activations = plan.get("activations", {}).get("quantizer", "none")
    if word(activations) is None and word(plan.get("weights", {}).get("quantizer", "none")) is None:
        return None
    if fits(name, layers.get("skip", [])):
        return None
    if not name.startswith("blocks.") and not fits(name, layers.get("include", [])):
        return None
    patterns = word(layers.get("adaln", "none"))
    is_adaln = "adaLN_modulation" in name if patterns is None else fits(name, list(patterns))
    weight, bits = plan["weights"]["quantizer"], plan.get("activations", {}).get("bits", 8)
    if is_adaln:
        weight = adaln.get("weight_quantizer", "none")
        bits = word(adaln.get("activation_bits", "none"))
        if weight == "none" and bits is None:
            return None
    rotation, low_rank = plan.get("rotation", {}), plan.get("low_rank", {})
    has_branch = word(low_rank.get("layers", "none"))
    return {
        "weight": word(weight),
        "activation": None if word(activations) is None or bits is None else (activations, bits),
        "rotation": word(rotation.get("kind", "none"))
        if fits(name, rotation.get("layers", ["*"]))
        else None,
        "rank": low_rank.get("rank", 0)
        if has_branch is None or fits(name, list(has_branch))
        else 0,
        "allocated": not is_adaln,
    }


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_plans_say_what_they_said(name: str) -> None:
    assert set(PACKAGED) <= set(plan_names())
    old, new = today(PACKAGED[name]), packaged(name)
    assert what_layers_get(old) == what_layers_get(new)
    assert what_layers_get(new) == {layer: what_it_said(layer, PACKAGED[name]) for layer in NAMES}
    assert (old.attention, old.bits, old.train) == (new.attention, new.bits, new.train)
    if not name.startswith("bitnetv2"):  # there the rules have other names, and are more
        assert old.model_copy(update={"name": name, "description": new.description}) == new


#: Each ends in a literal, so that lists of them can be joined.
PATTERNS = [
    "*", "*.proj", "proj", "*.fc1", "attn.qkv", "*.mlp.fc2", "blocks.0.mlp.fc2", "*fc2", "c2",
    "blocks.1.adaLN_modulation.1", "*adaLN_modulation.1", "*.1", "nothing",
]  # fmt: skip
OUTSIDE = ["final_layer.linear", "linear", "final_layer.adaLN_modulation.1", "t_embedder.mlp.0"]
OPEN = ["blocks.0.*", "*.attn.*", "final_layer.*", "[x]*", "*?", "*.mlp.fc[12]"]


def lists(pool: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(pool), max_size=3)


@st.composite
def old_plans(draw: st.DrawFn, patterns: list[str], include: list[str]) -> Values:
    activations = draw(st.sampled_from(["none", "minmax", "lloyd-max", "bitnet"]))
    weights = ["ternary-twn", "ternary-absmean"]
    may_be_none = ["none", *weights]
    adaln_bits = st.just("none") if activations == "none" else st.just("none") | st.integers(2, 8)
    low_rank: Values = {"rank": draw(st.integers(0, 4))}
    layers: Values = {"skip": draw(lists(patterns)), "include": draw(lists(include))}
    for section, key in ((low_rank, "layers"), (layers, "adaln")):
        section[key] = draw(st.just("none") | lists(patterns))
    return {
        "weights": {
            "quantizer": draw(st.sampled_from(weights if activations == "none" else may_be_none))
        },
        "activations": {"quantizer": activations, "bits": draw(st.integers(2, 8))},
        "rotation": {
            "kind": draw(st.sampled_from(["none", "hadamard", "randomized-hadamard"])),
            "layers": draw(lists(patterns)),
        },
        "low_rank": low_rank,
        "adaln": {
            "weight_quantizer": draw(st.sampled_from(may_be_none)),
            "activation_bits": draw(adaln_bits),
        },
        "layers": layers,
    }


@settings(max_examples=250)
@given(old_plans(PATTERNS, [*OUTSIDE, "blocks.0.attn.proj"]))
def test_every_layer_gets_what_the_older_rules_said(values: Values) -> None:
    said = {name: what_it_said(name, values) for name in NAMES}
    assert what_layers_get(today(values)) == said


@settings(max_examples=150)
@given(old_plans([*PATTERNS, *OPEN], [*OUTSIDE, *OPEN]))
def test_what_rules_cannot_say_is_refused_and_never_guessed(values: Values) -> None:
    why = refused(values)
    if why:
        assert "may match modulation layers" in why
        return
    assert what_layers_get(today(values)) == {name: what_it_said(name, values) for name in NAMES}


NAME = st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3).map(".".join)
PATTERN = st.text("ab.*?", min_size=1, max_size=4) | NAME | NAME.map("*{}".format)


@settings(max_examples=400)
@example(["proj"], ["xproj"], "xproj")
@example(["*.a"], ["a"], "a")
@example(["*.a"], ["a"], "b.a")
@given(st.lists(PATTERN, max_size=2), st.lists(PATTERN, max_size=2), NAME)
def test_two_lists_of_patterns_are_joined_exactly(
    rotated: list[str], branched: list[str], name: str
) -> None:
    values = BITNET | {
        "rotation": {"kind": "hadamard", "layers": rotated},
        "low_rank": {"rank": 2, "layers": branched},
        "adaln": {},
    }
    rule = today(values).rule_for(name, "block")
    assert rule is not None
    assert (rule.rotation is not None) == fits(name, rotated)
    assert (rule.branch is not None) == fits(name, branched)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": {"bitz": 4}}, "activations.bitz: unknown key; did you mean 'bits'?"),
        ({"layers": {"skipp": ["x"]}}, "layers.skipp: unknown key; did you mean 'skip'?"),
        ({"layers": {"block": 3}}, "rules are [[layers]], in two brackets"),
        ({"layers": [{"name": "block"}]}, "must be a section [layers], got [{"),
        ({"weights": 3}, "weights must be a section [weights], got 3"),
        ({"bits": {"mean": 2}}, "bits: unknown key beside [weights], "),
        ({"train": {}}, "train: unknown key"),
        ({"layers": {"skip": "x"}}, "skip must be a list of patterns, got 'x'"),
        ({"rotation": {"kind": "hadamard", "layers": [3]}}, "layers must be a list of patterns"),
        ({"allocation": {"mean_bits": 2}}, "mean_bits is not used by method 'uniform'"),
        ({"allocation": {"method": "ampn", "path": "x"}}, "path is not used by method 'ampn'"),
        ({"allocation": {"method": "amp"}}, "'amp' is none; did you mean 'ampn'?"),
        ({"allocation": {"method": "ampn"}}, "give a mean to allocate bits"),
        ({"activations": {}}, "adaln.activation_bits needs an activations.quantizer"),
        (
            {"activations": {}, "weights": {}, "adaln": {}},
            "so rotation.kind, low_rank.rank would be ignored",
        ),
        ({"activations": {"quantizer": "min-max"}}, "unknown activation method 'min-max'; did"),
        ({"low_rank": {"rank": -1}}, "rank: input should be greater than or equal to 0, got -1"),
    ],
)
def test_what_the_older_schema_refused_is_still_refused(
    tmp_path: Path, change: Values, message: str
) -> None:
    path = tmp_path / "old.toml"
    path.write_text(tomli_w.dumps(ROBUQ | change))
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_of_the_older_schema_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = OLD_FILES / "plans" / "standalone.toml"
    with caplog.at_level(logging.WARNING):
        plan = load_plan(path)
    assert f"{path}: is in the schema before [[layers]]" in caplog.text
    values = tomllib.loads(path.read_text())
    assert what_layers_get(plan) == {name: what_it_said(name, values) for name in NAMES}
    assert (plan.attention.matmul_bits, plan.train.denoising_weight) == (4, 1.0)
    child = tmp_path / "child.toml"  # and may be the base of a plan of today's
    child.write_text(f'extends = "{path}"\n[[layers]]\nname = "block"\nactivation = {{bits = 2}}\n')
    assert [rule.name for rule in load_plan(child).layers] == [rule.name for rule in plan.layers]
    assert load_plan(child).layers[-1].activation == plan.layers[-1].activation.model_copy(  # type: ignore[union-attr]
        update={"bits": 2}
    )


def test_one_that_extends_another_is_refused_with_the_new_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    lines = [f"[{key}]\n" for key in ("weights", "activations", "allocation")]
    path.write_text(
        f'extends = "a4"\n{lines[1]}bits = 3\n{lines[2]}mean_bits = 2\n{lines[0]}quantizer = "x"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: is in the schema before [[layers]]")
    for key in ("weights.quantizer", "activations.bits", "allocation.mean_bits"):
        assert f"\n  {key} is now {NEW_NAMES[key]}" in message


# runs


@pytest.mark.parametrize("path", OLD_CONFIGS, ids=lambda path: path.parent.name)
def test_a_config_of_an_old_run_is_that_of_todays_plan(path: Path) -> None:
    config = config_from_toml(path.read_text("utf-8"), str(path))
    if config.plan.name == "allocated":
        assert config.plan.bits is not None
        assert config.plan.bits.path
        return
    assert config.plan == packaged(config.plan.name)
    renewed = config.model_copy(update={"plan": packaged(config.plan.name)})
    assert config_hash(renewed) == config_hash(config)
    assert config_hash(config)[:12] not in path.parent.name  # the run is found by its content


def old_run(root: Path) -> Path:
    """A copy of an unfinished run that older code wrote."""
    source = next((OLD_FILES / "unfinished").glob("train-and-eval/a2-*"))
    return Path(shutil.copytree(source, root / "train-and-eval" / source.name))


def test_a_run_of_older_code_is_found_continued_and_its_config_stays(tmp_path: Path) -> None:
    path = old_run(tmp_path)
    text = (path / "config.toml").read_bytes()
    config = config_from_toml(text.decode(), "old")
    other = config.model_copy(update={"seed": config.seed + 1})
    assert run_folder(tmp_path, config) == path
    assert run_folder(tmp_path, other) != path
    with Run.open(tmp_path, config, ["test"]) as run:
        assert run.path == path
        before = [record["key"] for record in run.results()]
        assert before
        run.append("more", value=1)
        run.finish()
    assert (path / "config.toml").read_bytes() == text
    assert verify_run(path) == []
    with Run.open(tmp_path, config, ["test"]) as run:
        assert run.is_done
        assert [record["key"] for record in run.results()] == [*before, "more"]
    assert [each for each in path.parent.iterdir() if each.is_dir()] == [path]


def test_an_old_run_that_is_begun_anew_gets_its_new_name(tmp_path: Path) -> None:
    path = old_run(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    config = config_from_toml((path / "config.toml").read_text(), "old")
    for number in range(2):
        with Run.open(tmp_path, config, ["test"], force=number == 0) as run:
            assert run.path.name.endswith(config_hash(config)[:12])
            assert run.has("first") == (number == 1)
            run.append("first", value=1)
    aside = path.with_name(f"{path.name}.replaced-1")
    assert {file.name: file.read_bytes() for file in aside.iterdir() if file.is_file()} == before
    folders = [each for each in path.parent.iterdir() if each.is_dir()]
    assert sorted(folders) == sorted([aside, run.path])
    with Run.open(tmp_path, config, ["test"], force=True) as run:  # as any other from now on
        assert not run.has("first")
    assert run.path.with_name(f"{run.path.name}.replaced-1").is_dir()


def test_an_old_run_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    path = old_run(tmp_path)
    config = config_from_toml((path / "config.toml").read_text(), "old")
    moved = path.rename(path.with_name(f"{path.name[:-1]}x"))
    with pytest.raises(CheckpointError, match="belongs to another config"):
        Run.open(tmp_path, config, ["test"])
    (moved / "config.toml").write_bytes(b"\xff")
    assert run_folder(tmp_path, config) != moved  # and a damaged one is no one's
