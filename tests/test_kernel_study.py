"""`study kernels`: the interpreter's checks on a CPU, the GPU path with scripted stopwatches."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robuq_bench.cli import app as cli
from robuq_bench.config import Config, resolve
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, ConfigError
from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.progress import Progress
from robuq_bench.runs.run import Run
from studies.kernels import checks as kernel_checks
from studies.kernels import study as kernels
from studies.kernels.cases import (
    ATTENTION,
    FAKE,
    GROUPED,
    KERNELS,
    MATMUL,
    OURS,
    QUANTIZE,
    WEIGHT,
    Case,
    cases_of,
    kernel_function,
    make_inputs,
    weight_cases_of,
)
from studies.kernels.checks import Check, check, deviations, poisoned_memory
from studies.kernels.peers import (
    FP8,
    SDPA,
    PeerUnavailableError,
    fp8,
    make_layer,
    peers_of,
    sdpa,
)
from studies.kernels.settings import Settings
from studies.kernels.tables import roofline_rows, rows_of, settings_of
from studies.kernels.verdicts import SPEEDUP, TARGETS, of_target

SMALL = (
    'kernels.models=["S"]',
    "kernels.batches=[1]",
    'kernels.guidance=["on"]',
    "kernels.check_rows=4",
    "kernels.check_outputs=40",
    "kernels.cpu.models=[]",  # test_kernels_cpu.py
)


def configure(*overrides: str) -> Config:
    return resolve("kernels", kernels.VERSION, "a4", "digits", 0, [*SMALL, *overrides])


def perform(config: Config, root: Path, device: str = "cpu") -> tuple[Run, list[dict[str, Any]]]:
    context = Context(device=device, threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(root, config, []) as run:
        rows = kernels.measure(config, run, context)
        run.finish()
    return run, rows


def table(run: Run, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "tables" / f"{name}.csv").read_text().splitlines()))


def test_without_a_gpu_kernels_are_checked_and_times_are_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(f'kernels.kernels=["{MATMUL}","{WEIGHT}"]')
    run, rows = perform(config, tmp_path)
    assert {row["layer"] for row in rows} == {"qkv", "proj", "fc1", "fc2", "fc1 weight",
                                              "fc2 weight"}  # fmt: skip
    for row in rows:
        assert row["correct"] is True
        assert row["timing"] is None  # printed as "not run"
        assert row["basis"] == "model, not measured"
    for row in table(run, "roofline"):
        assert row["basis"] == "model, not measured"
        assert row["source"]
    assert len(table(run, "roofline")) == 6 * 4  # H100, H200, A100, RTX 4090
    assert "interpreter" in table(run, "kernel_checks")[0]["where"]
    judged = table(run, "verdicts")
    words = {row["subject"]: row["verdict"] for row in judged if "PyTorch" in row["claim"]}
    assert words == {MATMUL: "holds", WEIGHT: "holds"}
    errors = [float(row["max_error"]) for row in rows if row["kernel"] == MATMUL]
    (product,) = [row for row in judged if row["claim"].startswith(f"{MATMUL} agrees")]
    assert float(product["effect"]) == pytest.approx(max(errors))
    assert {row["verdict"] for row in judged if "PyTorch" not in row["claim"]} == {"not judged"}

    # A second session asks the interpreter for what is missing only.
    asked: list[Case] = []

    def fake(cases: list[Case], seed: int) -> list[Check]:
        asked.extend(cases)
        return [Check(False, 2.0, "made to fail") for _ in cases]

    monkeypatch.setattr(kernels, "interpreter", fake)
    more = replace_kernels(config, (MATMUL, WEIGHT, GROUPED))
    with Run.open(tmp_path / "resumed", more, []) as again:
        for record in run.results():
            again.append(record["key"], **{k: v for k, v in record.items() if k != "key"})
        context = Context(device="cpu", threads=1, progress=Progress(quiet=True), argv=[])
        with pytest.raises(CheckError, match=r"1 of 7 kernel checks failed.*adaLN of all blocks"):
            kernels.measure(more, again, context)
        assert [case.layer for case in asked] == ["adaLN of all blocks"]
        # What failed is asked for anew; what was right is not.
        monkeypatch.setattr(
            kernels, "interpreter", lambda cases, _: [Check(True, 0.1)] * len(cases)
        )
        rows = kernels.measure(more, again, context)
    assert [row["correct"] for row in rows] == [True] * 7


def replace_kernels(config: Config, names: tuple[str, ...]) -> Config:
    settings = config.settings_of(Settings).model_copy(update={"kernels": names})
    return config.model_copy(update={"settings": settings})


def test_the_sentence_and_the_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "interpreter", lambda cases, seed: [Check(True, 0.5)] * len(cases))
    arguments = ["study", "kernels", "-o", str(tmp_path)]
    for override in SMALL:
        arguments += ["--set", override]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "timings of the Triton kernels need a CUDA device" in said.err
    assert "not run" in said.out
    assert "model, not measured" in said.out
    if not torch.cuda.is_available():
        assert cli.main([*arguments, "--device", "cuda"]) == 4
        assert "no CUDA device here" in capsys.readouterr().err


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown 'XS'"):
        configure('kernels.models=["XS"]')
    with pytest.raises(ConfigError, match="rounds"):
        configure("kernels.rounds=2")


def test_cases_cover_a_step_with_its_true_shapes() -> None:
    cases = {case.layer: case for case in cases_of("XL", 16)}
    assert cases["fc1"].rows == 4096
    assert (cases["fc1"].width, cases["fc1"].outputs, cases["fc1"].epilogue) == (1152, 4608, "gelu")
    assert (cases["fc2"].width, cases["fc2"].outputs, cases["fc2"].epilogue) == (4608, 1152, "gate")
    adaln = cases["adaLN of all blocks"]
    assert (adaln.rows, adaln.outputs, adaln.groups) == (16, 6912, 28)
    assert adaln.product.weight_bytes == 28 * 6912 * 1152 // 4
    assert [case.rows for case in weight_cases_of("XL")] == [4608, 1152]
    every = [*cases_of("XL", 16), *weight_cases_of("XL")]
    assert len({case.key for case in every}) == len(every) == 17


def test_equal_shapes_appear_once_and_name_their_settings() -> None:
    options = SimpleNamespace(
        models=("S",), batches=(1, 32, 64), guidance=("on", "off"), kernels=(MATMUL,), rank=16,
        bits=8, tokens_per_image=256,
    )  # fmt: skip
    cases = [case for case in kernels.all_cases(options) if case.layer == "qkv"]
    assert [case.images for case in cases] == [1, 2, 32, 64, 128]
    said = [settings_of(case, options) for case in cases]
    assert said == ["batch 1", "batch 1 guided", "batch 32", "batch 32 guided, 64",
                    "batch 64 guided"]  # fmt: skip


def test_a_layer_bound_by_memory_and_one_by_compute() -> None:
    cases = {case.layer: case for case in cases_of("XL", 128)}
    fc1, norm = roofline_rows(cases["fc1"])[0], roofline_rows(cases["qkv and fc1 input"])[0]
    assert fc1["limit"] == "compute"
    assert fc1["bf16_over_ternary"] == pytest.approx(2.0, abs=0.01)
    assert fc1["least_us"] == pytest.approx(2 * 32768 * 1152 * 4608 / 1978.9e12 * 1e6)
    assert norm["limit"] == "memory"
    assert norm["bf16_least_us"] is None


def reduced(kernel: str, layer: str | None = None) -> Case:
    cases = [*cases_of("S", 2), *weight_cases_of("S")]
    found = [c for c in cases if c.kernel == kernel and layer in (None, c.layer)]
    return found[0].reduced(4, 24)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_result_agrees_with_itself_and_a_damaged_one_does_not(kernel: str) -> None:
    case = reduced(kernel)
    inputs = make_inputs(case, "cpu")
    expected = kernel_function(case, "reference")(**inputs)
    assert max(deviations(case, expected, expected).values()) == 0
    for damage in (damage_one, damage_nan):
        assert not max_or_nan(deviations(case, damage(case, expected), expected)) <= 1


def max_or_nan(errors: dict[str, float]) -> float:
    values = list(errors.values())
    return float("nan") if any(value != value for value in values) else max(values)


def damage_one(case: Case, result: Any) -> Any:
    """3 % of the values far off."""

    def far(values: torch.Tensor) -> torch.Tensor:
        damaged = values.clone()
        damaged.view(-1)[::30] += 5
        return damaged

    return apply(case, result, far)


def damage_nan(case: Case, result: Any) -> Any:
    """Rows that no program wrote."""

    def unwritten(values: torch.Tensor) -> torch.Tensor:
        damaged = values.clone()
        damaged[-1] = float("nan") if values.is_floating_point() else 127
        return damaged

    return apply(case, result, unwritten)


def apply(case: Case, result: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if case.kernel == QUANTIZE:
        return result._replace(codes=function(result.codes))
    if case.kernel == FAKE:
        return result._replace(values=function(result.values))
    return function(result)


def test_each_part_of_a_quantized_result_is_looked_at() -> None:
    case = reduced(QUANTIZE, "residual and fc1 input")
    expected = kernel_function(case, "reference")(**make_inputs(case, "cpu"))
    for name, change in {
        "scale": {"scale": expected.scale * 1.01},
        "offset": {"offset": expected.offset + 0.1 * expected.scale},
        "code sum": {"code_sums": expected.code_sums + 1},
        "low-rank branch": {"branch": expected.branch + 1},
        "residual sum": {"residual": expected.residual + 1},
    }.items():
        errors = deviations(case, expected._replace(**change), expected)
        assert [part for part, error in errors.items() if error > 1] == [name]


def test_a_kernel_that_raises_or_leaves_memory_unwritten_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = reduced(MATMUL)
    real = kernel_function

    def use(broken: Callable[..., Any]) -> Check:
        monkeypatch.setattr(
            kernel_checks,
            "kernel_function",
            lambda c, backend: broken if backend == "triton" else real(c, backend),
        )
        return check(case, "cpu")

    def raises(**_: Any) -> None:
        raise ValueError("no such tile\nand more")

    def writes_nothing(**inputs: Any) -> torch.Tensor:
        shape = (len(inputs["codes"]), len(inputs["planes"]))
        return torch.empty(shape, dtype=inputs["out_dtype"])

    assert use(raises) == Check(False, None, "ValueError: no such tile")
    assert not use(writes_nothing).correct
    assert use(real(case, "reference")).correct


def test_poison_is_gone_afterwards() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert bool((torch.empty(3, dtype=torch.int8) == 127).all())
        assert torch.zeros(2).new_empty(2).isnan().all()
    assert torch.empty.__module__ != kernel_checks.__name__
    assert not torch.full((4,), 2.0).new_empty(0).isnan().any()


@dataclass
class Scripted:
    """Stands for a CUDA graph: runs its work once, then takes the seconds the test says."""

    seconds: float
    calls: int
    method: str = "scripted"
    turn: int = 0

    def __call__(self) -> float:
        self.turn += 1
        return self.seconds * self.calls * (1 + 0.01 * (self.turn % 3))


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The GPU path on the CPU: references as kernels, 10 us a call for ours, 20 for the others."""
    facts: dict[str, Any] = {"name": "Pretend 1", "made": [], "wrong": set()}

    def graph(work: Sequence[Callable[[], object]]) -> Scripted:
        for call in work:
            call()
        facts["made"].append(len(work))
        is_ours = "arguments" in work[0].__code__.co_varnames
        return Scripted(10e-6 if is_ours else 20e-6, len(work))

    def fake_check(case: Case, device: str, seed: int) -> Check:
        return Check(False, 9.0, "made to fail") if case.layer in facts["wrong"] else Check(True, 0)

    monkeypatch.setattr(kernels, "GraphReplay", graph)
    monkeypatch.setattr(kernels, "check_case", fake_check)
    monkeypatch.setattr(
        kernels, "kernel_function", lambda case, _: kernel_function(case, "reference")
    )
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 2**19)
    monkeypatch.setattr(
        kernels, "measure_ceilings", lambda device, **_: Ceilings(3e12, 700e12, 1400e12)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["name"])
    monkeypatch.setattr(
        kernels, "all_cases",
        lambda options: [replace(c.reduced(4, 24), images=2) for c in
                         (*cases_of("S", 2), *weight_cases_of("S"))
                         if c.layer in ("qkv", "proj input", "adaLN of all blocks", "fc1 weight")],
    )  # fmt: skip
    real = make_inputs
    monkeypatch.setattr(kernels, "make_inputs", lambda case, device, seed: real(case, "cpu", seed))
    real_layer = kernels.make_layer
    monkeypatch.setattr(
        kernels, "make_layer", lambda case, device, copies, seed: real_layer(case, "cpu", 2, seed)
    )
    return facts


