"""The ground truth of sensitivity: train with one layer at b bits, and look at what comes out.

Every item starts from the teacher converted by the plan, sets one layer to b bits (none, for the
baseline), trains `truth_steps` steps with the plan's losses, and is judged by its validation losses
and by samples from the same noise as every other item. Items of one seed see the same batches, so
their differences to the baseline of that seed are paired.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from robuq_bench.config import Config, EvaluationConfig, TrainingConfig
from robuq_bench.context import Context
from robuq_bench.data import ImageData, to_uint8
from robuq_bench.evaluation import load_reference, validation_losses
from robuq_bench.feature_networks import FeatureNetwork
from robuq_bench.features import Features
from robuq_bench.fidelity import Reference, compute_metrics
from robuq_bench.quantization.convert import set_activation_bits
from robuq_bench.run_files import list_runs
from robuq_bench.runs import Run, open_existing
from robuq_bench.sampling import sample_values, shard
from studies.train_and_eval import prepare_training

BASELINE = "none"


class Item(NamedTuple):
    """One training: `layer` (or "none") at `bits`, everything else at the plan's bits."""

    layer: str
    bits: int
    seed: int

    @property
    def key(self) -> str:
        """Its key in the run's records."""
        return f"truth/{self.layer}/{self.bits}/{self.seed}"


class Judge(NamedTuple):
    """What every item is judged with; the teacher's samples come from the same noise."""

    teacher: nn.Module
    data: ImageData
    network: FeatureNetwork
    reference: Features | Reference
    evaluation: EvaluationConfig
    teacher_values: torch.Tensor


def truth_items(layers: list[str], bits: tuple[int, ...], seeds: int, plan_bits: int) -> list[Item]:
    """Every item, seed by seed, so that a stopped study has whole seeds."""
    items = []
    for seed in range(seeds):
        items.append(Item(BASELINE, plan_bits, seed))
        items += [Item(layer, b, seed) for b in bits for layer in layers]
    return items


def make_judge(
    config: Config, context: Context, teacher: nn.Module, data: ImageData, network: FeatureNetwork
) -> Judge:
    """Prepare the reference and the teacher's own samples under the short protocol."""
    options, workload = config.sensitivity, config.workload
    assert options is not None
    evaluation = workload.evaluation.model_copy(
        update={"sampling_steps": options.truth_sampling_steps}
    )
    reference = load_reference(workload, data, network)
    values = torch.empty(0)
    if options.truth_samples:
        short = workload.model_copy(update={"evaluation": evaluation})
        values = sample_values(
            teacher, short, seeds=range(options.truth_samples), device=context.device
        )
    return Judge(teacher, data, network, reference, evaluation, values)


def measure_truth(
    config: Config, run: Run, context: Context, judge: Judge, layers: list[str]
) -> None:
    """Train and judge every item of this shard that neither this run nor another shard has."""
    options = config.sensitivity
    assert options is not None
    items = truth_items(
        layers, options.truth_bits, options.truth_seeds, config.plan.activations.bits
    )
    if options.shard is not None:
        items = list(shard(items, options.shard))
    else:
        for record in sibling_records(run, config):
            if not run.has(record["key"]):
                run.append(**record)
    missing = [item for item in items if not run.has(item.key)]
    with context.progress.task("ground truth", len(items), len(items) - len(missing)) as task:
        for item in missing:
            run.append(
                item.key, kind="truth", **item._asdict(), **train_item(config, context, judge, item)
            )
            task.advance(task.completed + 1)


def train_item(config: Config, context: Context, judge: Judge, item: Item) -> dict[str, Any]:
    """Train one item from the teacher and return its losses and sample metrics."""
    options, workload = config.sensitivity, config.workload
    assert options is not None
    recipe: TrainingConfig = workload.training.model_copy(update={"steps": options.truth_steps})
    own = config.model_copy(
        update={"seed": item.seed, "workload": workload.model_copy(update={"training": recipe})}
    )
    trainer, source, loss_function = prepare_training(own, context, judge.teacher, judge.data)
    student = trainer.model
    if item.layer != BASELINE:
        set_activation_bits(student, {item.layer: item.bits})
    for _ in trainer.train(source, loss_function, recipe.steps):
        pass
    trainer.copy_ema_to(student)
    student.eval()
    result: dict[str, Any] = validation_losses(
        student, judge.teacher, judge.data, workload, context.device
    )
    if options.truth_samples:
        short = workload.model_copy(update={"evaluation": judge.evaluation})
        values = sample_values(
            student, short, seeds=range(options.truth_samples), device=context.device
        )
        result["sample_mse"] = float((values - judge.teacher_values).square().mean())
        images = to_uint8(values)
        metrics = compute_metrics(
            judge.network.extract(images, workload.evaluation.batch_size),
            judge.reference,
            judge.network.suffix,
        )
        result |= {k: v for k, v in metrics.items() if k.startswith("fid")}
    return result


def sibling_records(run: Run, config: Config) -> Iterator[dict[str, Any]]:
    """Ground-truth records of runs that differ from this one in `sensitivity.shard` alone."""
    root = Path(run.path).parents[1]
    for summary in list_runs(root):
        if summary.path == run.path or summary.path.parent.name != config.study:
            continue
        other = open_existing(summary.path)
        theirs = other.config.sensitivity
        if theirs is None or theirs.shard is None:
            continue
        same = other.config.model_copy(
            update={"sensitivity": theirs.model_copy(update={"shard": None})}
        )
        if same == config:
            yield from (
                {**record, "source_run": other.id}
                for record in other.results()
                if record["kind"] == "truth"
            )
