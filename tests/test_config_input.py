"""What people type and save: editors' byte-order marks, text that looks like a number, budgets."""

from __future__ import annotations

import codecs
import errno
import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator

from robuq_bench.config import (
    BitsConfig,
    Config,
    Plan,
    load_allocation_file,
    load_plan,
    load_workload,
    quoted,
    resolve,
    sensitivity_steps,
    training_recipe,
    training_steps,
)
from robuq_bench.config.files import keys_of, validate
from robuq_bench.config.older import NEW_NAMES
from robuq_bench.config.plan import Rule as PlanRule
from robuq_bench.config.resolve import canonical_json, config_from_toml, config_hash, to_toml
from robuq_bench.errors import ConfigError
from robuq_bench.sections import Ints, OptionalInt, Section, Strings

PLAN = 'extends = "a4"\r\n[[layers]]\r\nname = "block"\r\nactivation = {bits = 3}\r\n'
LAYERS = ["a.fc1", "b"]


def make(*overrides: str, study: str = "train-and-eval", plan: str | Plan = "a2") -> Config:
    return resolve(study, "1", plan, "digits", 0, overrides)


# files of Windows' editors


def test_a_byte_order_mark_is_no_part_of_a_plan_or_workload(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(PLAN, "utf-8-sig")
    assert load_plan(tmp_path / "p.toml").uniform_bits == 3
    (tmp_path / "base.toml").write_text('[[layers]]\nactivation = "minmax"\n', "utf-8-sig")
    (tmp_path / "q.toml").write_text('extends = "./base.toml"\n', "utf-8-sig")
    assert load_plan(tmp_path / "q.toml").uniform_bits == 8
    (tmp_path / "w.toml").write_text('extends = "digits"\n[training]\nsteps = 7\n', "utf-8-sig")
    assert load_workload(tmp_path / "w.toml").training.steps == 7


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "layer,bits\na.fc1,2\nb,3\n"),
        ("a.csv", "layer;bits\r\na.fc1;2\r\nb;3\r\n"),  # Excel where the comma is decimal
        ("a.csv", "layer\tbits\na.fc1\t2\nb\t3\n"),
        ("a.json", '{"a.fc1": 2, "b": 3}'),
        ("a.toml", '[bits_by_layer]\n"a.fc1" = 2\nb = 3\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_allocation_files_as_spreadsheets_save_them(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    (tmp_path / name).write_text(text, encoding)
    allocation = BitsConfig(path=str(tmp_path / name))
    assert load_allocation_file(allocation, LAYERS) == {"a.fc1": 2, "b": 3}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["a.toml", "a.json", "a.csv"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / name).write_bytes(mark + "# für\n".encode(encoding))
    wanted = "UTF-8" if encoding == "latin-1" else f"byte-order mark says {encoding[:6].upper()}"
    with pytest.raises(ConfigError, match=rf"{name}.*{wanted}.*save it as UTF-8"):
        load_allocation_file(BitsConfig(path=str(tmp_path / name)), LAYERS)
    if name == "a.toml":
        with pytest.raises(ConfigError, match=rf"{name}.*{wanted}"):
            load_plan(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "layer,bits\nb,2\na.fc1,2\nb,3\n"), ("a.json", '{"b": 2, "a.fc1": 2, "b": 3}')],
)
def test_a_layer_named_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="'b' is named twice"):
        load_allocation_file(BitsConfig(path=str(tmp_path / name)), LAYERS)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000 + "]" * 3000, "{a=" * 3000])
def test_numbers_and_nesting_without_end_are_no_crash(tmp_path: Path, value: str) -> None:
    (tmp_path / "p.toml").write_text(f"name = {value}\n")
    with pytest.raises(ConfigError, match=r"p\.toml: not valid TOML"):
        load_plan(tmp_path / "p.toml")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        config_from_toml(f"name = {value}\n", "config.toml")
    with pytest.raises(ConfigError, match=r"training\.steps: input should be a valid integer"):
        make(f"training.steps={value}")
    (tmp_path / "a.json").write_text(f'{{"b": {value}}}')
    with pytest.raises(ConfigError, match=r"a\.json"):
        load_allocation_file(BitsConfig(path=f"{tmp_path}/a.json"), LAYERS)


# text fields