def test_fp8_holds_ternary_weights_and_codes_of_four_bits() -> None:
    layer = make_layer(Case("ternary_matmul", "qkv", "S", 1, 20, 128, 48), "cpu", 2)
    works = fp8(layer)
    assert len(works) == 2
    for work, weight in zip(works, layer.weights, strict=True):
        found = work()
        exact = (layer.codes >> 4).double() @ weight.double().T * layer.scale + layer.bias.double()
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, exact.bfloat16())
    with pytest.raises(PeerUnavailableError, match="needs multiples of 16"):
        fp8(make_layer(Case("ternary_matmul", "qkv", "S", 1, 20, 128, 50), "cpu", 1))


def test_attention_is_checked_in_integers_and_has_that_of_pytorch_beside_it() -> None:
    case = next(case for case in cases_of("XL", 16) if case.kernel == ATTENTION)
    assert (case.heads, case.tokens, case.width // case.heads) == (16, 256, 72)
    assert case.operations == 2 * 2 * 16 * 16 * 256 * 256 * 72
    assert case.moved_bytes == 4096 * 1152 * 8
    assert peers_of(case) == (SDPA,)
    (work,) = sdpa(case.reduced(32, 24), "cpu")
    found = work()
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2, 16, 16, 72)


def test_the_gpu_path_gates_times_and_resumes(tmp_path: Path, pretend_gpu: dict[str, Any]) -> None:
    config = configure("kernels.autotune=false", "kernels.round_ms=0.01")
    context = Context(device="cuda", threads=1, progress=Progress(quiet=True), argv=[])
    pretend_gpu["wrong"] = {"qkv"}
    with (
        pytest.raises(CheckError, match=r"1 of 4 kernel checks failed.*qkv; made to fail"),
        Run.open(tmp_path, config, []) as run,
    ):
        kernels.measure(config, run, context)
    rows = table(run, "kernels")
    ours = {row["layer"]: row for row in rows if row["implementation"] == OURS}
    assert ours["qkv"]["median_us"] == ours["qkv"]["verdict"] == ""  # wrong, so no speed anywhere
    assert ours["qkv"]["status"] == "made to fail"
    # cuBLAS of two products, and ours of all four cases but the wrong one
    assert len(pretend_gpu["made"]) == 5
    assert all(row["status"] == "ok" for layer, row in ours.items() if layer != "qkv")
    assert ours["proj input"]["stability"] == "stable"
    others = {(row["layer"], row["implementation"]): row for row in rows}
    assert others["qkv", "cuBLAS bf16"]["median_us"]
    assert others["qkv", "gemlite A8W158"]["status"] == "not installed"
    assert others["qkv", "torch._int_mm"]["status"] == "not supported: needs 17 rows"
    assert others["qkv", FP8]["status"] == "not supported: needs a GPU of compute capability 8.9"
    assert others["adaLN of all blocks", "torchao int8"]["median_us"] == ""
    assert others["proj input", "fast-hadamard-transform"]["status"] == "not installed"

    pretend_gpu["wrong"], pretend_gpu["made"] = set(), []
    _, shown = perform(config, tmp_path, "cuda")
    assert len(pretend_gpu["made"]) == 2  # ours and cuBLAS of the failed case, nothing else
    found = {row["layer"]: row for row in shown}
    assert found["qkv"]["verdict"] == "faster"
    assert found["qkv"]["speedup_over_cublas_bf16"] == pytest.approx(2)
    assert found["qkv"]["median_us"] == pytest.approx(10.1)
    assert found["proj input"]["verdict"] is None  # nothing to compare with


