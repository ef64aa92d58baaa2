"""`study sensitivity` and `study allocation` on a tiny model: tables, shards, resume, rules."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from robuq_bench import trials
from robuq_bench.accounting.structure import dit_layer_macs
from robuq_bench.allocation import table as allocation_table
from robuq_bench.cli import app as cli
from robuq_bench.config import BitsConfig, Config, load_allocation_file, resolve
from robuq_bench.context import Context
from robuq_bench.data.datasets import to_uint8
from robuq_bench.errors import CheckError, ConfigError, UsageError
from robuq_bench.judging import evaluation
from robuq_bench.judging.fidelity import compute_fid
from robuq_bench.judging.sampling import sample_values
from robuq_bench.progress import Progress
from robuq_bench.qat import convert_teacher
from robuq_bench.quantization.convert import allocatable_layers, layer_type
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity.epsilon import epsilon_mse
from robuq_bench.statistics.verdicts import read_verdicts
from studies import allocation_speed
from studies.allocation import study as allocation
from studies.allocation import tables as allocation_tables
from studies.sensitivity import study as sensitivity
from studies.sensitivity import tables as sensitivity_tables
from studies.sensitivity import truth as ground_truth

COMMON = ("training.batch_size=4", "training.calibration_samples=8", "evaluation.batch_size=100")
SENSITIVITY = (
    *COMMON,
    "sensitivity.qat_steps=[0,2]",
    "sensitivity.truth_steps=1",
    "sensitivity.truth_seeds=2",
    "sensitivity.truth_bits=[1,2]",
    "sensitivity.truth_samples=0",
    "sensitivity.pairs=3",
    "sensitivity.allocations=2",
    "sensitivity.timestep_buckets=2",
    "sensitivity.bootstrap_draws=100",
    "sensitivity.top_k=2",
)
ALLOCATION = (
    *COMMON,
    "allocation.warmup_steps=2",
    "allocation.train_steps=3",
    "allocation.resolve_steps=[0,1]",
    "allocation.seeds=2",
    "allocation.samples=100",
    "allocation.sampling_steps=2",
    "allocation.timestep_buckets=2",
    'allocation.candidates=["uniform","qat","resolved"]',
)


@pytest.fixture(autouse=True, scope="module")
def _small_validation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "VALIDATION_BATCHES", 1)
        patch.setattr(evaluation, "VALIDATION_BATCH_SIZE", 8)
        yield


def configure(study: Any, name: str, workload: Path, *overrides: str) -> Config:
    settings = SENSITIVITY if name == "sensitivity" else ALLOCATION
    return resolve(name, study.VERSION, "a4", workload, 0, [*settings, *overrides])


def quiet() -> Context:
    return Context(
        device="cpu", threads=torch.get_num_threads(), progress=Progress(quiet=True), argv=[]
    )


def perform(study: Any, config: Config, root: Path) -> Run:
    with Run.open(root, config, []) as run:
        study.measure(config, run, quiet())
        run.finish()
    return run


def table(run: Run, name: str) -> list[dict[str, str]]:
    text = (run.path / "tables" / f"{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def tables(run: Run) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run.path / "tables").glob("*.csv")}


@pytest.fixture(scope="module")
def alone(
    _small_validation: None, tiny_workload: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The whole of `study sensitivity` in one run."""
    config = configure(sensitivity, "sensitivity", tiny_workload)
    return perform(sensitivity, config, tmp_path_factory.mktemp("alone"))


