"""Is mixed precision worth it: networks trained at the bits that metrics and solvers choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns

from reports.generic import table_fold
from reports.loading import RunData
from reports.mixed import UNIFORM, fid_name, limits, section, verdicts
from reports.page import Block, Figures, Fold, Points, Section, Sheet, sentence
from reports.published import published_values
from reports.text import Phrase, joined, listing, of_metric, plural, spread, times
from robuq_bench.figure_cache import heat_panel
from robuq_bench.figures import Picture, colour, log_axis, panel, points
from robuq_bench.statistics.comparisons import MARGIN

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
_NEEDED = ("trials", "candidates", "allocations", "front")
#: Tables of the run that are shown as they are.
_RAW = ("solvers", "timestep_aware")
_SUBJECT = r"(?P<candidate>.+) over (?P<baseline>.+), (?P<budget>[\d.]+) bits, (?P<metric>.+)"


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """What candidates reach beside uniform bits; None where no run has its tables."""
    return section(runs, _NEEDED, "Mixed precision", _answer, _blocks, "candidates")


def _effects(run: RunData) -> pd.DataFrame:
    """Verdicts on candidates beside uniform, by candidate, budget and metric; `limits` as text."""
    frame = verdicts(run).astype(dict.fromkeys(("effect", "low", "high"), float))
    named = frame["subject"].astype(str).str.extract(_SUBJECT).astype({"budget": float})
    # No rounding takes a limit across the margin.
    texts = limits(frame["low"], frame["high"], (MARGIN, 1.0, 1 / MARGIN))
    return frame.join(named).assign(limits=texts).query("baseline == @UNIFORM")


def _answer(run: RunData) -> list[Phrase]:
    """AMPN beside uniform at the smallest budget: ratio, interval, seeds and verdict."""
    own = _effects(run).query("candidate == @AMPN").dropna(subset="effect")
    own = own[own["budget"] == own["budget"].min()]
    if own.empty:
        return sentence(f"AMPN ({AMPN}) and {UNIFORM} bits were not judged.")
    ratios = (own["effect"].map(times) + " " + own["limits"]).str.strip()
    texts = ratios + " the " + own["metric"] + " of uniform bits (" + own["verdict"] + ")"
    return sentence(
        f"At a mean of {own['budget'].iloc[0]:g} bits, AMPN ({AMPN}) reaches ",
        *joined([Phrase(text, run.href) for text in texts], " and "),
        f", over {plural(int(own['n'].iloc[0]), 'training seed')}.",
    )


def _blocks(run: RunData) -> list[Block]:
    effects = _effects(run)
    key = [
        ("uniform bits", "│ uniform bits"),
        *((when, f"◆ measured {when}") for when in ("before training", "after training")),
        ("reference", "◆ random bits"),
    ]
    ratios = (
        "Candidates beside uniform bits with the same training seed, lower is better: a dot per "
        "seed, the diamond is the judged ratio with its interval, if it has one."
    )
    bits = (
        "Mean bits by layer type, the paper’s of DiT-XL/2 where it names some; and the exact "
        "Pareto front of every source of sensitivities. Sources measure different quantities, so "
        "only shapes compare."
    )
    return [
        Figures(_ratio_panels(run, effects), ratios, key),
        *([] if effects.empty else [_effect_sheet(run, effects)]),
        Figures([*_bit_panels(run), *_front(run)], bits),
        Fold("What this cannot say", [Points(_caveats(run))]),
        _candidate_fold(run),
        *(table_fold(run, name) for name in _RAW if name in run.tables),
    ]


def _colours(candidates: Sequence[str]) -> dict[str, str]:
    return {name: colour(_CANDIDATES.get(name, ("reference",))[0]) for name in candidates}


def _ratio_panels(run: RunData, effects: pd.DataFrame) -> list[Picture]:
    """A panel per budget and judged metric: every seed's ratio to uniform."""
    trials = run.table("trials").set_index(["candidate", "budget", "seed"])
    ratios = (trials / trials.xs(UNIFORM)).reset_index()
    pictures = []
    for (budget, metric), own in effects.groupby(["budget", "metric"], sort=False):
        if own["effect"].isna().all():
            continue
        order = list(own["candidate"].unique())
        seeds = ratios[(ratios["budget"] == budget) & ratios["candidate"].isin(order)]
        texts = own["candidate"] + " " + own["effect"].map(times) + " " + own["verdict"]
        title = f"{metric}, {budget:g} bits"
        alt = f"{title} over uniform: {'; '.join(texts)}"
        name = f"allocation-{budget}-{metric}-{run.anchor}"
        look = {"order": order, "palette": _colours(order)}
        with panel(name, alt, height=0.9 + 0.24 * len(order), title=title) as drawn:
            sns.stripplot(
                seeds, x=metric, y="candidate", hue="candidate", ax=drawn.axes, legend=False,
                size=3.5, jitter=False, alpha=0.5, **look,
            )  # fmt: skip
            points(own, drawn.axes, "candidate", ["low", "effect", "high"], hue="candidate",
                   marker="D", markersize=4, **look)  # fmt: skip
            drawn.axes.axvline(1, color=colour("uniform bits"))
            drawn.axes.locator_params(axis="x", nbins=5)
            drawn.axes.set(xlabel="ratio to uniform", ylabel="")
        pictures.append(drawn.picture)
    return pictures