def test_another_gpu_measures_anew(tmp_path: Path, pretend_gpu: dict[str, Any]) -> None:
    config = configure("kernels.autotune=false", "kernels.round_ms=0.01")
    context = Context(device="cuda", threads=1, progress=Progress(quiet=True), argv=[])
    with Run.open(tmp_path, config, []) as run:
        kernels.measure(config, run, context)
        first = len(pretend_gpu["made"])
        kernels.measure(config, run, context)
        assert len(pretend_gpu["made"]) == first
        pretend_gpu["name"] = "Pretend 2"
        kernels.measure(config, run, context)
        assert len(pretend_gpu["made"]) == 2 * first
    assert {row["device_name"] for row in table(run, "kernels")} == {"Pretend 2"}


def test_shares_of_the_measured_ceiling_by_hand() -> None:
    from robuq_bench.measuring.statistics import Timing

    ceilings = Ceilings(copy_bytes_s=3e12, bf16_ops_s=700e12, int8_ops_s=1400e12)
    cases = {case.layer: case for case in cases_of("XL", 128)}
    quick = Timing(((500e-6,) * 3,) * 3, "scripted")
    status = {OURS: "ok", "cuBLAS bf16": "ok"}
    times = {OURS: Timing(((300e-6,) * 3,) * 3, "scripted"), "cuBLAS bf16": quick}
    ours, dense = rows_of(cases["fc1"], Check(True, 0.1), status, times, ceilings)
    operations = 2 * 32768 * 1152 * 4608
    assert ours["tflop_s"] == pytest.approx(operations / 300e-6 / 1e12)
    assert ours["share_of_ceiling"] == pytest.approx(operations / 1400e12 / 300e-6)
    assert dense["share_of_ceiling"] == pytest.approx(operations / 700e12 / 500e-6)
    assert ours["speedup_over_cublas_bf16"] == pytest.approx(5 / 3)
    wrong, _ = rows_of(cases["fc1"], Check(False, 3.0, "wrong"), status, times, ceilings)
    assert "median_us" not in wrong
    assert "speedup_over_cublas_bf16" not in wrong
    norm = cases["fc2 input"]
    (row,) = rows_of(norm, Check(True, 0.1), {OURS: "ok"}, {OURS: quick}, ceilings)
    assert row["limit"] == "memory"
    assert row["gb_s"] == pytest.approx(norm.moved_bytes / 500e-6 / 1e9)
    assert row["share_of_ceiling"] == pytest.approx(norm.moved_bytes / 3e12 / 500e-6)


