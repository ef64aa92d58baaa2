"""`study survival`: arms as commands, the rule on made-up losses, a tiny run and its section."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from reports import build_report
from robuq_bench.config import load_plan, resolve
from robuq_bench.context import Context
from robuq_bench.errors import DivergedError, UsageError
from robuq_bench.judging import evaluation
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import read_verdicts
from robuq_bench.survival_figure import survival_pictures
from studies.survival import study
from studies.survival.choices import (
    CHOICES,
    NAMES,
    Choice,
    arms_of,
    check_choices,
    overrides_of,
    plan_of,
)
from studies.survival.tables import survival, verdicts_of

BASES = ("a2-uniform", "a4")


# Arms.


@pytest.mark.parametrize("base", BASES)
def test_every_arm_is_the_plan_that_its_command_gives(base: str) -> None:
    plan = load_plan(base)
    check_choices(plan, CHOICES, "survival")
    for arm in arms_of(CHOICES):
        config = resolve("train-and-eval", "1", base, "digits", 0, overrides_of(plan, arm))
        assert plan_of(plan, arm, "survival") == config.plan, arm
    assert len(set(NAMES)) == len(NAMES) >= 12
    assert all(len(choice.label) <= 20 for choice in CHOICES)


@pytest.mark.parametrize("base", BASES)
def test_arms_keep_the_bits_of_activations(base: str) -> None:
    plan = load_plan(base)
    before = [rule.activation.bits for rule in plan.layers if rule.activation]
    for arm in arms_of(CHOICES):
        rules = plan_of(plan, arm, "survival").layers
        assert [rule.activation.bits for rule in rules if rule.activation] == before


def test_plans_that_say_nothing_are_refused() -> None:
    for base, message in (("a2", "allocates its own"), ("fp", "quantizes nothing")):
        with pytest.raises(UsageError, match=message):
            check_choices(load_plan(base), CHOICES, "survival")
    with pytest.raises(UsageError, match="'centring' changes nothing in plan 'a2-centred'"):
        check_choices(load_plan("a2-centred"), CHOICES, "survival")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("choices=['hadamart']", "unknown 'hadamart'; did you mean 'hadamard'"),
        ("budgets=[100,500]", "budgets must ascend from 0"),
        ("budgets=[0]", "budgets must ascend from 0"),
        ("shard=3/2", "shard must be"),
    ],
)
def test_settings_are_checked(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("survival", "1", "a4", "digits", 0, [f"survival.{override}"])


# The rule, on losses made up so that every outcome is there.

LIKELY = {
    "survives": (1.0, 0.7),
    "shrinks": (1.0, 0.2),
    "washed out": (1.0, 0.001),
    "reversed": (0.5, -0.3),
    "kept in the wrong": (-0.4, -0.4),
    "nothing before": (0.0, 0.5),
}
MADE_UP = [Choice(name, name, (f"with {name}",)) for name in LIKELY]
EXPECTED = dict(zip(LIKELY, [*list(LIKELY)[:4], "survives", "nothing before"], strict=True))


def losses(seeds: int = 8, noise: float = 0.01) -> pd.DataFrame:
    """Losses of a shared reference and of every choice's arm, before and after 100 steps."""
    rng = np.random.default_rng(0)
    rows = []
    for steps in (0, 100):
        shared = np.exp(rng.normal(-2, 0.5, seeds))
        rows += [{"arm": "reference", "steps": steps, "seed": s, "loss": shared[s]}
                 for s in range(seeds)]  # fmt: skip
        for name, gains in LIKELY.items():
            gain = gains[steps > 0] + rng.normal(0, noise, seeds)
            rows += [{"arm": f"with {name}", "steps": steps, "seed": s,
                      "loss": shared[s] * math.exp(-gain[s])} for s in range(seeds)]  # fmt: skip
    return pd.DataFrame(rows)


def log_gains(frame: pd.DataFrame, name: str, steps: int) -> np.ndarray:
    wide = frame[frame["steps"] == steps].pivot(index="seed", columns="arm", values="loss")
    return np.log(wide["reference"] / wide[f"with {name}"]).to_numpy()


