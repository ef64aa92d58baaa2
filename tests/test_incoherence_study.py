"""`study incoherence`: what stands out, slopes, words, and the study on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import quantized
from scipy import stats
from torch import nn

from reports import incoherence as section
from reports.loading import read_run
from robuq_bench.config import Config, load_plan, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, ConfigError, DivergedError, UsageError
from robuq_bench.incoherence_figure import at_shared_scales, response_pictures, t_interval
from robuq_bench.normality.incoherence import Incoherence
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity.local import local_errors
from studies.incoherence import study, tables
from studies.incoherence.settings import Settings

SMALL = (
    "training.warmup_steps=0",
    "incoherence.scales=[1,16]",
    "incoherence.trained_scales=[1,16]",
    'incoherence.rotations=["none","randomized-hadamard"]',
    "incoherence.bits=[2]",
    "incoherence.steps=2",
    "incoherence.batch_size=4",
    "incoherence.images=8",
)

# what stands out


@given(st.integers(1, 3), st.integers(2, 40), st.integers(0, 3))
def test_incoherence_is_scipys_and_numpys(batches: int, n: int, seed: int) -> None:
    parts = torch.randn(batches, 5, n, generator=torch.Generator().manual_seed(seed)) + 0.5
    found = Incoherence()
    for part in parts:
        found.add(part)
    x = parts.double().numpy().reshape(-1, n)
    peaks = np.abs(x).max(1) / np.sqrt((x**2).mean(1))
    assert found.tokens == len(x)
    assert found.of_tokens == pytest.approx(peaks.mean(), rel=1e-12)
    assert found.of_tensor == pytest.approx(np.abs(x).max() / np.sqrt((x**2).mean()), rel=1e-12)
    assert found.kurtosis == pytest.approx(stats.kurtosis(x, None, fisher=False), rel=1e-9)


def test_incoherence_at_its_ends() -> None:
    one_hot, flat = Incoherence(), Incoherence()
    one_hot.add(torch.eye(16))
    flat.add(torch.stack([torch.ones(16), torch.zeros(16)]))
    assert one_hot.of_tokens == one_hot.of_tensor == pytest.approx(4)
    assert flat.of_tokens == 1
    flat = Incoherence()
    flat.add(torch.full((2, 8), 3.0))
    assert math.isnan(flat.kurtosis)


def test_varying_error_leaves_out_what_tokens_share() -> None:
    """Against one matrix product; a constant added to all outputs changes nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    x = torch.randn(6, 5, 12)
    layer = quantized(linear, rotation="hadamard", rank=2, activation=("minmax", 2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: object, y: object) -> torch.Tensor:
            return self.layer(x)

    batches = [study.Batch(x[i : i + 3], x, x[i : i + 3], x[:1], x[:1]) for i in (0, 3)]
    with torch.no_grad():
        a = layer.rotate_input(x)
        error = (layer.activation_quantizer(a, 2) - a) @ layer.quantized_weight().T
        y = a @ layer.quantized_weight().T + layer.branch(a)
        expected = error.square().sum() / (y - y.mean((0, 1))).square().sum()
        for offset in (0.0, 100.0):
            layer.bias += offset
            found = local_errors(Model(), ["layer"], [2], batches)["layer"].varying_error(2)
            assert found == pytest.approx(float(expected), rel=1e-3)


# words


def frame(slopes: dict[str, list[float]], noise: float = 0.0) -> pd.DataFrame:
    """Errors exactly on lines in log-log, by rotation and seed."""
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"when": "before training", "bits": 2, "rotation": rotation, "scale": scale,
             "seed": seed, "error": math.exp(slope * math.log2(scale) + noise * draw.normal())}
            for rotation, own in slopes.items()
            for seed, slope in enumerate(own)
            for scale in (1.0, 2.0, 8.0)
        ]
    )  # fmt: skip


FLAT, STEEP = [0.001, -0.002, 0.0, 0.002, 0.001], [0.30, 0.31, 0.32, 0.29, 0.30]


def judged(slopes: dict[str, list[float]]) -> dict[str, list[Any]]:
    trials = frame(slopes)
    found = tables.judge(tables.slopes_of(trials), trials)
    return {name: [v for v in found if v.subject.startswith(name)] for name in slopes}


def test_slopes_are_the_lines() -> None:
    found = tables.slopes_of(frame({"none": STEEP, "hadamard": FLAT}))
    assert found["slope"].tolist() == pytest.approx([*STEEP, *FLAT], abs=1e-12)


