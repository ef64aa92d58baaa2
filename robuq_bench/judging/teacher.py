"""A workload's teacher with what it is judged by, and its own row: what plans are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from robuq_bench.config import Workload
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.judging.evaluation import (
    evaluate_samples,
    load_reference,
    record_inputs,
    seed_ranges,
)
from robuq_bench.judging.feature_networks import load_feature_network
from robuq_bench.judging.neighbours import TrainingImages
from robuq_bench.judging.real_images import (
    Floor,
    RealImages,
    classifier_record,
    draw_real_images,
)
from robuq_bench.judging.shipped_samples import SAMPLE_ANEW, shipped_samples
from robuq_bench.judging.spaces import FeatureSpace, evaluations
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.runs.run import Run


@dataclass(frozen=True)
class Judged:
    """What a job loads before it computes: everything of a workload that can be missing.

    Attributes:
        data, heldout: training images, and those that no training sees, where there are any.
        spaces: the feature space that orders plans, and a second where the workload names one.
        real: real images to be judged as samples are, where there are enough.
        teacher, teacher_sha256: the model and the digest of its weights.
    """

    data: ImageData
    heldout: ImageData | None
    spaces: tuple[FeatureSpace, ...]
    real: RealImages | None
    teacher: nn.Module
    teacher_sha256: str

    @cached_property
    def floors(self) -> dict[str, Floor]:
        """By the suffix of a space: what its samples are compared with as real images are."""
        real = self.real
        return {s.network.suffix: Floor(s, real) for s in self.spaces} if real else {}

    @cached_property
    def training(self) -> TrainingImages | None:
        """The training images as samples may be near to them, where there is something to say."""
        return TrainingImages(self.data, self.spaces[0], self.real) if self.real else None

    def record_inputs(self, run: Run, workload: Workload) -> None:
        """Record by SHA-256 what a run is measured on; see `evaluation.record_inputs`."""
        networks = [space.network for space in self.spaces]
        record_inputs(run, workload, self.data, *networks, heldout=self.heldout)


def load_judged(workload: Workload, device: str) -> Judged:
    """Load a workload's data, metric and teacher.

    Raises:
        RobuqError: one of them is missing, damaged or does not fit the others.
    """
    data = load_dataset(workload.data, name=workload.name)
    heldout = load_heldout(workload.data, name=workload.name)
    spaces = []
    for part in evaluations(workload):
        network = load_feature_network(part.evaluation, device=device)
        reference = load_reference(part, data, network)
        batch_size = workload.evaluation.batch_size
        spaces.append(FeatureSpace(network, reference, data, heldout, batch_size))
    if len({space.network.suffix for space in spaces}) < len(spaces):
        raise UsageError(
            "evaluation.second_features hold the network of evaluation.features; name another one"
        )
    count, classes = workload.evaluation.num_samples, workload.model.num_classes
    real = draw_real_images(data, heldout, count, classes)
    return Judged(data, heldout, tuple(spaces), real, *load_teacher(workload, device))


def judge_teacher(
    workload: Workload, run: Run, context: Context, judged: Judged
) -> list[dict[str, Any]]:
    """Sample the teacher and measure it, into `run`; one row per seed range.

    Beside it real images are judged in place of samples, and the classifiers on real images:
    records `floor/<draw>` and `classifier/<features>`.

    On a CPU, samples that come with a packaged teacher are judged in place of new ones if they are
    of exactly this protocol; the run says so. A run that has begun goes on with samples of the
    origin that it began with.

    Raises:
        CheckpointError: it began with samples that no longer come with the teacher.
    """
    judged.record_inputs(run, workload)
    judge_real_images(workload, run, context, judged)
    known = (run.get(f"metrics/teacher/{i}") for i in range(workload.evaluation.seed_ranges))
    begun = next((record for record in known if record), None)
    shipped = None
    # On other devices sampling is short, and rounds in its own way.
    wanted = context.device == "cpu" if begun is None else "samples" in begun
    if wanted and seed_ranges(workload, run.config.seed)[0].start == 0:  # as shipped samples do
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
        judged=judged,
        shipped=shipped,
    )


def judge_real_images(workload: Workload, run: Run, context: Context, judged: Judged) -> None:
    """Record what real images score in place of samples, unless the run has it."""
    classes = workload.model.num_classes
    for space in judged.spaces:
        key, found = f"classifier/{space.network.name}", classifier_record(space, classes)
        if found is not None and not run.has(key):
            run.append(key, kind="classifier", **found)
    if judged.real is None:
        context.progress.log("real images stand beside no FID: latents, or too few of some class")
        return
    for index, draw in enumerate(judged.real.draws):
        if not run.has(f"floor/{index}"):
            record = judged.real.record(draw, judged.spaces)
            run.append(f"floor/{index}", kind="floor", draw=index, **record)
