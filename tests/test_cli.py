"""The command line: flags, exit codes, what it prints, and how soon."""

from __future__ import annotations

import errno
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

from robuq_bench import cli, cli_job, study_index
from robuq_bench.cli import main
from robuq_bench.config import load_plan, load_workload, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.errors import CheckError, CheckpointError, MissingResourceError
from robuq_bench.progress import Progress
from robuq_bench.runs import Run
from robuq_bench.study_index import command_version

ROOT = Path(cli.__file__).resolve().parents[1]
COMMON = ["--device", "--dry-run", "--force", "--json", "--on", "--output", "--quiet", "--seed",
          "--set", "--threads", "--workload", "-o"]  # fmt: skip
# A flag is a promise: changing this table needs a line in the changelog.
FLAGS = {
    "": ["--version"],
    "account": ["--json", "--on", "--plan", "--set", "--workload"],
    "env": ["--json"],
    "export": sorted({*COMMON, "--random-weights", "--runs", "--storage"}),
    "packed": ["--json"],
    "plans": ["--json"],
    "report": ["--dry-run", "--html", "--json", "--output", "--quiet", "-o"],
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


class Outcome(types.SimpleNamespace):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return call


def fresh(*arguments: str, limit_s: float) -> tuple[Outcome, float]:
    """Run a command in a new process; its outcome, and its CPU time in seconds, least of three.

    CPU time, not wall time: neighbours on a busy machine do not slow it down.
    """
    code = (
        "import sys; from robuq_bench.cli import main; code = main(sys.argv[1:]);"
        "sys.stderr.write('LOADED ' + ' '.join({'torch', 'numpy', 'scipy'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    best, outcome = float("inf"), Outcome()
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
        outcome = Outcome(code=done.returncode, out=done.stdout, err=done.stderr)
        if best < limit_s:
            break
    return outcome, best


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A study called `toy-study` that remembers how often it ran, and does as it is told."""
    folder = tmp_path / "studies"
    folder.mkdir()
    source = (
        'VERSION: str = "7"\nSUMMARY = "Does it work?"\n'
        "def run(config, run, context):\n    raise NotImplementedError\n"
    )
    (folder / "toy_study.py").write_text(source)
    (folder / "helper.py").write_text("import torch\n")
    monkeypatch.setattr(study_index, "studies_folder", lambda: folder)
    calls: list[str] = []
    module = types.ModuleType("studies.toy_study")

    def run(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
        calls.append(run.id)
        for index in context.progress.track(range(3), "toy"):
            run.append(f"item/{index}", kind="toy", value=index)
        return [{"layer": "a", "mse": 0.125}, {"layer": "b", "mse": None}]

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "studies.toy_study", module)
    return calls


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
        secret = "hunter" + "2"
        context.progress.update(secret)
        raise error

    monkeypatch.setattr(sys.modules["studies.toy_study"], "run", run)


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
        [sys.executable, "bench.py", "plans", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert {"plan": "a2"}.items() <= json.loads(done.stdout)["plans"][0].items()


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


# usage errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-and-eval", "--on", "digit"], "unknown workload 'digit'; did you mean 'digits'?"),
        (["train-and-eval", "--plan", "./x.toml"], "plan file not found: x.toml"),
        (["train-and-eval", "--device", "gpu"], "unknown device 'gpu'; did you mean 'cpu'?"),
        (["train-and-eval", "--device", "cdua"], "did you mean 'cuda'?"),
        (["train-and-eval", "--seed", "-1"], "--seed"),
        (["train-and-eval", "--threads", "0"], "--threads"),
        (["train-and-eval", "--set", "allocation.mean_bits=0.5"], "choose between 1 and 4"),
        (["train-and-evla"], "train-and-eval"),
        (["plans", "b4"], "unknown plan 'b4'"),
        (["account", "--plan", "a22"], "did you mean 'a2'?"),
        (["runs", "show", "nothing"], "unknown run 'nothing'; there are no runs in runs"),
        (["runs", "lst"], "list"),
    ],
)
def test_usage_errors_exit_2_and_say_what_to_do(
    bench: Any, arguments: list[str], message: str
) -> None:
    outcome = bench(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err


def test_an_error_is_json_too_when_asked(bench: Any) -> None:
    outcome = bench("train-and-eval", "--plan", "a22", "--json")
    assert outcome.document["exit_code"] == outcome.code == 2
    assert "did you mean 'a2'?" in outcome.document["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_device_exits_4(bench: Any, toy: list[str], device: str) -> None:
    outcome = bench("study", "toy-study", "--device", device)
    assert outcome.code == 4
    assert f"device {device!r}: no CUDA device here" in outcome.err
    assert "--device cpu" in outcome.err
    assert toy == []


def test_output_that_is_a_file_exits_2(bench: Any, toy: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    outcome = bench("study", "toy-study", "-o", "taken/below")
    assert outcome.code == 2
    assert "is a file, not a folder; choose another --output" in outcome.err


def test_output_that_cannot_be_written_exits_2_before_any_work(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    outcome = bench("study", "toy-study")
    assert outcome.code == 2
    assert "cannot write to folder" in outcome.err
    assert toy == []


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
    outcome = bench(*arguments, "--dry-run", "--seed", "5", "--set", "training.steps=77")
    assert outcome.code == 0
    assert "seed = 5\n" in outcome.out
    assert "steps = 77\n" in outcome.out
    document = bench(*arguments, "--dry-run", "--json", "--set", "training.steps=77").document
    assert document["dry_run"] is True
    assert document["config"]["workload"]["training"]["steps"] == 77
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


def test_a_finished_main_job_answers_without_torch(tmp_path: Path) -> None:
    version = command_version("train_and_eval")
    config = resolve("train-and-eval", version, "a2", "digits", 3)
    with Run.open(tmp_path / "out", config, ["test"]) as run:
        RunResult.store(run, [{"subject": "student", "fid_digits": 12.5}], {"more": 1})
        run.finish()
    before = files(tmp_path)
    outcome, seconds = fresh(
        "train-and-eval", "--plan", "a2", "--seed", "3", "-o", str(tmp_path / "out"), "--json",
        limit_s=2.0,
    )  # fmt: skip
    assert outcome.code == 0
    assert outcome.document["was_complete"] is True
    assert outcome.document["table"] == [{"subject": "student", "fid_digits": 12.5}]
    assert outcome.document["more"] == 1
    assert outcome.err == "LOADED "
    assert seconds < 2.0
    assert files(tmp_path) == before


def test_the_commands_call_their_studies(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            seen[name] = (arguments, named)
            return RunResult(path=tmp_path / "s" / "r", table=[{"n": 1}])

        return call

    for module, function in [
        ("train_and_eval", "run_train_and_eval"),
        ("train_teacher", "run_train_teacher"),
        ("train_features", "run_train_features"),
        ("sample_images", "run_sample"),
    ]:
        fake = types.ModuleType(f"studies.{module}")
        setattr(fake, function, record(module))
        monkeypatch.setitem(sys.modules, f"studies.{module}", fake)
    assert bench("train-and-eval", "--plan", "a3", "-o", "o", "--device", "cpu").code == 0
    (config, root, context), named = seen["train_and_eval"]
    assert (config.study, config.plan.name, root) == ("train-and-eval", "a3", Path("o"))
    assert (context.device, context.force, named) == ("cpu", False, {})
    assert bench("train-teacher", "--on", "mnist32").code == 0
    (config, _, _), _ = seen["train_teacher"]
    assert (config.plan.name, config.workload.name) == ("fp", "mnist32")
    assert bench("train-features").code == 0
    assert seen["train_features"][0][0].workload.name == "digits"
    outcome = bench("sample", "--num", "4", "--png", "x.png", "--json")
    assert outcome.document == {"command": "sample", "path": "x.png", "num": 4, "seed": 0}
    named = seen["sample_images"][1]
    assert named == {
        "checkpoint": None,
        "packed": None,
        "backend": "reference",
        "num": 4,
        "output": Path("x.png"),
    }


# failures


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MissingResourceError("no data here"), 4, "no data here"),
        (CheckpointError("x.safetensors is damaged"), 4, "x.safetensors is damaged"),
        (CheckError("fid too high"), 3, "fid too high"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x.csv"), 1, "Permission denied"),
    ],
)
def test_failures_have_one_clear_message_and_their_code(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int,
    message: str,
) -> None:  # fmt: skip
    fail_with(monkeypatch, error)
    outcome = bench("study", "toy-study", "--quiet", "--json")
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.document["exit_code"] == code


def test_a_crash_has_a_traceback_without_local_values(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("oops"))
    outcome = bench("study", "toy-study", "--quiet")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: crash: ZeroDivisionError: oops\n")
    assert "hunter2" not in outcome.err


def test_an_interrupted_study_continues_where_it_was(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sys.modules["studies.toy_study"].run

    def stop(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
        run.append("item/0", kind="toy", value=0)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["studies.toy_study"], "run", stop)
    assert bench("study", "toy-study").code == 130
    monkeypatch.setattr(sys.modules["studies.toy_study"], "run", good)
    outcome = bench("study", "toy-study", "--json")
    assert outcome.code == 0
    assert "continues" in outcome.err
    manifest = json.loads((Path(outcome.document["path"]) / "manifest.json").read_text())
    assert [s["status"] for s in manifest["sessions"]] == ["interrupted", "finished"]


def test_a_reader_that_leaves_is_no_crash() -> None:
    code = "from robuq_bench.cli import main; import sys; sys.exit(main(['plans']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# what the other commands print


@pytest.mark.parametrize("arguments", [["plans"], ["workloads"], ["env"], ["runs", "list"]])
def test_json_is_one_line_and_text_is_more(bench: Any, arguments: list[str]) -> None:
    outcome = bench(*arguments, "--json")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 1
    assert isinstance(outcome.document, dict)
    assert bench(*arguments).out


def test_plans_and_workloads_can_be_shown_and_used_as_files(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(bench("plans", "a2").out)
    (tmp_path / "w.toml").write_text(bench("workloads", "digits").out)
    assert load_plan("p.toml") == load_plan("a2")
    assert load_workload("w.toml") == load_workload("digits")
    document = bench("plans", "a2", "--json").document
    assert document["plan"]["allocation"]["mean_bits"] == 2
    rows = {row["plan"]: row for row in bench("plans", "--json").document["plans"]}
    assert rows["a2"]["activation bits"] == "mean 2"
    assert rows["fp"]["activation bits"] == "full"


def test_account_gives_the_published_size_of_dit_xl_2(bench: Any) -> None:
    flags = ["account", "--on", "imagenet256", "--plan", "a2", "--set", "low_rank.rank=16"]
    outcome = bench(*flags)
    assert outcome.code == 0
    assert "675129632" in outcome.out


def test_account_takes_an_allocation_file(bench: Any, tmp_path: Path) -> None:
    types_of_layer = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    bits = {f"blocks.{i}.{kind}": 3 for i in range(4) for kind in types_of_layer}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    flags = ["--plan", "a4", "--set", "allocation.method=file", "--set"]
    document = bench("account", *flags, "allocation.path=bits.json", "--json").document
    assert document["mean_activation_bits"] == 3
    (tmp_path / "bits.json").write_text(json.dumps(bits | {"blocks.9.attn.qkv": 3}))
    outcome = bench("account", *flags, "allocation.path=bits.json")
    assert outcome.code == 2
    assert "unknown layer 'blocks.9.attn.qkv'" in outcome.err


def test_runs_are_listed_shown_and_verified(bench: Any, toy: list[str], tmp_path: Path) -> None:
    document = bench("study", "toy-study", "--json").document
    (row,) = bench("runs", "list", "--json").document["runs"]
    assert (row["run"], row["state"]) == (document["run"], "done")
    assert document["run"] in bench("runs", "list").out
    for name in (document["run"], document["run"].split("/")[1], document["path"]):
        shown = bench("runs", "show", name, "--json").document
        assert shown["complete"] is True
        assert shown["table"] == document["table"]
    text = bench("runs", "show", document["run"]).out
    assert 'name = "a2"' in text
    assert "finished: " in text
    assert bench("runs", "verify").code == 0
    assert "sound" in bench("runs", "verify", document["run"]).out
    config = tmp_path / document["path"] / "config.toml"
    config.write_bytes(config.read_bytes().replace(b"seed = 0", b"seed = 1"))
    outcome = bench("runs", "verify", "--json")
    assert outcome.code == 3
    first, last = map(json.loads, outcome.out.splitlines())
    assert "config.toml" in first["problems"][document["run"]][0]
    assert last["exit_code"] == 3
    assert bench("runs", "verify").code == 3


def test_report_takes_finished_runs_only(
    bench: Any, toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[list[Path], Path]] = []
    fake = types.ModuleType("reports.builder")
    fake.build_report = lambda paths, output: built.append((paths, output))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reports.builder", fake)
    outcome = bench("report")
    assert outcome.code == 4
    assert "no finished runs in runs; make one with" in outcome.err
    path = Path(bench("study", "toy-study", "--json").document["path"])
    fail_with(monkeypatch, KeyboardInterrupt())
    bench("study", "toy-study", "--seed", "1")
    assert bench("report", "--dry-run", "--json").document["runs"] == [str(path)]
    assert built == []
    assert bench("report").code == 0
    assert bench("report", path.name, "--html", "x.html", "--json").document["path"] == "x.html"
    assert built == [([path], Path("runs/report.html")), ([path], Path("x.html"))]
    assert bench("report", "nothing").code == 2


def test_export_of_a_finished_teacher_copies_it_with_its_checksum(
    bench: Any, tmp_path: Path
) -> None:
    from robuq_bench.checkpointing import load_tensors, save_tensors

    config = resolve("train-teacher", command_version("train_teacher"), "fp", "digits")
    with Run.open(Path("runs"), config, ["test"]) as run:
        save_tensors(run.path / "checkpoints/teacher.safetensors", {"w": torch.ones(3)}, {"a": "b"})
        RunResult.store(run, [{"steps": 1}])
        run.finish()
    assert bench("train-teacher", "--export", "out/t.safetensors").code == 0
    tensors, metadata = load_tensors(tmp_path / "out" / "t.safetensors")
    assert tensors["w"].tolist() == [1, 1, 1]
    assert metadata["a"] == "b"
    assert (tmp_path / "out" / "t.safetensors.sha256").read_text().endswith("  t.safetensors\n")


def test_context_resolves_devices_and_threads() -> None:
    context = Context.create(device="auto", progress=Progress(quiet=True))
    assert context.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert context.threads == torch.get_num_threads()
    with pytest.raises(cli_job.UsageError, match="threads must be at least 1"):
        Context.create(threads=0)
