"""The report's section on `study normality`: answer, verdicts, evidence and caveats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.loading import RunData
from reports.normality import bounds, evidence, figures, heatmaps, tables
from reports.normality.claims import RULE
from reports.normality.data import MAIN, WITHOUT_DC, NormalityRun, bits_text, normality_runs
from reports.normality.story import answer, caveats

TEMPLATE = "normality.html"
PARTS = (
    ("normality", "Normality"),
    ("normality-evidence", "Normality: evidence"),
    ("normality-caveats", "Normality: caveats"),
)


def normality_view(study: NormalityRun) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    headline, points = answer(study)
    others = [transform for transform in study.transforms if transform not in MAIN]
    first = [transform for transform in study.transforms if transform in (*MAIN, WITHOUT_DC)]
    rest = [transform for transform in others if transform != WITHOUT_DC]
    widths = evidence.control_widths(study)
    return {
        "study": study,
        "headline": headline,
        "points": points,
        "rule": RULE,
        "outcomes": tables.outcome_table(
            study, first, "Are the activations of every layer type normal enough?"
        ),
        "other_outcomes": tables.outcome_table(study, rest, "The same for the other rotations"),
        "subjects": tables.subjects_table(study),
        "verdicts": tables.verdict_table(study, MAIN, "Verdicts by layer type"),
        "other_verdicts": tables.verdict_table(study, others, "Verdicts of the other rotations"),
        "ratios": figures.ratio_chart(study),
        "heat_ratio": heatmaps.ratio_heatmap(study, study.usual_bits),
        "heat_w": heatmaps.w_heatmap(study),
        "bits": bits_text([study.usual_bits]),
        "examples": [
            (subject, chart)
            for subject in study.subjects
            if (chart := figures.examples_chart(study, subject))
        ],
        "types": tables.types_table(study, MAIN, "Before and after: what a token looks like"),
        "other_types": tables.types_table(
            study, others, "What a token looks like, other rotations"
        ),
        "tests": tables.tests_table(study),
        "errors": tables.errors_table(study),
        "sample_size": figures.sample_size_chart(study),
        "controls_words": evidence.controls_words(study),
        "controls": evidence.controls_table(study, widths[:1], _controls_caption(widths[:1])),
        "other_controls": evidence.controls_table(study, widths[1:], _controls_caption(widths[1:])),
        "lyapunov": bounds.lyapunov_table(study),
        "bound_words": bounds.bound_words(study),
        "bound": bounds.bound_table(study),
        "bound_chart": figures.bound_chart(study),
        "multivariate_words": bounds.multivariate_words(study),
        "multivariate": bounds.multivariate_table(study),
        "projections_words": bounds.projections_words(study),
        "projections": bounds.projections_table(study),
        "decay": figures.decay_chart(study),
        "slopes": bounds.slopes_table(study),
        "channels": bounds.channels_table(study),
        "caveats": caveats(study),
    }


def normality_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [normality_view(study) for study in normality_runs(runs)]


def _controls_caption(widths: Sequence[int]) -> str:
    listed = ", ".join(str(width) for width in widths)
    return f"Controls: tokens whose distribution is known, width {listed}"
