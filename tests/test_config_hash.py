"""The hash that addresses a run, and the files that a config names."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pydantic
import pytest
import tomli_w
from configuring import make, quick, write

from robuq_bench.config import (
    BitsConfig,
    asset_path,
    canonical_json,
    config_hash,
    load_allocation_file,
    load_plan,
    load_workload,
    to_toml,
)
from robuq_bench.config.files import PACKAGE
from robuq_bench.errors import ConfigError
from robuq_bench.methods import (
    SLOTS,
    Method,
    Slot,
    method_class,
    method_names,
    read_method,
)
from robuq_bench.study_index import list_studies

ROOT = PACKAGE.parent
WITH_SETTINGS = [study.name for study in list_studies() if study.settings]
#: With a plan and a workload that can be set; a study of a run takes the run's.
WITH_PLANS = [
    study.name
    for study in list_studies()
    if study.settings and study.uses_plan and study.uses_overrides
]


# frozen, and addressed by content


def test_configs_cannot_be_changed() -> None:
    config = make()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.plan.layers[0].branch.rank = 1  # type: ignore[misc]


def test_the_hash_is_sha256_of_sorted_compact_json_without_descriptions() -> None:
    config = make(["teacher.checkpoint=''"])
    values = config.model_dump(mode="json", exclude_none=True)
    del values["plan"]["description"], values["workload"]["description"]
    del values["plan"]["calibration"]  # no method of a2 reads it
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
    plan = load_plan("a4").model_dump(mode="json", exclude_none=True)
    text = tomli_w.dumps(_reversed(plan))
    assert text.index("[train]") < text.index("[[layers]]")
    write(tmp_path / "a4.toml", text)
    assert config_hash(make(plan=tmp_path / "a4.toml")) == config_hash(make(plan="a4"))


def _reversed(value: Any) -> Any:
    """Tables with their keys in the other order; the order of rules is what they mean."""
    if isinstance(value, dict):
        return {key: _reversed(item) for key, item in reversed(value.items())}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


def test_the_order_of_rules_and_their_names_decide_the_hash() -> None:
    plan = load_plan("bitnetv2-a4")
    first, second, third = plan.layers
    orders = [(first, second, third), (second, first, third), (first, third, second)]
    plans = [plan.model_copy(update={"layers": order}) for order in orders]
    assert len({config_hash(make(plan=each)) for each in plans}) == 3


def test_descriptions_are_not_hashed() -> None:
    changed = make(["plan.description=x", "workload.description=y"])
    assert changed != make()
    assert config_hash(changed) == config_hash(make())


Place = tuple[str | int, ...]


def _leaves(values: Any, path: Place = ()) -> list[Place]:
    items: Any = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, tuple) and values and isinstance(values[0], dict):
        items = enumerate(values)  # rules
    if not items:
        return [path]
    return list(itertools.chain.from_iterable(_leaves(v, (*path, k)) for k, v in items))


def _changed(value: Any, key: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if value is None and key in SLOTS:
        return _method(key, method_names(key)[0])
    if value is None:
        return 7
    return (*value, "more") if isinstance(value, tuple) else value + type(value)("1")


def _replace(section: Any, path: Place) -> Any:
    """A copy with the value at `path` changed."""
    path = ("settings" if path[0] in WITH_SETTINGS else path[0], *path[1:])
    value: Any = section
    for key in path:
        value = value[key] if isinstance(value, tuple) else getattr(value, str(key))
    return _replace_by(section, path, _changed(value, path[-1]))


def _replace_by(section: Any, path: Place, new: Any) -> Any:
    if not path:
        return new
    if isinstance(section, tuple):
        index = int(path[0])
        inner = _replace_by(section[index], path[1:], new)
        return (*section[:index], inner, *section[index + 1 :])
    key = str(path[0])
    return section.model_copy(update={key: _replace_by(getattr(section, key), path[1:], new)})


@pytest.mark.parametrize("study", ["toy", *WITH_PLANS])
def test_every_field_decides_the_hash_but_what_decides_no_result(study: str) -> None:
    # A method that is fitted to calibration inputs, so that [calibration] is read.
    overrides = ["teacher.checkpoint=''", "layers.block.weight=gptq"]
    config = make(overrides, study=study)
    assert config.plan.needs
    no_result = ("description", "inception_weights")  # the latter's content is pinned
    paths = [path for path in _leaves(config.model_dump()) if path[-1] not in no_result]
    assert len(paths) > 90
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the changed values need not be valid
        hashes = {config_hash(_replace(config, path)) for path in paths}
    assert len(hashes | {config_hash(config)}) == len(paths) + 1


@pytest.mark.parametrize("study", sorted({*WITH_SETTINGS} - {*WITH_PLANS}))
def test_every_setting_of_a_study_without_a_plan_decides_the_hash(study: str) -> None:
    config = make(study=study)
    paths = [path for path in _leaves(config.model_dump()) if path[0] == study]
    assert len(paths) == len(type(config.settings).model_fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hashes = {config_hash(_replace(config, path)) for path in paths}
    assert len(hashes | {config_hash(config)}) == len(paths) + 1


def test_calibration_decides_the_hash_only_where_a_method_reads_it() -> None:
    change = "plan.calibration.samples=7"
    assert load_plan("a4").needs == frozenset()
    assert config_hash(make([change], plan="a4")) == config_hash(make(plan="a4"))
    gptq = ["layers.block.weight=gptq"]
    assert config_hash(make([*gptq, change])) != config_hash(make(gptq))


PARAMETERS = [
    (slot, name, key)
    for slot in SLOTS
    for name in method_names(slot)
    for key in method_class(slot, name).model_fields
]


@pytest.mark.parametrize(("slot", "name", "key"), PARAMETERS)
def test_every_parameter_of_every_method_decides_the_hash(slot: Slot, name: str, key: str) -> None:
    config = _replace_by(quick([]), ("plan", "layers", 1, slot), _method(slot, name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = _replace(config, ("plan", "layers", 1, slot, key))
        assert config_hash(changed) != config_hash(config)


def _method(slot: Slot, name: str) -> Method:
    """The method with its defaults, and 4 where it has none."""
    fields = method_class(slot, name).model_fields.items()
    values = {key: 4 for key, field in fields if field.is_required() and key != "method"}
    found = read_method(slot, {"method": name, **values})
    assert found is not None
    return found


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
    allocation = make([f"bits.path={path}"], plan="a4").plan.bits
    assert allocation is not None
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
        load_allocation_file(BitsConfig(path=str(path)), LAYERS)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_allocation_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        load_allocation_file(BitsConfig(path="nowhere.json"), LAYERS)


def test_bits_of_a_file_are_known_by_content_not_place(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write(tmp_path / name, '{"x": 2}')
    first, second = (make([f"bits.path={tmp_path / n}"], plan="a4") for n in ("a.json", "b.json"))
    assert config_hash(first) == config_hash(second) != config_hash(make(plan="a4"))
    write(tmp_path / "a.json", '{"x": 3}')
    assert config_hash(make([f"bits.path={tmp_path / 'a.json'}"], plan="a4")) != config_hash(first)


HEAVY = "sorted({'torch', 'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules))"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import robuq_bench, robuq_bench.config as c; c.plan_names()", "[]"),
        ("import robuq_bench.config as c; c.resolve('t', '1', 'fp', 'digits')", "[]"),
        ("import robuq_bench.methods as m; [m.method_names(slot) for slot in m.SLOTS]", "[]"),
        # A slip is answered before the plan is loaded.
        (
            "import contextlib, robuq_bench.config as c, robuq_bench.errors as e\n"
            "with contextlib.suppress(e.ConfigError):"
            " c.resolve('t', '1', 'a2', 'digits', 0, ['bits.meen=2'])",
            "[]",
        ),
        # A method is a file that computes: naming one imports it.
        ("import robuq_bench.config as c; c.load_plan('a2')", "['numpy', 'torch']"),
    ],
)
def test_configs_load_nothing_heavy_until_a_method_is_named(code: str, loaded: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}\nprint({HEAVY})"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == loaded