def test_sensitivity_in_shards_equals_sensitivity_alone(
    alone: Run,
    tiny_workload: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = configure(sensitivity, "sensitivity", tiny_workload)
    for part in ("1/2", "2/2"):
        config = configure(
            sensitivity, "sensitivity", tiny_workload, f"sensitivity.shard={json.dumps(part)}"
        )
        shard = perform(sensitivity, config, tmp_path / "shards")
        kinds = [record["kind"] for record in shard.results()]
        assert set(kinds) == {"truth"}
        assert len(kinds) == 25  # of 2 seeds x (8 layers x (unquantized + 2 widths) + baseline)
    trained = []
    real = trials.train_trial

    def counting(*args: Any, **kwargs: Any) -> Any:
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(ground_truth, "train_trial", counting)
    for name in ("sensitivity/a4-damaged", "allocation/a4-damaged"):
        damaged = tmp_path / "shards" / name / "manifest.json"
        damaged.parent.mkdir(parents=True)
        damaged.write_text("{")
    merged = perform(sensitivity, whole, tmp_path / "shards")
    assert trained == []  # all of it comes from the shards
    assert f"{tmp_path / 'shards' / 'sensitivity' / 'a4-damaged'} is left out" in caplog.text
    assert "allocation" not in caplog.text  # no run of this study
    assert tables(merged) == tables(alone)

    truth = table(alone, "truth")
    differences = ground_truth.truth_differences(alone)["distillation_loss"]
    assert {row["seeds"] for row in truth} == {"2"}
    metrics = {
        (row["layer"], row["bits"]): float(row["value"])
        for row in table(alone, "metrics")
        if row["metric"] == "epsilon_mse" and row["steps"] == "2"
    }
    for row in table(alone, "agreement"):
        key = (row["metric"], row["steps"], row["target"], row["bits"])
        if key == ("epsilon_mse", "2", "distillation_loss", "2"):
            x = [metrics[layer, "2"] for layer in differences]
            y = [np.mean(by_bits[2]) for by_bits in differences.values()]
            assert float(row["spearman"]) == pytest.approx(stats.spearmanr(x, y).statistic)
            assert float(row["kendall"]) == pytest.approx(stats.kendalltau(x, y).statistic)
            break
    else:
        pytest.fail("no such row")
    verdicts = read_verdicts(pd.read_csv(alone.path / "tables/verdicts.csv", na_values=[""]))
    assert [v.subject for v in verdicts] == ["all bit widths", "1 bit", "2 bits"]
    assert {v.n for v in verdicts} == {8}
    gains = {(row["metric"], row["bits"]): row for row in table(alone, "gains")}
    assert len(gains) == 7 * 3
    pairs = [row for row in table(alone, "interactions") if row["kind"] == "pair"]
    assert len(pairs) == 6
    record = alone.get("interaction") or alone.get("pair/0/0")
    assert record is not None
    alone_sum = sum(
        sensitivity_tables.metric_table(alone, 0, "epsilon_mse")[layer][bits]
        for layer, bits in record["bits_by_layer"].items()
    )
    assert record["predicted"] == pytest.approx(alone_sum)


def test_one_layer_alone_predicts_itself(alone: Run) -> None:
    """Additivity is exact for a single layer, so the two ways of measuring must agree."""
    by_bucket = (alone.get("timesteps/0") or {})["values"]
    whole = sensitivity_tables.metric_table(alone, 0, "epsilon_mse")
    for layer, by_bits in whole.items():
        for bits, value in by_bits.items():
            assert np.mean(by_bucket[layer][str(bits)]) == pytest.approx(value, rel=1e-4)


def test_allocation_trains_what_it_says(tiny_workload: Path, tmp_path: Path) -> None:
    config = configure(allocation, "allocation", tiny_workload)
    run = perform(allocation, config, tmp_path)
    trained = table(run, "trials")
    assert len(trained) == 2 * 2 * 3  # seeds, budgets, candidates
    for row in trained:
        assert float(row["mean_bits"]) <= float(row["budget"]) + 1e-9
        assert float(row["fid_digits"]) > 0
    bits = {
        (row["candidate"], row["budget"], row["seed"], row["layer"]): int(row["bits"])
        for row in table(run, "allocations")
    }
    assert {v for (c, b, *_), v in bits.items() if (c, b) == ("uniform", "2.0")} == {2}
    solvers = {(row["budget"], row["solver"]): row for row in table(run, "solvers")}
    for budget in ("2.0", "3.0"):
        best = float(solvers[budget, "exact"]["objective"])
        assert float(solvers[budget, "milp"]["objective"]) == pytest.approx(best, rel=1e-6)
        assert all(
            float(row["objective"]) >= best * (1 - 1e-9)
            for (b, _), row in solvers.items()
            if b == budget
        )
    for row in table(run, "timestep_aware"):
        assert float(row["objective_by_bucket"]) <= float(row["objective_single"]) * (1 + 1e-9)
    front = [row for row in table(run, "front") if row["source"] == "qat"]
    objectives = [float(row["objective"]) for row in front]
    assert (float(front[0]["mean_bits"]), float(front[-1]["mean_bits"])) == (1.0, 4.0)
    assert objectives == sorted(objectives, reverse=True)
    verdicts = read_verdicts(pd.read_csv(run.path / "tables/verdicts.csv", na_values=[""]))
    assert verdicts[0].subject == "qat over uniform, 2 bits, distillation_loss"
    losses = {(r["candidate"], r["budget"], r["seed"]): r["distillation_loss"] for r in trained}
    ratios = [float(losses["qat", "2.0", s]) / float(losses["uniform", "2.0", s]) for s in "01"]
    assert verdicts[0].effect == pytest.approx(stats.gmean(ratios))
    assert {v.verdict for v in verdicts} == {"not judged"}  # two seeds
    file = run.path / "allocations" / "qat-2.toml"
    plan = BitsConfig(path=str(file))
    layers = {layer for (_, _, _, layer) in bits}
    loaded = load_allocation_file(plan, sorted(layers))
    assert loaded == {layer: bits["qat", "2.0", "all", layer] for layer in layers}


def test_a_killed_allocation_study_trains_only_what_is_missing(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(
        allocation,
        "allocation",
        tiny_workload,
        'allocation.candidates=["uniform","qat"]',
        "allocation.budgets=[2.0]",
    )
    whole = perform(allocation, config, tmp_path / "whole")
    real, seen = allocation.train_trial, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(allocation, "train_trial", dies)
    with pytest.raises(KeyboardInterrupt):
        perform(allocation, config, tmp_path / "killed")
    resumed = perform(allocation, config, tmp_path / "killed")
    assert len(seen) == 5  # two done, one killed, two left
    same = {name for name in tables(whole) if name != "solvers.csv"}  # which holds seconds
    assert {n: tables(resumed)[n] for n in same} == {n: tables(whole)[n] for n in same}


@pytest.mark.parametrize(
    ("study", "override", "message"),
    [
        ("sensitivity", "sensitivity.qat_steps=[5]", "must begin with 0"),
        ("sensitivity", "sensitivity.truth_bits=[5]", "among bit_choices"),
        ("sensitivity", 'sensitivity.shard="3/2"', "1 <= i <= n"),
        ("allocation", "allocation.budgets=[9.0]", "cannot be met: choose between 1 and 4"),
        ("allocation", 'allocation.candidates=["qt"]', "did you mean"),
        ("allocation", "allocation.resolve_steps=[500]", "within train_steps"),
        ("allocation", "allocation.resolve_steps=[]", "must ascend from 0"),
        ("allocation", "allocation.choices=[0,2,4]", "must ascend from 1"),
        ("allocation", 'allocation.candidates=["qat"]', "must include 'uniform'"),
        ("allocation", 'allocation.candidates=["uniform","uniform"]', "nor repeat"),
        ("sensitivity", "sensitivity.truth_bits=[0,1]", "must ascend from 1"),
    ],
)
def test_settings_that_make_no_sense(study: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(study, "1", "a4", "digits", 0, [override])


def test_networks_of_other_bits_are_not_mixed(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ('allocation.candidates=["uniform","qat"]', "allocation.budgets=[2.0]",
             "allocation.seeds=1", "allocation.samples=0")  # fmt: skip
    part = configure(allocation, "allocation", tiny_workload, *small, 'allocation.shard="2/2"')
    perform(allocation, part, tmp_path)
    real = allocation.solve

    def other(problem: Any, solver: str, **options: Any) -> Any:
        found = real(problem, solver, **options)
        bits = dict.fromkeys(found.bits_by_layer, 1)
        return dataclasses.replace(found, bits_by_layer=bits)

    monkeypatch.setattr(allocation, "solve", other)
    with pytest.raises(CheckError, match="trained at other bits"):
        perform(allocation, configure(allocation, "allocation", tiny_workload, *small), tmp_path)


def test_shards_only_where_they_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "step-time", "--shard", "1/2"]) == 2
    assert "allocation, incoherence, sensitivity and survival do" in capsys.readouterr().err
    assert cli.main(["study", "allocation", "--shard", "2", "--dry-run"]) == 2
    assert "'i/n'" in capsys.readouterr().err
    assert cli.main(["study", "allocation", "--plan", "a4", "--shard", "1/2", "--dry-run"]) == 0
    assert 'shard = "1/2"' in capsys.readouterr().out


def test_allocation_speed_compares_before_it_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    row = allocation_speed.row(12, seed=0)
    assert row["allocations"] == row["budgets_on_front"] > 20
    assert row["difference_to_milp"] < 1e-6
    monkeypatch.setattr(allocation_speed, "ALLOWED", -1.0)
    with pytest.raises(CheckError, match="differs from HiGHS"):
        allocation_speed.row(12, seed=0)


def made_trials(levels: dict[str, float], spread: float, seeds: int = 6) -> list[dict[str, Any]]:
    """Trained networks at one budget: seeds differ by 5 %, candidates by their level and noise."""
    draw = np.random.default_rng(0)
    return [
        {
            "candidate": name,
            "budget": 2.0,
            "seed": seed,
            "distillation_loss": level * (1 + 0.05 * seed) * math.exp(spread * draw.normal()),
        }
        for name, level in levels.items()
        for seed in range(seeds)
    ]


def judged(trials: list[dict[str, Any]]) -> list[Any]:
    """Verdicts on trials whose candidate `qat` has a headroom of 1.25."""
    summary = allocation_tables.candidate_rows(trials, {("qat", 2.0): 1.25})
    return allocation_tables.judge(trials, summary)


def test_headroom_and_regret_stand_beside_every_verdict() -> None:
    trials = made_trials({"uniform": 1.0, "ptq": 0.8, "qat": 1.2}, 0.0)
    rows = {
        r["candidate"]: r for r in allocation_tables.candidate_rows(trials, {("qat", 2.0): 1.25})
    }
    assert [rows[name]["distillation_loss_regret"] for name in ("uniform", "ptq", "qat")] == (
        pytest.approx([1.25, 1.0, 1.5])
    )
    assert (rows["qat"]["headroom"], rows["ptq"]["headroom"]) == (1.25, None)
    notes = {v.subject.partition(",")[0]: v.note for v in judged(trials)}
    assert notes["qat over uniform"].endswith("headroom 1.25, regret 1.5")
    assert notes["ptq over uniform"].endswith("regret 1")


def test_allocations_are_judged_paired_by_seed_and_as_a_family() -> None:
    """Against SciPy's paired t test of logarithms, and Holm's steps by hand."""
    levels = {"uniform": 1.0, "random": 1.3, "ptq": 1.0, "qat": 0.9, "fisher": 0.97}
    trials = made_trials(levels, 0.01)
    found = {v.subject.partition(",")[0]: v for v in judged(trials)}
    assert next(iter(found)) == "qat over uniform"
    frame = pd.DataFrame(trials).pivot(
        index="seed", columns="candidate", values="distillation_loss"
    )
    tests = {}
    for name, verdict in found.items():
        one, other = name.split(" over ")
        difference = np.log(frame[one]) - np.log(frame[other])
        tests[name] = test = stats.ttest_1samp(difference, 0.0)
        low, high = test.confidence_interval()
        assert verdict.effect == pytest.approx(math.exp(difference.mean()))
        assert verdict.low == pytest.approx(math.exp(low))
        assert verdict.high == pytest.approx(math.exp(high))
        assert verdict.p_value == pytest.approx(test.pvalue)
        assert verdict.n == 6
    ordered = sorted(tests, key=lambda name: tests[name].pvalue)
    running = 0.0
    for place, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - place) * tests[name].pvalue))
        assert found[name].p_adjusted == pytest.approx(running)
    words = {name: verdict.verdict for name, verdict in found.items()}
    assert words["random over uniform"] == "worse"
    assert words["ptq over uniform"] == "equivalent"
    assert words["qat over uniform"] == words["qat over ptq"] == "better"


