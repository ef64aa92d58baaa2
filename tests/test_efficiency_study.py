"""`study efficiency`: exact sizes and models on a CPU, and the GPU path with scripted clocks."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robuq_bench.cli import app as cli
from robuq_bench.config import Config, load_plan, load_workload, resolve
from robuq_bench.context import Context
from robuq_bench.diffusion import Diffusion, make_scheduler
from robuq_bench.errors import CheckError, ConfigError, UsageError
from robuq_bench.measuring.fp8 import Fp8Linear, fp8_
from robuq_bench.measuring.memory import weight_bytes
from robuq_bench.progress import Progress
from robuq_bench.quantization.attention import integer_limit
from robuq_bench.quantization.convert import matmul_quantizers
from robuq_bench.runs.run import Run
from studies.efficiency import study as efficiency
from studies.efficiency import variants as efficiency_variants
from studies.efficiency.claims import speed_factor
from studies.efficiency.study import packed_bytes
from studies.efficiency.variants import (
    VARIANTS,
    NotRunError,
    Sampler,
    build,
    ddim_coefficients,
    matmul_precision,
    packed_plan,
    variant_of,
)
from studies.efficiency.verdicts import by_baseline

SMALL = (
    "efficiency.batches=[1,2]",
    "efficiency.sampling_batches=[1]",
    "efficiency.sampling_steps=5",
    "efficiency.rank=4",
    "efficiency.round_ms=0.01",
    "efficiency.cpu.models=[]",  # test_efficiency_cpu.py
)


def configure(workload: Path | str, *overrides: str) -> Config:
    return resolve("efficiency", efficiency.VERSION, "a4", workload, 0, [*SMALL, *overrides])


def perform(config: Config, root: Path, device: str = "cpu") -> tuple[Run, list[dict[str, Any]]]:
    context = Context(device=device, threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(root, config, []) as run:
        rows = efficiency.measure(config, run, context)
        run.finish()
    return run, rows


def table(run: Run, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "tables" / f"{name}.csv").read_text().splitlines()))


def test_without_a_gpu_sizes_are_exact_and_times_are_a_model(tmp_path: Path) -> None:
    config = resolve(
        "efficiency", efficiency.VERSION, "a4", "imagenet256", 0, ["efficiency.cpu.models=[]"]
    )
    run, rows = perform(config, tmp_path)
    sizes = {row["ours"]: row["factor"] for row in rows if row["claim"] == "checkpoint size"}
    assert sizes["base3/fp16/fp16"] >= 15.2
    assert {row["paper"] for row in rows} == {15.2, 7.1, 3.5}
    weights = {row["variant"]: row for row in table(run, "weights")}
    assert int(weights["fp32"]["weight_bytes"]) == 2 * int(weights["bf16"]["weight_bytes"])
    assert float(weights["w1.58a8"]["reduction_from_fp32"]) >= 7.1
    assert weights["torchao-int8"]["weight_bytes"] == ""
    model = {row["images"]: row for row in table(run, "end_to_end_model")}
    assert set(model) == {"2", "16", "64"}
    assert float(model["16"]["ratio_to_bf16"]) == pytest.approx(1.58, abs=0.005)
    speed = [row for row in table(run, "claims") if row["claim"] == "speed"]
    assert {row["factor"] for row in speed} == {""}
    assert {row["basis"] for row in speed} == {"not run"}
    graph = [row for row in rows if row["against"] == "bf16-graph, step"]
    assert [round(row["modelled_factor"], 2) for row in graph] == [1.60, 1.58, 1.54]
    assert not (run.path / "tables" / "end_to_end.csv").exists()
    judged = {row["claim"]: row for row in table(run, "verdicts")}
    words = {claim: row["verdict"] for claim, row in judged.items()}
    assert words == {
        "DiT-XL/2 becomes 13.2× smaller in theory": "holds",
        "DiT-XL/2 becomes 15.2× smaller as a checkpoint": "holds",
        "The weights of DiT-XL/2 take 7.1× less memory than in fp32": "holds",
        "The weights of DiT-XL/2 take 7.1× less memory than in bf16": "does not hold",
        "DiT-XL/2 takes 7.1× less GPU memory": "not judged",
        "DiT-XL/2 runs 3.5× faster": "not judged",
    }
    best = judged["DiT-XL/2 becomes 15.2× smaller as a checkpoint"]
    assert float(best["effect"]) == max(sizes.values())
    assert {row["rule"] for row in judged.values()} == {efficiency.RULE}


def test_the_sentence_and_the_exit_codes(
    tiny_workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["study", "efficiency", "--on", str(tiny_workload), "-o", str(tmp_path)]
    for override in SMALL:
        arguments += ["--set", override]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "need a CUDA device" in said.err
    assert "not run" in said.out
    if not torch.cuda.is_available():
        assert cli.main([*arguments, "--device", "cuda"]) == 4


def test_settings_are_checked(tiny_workload: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown 'fp16'"):
        configure(tiny_workload, 'efficiency.variants=["fp16"]')
    with pytest.raises(ConfigError, match="sampling_batches must be among batches"):
        configure(tiny_workload, "efficiency.sampling_batches=[7]")
    with pytest.raises(UsageError, match="unknown 'fp3'"):
        variant_of("fp3")
    without_null = configure(tiny_workload, "model.class_dropout_prob=0.0")
    with pytest.raises(UsageError, match=r"efficiency\.guidance=false"):
        efficiency.check(without_null)


@pytest.mark.parametrize("plan", ["a8", "a2-uniform"])
@pytest.mark.parametrize("rank", [0, 4])
def test_packed_bytes_are_those_of_the_model(tiny_workload: Path, plan: str, rank: int) -> None:
    section = load_workload(tiny_workload).model
    name = {"a8": "w1.58a8", "a2-uniform": "w1.58a2"}[plan]
    model = build(VARIANTS[name], section, rank, 0, "cpu", "integer")
    assert packed_bytes(section, packed_plan(plan, rank), 2) == weight_bytes(model)


@pytest.mark.parametrize("name", ["a8", "a4", "a2-uniform"])
def test_the_plan_that_is_timed_is_the_plan_that_is_judged(tiny_workload: Path, name: str) -> None:
    """But for the rank, which at DiT-XL/2 is the paper's 16."""
    plan = packed_plan(name, 16)
    assert plan.attention.matmul_bits == load_plan(name).attention.matmul_bits == 8
    variant = next(variant for variant in VARIANTS.values() if variant.plan == name)
    model = build(variant, load_workload(tiny_workload).model, 4, 0, "cpu", "integer")
    quantizers = list(matmul_quantizers(model).values())
    assert quantizers
    assert {integer_limit(quantizer) for quantizer in quantizers} == {127}