def test_an_error_without_a_logarithm_is_named() -> None:
    trials = frame({"none": STEEP}).assign(error=lambda f: f["error"].where(f["seed"] != 3, 0.0))
    with pytest.raises(CheckError, match=r"none at s = 1, 2 bits, seed 3, before training"):
        tables.slopes_of(trials)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_where_a_training_diverged_its_cell_is_not_judged(scale: float) -> None:
    trials = frame({"none": STEEP, "hadamard": FLAT, "dct": FLAT})
    is_lost = trials.eval("rotation == 'hadamard' and seed == 3 and scale == @scale")
    trials.loc[is_lost, "error"] = np.nan
    found = tables.judge(tables.slopes_of(trials), trials)
    words = {name: [v.verdict for v in found if v.subject.startswith(name)] for name in
             ("none", "hadamard", "dct")}  # fmt: skip
    assert words["hadamard"][:2] == ["not judged", "not judged"]
    assert (words["hadamard"][2] == "not judged") == (scale == 8)
    assert (words["none"], words["dct"]) == (["does not hold"], ["holds", "better", "better"])
    lost = next(v for v in found if v.subject.startswith("hadamard"))
    assert (lost.note, lost.effect, lost.n) == ("training diverged: seed 3", None, 5)
    rows = {(r["rotation"], r["scale"]): r["error"] for r in
            tables.responses(trials.assign(weight_error=1.0, student_error=1.0))}  # fmt: skip
    assert [key for key, error in rows.items() if error is None] == [("hadamard", scale)]
    (picture,) = response_pictures(trials, "test")
    end = "diverged to" if scale == 1 else "to diverged"
    assert end in picture.alt


def test_stages_are_compared_over_the_scales_that_both_have() -> None:
    both = frame({"none": STEEP})
    after = both[both["scale"] < 8].assign(when="after training")
    shared = at_shared_scales(pd.concat([both, after]))
    assert shared.groupby("when")["scale"].unique().map(list).tolist() == [[1, 2], [1, 2]]
    assert at_shared_scales(both).equals(both)


def test_words_follow_the_rule() -> None:
    found = judged({"none": STEEP, "hadamard": FLAT})
    (none,) = found["none"]
    own, beside, errors = found["hadamard"]
    assert (none.verdict, own.verdict, beside.verdict) == ("does not hold", "holds", "better")
    assert errors.verdict == "better"
    interval = stats.t.interval(0.95, 4, np.mean(STEEP), stats.sem(STEEP))
    assert [none.low, none.high] == pytest.approx(np.exp(interval).tolist())
    assert none.effect == pytest.approx(math.exp(np.mean(STEEP)))
    paired = stats.ttest_rel(FLAT, STEEP)
    assert beside.p_value == pytest.approx(paired.pvalue)
    limits = paired.confidence_interval(0.95)
    assert [beside.low, beside.high] == pytest.approx([math.exp(limits.low), math.exp(limits.high)])
    assert none.p_value == pytest.approx(2 * stats.ttest_1samp(
        STEEP, math.log(tables.DOUBLING), alternative="greater").pvalue)  # fmt: skip
    two = [
        stats.ttest_1samp(FLAT, -math.log(tables.DOUBLING), alternative="greater").pvalue,
        stats.ttest_1samp(FLAT, math.log(tables.DOUBLING), alternative="less").pvalue,
    ]
    assert own.p_value == pytest.approx(2 * max(two))


@given(st.lists(st.floats(-0.1, 0.1), min_size=5, max_size=9, unique=True))
def test_a_word_is_decided_just_where_its_p_value_is(slopes: list[float]) -> None:
    verdict = tables._response(pd.Series(slopes), "hadamard, 2 bits, before training")
    assert verdict.p_value is not None
    assert verdict.low is not None
    assert verdict.high is not None
    limit = tables.DOUBLING
    words = {
        "holds": 1 / limit <= verdict.low and verdict.high <= limit,
        "does not hold": verdict.low > limit or verdict.high < 1 / limit,
    }
    assert verdict.verdict == next((w for w, is_so in words.items() if is_so), "undecided")
    assert (verdict.p_value <= 0.05) == (verdict.verdict != "undecided")


def test_a_falling_response_is_no_removal_and_few_seeds_are_not_judged() -> None:
    falling, none = judged({"hadamard": [-s for s in STEEP], "none": FLAT})["hadamard"][:2]
    assert (falling.verdict, none.verdict) == ("does not hold", "better")
    few = judged({"none": STEEP[:4], "hadamard": FLAT[:4]})
    words = [v.verdict for own in few.values() for v in own]
    assert words == ["not judged"] * 4
    assert few["none"][0].low is not None


def test_t_interval_is_scipys() -> None:
    values = np.random.default_rng(1).lognormal(size=6)
    logs = np.log(values)
    expected = stats.t.interval(0.95, 5, logs.mean(), stats.sem(logs))
    assert t_interval(values) == pytest.approx(tuple(np.exp(expected)))
    assert all(map(math.isnan, t_interval([2.0])))


# the study