def _effect_sheet(run: RunData, effects: pd.DataFrame) -> Sheet:
    """Candidate × budget and metric: the ratio to uniform, its interval and the verdict."""
    effects = effects.assign(
        place=effects["metric"] + ", " + effects["budget"].map("{:g} bits".format),
        small=(effects["limits"] + " " + effects["verdict"]).str.strip(),
    )
    wide = effects.pivot_table("effect", "candidate", "place", sort=False, dropna=False)
    small = effects.pivot(index="candidate", columns="place", values="small").add_suffix(" small")
    places = [str(name) for name in wide]
    frame = wide.join(small).reset_index()
    frame["words"] = [_CANDIDATES.get(name, ("", ""))[1] for name in frame["candidate"]]
    return Sheet(
        frame,
        f"Candidates beside uniform bits: {run.title}",
        "A ratio below 1 is better than uniform; below it the 95 % interval, if there is one, and "
        "the verdict.",
        formats=dict.fromkeys(places, times),
        small={"candidate": "words", **{place: f"{place} small" for place in places}},
    )


def _bit_panels(run: RunData) -> list[Picture]:
    """Mean bits of every candidate by layer type, a heat map per budget."""
    bits, published = run.table("allocations"), published_values()
    edges = np.linspace(bits["bits"].min(), bits["bits"].max(), 7).round(2).tolist()
    pictures = []
    for budget, own in bits[bits["candidate"] != UNIFORM].groupby("budget", sort=False):
        means = own.pivot_table("bits", "candidate", "layer_type", sort=False)
        paper = [published.get(f"bits-a{budget:g}-{kind}", np.nan) for kind in means]
        means = pd.concat([means, pd.DataFrame([paper], ["the paper"], means.columns)])
        means = means.dropna(how="all")
        listed = "; ".join(
            f"{name} {' '.join(f'{kind} {value:.3g}' for kind, value in row.items())}"
            for name, row in means.to_dict("index").items()
        )
        title, name = f"bits by layer type, mean of {budget:g}", f"allocation-bits-{budget}"
        alt, name = f"{title}: {listed}", f"{name}-{run.anchor}"
        pictures.append(heat_panel(name, alt, title, means, edges, "mean bits", True))
    return pictures


def _front(run: RunData) -> list[Picture]:
    """Objective over that at the fewest bits, against mean bits, a line per source."""
    front = run.table("front").query("objective > 0")
    if front.empty:
        return []
    by_source = front.groupby("source", sort=False)
    front = front.assign(relative=front["objective"] / by_source["objective"].transform("max"))
    listed = "; ".join(
        f"{name} {len(means)} points, {means.min():.3g} to {means.max():.3g} bits"
        for name, means in by_source["mean_bits"]
    )
    with panel(f"allocation-front-{run.anchor}", f"Pareto fronts: {listed}", height=2.9,
               title="Pareto fronts") as drawn:  # fmt: skip
        sns.lineplot(
            front, x="mean_bits", y="relative", hue="source", style="source", ax=drawn.axes,
            palette=_colours([str(name) for name in by_source.groups]), errorbar=None,
            estimator=None,
        )  # fmt: skip
        log_axis(drawn.axes, "y")
        drawn.axes.set(xlabel="mean bits, weighted by MACs", ylabel="objective over its greatest")
        drawn.axes.legend(title="")
    return [drawn.picture]


def _candidate_fold(run: RunData) -> Fold:
    """Mean and range of every target."""
    trials = run.table("trials")
    fid = {f"fid{end}": f"{fid_name(run)}{end}" for end in ("", "_min", "_max")}
    frame = run.table("candidates").rename(columns=fid)
    bits = trials.groupby(["budget", "candidate"], as_index=False)["mean_bits"].mean()
    metrics = [str(name) for name in trials if f"{name}_min" in frame]
    for name in metrics:
        ends = zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        frame[f"{name} range"] = [spread(name, low, high) for low, high in ends]
    small = {name: f"{name} range" for name in metrics}
    gains = [name for name in frame if name == "headroom" or name.endswith("_regret")]
    columns = ["candidate", "budget", "seeds", "mean_bits", *gains, *metrics, *small.values()]
    sheet = Sheet(
        frame.merge(bits, how="left")[columns],
        f"Trained networks of every candidate: {run.title}",
        "Means over training seeds, least and greatest below. Headroom: what the candidate’s "
        "sensitivities predict of uniform bits over what they predict of its own; regret: its mean "
        "over the least of any candidate.",
        formats={name: of_metric(name) for name in metrics} | dict.fromkeys(gains, times),
        heads={name: name.replace("_", " ") for name in gains},
        small=small,
        kind="dense",
    )
    return Fold("Every target of every candidate", [sheet])


def _caveats(run: RunData) -> list[str]:
    options = run.options
    found = [
        f"One model of {run.table('allocations')['layer'].nunique()} layers on "
        f"{run.workload_name}: gains in a large model may differ.",
        f"Every network trains {options.get('train_steps', 'an unrecorded number of')} steps at "
        "its own bits; longer training may close gaps.",
        f"Allocations come from one measurement of the sensitivities (seed {run.seed}); only "
        "training differs between seeds. “random” is one drawing.",
        "Solvers are timed in one solve each, with whatever else the machine did; objectives of "
        "bits per timestep bucket are predicted: no network was trained that way.",
    ]
    wide = run.table("allocations").pivot_table("bits", ["budget", "layer"], "candidate")
    wide = wide.reindex(columns=[AMPN, "ptq"])
    same = (wide[AMPN] == wide["ptq"]).groupby("budget").all()
    if same.any():
        budgets = listing(f"{budget:g}" for budget in same.index[same])
        found.append(f"{AMPN} and ptq name the same bits at a mean of {budgets}.")
    if fid_name(run) in run.table("trials"):
        found.append(
            f"FID is of few samples ({options.get('samples', 'unrecorded')}) and sampling steps "
            f"({options.get('sampling_steps', 'unrecorded')}): compare it within this section only."
        )
    return found
