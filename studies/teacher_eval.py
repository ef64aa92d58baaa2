"""The teacher's own row: full-precision samples under a workload's protocol, measured once.

Every plan of a workload is compared with the same teacher at the same N, seeds, sampler and
steps, so this run is shared: its folder is named by the workload alone.
"""

from __future__ import annotations

from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import load_dataset
from robuq_bench.judging.evaluation import evaluate_samples, load_reference, record_inputs
from robuq_bench.judging.feature_networks import load_feature_network
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.runs.run import Run

VERSION = "2"
SUMMARY = "Sample and measure a workload's full-precision teacher."
USES_PLAN = False
USES_TRAINING = False


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Sample and judge the teacher; one row per seed range."""
    workload = config.workload
    data = load_dataset(workload.data, name=workload.name)
    network = load_feature_network(workload.evaluation, device=context.device)
    reference = load_reference(workload, data, network)
    teacher, _ = load_teacher(workload, context.device)
    record_inputs(run, workload, data, network)
    return evaluate_samples(
        teacher, workload, run, context, subject="teacher", network=network, reference=reference
    )
