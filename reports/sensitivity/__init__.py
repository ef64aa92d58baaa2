"""The report's section on `study sensitivity`: answer, agreement, evidence and caveats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.loading import RunData
from reports.sensitivity import figures, story, tables
from reports.study_tables import StudyRun, study_runs

TEMPLATE = "sensitivity.html"
PARTS = (("sensitivity", "Sensitivity"), ("sensitivity-caveats", "Sensitivity: caveats"))


def sensitivity_runs(runs: Sequence[RunData]) -> list[StudyRun]:
    return study_runs(runs, "sensitivity", ("metrics", "truth", "agreement", "verdicts"))


def sensitivity_view(study: StudyRun) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    targets = study.distinct("agreement", "target")
    agreements = [tables.agreement_table(study, target) for target in targets]
    return {
        "study": study,
        "headline": story.answer(study),
        "points": story.points(study),
        "verdicts": tables.verdict_table(study),
        "agreement": agreements[0],
        "other_agreements": agreements[1:],
        "recovered": tables.recovered_table(study),
        "by_steps": figures.steps_chart(study),
        "scatter": figures.scatter_chart(study),
        "ranks": figures.rank_chart(study),
        "rank_bits": story.usual_bits(study),
        "truth": figures.truth_chart(study),
        "truth_note": story.truth_note(study),
        "timesteps": figures.timestep_chart(study),
        "additivity": figures.additivity_chart(study),
        "additivity_words": story.additivity_words(study),
        "caveats": story.caveats(study),
    }


def sensitivity_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [sensitivity_view(study) for study in sensitivity_runs(runs)]
