"""`study efficiency` on a CPU: a tiny model through all of it; rules on made-up numbers."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpu_library
from robuq_bench.cli import app as cli
from robuq_bench.config import Config, load_plan, load_workload, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, ConfigError, MissingResourceError, UsageError
from robuq_bench.measuring.cpu import available_instructions
from robuq_bench.measuring.memory import weight_bytes
from robuq_bench.progress import Progress
from robuq_bench.runs.provenance import cpu_label
from robuq_bench.runs.run import Run
from studies.efficiency import cpu, cpu_variants
from studies.efficiency import study as efficiency
from studies.efficiency.cpu_memory import int8_bytes
from studies.efficiency.cpu_variants import (
    CPU_VARIANTS,
    Inputs,
    bound_of,
    build_float,
    build_packed,
    difference,
    full_precision,
    model_of,
)
from studies.efficiency.cpu_verdicts import cpu_verdicts

SMALL = (
    'efficiency.cpu.models=["own"]',
    "efficiency.cpu.batches=[2]",
    "efficiency.cpu.step_batches=[1]",
    "efficiency.cpu.threads=[1]",
    'efficiency.cpu.variants=["fp32","bf16","int8-dynamic","w1.58a4"]',
    "efficiency.cpu.memory=false",
    "efficiency.cpu.sample_ms=0.01",
    "efficiency.rank=4",
)


def configure(workload: Path | str, *overrides: str) -> Config:
    return resolve("efficiency", efficiency.VERSION, "a4", workload, 0, [*SMALL, *overrides])


def perform(config: Config, root: Path) -> Run:
    context = Context(device="cpu", threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(root, config, []) as run:
        efficiency.measure(config, run, context)
        run.finish()
    return run


def table(run: Run, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "tables" / f"{name}.csv").read_text().splitlines()))


def packed_rows(scope: str) -> set[tuple[str, str]]:
    """Implementation and status of W1.58A4 on this machine."""
    available = available_instructions()
    if not available:
        return {("w1.58a4", "ok")}
    asked = ("amx-int8", "avx512-vnni", "avx2")
    has = [name for name in asked if name in available]
    wanted = [name for name in asked if name not in has or scope == "block" or name == has[0]]
    return {
        (f"w1.58a4, {name}", "ok" if name in has else f"not run: this CPU has no {name}")
        for name in wanted
    }


def test_a_tiny_model_is_checked_timed_and_resumed(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tiny_workload)
    threads, chosen = torch.get_num_threads(), os.environ.get(cpu_library.SET_VARIABLE)
    real = Run.append

    def stop_at_the_step(self: Run, key: str, **fields: Any) -> None:
        if key.startswith("cpu-step"):
            raise KeyboardInterrupt
        real(self, key, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append", stop_at_the_step)
        with pytest.raises(KeyboardInterrupt):
            perform(config, tmp_path)
    built: list[str] = []
    real_bench = cpu.Bench

    def bench(config: Config, place: cpu.Place) -> cpu.Bench:
        built.append(place.scope)
        return real_bench(config, place)

    monkeypatch.setattr(cpu, "Bench", bench)
    run = perform(config, tmp_path)
    assert built == ["step"]
    assert torch.get_num_threads() == threads
    assert os.environ.get(cpu_library.SET_VARIABLE) == chosen

    rows = table(run, "cpu_times")
    for scope, batch in (("block", "2"), ("step", "1")):
        own = [row for row in rows if row["scope"] == scope]
        assert {row["batch"] for row in own} == {batch}
        assert {(row["implementation"], row["status"]) for row in own} == {
            ("fp32", "ok"), ("bf16", "ok"), ("int8-dynamic", "ok"), *packed_rows(scope)
        }  # fmt: skip
        for row in own:
            assert (row["median_ms"] != "") == (row["status"] == "ok")
            if row["status"] == "ok":
                assert float(row["difference"]) <= bound_of(CPU_VARIANTS[row["variant"]], scope)
                assert float(row["median_ms"]) > 0
                assert float(row["processor_ms"]) > 0
                assert float(row["median_ms_low"]) <= float(row["median_ms_high"])
    factors = table(run, "cpu_factors")
    assert {row["against"] for row in factors} == {"fp32", "bf16", "int8-dynamic"}
    assert {row["ours"] for row in factors} == {"w1.58a4"}
    (facts,) = table(run, "cpu_machine")
    assert facts["torch"] == torch.__version__
    assert (run.path / "figures" / "cpu-speed.svg").is_file()
    judged = [row for row in table(run, "verdicts") if "on a CPU" in row["claim"]]
    assert len(judged) == 3
    assert {row["n"] for row in judged} == {"3"}


def test_a_packed_model_that_computes_something_else_has_no_time(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cpu.packed_pair

    def other(packed: Any) -> Any:
        exact, ours = real(packed)
        for name, buffer in ours.named_buffers():
            if name.endswith("scale"):
                buffer.mul_(-1)
        return exact, ours

    monkeypatch.setattr(cpu, "packed_pair", other)
    with pytest.raises(CheckError, match=r"w1\.58a4: check failed: differs by"):
        perform(configure(tiny_workload), tmp_path)
    (folder,) = (tmp_path / "efficiency").glob("*/")
    times = csv.DictReader((folder / "tables" / "cpu_times.csv").read_text().splitlines())
    wrong = [row for row in times if row["status"].startswith("check failed")]
    assert wrong
    assert {row["variant"] for row in wrong} == {"w1.58a4"}
    assert {row["median_ms"] for row in wrong} == {""}


def test_the_command_names_the_machine_and_prints_factors(
    tiny_workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["study", "efficiency", "--on", str(tiny_workload), "-o", str(tmp_path)]
    for override in (*SMALL, 'efficiency.cpu.variants=["fp32","w1.58a8"]'):
        arguments += ["--set", override]
    assert cli.main([*arguments, "--device", "cpu", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "w1.58a8" in said.out
    assert "own" in said.out
    assert "factor: how many times smaller or faster" in said.out
    assert "of DiT-XL/2 (width 1152, depth 28)" in said.err
    (folder,) = (tmp_path / "efficiency").glob("*/")
    config = (folder / "config.toml").read_text()
    assert f"{os.cpu_count()} cores" in config


def test_peak_memory_is_split(tiny_workload: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    variants = 'efficiency.cpu.variants=["w1.58a4"]'
    run = perform(configure(tiny_workload, "efficiency.cpu.memory=true", variants), tmp_path)
    (row,) = table(run, "cpu_memory")
    assert row["status"] == "ok"
    section = load_workload(tiny_workload).model
    model = cpu_variants.packed_pair(build_packed(CPU_VARIANTS["w1.58a4"], section, 4, 0))[1]
    assert int(row["weights_bytes"]) == weight_bytes(model)
    parts = ("weights_bytes", "other_resident_bytes", "activations_and_workspace_bytes")
    assert sum(int(row[part]) for part in parts) == int(row["peak_bytes"])


def test_settings_are_checked(tiny_workload: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown 'XS'"):
        configure(tiny_workload, 'efficiency.cpu.models=["XS"]')
    with pytest.raises(ConfigError, match=r"unknown 'sse2'"):
        configure(tiny_workload, 'efficiency.cpu.instructions=["sse2"]')
    with pytest.raises(ConfigError, match=r"cpu\.threads must ascend"):
        configure(tiny_workload, "efficiency.cpu.threads=[2,1]")
    named = f'efficiency.hardware="{cpu_label()}"'
    with pytest.raises(UsageError, match=r"efficiency\.cpu\.threads asks for 4096 threads"):
        efficiency.check(configure(tiny_workload, "efficiency.cpu.threads=[4096]", named))


def test_models_are_those_of_the_paper_and_the_plan_is_the_evaluated_one(
    tiny_workload: Path,
) -> None:
    section = load_workload(tiny_workload).model
    xl = model_of(section, "XL", depth=1)
    assert (xl.hidden_size, xl.depth, xl.num_heads, xl.input_size) == (1152, 1, 16, 32)
    assert model_of(section, "own") == section
    packed: Any = build_packed(CPU_VARIANTS["w1.58a8"], section, 4, 0)
    assert load_plan("a8").attention.matmul_bits == 8
    assert packed.blocks[0].attn.matmul_quantizer is not None


def test_variants_compute_what_fp32_computes(tiny_workload: Path) -> None:
    section = load_workload(tiny_workload).model
    base = build_float(section, 0)
    inputs = Inputs(section, 2, 0)
    with torch.no_grad():
        expected = inputs.call(base, "step", torch.float32)()
        assert expected.std() > 0.1  # open gates
        for name in ("bf16", "int8-dynamic"):
            variant = CPU_VARIANTS[name]
            model = full_precision(variant, base)
            found = inputs.call(model, "step", variant.dtype)()
            assert 0 < difference(found, expected) < bound_of(variant, "step")
    blocks = sum(p.numel() for p in base.blocks.parameters())
    biases = sum(p.numel() for p in base.blocks.parameters() if p.dim() == 1)
    int8 = full_precision(CPU_VARIANTS["int8-dynamic"], base)
    assert int8_bytes(int8) == blocks - biases + 4 * biases
    assert difference(torch.full_like(expected, float("nan")), expected) == 1e6


def test_without_a_compiler_the_compiled_variants_are_not_run(
    tiny_workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_variants.build, "compiler", lambda: None)
    with pytest.raises(MissingResourceError, match=r"inductor needs a C\+\+ compiler"):
        full_precision(CPU_VARIANTS["fp32-compile"], build_float(model_of(None, "S", 1), 0))


def factor(against: str, low: float, value: float, high: float, **other: Any) -> dict[str, Any]:
    return {"model": "XL", "scope": "step", "batch": 1, "threads": 1, "ours": "w1.58a4",
            "instructions": "amx-int8", "against": against, "factor_low": low, "factor": value,
            "factor_high": high, "rounds": 3} | other  # fmt: skip


def word(*rows: dict[str, Any]) -> str:
    (found,) = cpu_verdicts(rows, ())
    return found.verdict


def test_a_speed_is_judged_by_its_intervals() -> None:
    assert word(factor("fp32", 2.01, 2.5, 3.0)) == "holds"
    assert word(factor("fp32", 1.9, 2.5, 3.0)) == "undecided"
    assert word(factor("fp32", 1.5, 1.8, 1.99)) == "does not hold"
    assert word(factor("bf16", 1.01, 1.1, 1.2)) == "holds"
    other = factor("fp32", 1.1, 1.2, 1.3, batch=2)
    assert word(factor("fp32", 2.01, 2.5, 3.0), other) == "undecided"
    assert cpu_verdicts([factor("fp32", 2.1, 2.2, 2.3, scope="block")], ()) == []
    found = cpu_verdicts([factor("fp32", 2.01, 2.5, 3.0), factor("fp32", 1, 1.5, 2, model="S")], ())
    assert [verdict.subject for verdict in found] == ["DiT-XL/2", "DiT-S/2"]


def test_memory_is_judged_beside_fp32() -> None:
    peaks = {"fp32": 4000, "w1.58a4": 1000}
    rows = [
        {"model": "XL", "variant": name, "batch": 1, "threads": 1, "status": "ok",
         "peak_bytes": peak}
        for name, peak in peaks.items()
    ]  # fmt: skip
    (found,) = cpu_verdicts((), rows)
    assert (found.verdict, found.effect) == ("holds", 4.0)
    rows[1]["peak_bytes"] = 1001
    assert cpu_verdicts((), rows)[0].verdict == "does not hold"
    rows[0]["status"] = "failed: out of memory"
    assert cpu_verdicts((), rows) == []