def test_few_seeds_and_diverged_training_are_not_judged() -> None:
    four = judged(made_trials({"uniform": 1.0, "qat": 0.5}, 0.01, seeds=4))
    assert [v.verdict for v in four] == ["not judged"]
    trials = made_trials({"uniform": 1.0, "qat": 0.5, "random": 0.5}, 0.01)
    trials[7]["distillation_loss"] = math.nan
    bad, good = judged(trials)
    assert (bad.verdict, good.verdict) == ("not judged", "better")
    assert bad.note == "not a number above 0: qat seed 1; headroom 1.25"


def gain_row(bits: Any, gain: float, low: float, high: float, **other: Any) -> dict[str, Any]:
    fixed = {"metric": "epsilon_mse", "resamples": 20_000, "seed_agreement": 0.8,
             "steps_before": 0, "steps_after": 200}  # fmt: skip
    p_values = {"p_none": 1e-4, "p_small": 1e-4}
    return {"bits": bits, "gain": gain, "low": low, "high": high, **fixed, **p_values, **other}


def test_sensitivity_words_follow_the_interval_the_seeds_and_the_family() -> None:
    rows = [
        gain_row(1, 0.2, 0.1, 0.3),
        gain_row(2, 0.0, -0.1, 0.04),
        gain_row(3, 0.2, 0.1, 0.3, seed_agreement=0.29),
        gain_row(4, 0.05, -0.1, 0.2, p_none=0.3, p_small=0.9),
        gain_row(5, 0.2, 0.01, 0.3, p_none=0.03),
        gain_row("all", 0.0, -0.1, 0.04, p_small=0.04),
        gain_row(6, 0.0, 0.0, 0.0, steps_after=0),
        gain_row(1, 0.9, 0.8, 1.0, metric="fisher"),
    ]
    found = {v.subject: v for v in sensitivity_tables.judge(rows, layers=16)}
    assert {name: v.verdict for name, v in found.items()} == {
        "all bit widths": "undecided",  # 0.04 alone, and 3 x 0.03 of Holm's steps
        "1 bit": "holds",
        "2 bits": "does not hold",
        "3 bits": "not judged",
        "4 bits": "undecided",
        "5 bits": "undecided",
        "6 bits": "not judged",
    }
    assert found["5 bits"].p_adjusted == pytest.approx(0.09)
    assert found["3 bits"].p_value is None
    assert found["3 bits"].note == "agreement of training seeds: ρ 0.29"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("rtn-w4a4", r"'rtn' does not take \[1\] bits of sensitivity.bit_choices"),
        ("fp", "no layer of plan 'fp' has"),
        ("a2-uniform", r"--set sensitivity.truth_bits=\[1, 3\]"),
    ],
)
def test_plans_of_other_bit_widths_are_refused_before_a_run(plan: str, message: str) -> None:
    config = resolve("sensitivity", sensitivity.VERSION, plan, "digits", 0, [])
    with pytest.raises(UsageError, match=message):
        sensitivity.check(config)


