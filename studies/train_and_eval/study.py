"""The main job: quantize a teacher by a plan, train it, allocate its bits, and judge it.

Steps, in the order of the run: load what can fail (data, metric reference, teacher); have the
teacher's own run, which all plans of a workload share; convert; where the plan allocates bits by a
metric, train `sensitivity_steps` at the warm-up bits, measure every layer's sensitivity and solve;
train `training.steps` at the final bits, as many as any other plan; evaluate the averaged weights;
account.

At the switch from the warm-up the weights stay. Optimizer, averages and learning rate begin anew,
on the batches of step 0 on, as in a plan without a warm-up; the warm-up has batches of its own. It
is more training than other plans get, so its steps and seconds stand beside the plan; to hold them
against a gain, compare with a plan of as many steps in all.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from robuq_bench.accounting.account import account
from robuq_bench.accounting.layers import check_plan
from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config, config_for, sensitivity_steps, training_steps
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import CheckpointError
from robuq_bench.judging.evaluation import (
    evaluate_samples,
    validation_losses,
)
from robuq_bench.judging.summary import metric_summary
from robuq_bench.judging.teacher import Judged, judge_teacher, load_judged
from robuq_bench.qat import convert_teacher, training_of
from robuq_bench.quantization.convert import (
    layer_type,
    set_activation_bits,
)
from robuq_bench.resumable import resume, train_with_checkpoints
from robuq_bench.runs.run import Run, open_existing, run_folder
from robuq_bench.runs.study import run_study
from robuq_bench.stopwatch import Stopwatch
from robuq_bench.students import save_student
from studies.train_and_eval.allocated_bits import activation_bits, allocated_weight_bits

VERSION = "3"
SUMMARY = "Train a quantized model by a plan and judge it against its teacher."
WARMUP = "warmup"
LOCK_WAIT_S = 3600.0  # for a teacher that another job is sampling


def check(config: Config) -> None:
    """Refuse a plan that does not fit the workload's model, or whose bits no method says."""
    check_plan(config.plan, config.workload)


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Train and judge the student; one row per subject."""
    started = time.perf_counter()
    workload, plan = config.workload, config.plan
    if not plan.is_full_precision:
        steps = training_steps(config)
        context.progress.log(
            f"plan {plan.name}: {steps} QAT steps"
            if steps
            else f"plan {plan.name}: post-training quantization, no QAT step"
        )
    judged = load_judged(workload, context.device)
    teacher, data = judged.teacher, judged.data
    teacher_run = teacher_eval(config, run, context, judged)
    judged.record_inputs(teacher_run, workload)
    resumed = bool(run.results())
    run.add_input_digest("teacher", judged.teacher_sha256)
    judged.record_inputs(run, workload)
    copy_teacher_rows(teacher_run, run)
    copy_real_images(teacher_run, run)
    student: nn.Module = teacher
    bits: dict[str, int] | None = None
    if plan.is_full_precision:
        copy_teacher_rows(teacher_run, run, subject="student")
    else:
        student, bits = train_student(config, run, context, teacher, data)
        evaluate_samples(
            student,
            workload,
            run,
            context,
            subject="student",
            judged=judged,
        )
    if not run.has("validation"):
        losses = validation_losses(student, teacher, data, workload, context.device, judged.heldout)
        run.append("validation", kind="validation", **losses)
    if not run.has("accounting"):
        run.append("accounting", kind="accounting", **account(workload.model, plan, bits))
    if not run.has("timing"):
        seconds = round(time.perf_counter() - started, 1)
        run.append("timing", kind="timing", total_s=seconds, resumed=resumed, **costs(config, run))
    write_outputs(run)
    return summary_table(run)


def teacher_eval(config: Config, run: Run, context: Context, judged: Judged) -> Run:
    """The finished teacher-eval run of this workload beside `run`, computing what is missing.

    Two jobs that start together share it: the second waits for the first's lock.

    Raises:
        CheckpointError: it is damaged, or was measured on other data or features.
    """
    root, own = run.path.parents[1], config_for("teacher-eval", config)

    def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
        return judge_teacher(config.workload, run, context, judged)

    context = replace(context, force=False)
    try:
        result = run_study(own, root, context, wait_s=LOCK_WAIT_S, measure=measure)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It is the teacher's own run, which --force of this command leaves alone: "
            f"remove {run_folder(root, own)} to have it made anew"
        ) from error
    return open_existing(result.path)


def train_student(
    config: Config, run: Run, context: Context, teacher: nn.Module, data: ImageData
) -> tuple[nn.Module, dict[str, int]]:
    """Convert, calibrate, allocate and train; return the model with averaged weights, and its bits.

    Bits are those that the plan allocates: of activations, or of weights.
    """
    plan = config.plan
    steps = training_steps(config)
    recipe = config.workload.training.model_copy(update={"steps": steps})
    config = config.model_copy(
        update={"workload": config.workload.model_copy(update={"training": recipe})}
    )
    states = run.path / "checkpoints" / "calibration"
    weight_bits: dict[str, int] = {}
    if plan.bits is not None and plan.bits.of == "weight":
        weight_bits = allocated_weight_bits(config, run, context, teacher, data)
        states = states / "allocated"
    if steps == 0:
        student = converted(config, run, context, teacher, data, states, weight_bits)
        if not weight_bits:
            set_activation_bits(
                student, activation_bits(config, run, context, student, teacher, data)
            )
        student.eval()
    else:
        student = trained(config, run, context, teacher, data, states, weight_bits)
    bits = dict((run.get("allocation") or {}).get("bits_by_layer", {}))
    save_student(run, config, student, bits)
    return student, bits


def converted(
    config: Config,
    run: Run,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    states: Path,
    weight_bits: dict[str, int],
) -> nn.Module:
    """The student to be trained; what it took to calibrate it is recorded once."""
    watch = Stopwatch()
    student = convert_teacher(config, context, teacher, data, states, weight_bits)
    if config.plan.needs and not run.has("calibration"):
        run.append("calibration", kind="calibration", **watch.lap())
    return student


def trained(
    config: Config,
    run: Run,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    states: Path,
    weight_bits: dict[str, int],
) -> nn.Module:
    """QAT: warm up and allocate activation bits where the plan does, train; averaged weights."""
    student = converted(config, run, context, teacher, data, states, weight_bits)
    folder = run.path / "checkpoints"
    warmup, training = CheckpointStore(folder / "warmup"), CheckpointStore(folder / "training")
    if not weight_bits:
        steps = sensitivity_steps(config)
        if steps and not training.steps():  # whose checkpoints hold all that the warm-up gave
            trainer, source, loss = training_of(
                student, config, context, teacher, data, stream="warmup"
            )
            resume(trainer, warmup)
            train_with_checkpoints(
                trainer, source, loss, steps, run, warmup, context, phase=WARMUP, begins_at=-steps
            )
        set_activation_bits(student, activation_bits(config, run, context, student, teacher, data))
    trainer, source, loss = training_of(student, config, context, teacher, data)
    resume(trainer, training)
    train_with_checkpoints(
        trainer, source, loss, trainer.recipe.steps, run, training, context, phase="qat"
    )
    warmup.clear()
    trainer.copy_ema_to(student)
    return student.eval()


def costs(config: Config, run: Run) -> dict[str, float]:
    """Seconds and CPU seconds of each part of the run over all its sessions, and warm-up steps."""
    sums: dict[str, float] = {}
    for record in run.results():
        if "source_run" in record:  # a teacher's metrics cost its own run
            continue
        if record["kind"] == "train":
            part, prefix = (WARMUP if record["phase"] == WARMUP else "training"), ""
        elif record["kind"] in ("sensitivity", "calibration"):
            part, prefix = record["kind"], ""
        elif record["kind"] == "metrics":
            part, prefix = "sampling", "sample_"
        else:
            continue
        for unit, field in (("s", "seconds"), ("cpu_s", "cpu_seconds")):
            name = f"{part}_{unit}"
            sums[name] = sums.get(name, 0.0) + record[f"{prefix}{field}"]
    sums["cpu_s"] = sum(value for name, value in sums.items() if name.endswith("_cpu_s"))
    found = {name: round(value, 3) for name, value in sums.items()}
    if f"{WARMUP}_s" in sums:
        found["warmup_steps"] = sensitivity_steps(config)
    return found


def copy_teacher_rows(teacher_run: Run, run: Run, subject: str = "teacher") -> None:
    """Cite the teacher's metrics (same seeds, N, sampler) and grid in this run."""
    for record in teacher_run.results():
        if record["kind"] != "metrics":
            continue
        key = f"metrics/{subject}/{record['seed_range']}"
        if not run.has(key):
            fields = {k: v for k, v in record.items() if k not in ("key", "subject")}
            run.append(key, subject=subject, source_run=teacher_run.id, **fields)
    grid = teacher_run.path / "samples" / "grid-teacher.png"
    if grid.exists():
        run.write_bytes(f"samples/grid-{subject}.png", grid.read_bytes())


