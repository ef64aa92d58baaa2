"""Is mixed precision worth it: networks trained at the bits that metrics and solvers choose."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from reports.generic import rule_of
from reports.loading import RunData
from reports.mixed import ALLOCATION_RULE, UNIFORM, allocation_claims, is_older, stacked
from reports.page import Block, Claim, Figures, Fold, Heading, Points, Section, Sheet, sentence
from reports.text import (
    Phrase,
    listing,
    of_metric,
    percent,
    plural,
    seconds_text,
    significant,
    spread,
    stem,
    times,
)
from robuq_bench.figures import Picture, colour, heat, log_axis, panel
from robuq_bench.statistics.comparisons import MARGIN
from robuq_bench.statistics.verdicts import Verdict, interval_text

ORDER = 60
QUESTION = "Is mixed precision worth it?"
OPEN = ("Bits allocated by AMPN beat the same bits everywhere",)
EXPORTS = ("allocation-candidates.csv",)
#: The candidate that is AMPN with this suite's metric (RobuQ's is not published).
AMPN = "qat"
_CANDIDATES = {
    "uniform": ("uniform bits", "the same bits everywhere"),
    "random": ("reference", "random bits at the budget"),
    "ptq": ("before training", "change of the noise prediction, before training"),
    "qat": ("after training", "change of the noise prediction, after training: AMPN"),
    "qat-teacher": ("after training", "error against the teacher, after training"),
    "output-mse": ("before training", "error of the layer’s own output, before training"),
    "fisher": ("before training", "Fisher, before training"),
    "resolved": ("after training", "solved again during training"),
}
_SUBJECT = r"(?P<candidate>.+) over (?P<baseline>.+), (?P<budget>[\d.]+) bits, (?P<metric>.+)"


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """What candidates reach beside uniform bits; None where no run has its tables."""
    whole = [r for r in runs if not (r.table("trials").empty or r.table("candidates").empty)]
    if not whole:
        return None
    claims = {run: allocation_claims(run) for run in whole}
    blocks: list[Block] = []
    for run in whole:
        blocks += [Heading(run.title)] if len(whole) > 1 else []
        blocks += _blocks(run, claims[run])
    first = whole[0]
    return Section(
        anchor="allocation",
        title="Mixed precision",
        answer=_answer(first, claims[first]),
        blocks=blocks,
        claims=[claim for own in claims.values() for claim in own],
        rule=ALLOCATION_RULE if is_older(first) else rule_of([first]),
        exports={"allocation-candidates": stacked(whole, "candidates")},
    )


def _metrics(run: RunData) -> list[str]:
    """Columns of the trained networks that were measured, lower is better."""
    trials = run.table("trials")
    return [str(n) for n in trials.columns[4:] if trials[n].notna().any()]


def _effects(claims: Sequence[Claim]) -> pd.DataFrame:
    """Verdicts on candidates beside uniform, by candidate, budget and metric."""
    columns = [field.name for field in dataclasses.fields(Verdict)]
    frame = pd.DataFrame([vars(claim.verdict) for claim in claims], columns=columns)
    named = frame["subject"].astype(str).str.extract(_SUBJECT).astype({"budget": float})
    frame = frame.join(named).astype(dict.fromkeys(("effect", "low", "high"), float))
    return frame[frame["baseline"] == UNIFORM]


def _answer(run: RunData, claims: Sequence[Claim]) -> list[Phrase]:
    """AMPN beside uniform at the smallest budget: ratio, interval, seeds and verdict."""
    effects = _effects(claims)
    own = effects[(effects["candidate"] == AMPN) & effects["effect"].notna()]
    own = own[own["budget"] == own["budget"].min()].to_dict("records")
    if not own:
        return sentence(f"AMPN ({AMPN}) and {UNIFORM} bits were not judged.")
    phrases = sentence(f"At a mean of {own[0]['budget']:g} bits, AMPN ({AMPN}) reaches ")
    for index, row in enumerate(own):
        limits = _limits(row)
        phrases += [
            Phrase(" and " if index else ""),
            Phrase(f"{times(row['effect'])} {limits}".rstrip(), run.href),
            Phrase(f" the {row['metric']} of uniform bits ({row['verdict']})"),
        ]
    return [*phrases, Phrase(f", over {plural(int(own[0]['n']), 'training seed')}.")]


def _limits(row: Mapping[Hashable, Any]) -> str:
    """The interval, "" without one; no rounding takes a limit across the margin."""
    if np.isnan(row["low"]):
        return ""
    return interval_text(row["low"], row["high"], (MARGIN, 1.0, 1 / MARGIN))


def _blocks(run: RunData, claims: Sequence[Claim]) -> list[Block]:
    effects = _effects(claims)
    blocks: list[Block] = []
    pictures = _ratio_panels(run, effects)
    if pictures:
        key = [
            ("uniform bits", "│ uniform bits"),
            *((when, f"◆ measured {when}") for when in ("before training", "after training")),
            ("reference", "◆ random bits"),
        ]
        blocks.append(
            Figures(
                pictures,
                "Candidates beside uniform bits with the same training seed, lower is better: a "
                "dot per seed, the diamond is the judged ratio with its interval, if it has one.",
                key,
            )
        )
    if not effects.empty:
        blocks.append(_effect_sheet(run, effects))
    pictures = [*_bit_panels(run), *_front(run)]
    if pictures:
        blocks.append(
            Figures(
                pictures,
                "Mean bits by layer type, the paper’s of DiT-XL/2 where it names some; and the "
                "exact Pareto front of every source of sensitivities. Sources measure different "
                "quantities, so only shapes compare.",
            )
        )
    blocks.append(Fold("What this cannot say", [Points(_caveats(run))]))
    blocks += [_candidate_fold(run), *_solver_fold(run), *_timestep_fold(run)]
    return blocks


def _ratio_panels(run: RunData, effects: pd.DataFrame) -> list[Picture]:
    """A panel per budget and judged metric: every seed's ratio to uniform."""
    trials = run.table("trials")
    base = trials[trials["candidate"] == UNIFORM]
    ratios = trials.merge(base, on=["budget", "seed"], suffixes=("", " of uniform"))
    pictures = []
    for (budget, metric), own in effects.groupby(["budget", "metric"], sort=False):
        order = list(own["candidate"].unique())
        seeds = ratios[(ratios["budget"] == budget) & ratios["candidate"].isin(order)]
        seeds = seeds.assign(ratio=seeds[metric] / seeds[f"{metric} of uniform"])
        ends = own.melt("candidate", ["effect", "low", "high"]).dropna()
        if ends.empty:
            continue
        title = f"{metric}, {budget:g} bits"
        listed = "; ".join(
            f"{row['candidate']} {times(row['effect'])} {row['verdict']}"
            for row in own.to_dict("records")
        )
        palette = {name: colour(_CANDIDATES.get(name, ("reference",))[0]) for name in order}
        name, alt = f"allocation-{budget}-{metric}-{run.anchor}", f"{title} over uniform: {listed}"
        with panel(name, alt, height=0.9 + 0.24 * len(order), title=title) as drawn:
            shared = {"y": "candidate", "hue": "candidate", "order": order, "palette": palette,
                      "ax": drawn.axes, "legend": False}  # fmt: skip
            sns.stripplot(seeds, x="ratio", size=3.5, jitter=False, alpha=0.5, **shared)
            sns.pointplot(
                ends, x="value", estimator="median", errorbar=("pi", 100), marker="D",
                markersize=4, linestyle="none", **shared,
            )  # fmt: skip
            drawn.axes.axvline(1, color=colour("uniform bits"))
            drawn.axes.locator_params(axis="x", nbins=5)
            drawn.axes.set(xlabel="ratio to uniform", ylabel="")
        pictures.append(drawn.picture)
    return pictures


