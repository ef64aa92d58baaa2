"""Plans, workloads and overrides: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import (
    Config,
    config_for,
    config_hash,
    load_plan,
    load_workload,
    plan_names,
    resolve,
    to_toml,
    workload_names,
)
from robuq_bench.config.files import PACKAGE
from robuq_bench.errors import ConfigError

PLANS = [
    "a2", "a2-centred", "a2-uniform", "a3", "a3-uniform", "a4", "a4-centred", "a8", "baseline-a2",
    "baseline-a3",
    "baseline-a4", "bitnetv2-a3", "bitnetv2-a4", "fp", "quarot-w4a4", "rtn-w4a4",
]  # fmt: skip
WORKLOADS = [
    "digits",
    "digits-outliers",
    "fashion28",
    "fashion28-outliers",
    "imagenet256",
    "mnist32",
]


def make(overrides: list[str] | None = None, **kwargs: Any) -> Config:
    arguments = {"study": "toy", "version": "1", "plan": "a2", "workload": "digits"} | kwargs
    return resolve(**arguments, overrides=overrides or [])


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


SVD = {"method": "svd", "sha256": "", "rank": 16, "at_width": 1152}
TWN = {"method": "ternary-twn", "sha256": ""}
ABSMEAN = {"method": "ternary-absmean", "sha256": ""}
RANDOMIZED = {"method": "randomized-hadamard", "sha256": ""}
HADAMARD = {"method": "hadamard", "sha256": ""}
ROBUQ, BASELINE = (RANDOMIZED, SVD, TWN, "robust-midtread"), (None, SVD, TWN, "minmax")


@pytest.mark.parametrize(
    ("name", "slots", "bits", "mean"),
    [
        ("a8", ROBUQ, 8, None),
        ("a4", ROBUQ, 4, None),
        ("a3", ROBUQ, 4, 3.0),
        ("a2", ROBUQ, 4, 2.0),
        ("a3-uniform", ROBUQ, 3, None),
        ("a2-uniform", ROBUQ, 2, None),
        ("baseline-a4", BASELINE, 4, None),
        ("baseline-a3", BASELINE, 3, None),
        ("baseline-a2", BASELINE, 2, None),
        ("bitnetv2-a4", (None, None, ABSMEAN, "bitnet"), 4, None),
        ("bitnetv2-a3", (None, None, ABSMEAN, "bitnet"), 3, None),
    ],
)
def test_plans_are_the_methods_they_are_named_after(
    name: str, slots: Any, bits: int, mean: float | None
) -> None:
    plan = load_plan(name)
    rotation, branch, weight, activation = slots
    methods = {
        "centring": None,
        "scaling": None,
        "rotation": rotation,
        "branch": branch,
        "weight": weight,
    }

    def filled(slots: dict[str, Any], bits: int, fixed: bool) -> dict[str, Any]:
        quantizer = {"method": activation, "sha256": "", "bits": bits}
        return slots | {"activation": quantizer, "fixed_bits": fixed}

    def of(layer: str, kind: Any) -> dict[str, Any]:
        rule = plan.rule_for(layer, kind)
        assert rule is not None
        return rule.model_dump(exclude={"name", "match", "kind"})

    # The modulation has 4 bits in all of them, outside the allocation.
    assert of("blocks.0.adaLN_modulation.1", "adaLN") == filled(methods, 4, True)
    assert of("blocks.0.attn.qkv", "block") == filled(methods, bits, False)
    projections = ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "b.0.attn1.to_out.0", "b.0.ff.net.2"]
    if name.startswith("bitnetv2"):
        methods = methods | {"rotation": HADAMARD}
    for layer in projections:
        assert of(layer, "block") == filled(methods, bits, False)
    assert plan.rule_for("final_layer.linear", "other") is None
    assert plan.uniform_bits == bits
    assert (None if plan.bits is None else plan.bits.mean) == mean
    assert plan.attention.matmul_bits == (None if name.startswith("bitnetv2") else 8)
    assert not plan.is_full_precision
    assert plan.needs == frozenset()


@pytest.mark.parametrize(
    ("name", "rotation", "weight", "clip", "needs"),
    [
        ("rtn-w4a4", None, "rtn", 1.0, set()),
        ("quarot-w4a4", "randomized-hadamard", "gptq", 0.9, {"gram"}),
    ],
)
def test_post_training_plans_train_nothing(
    name: str, rotation: str | None, weight: str, clip: float, needs: set[str]
) -> None:
    plan = load_plan(name)
    assert plan.train.steps == 0
    assert plan.needs == needs
    assert plan.bits is None
    for layer, kind, bits in (("blocks.0.mlp.fc1", "block", 4), ("x", "adaLN", 8)):
        rule = plan.rule_for(layer, kind)  # type: ignore[arg-type]
        assert rule is not None
        slots = {slot: method.method for slot, method in rule.slots().items()}
        rotated = {} if rotation is None else {"rotation": rotation}
        assert slots == rotated | {"weight": weight, "activation": "rtn"}
        assert rule.weight.bits == 4  # type: ignore[union-attr]
        assert rule.activation.bits == bits  # type: ignore[union-attr]
        assert rule.activation.clip == (clip if kind == "block" else 1.0)  # type: ignore[union-attr]


def test_full_precision_is_no_rule_at_all() -> None:
    plan = load_plan("fp")
    assert plan.is_full_precision
    assert (plan.layers, plan.bits, plan.attention.matmul_bits) == ((), None, None)


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
    path = write(tmp_path / "mine.toml", '[[layers]]\nactivation = {method="minmax", bits=3}\n')
    for spec in (path, str(path)):
        plan = load_plan(spec)
        assert (plan.name, plan.uniform_bits) == ("mine", 3)
    assert load_plan(write(tmp_path / "b.toml", 'name = "other"')).name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[attention]\nmatmul_bitz = 4", "attention.matmul_bitz: unknown key; did you mean 'matm"),
        ("[attentio]\nmatmul_bits = 4", "attentio: unknown key; did you mean 'attention'?"),
        ("extend = 'a4'", "extend: unknown key; did you mean 'extends'?"),
        ("mean = 2", "mean: unknown key; did you mean 'bits.mean'?"),
        ("attention = 4", "attention: must be a section [attention], got 4"),
        ("[attention]\nmatmul_bits = '4'", "matmul_bits: input should be a valid integer, got '4'"),
        ("[attention]\nmatmul_bits = true", "matmul_bits: input should be a valid integer"),
        ("[attention]\nmatmul_bits = 2.5", "matmul_bits: input should be a valid integer"),
        ("[attention]\nmatmul_bits = 9", "matmul_bits: input should be less than or equal to 8"),
        ("[train]\ndenoising_weight = nan", "denoising_weight: input should be a finite number"),
        ("name = '../escape'", "name: string should match pattern"),
        ("extends = 3", "extends must be the name or path of one plan"),
        ("extends = 'a5'", "extends: unknown plan 'a5'; did you mean 'a"),
        ("bits = = 4", "not valid TOML"),
        ("bits = 4", "bits: must be a section [bits], got 4"),
        ("[bits]", "bits: give a mean to allocate bits, or a path to read them from"),
        ("[bits]\nmean = 2\npath = 'x'", "bits: give a mean to allocate bits, or a path to read"),
        ("[bits]\nmean = 2\nchoices = [4, 2]", "bits: choices must ascend without repeats"),
        ("[bits]\nmean = 2\nchoices = [2, 2]", "bits: choices must ascend without repeats"),
        ("[bits]\nmean = 2\nchoices = []", "bits: choices must be between 1 and 16, got []"),
        ("[bits]\nmean = 2\nchoices = [0, 4]", "choices must be between 1 and 16, got [0, 4]"),
        ("[bits]\nmean = 2\nchoices = [1, 17]", "choices must be between 1 and 16, got [1, 17]"),
        ("[bits]\nmean = 2\nmetric = 'fishr'", "unknown metric 'fishr'; did you mean 'fisher'?"),
        ("[bits]\nmean = 2\nsolver = 'exat'", "unknown solver 'exat'; did you mean 'exact'?"),
        ("[bits]\nmean = 2\ncost = 'mac'", "bits.cost: 'mac' is not one of 'macs', 'weights' or"),
        ("[bits]\nmean = 2\nof = 'weights'", "bits.of: 'weights' is not one of 'activation' or"),
        ("[bits]\nmean = 2\nsteps = -1", "bits.steps: input should be greater than or equal to 0"),
        (
            "[bits]\nmean = 2\nof = 'weight'\nmetric = 'fisher'",
            "metric 'fisher' perturbs activations; bits of weights are measured by epsilon_mse or",
        ),
        ("[bits]\nmean = 2", "so bits would be ignored; leave it out, or choose a method"),
        ("[attention]\nmatmul_bits = 8", "so attention.matmul_bits would be ignored"),
        ("extends='a4'\n[bits]\nmean=2\nof='activation'\n[[layers]]\nname='block'\n"
         "fixed_bits=true", "no rule without fixed_bits has a activation method with bits to"),
        ("extends='a4'\n[bits]\nmean=2\nof='weight'", "has a weight method with bits to choose"),
        ("extends='bitnetv2-a4'\n[bits]\nmean=2", "choices: activation method 'bitnet' does not"),
        ("extends='a2'\n[train]\nsteps=0\n[bits]\nsteps=5", "bits.steps = 5 QAT steps cannot come"),
        ("[train]\nsteps = -1", "train.steps: input should be greater than or equal to 0"),
        ("[train]\ndenoising_weight = 0\ndistillation_weight = 0", "must be positive"),
        ("[calibration]\nsamples = 0", "calibration.samples: input should be greater than or"),
        ("[calibration]\ntokens = 0", "calibration.tokens: input should be greater than or"),
        ("[calibration]\nbatch_size = 0", "calibration.batch_size: input should be greater than"),
        ("[calibration]\nquantized_predecessors = 1", "input should be a valid boolean, got 1"),
        ("[calibration]\ntoken = 5", "calibration.token: unknown key; did you mean 'tokens'?"),
    ],
)  # fmt: skip
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
        make([f"bits.mean={mean}"])


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    text = "[calibration]\nsamples = -1\n[[layers]]\nname = 'a'\nweights = 'rtn'\n"
    path = write(tmp_path / "mine.toml", text)
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


def test_a_digest_is_not_inherited_by_another_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits"\n[teacher]\ncheckpoint = "mine.safetensors"\n')
    assert load_workload(path).teacher.sha256 == ""
    digest = "a" * 64
    path.write_text(path.read_text() + f'sha256 = "{digest}"\n')
    assert load_workload(path).teacher.sha256 == digest
    path.write_text('extends = "digits"\n[training]\nsteps = 600\n')
    assert load_workload(path).teacher.sha256 == load_workload("digits").teacher.sha256 != ""


def test_image_seeds_of_their_own_are_part_of_the_teachers_run() -> None:
    shared, own = "evaluation.image_seeds=none", "evaluation.image_seeds=own"
    for override, seeds in ((shared, 1), (own, 3)):
        runs = {
            config_hash(
                config_for(
                    "teacher-eval", resolve("train-and-eval", "3", "a4", "digits", s, [override])
                )
            )
            for s in (0, 1, 2)
        }
        assert len(runs) == seeds