def test_gains_and_outcomes_are_those_of_the_rule() -> None:
    frame = losses()
    rows, compared, _ = survival(frame.to_dict("records"), MADE_UP, (0, 100))
    assert {row["choice"]: row["outcome"] for row in rows} == EXPECTED
    for row in rows:
        for of, steps in (("gain_before", 0), ("gain", 100)):
            gains = log_gains(frame, row["choice"], steps)
            low, high = stats.t.interval(0.95, 7, gains.mean(), stats.sem(gains))
            assert row[of] == pytest.approx(math.exp(gains.mean()))
            assert row[f"{of}_low"] == pytest.approx(math.exp(low))
            assert row[f"{of}_high"] == pytest.approx(math.exp(high))
    keys = [(name, steps) for name in LIKELY for steps in (0, 100)]
    p = [stats.ttest_1samp(log_gains(frame, *key), 0).pvalue for key in keys]
    adjusted = [compared[key].p_adjusted for key in keys]
    np.testing.assert_allclose(adjusted, multipletests(p, method="holm")[1], rtol=1e-6)


def test_verdicts_say_what_became_of_the_gain() -> None:
    rows, compared, kept = survival(losses().to_dict("records"), MADE_UP, (0, 100))
    table = pd.DataFrame(verdicts_of(rows, compared, kept, study.RULE))
    found = {v.subject.partition(",")[0]: v for v in read_verdicts(table)}
    words = {name: verdict.verdict for name, verdict in found.items()}
    assert words == {
        "survives": "holds",
        "shrinks": "does not hold",
        "washed out": "does not hold",
        "reversed": "does not hold",
        "kept in the wrong": "holds",
        "nothing before": "not judged",
    }
    assert found["washed out"].note.startswith("washed out; gain 2.7")
    assert found["washed out"].p_adjusted is None
    for row in rows:
        verdict, name = found[row["choice"]], row["choice"]
        expected = math.log(row["gain"])
        if name in ("survives", "shrinks", "kept in the wrong"):
            before, after = (log_gains(losses(), name, steps) for steps in (0, 100))
            sign = np.sign(before.mean())
            half = stats.ttest_rel(sign * after, sign * before / 2)
            assert verdict.p_value == pytest.approx(half.pvalue)
            limits = half.confidence_interval(0.95)
            assert np.log([verdict.low, verdict.high]) == pytest.approx([limits.low, limits.high])
            expected = sign * (after - before / 2).mean()
        assert math.log(verdict.effect) == pytest.approx(expected)
        assert verdict.low <= verdict.effect <= verdict.high


def test_noise_leaves_it_open_and_few_seeds_are_not_judged() -> None:
    rows, _, _ = survival(losses(noise=2.0).to_dict("records"), MADE_UP[:1], (0, 100))
    assert rows[0]["outcome"] in ("undecided", "nothing before")
    rows, _, _ = survival(losses(seeds=4).to_dict("records"), MADE_UP, (0, 100))
    assert {row["outcome"] for row in rows} == {"not judged"}
    assert all(row["gain_low"] < row["gain"] < row["gain_high"] for row in rows)
    rows, _, _ = survival(losses(seeds=1).to_dict("records"), MADE_UP, (0, 100))
    assert all(row["gain"] and row["gain_low"] is None for row in rows)


def test_holm_takes_what_chance_would_give() -> None:
    """A gain that is decided alone, and not among all comparisons of the run."""
    frame = losses(seeds=8)
    gains = np.array([0.02, 0.5, 0.01, 0.4, 0.1, 0.3, 0.02, 0.35])
    assert stats.ttest_1samp(gains, 0).pvalue < 0.02
    is_shared = (frame["arm"] == "reference") & (frame["steps"] == 100)
    shared = frame.loc[is_shared].sort_values("seed")["loss"].to_numpy()
    is_own = (frame["arm"] == "with survives") & (frame["steps"] == 100)
    frame.loc[is_own, "loss"] = shared * np.exp(-gains)
    only, _, _ = survival(frame.to_dict("records"), MADE_UP[:1], (0, 100))
    assert only[0]["outcome"] == "shrinks"
    noisy = losses(seeds=8, noise=1.0)
    others = noisy[~noisy["arm"].isin(["reference", "with survives"])]
    shared_rows = frame[frame["arm"].isin(["reference", "with survives"])]
    among, _, _ = survival(pd.concat([shared_rows, others]).to_dict("records"), MADE_UP, (0, 100))
    assert among[0]["outcome"] == "undecided"


def test_a_training_that_diverged_is_told_and_not_left_out() -> None:
    frame = losses()
    frame.loc[(frame["arm"] == "with survives") & (frame["seed"] == 3), "loss"] = None
    rows, compared, kept = survival(frame.to_dict("records"), MADE_UP[:2], (0, 100))
    assert [row["outcome"] for row in rows] == ["not judged", "shrinks"]
    assert "with survives seed 3" in compared["survives", 100].note
    assert pd.DataFrame(verdicts_of(rows, compared, kept, "rule"))["verdict"][0] == "not judged"


