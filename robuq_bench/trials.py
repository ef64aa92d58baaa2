"""Short trainings that differ in activation bits alone, judged alike: what studies compare.

Every trial starts from the teacher converted by the plan, trains with the plan's losses, and is
judged by its validation losses and by samples from the same noise as every other trial of its seed.
Trials of one seed see the same batches, so their differences are paired. Another seed has other
image seeds where the workload's `evaluation.image_seeds` is "own", else the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from robuq_bench.config import Config, Workload
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout, to_uint8
from robuq_bench.errors import ConfigError, RobuqError, UsageError
from robuq_bench.judging.evaluation import (
    load_reference,
    record_inputs,
    seed_ranges,
    validation_losses,
)
from robuq_bench.judging.feature_networks import FeatureNetwork, load_feature_network
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import Reference, compute_fid
from robuq_bench.judging.sampling import sample_values
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.qat import prepare_training
from robuq_bench.quantization.bits import check_bits
from robuq_bench.quantization.convert import set_activation_bits
from robuq_bench.runs.run import Run, open_existing
from robuq_bench.runs.run_files import run_folders
from robuq_bench.stopwatch import Stopwatch

_LOG = logging.getLogger(__name__)
#: What can be worse in a trained network; every one is "lower is better".
TARGETS = ("distillation_loss", "denoising_loss", "sample_mse", "fid")
#: The distillation loss of a trial at its bits before its first step.
UNTRAINED = "untrained_distillation_loss"


@dataclass(frozen=True, eq=False)
class Judge:
    """What every trial is judged with.

    Attributes:
        workload: with the short sampling protocol: one range of `num_samples` (0: none) images for
            each set of image seeds.
        heldout: images for the validation losses, the training images where None.
    """

    teacher: nn.Module
    data: ImageData
    network: FeatureNetwork
    reference: Features | Reference
    workload: Workload
    heldout: ImageData | None = None
    _drawn: dict[range, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def image_seeds(self, training_seed: int) -> range:
        """Image seeds that every trial of a training seed is sampled from."""
        return seed_ranges(self.workload, training_seed)[0]

    def teacher_values(self, image_seeds: range, device: str) -> torch.Tensor:
        """What the teacher draws from these seeds, [samples, C, H, W]; drawn once."""
        if image_seeds not in self._drawn:
            self._drawn[image_seeds] = sample_values(
                self.teacher, self.workload, seeds=image_seeds, device=device
            )
        return self._drawn[image_seeds]


def check_choices(config: Config, choices: Sequence[int], setting: str) -> None:
    """Refuse a plan whose layers cannot take these activation bits.

    Args:
        config: its plan is asked.
        choices: bit widths that layers will be trained at.
        setting: where `choices` come from, such as "allocation.choices".

    Raises:
        UsageError: the plan allocates bits itself, no layer has bits to choose, or a method does
            not take one of them; names plan, method and the bits that all of its methods take.
    """
    plan = config.plan
    if plan.bits is not None:
        raise UsageError(
            f"study {config.study} sets bits itself, and plan {plan.name!r} allocates its own; "
            "name a plan with the same bits in every layer, such as --plan a4"
        )
    methods = [rule.activation for rule in plan.layers if rule.has_choice("activation")]
    if not methods:
        raise UsageError(
            f"study {config.study} changes activation bits, and no layer of plan {plan.name!r} has "
            "any to choose; name another, such as --plan a4"
        )
    taken = [bits for bits in choices if all(_takes(method, bits) for method in methods)]
    refused = [bits for bits in choices if bits not in taken]
    if refused:
        names = ", ".join(sorted({repr(method.method) for method in methods if method}))
        raise UsageError(
            f"plan {plan.name!r}: activation method {names} does not take {refused} bits of "
            f"{setting}; --set {setting}={taken}"
        )


def refuse_seed(config: Config) -> None:
    """Refuse a seed of the run where the study has its own, which would only rename the run.

    Raises:
        UsageError: the seed is not 0.
    """
    if config.seed != 0:
        raise UsageError(
            f"study {config.study} trains from seeds of its own, 0 to {config.study}.seeds - 1, "
            f"and would not use --seed {config.seed}; leave it out, or raise {config.study}.seeds"
        )


def _takes(method: Any, bits: int) -> bool:
    try:
        check_bits(bits, method, "")
    except ConfigError:
        return False
    return True


def make_judge(
    config: Config, run: Run, context: Context, samples: int, sampling_steps: int
) -> Judge:
    """Load teacher, data and metric; `samples` are those of a trial, 0 for none."""
    workload = config.workload
    data = load_dataset(workload.data, name=workload.name)
    network = load_feature_network(workload.evaluation, device=context.device)
    teacher, digest = load_teacher(workload, context.device)
    run.add_input_digest("teacher", digest)
    heldout = load_heldout(workload.data, name=workload.name)
    record_inputs(run, workload, data, network, heldout=heldout)
    protocol = {"sampling_steps": sampling_steps, "num_samples": samples, "seed_ranges": 1}
    evaluation = workload.evaluation.model_copy(update=protocol)
    short = workload.model_copy(update={"evaluation": evaluation})
    reference = load_reference(workload, data, network)
    return Judge(teacher, data, network, reference, short, heldout)


def train_trial(
    config: Config,
    context: Context,
    judge: Judge,
    bits_by_layer: Mapping[str, int | None],
    *,
    seed: int,
    steps: int,
    with_untrained: bool = False,
) -> dict[str, Any]:
    """Train `steps` steps with the named layers at these bits (others as the plan says); judge.

    Bits of None are unquantized activations. Its record has `seconds` and `cpu_seconds`, and
    `with_untrained` the loss `UNTRAINED`.
    """
    watch = Stopwatch()
    recipe = config.workload.training.model_copy(update={"steps": steps})
    workload = config.workload.model_copy(update={"training": recipe})
    own = config.model_copy(update={"seed": seed, "workload": workload})
    trainer, source, loss_function = prepare_training(own, context, judge.teacher, judge.data)
    student = trainer.model
    set_activation_bits(student, bits_by_layer)
    before = {}
    if with_untrained:
        before[UNTRAINED] = _losses(student, judge, context)["distillation_loss"]
    for _ in trainer.train(source, loss_function, steps):
        pass
    trainer.copy_ema_to(student)
    return judge_student(student, judge, context, seed=seed) | before | watch.lap()


def _losses(student: nn.Module, judge: Judge, context: Context) -> dict[str, Any]:
    return validation_losses(
        student, judge.teacher, judge.data, judge.workload, context.device, judge.heldout
    )


def judge_student(
    student: nn.Module, judge: Judge, context: Context, *, seed: int
) -> dict[str, Any]:
    """Validation losses; with samples also their MSE to the teacher's, and FID.

    `seed` is that of the training; `image_seed_start` the first image seed.
    """
    student.eval()
    result = _losses(student, judge, context)
    seeds = judge.image_seeds(seed)
    if seeds:
        values = sample_values(student, judge.workload, seeds=seeds, device=context.device)
        of_teacher = judge.teacher_values(seeds, context.device)
        result["image_seed_start"] = seeds.start
        result["sample_mse"] = float((values - of_teacher).square().mean())
        features = judge.network.extract(to_uint8(values), judge.workload.evaluation.batch_size)
        result |= compute_fid(features, judge.reference, judge.network.suffix)
    return result


def metric_key(record: dict[str, Any], target: str) -> str | None:
    """The field of a record that holds the target; None if absent.

    "fid" is called after the workload's features ("fid_digits"). `compute_fid` writes its
    `..._is_rank_deficient` beside it, which tells it from every other field.
    """
    if target != "fid":
        return target if target in record else None
    names = [name for name in record if f"{name}_is_rank_deficient" in record]
    return next((name for name in names if name.split("_")[0] == "fid"), None)


def adopt_shards(run: Run, config: Config, kind: str) -> None:
    """Take over the records of `kind` from runs that differ from this one in their shard alone.

    A run that cannot be read is left out with a warning: what it holds is computed again.
    """
    own: Any = config.settings
    if own.shard is not None:
        return
    for path in run_folders(run.path.parents[1]):
        if path == run.path or path.parent.name != config.study:
            continue
        try:
            other = open_existing(path)
            theirs: Any = other.config.settings
        except RobuqError as error:
            _LOG.warning("run %s is left out, what it holds is computed again: %s", path, error)
            continue
        if theirs is None or theirs.shard is None:
            continue
        whole = other.config.model_copy(
            update={"settings": theirs.model_copy(update={"shard": None})}
        )
        if whole != config:
            continue
        for record in _records(other, kind):
            if not run.has(record["key"]):
                run.append(**record, source_run=other.id)


def _records(run: Run, kind: str) -> Iterator[dict[str, Any]]:
    return (record for record in run.results() if record["kind"] == kind)
