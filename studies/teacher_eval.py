"""The teacher's own row: full-precision samples under a workload's protocol, measured once.

Every plan of a workload is compared with the same teacher at the same N, seeds, sampler and
steps, so this run is shared: its folder is named by the workload alone. Samples that come with a
packaged teacher are judged here, not drawn; `--set evaluation.sample_teacher=true` draws them anew.
Real images are judged in place of samples too (`judging/real_images.py`): what no model beats.
"""

from __future__ import annotations

from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.judging.teacher import judge_teacher, load_judged
from robuq_bench.runs.run import Run

VERSION = "3"
SUMMARY = "Sample and measure a workload's full-precision teacher."
USES_PLAN = False
USES_TRAINING = False


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Sample and judge the teacher; one row per seed range."""
    workload = config.workload
    return judge_teacher(workload, run, context, load_judged(workload, context.device))
