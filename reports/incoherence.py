"""Whether rotation helps against outliers: error of students by the size of outliers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reports.generic import claims_of, rule_of, table_fold, whole_tables
from reports.loading import RunData
from reports.page import (
    Block,
    Figures,
    Fold,
    Heading,
    Points,
    Section,
    Sheet,
    claims_sheet,
    sentence,
)
from reports.text import Phrase, joined, plural, times
from robuq_bench.incoherence_figure import CAPTION, at_shared_scales, response_pictures
from robuq_bench.statistics.verdicts import interval_text

ORDER = 45
QUESTION = "Does rotation help against outliers?"
OPEN = ("With rotation, the error does not depend on outliers",)
EXPORTS = ("incoherence-trials.csv", "incoherence-responses.csv")
_FOLDED = ("layers", "inputs", "slopes", "trials")
_CELL = ["when", "bits", "rotation"]


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """The figure and the responses of every run; None where none has them."""
    whole = [run for run in runs if not run.table("responses").empty]
    if not whole:
        return None
    blocks: list[Block] = []
    for run in whole:
        blocks += [Heading(run.title)] if len(whole) > 1 else []
        claims = claims_of([run])
        blocks += [
            Figures(response_pictures(run.table("trials"), run.anchor), CAPTION),
            _sheet(run),
            Fold(f"{len(claims)} verdicts", [claims_sheet(claims, f"Verdicts: {run.title}")]),
            Fold("What this cannot say", [Points(_caveats(run))]),
            *(table_fold(run, name) for name in _FOLDED if name in run.tables),
        ]
    return Section(
        anchor="incoherence",
        title="Rotation against outliers",
        answer=_answer(whole[0]),
        blocks=blocks,
        claims=claims_of(whole),
        rule=rule_of(whole),
        exports=whole_tables(whole, ("trials", "responses")),
    )


def _ends(run: RunData) -> pd.DataFrame:
    """A row per stage, bits and rotation: factor per doubling, and the errors at both ends."""
    frame = at_shared_scales(run.table("responses"))
    groups = frame.sort_values("scale", kind="stable").groupby(_CELL, sort=False)
    found = groups.nth(-1).assign(least=groups.nth(0)["error"].to_numpy())
    found = found.reset_index(drop=True)
    subject = found["rotation"] + ", " + found["bits"].astype(str) + " bits, " + found["when"]
    verdicts = run.table("verdicts")
    own = verdicts[verdicts["claim"].str.contains("does not depend on outliers")].set_index(
        "subject"
    )
    found["factor"] = subject.map(own["effect"])
    found["verdict"] = subject.map(own["verdict"])
    found["limits"] = [
        interval_text(low, high, (1.0, factor)) if low < high else ""
        for low, high, factor in zip(
            subject.map(own["low"]), subject.map(own["high"]), found["factor"], strict=True
        )
    ]
    return found


def _answer(run: RunData) -> list[Phrase]:
    """The factors at the fewest bits, at the latest stage that was measured."""
    found = _ends(run)
    at = found[found["when"] == found["when"].iloc[-1]]
    at = at[at["bits"] == at["bits"].min()]
    texts = at["factor"].map(times) + " " + at["limits"] + " with " + at["rotation"]
    return sentence(
        f"At {plural(int(at['bits'].iloc[0]), 'bit')}, {at['when'].iloc[0]}, the error of "
        f"quantized activations in {run.plan_name} on {run.workload_name} changes with each "
        "doubling of the outliers by ",
        *joined([Phrase(text.replace("with none", "without rotation"), run.href) for text in texts],
                ", "),
        f"; {plural(int(at['seeds'].iloc[0]), 'training seed')}.",
    )  # fmt: skip


def _sheet(run: RunData) -> Sheet:
    found = _ends(run)
    found["place"] = found["rotation"] + ", " + found["bits"].astype(str) + " bits"
    found["small"] = (found["limits"] + " " + found["verdict"].astype(str)).str.strip()
    found["over none limits"] = [
        interval_text(low, high, (1.0,)) if low < high else ""
        for low, high in found[["over_none_low", "over_none_high"]].to_numpy(float)
    ]
    columns = ["place", "when", "least", "error", "scale", "factor", "over_none"]
    columns += ["weight_error", "student_error"]
    return Sheet(
        found[[*columns, "small", "over none limits"]],
        f"Response to outliers: {run.title}",
        "Error of quantized activations, with unquantized weights, at the least and at the "
        "greatest outliers s that all stages have; factor of error per doubling of s, its 95 % "
        "interval, and whether “the error does not depend on s” holds; error at the greatest s "
        "over that without rotation. At the greatest s, beside the teacher: the error of the "
        "student with unquantized activations (of weights), and of the student as it is (all).",
        formats={"factor": times, "over_none": times},
        heads={"place": "rotation", "least": "error at least", "error": "at greatest",
               "scale": "greatest s", "factor": "per doubling", "over_none": "over none",
               "weight_error": "of weights", "student_error": "all"},
        small={"factor": "small", "over_none": "over none limits"},
        absent="–",
    )  # fmt: skip


def _caveats(run: RunData) -> list[str]:
    options = run.options
    return [
        f"Outliers were put into {options.get('channels')} channels of every qkv, proj and fc1 "
        "input, exactly undone by their weights; fc2 has none, and real outliers need not be in "
        "fixed channels, nor come with small weights.",
        "s also changes what weights are rounded to, and the weights that training sees: these "
        "errors stand in the table and are not judged. After training, unquantized weights are the "
        "latent ones, which no student runs with.",
        f"Students train {options.get('steps')} steps at batch {options.get('batch_size')}: "
        "longer training may close gaps or open them.",
        "A slope is that of a straight line: where a curve bends, look at the figure.",
    ]
