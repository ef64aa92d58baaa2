"""`[[layers]]`: which rule fits, what may stand in it, and how files merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.allocation.solvers import SOLVERS as LIBRARY_SOLVERS
from robuq_bench.config import Plan, load_plan
from robuq_bench.config.plan import METRICS, SOLVERS
from robuq_bench.errors import ConfigError
from robuq_bench.methods import SLOTS, method_class, method_names, read_method
from robuq_bench.sensitivity import METRICS as LIBRARY_METRICS

MINMAX = "activation = {method = 'minmax', bits = %d}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Loads a plan from its text."""
    return lambda text: load_plan(write(tmp_path / "mine.toml", text))


def bits_of(plan: Plan, name: str, kind: Any = "block") -> int | None:
    rule = plan.rule_for(name, kind)
    return rule.activation.bits if rule and rule.activation else None


# which rule


def test_the_first_rule_that_fits_decides_alone(plan: Any) -> None:
    text = f"""
[[layers]]
name = "keep"
match = ["*.fc1"]
kind = ["block", "other"]
[[layers]]
name = "first"
match = "blocks.0.*"
{MINMAX % 2}weight = "none"
[[layers]]
name = "rest"
kind = ["block", "adaLN"]
{MINMAX % 3}weight = "ternary-twn"
"""
    mine = plan(text)
    assert [rule.name for rule in mine.layers] == ["keep", "first", "rest"]
    assert bits_of(mine, "blocks.0.mlp.fc1") is None
    assert bits_of(mine, "blocks.0.mlp.fc1", "adaLN") == 3  # of another kind than the first two
    assert bits_of(mine, "blocks.0.mlp.fc2") == bits_of(mine, "dit.blocks.0.mlp.fc2") == 2
    assert mine.rule_for("blocks.0.mlp.fc2", "block").weight is None  # nothing from later rules
    assert bits_of(mine, "blocks.1.mlp.fc2") == 3
    assert bits_of(mine, "head", "other") is None
    reversed_plan = mine.model_copy(update={"layers": mine.layers[::-1]})
    assert bits_of(reversed_plan, "blocks.0.mlp.fc1") == 3


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(["block", "adaLN", "other"]), min_size=1),
            st.sampled_from(["*", "a", "a.b", "*.b", "b"]),
        ),
        max_size=5,
    ),
    st.sampled_from(["a", "b", "a.b", "x.a.b", "ab"]),
    st.sampled_from(["block", "adaLN", "other"]),
)
def test_rules_are_tried_in_order(rules: list[Any], name: str, kind: Any) -> None:
    fits = {
        "*": {"a", "b", "a.b", "x.a.b", "ab"},
        "a": {"a"},
        "a.b": {"a.b", "x.a.b"},
        "*.b": {"a.b", "x.a.b"},
        "b": {"b", "a.b", "x.a.b"},
    }
    layers = [
        {"name": f"r{i}", "kind": list(kinds), "match": [pattern]}
        for i, (kinds, pattern) in enumerate(rules)
    ]
    found = Plan.model_validate({"name": "p", "layers": layers}).rule_for(name, kind)
    expected = [f"r{i}" for i, (kinds, p) in enumerate(rules) if kind in kinds and name in fits[p]]
    assert (found and found.name) == (expected[0] if expected else None)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_may_be_empty_a_name_or_a_table(plan: Any, slot: Any) -> None:
    name = method_names(slot)[0]
    required = {
        key: 4
        for key, field in method_class(slot, name).model_fields.items()
        if field.is_required() and key != "method"
    }
    expected = read_method(slot, {"method": name, **required})
    table = ", ".join([f"method = '{name}'", *(f"{key} = 4" for key in required)])
    for text in ("none", "{method = 'none'}"):
        value = text if text.startswith("{") else f"'{text}'"
        assert getattr(plan(f"[[layers]]\n{slot} = {value}").layers[0], slot) is None
    texts = [f"{{{table}}}"] if required else [f"'{name}'", f"{{{table}}}"]
    for text in texts:
        assert plan(f"[[layers]]\n{slot} = {text}").layers[0].slots() == {slot: expected}
    with pytest.raises(ConfigError, match=f'{slot} method "none" has no parameters'):
        plan(f"[[layers]]\n{slot} = {{method = 'none', bits = 3}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name='a'\nweights='rtn'", "layers.a.weights: unknown key; did you mean 'weight'?"),
        ("name='a'\nweight='rtm'", "layers.a.weight: unknown weight method 'rtm'; did you me"),
        ("name='a'\nweight='svd'", "layers.a.weight: unknown weight method 'svd'; it is a method "
         "for branch"),
        ("name='a'\nactivation={method='minmax', bitz=3}", "layers.a.activation: method 'minmax' "
         "has no 'bitz'; did you mean 'bits'?"),
        ("name='a'\nweight={method='ternary-twn', bits=3}", "layers.a.weight: method "
         "'ternary-twn' has no 'bits'; it has no parameters"),
        ("name='a'\nactivation={method='bitnet', bits=1}", "layers.a.activation: activation "
         "method 'bitnet' takes 2 to 8 bits, got 1"),
        ("name='a'\nactivation={method='minmax', bits=9}", "layers.a.activation: bits: input"),
        ("name='a'\nactivation={method='minmax', bits=true}", "bits: input should be a valid int"),
        ("name='a'\nrotation='block-hadamard'", "layers.a.rotation: method 'block-hadamard' needs"
         " 'block'; add it"),
        ("name='a'\nactivation={bits=3}", "layers.a.activation: write \"none\", or a table with a"),
        ("name='a'\nactivation=3", "layers.a.activation: write \"none\", or a table with a"),
        ("name='a'\nactivation={method=3}", "layers.a.activation: write \"none\", or a table with"),
        ("name='a'\nkind='blok'", "layers.a.kind.0: 'blok' is not one of 'block', 'adaLN' or "
         "'other'; did you mean 'block'?"),
        ("name='a'\nkind=[]", "layers.a.kind: must not be empty: the rule would fit no layer"),
        ("name='a'\nmatch=[]", "layers.a.match: must not be empty: the rule would fit no layer"),
        ("name='a'\nmatch=3", "layers.a.match: must be a list, e.g. [3], got 3"),
        ("name='a'\nmatch={}", "layers.a.match: input should be a valid tuple, got {}"),
        ("name='a'\nmatch=['x', 3]", "layers.a.match.1: input should be a valid string, got 3"),
        ("name='a'\nfixed_bits=1", "layers.a.fixed_bits: input should be a valid boolean, got 1"),
        ("name='a b'", "layers.a b.name: string should match pattern"),
        ("name='1'", "name: string should match pattern"),
        ("match='x'\nwieght='rtn'", "layers.0.wieght: unknown key; did you mean 'weight'?"),
        ("[[layers]]", "two rules of layers are called 'layers'; give each a name"),
        ("name='a'\n[[layers]]\nname='a'", "two rules of layers are called 'a'; give each a name"),
    ],
)  # fmt: skip
def test_a_bad_rule_is_named_with_file_rule_and_slot(plan: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(f"[[layers]]\n{text}\n")
    assert "mine.toml: layers." in str(caught.value) or "mine.toml: two rules" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["layers = 3", "layers = 'x'", "layers = [3]", "layers = [[]]"])
