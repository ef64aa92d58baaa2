"""The report's section on `study efficiency`: what the packed model saves, against what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.efficiency import figures, story, tables
from reports.efficiency.data import KINDS, EfficiencyRun, is_measured
from reports.loading import RunData
from reports.study_tables import study_runs

TEMPLATE = "efficiency.html"
PARTS = (("efficiency", "Efficiency"), ("efficiency-caveats", "Efficiency: caveats"))


def efficiency_runs(runs: Sequence[RunData]) -> list[EfficiencyRun]:
    """Finished runs with their tables of exact sizes and of claims."""
    found = study_runs(runs, "efficiency", ("checkpoints", "weights", "claims"))
    return [EfficiencyRun(study.run, study.tables) for study in found]


def efficiency_view(study: EfficiencyRun) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    return {
        "study": study,
        "measured": is_measured(study),
        "headline": story.answer(study),
        "points": story.points(study),
        "rule": story.RULE,
        "factors": tables.factor_table(study),
        "targets": tables.target_table(study),
        "checkpoint_chart": figures.checkpoint_chart(study),
        "checkpoints": tables.checkpoint_table(study),
        "weights": tables.weight_table(study),
        "memory_chart": figures.memory_chart(study),
        "memory": tables.memory_table(study),
        "times": [
            (kind, table) for kind in KINDS if (table := tables.time_table(study, kind)) is not None
        ],
        "ratios": [
            (kind, table)
            for kind in ("peak of a step", *KINDS)
            if (table := tables.ratio_table(study, kind)) is not None
        ],
        "model": tables.model_table(study),
        "caveats": story.caveats(study),
    }


def efficiency_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [efficiency_view(study) for study in efficiency_runs(runs)]