def timed_target(bound: float, low: float, value: float, high: float, **other: Any) -> str:
    """The word for fc2 at 32,768 rows of such a speed, where the target is 1.7."""
    target = replace(TARGETS[2], layers=("fc2",), bound=bound)
    row = {
        "kernel": MATMUL, "model": "XL", "layer": "fc2", "rows": 32768, "width": 4608,
        "images": 128, "stability": "stable", "status": "ok", "rounds": 3, SPEEDUP: value,
        f"{SPEEDUP}_low": low, f"{SPEEDUP}_high": high, **other,
    }  # fmt: skip
    return of_target(target, [row], [], "NVIDIA H100").verdict


def test_a_target_is_judged_by_its_interval() -> None:
    assert timed_target(1.7, 1.71, 1.8, 1.9) == "holds"
    assert timed_target(1.7, 1.5, 1.6, 1.69) == "does not hold"
    assert timed_target(1.7, 1.6, 1.72, 1.8) == "undecided"
    assert timed_target(1.7, 1.71, 1.8, 1.9, stability="unstable") == "undecided"
    assert timed_target(1.7, 1.71, 1.8, 1.9, rows=512) == "not judged"
    assert timed_target(1.7, 1.71, 1.8, 1.9, **{f"{SPEEDUP}_low": None}) == "not judged"
    assert timed_target(1.7, 1.71, 1.8, 1.9, **{SPEEDUP: None}) == "not judged"
    adaln = {"kernel": GROUPED, "model": "XL", "layer": "adaLN of all blocks", "rows": 2,
             "width": 1152, "images": 2, "stability": "stable", "status": "ok", "rounds": 3,
             "median_us": 20.0, "median_us_low": 19.0, "median_us_high": 21.0}  # fmt: skip
    assert of_target(TARGETS[4], [adaln], [], "NVIDIA H100").verdict == "holds"
    assert of_target(TARGETS[4], [adaln], [], "NVIDIA A100").note.startswith("set for an H100")
    # A batch that the data sheet forbids in this time is not the target's.
    sheet = [adaln | {"device": "H100 SXM", "least_us": 30.0}]
    assert of_target(TARGETS[4], [adaln], sheet, "NVIDIA H100").verdict == "not judged"


