"""What the sections on sensitivity and allocation share: runs of older versions, and their form.

Versions 1 and 2 of both studies wrote their verdicts in columns of their own. They are shown as
they were given, under the rule of their time; nothing is judged again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from reports.generic import VERDICTS, claims_of, is_verdicts, one_rule
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Heading, Section
from reports.text import Phrase, plural, stem
from robuq_bench.statistics.verdicts import COLUMNS, interval_text, read_verdicts

UNIFORM = "uniform"
_SENSITIVITY_RULE = (
    "Rule of an older version: “mislead” holds when the gain of Spearman’s ρ from measuring after "
    "training has a 95 % interval above 0, does not hold when it lies below 0.05, and is undecided "
    "otherwise or where seeds agree on the truth with a mean ρ below 0.3; without correction."
)
_ALLOCATION_RULE = (
    "Rule of an older version: “beats uniform” holds when a candidate’s worst training seed is "
    "better than uniform’s best, does not hold when its best is worse than uniform’s worst, and is "
    "undecided otherwise; without correction. With few seeds it decides too often by chance."
)


def section(
    runs: Sequence[RunData],
    needed: Sequence[str],
    title: str,
    answer: Callable[[RunData], Sequence[Phrase]],
    blocks: Callable[[RunData], Sequence[Block]],
    export: str,
) -> Section | None:
    """The answer of the first run and the blocks of each, but figures in which nothing is drawn.

    Runs without one of the tables `needed` are left out; None where that leaves none. The tables
    `export` go beside the page, with the run's id in front.
    """
    whole = [run for run in runs if not any(run.table(name).empty for name in needed)]
    if not whole:
        return None
    body: list[Block] = []
    claims: list[Claim] = []
    for run in whole:
        body += [Heading(run.title)] if len(whole) > 1 else []
        body += [b for b in blocks(run) if not isinstance(b, Figures) or b.pictures]
        claims += claims_of([run]) or [
            Claim(verdict, run.title, run.href) for verdict in read_verdicts(verdicts(run))
        ]
    study = whole[0].study
    tables = pd.concat({run.id: run.table(export) for run in whole}, names=["run"])
    return Section(
        anchor=study,
        title=title,
        answer=answer(whole[0]),
        blocks=body,
        claims=claims,
        rule=one_rule(rule for run in whole for rule in verdicts(run)["rule"].head(1)),
        exports={f"{study}-{export}": tables.reset_index(level="run").reset_index(drop=True)},
    )


def verdicts(run: RunData) -> pd.DataFrame:
    """The run's verdicts in the columns of today, whatever its version; empty without any.

    Version 1 judged one training seed, too; that is "not judged" here, as in version 2.
    """
    frame = run.table(VERDICTS).assign(confidence=0.95)
    if "ptq_sensitivities_mislead" in frame:
        width = frame["bits"].map(bits_text)
        frame = frame.assign(
            claim="Sensitivities measured before training mislead: " + width,
            subject=width,
            verdict=frame["ptq_sensitivities_mislead"],
            effect=frame["gain"],
            effect_name="gain of Spearman’s ρ",
            n=run.table("truth")["layer"].nunique(),
            n_of="layers",
            test="bootstrap over layers",
            rule=_SENSITIVITY_RULE,
        )
    elif "beats_uniform" in frame:
        metric = frame["target"].replace("fid", fid_name(run))
        bits = frame["budget"].map("{:g} bits".format)
        frame = frame.assign(
            claim=frame["candidate"] + f" beats {UNIFORM} at a mean of " + bits + ": " + metric,
            subject=frame["candidate"] + f" over {UNIFORM}, " + bits + ", " + metric,
            verdict=frame["beats_uniform"].where(frame["seeds"] > 1, "not judged"),
            effect=frame["ratio_of_means"],
            effect_name="ratio of mean " + metric,
            n=frame["seeds"],
            n_of="training seeds",
            test="worst seed against best",
            rule=_ALLOCATION_RULE,
        )
    elif not is_verdicts(frame):
        frame = frame.iloc[:0]
    return frame.reindex(columns=[*COLUMNS])


def fid_name(run: RunData) -> str:
    """What a run of study allocation calls its FID, "fid" without any."""
    return next((str(n) for n in run.table("trials") if stem(str(n)) == "fid"), "fid")


def bits_text(bits: object) -> str:
    """`2 bits`, and `all bit widths` for "all"; the subject of a verdict on sensitivities."""
    return "all bit widths" if bits == "all" else plural(int(str(bits)), "bit")


def limits(low: pd.Series, high: pd.Series, thresholds: Sequence[float]) -> pd.Series:
    """`[low to high]` of every row, "" where there is no interval."""
    pairs = zip(low, high, strict=True)
    texts = ["" if math.isnan(a + b) else interval_text(a, b, thresholds) for a, b in pairs]
    return pd.Series(texts, low.index, dtype=object)