def _effect_sheet(run: RunData, effects: pd.DataFrame) -> Sheet:
    """Candidate × budget and metric: the ratio to uniform, its interval and the verdict."""
    effects = effects.assign(
        place=effects["metric"] + ", " + effects["budget"].map("{:g} bits".format),
        small=[f"{_limits(row)} {row['verdict']}".strip() for row in effects.to_dict("records")],
    )
    wide = effects.pivot_table("effect", "candidate", "place", sort=False, dropna=False)
    small = effects.pivot(index="candidate", columns="place", values="small").add_suffix(" small")
    places = [str(name) for name in wide]
    frame = wide.join(small).reset_index()
    frame["words"] = [_CANDIDATES.get(name, ("", ""))[1] for name in frame["candidate"]]
    note = "Ratio below 1 is better than uniform"
    note += "." if effects["low"].isna().all() else "; below it the 95 % interval and the verdict."
    return Sheet(
        frame,
        f"Candidates beside uniform bits: {run.title}",
        note,
        formats=dict.fromkeys(places, times),
        small={"candidate": "words", **{place: f"{place} small" for place in places}},
    )


def _bit_panels(run: RunData) -> list[Picture]:
    """Mean bits of every candidate by layer type, a heat map per budget."""
    bits = run.table("allocations")
    if bits.empty:
        return []
    pictures = []
    for budget, own in bits[bits["candidate"] != UNIFORM].groupby("budget", sort=False):
        means = own.pivot_table("bits", "candidate", "layer_type", sort=False)
        paper = {kind: _published(f"bits-a{budget:g}-{kind}") for kind in means}
        if any(paper.values()):
            means = pd.concat([means, pd.DataFrame(paper, ["the paper"], dtype=float)])
        listed = "; ".join(
            f"{name} {' '.join(f'{kind} {value:.3g}' for kind, value in row.items())}"
            for name, row in means.to_dict("index").items()
        )
        edges = [*np.linspace(bits["bits"].min(), bits["bits"].max(), 7).round(2)]
        title = f"bits by layer type, mean of {budget:g}"
        with panel(f"allocation-bits-{budget}-{run.anchor}", f"{title}: {listed}",
                   height=1.25 + 0.24 * len(means), title=title) as drawn:  # fmt: skip
            heat(means, drawn.axes, edges, "mean bits", texts=True)
            drawn.axes.set(xlabel="", ylabel="")
        pictures.append(drawn.picture)
    return pictures


