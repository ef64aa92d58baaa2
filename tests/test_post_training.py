"""Plans without training, with allocated weight bits, and with methods from outside, end to end."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from reports import build_report
from robuq_bench.checkpointing import load_tensors
from robuq_bench.config import Config, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.inference import pack_
from robuq_bench.progress import Progress
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.runs.run import open_existing, verify_run
from robuq_bench.runs.study import run_study
from robuq_bench.students import load_student
from studies.train_and_eval import study as train_and_eval


def config_for(workload: Path, plan: str | Path, *overrides: str) -> Config:
    version = train_and_eval.VERSION
    return resolve("train-and-eval", version, plan, str(workload), 0, list(overrides))


def run_job(config: Config, root: Path) -> RunResult:
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True), argv=["test"])
    return run_study(config, root, context)


def state_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_tensors(result.path / "checkpoints" / "student-ema.safetensors")[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def quarot(tiny_workload: Path, runs: Path) -> RunResult:
    return run_job(config_for(tiny_workload, "quarot-w4a4", "calibration.samples=32"), runs)


def test_quarot_is_calibrated_and_judged_without_a_step(quarot: RunResult) -> None:
    run = open_existing(quarot.path)
    assert verify_run(quarot.path) == []
    kinds = {record["kind"] for record in run.results()}
    assert "train" not in kinds
    assert {"metrics", "allocation", "validation", "accounting"} <= kinds
    timing, calibration = run.get("timing"), run.get("calibration")
    assert timing["calibration_cpu_s"] == calibration["cpu_seconds"] > 0
    assert timing["cpu_s"] == pytest.approx(timing["calibration_cpu_s"] + timing["sampling_cpu_s"])
    accounting = run.get("accounting")
    assert accounting["weight_bits"] == 4
    assert set((run.get("allocation") or {})["bits_by_layer"].values()) == {4}


def test_its_student_is_loaded_without_the_data(quarot: RunResult, tiny_workload: Path) -> None:
    config = open_existing(quarot.path).config
    student = load_student(quarot.path, config.workload)
    layers = quantized_layers(student)
    saved = state_of(quarot)
    name = "blocks.0.mlp.fc2"
    assert torch.equal(layers[name].state_dict()["weight_quantizer.scale"],
                       saved[f"{name}.weight_quantizer.scale"])  # fmt: skip
    assert layers[name].activation_bits == 4


def test_a_killed_calibration_goes_on_with_its_blocks(
    quarot: RunResult, tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robuq_bench.qat import CalibrationStates

    config = config_for(tiny_workload, "quarot-w4a4", "calibration.samples=32")
    keep = CalibrationStates.__setitem__

    def once(self: CalibrationStates, block: str, state: dict[str, torch.Tensor]) -> None:
        keep(self, block, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationStates, "__setitem__", once)
        with pytest.raises(KeyboardInterrupt):
            run_job(config, tmp_path)
    fitted: list[str] = []

    def count(self: CalibrationStates, block: str, state: dict[str, torch.Tensor]) -> None:
        fitted.append(block)
        keep(self, block, state)

    monkeypatch.setattr(CalibrationStates, "__setitem__", count)
    again = state_of(run_job(config, tmp_path))
    whole = state_of(quarot)
    assert len(fitted) == open_existing(quarot.path).config.workload.model.depth - 1
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_rtn_needs_no_data_and_stands_in_the_report(
    tiny_workload: Path, runs: Path, quarot: RunResult, tmp_path: Path
) -> None:
    result = run_job(config_for(tiny_workload, "rtn-w4a4"), runs)
    rtn = load_student(result.path, open_existing(result.path).config.workload)
    assert {str(layer.methods["weight"].method) for layer in quantized_layers(rtn).values()} == {
        "rtn"
    }
    target = tmp_path / "report.html"
    build_report([runs], target)
    text = target.read_text(encoding="utf-8")
    assert "rtn-w4a4" in text
    assert "quarot-w4a4" in text


def test_weight_bits_are_allocated_by_metric_and_solver(
    tiny_workload: Path, tmp_path: Path
) -> None:
    overrides = ("bits.of=weight", "bits.mean=3", "bits.choices=[2,3,4]", "bits.solver=greedy",
                 "bits.cost=weights", "bits.metric=epsilon_mse")  # fmt: skip
    result = run_job(config_for(tiny_workload, "rtn-w4a4", *overrides), tmp_path)
    run = open_existing(result.path)
    allocation = run.get("allocation") or {}
    bits = allocation["bits_by_layer"]
    assert allocation["of"] == "weight"
    assert len(set(bits.values())) > 1
    student = load_student(result.path, run.config.workload)
    for name, layer in quantized_layers(student).items():
        codes = layer.weight_quantizer.codes(layer.master_weight).codes  # type: ignore[union-attr, operator]
        limit = 2 ** (bits.get(name, 4) - 1) - 1
        assert int(codes.abs().max()) == limit, name
    shape = {
        n: layer.in_features * layer.out_features for n, layer in quantized_layers(student).items()
    }
    spent = sum(shape[name] * width for name, width in bits.items())
    assert spent <= 3 * sum(shape[name] for name in bits)


def test_activation_bits_can_be_allocated_without_training(
    tiny_workload: Path, tmp_path: Path
) -> None:
    overrides = ("bits.mean=3", "bits.choices=[2,3,4]", "bits.metric=output_mse")
    result = run_job(config_for(tiny_workload, "rtn-w4a4", *overrides), tmp_path)
    bits = (open_existing(result.path).get("allocation") or {})["bits_by_layer"]
    student = load_student(result.path, open_existing(result.path).config.workload)
    assert {name: layer.activation_bits for name, layer in quantized_layers(student).items()
            if name in bits} == bits  # fmt: skip


def test_steps_before_the_metric_need_training(tiny_workload: Path) -> None:
    with pytest.raises(ConfigError, match=r"bits\.steps = 5 QAT steps"):
        config_for(tiny_workload, "rtn-w4a4", "bits.mean=3", "bits.choices=[2,3,4]", "bits.steps=5")


OUTSIDE = """
import torch
from torch import nn

