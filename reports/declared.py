"""Claims declared before their runs: how many hold, their effects, and curves over budgets."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import seaborn as sns

from reports.page import Block, Claim, Figures, Fold, Section, Sheet, sentence
from reports.text import Phrase, listing, plural, significant
from robuq_bench.claims.judged import NEAR_TEACHER, RULE, STUDY, Judged
from robuq_bench.figures import Picture, colour, legend_below, log_axis, panel, points
from robuq_bench.statistics.comparisons import MARGIN
from robuq_bench.statistics.verdicts import interval_text

ANCHOR = "declared"
_MARKS = {"holds": "o", "does not hold": "X", "undecided": "s", "not judged": "d"}
_ROWS_OF_A_PANEL = 24


def declared_section(
    judged: Sequence[Judged],
    rows: Sequence[dict[str, Any]],
    curves: pd.DataFrame,
    near: pd.DataFrame,
) -> Section | None:
    """The section of judged claims; None where no run says anything of any claim.

    Args:
        judged: the claims.
        rows: the same as the committed table has them, of `claims_rows`.
        curves: arms beside their teacher by budget, of `teacher_curves`.
        near: when they come near it, of `steps_to_teacher`.
    """
    shown = [one for one in judged if one.verdict.effect is not None]
    if not shown:
        return None
    workloads = list(dict.fromkeys(one.workload for one in shown))
    blocks: list[Block] = []
    for workload in workloads:
        own = [one for one in shown if one.workload == workload]
        blocks += _forest(workload, own)
        blocks.append(_sheet(workload, own))
        blocks += _budgets(workload, own)
    blocks += _beside_teacher(curves, near)
    absent = [one for one in judged if one.verdict.effect is None]
    if absent:
        blocks.append(_absent(absent))
    return Section(
        anchor=ANCHOR,
        title="Claims declared before their runs",
        answer=_answer(judged, str(rows[0]["claims_commit"])),
        blocks=blocks,
        claims=[Claim(_as_claim(one), one.workload, _href(one)) for one in shown],
        rule=RULE,
        exports={"declared": pd.DataFrame(rows), "budgets": curves},
    )


def _answer(judged: Sequence[Judged], commit: str) -> list[Phrase]:
    counts = Counter(one.holds for one in judged)
    words = listing(f"{counts[word]} {word}" for word in _MARKS if counts[word])
    text = f"Of {plural(len(judged), 'declared claim')} (by workload and budget), {words}."
    late = sum(one.declared == "changed after" for one in judged)
    text += f" {late} were written or changed after a run of theirs." if late else ""
    return sentence(
        text + (f" The file of claims is that of commit {commit[:12]}." if commit else "")
    )


def _as_claim(one: Judged) -> Any:
    """The verdict with the word on the claim in place of that on its arms."""
    said = [f"{one.contrast}: {one.verdict.verdict}, {one.expect} expected", one.verdict.note]
    said += [
        f"declared {one.declared}" if one.declared != "changed after" else "changed after runs"
    ]
    about = f"{one.workload}{f', {one.steps:,} steps' if one.steps else ''}"
    note = "; ".join(filter(None, said))
    return replace(one.verdict, verdict=one.holds, claim=one.text, subject=about, note=note)


def _href(one: Judged) -> str:
    """Where the report describes the first run of a claim."""
    study = STUDY if one.steps else one.family.removeprefix("study ")
    return f"#run-{re.sub(r'[^A-Za-z0-9_-]+', '-', f'{study}-{one.runs[0]}')}" if one.runs else ""


def _label(one: Judged) -> str:
    return f"{one.key}, {one.steps:,}" if one.steps else one.key


def _is_ratio(one: Judged) -> bool:
    """Whether the effect is a ratio with an interval, as the panel shows."""
    return one.verdict.low is not None and "ratio" in one.verdict.effect_name


def _forest(workload: str, judged: Sequence[Judged]) -> list[Block]:
    """Effects with their intervals, family by family."""
    own = sorted(filter(_is_ratio, judged), key=lambda one: one.family)
    pieces = [own[i : i + _ROWS_OF_A_PANEL] for i in range(0, len(own), _ROWS_OF_A_PANEL)]
    pictures = [_forest_panel(f"{workload}-{place}", part) for place, part in enumerate(pieces)]
    words = {one.holds for one in own}
    signs = {"holds": "●", "does not hold": "✖", "undecided": "■", "not judged": "◆"}
    key = [("reference", f"{signs[word]} {word}") for word in _MARKS if word in words]
    caption = (
        f"Declared claims on {workload}, by family: ratio of candidate to baseline with its 95 % "
        f"interval, and the steps of training. Shaded: ratios of no consequence."
    )
    return [Figures(pictures, caption, key)] if pictures else []


def _forest_panel(name: str, judged: Sequence[Judged]) -> Picture:
    lines = [
        {
            "claim": textwrap.fill(_label(one), 24),
            "holds": one.holds,
            "low": one.verdict.low,
            "effect": one.verdict.effect,
            "high": one.verdict.high,
        }
        for one in judged
    ]
    frame = pd.DataFrame(lines)
    alt = "; ".join(
        f"{_label(one)} {significant(one.verdict.effect or 0)} ({one.holds})" for one in judged
    )
    height = 0.7 + 0.15 * len(lines) * max(1 + str(line["claim"]).count("\n") for line in lines)
    words = [word for word in _MARKS if word in set(frame["holds"])]
    with panel(f"declared-{name}", f"Effects of claims: {alt}", height=height) as drawn:
        axes = drawn.axes
        axes.axvspan(MARGIN, 1 / MARGIN, color=colour("reference"), alpha=0.2, linewidth=0)
        axes.axvline(1, color=colour("reference"), linewidth=0.8)
        points(
            frame, axes, "claim", ["low", "effect", "high"], order=list(frame["claim"]),
            hue="holds", hue_order=words, palette=[colour("text")] * len(words),
            markers=[_MARKS[word] for word in words], dodge=False, markersize=4,
            err_kws={"linewidth": 1.2},
        )  # fmt: skip
        log_axis(axes, "x")
        axes.set_xlabel("candidate ÷ baseline")
    return drawn.picture


def _sheet(workload: str, judged: Sequence[Judged]) -> Sheet:
    rows = [
        {
            "claim": one.text,
            "about": f"{one.key}: {one.contrast}, {one.metric}",
            "steps": one.steps or None,
            "effect": one.verdict.effect,
            "interval": None
            if one.verdict.low is None or one.verdict.high is None
            else interval_text(one.verdict.low, one.verdict.high, (0.0, 1.0, MARGIN, 1 / MARGIN)),
            "n": one.verdict.n,
            "found": one.verdict.verdict,
            "expected": f"{one.expect} expected",
            "holds": one.holds,
            "CPU-hours": one.cpu_hours or None,
            "href": _href(one) or None,
        }
        for one in judged
    ]
    return Sheet(
        pd.DataFrame(rows).astype({"steps": "Int64"}),
        f"Declared claims on {workload}",
        "Ratios of candidate to baseline; n are training seeds; hours are of all runs of a claim, "
        "which claims share.",
        links={"effect": "href"},
        small={"claim": "about", "effect": "interval", "found": "expected"},
        absent="–",
    )


def _absent(judged: Sequence[Judged]) -> Fold:
    rows = [
        {"claim": one.text, "workload": one.workload, "steps": one.steps or None,
         "needs": one.verdict.note}
        for one in judged
    ]  # fmt: skip
    frame = pd.DataFrame(rows).astype({"steps": "Int64"})
    sheet = Sheet(frame, "Declared claims without runs", absent="–", kind="claims")
    return Fold(f"{plural(len(judged), 'declared claim')} without runs here", [sheet])


def _budgets(workload: str, judged: Sequence[Judged]) -> list[Block]:
    """Effects by steps of training, of the claims that have several budgets."""
    own = list(filter(_is_ratio, judged))
    several = Counter(one.key for one in own)
    lines = [
        {"claim": one.key, "steps": one.steps, "ratio": one.verdict.effect}
        for one in own
        if several[one.key] > 1
    ]
    if not lines:
        return []
    frame = pd.DataFrame(lines)
    picture = _curves(f"budgets-{workload}", frame, "claim", "candidate ÷ baseline")
    caption = f"Declared claims on {workload} by steps of training: ratio of candidate to baseline."
    return [Figures([picture], caption)]


def _beside_teacher(curves: pd.DataFrame, near: pd.DataFrame) -> list[Block]:
    blocks: list[Block] = []
    for (workload, metric), own in curves.groupby(["workload", "metric"], sort=False):
        if own["steps"].nunique() < 2:
            continue
        picture = _curves(f"teacher-{workload}-{metric}", own, "arm", f"{metric} ÷ teacher’s")
        caption = f"{metric} of arms on {workload} beside their teacher’s, by steps of training."
        blocks.append(Figures([picture], caption))
    if len(near):
        steps = near.assign(steps=[
            f"{relation} {significant(round(value))}"
            for relation, value in zip(near["relation"], near["steps"], strict=True)
        ])[["arm", "workload", "metric", "steps"]]  # fmt: skip
        blocks.append(
            Sheet(
                steps,
                f"Steps to {NEAR_TEACHER:g}× the teacher’s value",
                "Between two budgets the logarithm of the ratio is taken for linear in that of the "
                "steps.",
            )
        )
    return blocks


def _curves(name: str, frame: pd.DataFrame, line: str, label: str) -> Picture:
    """One line per claim or arm over steps of training; both axes logarithmic."""
    alt = "; ".join(
        f"{key}: " + ", ".join(f"{significant(r)} at {s:,}" for s, r in zip(*own, strict=True))
        for key, group in frame.groupby(line, sort=False)
        for own in [(group["steps"], group["ratio"])]
    )
    lines = frame[line].nunique()
    with panel(name, f"{label} by steps: {alt}", height=2.2 + 0.09 * lines) as drawn:
        axes = drawn.axes
        axes.axhline(1, color=colour("reference"), linewidth=0.8)
        sns.lineplot(
            frame, x="steps", y="ratio", style=line, hue=line, markers=True, ax=axes,
            palette=[colour("text")] * lines, errorbar=None,
        )  # fmt: skip
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set(xlabel="steps of training", ylabel=label)
        if axes.get_legend() is not None:
            legend_below(drawn)
    return drawn.picture
