"""A workload's teacher with what it is judged by, and its own row: what plans are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from robuq_bench.config import Workload
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset
from robuq_bench.errors import CheckpointError
from robuq_bench.judging.evaluation import evaluate_samples, load_reference, record_inputs
from robuq_bench.judging.feature_networks import FeatureNetwork, load_feature_network
from robuq_bench.judging.fidelity import Reference
from robuq_bench.judging.shipped_samples import SAMPLE_ANEW, shipped_samples
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.runs.run import Run


@dataclass(frozen=True)
class Judged:
    """What a job loads before it computes: everything of a workload that can be missing."""

    data: ImageData
    network: FeatureNetwork
    reference: Reference
    teacher: nn.Module
    teacher_sha256: str


def load_judged(workload: Workload, device: str) -> Judged:
    """Load a workload's data, metric and teacher.

    Raises:
        RobuqError: one of them is missing, damaged or does not fit the others.
    """
    data = load_dataset(workload.data, name=workload.name)
    network = load_feature_network(workload.evaluation, device=device)
    reference = load_reference(workload, data, network)
    return Judged(data, network, reference, *load_teacher(workload, device))


def judge_teacher(
    workload: Workload, run: Run, context: Context, judged: Judged
) -> list[dict[str, Any]]:
    """Sample the teacher and measure it, into `run`; one row per seed range.

    On a CPU, samples that come with a packaged teacher are judged in place of new ones if they are
    of exactly this protocol; the run says so. A run that has begun goes on with samples of the
    origin that it began with.

    Raises:
        CheckpointError: it began with samples that no longer come with the teacher.
    """
    record_inputs(run, workload, judged.data, judged.network)
    known = (run.get(f"metrics/teacher/{i}") for i in range(workload.evaluation.seed_ranges))
    begun = next((record for record in known if record), None)
    shipped = None
    # On other devices sampling is short, and rounds in its own way.
    if context.device == "cpu" if begun is None else "samples" in begun:
        shipped = shipped_samples(workload, judged.teacher_sha256)
    if begun is not None and "samples" in begun and shipped is None:
        raise CheckpointError(
            f"run {run.id} began with {begun['samples']}, which no longer comes with the teacher; "
            f"move {run.path} away to sample all of it"
        )
    if shipped is not None:
        note = f"{shipped.source}, made by: {shipped.origin}; to sample anew: {SAMPLE_ANEW}"
        run.add_input_digest("teacher samples", shipped.sha256, note=note)
        context.progress.log(f"teacher: its samples came with the suite ({note})")
    return evaluate_samples(
        judged.teacher,
        workload,
        run,
        context,
        subject="teacher",
        network=judged.network,
        reference=judged.reference,
        shipped=shipped,
    )