def test_an_output_without_weights_is_its_bias_in_fp8() -> None:
    linear = nn.Linear(32, 16).bfloat16()
    with torch.no_grad():
        linear.weight[3] = 0
        found = Fp8Linear(linear)(torch.randn(4, 32).bfloat16())
    assert found.isfinite().all()
    assert torch.equal(found[:, 3], linear.bias[3].expand(4))


def test_the_fp8_peer_is_the_layer_it_stands_for() -> None:
    """On a CPU, which multiplies fp8 too, if slowly."""
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 5)).bfloat16()
    exchanged = fp8_(copy.deepcopy(model))
    assert [type(layer) for layer in exchanged] == [Fp8Linear, nn.Linear]  # 5 outputs: not taken
    x = torch.randn(3, 7, 64).bfloat16()
    x[0, 0] = 0
    found, expected = exchanged[0](x).float(), model[0](x).float()
    assert (found - expected).norm() < 0.05 * expected.norm()  # e4m3 has 4 significant bits
    assert next(exchanged.parameters()).dtype == torch.bfloat16
    with pytest.raises(NotRunError, match=r"not run: needs a GPU of compute capability 8\.9"):
        build(VARIANTS["fp8-rowwise"], load_workload("digits").model, 4, 0, "cpu")


def test_ddim_is_that_of_diffusers() -> None:
    diffusion = Diffusion()
    timesteps, coefficients = ddim_coefficients(diffusion, 20)
    scheduler = make_scheduler(diffusion, "ddim", 20, learn_sigma=False)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    x, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    for t, (a, b) in zip(scheduler.timesteps, coefficients, strict=True):
        expected = scheduler.step(eps, t, x, return_dict=False)[0]
        torch.testing.assert_close(a * x + b * eps, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="must divide 1000"):
        ddim_coefficients(diffusion, 30)


