"""`study kernels` on a CPU: few tokens through all of it; rows and rules on made-up numbers."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpu_library
from robuq_bench.config import Config, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, ConfigError, UsageError
from robuq_bench.measuring import cpu as measuring
from robuq_bench.measuring.cpu import (
    CpuPeaks,
    CpuTiming,
    available_instructions,
    instructions,
    measure_peaks,
    threads,
    time_in_turns,
)
from robuq_bench.measuring.statistics import Timing
from robuq_bench.progress import Progress
from robuq_bench.runs.provenance import cpu_label
from robuq_bench.runs.run import Run
from studies.kernels import cpu as kernels_cpu
from studies.kernels import study as kernels
from studies.kernels.cases import (
    BF16,
    COMPILED,
    CPU_PEERS,
    FP32,
    INT_MM,
    MATMUL,
    PLAIN,
    QUANTIZE,
    Case,
)
from studies.kernels.checks import Check
from studies.kernels.cpu import ADALN, ADALN_INPUT, NOT_BUILT, cpu_cases
from studies.kernels.cpu_tables import cpu_rows, cpu_summary, moved_bytes
from studies.kernels.cpu_verdicts import TARGETS, cpu_verdicts, of_cpu_target
from studies.kernels.settings import CpuSettings, Settings, sizes_on_cpu

SMALL = (
    'kernels.models=["S"]',
    f'kernels.kernels=["{MATMUL}","{QUANTIZE}"]',
    "kernels.batches=[1]",
    "kernels.tokens_per_image=4",
    "kernels.rank=4",
    'kernels.cpu.models=["S"]',
    "kernels.cpu.batches=[1]",
    "kernels.cpu.threads=[1]",
    "kernels.cpu.sample_ms=0.01",
)


def configure(*overrides: str) -> Config:
    return resolve("kernels", kernels.VERSION, "a4", "digits", 0, [*SMALL, *overrides])


def perform(config: Config, root: Path) -> Run:
    context = Context(device="cpu", threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(root, config, []) as run:
        kernels.measure(config, run, context)
        run.finish()
    return run


def table(run: Run, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "tables" / f"{name}.csv").read_text().splitlines()))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "interpreter", lambda cases, seed: [Check(True, 0.5)] * len(cases))


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("MATMUL_SIZE", 64), ("COPY_BYTES", 2**16), ("PEAK_STEPS", 2**8)):
        monkeypatch.setattr(measuring, name, size)


def test_every_implementation_is_checked_and_timed(tmp_path: Path) -> None:
    before = torch.get_num_threads(), os.environ.get(cpu_library.SET_VARIABLE)
    run = perform(configure(), tmp_path)
    assert (torch.get_num_threads(), os.environ.get(cpu_library.SET_VARIABLE)) == before
    rows = table(run, "cpu_kernels")
    products = ("qkv", "proj", "fc1", "fc2", ADALN)
    assert {row["layer"] for row in rows} == {
        *products, "qkv and fc1 input", "proj input", "fc2 input", ADALN_INPUT
    }  # fmt: skip
    ours = {f"{COMPILED}{name}" for name in available_instructions() or ("any",)}
    for layer in {row["layer"] for row in rows}:
        own = {row["implementation"]: row for row in rows if row["layer"] == layer}
        is_product = layer in products
        assert {*own} == ours | {PLAIN} | ({INT_MM, *CPU_PEERS} if is_product else set())
        for name, row in own.items():
            if row["status"] == NOT_BUILT:
                assert row["correct"] == row["median_ms"] == ""
                continue
            assert (row["status"], row["correct"]) == ("ok", "True")
            assert float(row["median_ms"]) > 0
            assert float(row["processor_ms"]) > 0
            assert (row["gop_s"] != "") == is_product
            assert (row["gb_s"] != "") == (not is_product)
            if name not in CPU_PEERS:
                assert float(row["max_error"]) <= 1
    assert (run.path / "figures" / "cpu-kernels.svg").is_file()
    (peaks,) = table(run, "cpu_peaks")
    assert {f"{name}_gop_s" for name in available_instructions()} < {*peaks}
    assert float(peaks["copy_gb_s"]) > 0
    (machine,) = table(run, "cpu_machine")
    assert machine["device_name"] == rows[0]["device_name"]
    claims = {row["claim"]: row for row in table(run, "verdicts")}
    (product,) = [row for claim, row in claims.items() if claim.endswith(f"({INT_MM})")]
    assert (product["verdict"], product["n"]) == ("holds", "5")


def test_a_wrong_kernel_has_no_time_and_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(f'kernels.kernels=["{MATMUL}"]')
    real = kernels_cpu.implementations

    def damaged(case: Case, inputs: dict[str, Any], options: Any) -> Any:
        found, status = real(case, inputs, options)
        if case.layer == "fc1":
            function, arguments = found[INT_MM]
            found[INT_MM] = (lambda **given: function(**given) + 1, arguments)
        return found, status

    monkeypatch.setattr(kernels_cpu, "implementations", damaged)
    context = Context(device="cpu", threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(tmp_path, config, []) as run:
        with pytest.raises(CheckError, match=r"1 of .* kernel checks failed.*S fc1"):
            kernels.measure(config, run, context)
        wrong = [row for row in table(run, "cpu_kernels") if row["correct"] == "False"]
        assert [(row["layer"], row["implementation"]) for row in wrong] == [("fc1", INT_MM)]
        assert wrong[0]["median_ms"] == ""
        asked: list[str] = []

        def again(case: Case, *rest: Any) -> Any:
            asked.append(case.layer)
            return real(case, *rest)

        monkeypatch.setattr(kernels_cpu, "implementations", again)
        kernels.measure(config, run, context)
    assert asked == ["fc1"]
    assert {row["correct"] for row in table(run, "cpu_kernels")} <= {"True", ""}


def test_without_the_library_the_rest_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_cpu, "available_instructions", lambda: ())
    run = perform(configure(f'kernels.kernels=["{QUANTIZE}"]'), tmp_path)
    rows = table(run, "cpu_kernels")
    assert {(row["implementation"], row["status"]) for row in rows} == {
        (f"{COMPILED}any", NOT_BUILT), (PLAIN, "ok")
    }  # fmt: skip


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown 'XS'"):
        configure('kernels.cpu.models=["XS"]')
    with pytest.raises(ConfigError, match="unknown 'sse2'"):
        configure('kernels.cpu.instructions=["sse2"]')
    with pytest.raises(ConfigError, match=r"cpu\.batches must ascend"):
        configure("kernels.cpu.batches=[8,1]")
    with pytest.raises(ConfigError, match=r"cpu.models \['L'\] and models \['S'\] have no size"):
        configure('kernels.models=["S"]', 'kernels.cpu.models=["L"]')
    too_many = "kernels.cpu.threads=[1,4096]"
    named = f'kernels.hardware="{cpu_label()}"'
    with pytest.raises(UsageError, match=r"kernels.cpu.threads asks for 4096 .* '.*=\[1\]'"):
        kernels.check(configure(too_many, named))
    kernels.check(configure(too_many))  # on a GPU no CPU is timed


def test_a_cpu_checks_and_times_the_sizes_that_both_settings_name() -> None:
    def sizes(models: tuple[str, ...], cpu: tuple[str, ...]) -> tuple[list[str], set[str]]:
        options = Settings(models=models, cpu=CpuSettings(models=cpu))
        return sizes_on_cpu(options), {case.model for case in cpu_cases(options)}

    assert sizes(("XL", "S"), ("S", "B")) == (["S"], {"S"})
    assert sizes(("XL", "S"), ()) == (["XL", "S"], set())
    assert sizes(("B",), ("XL", "L", "B", "S")) == (["B"], {"B"})


def test_what_is_printed_has_one_rate_with_its_unit_and_names_the_baseline() -> None:
    product = {"gop_s": 5.0, "speedup": 2.0, "baseline": FP32}
    assert cpu_summary(product)["rate"] == 5.0
    assert (cpu_summary(product)["unit"], cpu_summary(product)["over"]) == ("Gop/s", FP32)
    assert cpu_summary({"gb_s": 3.0})["unit"] == "GB/s"
    assert cpu_summary({"status": "not run"})["rate"] is None


def test_shapes_are_those_of_a_step() -> None:
    options = Settings(cpu={"models": ("XL",), "batches": (2,)})  # type: ignore[arg-type]
    cases = {case.layer: case for case in cpu_cases(options)}
    assert len(cases) == 9
    assert (cases["fc1"].rows, cases["fc1"].width, cases["fc1"].outputs) == (512, 1152, 4608)
    assert (cases[ADALN].kernel, cases[ADALN].rows, cases[ADALN].outputs) == (MATMUL, 2, 6912)
    assert cases[ADALN_INPUT].groups == 1
    fc2 = cases["fc2 input"]
    assert moved_bytes(fc2) == 512 * (4 * 4608 + 4608 + 12 + 4 * 16) + 4 * 16 * 4608


def test_turns_go_forth_and_back() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = time_in_turns(calls, rounds=2, sample_s=1e-9)
    assert "".join(seen) == "aabbcc" + "abccba" * 2
    assert [len(samples) for samples in times["a"].wall.rounds_s] == [2, 2]
    assert len(times["c"].processor.samples_s) == 4


def test_threads_and_instructions_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    monkeypatch.setenv(cpu_library.SET_VARIABLE, "portable")
    with instructions("avx2"):
        assert os.environ[cpu_library.SET_VARIABLE] == "avx2"
    with instructions(None):
        assert os.environ[cpu_library.SET_VARIABLE] == "portable"
    assert os.environ[cpu_library.SET_VARIABLE] == "portable"


def test_the_best_sample_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(calls: dict[str, Any], **_: Any) -> dict[str, CpuTiming]:
        return {name: timing(2.0, 4.0, 1.0) for name in calls}

    monkeypatch.setattr(measuring, "time_in_turns", scripted)
    peaks = measure_peaks(())
    assert peaks.fp32_ops_s == peaks.bf16_ops_s == 2 * 64**3
    assert peaks.copy_bytes_s == 2 * 2**16


def timing(*seconds: float) -> CpuTiming:
    return CpuTiming(
        Timing(tuple((s,) for s in seconds), "scripted"),
        Timing(tuple((2 * s,) for s in seconds), "scripted"),
    )


def test_rates_shares_and_ratios_are_of_the_median() -> None:
    case = Case(MATMUL, "qkv", "S", 1, 4, 8, outputs=5)
    peaks = CpuPeaks(1, {"avx2": 1000.0}, 500.0, 700.0, 100.0)
    name = f"{COMPILED}avx2"
    rows = cpu_rows(
        case,
        {key: {"status": "?"} for key in (name, INT_MM, FP32, BF16)},
        {name: timing(1, 1, 1), FP32: timing(3, 3, 3), BF16: timing(2, 2, 2)},
        peaks,
    )
    ours, wrong, fp32, _ = rows
    assert ours["gop_s"] == 2 * 4 * 8 * 5 / 1e9
    assert ours["share_of_peak"] == pytest.approx(320 / 1000)
    assert (ours["speedup"], ours["speedup_over_bf16"]) == (3, 2)
    assert ours["speedup_in_processor_time"] == 3
    assert ours["processor_ms"] == 2000
    assert "median_ms" not in wrong
    assert fp32["share_of_peak"] == pytest.approx(320 / 3 / 500)
    assert "speedup" not in fp32


def call(layer: str, low: float, value: float, high: float, **other: Any) -> dict[str, Any]:
    return {"implementation": f"{COMPILED}amx-int8", "kernel": MATMUL, "model": "XL",
            "threads": 1, "layer": layer, "rows": 256, "status": "ok", "rounds": 3,
            "correct": True, "max_error": 0.1, "speedup_low": low, "speedup": value,
            "speedup_high": high} | other  # fmt: skip


def word(*ends: tuple[float, float, float], **other: Any) -> tuple[str, str]:
    layers = ("qkv", "proj", "fc1", "fc2")
    rows = [call(layer, *e, **other) for layer, e in zip(layers, ends, strict=True)]
    found = of_cpu_target(TARGETS[0], rows)
    return found.verdict, found.note.partition(",")[0]


def test_a_target_is_met_by_every_call_and_missed_by_one() -> None:
    good, open_, bad = (2.0, 2.2, 2.4), (1.9, 2.1, 2.4), (1.0, 1.5, 1.9)
    assert word(good, good, (2.0, 2.1, 2.3), good)[0] == "holds"
    assert word(good, open_, good, good) == ("undecided", "proj")
    assert word(good, open_, bad, good) == ("does not hold", "fc1")
    assert word(good, good, good, good, model="L")[0] == "not judged"
    assert word(good, good, good, good, threads=2)[0] == "not judged"
    assert word(good, good, good, good, speedup_low=None) == (
        "not judged",
        "qkv: its baseline has no time",
    )


def test_kernels_are_judged_by_their_checks() -> None:
    rows = [
        call("fc1", 1, 2, 3),
        call("fc2", 1, 2, 3, correct=False, max_error=4.0, status="wrong"),
        call("fc1", 1, 2, 3, implementation=INT_MM),
        call("fc1", 1, 2, 3, implementation=PLAIN, correct=True, max_error=0.0),
    ]
    found = {v.claim: v for v in cpu_verdicts(rows, "a CPU")}
    compiled = found[f"{MATMUL} agrees with plain PyTorch on a CPU (compiled)"]
    assert (compiled.verdict, compiled.effect, compiled.n) == ("does not hold", 4.0, 2)
    assert found[f"{MATMUL} agrees with plain PyTorch on a CPU ({INT_MM})"].verdict == "holds"
    assert cpu_verdicts([], "a CPU") == []
