"""The command line: flags, exit codes, what it prints, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from robuq_bench.cli import app as cli
from robuq_bench.config import resolve
from robuq_bench.context import RunResult
from robuq_bench.runs.run import Run
from robuq_bench.study_index import find_study

ROOT = Path(cli.__file__).resolve().parents[2]
COMMON = ["--device", "--dry-run", "--force", "--json", "--on", "--output", "--quiet", "--seed",
          "--set", "--threads", "--workload", "-o"]  # fmt: skip
CHOSEN = ["--file", "--on", "--only", "--workload"]  # of claims
# A flag is a promise: changing this table needs a line in the changelog.
FLAGS = {
    "": ["--version"],
    "account": ["--json", "--on", "--plan", "--set", "--workload"],
    "claims export": sorted([*CHOSEN, "--json", "--output", "-o"]),
    "claims judge": sorted([*CHOSEN, "--csv", "--json", "--output", "-o"]),
    "claims list": sorted([*CHOSEN, "--json", "--output", "-o"]),
    "claims run": sorted(
        {*COMMON, *CHOSEN, "--budget", "--seeds", "--shard"} - {"--force", "--seed", "--set"}
    ),
    "claims tune": sorted({*COMMON, *CHOSEN, "--shard"} - {"--force", "--seed", "--set"}),
    "env": ["--json"],
    "export": sorted({*COMMON, "--random-weights", "--runs", "--storage"}),
    "methods": ["--json"],
    "packed": ["--json"],
    "plans": ["--json", "--layers", "--on", "--workload"],
    "report": ["--claims", "--dry-run", "--html", "--json", "--output", "--quiet", "-o"],
    "runs list": ["--json", "--output", "-o"],
    "runs show": ["--json", "--output", "-o"],
    "runs verify": ["--json", "--output", "-o"],
    "sample": sorted(
        {*COMMON, "--backend", "--checkpoint", "--num", "--packed", "--png"} - {"--force"}
    ),
    "study": sorted([*COMMON, "--plan", "--activations", "--checkpoint", "--shard"]),
    "train-and-eval": sorted([*COMMON, "--plan"]),
    "train-features": sorted({*COMMON, "--export"} - {"--device"}),
    "train-teacher": sorted([*COMMON, "--export"]),
    "workloads": ["--json"],
}


def fresh(*arguments: str, limit_s: float) -> tuple[types.SimpleNamespace, float]:
    """Run a command in a new process; its outcome, and its CPU time in seconds, least of three.

    CPU time, not wall time: neighbours on a busy machine do not slow it down.
    """
    code = (
        "import sys; from robuq_bench.cli.app import main; code = main(sys.argv[1:]);"
        "sys.stderr.write('LOADED ' + ' '.join({'torch', 'numpy', 'scipy'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    best, outcome = float("inf"), types.SimpleNamespace()
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        after = os.times()
        best = min(
            best,
            after.children_user + after.children_system
            - before.children_user - before.children_system,
        )  # fmt: skip
        outcome = types.SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)
        if best < limit_s:
            break
    return outcome, best


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# help and speed


@pytest.mark.parametrize("arguments", [["--help"], ["train-and-eval", "--help"]])
def test_help_answers_at_once_without_torch(arguments: list[str]) -> None:
    outcome, seconds = fresh(*arguments, limit_s=0.5)
    assert outcome.code == 0
    assert "--help" in outcome.out
    assert outcome.err == "LOADED "
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-and-eval", "--plan", "a22"], "unknown plan 'a22'; did you mean 'a2'?"),
        (["train-and-eval", "--set", "training.step=1"], "did you mean 'training.steps'?"),
        (["train-and-eval", "--sed", "1"], "--seed"),
        (["study", "nromality"], "unknown study 'nromality'"),
    ],
)
def test_typos_are_answered_at_once_without_torch(arguments: list[str], message: str) -> None:
    outcome, seconds = fresh(*arguments, limit_s=1.0)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.endswith("LOADED ")
    assert seconds < 1.0


def test_no_command_shows_help(bench: Any) -> None:
    outcome = bench()
    assert outcome.code == 2
    assert "train-and-eval" in outcome.out + outcome.err


def test_version(bench: Any) -> None:
    outcome = bench("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("robuq-bench ")


def test_bench_py_is_a_thin_door() -> None:
    text = (ROOT / "bench.py").read_text()
    assert len(text.splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "bench.py", "workloads", "--json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    first = json.loads(done.stdout)["workloads"][0]
    assert {"workload": "digits", "width": 144}.items() <= first.items()


def test_the_flags_are_frozen() -> None:
    def walk(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
        options = [
            option
            for parameter in command.params
            if parameter.param_type_name == "option"
            for option in parameter.opts
            if option != "--help"
        ]
        children = getattr(command, "commands", {})
        if options or not children:
            yield name, sorted(options)
        for child, inner in children.items():
            yield from walk(inner, f"{name} {child}".strip())

    assert dict(walk(typer.main.get_command(cli.app), "")) == FLAGS


# dry runs


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-and-eval"],
        ["train-and-eval", "--force"],
        ["train-teacher", "--export", "t.safetensors"],
        ["train-features", "--export", "f.safetensors"],
        ["sample", "--png", "deep/grid.png"],
        ["study", "toy-study"],
    ],
)
def test_dry_run_prints_the_config_and_writes_nothing(
    bench: Any, toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:  # fmt: skip
    if "toy-study" not in arguments:
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    outcome = bench(*arguments, "--dry-run", "--seed", "5", "--set", "training.steps=777")
    assert outcome.code == 0
    assert "seed = 5\n" in outcome.out
    assert "steps = 777\n" in outcome.out
    document = bench(*arguments, "--dry-run", "--json", "--set", "training.steps=777").document
    assert document["dry_run"] is True
    assert document["config"]["workload"]["training"]["steps"] == 777
    assert files(tmp_path) == before
    assert not (tmp_path / "runs").exists()
    assert toy == []


def test_dry_run_says_whether_the_run_is_finished(bench: Any, toy: list[str]) -> None:
    assert bench("study", "toy-study", "--dry-run", "--json").document["complete"] is False
    bench("study", "toy-study")
    document = bench("study", "toy-study", "--dry-run", "--json").document
    assert document["complete"] is True
    assert "(finished)" in bench("study", "toy-study", "--dry-run").out
    assert len(toy) == 1


# studies, finished runs


def test_study_without_a_name_lists_what_exists(bench: Any, toy: list[str]) -> None:
    assert "toy-study" in bench("study").out
    assert bench("study", "--json").document == {
        "studies": [{"study": "toy-study", "about": "Does it work?"}]
    }
    outcome = bench("study", "toy-studi")
    assert outcome.code == 2
    assert "did you mean 'toy-study'?" in outcome.err


def test_a_finished_run_is_shown_again_but_not_done_again(bench: Any, toy: list[str]) -> None:
    first = bench("study", "toy-study", "--json")
    second = bench("study", "toy-study", "--json")
    assert (first.code, second.code) == (0, 0)
    assert len(toy) == 1
    assert first.document == second.document | {"was_complete": False}
    assert second.document["was_complete"] is True
    assert second.document["table"][0] == {"layer": "a", "mse": 0.125}
    assert second.document["run"] == toy[0]
    text = bench("study", "toy-study").out
    assert "not run" in text
    assert "already complete: runs/toy-study/a2-digits-" in text


def test_seed_plan_and_overrides_make_other_runs(bench: Any, toy: list[str]) -> None:
    for extra in ([], ["--seed", "1"], ["--plan", "a4"], ["--set", "training.steps=9"]):
        assert bench("study", "toy_study", *extra).code == 0
    assert len(set(toy)) == 4


def test_force_sets_the_old_run_aside(bench: Any, toy: list[str], tmp_path: Path) -> None:
    bench("study", "toy-study")
    outcome = bench("study", "toy-study", "--force")
    assert outcome.code == 0
    assert len(toy) == 2
    assert len(list((tmp_path / "runs" / "toy-study").glob("*.replaced-1"))) == 1


def test_the_manifest_holds_threads_and_device(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    document = bench("study", "toy-study", "--threads", "1", "--device", "cpu", "--json").document
    manifest = json.loads((Path(document["path"]) / "manifest.json").read_text())
    assert asked == [1]
    assert manifest["sessions"][0]["provenance"]["threads"] == 1
    assert manifest["sessions"][0]["provenance"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("plan", "loaded", "limit_s"),
    [("fp", set(), 2.0), ("a2", {"numpy", "torch"}, 5.0)],  # a plan's methods import torch
)
def test_a_finished_main_job_answers_at_once(
    tmp_path: Path, plan: str, loaded: set[str], limit_s: float
) -> None:
    version = find_study("train-and-eval").version
    config = resolve("train-and-eval", version, plan, "digits", 3)
    with Run.open(tmp_path / "out", config, ["test"]) as run:
        RunResult.store(run, [{"subject": "student", "fid_digits": 12.5}], {"more": 1})
        run.finish()
    before = files(tmp_path)
    outcome, seconds = fresh(
        "train-and-eval", "--plan", plan, "--seed", "3", "-o", str(tmp_path / "out"), "--json",
        limit_s=limit_s,
    )  # fmt: skip
    assert outcome.code == 0
    document = json.loads(outcome.out.splitlines()[-1])
    assert document["was_complete"] is True
    assert document["table"] == [{"subject": "student", "fid_digits": 12.5}]
    assert document["more"] == 1
    assert set(outcome.err.removeprefix("LOADED ").split()) == loaded
    assert seconds < limit_s
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["train-and-eval", "train-teacher", "train-features"])
def test_the_commands_are_studies(bench: Any, command: str) -> None:
    for more in ([], ["--set", "training.steps=777", "--seed", "1", "-o", "elsewhere"]):
        of_command = bench(command, *more, "--dry-run", "--json").document
        assert of_command["command"] == command
        assert bench("study", command, *more, "--dry-run", "--json").document == of_command


def test_what_a_study_does_not_use_is_refused(bench: Any) -> None:
    outcome = bench("study", "train-teacher", "--plan", "a2", "--dry-run")
    assert (outcome.code, "takes no --plan" in outcome.err) == (2, True)
    outcome = bench("study", "teacher-eval", "--seed", "1", "--dry-run")
    assert (outcome.code, "takes no --seed" in outcome.err) == (2, True)
    paths = {
        bench("study", "teacher-eval", *more, "--dry-run", "--json").document["path"]
        for more in ([], ["--set", "training.steps=9"])
    }
    assert len(paths) == 1


def test_the_commands_pass_on_what_they_are_told(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def record(*arguments: Any) -> RunResult:
        seen[:] = arguments
        return RunResult(path=tmp_path / "s" / "r", table=[{"n": 1}])

    monkeypatch.setattr("robuq_bench.runs.study.run_study", record)
    assert bench("train-and-eval", "--plan", "a3", "-o", "o", "--device", "cpu").code == 0
    config, root, context = seen
    assert (config.study, config.plan.name, root) == ("train-and-eval", "a3", Path("o"))
    assert (context.device, context.force) == ("cpu", False)
    assert bench("train-teacher", "--on", "mnist32", "--force").code == 0
    config, _, context = seen
    assert (config.plan.name, config.workload.name, context.force) == ("fp", "mnist32", True)
    assert bench("train-features").code == 0
    assert (seen[0].study, seen[2].device) == ("train-features", "cpu")


def test_sample_passes_on_what_it_is_told(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "robuq_bench.judging.sample_grid.run_sample",
        lambda config, context, **named: seen.update(named),
    )
    outcome = bench("sample", "--num", "4", "--png", "x.png", "--json")
    assert outcome.document == {"command": "sample", "path": "x.png", "num": 4, "seed": 0}
    assert seen == {
        "checkpoint": None,
        "packed": None,
        "backend": None,
        "num": 4,
        "output": Path("x.png"),
    }