def test_a_step_is_guided_as_the_model_guides(tiny_workload: Path) -> None:
    section = load_workload(tiny_workload).model
    model = build(VARIANTS["fp32"], section, 4, 0, "cpu")
    sampler = Sampler(model, section, torch.float32, 3, True, "cpu", 0)
    doubled = torch.cat([sampler.x, sampler.x])
    t = sampler.timestep.expand(6)
    with torch.no_grad():
        expected = model.forward_with_cfg(doubled, t, sampler.labels, efficiency_variants.CFG_SCALE)
        found = sampler.predict()
    torch.testing.assert_close(found, expected[:3, : section.in_channels])
    assert found.abs().max() > 0  # open gates

    seen: list[tuple[int, list[float]]] = []
    timesteps, coefficients = ddim_coefficients(Diffusion(), 4)
    sampler.x.zero_()
    sampler.sample(
        lambda: seen.append((int(sampler.timestep), sampler.coefficients.tolist())),
        timesteps,
        coefficients,
    )
    assert [t for t, _ in seen] == [750, 500, 250, 0]
    assert [c for _, c in seen] == coefficients.tolist()
    assert torch.equal(sampler.x, sampler.noise)
    sampler.coefficients.copy_(torch.tensor([2.0, 3.0]))
    sampler.step(lambda: torch.ones_like(sampler.x))
    torch.testing.assert_close(sampler.x, 2 * sampler.noise + 3)


def test_precision_flags_come_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with matmul_precision(True):
        assert torch.backends.cuda.matmul.allow_tf32
        with matmul_precision(False):
            assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


class Scripted:
    """Stands for both stopwatches: runs its work once; a graph is twice as fast."""

    method = "scripted"

    def __init__(self, seconds: float, work: Sequence[Callable[[], object]]) -> None:
        self.seconds, self.calls = seconds, len(work)
        for call in work:
            call()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The GPU path on the CPU: the integer backend for Triton's, scripted clocks and counters."""
    facts: dict[str, Any] = {"built": [], "difference": None}
    real_build = efficiency.build

    def fake_build(
        variant: Any, section: Any, rank: int, seed: int, device: str, backend: str
    ) -> Any:
        facts["built"].append((variant.name, backend))
        if facts["difference"] == variant.name and backend == "triton":
            seed += 1
        return real_build(variant, section, rank, seed, "cpu", "integer")

    def peak(step: Callable[[], object], model: Any, resident_before: int) -> dict[str, Any]:
        step()
        weights = weight_bytes(model)
        return {"peak_bytes": weights + 1000, "weights_bytes": weights, "activations_bytes": 1000}

    real_sampler = Sampler
    monkeypatch.setattr(efficiency, "build", fake_build)
    monkeypatch.setattr(
        efficiency,
        "Sampler",
        lambda m, s, d, b, g, device, seed: real_sampler(m, s, d, b, g, "cpu", seed),
    )
    monkeypatch.setattr(efficiency, "measure_peak", peak)
    monkeypatch.setattr(efficiency, "release", lambda: None)
    monkeypatch.setattr(efficiency, "GraphReplay", lambda work: Scripted(0.01, work))
    monkeypatch.setattr(efficiency, "EagerCalls", lambda work, warmup=3: Scripted(0.03, work))
    monkeypatch.setattr(efficiency, "cuda_graph", lambda function: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend")
    monkeypatch.setattr(efficiency, "resident_bytes", lambda: 0)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    real_to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *a, **k: self if a[:1] == ("cuda",) else real_to(self, *a, **k),
    )
    return facts


