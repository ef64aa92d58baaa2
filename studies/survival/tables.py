"""Tables of `study survival`: gains before and after training, and what became of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from robuq_bench.statistics.comparisons import compare_plans, judge_contrast, judge_family
from robuq_bench.statistics.verdicts import Verdict, no_verdict, verdict_rows
from studies.survival.choices import Choice, arm_name

KEPT = 0.5
"""Share of the logarithm of a gain that has to be left of it."""

METRIC = "normalised distillation loss"
WORDS = {
    "survives": "holds",
    "shrinks": "does not hold",
    "washed out": "does not hold",
    "reversed": "does not hold",
    "undecided": "undecided",
    "nothing before": "not judged",
    "not judged": "not judged",
}
"""What becomes of a gain, and the word of its verdict."""

Compared = dict[tuple[str, int], Verdict]
"""A comparison by (choice, steps)."""


def survival(
    trials: Iterable[dict[str, Any]], choices: Sequence[Choice], budgets: Sequence[int]
) -> tuple[list[dict[str, Any]], Compared, Compared]:
    """One row per choice and budget after training, and two families of comparisons.

    Gains are ratios of losses, without over with, above 1 where the choice helps; `kept` is the
    share of the logarithm that is left.

    Returns:
        rows of the table; losses with a choice over those without it; and where these are decided
        on the same side before and after training, whether `KEPT` of the logarithm is left.
    """
    frame = pd.DataFrame(trials)
    keys = [(choice, steps) for choice in choices for steps in budgets]
    found = judge_family([_compare(frame, choice, steps) for choice, steps in keys])
    compared = {(c.name, steps): v for (c, steps), v in zip(keys, found, strict=True)}
    trained = [(choice, steps) for choice, steps in keys if steps]
    asked = [
        (choice, steps)
        for choice, steps in trained
        if compared[choice.name, 0].verdict == compared[choice.name, steps].verdict
        and compared[choice.name, 0].verdict in ("better", "worse")
    ]
    halves = judge_family(
        [_half(frame, c, steps, compared[c.name, 0].verdict == "better") for c, steps in asked]
    )
    kept = {(c.name, steps): v for (c, steps), v in zip(asked, halves, strict=True)}
    rows = [_row(frame, choice, steps, compared, kept) for choice, steps in trained]
    return rows, compared, kept


def _compare(frame: pd.DataFrame, choice: Choice, steps: int) -> Verdict:
    """The pair of arms at a budget; not judged where a training diverged, which is no gap."""
    names = {arm_name(choice.chosen): "with", arm_name(choice.other): "without"}
    own = frame[(frame["steps"] == steps) & frame["arm"].isin(names)]
    own = own.assign(plan=own["arm"].map(names), image_range=0, value=own["loss"].astype(float))
    lost = own[own["value"].isna()]
    if lost.empty:
        return compare_plans(own, "with", "without", METRIC)
    seeds = ", ".join(
        f"{arm} seed {seed}" for arm, seed in zip(lost["arm"], lost["seed"], strict=True)
    )
    name, seeds_of_both = f"ratio of geometric means of {METRIC}", own["seed"].nunique()
    return no_verdict("", "", name, f"training diverged: {seeds}", n=seeds_of_both)


def _half(frame: pd.DataFrame, choice: Choice, steps: int, is_better: bool) -> Verdict:
    """Whether `KEPT` of a gain's logarithm is left, or of a loss's: log after - KEPT · log before.

    Of each seed; above 0, on the side of the gain before training, the share is left.
    """
    sign = 1.0 if is_better else -1.0
    names = {arm_name(choice.chosen): "with", arm_name(choice.other): "without"}
    own = frame[frame["steps"].isin((0, steps)) & frame["arm"].isin(names)]
    plan = own["arm"].map(names) + " " + own["steps"].astype(str)
    weights = {
        f"without {steps}": sign,
        f"with {steps}": -sign,
        "without 0": -KEPT * sign,
        "with 0": KEPT * sign,
    }
    values = own.assign(plan=plan, image_range=0, value=own["loss"].astype(float))
    found = judge_contrast(values, weights, METRIC, lower_is_better=False)
    assert found.low is not None  # of seeds enough to be decided
    assert found.high is not None
    word = "holds" if found.low > 1 else "does not hold" if found.high < 1 else "undecided"
    return dataclasses.replace(
        found,
        verdict=word,
        effect_name=f"gain after training over (gain before it)^{KEPT:g}, gain of {METRIC}"
        + ("" if is_better else ", with over without as it was worse"),
    )


def outcome(before: Verdict, after: Verdict, half: Verdict | None) -> str:
    """One of `WORDS`, by the study's rule."""
    if "not judged" in (before.verdict, after.verdict):
        return "not judged"
    if before.verdict not in ("better", "worse"):
        return "nothing before"
    if after.verdict == "equivalent":
        return "washed out"
    if after.verdict == "undecided":
        return "undecided"
    if after.verdict != before.verdict:
        return "reversed"
    assert half is not None  # both are decided, on the same side
    return {"holds": "survives", "does not hold": "shrinks"}.get(half.verdict, "undecided")