def _published(name: str) -> float | None:
    """A number of published.toml by its id, None if it has none."""
    text = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    values = {entry["id"]: float(entry["value"]) for entry in tomllib.loads(text)["number"]}
    return values.get(name)


def _front(run: RunData) -> list[Picture]:
    """Objective over that at the fewest bits, against mean bits, a line per source."""
    front = run.table("front")
    front = front[front["objective"] > 0] if not front.empty else front
    if front.empty:
        return []
    top = front.groupby("source")["objective"].transform("max")
    front = front.assign(relative=front["objective"] / top)
    means = front.groupby("source", sort=False)["mean_bits"].agg(["count", "min", "max"])
    listed = "; ".join(
        f"{name} {row['count']:.0f} points, {row['min']:.3g} to {row['max']:.3g} bits"
        for name, row in means.to_dict("index").items()
    )
    palette = {name: colour(_CANDIDATES.get(str(name), ("reference",))[0]) for name in means.index}
    with panel(f"allocation-front-{run.anchor}", f"Pareto fronts: {listed}", height=2.9,
               title="Pareto fronts") as drawn:  # fmt: skip
        sns.lineplot(
            front, x="mean_bits", y="relative", hue="source", style="source", ax=drawn.axes,
            palette=palette, errorbar=None, estimator=None,
        )  # fmt: skip
        log_axis(drawn.axes, "y")
        drawn.axes.set(xlabel="mean bits, weighted by MACs", ylabel="objective over its greatest")
        drawn.axes.legend(title="")
    return [drawn.picture]


