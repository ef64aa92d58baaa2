"""The report's section on `study kernels`: are the kernels right, and how near to the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.kernels import figures, story, tables
from reports.kernels.data import KernelRun, is_timed, models, timed_models
from reports.loading import RunData
from reports.study_tables import study_runs

TEMPLATE = "kernels.html"
PARTS = (("kernels", "Kernels"), ("kernels-caveats", "Kernels: caveats"))


def kernel_runs(runs: Sequence[RunData]) -> list[KernelRun]:
    """Finished runs that checked kernels, in the interpreter or on a device."""
    found = study_runs(runs, "kernels", ("roofline",))
    has_checks = [s for s in found if s.tables.get("kernels") or s.tables.get("kernel_checks")]
    return [KernelRun(study.run, study.tables) for study in has_checks]


def kernel_view(study: KernelRun) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    return {
        "study": study,
        "timed": is_timed(study),
        "headline": story.answer(study),
        "targets": tables.target_table(study),
        "checks": tables.check_table(study),
        "roofline": figures.roofline_chart(study),
        "roofline_words": figures.roofline_caption(study),
        "least": [(m, t) for m in models(study) if (t := tables.least_table(study, m))],
        "ceilings": story.ceiling_words(study),
        "timings": [
            {
                "model": model,
                "chart": figures.share_chart(study, model),
                "table": tables.timing_table(study, model),
                "peers": tables.peer_table(study, model),
                "absent": tables.absent_words(study, model),
            }
            for model in timed_models(study)
        ],
        "caveats": story.caveats(study),
    }


def kernel_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [kernel_view(study) for study in kernel_runs(runs)]