def test_the_gpu_path_measures_compares_and_resumes(
    tiny_workload: Path, tmp_path: Path, pretend_gpu: dict[str, Any]
) -> None:
    names = ("fp32", "bf16-graph", "torchao-int8", "w1.58a8")
    chosen = f"efficiency.variants={list(names)}".replace("'", '"')
    config = configure(tiny_workload, chosen)
    context = Context(device="cuda", threads=1, progress=Progress(quiet=True), argv=[])
    real = Run.append

    def stop_at_the_last(self: Run, key: str, **fields: Any) -> None:
        if key == "step/fp32/batch2":
            raise KeyboardInterrupt
        real(self, key, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt), Run.open(tmp_path, config, []) as run:
            efficiency.measure(config, run, context)
    assert pretend_gpu["built"] == [
        *[("w1.58a8", backend) for backend in ("integer", "triton")],
        ("bf16-graph", "triton"),
        # torchao is not installed: its items are there, without a model
        *[("torchao-int8", "triton")] * 3,
        ("fp32", "triton"),
    ]
    pretend_gpu["built"].clear()
    run, rows = perform(config, tmp_path, "cuda")
    assert {name for name, _ in pretend_gpu["built"]} == {"fp32"}

    items = {(r["measured"], r["variant"], r["batch"]): r for r in table(run, "end_to_end")}
    assert len(items) == 4 * 3  # batches 1 and 2, and sampling at 1
    assert items["step", "torchao-int8", "1"]["status"] == "not run: torchao is not installed"
    assert items["step", "torchao-int8", "1"]["median_ms"] == ""
    ours = items["step", "w1.58a8", "2"]
    assert (ours["median_ms"], ours["images"], ours["weights"]) == ("10.0", "4", "random")
    assert float(ours["difference_to_integer"]) == 0
    assert float(items["sampling", "fp32", "1"]["images_per_s"]) == pytest.approx(1 / 0.03)
    assert "5 graph replays" in items["sampling", "w1.58a8", "1"]["method"]
    assert "rounds_s" not in ours
    found = {(r["against"], r["batch"]): r for r in rows if r["basis"] == "measured"}
    assert found["fp32, step", 2]["factor"] == pytest.approx(3)
    assert found["fp32, step", 2]["verdict"] == "faster"
    assert found["bf16-graph, step", 2]["factor"] == pytest.approx(1)
    assert found["bf16-graph, step", 2]["verdict"] == "no difference shown"
    assert found["fp32, peak of a step", 1]["factor"] > 1
    full = {(r["against"], r["batch"]): r for r in table(run, "claims")}
    assert full["torchao-int8, step", "1"]["basis"] == "not run"


def test_a_packed_model_that_computes_something_else_has_no_time(
    tiny_workload: Path, tmp_path: Path, pretend_gpu: dict[str, Any]
) -> None:
    pretend_gpu["difference"] = "w1.58a8"
    config = configure(tiny_workload, 'efficiency.variants=["bf16","w1.58a8"]')
    context = Context(device="cuda", threads=1, progress=Progress(quiet=True), argv=[])
    with (
        pytest.raises(CheckError, match=r"w1\.58a8: check failed: the prediction differs"),
        Run.open(tmp_path, config, []) as run,
    ):
        efficiency.measure(config, run, context)
    items = {(r["measured"], r["variant"], r["batch"]): r for r in table(run, "end_to_end")}
    assert items["step", "w1.58a8", "1"]["median_ms"] == ""
    assert items["step", "bf16", "1"]["median_ms"] != ""