def copy_real_images(teacher_run: Run, run: Run) -> None:
    """Cite what real images scored in place of samples in this run."""
    for record in teacher_run.results():
        if record["kind"] in ("floor", "classifier") and not run.has(record["key"]):
            run.append(**record, source_run=teacher_run.id)


def summary_table(run: Run) -> list[dict[str, Any]]:
    """One row per subject: mean over the seed ranges of every metric, with N and ranges."""
    records = run.results()
    rows = {subject: metric_summary(records, subject) for subject in ("teacher", "student")}
    return [{"subject": subject, **row} for subject, row in rows.items() if row]


def write_outputs(run: Run) -> None:
    """Write the tidy tables and figures of a finished job from its records alone."""
    # Here, since drawing takes seconds to import, which checks and dry runs need not wait for.
    from robuq_bench.loss_figure import plot_losses
    from studies.train_and_eval.figures import plot_allocation

    records = run.results()
    metrics = [
        {k: v for k, v in record.items() if k not in ("key", "kind")}
        for record in records
        if record["kind"] == "metrics"
    ]
    run.write_table("metrics", metrics)
    losses = [record for record in records if record["kind"] == "train"]
    if losses:
        run.write_table(
            "losses", [{k: v for k, v in r.items() if k not in ("key", "kind")} for r in losses]
        )
        plot_losses(losses).save(run.figure_path("losses"))
    allocation = run.get("allocation")
    if allocation is not None:
        run.write_table(
            "allocation",
            [
                {
                    "layer": layer,
                    "of": allocation.get("of", "activation"),
                    "layer_type": layer_type(layer),
                    "bits": bits,
                    "macs": allocation["macs"][layer],
                }
                for layer, bits in allocation["bits_by_layer"].items()
            ],
        )
        plot_allocation(allocation).save(run.figure_path("allocation"))
