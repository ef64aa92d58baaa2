"""The file of claims: what it refuses, what its digest covers, and the packaged one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robuq_bench.claims import CLAIMS_FILE, load_claims
from robuq_bench.claims.declared import parse_claims
from robuq_bench.claims.history import BEFORE, CHANGED, UNKNOWN, declared_before, last_commit
from robuq_bench.claims.planning import Cell, Planner, cells_of
from robuq_bench.claims.tuning import (
    COLUMNS,
    RATES_FILE,
    _settings_digest,
    read_rates,
    trials_of,
    write_rates,
)
from robuq_bench.config import (
    config_hash,
    resolve,
    sensitivity_steps,
    training_recipe,
    training_steps,
)
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.runs.study import check_study
from robuq_bench.study_index import find_study

VERSION = find_study("train-and-eval").version

TEXT = """
[defaults]
seeds = [0, 1, 2, 3, 4]
budgets = [500]
[arms.a2]
plan = "a2-uniform"
[arms.b2]
plan = "baseline-a2"
set = ["layers.block.branch.rank=2"]
[arms.a4]
plan = "a4"
[arms.fp]
plan = "fp"
[claims.h2]
text = "Hadamard helps at 2 bits"
candidate = "a2"
baseline = "b2"
expect = "better"
family = "rotation"
"""


def test_a_claim_takes_the_defaults_and_its_weights_add_up_to_0() -> None:
    declared = parse_claims(TEXT, "claims")
    claim = declared.claims["h2"]
    assert (claim.seeds, claim.budgets, claim.margin) == ((0, 1, 2, 3, 4), (500,), 0.03)
    assert claim.weights == {"a2": 1, "b2": -1}
    gain = TEXT.replace('candidate = "a2"', 'candidate = ["a2", "fp"]')
    gain = gain.replace('baseline = "b2"', 'baseline = ["b2", "a4"]')
    assert parse_claims(gain, "").claims["h2"].weights == {"a2": 1, "fp": -1, "b2": -1, "a4": 1}
    shared = gain.replace('"a4"]', '"fp"]')  # a shared arm cancels
    assert parse_claims(shared, "").claims["h2"].weights == {"a2": 1, "b2": -1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"b2"\nexpect', '"c2"\nexpect', "unknown arm 'c2'; did you mean 'b2'"),
        ('plan = "a2-uniform"', 'plan = "a2-unform"', "did you mean 'a2-uniform'"),
        ("family =", "famliy =", "unknown key; did you mean 'family'"),
        ('expect = "better"', 'expect = "greater"', "is not one of 'better'"),
        ("[0, 1, 2, 3, 4]", "[0, 1, 1]", "must ascend"),
        ("[0, 1, 2, 3, 4]", "[0, 100]", "seeds [100] are those that learning rates are chosen on"),
        ("budgets = [500]", 'workloads = ["digit"]', "did you mean 'digits'"),
        ('candidate = "a2"', 'candidate = "b2"', "compared with itself"),
        ('candidate = "a2"', 'candidate = ["a2", "b2"]', "one arm each, or two each"),
        ("branch.rank=2", "branch.rank", "is not KEY=VALUE"),
        ("layers.block.branch.rank", "training.steps", "budgets of claims decide"),
        ("layers.block.branch.rank", "train.learning_rate", "`claims tune` decide"),
        ("text =", "margin = 1.5\ntext =", "less than 1"),
        ("[arms.a2]", "[arms.a2", "not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=r"^claims.toml") as caught:
        parse_claims(TEXT.replace(old, new), "claims.toml")
    assert message in str(caught.value)


def test_unknown_settings_of_an_arm_name_the_arm() -> None:
    declared = parse_claims(TEXT.replace("branch.rank=2", "branch.rnak=2"), "claims")
    with pytest.raises(ConfigError, match=r"arm 'b2' on digits: .*did you mean"):
        Planner(declared).config(Cell("digits", "b2", None, 0))


def test_a_choice_of_claims_names_the_nearest() -> None:
    declared = parse_claims(TEXT, "claims")
    assert list(declared.chosen(["h2"], ["digits"]).claims) == ["h2"]
    with pytest.raises(UsageError, match="unknown claim 'h3'; did you mean 'h2'"):
        declared.chosen(["h3"])
    with pytest.raises(UsageError, match="no claim is about workload 'digit'; did you mean"):
        declared.chosen([], ["digit"])


def test_runs_are_those_of_train_and_eval() -> None:
    declared = parse_claims(TEXT, "claims")
    planner = Planner(declared, {("digits", "b2"): 2e-3})
    cells = cells_of(declared)
    assert [cell.seed for cell in cells] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    own = resolve(
        "train-and-eval", VERSION, "a2-uniform", "digits", 3
    )  # 500 steps are the workload's
    assert config_hash(planner.config(Cell("digits", "a2", 500, 3))) == config_hash(own)
    given = ["layers.block.branch.rank=2", "training.steps=900", "training.learning_rate=0.002"]
    tuned = resolve("train-and-eval", VERSION, "baseline-a2", "digits", 1, given)
    assert config_hash(planner.config(Cell("digits", "b2", 900, 1))) == config_hash(tuned)
    assert "--seed 1 --set layers.block.branch.rank=2 --set training.steps=900" in planner.command(
        Cell("digits", "b2", 900, 1)
    )


@pytest.mark.parametrize(("image_seeds", "seeds"), [("own", {0, 5}), ("none", {0})])
def test_a_teacher_is_run_once_for_every_set_of_images(image_seeds: str, seeds: set[int]) -> None:
    given = f"evaluation.image_seeds={image_seeds}"
    text = TEXT.replace('plan = "fp"', f'plan = "fp"\nset = ["{given}"]')
    planner = Planner(parse_claims(text, "claims"))
    teachers = {
        config_hash(planner.config(Cell("digits", "fp", steps, seed)))
        for steps in (500, 2000)
        for seed in (0, 5)
    }
    expected = [resolve("train-and-eval", VERSION, "fp", "digits", s, [given]) for s in seeds]
    assert teachers == set(map(config_hash, expected))


def test_extra_steps_come_on_top_of_a_budget() -> None:
    text = TEXT.replace('plan = "a2-uniform"', 'plan = "a2-uniform"\nextra_steps = 40')
    config = Planner(parse_claims(text, "")).config(Cell("digits", "a2", 500, 0))
    assert config.workload.training.steps == 540
    own = Planner(parse_claims(text, "")).config(Cell("digits", "a2", None, 0))
    assert own.workload.training.steps == 540  # 500 are the workload's


def test_a_budget_is_refused_where_the_plan_says_its_own() -> None:
    own = TEXT.replace("layers.block.branch.rank=2", "train.steps=40")
    with pytest.raises(ConfigError, match=r"its plan says train.steps = 40"):
        Planner(parse_claims(own, "")).config(Cell("digits", "b2", 500, 0))


SIBLING = """
[claims.{key}]
text = "y"
candidate = "a4"
baseline = "fp"
expect = "worse"
family = "{family}"
"""


def test_the_digest_covers_the_family_on_its_workload() -> None:
    """What p-values are corrected over, so that a loser that is dropped shows."""
    text = TEXT + SIBLING.format(key="h3", family="rotation")
    digest = parse_claims(text, "").digest("h2", "digits")
    other = text + SIBLING.format(key="h4", family="other")
    elsewhere = text + SIBLING.format(key="h4", family="rotation") + 'workloads = ["mnist32"]'
    for same in (other, elsewhere):
        assert parse_claims(same, "").digest("h2", "digits") == digest
    longer = text + "budgets = [500, 900]"
    renamed = text.replace("claims.h3", "claims.h5")
    for changed in (TEXT, longer, renamed, text + 'workloads = ["mnist32"]'):
        assert parse_claims(changed, "").digest("h2", "digits") != digest


def test_the_digest_covers_the_claim_and_its_arms() -> None:
    digest = parse_claims(TEXT, "").digest("h2")
    for same in (
        TEXT.replace('plan = "a4"', 'plan = "a8"'),  # another claim's arm
        TEXT.replace("seeds = [0, 1, 2, 3, 4]", "seeds = [0,1,2,3,4] # as before"),
    ):
        assert parse_claims(same, "").digest("h2") == digest
    for other in (
        TEXT.replace("rank=2", "rank=4"),
        TEXT.replace("better", "worse"),
        TEXT.replace("[0, 1, 2, 3, 4]", "[0, 1, 2, 3, 4, 5]"),
        TEXT.replace("budgets = [500]", "budgets = [500]\nmargin = 0.1"),
    ):
        assert parse_claims(other, "").digest("h2") != digest


def test_git_says_whether_a_claim_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"

    def commit(text: str | None) -> str:
        if text is not None:
            path.write_text(text)
        (tmp_path / "other").write_text(str(text))
        who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        for command in (["add", "-A"], [*who, "commit", "-qm", "x"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        return done.stdout.strip()

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    none, other = commit(None), commit(TEXT.replace("better", "worse"))
    same = commit(f"{TEXT}# a comment\n")
    later = commit(TEXT + '[claims.h3]\nfamily = "x"\ntext = "y"\nexpect = "worse"\n'
                   'candidate = "a2"\nbaseline = "a4"\n')  # fmt: skip
    declared = load_claims(path)

    def said(*commits: str, steps: int = 500) -> str:
        return declared_before(declared, "h2", commits, path, ("digits", steps))

    assert said(same) == said(later) == said(same, later) == BEFORE
    assert said(none) == said(other) == said(same, other) == CHANGED
    assert said(same, steps=900) == CHANGED  # no budget of it then
    assert said("") == said(same, "") == said("0" * 40) == UNKNOWN
    assert said() == ""
    assert last_commit(path) == later
    path.write_text(TEXT)
    assert last_commit(path) == f"{later}+changes"


def test_rates_start_from_the_plan_of_a_file(tmp_path: Path) -> None:
    plan = tmp_path / "slow.toml"
    plan.write_text('extends = "a4"\ndescription = "x"\n[train]\nlearning_rate = 1e-4\n')
    text = TEXT.replace('plan = "a2-uniform"', f'plan = "{plan}"')
    declared = parse_claims(text, "claims")
    rates = [training_recipe(t.config).learning_rate for t in trials_of(declared) if t.arm == "a2"]
    assert sorted(set(rates)) == [5e-5, 1e-4, 2e-4]
    tuned = Planner(declared, {("digits", "a2"): 2e-4}).config(Cell("digits", "a2", 500, 0))
    assert training_recipe(tuned).learning_rate == 2e-4


@pytest.mark.parametrize(
    "changed",
    [
        "[tuning]\nfactors = [0.1]\n",
        "[tuning]\nseeds = [7, 8]\n",
        '[tuning]\nmetric = "kid"\n',
        '[tuning]\nset = ["evaluation.num_samples=50"]\n',
        "[tuning]\nsteps = 40\n",
    ],
)
def test_rates_chosen_under_other_settings_are_refused(tmp_path: Path, changed: str) -> None:
    declared = parse_claims(TEXT, "claims")
    path = tmp_path / RATES_FILE
    columns = dict.fromkeys(COLUMNS, "") | {"workload": "digits", "arm": "a2", "chosen": 1}
    columns |= {"learning_rate": 2e-3, "mean": 1.0}
    columns["settings_sha256"] = _settings_digest(declared, "digits", "a2")
    write_rates(path, [columns])
    assert read_rates(path, declared) == {("digits", "a2"): 2e-3}
    with pytest.raises(ConfigError, match=r"arm 'a2' was chosen for other settings"):
        read_rates(path, parse_claims(changed + TEXT, "claims"))


def test_claims_about_when_bits_are_allocated_compare_equal_steps() -> None:
    declared = load_claims()
    planner = Planner(declared)
    arms = [
        arm
        for key in ("sensitivity-untrained", "sensitivity-early", "sensitivity-late")
        for arm in declared.claims[key].weights
    ]
    configs = [planner.config(Cell("digits", arm, 2000, 0)) for arm in arms]
    assert {training_steps(each) + sensitivity_steps(each) for each in configs} == {2500}
    assert {sensitivity_steps(each) for each in configs} == {0, 50, 100, 500}


def test_the_packaged_claims_are_ready_to_run() -> None:
    """Every arm fits its workload, every rate is of today's arms."""
    declared = load_claims()
    planner = Planner(declared, read_rates(CLAIMS_FILE.with_name(RATES_FILE), declared))
    cells = cells_of(declared)
    assert len(declared.claims) >= 15
    for cell in {Cell(c.workload, c.arm, c.steps, 0): None for c in cells}:
        check_study(planner.config(cell))
    used = {arm for claim in declared.claims.values() for arm in claim.weights}
    assert used == declared.arms.keys()
    assert {trial.seed for trial in trials_of(declared)}.isdisjoint(cell.seed for cell in cells)


def test_claims_are_read_without_torch_pandas_and_scipy() -> None:
    code = (
        "import sys; from robuq_bench.claims import load_claims; load_claims();"
        "print({'torch', 'pandas', 'scipy', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