from robuq_bench.methods import ActivationMethod


class Sign(ActivationMethod):
    min_bits = 2

    def fit(self, weight, site):
        return SignTokens()

    def scales_per_token(self, in_features):
        return 1


class SignTokens(nn.Module):
    def forward(self, x, bits):
        with torch.no_grad():
            step = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
            error = step * torch.round(x / step) - x
        return x + error
"""


def test_a_method_from_outside_trains_and_says_why_it_does_not_pack(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_sign.py").write_text(OUTSIDE, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(
        textwrap.dedent(
            """
            extends = "a4"
            [[layers]]
            name = "block"
            activation = { method = "outside_sign:Sign", bits = 3 }
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_for(tiny_workload, tmp_path / "mine.toml")
    result = run_job(config, tmp_path / "runs")
    run = open_existing(result.path)
    assert run.get("accounting")["mean_activation_bits"] == 3
    assert any(record["kind"] == "train" for record in run.results())
    student = load_student(result.path, run.config.workload)
    with pytest.raises(UsageError, match=r"'outside_sign:Sign'"):
        pack_(student)
    target = tmp_path / "report.html"
    build_report([tmp_path / "runs"], target)
    assert "mine" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "overrides",
    [
        ["layers.block.activation=none", "layers.adaln.activation=none"],
        ["layers.block.fixed_bits=true"],
        ["layers.block.activation=lsq"],
        ["layers.block.weight=none", "layers.adaln.weight=none"],
        ["layers.block.weight={method='lsq', bits=3, per='tensor'}", "train.steps=2"],
        [
            "layers.block.scaling=smooth",
            "layers.block.rotation={method='block-hadamard', block=12}",
        ],
        ["layers.block.rotation={method='dual-rotation', block=12, steps=4}"],
        ["layers.block.activation={method='percentile', bits=8}"],
    ],
)
def test_slots_can_be_empty_fixed_or_learned(
    overrides: list[str], tiny_workload: Path, runs: Path
) -> None:
    small = ["calibration.samples=16", "training.warmup_steps=1"]
    result = run_job(config_for(tiny_workload, "rtn-w4a4", *overrides, *small), runs)
    run = open_existing(result.path)
    assert run.is_done
    student = load_student(result.path, run.config.workload)
    saved = state_of(result)
    assert all(torch.equal(value, saved[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["layers.block.rotation={method='block-hadamard', block=10}"],
            "take a divisor|no Hadamard",
        ),
        (["layers.block.weight.group=17"], r"blocks\.0.*17"),
        (["layers.block.match=['*.atn.*']", "layers.adaln.match=['*.nothing']"], "no layer of"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_computed(
    overrides: list[str], message: str, tiny_workload: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_job(config_for(tiny_workload, "rtn-w4a4", *overrides), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_an_account_is_refused_before_training(
    tiny_workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OUTSIDE.replace("    def scales_per_token(self, in_features):\n        return 1\n", "")
    (tmp_path / "outside_silent.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_for(
        tiny_workload, "rtn-w4a4", "layers.block.activation={method='outside_silent:Sign', bits=4}"
    )
    with pytest.raises(UsageError, match="does not say its scales_per_token"):
        run_job(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
