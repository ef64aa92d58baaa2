"""The command line when something is wrong: one clear message, the right exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robuq_bench.cli import app as cli
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, CheckpointError, MissingResourceError
from robuq_bench.runs.run import Run

ROOT = Path(cli.__file__).resolve().parents[2]


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
        (["train-and-eval", "--set", "bits.mean=0.5"], "choose between 1 and 4"),
        (["train-and-eval", "--set", "activations.bits=2"], "is now layers.block.activation.bits"),
        (
            [
                "train-and-eval",
                "--plan",
                "rtn-w4a4",
                "--dry-run",
                "--set",
                "layers.block.weight.group=17",
            ],
            "does not divide the 144 inputs",
        ),
        (["train-and-eval", "--set", "layers.blok.weight=rtn"], "did you mean 'block'?"),
        (["train-and-eval", "--set", "layers.block.weight=rtm"], "did you mean 'rtn'?"),
        (["account", "--set", "layers.block.weight=svd"], "it is a method for branch"),
        (["account", "--set", "layers.block.weight=x_y:Z"], "module 'x_y' cannot be imported"),
        (["train-and-evla"], "train-and-eval"),
        (["plans", "b4"], "unknown plan 'b4'"),
        (["account", "--plan", "a22"], "did you mean 'a2'?"),
        (["runs", "show", "nothing"], "unknown run 'nothing'; there are no runs in /"),
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


# failures


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MissingResourceError("no data here"), 4, "no data here"),
        (CheckpointError("x.safetensors is damaged"), 4, "x.safetensors is damaged"),
        (CheckError("fid too high"), 3, "fid too high"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 1, "No space left on device"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.csv"),
            4,
            "x.csv: Permission denied",
        ),
        (OSError(errno.ENAMETOOLONG, "Too long", "x" * 9999), 4, "... (9999 characters): Too long"),
    ],
)
def test_failures_have_one_clear_message_and_their_code(
    bench: Any, toy: list[str], fail_with: Any, error: BaseException, code: int,
    message: str,
) -> None:  # fmt: skip
    fail_with(error)
    outcome = bench("study", "toy-study", "--quiet", "--json")
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.document["exit_code"] == code


def test_a_crash_has_a_traceback_without_local_values(
    bench: Any, toy: list[str], fail_with: Any
) -> None:
    fail_with(ZeroDivisionError("oops"))
    outcome = bench("study", "toy-study", "--quiet")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: crash: ZeroDivisionError: oops\n")
    assert "hunter2" not in outcome.err


def test_an_interrupted_study_continues_where_it_was(
    bench: Any, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sys.modules["studies.toy_study"].measure

    def stop(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
        run.append("item/0", kind="toy", value=0)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["studies.toy_study"], "measure", stop)
    assert bench("study", "toy-study").code == 130
    monkeypatch.setattr(sys.modules["studies.toy_study"], "measure", good)
    outcome = bench("study", "toy-study", "--json")
    assert outcome.code == 0
    assert "continues" in outcome.err
    manifest = json.loads((Path(outcome.document["path"]) / "manifest.json").read_text())
    assert [s["status"] for s in manifest["sessions"]] == ["interrupted", "finished"]


def test_a_reader_that_leaves_is_no_crash() -> None:
    code = "from robuq_bench.cli.app import main; import sys; sys.exit(main(['workloads']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize(
    "arguments",
    [["runs", "list", "-o", "\udcff"], ["train-and-eval", "--plan", "\udcff", "--json"]],
)
def test_an_argument_that_is_not_utf8_is_refused(bench: Any, arguments: list[str]) -> None:
    outcome = bench(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: argument '\\udcff' is not UTF-8 text; rename")


def _too_large_for_torch() -> None:
    torch.empty(2**50)


def _too_large_for_numpy() -> None:
    np.empty(2**50)


def _too_large_for_cuda() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@pytest.mark.parametrize(
    "allocate", [_too_large_for_torch, _too_large_for_numpy, _too_large_for_cuda]
)
def test_what_needs_more_memory_ends_in_a_sentence(
    bench: Any, toy: list[str], fail_with: Any, allocate: Any
) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    fail_with(caught.value)
    outcome = bench("study", "toy-study")
    assert outcome.code == 4
    assert outcome.err.splitlines()[-1].startswith("error: not enough memory: ")
    assert "training.batch_size" in outcome.err
    assert "Traceback" not in outcome.err


def test_other_runtime_errors_are_crashes(bench: Any, toy: list[str], fail_with: Any) -> None:
    fail_with(RuntimeError("shapes differ"))
    outcome = bench("study", "toy-study")
    assert outcome.code == 1
    assert "crash: RuntimeError: shapes differ" in outcome.err


def test_cpu_kernels_that_are_named_and_not_there_are_one_line(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench("export", "a2", "--random-weights", "-o", "a2.safetensors").code == 0
    monkeypatch.setenv("ROBUQ_CPU_KERNELS", str(tmp_path / "none.so"))
    outcome = bench("sample", "--packed", "a2.safetensors", "-o", "a.png", "--num", "1")
    assert outcome.code == 4
    assert "none.so cannot be loaded" in outcome.err
    assert "Traceback" not in outcome.err