def configure(workload: Path | str, *overrides: str, plan: str = "a4") -> Config:
    return resolve("incoherence", study.VERSION, plan, workload, 0, [*SMALL, *overrides])


def perform(config: Config, root: Path) -> Run:
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
    with Run.open(root, config, []) as run:
        study.measure(config, run, context)
        run.finish()
    return run


def test_plans_get_the_rotation_everywhere_and_the_bits_where_they_are_free() -> None:
    plan = study.plan_with(load_plan("bitnetv2-a4"), "block-hadamard", 3, 16)
    for rule in plan.layers:
        assert rule.rotation is not None
        assert rule.rotation.model_dump()["block"] == 16
        assert rule.activation is not None
        assert rule.activation.bits == (4 if rule.fixed_bits else 3)
    assert all(rule.rotation is None for rule in study.plan_with(plan, "none", 3, 16).layers)


@pytest.mark.parametrize(
    ("override", "plan", "error"),
    [
        ('incoherence.rotations=["hadamard","block-hadamard"]', "a4", None),
        ("incoherence.block=32", "a4", "does not divide the width 144"),
        ('incoherence.rotations=["hadamar"]', "a4", "did you mean 'hadamard'"),
        ("incoherence.bits=[2]", "a2", "allocates its own"),
        ("teacher.outliers.scale=2.0", "a4", "puts in outliers itself"),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_begins(
    override: str, plan: str, error: str | None
) -> None:
    rotations = 'incoherence.rotations=["none","block-hadamard"]'
    config = configure("digits", rotations, override, plan=plan)
    if error is None:
        study.check(config)
        return
    with pytest.raises(UsageError, match=error):
        study.check(config)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("scales=[2,1]", "must ascend"),
        ("scales=[0,1]", "must ascend"),
        ("scales=[1]", "two scales"),
        ("trained_scales=[1,3]", "among scales"),
        ("bits=[4,2]", "bits must ascend"),
        ('rotations=["none","none"]', "repeat"),
        ("images=300", "multiple of it"),
    ],
)
def test_settings_that_make_no_response_are_refused(setting: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        configure("digits", f"incoherence.{setting}")


def test_a_dry_run_says_how_much_there_is_to_do(bench: Any) -> None:
    command = ("study", "incoherence", "--plan", "a4", "--dry-run", "--set", "incoherence.seeds=1")
    said = bench(*command)
    assert said.code == 0
    assert "# 36 students, 18 of them trained for 100 steps: about " in said.out
    assert bench(*command, "--json").document["outlook"].startswith("36 students")
    assert "outlook" not in bench("study", "teacher-eval", "--dry-run", "--json").document


def test_it_resumes_and_shards_alike(tiny_workload: Path, tmp_path: Path) -> None:
    """A kill between a student's two measurements, shards, and one run give the same tables."""
    seeds = "incoherence.seeds=1"
    whole = perform(configure(tiny_workload, seeds), tmp_path / "whole")
    keys = [record["key"] for record in whole.results() if record["kind"] == "trial"]
    assert len(keys) == len({*keys}) == 2 * 2 * 2
    for part in ("1/2", "2/2"):
        shard = f"incoherence.shard={json.dumps(part)}"
        perform(configure(tiny_workload, seeds, shard), tmp_path / "shards")
    together = perform(configure(tiny_workload, seeds), tmp_path / "shards")
    killed = configure(tiny_workload, seeds)
    with Run.open(tmp_path / "killed", killed, []) as run:
        kept = [record for record in whole.results() if record["kind"] == "trial"]
        for record in kept[:3]:  # of the second student, what came before training
            run.append(**record)
    resumed = perform(killed, tmp_path / "killed")
    for name in ("trials", "responses", "layers", "inputs", "slopes", "verdicts"):
        texts = {(r.path / f"tables/{name}.csv").read_text() for r in (whole, together, resumed)}
        assert len(texts) == 1, name

    frame = pd.read_csv(whole.path / "tables/inputs.csv").set_index(["rotation", "scale"])
    plain, high = (frame.loc[("none", scale)].set_index("layer_type") for scale in (1.0, 16.0))
    for kind in ("qkv", "proj", "fc1"):
        assert high.loc[kind, "of_tokens"] > 1.3 * plain.loc[kind, "of_tokens"]
    assert high.loc["fc2", "of_tokens"] == pytest.approx(plain.loc["fc2", "of_tokens"], rel=1e-4)

    data = read_run(whole.path)
    found = section.view([data], [data])
    assert found is not None
    assert "2 bits, after training" in "".join(phrase.text for phrase in found.answer)
    assert len(found.blocks[0].pictures) == 2
    assert {claim.verdict.verdict for claim in found.claims} == {"not judged"}
    assert {"incoherence-trials", "incoherence-responses"} == {*found.exports}
    given_ = {"scale": 16.0, "channels": 2, "seed": 0, "layers": ["qkv", "fc1"]}
    other = {"workload": {"teacher": {"outliers": given_}}}
    said = "2 channels at the inputs of qkv, fc1 scaled by 16"
    assert (data.outliers, dataclasses.replace(data, config=other).outliers) == ("", said)


def test_the_error_is_the_distillation_loss_over_the_energy(tiny_workload: Path) -> None:
    """Of a student that predicts nothing it is 1, of the teacher 0."""
    from robuq_bench.data.datasets import load_dataset
    from robuq_bench.models.checkpoints import load_teacher

    config = configure(tiny_workload)
    teacher, _ = load_teacher(config.workload, "cpu")
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
    held_out = study.make_held_out(config, context, teacher, load_dataset(config.workload.data))

    class Silent(nn.Module):
        def forward(self, x: torch.Tensor, t: object, y: object) -> torch.Tensor:
            return torch.zeros_like(x)

    silent = study.prediction_errors(Silent(), held_out)
    assert silent == pytest.approx({"error": 0, "weight_error": 1, "student_error": 1})
    assert {*study.prediction_errors(teacher, held_out).values()} == {0.0}


def test_errors_are_those_of_plans_without_the_other_quantizer(tiny_workload: Path) -> None:
    """A student whose weights, or activations, were never quantized; and it is left as it was."""
    from robuq_bench.data.datasets import load_dataset
    from robuq_bench.models.checkpoints import load_teacher
    from robuq_bench.qat import prepare_training

    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))

    def errors(*changes: str) -> dict[str, float]:
        config = configure(tiny_workload, "attention.matmul_bits=none", *changes)
        teacher, _ = load_teacher(config.workload, "cpu")
        data = load_dataset(config.workload.data)
        held_out = study.make_held_out(config, context, teacher, data)
        student = prepare_training(config, context, teacher, data)[0].model
        first = study.prediction_errors(student, held_out)
        assert study.prediction_errors(student, held_out) == first
        with study.unquantized(student):
            exact = study.predictions(student, held_out)
        for output, target in zip(exact, held_out.targets, strict=True):
            torch.testing.assert_close(output, target, rtol=1e-4, atol=1e-4)
        return first

    both = errors()
    rules = [rule.name for rule in load_plan("a4").layers]
    weights = errors(*(f"layers.{name}.activation=none" for name in rules))
    activations = errors(*(f"layers.{name}.weight=none" for name in rules))
    assert both["weight_error"] == pytest.approx(weights["student_error"], rel=1e-4)
    assert both["error"] == pytest.approx(activations["student_error"], rel=1e-3)
    assert weights["error"] == 0
    assert 0 < both["error"] < both["student_error"]


