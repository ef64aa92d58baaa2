"""The teacher's own row: full-precision samples under a workload's protocol, measured once.

Every plan of a workload is compared with the same teacher at the same N, seeds, sampler and
steps, so this run is shared: its folder is named by the workload alone.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from robuq_bench.config import Config, TrainingConfig, load_plan
from robuq_bench.context import Context, RunResult
from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import CheckpointError
from robuq_bench.judging.evaluation import evaluate_samples, record_inputs
from robuq_bench.judging.feature_networks import FeatureNetwork
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import Reference
from robuq_bench.runs.run import Run, open_existing, run_folder

VERSION = "2"
SUMMARY = "Sample and measure a workload's full-precision teacher."
LOCK_WAIT_S = 3600.0
NO_TRAINING = TrainingConfig(steps=0, batch_size=1, learning_rate=1.0)


def run_teacher_eval(
    config: Config,
    root: Path,
    context: Context,
    teacher: nn.Module,
    network: FeatureNetwork,
    reference: Features | Reference,
    data: ImageData,
) -> Run:
    """Return the finished teacher-eval run of this workload, computing what is missing.

    Two jobs that start together share it: the second waits for the first's lock.

    Raises:
        CheckpointError: there is one, but measured on other data or features.
    """
    # The QAT budget does not touch the teacher: it must not be part of the folder's hash.
    workload = config.workload.model_copy(update={"training": NO_TRAINING})
    own = config.model_copy(
        update={
            "plan": load_plan("fp"),
            "workload": workload,
            "seed": 0,
            "study": "teacher-eval",
            "study_version": VERSION,
        }
    )
    try:
        opened = Run.open(
            root,
            own,
            context.argv,
            wait_s=LOCK_WAIT_S,
            device=context.device,
            threads=context.threads,
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It is the teacher's own run, which --force of this command leaves alone: "
            f"remove {run_folder(root, own)} to have it made anew"
        ) from error
    with opened as run:
        record_inputs(run, config.workload, data, network)
        if not run.is_done:
            rows = evaluate_samples(
                teacher,
                config.workload,
                run,
                context,
                subject="teacher",
                network=network,
                reference=reference,
            )
            RunResult.store(run, rows, {"run": run.id})
            run.finish()
        path = run.path
    return open_existing(path)