def test_layers_that_are_no_rules_are_refused(plan: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml: layers"):
        plan(text)
    with pytest.raises(ConfigError, match=r"mine\.toml: layers"):
        plan(f"extends = 'a4'\n{text}")


def test_one_bracket_instead_of_two_is_explained(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers\.name: .*rules are \[\[layers\]\], in two"):
        plan("[layers]\nname = 'block'\nweight = 'rtn'")


def test_metrics_and_solvers_are_those_of_the_library() -> None:
    """They are written down again in the plan's schema, which must not import NumPy."""
    assert set(METRICS) == set(LIBRARY_METRICS)
    assert set(SOLVERS) == set(LIBRARY_SOLVERS)


# extends


def test_extends_goes_to_any_depth_and_the_nearest_wins(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    branch = "[[layers]]\nname = 'block'\nbranch = {rank = %d}\n"
    # Names without a folder would be packaged ones; each path is that of the file that has it.
    write(tmp_path / "0.toml", f'extends = "a8"\ndescription = "0"\n{branch % 1}')
    write(folder / "1.toml", 'extends = "../0.toml"\n[train]\ndenoising_weight = 0.5\n')
    write(folder / "2.toml", f'extends = "./1.toml"\n{branch % 2}')
    path = write(tmp_path / "3.toml", 'extends = "deep/2.toml"\n[attention]\nmatmul_bits = 4\n')
    plan, base = load_plan(path), load_plan("a8")
    assert (plan.name, plan.description) == ("3", "")
    block, of_base = plan.layers[1], base.layers[1]
    assert block.branch == read_method("branch", {"method": "svd", "rank": 2})
    assert block.model_copy(update={"branch": of_base.branch}) == of_base
    assert (plan.train.denoising_weight, plan.attention.matmul_bits) == (0.5, 4)
    assert plan.layers[0] == base.layers[0]
    first = load_plan(folder / "1.toml").layers[1]
    assert first.branch == read_method("branch", {"method": "svd", "rank": 1})
    longest = path
    for number in range(4, 40):
        longest = write(tmp_path / f"{number}.toml", f'extends = "./{number - 1}.toml"\n')
    assert load_plan(longest).model_copy(update={"name": "3"}) == plan


def test_extends_in_a_circle_names_the_files_in_order(tmp_path: Path) -> None:
    start = write(tmp_path / "start.toml", 'extends = "./a.toml"')
    first = write(tmp_path / "a.toml", 'extends = "./b.toml"')
    second = write(tmp_path / "b.toml", 'extends = "./x/a.toml"')
    (tmp_path / "x").symlink_to(tmp_path)  # the same file by another name
    for path in (start, first):
        with pytest.raises(ConfigError) as caught:
            load_plan(path)
        assert f"{second}: extends goes in a circle: {first} -> {second} -> {first};" in str(
            caught.value
        )
    alone = write(tmp_path / "alone.toml", 'extends = "./alone.toml"')
    with pytest.raises(ConfigError, match=r"circle: .*alone\.toml -> .*alone\.toml;"):
        load_plan(alone)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bits]\nmeen = 7\n", r"base\.toml: bits\.meen: .*did you mean 'mean'"),
        ("[[layers]]\nname = 'a'\nweight = 'rtm'", r"base\.toml: layers\.a\.weight: .*'rtn'"),
        ('extends = "./gone.toml"', r"base\.toml: extends: plan file not found: .*gone\.toml"),
        ("extends = 4", r"base\.toml: extends must be the name or path of one plan"),
        ("x = [", r"base\.toml: not valid TOML"),
    ],
)
def test_a_mistake_in_a_base_is_blamed_on_that_base(
    tmp_path: Path, text: str, message: str
) -> None:
    write(tmp_path / "base.toml", text)
    write(tmp_path / "middle.toml", 'extends = "./base.toml"')
    path = write(tmp_path / "mine.toml", 'extends = "./middle.toml"\n[bits]\nmeeen = 1\n')
    with pytest.raises(ConfigError, match=message) as caught:
        load_plan(path)
    assert "mine.toml" not in str(caught.value)