def test_half_kept_exactly_is_rarely_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words by point estimates alone would be a coin toss, each of them decided."""
    # statsmodels' `multipletests` collects garbage at each call: seconds in a worker's large heap
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    rng, words = np.random.default_rng(0), []
    names = ("reference", "with survives")
    for _ in range(30):
        made = [
            {"arm": arm, "steps": steps, "seed": seed, "loss": math.exp(rng.normal(-gain, 0.1))}
            for steps, kept in ((0, 0.8), (100, 0.4))
            for arm, gain in zip(names, (0.0, kept), strict=True)
            for seed in range(8)
        ]
        rows, _, _ = survival(made, MADE_UP[:1], (0, 100))
        words.append(rows[0]["outcome"])
    assert words.count("undecided") >= 25  # of 5 % decided by chance, 6 or more: p = 0.003
    assert {*words} <= {"undecided", "survives", "shrinks"}


@pytest.mark.parametrize(("steps", "drawn"), [(0, []), (100, [500])])
def test_a_budget_without_a_gain_is_not_drawn(steps: int, drawn: list[int]) -> None:
    """The other panels are, the report has the choice all the same."""
    frame = pd.concat([losses(), losses().query("steps == 100").assign(steps=500)])
    frame.loc[(frame["arm"] == "with survives") & (frame["steps"] == steps)
              & (frame["seed"] == 3), "loss"] = None  # fmt: skip
    rows, _, _ = survival(frame.to_dict("records"), MADE_UP[:1], (0, 100, 500))
    assert list(survival_pictures(pd.DataFrame(rows), "test")) == drawn


# A run on a tiny model.

SMALL = ("survival.budgets=[0,2]", "survival.seeds=2", "training.batch_size=4",
         'survival.choices=["hadamard","centring","distillation"]')  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _small_validation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "VALIDATION_BATCHES", 1)
        patch.setattr(evaluation, "VALIDATION_BATCH_SIZE", 8)
        yield


def configure(workload: Path, *overrides: str) -> Any:
    return resolve("survival", study.VERSION, "a4", workload, 0, [*SMALL, *overrides])


def perform(config: Any, root: Path) -> Run:
    context = Context(
        device="cpu", threads=torch.get_num_threads(), progress=Progress(quiet=True), argv=[]
    )
    with Run.open(root, config, []) as run:
        study.measure(config, run, context)
        run.finish()
    return run


@pytest.fixture(scope="module")
def done(
    _small_validation: None, tiny_workload: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return perform(configure(tiny_workload), tmp_path_factory.mktemp("done"))


def trials(run: Run) -> dict[str, float]:
    return {r["key"]: r["loss"] for r in run.results() if r["kind"] == "trial"}


def test_every_arm_is_trained_once(done: Run) -> None:
    arms = ["reference", "layers.*.rotation=none", "layers.block.centring=mean"]
    arms.append("train.distillation_weight=0.0; train.denoising_weight=1.0")
    expected = {f"trial/{arm}/{s}/{seed}" for arm in arms for s in (0, 2) for seed in (0, 1)}
    assert trials(done).keys() == expected
    assert all(math.isfinite(loss) and loss > 0 for loss in trials(done).values())
    # What acts in training alone changes nothing before it.
    for seed in (0, 1):
        assert (
            trials(done)[f"trial/{arms[3]}/0/{seed}"] == trials(done)[f"trial/reference/0/{seed}"]
        )
        assert (
            trials(done)[f"trial/{arms[3]}/2/{seed}"] != trials(done)[f"trial/reference/2/{seed}"]
        )
    assert (done.path / "figures" / "survival-2.svg").is_file()
    table = pd.read_csv(done.path / "tables" / "survival.csv")
    assert set(table["outcome"]) == {"not judged"}
    commands = pd.read_csv(done.path / "tables" / "arms.csv").set_index("arm")["command"]
    assert commands[arms[1]].endswith(
        '--set "layers.adaln.rotation=none" --set "layers.block.rotation=none"'
    )


def test_the_loss_is_over_the_teachers_energy(done: Run, tiny_workload: Path) -> None:
    """A student that predicts nothing has a loss of 1."""
    from robuq_bench.data.datasets import load_dataset
    from robuq_bench.models.checkpoints import load_teacher

    workload = configure(tiny_workload).workload
    data = load_dataset(workload.data, name=workload.name)
    teacher, _ = load_teacher(workload, "cpu")
    energy = evaluation.validation_energy(teacher, data, workload, "cpu")

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    nothing = evaluation.validation_losses(Nothing(), teacher, data, workload, "cpu")
    assert nothing["distillation_loss"] == pytest.approx(energy, rel=1e-6)
    record = next(r for r in done.results() if r["kind"] == "trial")
    assert record["loss"] == pytest.approx(record["distillation_loss"] / energy, rel=1e-9)


def test_a_kill_loses_one_network_and_shards_are_adopted(
    done: Run, tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = study.train, []

    def counted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(study, "train", counted)
    half = configure(tiny_workload, "survival.shard='1/2'")
    with pytest.raises(KeyboardInterrupt):
        perform(half, tmp_path)
    perform(half, tmp_path)
    assert len(calls) == 4 + 5  # eight networks of a shard, three of them before the kill
    whole = perform(configure(tiny_workload), tmp_path)
    assert len(calls) == 9 + 8
    assert trials(whole) == trials(done)


def test_divergence_is_recorded_and_the_rest_goes_on(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = study.train

    def diverging(config: Any, *given: Any) -> Any:
        if config.plan.layers[0].rotation is None and config.workload.training.steps:
            raise DivergedError("training diverged at step 1")
        return train(config, *given)

    monkeypatch.setattr(study, "train", diverging)
    run = perform(configure(tiny_workload, "survival.seeds=1"), tmp_path)
    assert trials(run)["trial/layers.*.rotation=none/2/0"] is None
    rows = pd.read_csv(run.path / "tables" / "survival.csv").set_index("choice")
    assert math.isnan(rows.loc["hadamard", "gain"])
    assert rows.loc["centring", "gain"] > 0


def test_losses_are_of_heldout_images_where_there_are_any(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robuq_bench.data.datasets import load_dataset, make_image_data

    config = configure(tiny_workload, "survival.seeds=1", 'survival.choices=["distillation"]')
    data = load_dataset(config.workload.data, name=config.workload.name)
    unseen = make_image_data(255 - data.images[:8], data.labels[:8], "made:t10k")
    monkeypatch.setattr(study, "load_heldout", lambda *_, **__: unseen)
    run = perform(config, tmp_path)
    assert {r["validation_images"] for r in run.results() if r["kind"] == "trial"} == {"held-out"}
    assert run.manifest["inputs"]["heldout"]["sha256"] == unseen.sha256


def test_what_would_only_rename_a_run_does_not(tiny_workload: Path) -> None:
    one, other = (configure(tiny_workload, f"training.steps={steps}") for steps in (3, 9))
    assert one == other
    assert one.workload.training.steps == 2  # the last budget
    with pytest.raises(UsageError, match="would not use --seed 7"):
        study.check(resolve("survival", study.VERSION, "a4", tiny_workload, 7, SMALL))


def test_the_section_shows_a_choice_that_has_no_gain_before(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = study.train

    def diverging(config: Any, *given: Any) -> Any:
        if config.plan.layers[0].rotation is None and not config.workload.training.steps:
            raise DivergedError("training diverged at step 1")
        return train(config, *given)

    monkeypatch.setattr(study, "train", diverging)
    for choices, label in (("['hadamard']", "Hadamard"), ("['hadamard','centring']", "centring")):
        small = ("survival.seeds=1", f"survival.choices={choices}")
        run = perform(configure(tiny_workload, *small), tmp_path)
        page = build_report([run.path], tmp_path / "report.html").read_text("utf-8")
        assert "Hadamard" in page
        assert label in page
        assert (run.path / "figures" / "survival-2.svg").is_file() == (label == "centring")


def test_a_dry_run_says_how_much_there_is_to_do(
    tiny_workload: Path, tmp_path: Path, bench: Any
) -> None:
    arguments = ["study", "survival", "--plan", "a4", "--on", str(tiny_workload), "--dry-run"]
    shown = bench(*arguments, *(part for text in SMALL for part in ("--set", text)))
    assert shown.code == 0, shown.err
    assert "# 16 networks of 4 arms, 8 of them trained, 16 steps in all" in shown.out
    assert "of one CPU core to train" in shown.out


def test_the_section_shows_what_the_run_says(done: Run, tmp_path: Path) -> None:
    page = build_report([done.path], tmp_path / "report.html").read_text("utf-8")
    table = pd.read_csv(done.path / "tables" / "survival.csv")
    assert "What survives training" in page
    for row in table.to_dict("records"):
        assert row["label"] in page
        assert f"{row['label']} {row['gain_before']:.2f} to {row['gain']:.2f}" in page
    exported = pd.read_csv(tmp_path / "report-survival-survival.csv")
    pd.testing.assert_frame_equal(exported.drop(columns="run"), table)
