"""What the commands that only look print, and what they take."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from robuq_bench.cli import job as cli_job
from robuq_bench.config import load_plan, load_workload, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run
from robuq_bench.study_index import find_study


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
    assert document["plan"]["bits"]["mean"] == 2
    rows = {row["plan"]: row for row in bench("plans", "--json").document["plans"]}
    assert rows["a2"]["activation bits"] == "mean 2"
    assert rows["a8"]["activation bits"] == "8"
    assert rows["fp"]["activation bits"] == rows["fp"]["weight bits"] == "full"
    assert [rows[name]["rank on digits"] for name in ("a2", "bitnetv2-a3", "fp")] == [2, 0, 0]
    rows = bench("plans", "--on", "imagenet256", "--json").document["plans"]
    assert {row["plan"]: row["rank on imagenet256"] for row in rows}["a2"] == 16


def test_account_gives_the_published_size_of_dit_xl_2(bench: Any) -> None:
    flags = ["account", "--on", "imagenet256", "--plan", "a2"]
    assert "the published figures are read at" not in bench(*flags).out
    ranks = [f"layers.{rule}.branch.rank=8" for rule in ("adaln", "block")]
    other = bench(*flags, "--set", ranks[0], "--set", ranks[1])
    assert other.code == 0
    assert "branches of this plan have rank 8; the published figures are read at 16" in other.out
    advice = other.out.splitlines()[-1].partition("at that rank: ")[2].split()
    assert advice[1] == "layers.adaln.branch.rank=16"
    outcome = bench(*flags, *advice)
    assert outcome.code == 0
    assert "675129632" in outcome.out
    assert "the published figures are read at" not in outcome.out
    reached = [line for line in outcome.out.splitlines() if line.startswith("size_reduction ")]
    assert reached[0].split()[1] == "12.96"
    bitnet = bench(*flags[:4], "bitnetv2-a4").out.splitlines()[-1]
    assert "have rank 0;" in bitnet
    advice = bitnet.partition("at that rank: ")[2].split()
    document = bench(*flags[:4], "bitnetv2-a4", *advice, "--json").document
    assert (document["low_rank_rank"], document["at_published_rank"]) == (16, {})
    (reading,) = [line for line in other.out.splitlines() if line.startswith("reading-13.2x")]
    assert reading.split()[-3:] == ["14.93", "13.2", "13.2"]


def test_account_takes_an_allocation_file(bench: Any, tmp_path: Path) -> None:
    types_of_layer = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    bits = {f"blocks.{i}.{kind}": 3 for i in range(4) for kind in types_of_layer}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    flags = ["--plan", "a4", "--set"]
    document = bench("account", *flags, "bits.path=bits.json", "--json").document
    assert document["mean_activation_bits"] == 3
    (tmp_path / "bits.json").write_text(json.dumps(bits | {"blocks.9.attn.qkv": 3}))
    outcome = bench("account", *flags, "bits.path=bits.json")
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
    fail_with: Any, bench: Any, toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[list[Path], Path]] = []
    fake = types.ModuleType("reports")

    def build_report(paths: list[Path], output: Path, *, first: list[Any]) -> None:
        assert first == []  # no claim is of the toy study
        built.append((paths, output))

    fake.build_report = build_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reports", fake)
    outcome = bench("report")
    assert outcome.code == 4
    assert "no finished runs in runs; make one with" in outcome.err
    path = Path(bench("study", "toy-study", "--json").document["path"])
    fail_with(KeyboardInterrupt())
    bench("study", "toy-study", "--seed", "1")
    assert bench("report", "--dry-run", "--json").document["runs"] == [str(path)]
    assert built == []
    assert bench("report").code == 0
    assert bench("report", path.name, "--html", "x.html", "--json").document["path"] == "x.html"
    assert built == [([path], Path("runs/report.html")), ([path], Path("x.html"))]
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere")  # a folder of runs, named
    assert bench("report", str(moved), "--html", "y.html").code == 0
    assert built[2:] == [([moved / path.relative_to("runs")], Path("y.html"))]
    assert bench("report", "nothing").code == 2


def test_report_names_damaged_runs_also_when_none_is_asked_for(
    bench: Any, toy: list[str], tmp_path: Path
) -> None:
    sound, damaged = (
        Path(bench("study", "toy-study", "--seed", str(seed), "--json").document["path"])
        for seed in (0, 1)
    )
    (damaged / "DONE").write_text("nothing")
    (sound / "config.toml").rename(sound / "elsewhere")
    outcome = bench("report")
    assert outcome.code == 4
    assert f"{damaged}/DONE" in outcome.err
    assert f"{sound}/config.toml" in outcome.err
    (sound / "elsewhere").rename(sound / "config.toml")
    outcome = bench("report")
    assert outcome.code == 0
    assert f"{damaged} is left out of the report" in outcome.err
    html = Path("runs/report.html").read_text()
    assert "1 finished run, 0 unfinished, 1 left out" in html


def test_export_of_a_finished_teacher_copies_it_with_its_checksum(
    bench: Any, tmp_path: Path
) -> None:
    from robuq_bench.checkpointing import load_tensors, save_tensors

    config = resolve("train-teacher", find_study("train-teacher").version, "fp", "digits")
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