def share_kept(before: Verdict, after: Verdict) -> float | None:
    """log of the gain after training over that before; None where there is none before."""
    if before.effect is None or after.effect is None or before.effect == 1:
        return None
    return math.log(after.effect) / math.log(before.effect)


def _row(
    frame: pd.DataFrame, choice: Choice, steps: int, compared: Compared, kept: Compared
) -> dict[str, Any]:
    before, after = compared[choice.name, 0], compared[choice.name, steps]
    own = frame[frame["steps"] == steps].groupby("arm")["loss"].mean()
    return {
        "choice": choice.name,
        "label": choice.label,
        "steps": steps,
        "seeds": after.n,
        "loss_with": own[arm_name(choice.chosen)],
        "loss_without": own[arm_name(choice.other)],
        **_gain("gain_before", before),
        **_gain("gain", after),
        "kept": share_kept(before, after),
        "outcome": outcome(before, after, kept.get((choice.name, steps))),
    }


def _gain(name: str, verdict: Verdict) -> dict[str, float | None]:
    """The reciprocal of a comparison, with its limits."""
    limits = {name: verdict.effect, f"{name}_low": verdict.high, f"{name}_high": verdict.low}
    return {key: None if value is None else 1 / value for key, value in limits.items()}


def verdicts_of(
    rows: Iterable[dict[str, Any]], compared: Compared, kept: Compared, rule: str
) -> list[dict[str, Any]]:
    """The table `verdicts`: does what a choice does before training survive?

    Effect, interval and p-value are those of the test that the word rests on.
    """
    found = []
    for row in rows:
        before, after = compared[row["choice"], 0], compared[row["choice"], row["steps"]]
        word = row["outcome"]
        gain = (
            "" if row["gain_before"] is None else f"gain {row['gain_before']:.3g} before training"
        )
        judged = kept.get((row["choice"], row["steps"]))
        if judged is None:
            judged = dataclasses.replace(
                after,
                effect=row["gain"],
                low=row["gain_low"],
                high=row["gain_high"],
                effect_name=f"{METRIC} without over with, after training",
            )
        # Equivalence stands on its interval; the p-value is of another hypothesis.
        if word == "washed out":
            judged = dataclasses.replace(judged, p_value=None, p_adjusted=None)
        found.append(
            dataclasses.replace(
                judged,
                claim=f"The gain of {row['label']} before training survives {row['steps']} steps",
                subject=f"{row['label']}, {row['steps']} steps",
                verdict=WORDS[word],
                note="; ".join(filter(None, [word, gain, judged.note or before.note])),
            )
        )
    return verdict_rows(found, rule)
