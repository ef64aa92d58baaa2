"""Real images in place of samples, and what a second feature space says of the plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import pandas as pd
from scipy.stats import kendalltau

from reports import page
from reports.loading import RunData
from reports.protocols import AT_FLOOR, Group, Row
from reports.text import Phrase, fixed, listing, number, of_metric, plural, spread, stem

_SHOWN_PAIRS = 8


class Real(NamedTuple):
    """A protocol's draws of real images, one line each, and the run that judged them."""

    draws: pd.DataFrame
    run: RunData

    def values(self, metric: str | None) -> pd.Series[float]:
        """Of a metric, one per draw; empty where it was not measured."""
        return self.draws[metric] if metric in self.draws else pd.Series(dtype=float)

    @property
    def sides(self) -> str:
        """`870 training images against 870 of the others`."""
        first = self.draws.iloc[0]
        against = "the samples’ own reference"
        if first["reference"] != "its own":
            against = f"{int(first['num_reference']):,} of the others"
        return f"{int(first['num_images']):,} {first['images']} images against {against}"

    def about(self, group: Group) -> list[Phrase]:
        """What real images score, which they are, and what `÷ real` divides by; [] without FID."""
        metric, values = str(group.fid), self.values(group.fid)
        if values.empty:
            return []
        text = f"{number(metric, values.mean())} {spread(metric, values.min(), values.max())}"
        count, disjoint = len(self.draws), int(self.draws.iloc[0]["disjoint_draws"])
        apart = f", {disjoint} at a time without a common image" if disjoint > 1 else ""
        fewer = int(self.draws.iloc[0]["num_images"]) < group.num_samples
        return page.sentence(
            f"Real images in place of samples have {metric} ",
            Phrase(text.strip(), self.run.href),
            f" ({self.sides}, classes as often as in samples, {count} random draws{apart}). ",
            f"There are too few for N = {group.num_samples:,}. " if fewer else "",
            f"“÷ real” is the FID of as many samples against the same references "
            f"({metric}{AT_FLOOR}) over that: at 1, samples cannot be told from real images.",
        )


def real_of(group: Group) -> Real | None:
    """The draws of a protocol; None for runs from before there were any."""
    runs = [*group.teacher.runs, *(run for row in group.rows for run in row.runs)]
    run = next((run for run in runs if run.of_kind("floor")), None)
    return None if run is None else Real(pd.DataFrame(run.of_kind("floor")), run)


def over_real(group: Group, real: Real, row: Row) -> float | None:
    """Mean FID of a row over that of real images, both at the N and references of the latter."""
    found, floor = group.found(row, f"{group.fid}{AT_FLOOR}"), real.values(group.fid)
    return found.mean / floor.mean() if found and len(floor) and floor.mean() > 0 else None


def hints_of(group: Group, metrics: Sequence[str]) -> dict[str, str]:
    """Small print of the metrics that only mean something beside real images."""
    runs = [*group.teacher.runs, *(run for row in group.rows for run in row.runs)]
    known = {
        f"accuracy_{record['features']}": f"↑ is better; {number('accuracy', record['accuracy'])} "
        f"of real images, {record['images']}"
        for run in runs[:2]
        for record in run.of_kind("classifier")
    }
    searched = (r.get("images_searched") for run in runs for r in run.of_kind("metrics"))
    of = "".join(f" of the {count:,} searched" for count in {*filter(None, searched)})
    near = f"distance to the nearest training image{of}; 1: as real images, below: copies"
    return {name: near if stem(name) == "nn" else known.get(name, "") for name in metrics}


def spaces_of(group: Group) -> tuple[list[str], Mapping[str, list[str]]]:
    """Metrics of samples in the first feature space, and in each further one by its FID's name."""
    sampled = [name for name in group.metrics if not name.endswith(("_loss", AT_FLOOR))]
    others = [name for name in sampled if stem(name) == "fid" and name != group.fid]
    further = {
        fid: [name for name in sampled if name == stem(name) + fid.removeprefix("fid")]
        for fid in others
    }
    return [name for name in sampled if not any(name in own for own in further.values())], further


def order_in(group: Group, other: str) -> page.Points:
    """Whether plans stand in the same order by the FIDs of two feature spaces."""
    rows = [row for row in group.rows if group.found(row, group.fid) and group.found(row, other)]
    means = pd.DataFrame(
        {m: group.summary["mean"].unstack("metric")[m] for m in (str(group.fid), other)}
    ).loc[[row.label for row in rows]]
    if len(means) < 2:
        return page.Points([f"Fewer than two plans have {group.fid} and {other}: no order."])
    swapped = [
        f"{a} and {b}"
        for a, b in combinations(means.index, 2)
        if ((means.loc[a] - means.loc[b]).prod()) < 0
    ]
    tau = kendalltau(means[group.fid], means[other]).statistic
    said = f"{plural(len(means), 'plan')} by mean {group.fid} and by mean {other}: Kendall’s τ "
    pairs = listing(swapped[:_SHOWN_PAIRS]) or "none"
    more = f", and {len(swapped) - _SHOWN_PAIRS} more" if len(swapped) > _SHOWN_PAIRS else ""
    return page.Points([f"{said}{fixed(tau, 2)}. Pairs in another order: {pairs}{more}."])


def draws_sheet(group: Group, real: Real) -> page.Sheet:
    """Every metric of every draw."""
    metrics = [name for name in group.metrics if name in real.draws]
    return page.Sheet(
        real.draws[["draw", *metrics]],
        f"Real images in place of samples on {group.title}",
        f"{real.sides}.",
        formats={name: of_metric(name) for name in metrics},
        kind="dense",
    )
