"""What the sections on sensitivity and allocation share: runs of older versions, and wording.

Versions 1 and 2 of both studies wrote their verdicts in columns of their own. They are shown as
they were given, under the rule of their time; nothing is judged again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from reports.generic import VERDICTS, claims_of
from reports.loading import RunData
from reports.page import Claim
from reports.text import plural, stem
from robuq_bench.statistics.verdicts import Verdict

UNIFORM = "uniform"
SENSITIVITY_RULE = (
    "Rule of an older version: “mislead” holds when the gain of Spearman’s ρ from measuring after "
    "training has a 95 % interval above 0, does not hold when it lies below 0.05, and is undecided "
    "otherwise, and where seeds agree on the truth with a mean ρ below 0.3. Not corrected for the "
    "number of bit widths."
)
ALLOCATION_RULE = (
    "Rule of an older version: “beats uniform” holds when the worst training seed of a candidate "
    "is better than uniform’s best, does not hold when its best is worse than uniform’s worst, and "
    "is undecided otherwise. With few seeds it decides too often by chance; it is not corrected "
    "for the number of verdicts."
)


def is_older(run: RunData) -> bool:
    """Whether the run's verdicts are in columns of versions 1 and 2."""
    columns = run.table(VERDICTS).columns
    return "ptq_sensitivities_mislead" in columns or "beats_uniform" in columns


def bits_text(bits: object) -> str:
    """`2 bits`, and `all bit widths` for "all"; the subject of a verdict on sensitivities."""
    return "all bit widths" if bits == "all" else plural(int(str(bits)), "bit")


def stacked(runs: Sequence[RunData], table: str) -> pd.DataFrame:
    """A table of several runs, whole, with the run's id in front."""
    frames = {run.id: run.table(table) for run in runs}
    return pd.concat(frames, names=["run"]).reset_index(level="run").reset_index(drop=True)


def sensitivity_claims(run: RunData) -> list[Claim]:
    """The verdicts of a run of study sensitivity, of any version."""
    if not is_older(run):
        return claims_of([run])
    layers = run.table("truth")["layer"].nunique()
    rows = run.table(VERDICTS).replace({np.nan: None}).to_dict("records")
    verdicts = [
        Verdict(
            claim=f"Sensitivities measured before training mislead: {bits_text(row['bits'])}",
            subject=bits_text(row["bits"]),
            verdict=str(row["ptq_sensitivities_mislead"]),
            effect=row["gain"],
            effect_name="gain of Spearman’s ρ",
            low=row["low"],
            high=row["high"],
            n=layers,
            n_of="layers",
            test="bootstrap over layers",
            p_value=None,
        )
        for row in rows
    ]
    return [Claim(verdict, run.title, run.href) for verdict in verdicts]


def allocation_claims(run: RunData) -> list[Claim]:
    """The verdicts of a run of study allocation, of any version.

    Version 1 judged one training seed, too; that is "not judged" here, as in version 2.
    """
    if not is_older(run):
        return claims_of([run])
    fid = next((str(n) for n in run.table("trials") if stem(str(n)) == "fid"), "fid")
    rows = run.table(VERDICTS).replace({"target": {"fid": fid}}).to_dict("records")
    verdicts = [
        Verdict(
            claim=f"{row['candidate']} beats {UNIFORM} at a mean of {row['budget']:g} bits: "
            f"{row['target']}",
            subject=f"{row['candidate']} over {UNIFORM}, {row['budget']:g} bits, {row['target']}",
            verdict=str(row["beats_uniform"]) if row["seeds"] > 1 else "not judged",
            effect=float(row["ratio_of_means"]),
            effect_name=f"ratio of mean {row['target']}",
            low=None,
            high=None,
            n=int(row["seeds"]),
            n_of="training seeds",
            test="worst seed against best",
            p_value=None,
        )
        for row in rows
    ]
    return [Claim(verdict, run.title, run.href) for verdict in verdicts]
