"""What a judged claim is, and the rule: for those who print it and need no model or config."""

from __future__ import annotations

from dataclasses import dataclass

from robuq_bench.statistics.verdicts import Verdict

STUDY = "train-and-eval"
NEAR_TEACHER = 1.2
"""A student whose FID is at most this many times its teacher's has come near it."""

RULE = (
    "Effects are ratios of geometric means (of two arms, or of two such ratios) over the training "
    "seeds and image ranges that all arms have, by the rule of comparisons of plans. “Holds” "
    "follows from the word that was expected beforehand: better or worse where the comparison says "
    "so, equivalent where the interval lies within the margin. It does not hold where the "
    "comparison says otherwise; of equivalence, where the interval lies wholly outside of the "
    "margin. A claim is not judged before all of its declared seeds are there, nor with a run that "
    "failed, nor where some of its arms have a tuned learning rate and others have not. Families "
    "are corrected as declared: what is not judged yet counts as p = 1."
)


@dataclass(frozen=True)
class Judged:
    """A claim on one workload at one budget, judged.

    key: of the claim in the file; `steps` of training, 0 for verdicts of studies.
    verdict: of the contrast, after correction within the family.
    holds: "holds", "does not hold", "undecided" or "not judged".
    runs: names of the run folders; commits: of the code that made them, each once.
    cpu_hours: of the runs, as they recorded; None where one did not, and for verdicts of studies.
    declared: whether the claim stood in the file before its runs; see `history`.
    """

    key: str
    text: str
    workload: str
    steps: int
    family: str
    metric: str
    contrast: str
    expect: str
    verdict: Verdict
    holds: str
    cpu_hours: float | None
    runs: tuple[str, ...]
    commits: tuple[str, ...]
    declared: str
