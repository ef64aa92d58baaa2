"""The student of a finished training, written to its run and built again from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.config import Config, Plan, Workload, modern_plan
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.models.checkpoints import check_weights
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.bits import BITS_KEY
from robuq_bench.quantization.convert import quantize_, quantized_layers, set_activation_bits
from robuq_bench.quantization.linear import rename_old_state
from robuq_bench.runs.run import Run, open_existing

STUDENT_FILE = Path("checkpoints") / "student-ema.safetensors"


def save_student(run: Run, config: Config, student: nn.Module, bits: dict[str, int]) -> None:
    """Write the student with what is needed to build it again."""
    of = "activation" if config.plan.bits is None else config.plan.bits.of
    activations = {
        name: layer.activation_bits
        for name, layer in quantized_layers(student).items()
        if layer.activation_bits is not None
    }
    save_tensors(
        run.path / STUDENT_FILE,
        {name: value.contiguous() for name, value in student.state_dict().items()},
        {
            "format": "robuq-bench student (fake-quantized, averaged weights)",
            "run": run.id,
            "plan": config.plan.model_dump_json(),
            "model": config.workload.model.model_dump_json(),
            "bits_by_layer": json.dumps(activations, sort_keys=True),
            "weight_bits_by_layer": json.dumps(bits if of == "weight" else {}, sort_keys=True),
        },
    )


class StudentFile(NamedTuple):
    """What a train-and-eval run stored of its student, and the run."""

    run: Run
    plan: Plan
    bits: dict[str, int]
    weight_bits: dict[str, int]
    tensors: dict[str, Tensor]


def read_student(run_path: Path, workload: Workload) -> StudentFile:
    """The stored student of a train-and-eval run, whose model is that of `workload`.

    Raises:
        UsageError: the run trained no student, or one of another model or of a teacher with other
            outliers.
        CheckpointError: the run is unfinished, or its file is damaged.
    """
    run = open_existing(run_path)
    path = run.path / STUDENT_FILE
    if run.config.plan.is_full_precision:
        raise UsageError(f"{run.id} trained no student; leave out --checkpoint for the teacher")
    own = run.config.workload
    if own.model != workload.model:
        raise UsageError(
            f"{run.id} was trained on workload {own.name!r}, whose model is not that of "
            f"{workload.name!r}; name its workload with --on"
        )
    # Their function is the same, but not what its layers see.
    if own.teacher.outliers != workload.teacher.outliers:
        raise UsageError(
            f"{run.id} was trained on workload {own.name!r}, whose teacher.outliers "
            f"({_outliers_of(own)}) are not those of {workload.name!r} ({_outliers_of(workload)}); "
            "name its workload with --on"
        )
    tensors, metadata = load_tensors(path)
    try:
        plan = Plan.model_validate(modern_plan(json.loads(metadata["plan"])))
        bits = json.loads(metadata["bits_by_layer"])
        weight_bits = json.loads(metadata.get("weight_bits_by_layer", "{}"))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say its plan and bits as this version does; begin its run anew "
            "with --force"
        ) from error
    return StudentFile(run, plan, bits, weight_bits, tensors)


def _outliers_of(workload: Workload) -> str:
    outliers = workload.teacher.outliers
    return outliers.model_dump_json() if outliers else "none"


def load_student(run_path: Path, workload: Workload) -> nn.Module:
    """Rebuild the averaged-weights student of a train-and-eval run, fake-quantized, on the CPU.

    Raises:
        UsageError: as `read_student`.
        CheckpointError: the run is unfinished, or its weights are damaged or of another model.
    """
    run, plan, bits, weight_bits, tensors = read_student(run_path, workload)
    path = run.path / STUDENT_FILE
    model = DiT.from_config(workload.model)
    quantize_(model, plan, blank=True, weight_bits_by_layer=weight_bits)
    set_activation_bits(model, bits)
    # Runs of before kept the bits in the metadata alone.
    for name in quantized_layers(model):
        rename_old_state(tensors, f"{name}.")
    expected = {
        name: value
        for name, value in model.state_dict().items()
        if name in tensors or not name.endswith(f".{BITS_KEY}")
    }
    try:
        check_weights(expected, tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {error}; it belongs to another model than --on names"
        ) from error
    model.load_state_dict(tensors, strict=False)
    return model
