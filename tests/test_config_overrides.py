"""`--set`: what is applied, to what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configuring import make, quick, write
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robuq_bench.config import (
    BitsConfig,
    Config,
    Plan,
    Rule,
    Workload,
    load_plan,
)
from robuq_bench.config.files import keys_of
from robuq_bench.config.older import NEW_NAMES
from robuq_bench.errors import ConfigError
from robuq_bench.methods import SLOTS, method_names


def rule(config: Config, name: str) -> Rule:
    (found,) = [rule for rule in config.plan.layers if rule.name == name]
    return found


def slot(config: Config, name: str, key: str) -> Any:
    """What is in a slot of a rule, as a dict; None if nothing."""
    return rule(config, name).model_dump()[key]


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", '[[layers]]\nname="a"\nactivation={method="minmax",bits=5}\n')
    other = write(tmp_path / "d.toml", '[[layers]]\nactivation = "minmax"\n')
    assert load_plan(other).uniform_bits == 8
    assert make(plan=path).plan.uniform_bits == 5
    key = "layers.a.activation.bits"
    assert make([f"{key}=6"], plan=path).plan.uniform_bits == 6
    assert make([f"{key}=6", f"{key}=7"], plan=path).plan.uniform_bits == 7


def test_short_and_full_keys_mean_the_same() -> None:
    short = make(["training.steps=7", "layers.block.branch.rank=3", "teacher.training.steps=9"])
    full = make(["workload.training.steps=7", "plan.layers.block.branch.rank=3",
                 "workload.teacher.training.steps=9"])  # fmt: skip
    assert short == full
    assert short.workload.training.steps == 7
    branch = {"method": "svd", "sha256": ""}
    assert slot(short, "block", "branch") == {**branch, "rank": 3, "at_width": None}
    assert slot(short, "adaln", "branch") == {**branch, "rank": 16, "at_width": 1152}
    assert short.workload.teacher.training.steps == 9


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("training.learning_rate=3e-4", lambda c: c.workload.training.learning_rate, 3e-4),
        ("training.learning_rate=1", lambda c: c.workload.training.learning_rate, 1.0),
        ("training.compile = true", lambda c: c.workload.training.compile, True),
        ("layers.block.match=['*.proj','x']", lambda c: rule(c, "block").match, ("*.proj", "x")),
        ("layers.block.match=*.proj", lambda c: rule(c, "block").match, ("*.proj",)),
        ("layers.adaln.kind=other", lambda c: rule(c, "adaln").kind, ("other",)),
        ("layers.adaln.fixed_bits=false", lambda c: rule(c, "adaln").fixed_bits, False),
        ("attention.matmul_bits=none", lambda c: c.plan.attention.matmul_bits, None),
        ("data.path=some/dir", lambda c: c.workload.data.path, "some/dir"),
        ("data.path='a = b # c'", lambda c: c.workload.data.path, "a = b # c"),
        ("data.path=2024-01-01", lambda c: c.workload.data.path, "2024-01-01"),
        ("data.path=a=b", lambda c: c.workload.data.path, "a=b"),
        ("plan.name=renamed", lambda c: c.plan.name, "renamed"),
    ],
)
def test_values_are_toml_or_else_text(override: str, read: Any, value: Any) -> None:
    result = read(make([override]))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=1", "did you mean 'training.steps'?"),
        (
            "steps=1",
            "'teacher.training.steps' or 'training.steps' or 'bits.steps' or 'train.steps'?",
        ),
        ("trainin.steps=1", "did you mean 'training.steps'?"),
        ("plan.attention.matmul_bitz=4", "did you mean 'attention.matmul_bits'?"),
        ("training=3", "is a section, not a key; its keys: training.steps, "),
        ("training.frobnicate=3", "known there: training.steps, "),
        ("name=x", "is a key of both; write workload.name or plan.name"),
        ("description=x", "is a key of both; write workload.description or plan.description"),
        ("layers=3", "layers: is a section, not a key; its keys: layers.adaln.match, "),
        ("layers.blok.weight.bits=3", "plan 'a2' has no rule 'blok'; did you mean 'block'?"),
        ("layers.match=x", "plan 'a2' has no rule 'match'; known: adaln, block"),
        ("layers.block.name=x", "unknown key; did you mean 'layers.block."),
        ("layers.block.weigth=rtn", "unknown key; did you mean 'layers.block.weight'?"),
        ("layers.block.activation.bitz=3", "did you mean 'layers.block.activation.bits'?"),
        ("layers.block.weight.frobnicate=3", "known there: layers.block.weight.method, layers."),
        (
            "layers.block.weight=twn",
            "layers.block.weight: unknown weight method 'twn'; did you mean",
        ),
        (
            "layers.block.weight=hadamard",
            "unknown weight method 'hadamard'; it is a method for rot",
        ),
        ("layers.block.weight=3", 'layers.block.weight: write "none", or a table with a method'),
        ("layers.block.activation.bits=9", "layers.block.activation: bits: input should be less"),
        ("layers.block.match=3", "layers.block.match: must be a list, e.g. [3], got 3"),
        ("layers.block.match=[]", "layers.block.match: must not be empty"),
        ("layers.block.kind=blok", "layers.block.kind.0: 'blok' is not one of 'block', 'adaLN' or"),
        ("bits.meen=2", "did you mean 'bits.mean'?"),
        ("bits=3", "bits: must be a section [bits], got 3"),
        ("bits.path=x", "give a mean to allocate bits, or a path to read them from"),
        ("calibration=3", "is a section, not a key; its keys: calibration.samples, "),
        ("training.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training.steps=many", "training.steps: input should be a valid integer, got 'many'"),
        ("training.steps=1\nseed=2", "training.steps: input should be a valid integer"),
    ],
)
def test_bad_overrides_name_the_key_and_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make([override])
    assert message in str(caught.value)
    assert str(caught.value).startswith("--set")


KEYS = sorted({*(k for k in keys_of(Plan) if k != "layers"), *keys_of(Workload)})
RULE_KEYS = [
    f"layers.{rule}.{key}"
    for rule in ("adaln", "block")
    for key in (
        "match", "kind", "fixed_bits", *SLOTS, *(f"{slot}.method" for slot in SLOTS),
        "rotation.sha256", "branch.rank", "activation.bits",
    )
]  # fmt: skip
METHODS = sorted({name for slot in SLOTS for name in method_names(slot)})


@settings(max_examples=200)
@example("teacher.checkpoint", "~nobody-here/x.pt")
@example("teacher.checkpoint", "nul\0byte")
@example("bits.path", "~")
@example("layers.block.match", "{}")
@given(
    st.sampled_from([*KEYS, *RULE_KEYS, "bits"]) | st.text(max_size=40),
    st.text(max_size=20)
    | st.sampled_from([*METHODS, "3", "none", "[]", "{}", "x:Y", "json:dumps"]),
)
def test_any_override_is_either_applied_or_a_config_error(key: str, value: str) -> None:
    try:
        quick([f"{key}={value}"])
    except ConfigError:
        return
    name = key.strip()
    assert name.removeprefix("plan.").removeprefix("workload.") in [*KEYS, *RULE_KEYS, "bits"]


@settings(max_examples=20)
@given(st.integers(0, 10**9))
def test_any_integer_arrives_unchanged(steps: int) -> None:
    assert quick([f"training.steps={steps}"]).workload.training.steps == steps


@given(st.text(max_size=60))
def test_any_text_arrives_unchanged_when_quoted(text: str) -> None:
    try:
        config = quick([f"workload.description={json.dumps(text)}"])
    except ConfigError:
        # TOML, unlike JSON, has no lone surrogates and no bare DEL.
        assert any(0xD800 <= ord(c) <= 0xDFFF or ord(c) == 0x7F or ord(c) > 0xFFFF for c in text)
        return
    assert config.workload.description in (text, json.dumps(text))


def test_seeds_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="seed must be between 0"):
        make(seed=-1)
    with pytest.raises(ConfigError, match="seed must be between 0"):
        make(seed=2**63)


# rules, methods and bits


def test_a_slot_is_emptied_named_or_given_a_table() -> None:
    key = "layers.block.rotation"
    assert slot(make([f"{key}=none"]), "block", "rotation") is None
    assert rule(make([f"{key}=none"]), "adaln") == rule(make(), "adaln")
    for value in ("hadamard", "{method = 'hadamard'}"):
        found = slot(make([f"{key}={value}"]), "block", "rotation")
        assert found == {"method": "hadamard", "sha256": ""}
    bitnet = make(["layers.block.rotation.method=hadamard"], plan="bitnetv2-a4")  # was empty
    assert slot(bitnet, "block", "rotation") == {"method": "hadamard", "sha256": ""}
    assert slot(make(["layers.block.rotation.method=none"]), "block", "rotation") is None


def test_parameters_belong_to_their_method() -> None:
    other = make(["layers.block.activation.method=minmax"], plan="a4")
    assert slot(other, "block", "activation") == {"method": "minmax", "sha256": "", "bits": 8}
    table = make(["layers.block.activation={method='minmax',bits=3}"])
    assert slot(table, "block", "activation") == {"method": "minmax", "sha256": "", "bits": 3}
    bits = "layers.block.weight.bits=3"
    for method in ("layers.block.weight.method=rtn", "layers.block.weight=rtn"):
        for overrides in ([method, bits], [bits, method]):  # in either order
            assert slot(make(overrides), "block", "weight")["bits"] == 3
    with pytest.raises(ConfigError, match=r"weight\.bits: unknown key"):
        make([bits])  # ternary weights have none


def test_bits_begin_with_their_first_key_and_end_with_none() -> None:
    assert load_plan("a4").bits is None
    bits = make(["bits.mean=2"], plan="a4").plan.bits
    assert bits == load_plan("a2").bits == BitsConfig(mean=2.0, choices=(1, 2, 3, 4))
    several = ["bits.choices=[2,4]", "bits.solver=greedy", "bits.mean=3"]
    assert make(several, plan="a4").plan.bits == BitsConfig(
        mean=3.0, choices=(2, 4), solver="greedy"
    )
    assert make(["bits=none"]).plan.bits is None
    assert make(["bits=none", "bits.mean=3"]).plan.bits == BitsConfig(mean=3.0)
    assert make(["bits=none", "plan.name=a4"]).plan == load_plan("a4").model_copy(
        update={"description": load_plan("a2").description}
    )
    assert make(["train.steps=0", "bits=none"]).plan.train.steps == 0
    assert make(["train.steps=none"]).plan.train.steps is None


@pytest.mark.parametrize("key", NEW_NAMES)
def test_keys_of_the_older_schema_are_answered_by_where_they_are_now(key: str) -> None:
    for name in (key, f"plan.{key}"):
        with pytest.raises(ConfigError) as caught:
            make([f"{name}=3"])
        assert str(caught.value) == f"--set {name}: is now {NEW_NAMES[key]}"
    new = NEW_NAMES[key]
    if new.startswith(("layers.", "train.", "bits.")) and " " not in new:
        with pytest.raises(ConfigError) as caught:
            make([f"{new}=[3]"])  # a key that there is: only its value is refused
        assert "unknown key" not in str(caught.value)


def test_what_a_plan_without_rules_has_none_of() -> None:
    with pytest.raises(ConfigError, match=r"plan 'fp' has no rule 'block'; it has none"):
        make(["layers.block.activation.bits=3"], plan="fp")