def test_regret_is_what_brute_force_says(alone: Run) -> None:
    """Every allocation of eight layers at three widths, judged by the truth."""
    rows = {(r["metric"], r["steps"]): float(r["regret"]) for r in table(alone, "regret")}
    assert len(rows) == 7 * 2
    assert min(rows.values()) >= 0
    truth = {
        (r["layer"], int(r["bits"])): float(r["increase"])
        for r in table(alone, "truth")
        if r["target"] == "distillation_loss"
    }
    layers = list(dict.fromkeys(layer for layer, _ in truth))
    macs = dit_layer_macs(alone.config.workload.model)
    total = 2 * sum(macs[layer] for layer in layers)

    def cheapest(values: dict[tuple[str, int], float]) -> tuple[int, ...]:
        allowed = (
            bits
            for bits in itertools.product((1, 2, 4), repeat=len(layers))
            if sum(macs[name] * b for name, b in zip(layers, bits, strict=True)) <= total
        )
        return min(allowed, key=lambda bits: sum(values[p] for p in zip(layers, bits, strict=True)))

    assert {bits for _, bits in truth} == {1, 2, 4}
    metric = sensitivity_tables.metric_table(alone, 0, "epsilon_mse")
    predicted = {(layer, b): metric[layer][b] for layer, b in truth}
    chosen = cheapest(predicted)
    sums = [
        sum(truth[pair] for pair in zip(layers, bits, strict=True))
        for bits in (chosen, cheapest(truth))
    ]
    assert rows["epsilon_mse", "0"] == pytest.approx(sums[0] - sums[1])
    (row,) = (
        r
        for r in table(alone, "regret")
        if (r["metric"], r["steps"], r["budget"]) == ("epsilon_mse", "0", "2")
    )
    uniform = sum(predicted[layer, 2] for layer in layers)
    least = sum(predicted[pair] for pair in zip(layers, chosen, strict=True))
    assert float(row["headroom"]) == pytest.approx(uniform / least)
    if sums[1] > 0:
        assert float(row["regret_ratio"]) == pytest.approx(sums[0] / sums[1])


