"""The hash that addresses a run, and the files that a config names."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.config import (
    AllocationConfig,
    Config,
    asset_path,
    canonical_json,
    config_from_toml,
    config_hash,
    load_allocation_file,
    load_plan,
    load_workload,
    resolve,
    to_toml,
)
from robuq_bench.config.files import PACKAGE
from robuq_bench.config.studies import STUDY_SETTINGS
from robuq_bench.errors import ConfigError

ROOT = PACKAGE.parent
PLANS = [
    "a2", "a2-uniform", "a3", "a3-uniform", "a4", "a8", "baseline-a2", "baseline-a3",
    "baseline-a4", "bitnetv2-a3", "bitnetv2-a4", "fp",
]  # fmt: skip
WORKLOADS = ["digits", "imagenet256", "mnist32"]


cached_plan, cached_workload = functools.cache(load_plan), functools.cache(load_workload)


def make(overrides: list[str] | None = None, **kwargs: Any) -> Config:
    arguments = {"study": "toy", "version": "1", "plan": "a2", "workload": "digits"} | kwargs
    return resolve(**arguments, overrides=overrides or [])


def quick(overrides: list[str]) -> Config:
    """`make` for hypothesis: nothing is read from disk."""
    workload = cached_workload("digits")
    teacher = workload.teacher.model_copy(update={"checkpoint": ""})
    parts = {
        "plan": cached_plan("a2"),
        "workload": workload.model_copy(update={"teacher": teacher}),
    }
    return make(overrides, **parts)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# frozen, and addressed by content


def test_configs_cannot_be_changed() -> None:
    config = make()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.plan.low_rank.rank = 1  # type: ignore[misc]


def test_the_hash_is_sha256_of_sorted_compact_json_without_descriptions() -> None:
    config = make(["teacher.checkpoint=''"])
    values = config.model_dump(mode="json", exclude_none=True)
    del values["plan"]["description"], values["workload"]["description"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert canonical_json(config) == text
    assert config_hash(config) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_does_not_depend_on_process_or_order_of_keys(tmp_path: Path) -> None:
    code = (
        "from robuq_bench.config import *;print(config_hash(resolve('toy', '1', 'a2', 'digits')))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout.strip() == config_hash(make())
    sections = (PACKAGE / "plans" / "a4.toml").read_text().split("\n\n")
    write(tmp_path / "a4.toml", "\n\n".join([sections[0], *reversed(sections[1:])]))
    assert config_hash(make(plan=tmp_path / "a4.toml")) == config_hash(make(plan="a4"))


def test_descriptions_are_not_hashed() -> None:
    changed = make(["plan.description=x", "workload.description=y"])
    assert changed != make()
    assert config_hash(changed) == config_hash(make())


def _leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(values, dict):
        return [path]
    return list(itertools.chain.from_iterable(_leaves(v, (*path, k)) for k, v in values.items()))


def _changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if value is None:
        return 7
    return (*value, "more") if isinstance(value, tuple) else value + type(value)("1")


def _replace(section: Any, path: tuple[str, ...]) -> Any:
    old = getattr(section, path[0])
    new = _changed(old) if len(path) == 1 else _replace(old, path[1:])
    return section.model_copy(update={path[0]: new})


@pytest.mark.parametrize("study", ["toy", *STUDY_SETTINGS])
def test_every_field_decides_the_hash_but_what_decides_no_result(study: str) -> None:
    config = make(["teacher.checkpoint=''"], study=study)
    no_result = ("description", "inception_weights")  # the latter's content is pinned
    paths = [path for path in _leaves(config.model_dump()) if path[-1] not in no_result]
    assert len(paths) > 70
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the changed values need not be valid
        # Settings of other studies are absent as a whole.
        paths = [path for path in paths if path[-1] not in STUDY_SETTINGS]
        hashes = {config_hash(_replace(config, path)) for path in paths}
    assert len(hashes | {config_hash(config)}) == len(paths) + 1


@pytest.mark.parametrize(("plan", "workload"), list(itertools.product(PLANS, WORKLOADS)))
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


def test_a_resolved_plan_is_a_plan_file(tmp_path: Path) -> None:
    for name in PLANS:
        assert load_plan(write(tmp_path / "p.toml", to_toml(load_plan(name)))) == load_plan(name)


# files that a config names


def test_a_teacher_is_known_by_its_content_not_its_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.safetensors").write_bytes(b"weights")
    configs = [make([f"teacher.checkpoint={tmp_path / f / 't.safetensors'}"]) for f in "ab"]
    digest = hashlib.sha256(b"weights").hexdigest()
    assert [config.workload.teacher.sha256 for config in configs] == [digest, digest]
    assert config_hash(configs[0]) == config_hash(configs[1])
    (tmp_path / "a" / "t.safetensors").write_bytes(b"other weights")
    again = make([f"teacher.checkpoint={tmp_path / 'a' / 't.safetensors'}"])
    assert config_hash(again) != config_hash(configs[0])


def test_a_stated_digest_is_kept_for_the_loader_to_check(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"weights")
    given_path = f"teacher.checkpoint={tmp_path / 't.safetensors'}"
    stated = f"teacher.sha256='{'0' * 64}'"
    for overrides in ([given_path, stated], [stated, given_path]):
        assert make(overrides).workload.teacher.sha256 == "0" * 64


def test_a_new_checkpoint_does_not_inherit_the_old_digest(tmp_path: Path) -> None:
    text = to_toml(load_workload("digits"))
    old = f'sha256 = "{"0" * 64}"'
    lines = [old if line.startswith("sha256 =") else line for line in text.splitlines()]
    path = write(tmp_path / "w.toml", "\n".join(lines))
    assert make(workload=path).workload.teacher.sha256 == "0" * 64
    missing = make(["teacher.checkpoint=elsewhere.pt"], workload=path)
    assert missing.workload.teacher.sha256 == ""


@pytest.mark.parametrize("study", ["train-teacher", "train-features"])
def test_what_a_training_makes_does_not_decide_which_run_it_is(tmp_path: Path, study: str) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"weights")
    override = [f"teacher.checkpoint={tmp_path / 't.safetensors'}"]
    assert config_hash(make(override, study=study)) == config_hash(make(study=study))


def test_assets_are_beside_the_package() -> None:
    assert asset_path("asset:x.safetensors") == PACKAGE / "assets" / "x.safetensors"
    assert asset_path("dir/x.pt") == Path("dir/x.pt")


LAYERS = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"blocks.0.mlp.fc1": 2, "blocks.0.attn.qkv": 3}'),
        ("a.json", '{"bits_by_layer": {"blocks.0.attn.qkv": 3, "blocks.0.mlp.fc1": 2}}'),
        ("a.csv", "layer,macs,bits\nblocks.0.attn.qkv,10,3\nblocks.0.mlp.fc1,20,2\n"),
    ],
)
def test_allocation_files(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    overrides = [f"allocation.path={path}", "allocation.method=file"]
    allocation = make(overrides, plan="a4").plan.allocation
    assert allocation.sha256 == hashlib.sha256(text.encode()).hexdigest()
    bits = load_allocation_file(allocation, LAYERS)
    assert list(bits.items()) == [("blocks.0.attn.qkv", 3), ("blocks.0.mlp.fc1", 2)]
    write(path, text + " ")
    with pytest.raises(ConfigError, match="changed since this run was planned"):
        load_allocation_file(allocation, LAYERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"blocks.0.attn.qkx": 3}', "unknown layer 'blocks.0.attn.qkx'; did you mean"),
        ('{"blocks.0.attn.qkv": 3}', "no bits for 1 layers, first 'blocks.0.mlp.fc1'"),
        ('{"blocks.0.attn.qkv": 2.5}', "bits must be 1 to 8, got 2.5"),
        ('{"blocks.0.attn.qkv": true}', "bits must be 1 to 8, got True"),
        ("[1, 2]", "neither JSON"),
        ("{", "neither JSON"),
    ],
)
def test_bad_allocation_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(ConfigError) as caught:
        load_allocation_file(AllocationConfig(method="file", path=str(path)), LAYERS)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_allocation_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        load_allocation_file(AllocationConfig(method="file", path="nowhere.json"), LAYERS)


def test_importing_configs_loads_nothing_heavy() -> None:
    code = (
        "import robuq_bench, robuq_bench.config as c, sys; c.resolve('t', '1', 'a2', 'digits');"
        "print(sorted({'torch', 'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
