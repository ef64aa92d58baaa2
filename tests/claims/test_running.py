"""Making the runs of claims on a tiny workload, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robuq_bench.claims import running
from robuq_bench.claims.planning import Pace
from robuq_bench.runs import provenance
from robuq_bench.runs.lock import take_lock
from robuq_bench.runs.run import list_runs

TEXT = """
[defaults]
workloads = ["{workload}"]
seeds = [0, 1]
budgets = [3]
[tuning]
factors = [0.5, 1.0]
seeds = [100]
[arms.a4]
plan = "a4"
[arms.fp]
plan = "fp"
[claims.teacher]
text = "A4 is its teacher"
candidate = "a4"
baseline = "fp"
expect = "equivalent"
family = "teacher"
"""


@pytest.fixture
def claims(tiny_workload: Path, tmp_path: Path) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text(TEXT.format(workload=tiny_workload))
    return path


def states() -> dict[str, str]:
    found = list_runs(Path("runs"))
    return {run.id: run.state for run in found if run.id.startswith("train-and-eval")}


def test_runs_are_made_once_shared_and_judged(bench: Any, claims: Path) -> None:
    file = ("--file", str(claims))
    dry = bench("claims", "run", *file, "--dry-run", "--json").document["runs"]
    assert [row["state"] for row in dry] == [
        "to make"
    ] * 4  # students, and teachers on their images
    assert not Path("runs").exists()
    first = bench("claims", "run", *file, "--quiet", "--seeds", "0", "--threads", "1", "--json")
    assert (first.code, len(first.document["done"]), first.document["failed"]) == (0, 2, {})
    left = bench("claims", "list", *file, "--json").document["claims"][0]
    assert (left["runs"], left["done"]) == (4, 2)
    # what `train-and-eval` made is not made again
    command = dry[2]["command"].removeprefix("python bench.py ").split()
    assert bench(*command, "--quiet", "--threads", "1").code == 0
    again = bench("claims", "run", *file, "--quiet", "--json").document
    assert (len(again["done"]), len(again["kept"])) == (1, 3)
    assert sorted(states().values()) == ["done"] * 4
    (judged,) = bench("claims", "judge", *file, "--csv", "out.csv", "--json").document["claims"]
    assert (judged["n"], judged["verdict"], judged["holds"]) == (2, "not judged", "not judged")
    assert len(judged["runs"].split()) == 4
    assert 0 < judged["low"] < judged["effect"] < judged["high"]
    table = pd.read_csv("out.csv")
    assert table["claim"].tolist() == ["teacher"]
    assert bench("claims", "judge", *file).out.splitlines()[-1] == "1 not judged"


@pytest.mark.parametrize("dirty", [True, False])
def test_uncommitted_changes_are_warned_of(
    bench: Any, claims: Path, monkeypatch: pytest.MonkeyPatch, dirty: bool
) -> None:
    monkeypatch.setattr(provenance, "code_version", lambda: {"dirty": dirty})
    monkeypatch.setattr(running, "run_study", lambda *_: None)
    monkeypatch.setattr(running, "read_manifest", lambda _: {"sessions": []})
    found = bench("claims", "run", "--file", str(claims))
    assert found.code == 0
    assert ("uncommitted changes" in found.err) == dirty


def test_a_failed_run_stops_no_other_and_is_named(
    bench: Any, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any, root: Path, context: Any) -> None:
        made.append((config.plan.name, config.seed))
        raise RuntimeError(f"broken at seed {config.seed}")

    made: list[tuple[str, int]] = []
    monkeypatch.setattr(running, "run_study", fail)
    found = bench("claims", "run", "--file", str(claims), "--quiet")
    assert found.code == 3
    assert made == [("a4", 0), ("fp", 0), ("a4", 1), ("fp", 1)]
    assert "4 of 4 runs are not there" in found.err
    assert "seed 1: RuntimeError: broken at seed 1" in found.err
    made.clear()
    halves = [
        bench("claims", "run", "--file", str(claims), "--quiet", "--shard", part).code
        for part in ("1/2", "2/2")
    ]
    assert halves == [3, 3]
    assert sorted(made) == [("a4", 0), ("a4", 1), ("fp", 0), ("fp", 1)]


def test_a_run_of_another_process_is_passed_over(
    bench: Any, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = bench("claims", "run", "--file", str(claims), "--only", "teacher", "--dry-run", "--json")
    assert dry.code == 0
    made: list[int] = []
    monkeypatch.setattr(running, "run_study", lambda *_: made.append(0))
    monkeypatch.setattr(running, "read_manifest", lambda _: {"sessions": []})
    monkeypatch.setattr(running, "run_folder", lambda root, config: root / f"s{config.seed}")
    Path("runs").mkdir()
    lock = take_lock(Path("runs/s1"), 0.0)
    try:
        found = bench("claims", "run", "--file", str(claims), "--quiet", "--json")
    finally:
        lock.release()
    assert found.code == 3
    assert len(made) == 2
    busy = next(line for line in found.out.splitlines() if "busy" in line)
    assert '"busy":{"a4 on ' in busy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "7"], "no claim has seed 7"),
        (["--seeds", "a"], "give a range such as 0-3"),
        (["--budget", "9"], "no claim has it; there are [3]"),
        (["--shard", "3/2"], "shard must be 'i/n'"),
        (["--only", "techer"], "did you mean 'teacher'"),
        (["--file", "none.toml"], "none.toml: cannot be read"),
    ],
)
def test_what_no_claim_has_is_refused(
    bench: Any, claims: Path, arguments: list[str], message: str
) -> None:
    found = bench("claims", "run", "--file", str(claims), "--dry-run", *arguments)
    assert (found.code, message in found.err) == (2, True)


def test_the_best_rate_of_other_seeds_is_taken(bench: Any, claims: Path) -> None:
    file = ("--file", str(claims))
    assert bench("claims", "tune", *file, "--quiet", "--threads", "1").code == 0
    table = pd.read_csv(claims.with_name("learning_rates.csv"))
    assert table["arm"].tolist() == ["a4", "a4"]  # the teacher is not trained
    assert table["learning_rate"].tolist() == [0.0005, 0.001]
    assert table["seeds"].tolist() == [100, 100]
    best = table.loc[table["mean"].idxmin(), "learning_rate"]
    assert table.loc[table["chosen"] == 1, "learning_rate"].tolist() == [best]
    dry = bench("claims", "run", *file, "--dry-run", "--json").document["runs"]
    rates = [f"--set training.learning_rate={best}" in row["command"] for row in dry]
    assert rates == [True, False, True, False]
    changed = claims.read_text().replace('plan = "a4"', 'plan = "a8"')
    claims.write_text(changed)
    found = bench("claims", "run", *file, "--dry-run")
    assert found.code == 2
    assert "arm 'a4' was chosen for other settings" in found.err


def test_the_pace_is_that_of_equal_length_else_by_steps() -> None:
    pace = Pace()
    assert pace.seconds("digits", 500) is None
    for steps, seconds in ((500, 60.0), (500, 80.0), (0, 5.0), (2000, 280.0)):
        pace.add("digits", steps, seconds)
    assert pace.seconds("digits", 500) == 70
    assert pace.seconds("digits", 1000) == pytest.approx(1000 * 420 / 3000)
    assert pace.seconds("other", 500) is None