def test_truth_and_metric_are_of_the_layer_unquantized(alone: Run) -> None:
    records = {
        (r["layer"], r["bits"], r["seed"]): r for r in alone.results() if r["kind"] == "truth"
    }
    differences = ground_truth.truth_differences(alone)["distillation_loss"]
    for layer, by_bits in differences.items():
        for bits, found in by_bits.items():
            own = "none" if bits == 4 else layer
            assert found == [
                records[own, bits, seed]["distillation_loss"]
                - records[layer, None, seed]["distillation_loss"]
                for seed in (0, 1)
            ]


@pytest.fixture
def judge(tiny_workload: Path, tmp_path: Path) -> Iterator[trials.Judge]:
    """That of the allocation study: 100 samples, 2 sampling steps."""
    config = configure(allocation, "allocation", tiny_workload)
    with Run.open(tmp_path, config, []) as run:
        yield trials.make_judge(config, run, quiet(), 100, 2)


def test_recovery_is_of_the_loss_that_untrained_networks_have(
    alone: Run, judge: trials.Judge
) -> None:
    """Before training the increase is that of the metric against the teacher, with its sign."""
    config, teacher, images = alone.config, judge.teacher, judge.heldout or judge.data
    source = evaluation._validation_source(teacher, images, judge.workload, "cpu")
    by_seed = []
    for seed in (0, 1):
        own_seed = config.model_copy(update={"seed": seed})
        student = convert_teacher(own_seed, quiet(), teacher, judge.data)
        layers = allocatable_layers(student)
        by_seed.append(
            epsilon_mse(
                student, layers, (1, 2, 4), [source.batch(0)], reference=teacher, signed=True
            )
        )
    after = ground_truth.truth_differences(alone)["distillation_loss"]
    recovery = table(alone, "recovery")
    kinds = ("qkv", "proj", "fc1", "fc2")
    assert [(r["layer_type"], r["bits"]) for r in recovery] == [
        *itertools.product(kinds, ("1", "2", "4"))
    ]
    for row in recovery:
        bits = int(row["bits"])
        own = [layer for layer in layers if layer_type(layer) == row["layer_type"]]
        before = np.mean([sum(table[layer][bits] for layer in own) for table in by_seed])
        assert float(row["increase_before"]) == pytest.approx(before, rel=1e-3)
        found = sum(np.mean(after[layer][bits]) for layer in own)
        assert float(row["increase_after"]) == pytest.approx(found)
        if float(row["increase_before"]) > 0:
            assert float(row["ratio"]) == pytest.approx(found / float(row["increase_before"]))
        else:
            assert row["ratio"] == ""


