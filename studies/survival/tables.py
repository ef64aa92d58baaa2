"""Tables of `study survival`: gains before and after training, and what became of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from robuq_bench.statistics.comparisons import compare_plans, judge_family
from robuq_bench.statistics.verdicts import Verdict, verdict_rows
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
"""Loss with a choice over that without it, by (choice, steps)."""


def survival(
    trials: Iterable[dict[str, Any]], choices: Sequence[Choice], budgets: Sequence[int]
) -> tuple[list[dict[str, Any]], Compared]:
    """One row per choice and budget after training, and the comparisons, judged as one family.

    Gains are ratios of losses, without over with, above 1 where the choice helps; `kept` is the
    share of the logarithm that is left.
    """
    frame = pd.DataFrame(trials)
    keys = [(choice, steps) for choice in choices for steps in budgets]
    found = judge_family([_compare(frame, choice, steps) for choice, steps in keys])
    compared = {(c.name, steps): v for (c, steps), v in zip(keys, found, strict=True)}
    rows = [
        _row(frame, choice, steps, compared[choice.name, 0], compared[choice.name, steps])
        for choice in choices
        for steps in budgets[1:]
    ]
    return rows, compared


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
    return Verdict(
        claim="",
        subject="",
        verdict="not judged",
        effect=None,
        effect_name=f"ratio of geometric means of {METRIC}",
        low=None,
        high=None,
        n=own["seed"].nunique(),
        n_of="training seeds",
        test="none",
        p_value=None,
        note=f"training diverged: {seeds}",
    )


def outcome(before: Verdict, after: Verdict) -> str:
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
    return "survives" if (share_kept(before, after) or 0.0) >= KEPT else "shrinks"


def share_kept(before: Verdict, after: Verdict) -> float | None:
    """log of the gain after training over that before; None where there is none before."""
    if before.effect is None or after.effect is None or before.effect == 1:
        return None
    return math.log(after.effect) / math.log(before.effect)


def _row(
    frame: pd.DataFrame, choice: Choice, steps: int, before: Verdict, after: Verdict
) -> dict[str, Any]:
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
        "outcome": outcome(before, after),
    }


def _gain(name: str, verdict: Verdict) -> dict[str, float | None]:
    """The reciprocal of a comparison, with its limits."""
    limits = {name: verdict.effect, f"{name}_low": verdict.high, f"{name}_high": verdict.low}
    return {key: None if value is None else 1 / value for key, value in limits.items()}


def verdicts_of(
    rows: Iterable[dict[str, Any]], compared: Compared, rule: str
) -> list[dict[str, Any]]:
    """The table `verdicts`: does what a choice does before training survive?"""
    found = []
    for row in rows:
        before, after = compared[row["choice"], 0], compared[row["choice"], row["steps"]]
        word = row["outcome"]
        gain = (
            "" if row["gain_before"] is None else f"gain {row['gain_before']:.3g} before training"
        )
        flip = {"effect": row["gain"], "low": row["gain_low"], "high": row["gain_high"]}
        # Equivalence stands on its interval; the p-value is of another hypothesis.
        tested = {} if word != "washed out" else {"p_value": None, "p_adjusted": None}
        found.append(
            dataclasses.replace(
                after,
                claim=f"The gain of {row['label']} before training survives {row['steps']} steps",
                subject=f"{row['label']}, {row['steps']} steps",
                verdict=WORDS[word],
                effect_name=f"{METRIC} without over with, after training",
                **flip,
                **tested,
                note="; ".join(filter(None, [word, gain, after.note or before.note])),
            )
        )
    return verdict_rows(found, rule)