@pytest.mark.parametrize(
    "text",
    [
        *("2024", "1e5", "007", "true", "false", "nan", "inf", "-0.0", "0x10", "1_000", "[a]"),
        *("{a = 1}", "2024-01-01", "10:30:00", "2024-01-01T00:00:00Z", "None", "#1", "a # b"),
    ],
)
def test_text_fields_take_the_text_as_typed(text: str) -> None:
    for override in (f"data.path={text}", f"data.path= {text} ", f"workload.data.path={text}"):
        assert make(override).workload.data.path == text
    config = make(f"evaluation.vae={text}", study="normality")
    assert config.workload.evaluation.vae == text
    assert config_from_toml(to_toml(config), "config.toml") == config


def test_quotes_are_those_of_toml_and_none_is_nothing() -> None:
    assert make('data.path="2024"').workload.data.path == "2024"
    assert make("data.path='a\"b'").workload.data.path == 'a"b'
    assert make('data.path="a\\tb"').workload.data.path == "a\tb"
    assert make("data.path=none").workload.data.path is None


def test_other_fields_stay_typed() -> None:
    assert make("training.compile=true").workload.training.compile is True
    assert make("normality.images=64", study="normality").settings is not None
    for override in ("training.steps=true", "training.steps=1e5", "training.steps=0800"):
        with pytest.raises(ConfigError, match=r"training\.steps"):
            make(override)
    with pytest.raises(ConfigError, match=r"layers\.block\.weight: unknown weight method 'true'"):
        make("layers.block.weight.method=true")
    with pytest.raises(ConfigError, match=r'layers\.block\.weight: write "none", or a table'):
        make("layers.block.weight=true")


@settings(max_examples=100)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_text_arrives_quoted(text: str) -> None:
    path = make(f"evaluation.vae={quoted(text)}", plan="fp").workload.evaluation.vae
    assert path == (None if text == "none" else text)


# what is written


class Step(Section):
    method: str
    bits: OptionalInt = None


class Rule(Section):
    match: Strings
    weight: Step | None = None
    sizes: Ints = ()


class Rules(Section):
    first: Step
    layers: Annotated[tuple[Rule, ...], BeforeValidator(tuple)]


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: text != "none"
)
STEPS = st.builds(Step, method=TEXT, bits=st.none() | st.integers(1, 16))
RULES = st.builds(
    Rule,
    match=st.lists(TEXT, max_size=8).map(tuple),
    weight=STEPS,
    sizes=st.lists(st.integers(-(2**62), 2**62), max_size=3).map(tuple),
)


@given(st.builds(Rules, first=STEPS, layers=st.lists(RULES, max_size=3).map(tuple)))
def test_arrays_of_tables_are_read_back_as_written(rules: Rules) -> None:
    values = tomllib.loads(to_toml(rules))
    assert values["first"]["bits"] == ("none" if rules.first.bits is None else rules.first.bits)
    assert validate(Rules, values, "rules.toml") == rules


# the training budget


@pytest.mark.parametrize("steps", [1, 99])
def test_a_warm_up_longer_than_the_training_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make(f"training.steps={steps}")
    message = str(caught.value)
    assert f"training.steps is {steps}" in message
    assert "training.sensitivity_steps = 100" in message
    way_out = message.partition("--set ")[2].partition(",")[0]
    config = make(f"training.steps={steps}", way_out)
    assert sensitivity_steps(config) == steps // 4 < steps


def test_the_steps_of_a_plan_come_first_and_are_named() -> None:
    assert sensitivity_steps(make()) == 100
    assert sensitivity_steps(make("bits.steps=7")) == 7
    assert sensitivity_steps(make("bits.steps=0")) == 0
    with pytest.raises(ConfigError, match=r"after bits\.steps = 501 steps"):
        make("bits.steps=501")
    assert sensitivity_steps(make("training.steps=100")) == 100  # on top of these


def test_plans_and_studies_without_a_warm_up_have_any_budget() -> None:
    assert sensitivity_steps(make("training.steps=1", plan="a4")) == 0
    assert make("training.steps=1", study="normality").workload.training.steps == 1
    # No training at all, and none before the sensitivities either: post-training quantization.
    for override in ("training.steps=0", "train.steps=0"):
        config = make(override)
        assert sensitivity_steps(config) == training_steps(config) == 0


def test_the_training_steps_of_a_plan_go_before_those_of_the_workload() -> None:
    assert training_steps(make()) == make().workload.training.steps == 500
    assert training_steps(make("train.steps=333")) == 333
    assert training_steps(make("train.steps=333", "training.steps=0")) == 333
    with pytest.raises(ConfigError, match=r"^train\.steps is 70, .*\.sensitivity_steps = 100"):
        make("train.steps=70")
    with pytest.raises(ConfigError, match=r"^train\.steps is 70, but bits .* bits\.steps = 71 "):
        make("train.steps=70", "bits.steps=71")