@pytest.mark.parametrize(
    ("fc1", "fc2", "word", "layer"),
    [
        ((1.55, 1.60, 1.65), (1.10, 1.62, 2.40), "undecided", "fc2"),
        ((1.10, 1.40, 1.70), (1.42, 1.45, 1.48), "does not hold", "fc2"),
        ((1.55, 1.60, 1.65), (1.51, 1.62, 1.70), "holds", "fc2"),
    ],
)
def test_a_target_is_met_by_every_call_and_missed_by_one(
    fc1: tuple[float, ...], fc2: tuple[float, ...], word: str, layer: str
) -> None:
    calls = [
        {"kernel": MATMUL, "model": "XL", "layer": name, "rows": 512, "width": 1, "images": 2,
         "stability": "stable", "status": "ok", "rounds": 3,
         f"{SPEEDUP}_low": low, SPEEDUP: value, f"{SPEEDUP}_high": high}
        for name, (low, value, high) in (("fc1", fc1), ("fc2", fc2))
    ]  # fmt: skip
    found = of_target(TARGETS[3], calls, [], "NVIDIA H100")
    assert (found.verdict, found.note) == (word, f"{layer}, 512 rows")
    # A time is met from below: the same intervals mirrored give the same words.
    mirrored = [
        row | {SPEEDUP: None, "median_us": -row[SPEEDUP],
               "median_us_low": -row[f"{SPEEDUP}_high"], "median_us_high": -row[f"{SPEEDUP}_low"]}
        for row in calls
    ]  # fmt: skip
    upper = replace(TARGETS[3], column="median_us", bound=-1.5)
    assert of_target(upper, mirrored, [], "NVIDIA H100").verdict == word


def test_a_time_of_older_code_is_told_from_one_without_a_baseline() -> None:
    row = {"kernel": MATMUL, "model": "XL", "layer": "fc2", "rows": 512, "width": 4608,
           "images": 2, "stability": "stable", "status": "ok", "rounds": 3}  # fmt: skip
    target = replace(TARGETS[3], layers=("fc2",))
    for more, note in (
        ({SPEEDUP: 1.8}, "fc2: measured by older code, without an interval"),
        ({SPEEDUP: None}, "fc2: its baseline or ceiling has no time"),
        ({"status": "wrong"}, "fc2: wrong"),
    ):
        found = of_target(target, [row | more], [], "NVIDIA H100")
        assert (found.verdict, found.note) == ("not judged", note)


@pytest.mark.gpu
def test_on_a_gpu_our_kernels_are_right_and_timed(tmp_path: Path) -> None:
    run, rows = perform(
        configure("kernels.autotune=false", "kernels.round_ms=20"), tmp_path, "cuda"
    )
    assert len(rows) == 17
    for row in rows:
        assert row["status"] == "ok", row
        assert row["median_us"] > 0
    (ceilings,) = table(run, "ceilings")
    assert float(ceilings["copy_gb_s"]) > 100
