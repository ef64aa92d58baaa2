"""Plans, workloads and overrides: what is read, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robuq_bench.config import (
    Config,
    Plan,
    Workload,
    load_plan,
    load_workload,
    plan_names,
    resolve,
    to_toml,
    workload_names,
)
from robuq_bench.config.files import PACKAGE, keys_of
from robuq_bench.errors import ConfigError

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


# packaged files


def test_the_packaged_names_are_those_of_the_documentation() -> None:
    assert plan_names() == PLANS
    assert workload_names() == WORKLOADS


@pytest.mark.parametrize("name", PLANS)
def test_every_packaged_plan_loads_and_says_how_to_run_it(name: str) -> None:
    plan = load_plan(name)
    text = (PACKAGE / "plans" / f"{name}.toml").read_text()
    assert plan.name == name
    assert plan.description
    assert f"# command:  python bench.py train-and-eval --plan {name}\n" in text
    assert "# time:" in text
    assert "# expected:" in text


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_packaged_workload_loads(name: str) -> None:
    workload = load_workload(name)
    assert workload.name == name
    assert workload.description
    assert "# expected:" in (PACKAGE / "workloads" / f"{name}.toml").read_text()


@pytest.mark.parametrize(
    ("name", "weights", "activations", "bits", "rotation", "has_branch", "mean_bits"),
    [
        ("fp", "none", "none", None, "none", False, None),
        ("a8", "ternary-twn", "robust-midtread", 8, "randomized-hadamard", True, None),
        ("a4", "ternary-twn", "robust-midtread", 4, "randomized-hadamard", True, None),
        ("a3", "ternary-twn", "robust-midtread", 4, "randomized-hadamard", True, 3.0),
        ("a2", "ternary-twn", "robust-midtread", 4, "randomized-hadamard", True, 2.0),
        ("a3-uniform", "ternary-twn", "robust-midtread", 3, "randomized-hadamard", True, None),
        ("a2-uniform", "ternary-twn", "robust-midtread", 2, "randomized-hadamard", True, None),
        ("baseline-a4", "ternary-twn", "minmax", 4, "none", True, None),
        ("baseline-a3", "ternary-twn", "minmax", 3, "none", True, None),
        ("baseline-a2", "ternary-twn", "minmax", 2, "none", True, None),
        ("bitnetv2-a4", "ternary-absmean", "bitnet", 4, "hadamard", False, None),
        ("bitnetv2-a3", "ternary-absmean", "bitnet", 3, "hadamard", False, None),
    ],
)
def test_plans_are_the_methods_they_are_named_after(
    name: str, weights: str, activations: str, bits: int | None, rotation: str, has_branch: bool,
    mean_bits: float | None,
) -> None:  # fmt: skip
    plan = load_plan(name)
    assert plan.weights.quantizer == weights
    assert plan.activations.quantizer == activations
    assert plan.activations.bits == bits or bits is None
    assert plan.rotation.kind == rotation
    assert (plan.low_rank.rank > 0) == has_branch
    assert plan.allocation.mean_bits == mean_bits
    assert plan.allocation.method == ("uniform" if mean_bits is None else "ampn")
    assert plan.is_full_precision == (name == "fp")
    assert plan.adaln.activation_bits == (None if name == "fp" else 4)
    robuq_or_baseline = name != "fp" and not name.startswith("bitnetv2")
    assert plan.attention.matmul_bits == (8 if robuq_or_baseline else None)
    everywhere = not name.startswith("bitnetv2")
    assert (plan.rotation.layers == ("*",)) == everywhere


def test_imagenet256_is_dit_xl_2_with_its_published_size() -> None:
    """675.13 M parameters (facebookresearch/DiT), counted by hand from depth, width and patch."""
    model = load_workload("imagenet256").model
    d, patch = model.hidden_size, model.patch_size**2 * model.in_channels
    out = patch * (2 if model.learn_sigma else 1)
    block = 4 * d * d + 4 * d + 2 * 4 * d * d + 5 * d + 6 * d * d + 6 * d
    embedders = (patch * d + d) + (256 * d + d + d * d + d) + (model.num_classes + 1) * d
    positions = (model.input_size // model.patch_size) ** 2 * d
    final = 2 * d * d + 2 * d + d * out + out
    assert model.depth * block + embedders + positions + final == 675_129_632


# reading files


def test_a_file_is_found_by_path_and_named_after_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", '[activations]\nquantizer = "minmax"\nbits = 3\n')
    for spec in (path, str(path)):
        plan = load_plan(spec)
        assert (plan.name, plan.activations.bits) == ("mine", 3)
    assert load_plan(write(tmp_path / "b.toml", 'name = "other"')).name == "other"


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "a4"\n[low_rank]\nrank = 0\n')
    plan, base = load_plan(path), load_plan("a4")
    assert plan.low_rank.rank == 0
    assert plan.model_dump(exclude={"name", "description", "low_rank"}) == base.model_dump(
        exclude={"name", "description", "low_rank"}
    )
    assert (plan.name, plan.description) == ("mine", "")


def test_extends_takes_a_path_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", '[activations]\nquantizer = "minmax"\nbits = 7\n')
    path = write(tmp_path / "mine.toml", 'extends = "./base.toml"\n[weights]\nquantizer = "none"')
    assert load_plan(path).activations.bits == 7


def test_extends_goes_to_any_depth_and_the_nearest_wins(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    # Names without a folder would be packaged ones; each path is that of the file that has it.
    write(tmp_path / "0.toml", 'extends = "a8"\ndescription = "0"\n[low_rank]\nrank = 1\n')
    write(folder / "1.toml", 'extends = "../0.toml"\n[qat]\ndenoising_weight = 0.5\n')
    write(folder / "2.toml", 'extends = "./1.toml"\n[low_rank]\nrank = 2\n')
    path = write(tmp_path / "3.toml", 'extends = "deep/2.toml"\n[activations]\nbits = 3\n')
    plan, base = load_plan(path), load_plan("a8")
    assert (plan.name, plan.description) == ("3", "")
    assert (plan.low_rank.rank, plan.qat.denoising_weight, plan.activations.bits) == (2, 0.5, 3)
    assert plan.activations.quantizer == base.activations.quantizer
    assert plan.rotation == base.rotation
    assert load_plan(folder / "1.toml").low_rank.rank == 1
    longest = path
    for number in range(4, 1200):  # more than Python's stack is deep
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
        ("[activations]\nbitz = 7\n", r"base\.toml: activations\.bitz: .*did you mean 'bits'"),
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
    path = write(tmp_path / "mine.toml", 'extends = "./middle.toml"\n[activations]\nbitz = 1\n')
    with pytest.raises(ConfigError, match=message) as caught:
        load_plan(path)
    assert "mine.toml" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[activations]\nbitz = 4", "activations.bitz: unknown key; did you mean 'bits'?"),
        ("[activation]\nbits = 4", "activation: unknown key; did you mean 'activations'?"),
        ("extend = 'a4'", "extend: unknown key; did you mean 'extends'?"),
        ("mean_bits = 2", "mean_bits: unknown key; did you mean 'allocation.mean_bits'?"),
        ("activations = 4", "activations: must be a section [activations], got 4"),
        ("[activations]\nbits = '4'", "activations.bits: input should be a valid integer, got '4'"),
        ("[activations]\nbits = true", "activations.bits: input should be a valid integer"),
        ("[activations]\nbits = 2.5", "activations.bits: input should be a valid integer"),
        ("[activations]\nbits = 9", "activations.bits: input should be less than or equal to 8"),
        ("[qat]\ndenoising_weight = nan", "qat.denoising_weight: input should be a finite number"),
        ("[rotation]\nlayers = '*'", "rotation.layers: input should be a valid tuple"),
        ("[activations]\nquantizer = 'min-max'", "did you mean 'minmax'?"),
        ("name = '../escape'", "name: string should match pattern"),
        ("extends = 3", "extends must be the name or path of one plan"),
        ("extends = 'a5'", "extends: unknown plan 'a5'; did you mean 'a"),
        ("bits = = 4", "not valid TOML"),
        ("[allocation]\nmethod = 'ampn'", "allocation: method 'ampn' needs mean_bits"),
        ("[allocation]\nmean_bits = 2", "mean_bits is only used by method 'ampn'"),
        ("[allocation]\nmethod = 'file'", "method 'file' and path go together"),
        ("[allocation]\nbit_choices = [4, 2]", "must ascend without repeats"),
        ("[allocation]\nbit_choices = []", "must be between 1 and 8"),
        ("[rotation]\nkind = 'hadamard'", "so rotation.kind would be ignored"),
        ("[adaln]\nactivation_bits = 4\n[weights]\nquantizer = 'ternary-twn'", "needs an activ"),
        ("[qat]\ndenoising_weight = 0\ndistillation_weight = 0", "must be positive"),
    ],
)
def test_bad_plans_are_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("mean", ["0.5", "4.5"])
def test_an_unreachable_budget_is_refused_with_the_reachable_range(mean: str) -> None:
    with pytest.raises(ConfigError, match=rf"{mean} cannot be reached .* between 1 and 4"):
        make([f"allocation.mean_bits={mean}"])


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", "[low_rank]\nrank = -1\n[weights]\nquantiser = 'none'\n")
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_unreadable_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plan file not found: nowhere/x"):
        load_plan("nowhere/x")
    with pytest.raises(ConfigError, match="plan file not found"):
        load_plan(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'description = "\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_plan(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.patch_size=3", "input_size 8 is not a multiple of patch_size 3"),
        ("model.num_heads=5", "hidden_size 144 is not a multiple of num_heads 5"),
        ("model.hidden_size=146", "hidden_size 146 is not a multiple of"),
        ("data.channels=3", "data.channels is 3 but model.in_channels is 1"),
        ("evaluation.sampling_steps=1001", "exceeds diffusion.num_train_timesteps"),
        ("diffusion.beta_end=1e-5", "beta_start must be below beta_end"),
        ("evaluation.features=digit", "did you mean 'digits'?"),
        ("teacher.sha256=abc", "should match pattern"),
    ],
)
def test_workloads_that_cannot_work_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="workload") as caught:
        make([override])
    assert message in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    text = to_toml(load_workload("digits")).replace("depth = 4\n", "")
    with pytest.raises(ConfigError, match=r"model\.depth: missing; add it"):
        load_workload(write(tmp_path / "w.toml", text))


# overrides


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", '[activations]\nquantizer = "minmax"\nbits = 5\n')
    assert load_plan(write(tmp_path / "d.toml", "")).activations.bits == 8
    assert make(plan=path).plan.activations.bits == 5
    assert make(["activations.bits=6"], plan=path).plan.activations.bits == 6
    assert make(["activations.bits=6", "activations.bits=7"], plan=path).plan.activations.bits == 7


def test_short_and_full_keys_mean_the_same() -> None:
    short = make(["training.steps=7", "low_rank.rank=3", "teacher.training.steps=9"])
    full = make(["workload.training.steps=7", "plan.low_rank.rank=3",
                 "workload.teacher.training.steps=9"])  # fmt: skip
    assert short == full
    assert (short.workload.training.steps, short.plan.low_rank.rank) == (7, 3)
    assert short.workload.teacher.training.steps == 9


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("training.learning_rate=3e-4", lambda c: c.workload.training.learning_rate, 3e-4),
        ("training.learning_rate=1", lambda c: c.workload.training.learning_rate, 1.0),
        ("training.compile = true", lambda c: c.workload.training.compile, True),
        ("rotation.layers=['*.proj', 'x']", lambda c: c.plan.rotation.layers, ("*.proj", "x")),
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
        ("steps=1", "did you mean 'teacher.training.steps' or 'training.steps'?"),
        ("trainin.steps=1", "did you mean 'training.steps'?"),
        ("plan.weights.quantiser=none", "did you mean 'weights.quantizer'?"),
        ("training=3", "is a section, not a key; its keys: training.steps, "),
        ("training.frobnicate=3", "known there: training.steps, "),
        ("name=x", "is a key of both; write workload.name or plan.name"),
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


KEYS = sorted({*keys_of(Plan), *keys_of(Workload)})


@settings(max_examples=200)
@example("teacher.checkpoint", "~nobody-here/x.pt")
@example("teacher.checkpoint", "nul\0byte")
@example("allocation.path", "~")
@given(st.sampled_from(KEYS) | st.text(max_size=40), st.text(max_size=20))
def test_any_override_is_either_applied_or_a_config_error(key: str, value: str) -> None:
    try:
        quick([f"{key}={value}"])
    except ConfigError:
        return
    name = key.strip()
    assert name.removeprefix("plan.").removeprefix("workload.") in KEYS


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


def test_a_digest_is_not_inherited_by_another_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits"\n[teacher]\ncheckpoint = "mine.safetensors"\n')
    assert load_workload(path).teacher.sha256 == ""
    digest = "a" * 64
    path.write_text(path.read_text() + f'sha256 = "{digest}"\n')
    assert load_workload(path).teacher.sha256 == digest
    path.write_text('extends = "digits"\n[training]\nsteps = 600\n')
    assert load_workload(path).teacher.sha256 == load_workload("digits").teacher.sha256 != ""