def test_a_variant_that_fails_does_not_take_the_others_along(
    tiny_workload: Path,
    tmp_path: Path,
    pretend_gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(efficiency, "measure_peak", full)
    config = configure(tiny_workload, 'efficiency.variants=["bf16","w1.58a8"]')
    context = Context(device="cuda", threads=1, progress=Progress(quiet=True), argv=[])
    with (
        pytest.raises(CheckError, match=r"w1\.58a8: failed: OutOfMemoryError"),
        Run.open(tmp_path, config, []) as run,
    ):
        efficiency.measure(config, run, context)
    items = {(r["measured"], r["variant"]): r for r in table(run, "end_to_end")}
    assert items["step", "bf16"]["status"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert items["sampling", "bf16"]["status"] == "ok"
    steps = [row for row in table(run, "claims") if "step" in row["against"]]
    assert {row["basis"] for row in steps} == {"not run"}

    monkeypatch.setattr(efficiency, "measure_peak", lambda *_: {"peak_bytes": 1000})
    run, _ = perform(config, tmp_path, "cuda")  # what failed is tried again
    assert {row["status"] for row in table(run, "end_to_end")} == {"ok"}


def test_factors_are_judged_against_each_baseline() -> None:
    """Rounds of equal length leave no doubt, so the words follow from the factors alone."""

    def row(against: str, batch: int, factor: float, low: float, high: float) -> dict[str, Any]:
        return {
            "claim": "speed", "paper": 3.5, "ours": "w1.58a8", "against": against, "batch": batch,
            "factor": factor, "factor_low": low, "factor_high": high, "rounds": 3,
            "verdict": "faster",
        }  # fmt: skip

    rows = [
        row("fp32, step", 1, 9.0, 8.9, 9.1),
        row("fp32, step", 8, 3.7, 3.6, 3.8),
        row("tf32, step", 1, 2.0, 1.9, 2.1),
        row("tf32, step", 8, 3.4, 3.3, 3.45),
        row("bf16, step", 1, 3.6, 3.4, 3.8),
        row("fp16, step", 1, 3.7, 3.6, 3.8),
        row("fp16, step", 8, 3.9, 2.0, 5.8),  # the better of two, and in doubt
        row("int8, step", 1, 3.4, 3.35, 3.45),
        row("int8, step", 8, 3.3, 2.9, 3.7),
        row("torchao-int8, step", 1, 9.0, 8.9, 9.1),  # packed too: no baseline of the paper's
    ]
    found = {v.claim: v for v in by_baseline("It runs 3.5× faster", rows)}
    assert {claim: (v.verdict, v.effect) for claim, v in found.items()} == {
        "It runs 3.5× faster than fp32, step": ("holds", 3.7),
        "It runs 3.5× faster than tf32, step": ("does not hold", 3.4),
        "It runs 3.5× faster than bf16, step": ("undecided", 3.6),
        "It runs 3.5× faster than fp16, step": ("undecided", 3.9),
        "It runs 3.5× faster than int8, step": ("undecided", 3.3),
    }
    shaky = [rows[0] | {"verdict": "faster, unstable"}]
    assert by_baseline("It", shaky)[0].verdict == "undecided"
    (unmeasured,) = by_baseline("It", [rows[0] | {"factor": None}])
    assert (unmeasured.verdict, unmeasured.note) == ("not judged", "needs a CUDA device")


def test_an_unstable_timing_marks_its_verdict() -> None:
    def item(seconds: list[float], stability: str) -> dict[str, Any]:
        return {"rounds_s": [seconds] * 3, "method": "scripted", "stability": stability}

    ours, base = item([1.0, 1.01, 1.02, 1.0], "unstable"), item([2.0, 2.01, 2.02, 2.1], "stable")
    found = speed_factor(ours, base)
    assert found["factor"] == pytest.approx(2, rel=0.02)
    assert found["verdict"] == "faster, unstable"
    assert speed_factor(None, base) == speed_factor({"status": "failed"}, base) == {}


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's advice to use TF32
def test_on_a_gpu_every_variant_runs(tiny_workload: Path, tmp_path: Path) -> None:
    names = ("fp32", "tf32", "bf16", "bf16-compile", "bf16-graph", "w1.58a8", "w1.58a4", "w1.58a2")
    chosen = f"efficiency.variants={list(names)}".replace("'", '"')
    run, _ = perform(configure(tiny_workload, chosen), tmp_path, "cuda")
    for row in table(run, "end_to_end"):
        assert row["status"] == "ok", row
        assert float(row["median_ms"]) > 0
        if row["measured"] == "step":
            assert int(row["activations_bytes"]) > 0
    exact = {row["variant"]: row["weight_bytes"] for row in table(run, "weights")}
    for row in table(run, "end_to_end"):
        if row["measured"] == "step":
            assert row["weights_bytes"] == exact[row["variant"]]