def test_rules_merge_by_name_and_new_ones_come_first(plan: Any) -> None:
    base = load_plan("bitnetv2-a4")
    mine = plan(f"""
extends = "bitnetv2-a4"
[[layers]]
name = "block"
activation = {{bits = 6}}
[[layers]]
name = "mine"
match = "*.fc1"
[[layers]]
name = "adaln"
weight = "none"
[[layers]]
name = "also"
{MINMAX % 2}""")
    assert [r.name for r in mine.layers] == ["mine", "also", *(r.name for r in base.layers)]
    adaln, projections, block = mine.layers[2:]
    activation = base.layers[2].activation.model_copy(update={"bits": 6})  # type: ignore[union-attr]
    assert block == base.layers[2].model_copy(update={"activation": activation})
    assert adaln == base.layers[0].model_copy(update={"weight": None})
    assert projections == base.layers[1]
    assert bits_of(mine, "blocks.0.mlp.fc1") is None
    assert bits_of(mine, "blocks.0.mlp.fc2") == 2


@pytest.mark.parametrize(
    ("below", "over", "expected"),
    [
        ("{method='rtn', bits=3}", "{bits=2}", {"method": "rtn", "bits": 2}),
        ("{method='rtn', bits=3}", "{group=16}", {"method": "rtn", "bits": 3, "group": 16}),
        ("{method='rtn', bits=3}", "{method='rtn'}", {"method": "rtn", "bits": 3}),
        ("{method='rtn', bits=3}", "'rtn'", {"method": "rtn", "bits": 3}),
        ("'rtn'", "{bits=2}", {"method": "rtn", "bits": 2}),
        # Parameters belong to their method.
        ("{method='rtn', bits=3}", "'gptq'", {"method": "gptq"}),
        ("{method='rtn', bits=3}", "{method='gptq', group=8}", {"method": "gptq", "group": 8}),
        ("{method='rtn', bits=3}", "'none'", None),
        ("{method='rtn', bits=3}", "{method='none'}", None),
        ("'none'", "{method='rtn', bits=2}", {"method": "rtn", "bits": 2}),
    ],
)
def test_a_slot_is_merged_parameter_by_parameter(
    tmp_path: Path, below: str, over: str, expected: Any
) -> None:
    write(tmp_path / "base.toml", f"[[layers]]\nname = 'a'\nweight = {below}\n{MINMAX % 5}")
    text = f"extends = './base.toml'\n[[layers]]\nname = 'a'\nweight = {over}\n"
    (rule,) = load_plan(write(tmp_path / "mine.toml", text)).layers
    assert rule.weight == read_method("weight", expected)
    assert bits_of(load_plan(tmp_path / "mine.toml"), "x") == 5


def test_a_rule_that_is_changed_twice_is_refused(plan: Any) -> None:
    with pytest.raises(ConfigError, match="two rules of layers are called 'block'"):
        plan("extends='a4'\n[[layers]]\nname='block'\nweight='none'\n[[layers]]\nname='block'\n")
    with pytest.raises(ConfigError, match=r"layers\.0\.name"):
        plan("extends='a4'\n[[layers]]\nname=['block']\n")


def test_a_section_of_the_base_is_taken_away_by_none(plan: Any) -> None:
    assert plan("extends = 'a2'\nbits = 'none'").bits is None