def _candidate_fold(run: RunData) -> Fold:
    """Mean and range of every target."""
    frame = run.table("candidates")
    columns = _metrics(run)
    bits = run.table("trials").groupby(["budget", "candidate"])["mean_bits"].mean().reset_index()
    frame = frame.merge(bits, how="left")
    shown = frame[["candidate", "budget", "seeds", "mean_bits"]].copy()
    formats, small = {}, {}
    for metric in columns:
        target = "fid" if stem(metric) == "fid" else metric
        shown[metric], small[metric] = frame[target], f"{metric} small"
        shown[small[metric]] = [
            "" if np.isnan(low) else spread(metric, low, high)
            for low, high in zip(frame[f"{target}_min"], frame[f"{target}_max"], strict=True)
        ]
        formats[metric] = of_metric(metric)
    sheet = Sheet(
        shown,
        f"Trained networks of every candidate: {run.title}",
        "Means over training seeds, least and greatest below.",
        formats=formats,
        small=small,
        kind="dense",
    )
    return Fold("Every target of every candidate", [sheet])


def _solver_fold(run: RunData) -> list[Fold]:
    """Objective above the optimum and seconds of every solver, at every budget."""
    frame = run.table("solvers")
    if frame.empty:
        return []
    # A solver that sums in another order is a rounding error below the optimum.
    above = frame["above_optimum"].where(frame["above_optimum"].abs() > 1e-12, 0.0)
    names = ["solver", "budget", "objective", "above_optimum", "seconds"]
    sheet = Sheet(
        frame.assign(above_optimum=above)[names],
        f"Solvers on the same sensitivities, {frame['layers'].iloc[0]} layers: {run.title}",
        "Times are of one solve each, with whatever else the machine did.",
        formats={"above_optimum": percent, "seconds": seconds_text},
        heads={"above_optimum": "above optimum"},
        kind="dense",
    )
    return [Fold("Solvers: distance to the optimum and time", [sheet])]


def _timestep_fold(run: RunData) -> list[Fold]:
    frame = run.table("timestep_aware")
    if frame.empty:
        return []
    sheet = Sheet(
        frame,
        f"Bits per timestep bucket, predicted only: {run.title}",
        "Predicted objective with bits that may differ by timestep bucket at the same mean cost, "
        "beside one allocation for all; no network was trained that way.",
        heads={
            "objective_single": "one allocation",
            "objective_by_bucket": "by bucket",
            "mean_bits_by_bucket": "mean bits by bucket",
        },
        kind="dense",
    )
    return [Fold("Bits that differ by timestep", [sheet])]


def _caveats(run: RunData) -> list[str]:
    options = run.options
    found = [
        f"One model of {run.table('allocations').get('layer', pd.Series()).nunique()} layers on "
        f"{run.workload_name}: gains in a large model may differ.",
        f"Every network trains {options.get('train_steps', 'an unrecorded number of')} steps at "
        "its own bits; longer training may close gaps.",
        f"Allocations come from one measurement of the sensitivities (seed {run.seed}); only "
        "training differs between seeds. “random” is one drawing.",
    ]
    same = _same_bits(run)
    if same:
        found.append(f"{AMPN} and ptq name the same bits at a mean of {listing(same)}.")
    if any(stem(metric) == "fid" for metric in _metrics(run)):
        found.append(
            f"FID is of few samples ({options.get('samples', 'unrecorded')}) and sampling steps "
            f"({options.get('sampling_steps', 'unrecorded')}): compare it within this section only."
        )
    return found


def _same_bits(run: RunData) -> list[str]:
    """Budgets at which sensitivities before and after training choose the same bits."""
    bits = run.table("allocations")
    if bits.empty:
        return []
    wide = bits.pivot_table("bits", ["budget", "layer"], "candidate")
    if not {AMPN, "ptq"} <= set(wide.columns):
        return []
    same = (wide[AMPN] == wide["ptq"]).groupby("budget").all()
    return [significant(float(budget)) for budget in same.index[same]]
