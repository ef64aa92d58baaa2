"""The main job end to end on a tiny model: results, resume to the bit, second command, honesty."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from robuq_bench import allocation
from robuq_bench.checkpointing import load_tensors
from robuq_bench.config import Config, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.data.datasets import load_dataset
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.judging import teacher
from robuq_bench.judging.feature_networks import load_feature_network
from robuq_bench.judging.kernel_distance import stratified_kid
from robuq_bench.judging.sampling import sample_images
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.progress import Progress
from robuq_bench.qat import convert_teacher, metric_batches, prepare_training
from robuq_bench.quantization.convert import quantized_layers
from robuq_bench.runs.run import Run, open_existing, verify_run
from robuq_bench.runs.study import run_study
from robuq_bench.sensitivity import measure_sensitivity
from robuq_bench.students import load_student
from robuq_bench.training import Trainer
from studies.normality import study as normality
from studies.normality.settings import Settings
from studies.normality.subjects import subjects, untrained_student
from studies.train_and_eval import study as train_and_eval

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workload(tiny_workload: Path) -> Path:
    return tiny_workload


def config_for(workload: Path, plan: str = "a2", seed: int = 0, *overrides: str) -> Config:
    return resolve(
        "train-and-eval", train_and_eval.VERSION, plan, str(workload), seed, list(overrides)
    )


def run_job(config: Config, root: Path) -> RunResult:
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True), argv=["test"])
    return run_study(config, root, context)


def student_digest(path: Path) -> str:
    tensors, _ = load_tensors(path / "checkpoints" / "student-ema.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def finished(workload: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_job(config_for(workload), tmp_path_factory.mktemp("runs"))


def test_normality_of_the_trained_student(
    finished: RunResult, workload: Path, tmp_path: Path
) -> None:
    """`study normality --checkpoint RUN`: its teacher, its plan untrained, and its student."""
    settings = {
        "images": 16, "timesteps": 1, "tokens_per_image": 1, "bootstrap_draws": 100,
        "control_tokens": 16, "control_widths": [36], "bound_tokens": 1, "bound_draws": 100,
        "decay_tokens": 1, "sign_draws": 1,
    }  # fmt: skip
    overrides = [f"normality.{name}={value}" for name, value in settings.items()]
    overrides.append(f"normality.student={json.dumps(str(finished.path))}")
    config = resolve("normality", normality.VERSION, "a2", workload, 0, overrides)
    assert len(config.settings_of(Settings).student_sha256) == 64
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
    with Run.open(tmp_path, config, []) as run:
        rows = normality.measure(config, run, context)
        run.finish()
    assert {row["subject"] for row in rows} == {"teacher", "student before training", "student"}
    constant = pd.read_csv(run.path / "tables/constant.csv")
    shares = constant.groupby("subject")["share"].agg(list)
    assert len({tuple(values) for values in shares}) == 3
    # What no quantized layer feeds is as in the teacher until training moves the embeddings.
    first = constant[constant["layer"] == "blocks.0.adaLN_modulation.1"].set_index("subject")
    share = first["share"]
    assert share["student before training"] == share["teacher"] != share["student"]


def test_normality_of_the_student_alone(
    finished: RunResult, workload: Path, tmp_path: Path
) -> None:
    settings = [
        f"normality.student={json.dumps(str(finished.path))}", 'normality.subjects=["student"]'
    ]  # fmt: skip
    config = resolve("normality", normality.VERSION, "a2", workload, 0, settings)
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
    data = load_dataset(config.workload.data, name="x")
    with Run.open(tmp_path, config, []) as run:
        ((name, model),) = subjects(config, run, context, data)
        assert "teacher" not in run.manifest["inputs"]
        assert name == "student"
        assert len(quantized_layers(model)) > 0
        full, _ = load_teacher(config.workload, "cpu")
        with pytest.raises(UsageError, match=r"began from another teacher .* out of normality"):
            untrained_student(finished.path, config, context, full, data, "0" * 64)


def test_the_run_holds_everything_the_report_needs(finished: RunResult) -> None:
    run = open_existing(finished.path)
    assert run.is_done
    assert verify_run(finished.path) == []
    records = run.results()
    metrics = [record for record in records if record["kind"] == "metrics"]
    assert {(r["subject"], r["seed_start"]) for r in metrics} == {
        ("teacher", 0),
        ("teacher", 130),
        ("student", 0),
        ("student", 130),
    }
    names = ("fid", "sfid", "is", "kid", "precision", "recall")
    assert all(f"{name}_digits" in record for record in metrics for name in names)
    assert "fid" not in metrics[0], "digits features must not pass for Inception's"
    steps = [(r["phase"], r["step"]) for r in records if r["kind"] == "train"]
    # A line every 3 steps and one at the end of each phase: the warm-up ends at 0, and 9 steps
    # are at the final bits, as of any plan.
    assert steps == [("warmup", -1), ("warmup", 0), ("qat", 3), ("qat", 6), ("qat", 9)]
    assert run.get("validation")["distillation_loss"] > 0
    for name in (
        "samples/grid-student.png",
        "samples/grid-teacher.png",
        "tables/metrics.csv",
        "figures/allocation.svg",
        "figures/losses.svg",
    ):
        assert (finished.path / name).stat().st_size > 100


def test_kid_knows_the_classes_of_samples_and_of_the_data(finished: RunResult) -> None:
    workload = open_existing(finished.path).config.workload
    network = load_feature_network(workload.evaluation)
    data = load_dataset(workload.data)
    real = network.extract(data.images).pool
    for record in open_existing(finished.path).results():
        if record["kind"] == "metrics" and record["subject"] == "student":
            with np.load(finished.path / f"samples/student-{record['seed_range']}.npz") as file:
                images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
            labels = torch.arange(record["seed_start"], record["seed_start"] + len(images)) % 10
            expected = stratified_kid(network.extract(images).pool, real, labels, data.labels)
            assert record["kid_digits"] == pytest.approx(expected, rel=1e-6)
            assert record["kid_digits_is_stratified"] == 1


def test_the_allocation_is_optimal_for_the_measured_sensitivities(finished: RunResult) -> None:
    run = open_existing(finished.path)
    record = run.get("allocation")
    table: dict[str, dict[int, float]] = {}
    for row in run.results():
        if row["kind"] == "sensitivity":
            table.setdefault(row["layer"], {})[row["bits"]] = row["mse"]
    assert len(table) == 8
    assert all(set(row) == {1, 2, 3, 4} for row in table.values())
    assert all(row[4] > 0 for row in table.values()), "against the layer unquantized"
    assert record["mean_bits"] <= 2.0
    best = allocation.solve_ampn(table, record["macs"], 2.0)
    assert record["bits_by_layer"] == best.bits_by_layer
    assert record["solver"] == "exact"
    uniform = sum(row[2] for row in table.values())
    assert record["headroom"] == pytest.approx(uniform / record["objective"])
    assert record["headroom"] > 1


def test_a_second_run_of_the_job_is_bit_identical(
    finished: RunResult, workload: Path, tmp_path: Path
) -> None:
    again = run_job(config_for(workload), tmp_path)
    assert student_digest(again.path) == student_digest(finished.path)
    assert again.table == finished.table


@pytest.mark.parametrize(("phase", "stop_at"), [(0, 1), (0, 3), (1, 0), (1, 1), (1, 8)])
def test_resume_after_an_interrupt_is_bit_identical(
    finished: RunResult,
    workload: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: int,
    stop_at: int,
) -> None:
    """In the warm-up (0), at the switch, and in the training at the final bits (1)."""
    train, phases = Trainer.train, itertools.count()

    def interrupted(self, *args):  # type: ignore[no-untyped-def]
        own = next(phases)
        for values in train(self, *args):
            if (own, self.step) == (phase, stop_at + 1):
                raise KeyboardInterrupt
            yield values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(config_for(workload), tmp_path)
    result = run_job(config_for(workload), tmp_path)
    assert student_digest(result.path) == student_digest(finished.path)
    assert result.table == finished.table
    keys = [record["key"] for record in open_existing(result.path).results()]
    assert len(keys) == len(set(keys))
    timing = open_existing(result.path).get("timing")
    assert timing["resumed"] is True
    assert timing["warmup_steps"] == 4
    parts = ("warmup", "sensitivity", "training", "sampling")
    assert timing["cpu_s"] == pytest.approx(sum(timing[f"{part}_cpu_s"] for part in parts))
    assert not list(result.path.glob("checkpoints/warmup/*"))


def test_the_final_bits_are_trained_as_a_plan_without_a_warm_up_is(
    finished: RunResult, workload: Path, tmp_path: Path
) -> None:
    """Same batches and rates: from the warm-up's weights, AMPN's bits train as any others do."""
    run = open_existing(finished.path)
    rates = {r["step"]: r["learning_rate"] for r in run.results() if r.get("phase") == "qat"}
    bits = tmp_path / "bits.csv"
    rows = run.get("allocation")["bits_by_layer"].items()
    bits.write_text("layer,bits\n" + "".join(f"{layer},{b}\n" for layer, b in rows))
    plan = tmp_path / "given.toml"
    plan.write_text(f'extends = "a4"\n[bits]\npath = "{bits}"\n')
    given = open_existing(run_job(config_for(workload, str(plan)), tmp_path).path)
    lines = [r for r in given.results() if r["kind"] == "train"]
    assert {r["step"]: r["learning_rate"] for r in lines} == rates
    assert given.get("allocation")["bits_by_layer"] == run.get("allocation")["bits_by_layer"]
    assert "warmup_steps" not in given.get("timing")


def test_without_a_warm_up_the_untrained_student_is_measured(
    workload: Path, finished: RunResult, tmp_path: Path
) -> None:
    config = config_for(workload, "a2", 0, "bits.steps=0")
    run = open_existing(run_job(config, tmp_path).path)
    assert [r["step"] for r in run.results() if r["kind"] == "train"] == [3, 6, 9]
    table = {(r["layer"], r["bits"]): r["mse"] for r in run.results() if r["kind"] == "sensitivity"}
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
    data, teacher = load_dataset(config.workload.data), load_teacher(config.workload, "cpu")[0]
    student = convert_teacher(config, context, teacher, data)
    layer = "blocks.1.mlp.fc1"
    found = measure_sensitivity(student, [layer], [2], metric_batches(config, context, data))
    assert table[layer, 2] == pytest.approx(found[layer][2], rel=1e-6)


def test_an_interrupted_sensitivity_scan_is_not_measured_twice(
    workload: Path, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Run.append

    def failing(self, key, **fields):  # type: ignore[no-untyped-def]
        if key.startswith("sensitivity/blocks.1.attn.qkv/2"):
            raise KeyboardInterrupt
        append(self, key, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            run_job(config_for(workload), tmp_path)
    appended: list[str] = []

    def counting(self, key, **fields):  # type: ignore[no-untyped-def]
        appended.append(key)
        append(self, key, **fields)

    monkeypatch.setattr(Run, "append", counting)
    result = run_job(config_for(workload), tmp_path)
    measured = [key for key in appended if key.startswith("sensitivity/")]
    assert not any("blocks.0" in key for key in measured)
    assert student_digest(result.path) == student_digest(finished.path)


def test_the_student_can_be_loaded_and_samples_as_recorded(
    finished: RunResult, workload: Path
) -> None:
    config = config_for(workload)
    student = load_student(finished.path, config.workload)
    import numpy as np

    recorded = np.load(finished.path / "samples" / "student-0.npz")["arr_0"]
    images = sample_images(student, config.workload, seeds=range(5)).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - recorded[:5].astype(int)).max() <= 1
    # A model of the same layers and other widths.
    classes = config.workload.model.num_classes + 1
    model = config.workload.model.model_copy(update={"num_classes": classes})
    with pytest.raises(UsageError, match=r"trained on workload 'tiny'.*with --on"):
        load_student(finished.path, config.workload.model_copy(update={"model": model}))


def test_a_student_of_a_teacher_without_outliers_is_none_of_one_with(
    finished: RunResult, workload: Path
) -> None:
    own = config_for(workload).workload
    overrides = [f"normality.student={json.dumps(str(finished.path))}"]
    normality.check(resolve("normality", normality.VERSION, "a2", workload, 0, overrides))
    overrides.append("teacher.outliers.scale=4.0")
    config = resolve("normality", normality.VERSION, "a2", workload, 0, overrides)
    message = r"teacher.outliers \(none\) are not those of 'tiny' \(.*4.0.*with --on"
    with pytest.raises(UsageError, match=message):
        normality.check(config)
    with pytest.raises(UsageError, match=message):
        load_student(finished.path, config.workload)
    assert load_student(finished.path, own)


def test_a_first_run_loads_once_what_its_teacher_run_needs_too(
    workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def count(name: str) -> None:
        load = getattr(teacher, name)

        def counted(*args: Any, **named: Any) -> Any:
            loaded.append(name)
            return load(*args, **named)

        monkeypatch.setattr(teacher, name, counted)

    names = ["load_dataset", "load_feature_network", "load_reference", "load_teacher"]
    for name in names:
        count(name)
    result = run_job(config_for(workload, "fp"), tmp_path)
    assert loaded == names
    assert len(list(tmp_path.glob("teacher-eval/*/DONE"))) == 1
    assert open_existing(result.path).get("metrics/teacher/0")["sample_seconds"] > 0


def test_full_precision_plan_is_the_teacher(workload: Path, finished: RunResult) -> None:
    result = run_job(config_for(workload, "fp"), finished.path.parents[1])
    teacher, student = result.table
    assert {k: v for k, v in teacher.items() if k != "subject"} == {
        k: v for k, v in student.items() if k != "subject"
    }
    assert open_existing(result.path).get("validation")["distillation_loss"] == 0


def test_a_damaged_run_of_the_teacher_is_named(
    finished: RunResult, workload: Path, tmp_path: Path
) -> None:
    (folder,) = (finished.path.parents[1] / "teacher-eval").glob("fp-*")
    copy = shutil.copytree(folder, tmp_path / "teacher-eval" / folder.name)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"remove {copy}"):  # --force is no way out here
        run_job(config_for(workload), tmp_path)


def test_unreachable_budget_fails_before_training(workload: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "bench.py",
        "train-and-eval",
        "--plan",
        "a2",
        "--on",
        str(workload),
        "--set",
        "allocation.mean_bits=0.5",
        "-o",
        str(tmp_path / "runs"),
        "--quiet",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "mean_bits" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_sigkill_then_the_same_command(
    finished: RunResult, workload: Path, tmp_path: Path, bench: Any
) -> None:
    command = [
        sys.executable,
        "bench.py",
        "train-and-eval",
        "--plan",
        "a2",
        "--on",
        str(workload),
        "-o",
        str(tmp_path),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--quiet",
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("train-and-eval/*/checkpoints/training/step-*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert student_digest(Path(document["path"])) == student_digest(finished.path)
    again = bench(*command[2:])
    assert again.code == 0
    assert again.document["was_complete"] is True


def test_the_branch_trains_at_the_rate_of_the_config(workload: Path) -> None:
    def rates(*overrides: str) -> dict[str, float]:
        config = config_for(workload, "a4", 0, *overrides)
        context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True))
        data = load_dataset(config.workload.data)
        teacher = load_teacher(config.workload, "cpu")[0]
        trainer, _, _ = prepare_training(config, context, teacher, data)
        names = {id(p): n for n, p in trainer.parameters.items()}
        return {
            names[id(p)].rpartition(".")[2]: group["rate_ratio"] * group["lr"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }

    assert set(rates().values()) == {1e-3}
    assert set(rates("train.learning_rate=2e-3").values()) == {2e-3}
    own = rates("training.low_rank_learning_rate=3e-5")
    assert own["up"] == own["down"] == pytest.approx(3e-5)
    assert own["weight"] == own["bias"] == 1e-3


@pytest.mark.parametrize("name", ["train-and-eval", "packed"])
def test_a_check_does_not_wait_for_what_draws_and_fits(name: str) -> None:
    code = (
        "import sys; from robuq_bench.config import resolve;"
        "from robuq_bench.runs.study import check_study;"
        "from robuq_bench.study_index import find_study, load_study;"
        f"study = find_study({name!r}); load_study(study);"
        "config = resolve(study.name, study.version, 'a2', 'digits');"
        "study.name == 'packed' or check_study(config);"
        "print({'seaborn', 'matplotlib', 'statsmodels'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")
