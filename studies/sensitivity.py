"""Do post-training sensitivities mislead? Metrics against the truth, which is trained."""

from __future__ import annotations

from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data import load_dataset
from robuq_bench.errors import UsageError
from robuq_bench.feature_networks import load_feature_network
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.quantization.convert import allocatable_layers
from robuq_bench.runs import Run
from studies.ground_truth import make_judge, measure_truth
from studies.train_and_eval import prepare_training

VERSION = "1"
SUMMARY = "Do sensitivities of the post-training-quantized model mislead? Metrics against training."


def run(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Measure the truth (or this shard of it), the metrics, and how they agree."""
    options, workload = config.sensitivity, config.workload
    if options is None:
        raise UsageError("study sensitivity needs its settings; resolve the config for it")
    data = load_dataset(workload.data, name=workload.name)
    network = load_feature_network(workload.evaluation, device=context.device)
    teacher, digest = load_teacher(workload, context.device)
    run.add_input_digest("teacher", digest)
    run.add_input_digest("data", data.sha256, source=data.source)
    judge = make_judge(config, context, teacher, data, network)
    trainer, _, _ = prepare_training(config, context, teacher, data)
    layers = allocatable_layers(trainer.model, config.plan)
    measure_truth(config, run, context, judge, layers)
    return []