def test_a_plan_may_have_a_learning_rate_that_set_overrides(tmp_path: Path) -> None:
    path = tmp_path / "slow.toml"
    path.write_text('extends = "a4"\n[train]\nlearning_rate = 1e-4\n')
    own = training_recipe(make(plan=str(path)))
    assert own == make().workload.training.model_copy(update={"learning_rate": 1e-4})
    for key in ("training", "workload.training", "train", "plan.train"):
        config = make(f"{key}.learning_rate=3e-4", plan=str(path))
        assert training_recipe(config).learning_rate == 3e-4
        assert training_recipe(make(f"{key}.learning_rate=3e-4")).learning_rate == 3e-4
    with pytest.raises(ConfigError, match="two learning rates of one training"):
        make("training.learning_rate=3e-4", "train.learning_rate=1e-4", plan=str(path))


@pytest.mark.parametrize(
    ("study", "setting", "most"),
    [
        ("sensitivity", "training.log_every_steps=50", 200),  # its default
        ("normality", "normality.qat_steps=[0,60]", 60),
        ("allocation", "allocation.warmup_steps=51", 51),
    ],
)
def test_a_study_looks_no_further_than_the_learning_rate_lasts(
    study: str, setting: str, most: int
) -> None:
    assert make(setting, f"training.steps={most}", study=study).workload.training.steps == most
    with pytest.raises(ConfigError, match=rf"{study}\..*training\.steps = 50: .*steps={most}"):
        make(setting, "training.steps=50", study=study)


def test_an_old_run_that_never_trained_its_bits_stays_readable() -> None:
    text = to_toml(make()).replace("steps = 500\n", "steps = 50\n")
    assert config_from_toml(text, "config.toml").workload.training.steps == 50


def test_a_rate_of_the_plan_and_that_of_the_workload_are_one_run() -> None:
    own = make("train.learning_rate=0.002", plan="a4")
    assert config_hash(make("training.learning_rate=0.002", plan="a4")) == config_hash(own)
    assert config_hash(make(plan="a4")) != config_hash(own)
    assert config_hash(make("train.learning_rate=0.001", plan="a4")) == config_hash(make(plan="a4"))


def test_a_rate_of_the_branch_makes_another_run_than_when_it_was_not_obeyed() -> None:
    def training(*overrides: str) -> dict[str, Any]:
        document = json.loads(canonical_json(make(*overrides, plan="a4", study="toy")))
        return dict(document["workload"]["training"])

    assert not any(name.startswith("low_rank") for name in training())  # the hash is as it was
    given_rate = training("training.low_rank_learning_rate=0.001")
    assert given_rate["low_rank_learning_rate_is_used"] is True
    text = to_toml(make("training.low_rank_learning_rate=0.001", plan="a4"))
    assert config_from_toml(text, "config.toml").workload.training.low_rank_learning_rate == 0.001


# files of any content

VALUES = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 9) | st.text(max_size=3), max_size=3),
).map(lambda value: to_literal(value)) | st.sampled_from(
    ["{}", "{a = 1}", "2024-01-01", "10:00:00", "[[]]", "9" * 5000, "[" * 2000, "", "'", "\ufeff"]
)


def to_literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(to_literal, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else repr(value)


RULE_KEYS = [f"[[layers]]\n{key}" for key in (*PlanRule.model_fields, "weight.method", "x")]
OLD_KEYS = [*NEW_NAMES, "layers", "weights", "qat"]


@settings(max_examples=400)
@given(
    st.sampled_from([*keys_of(Plan), "extends", "x", "name.a", *OLD_KEYS, *RULE_KEYS]),
    VALUES,
)
def test_any_plan_file_loads_or_is_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(f"{key} = {value}\n".encode("utf-8", "replace"))
    message = f"{path}: "
    try:
        message += to_toml(load_plan(path))
    except ConfigError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")


def test_a_folder_that_changes_while_it_is_searched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `/proc` does: processes end between the listing of a folder and the look inside."""
    gone = tmp_path / "1234"
    gone.mkdir()
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)) == gone:
            raise ProcessLookupError(errno.ESRCH, "No such process", str(gone))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=f"{gone}:? cannot be read: No such process"):
        make(f"normality.captured={quoted(str(tmp_path))}", study="normality")


@pytest.mark.parametrize("field", ["training.batch_size", "training.steps", "data.image_size"])
def test_numbers_beyond_64_bits_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}.*must be a number of 64 bits"):
        resolve("train-and-eval", "1", "a4", "digits", 0, [f"{field}={10**30}"])