def test_without_a_step_the_untrained_loss_is_the_loss(
    tiny_workload: Path, judge: trials.Judge
) -> None:
    config = configure(sensitivity, "sensitivity", tiny_workload)

    def trial(steps: int, with_untrained: bool) -> dict[str, Any]:
        record = trials.train_trial(
            config, quiet(), judge, {"blocks.0.mlp.fc2": 1},
            seed=1, steps=steps, with_untrained=with_untrained,
        )  # fmt: skip
        return {name: value for name, value in record.items() if "seconds" not in name}

    untrained, trained = trial(0, True), trial(2, True)
    assert untrained[trials.UNTRAINED] == untrained["distillation_loss"]
    assert trained[trials.UNTRAINED] == untrained["distillation_loss"]
    assert trained["distillation_loss"] != untrained["distillation_loss"]
    del trained[trials.UNTRAINED]
    assert trial(2, False) == trained, "measuring before training changes nothing after it"


@pytest.mark.parametrize(("image_seeds", "first"), [("own", 300), ("none", 0)])
def test_a_training_seed_is_sampled_from_its_images(
    tiny_workload: Path, tmp_path: Path, image_seeds: str, first: int
) -> None:
    given = f"evaluation.image_seeds={image_seeds}"
    config = configure(allocation, "allocation", tiny_workload, given)
    with Run.open(tmp_path, config, []) as run:
        judge = trials.make_judge(config, run, quiet(), 100, 2)
    student = convert_teacher(config, quiet(), judge.teacher, judge.data)
    record = trials.judge_student(student, judge, quiet(), seed=3)
    protocol = {"sampling_steps": 2}
    short = config.workload.model_copy(
        update={"evaluation": config.workload.evaluation.model_copy(update=protocol)}
    )
    values, of_teacher = (
        sample_values(model, short, seeds=range(first, first + 100))
        for model in (student, judge.teacher)
    )
    assert record["image_seed_start"] == first
    assert record["sample_mse"] == float((values - of_teacher).square().mean())
    features = judge.network.extract(to_uint8(values), 100)
    fid = compute_fid(features, judge.reference, judge.network.suffix)["fid_digits"]
    assert record["fid_digits"] == pytest.approx(fid, rel=1e-9)


