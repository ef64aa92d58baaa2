"""A config written as TOML is read back as it was."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from configuring import make, quick, write
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.config import (
    CalibrationConfig,
    Plan,
    Rule,
    TrainConfig,
    canonical_json,
    config_from_toml,
    config_hash,
    load_plan,
    plan_names,
    to_toml,
    workload_names,
)
from robuq_bench.methods import (
    SLOTS,
    Method,
    Slot,
    method_class,
    method_names,
    read_method,
)


def _method(slot: Slot, name: str) -> Method:
    """The method with its defaults, and 4 where it has none."""
    fields = method_class(slot, name).model_fields.items()
    values = {key: 4 for key, field in fields if field.is_required() and key != "method"}
    found = read_method(slot, {"method": name, **values})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("plan", "workload"), list(itertools.product(plan_names(), workload_names()))
)
def test_toml_round_trip(plan: str, workload: str) -> None:
    config = make(plan=plan, workload=workload, seed=2**62)
    text = to_toml(config)
    assert config_from_toml(text, "config.toml") == config
    assert tomllib.loads(text)["plan"]["name"] == plan


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_toml_round_trip_of_any_text(text: str) -> None:
    config = quick([])
    plan = config.plan.model_copy(update={"description": text})
    config = config.model_copy(update={"plan": plan})
    assert config_from_toml(to_toml(config), "x") == config


@st.composite
def methods(draw: st.DrawFn, slot: Slot) -> Method | None:
    """Any registered method of a slot with any parameters that it takes."""
    name = draw(st.sampled_from(["none", *method_names(slot)]))
    values: dict[str, Any] = {"method": name}
    if name == "none":
        return None
    for key, field in method_class(slot, name).model_fields.items():
        if key not in ("method", "sha256") and draw(st.booleans()):
            values[key] = draw(values_of(field.annotation, field.default))
    try:
        return read_method(slot, values)
    except pydantic.ValidationError:
        return _method(slot, name)


def values_of(annotation: Any, default: Any) -> st.SearchStrategy[Any]:
    kinds = {
        bool: st.booleans(),
        int: st.integers(1, 8),
        float: st.floats(0.01, 1),
    }
    found = kinds.get(annotation)
    choices = get_args(annotation)
    if found is None and choices and all(isinstance(choice, str) for choice in choices):
        found = st.sampled_from(choices)
    return st.just(default) if found is None else found


RULES = st.builds(
    Rule,
    match=st.lists(st.text("ab*.", min_size=1, max_size=4), min_size=1, max_size=2),
    kind=st.lists(st.sampled_from(["block", "adaLN", "other"]), min_size=1, max_size=3),
    fixed_bits=st.booleans(),
    **{slot: methods(slot) for slot in SLOTS},
)
ANY_PLAN = st.builds(
    lambda rules, **sections: Plan(
        name="any",
        layers=[r.model_copy(update={"name": f"r{i}"}) for i, r in enumerate(rules)],
        **sections,
    ),
    st.lists(RULES, max_size=3),
    calibration=st.builds(CalibrationConfig, samples=st.integers(1, 99)),
    train=st.builds(TrainConfig, steps=st.none() | st.integers(0, 9)),
)


@settings(max_examples=150)
@given(ANY_PLAN)
def test_toml_round_trip_of_any_plan(plan: Plan) -> None:
    config = quick([]).model_copy(update={"plan": plan})
    text = to_toml(config)
    again = config_from_toml(text, "config.toml")
    assert again == config
    assert [type(m) for m in again.plan.methods()] == [type(m) for m in plan.methods()]
    assert canonical_json(again) == canonical_json(config)
    changed = plan.model_copy(update={"description": "other"})
    assert config_hash(config.model_copy(update={"plan": changed})) == config_hash(config)
    assert Plan.model_validate(tomllib.loads(to_toml(plan))) == plan


def test_a_resolved_plan_is_a_plan_file(tmp_path: Path) -> None:
    for name in plan_names():
        assert load_plan(write(tmp_path / "p.toml", to_toml(load_plan(name)))) == load_plan(name)