def test_a_training_that_diverges_is_recorded_and_the_rest_goes_on(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, calls = study.prepare_training, []

    def diverging(config: Config, *given_: Any) -> Any:
        made = prepare(config, *given_)
        calls.append(config)
        if config.plan.layers[0].rotation is None:
            monkeypatch.setattr(made[0], "train", _diverge)
        return made

    def _diverge(*_: Any) -> Any:
        raise DivergedError("training diverged at step 1")

    monkeypatch.setattr(study, "prepare_training", diverging)
    config = configure(tiny_workload, "incoherence.seeds=1", "incoherence.trained_scales=[1,16]")
    run = perform(config, tmp_path)
    trials = pd.read_csv(run.path / "tables/trials.csv").set_index(["when", "rotation"])
    assert trials.loc[("after training", "none"), "error"].isna().all()
    assert trials["error"].notna().sum() == 6
    assert len(calls) == 4
    data = read_run(run.path)
    assert section.view([data], [data]) is not None


def test_what_would_only_rename_a_run_does_not(tiny_workload: Path) -> None:
    one, other = (configure(tiny_workload, f"training.steps={steps}") for steps in (3, 9))
    assert one == other
    assert (one.workload.training.steps, one.workload.training.batch_size) == (2, 4)
    with pytest.raises(UsageError, match="would not use --seed 7"):
        study.check(resolve("incoherence", study.VERSION, "a4", tiny_workload, 7, SMALL))


def test_heldout_images_are_an_input(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robuq_bench.data.datasets import load_dataset

    unseen = load_dataset(configure(tiny_workload).workload.data)
    monkeypatch.setattr(study, "load_heldout", lambda *_, **__: unseen)
    small = ("incoherence.seeds=1", "incoherence.trained_scales=[]", "incoherence.shard='1/4'")
    run = perform(configure(tiny_workload, *small), tmp_path)
    assert run.manifest["inputs"]["heldout"]["sha256"] == unseen.sha256


def test_defaults_are_judged() -> None:
    assert Settings().seeds >= tables.MIN_SEEDS