@pytest.mark.parametrize("suffix", ["", "_digits", "_rank_deficient", "_digits_adapted"])
def test_the_fid_of_a_trial_is_found_whatever_its_features_are_called(suffix: str) -> None:
    details = {f"fid{suffix}_is_rank_deficient": 1, "fidelity": 0.0, f"sfid{suffix}": 3.0}
    record = {**details, f"sfid{suffix}_is_rank_deficient": 1, f"fid{suffix}": 2.0}
    assert ground_truth.metric_key(record, "fid") == f"fid{suffix}"
    assert ground_truth.metric_key(details, "distillation_loss") is None
    assert ground_truth.metric_key({"denoising_loss": 1.0}, "fid") is None


def test_solvers_and_fronts_of_a_table_too_large(
    tiny_workload: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(allocation, "allocation", tiny_workload)
    macs = dict(zip("abcd", (3, 1, 4, 4), strict=True))
    values = {
        layer: {bits: count / 4**bits for bits in (1, 2, 3, 4)} for layer, count in macs.items()
    }
    whole = allocation_tables.front_rows(config, {"qat": values}, macs)
    exact = {row["mean_bits"]: row["objective"] for row in whole}
    monkeypatch.setattr(allocation_table, "MAX_TABLE_STATES", 0)
    solvers = [
        row["solver"] for row in allocation_tables.solver_rows(config, {"qat": values}, macs)
    ]
    assert "exact" not in solvers
    assert solvers.count("milp") == 2  # one a budget
    front = allocation_tables.front_rows(config, {"qat": values}, macs)
    assert [row["mean_bits"] for row in front] == [2.0, 3.0]
    assert all(row["objective"] == pytest.approx(exact[row["mean_bits"]]) for row in front)
    assert "The front of qat has the study's budgets alone" in caplog.messages[-1]
