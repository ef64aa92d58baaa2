"""The report's section on `study allocation`: what mixed precision is worth, and who chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.allocation import figures, story, tables
from reports.allocation.data import bits_of, budgets, candidates, targets
from reports.loading import RunData
from reports.study_tables import StudyRun, study_runs

TEMPLATE = "allocation.html"
PARTS = (("ampn", "Worth of AMPN"), ("ampn-caveats", "Worth of AMPN: caveats"))


def allocation_runs(runs: Sequence[RunData]) -> list[StudyRun]:
    return study_runs(runs, "allocation", ("trials", "candidates"))


def allocation_view(study: StudyRun) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    return {
        "study": study,
        "headline": story.answer(study),
        "rule": story.RULE,
        "verdicts": tables.verdict_table(study),
        "candidates": [tables.candidate_table(study, budget) for budget in budgets(study)],
        "dots": figures.dot_chart(study, [t for t in story.JUDGED if t in targets(study)]),
        "charts": [
            (f"{float(budget):g}", shown)
            for budget in budgets(study)
            if (
                shown := [
                    (candidate, chart)
                    for candidate in candidates(study)
                    if candidate != "uniform"
                    and (chart := figures.bits_chart(study, candidate, budget))
                ]
            )
        ],
        "resolved": "resolved" in candidates(study) and bool(bits_of(study, "resolved")),
        "types": tables.type_table(study),
        "solvers": tables.solver_table(study),
        "front": figures.front_chart(study),
        "timesteps": tables.timestep_table(study),
        "timestep_words": story.timestep_words(study),
        "caveats": story.caveats(study),
    }


def allocation_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [allocation_view(study) for study in allocation_runs(runs)]
