"""Do sensitivities measured before training mislead: metrics beside what training says itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns

from reports.generic import VERDICTS, table_fold
from reports.loading import RunData
from reports.mixed import bits_text, limits, section, verdicts
from reports.page import Block, Figures, Fold, Points, Section, Sheet, sentence
from reports.text import Phrase, fixed, listing, plural, significant
from robuq_bench.figure_cache import heat_panel
from robuq_bench.figures import Picture, colour, log_axis, log_edges, panel, points
from robuq_bench.statistics.reliability import correlation_cap

ORDER = 50
QUESTION = "Do sensitivities measured before training mislead?"
OPEN = ("Sensitivities measured before training misrank layers",)
EXPORTS = ("sensitivity-agreement.csv",)
_WHEN = ("before training", "after training")
_RHOS = ("ρ before", "ρ after", "τ before", "τ after")
_NEEDED = ("metrics", "truth", "agreement", "gains", VERDICTS)
_RAW = ("agreement", "gains", "ceiling", "recovered")
_MAX_LAYERS = 40


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Agreement with the truth before and after training; None where no run has its tables."""
    return section(runs, _NEEDED, "Sensitivity", _answer, _blocks, "agreement")


def _table(run: RunData, name: str) -> pd.DataFrame:
    """A table of the run with its bit widths as texts, because one of them is "all"."""
    frame = run.table(name)
    return frame.astype({column: str for column in frame if column == "bits"})


def _judged(run: RunData) -> pd.DataFrame:
    """Rows of `gains` of the metric that verdicts are given on, one per bit width."""
    frame = _table(run, "gains")
    return frame[frame["metric"] == frame["metric"].iloc[0]]


def _ends(run: RunData, name: str) -> pd.DataFrame:
    """Rows of a table measured before and after training, in a column `when`."""
    judged, frame = _judged(run).iloc[0], _table(run, name)
    steps = {judged["steps_after"]: _WHEN[1], judged["steps_before"]: _WHEN[0]}
    return frame.assign(when=frame["steps"].map(steps)).dropna(subset="when")


def _truth(run: RunData) -> pd.DataFrame:
    """Rows of `truth` of the judged target; `place` is `blocks.3.attn.qkv` as `b3 qkv`."""
    truth = _table(run, "truth").merge(_judged(run)[["target"]].head(1))
    place = truth["layer"].str.replace(r"^\D*(\d+)\.(?:.*\.)?(\w+)$", r"b\1 \2", regex=True)
    return truth.assign(place=place)


def _by_width(run: RunData) -> pd.DataFrame:
    """Per bit width: ρ and τ before and after, gain, verdict, agreement of seeds and its cap."""
    judged = _judged(run).set_index("bits", drop=False)
    found = _ends(run, "agreement").merge(judged[["metric", "target"]].head(1)).set_index("bits")
    for head in _RHOS:
        name = {"ρ": "spearman", "τ": "kendall"}[head[0]]
        own = found[found["when"] == f"{head[2:]} training"]
        judged[head] = own[name]
        judged[f"{head} limits"] = limits(own[f"{name}_low"], own[f"{name}_high"], (0.0, 1.0))
    seeds = int(_truth(run)["seeds"].min())
    width = judged["bits"].map(bits_text)
    return judged.assign(
        width=width,
        verdict=width.map(verdicts(run).set_index("subject")["verdict"]),
        cap=judged["seed_agreement"].map(lambda rho: correlation_cap(rho, seeds)),
        **{"gain limits": limits(judged["low"], judged["high"], (0.0, 0.05))},
    )


def _rho(value: float) -> str:
    return fixed(value, 2)


def _answer(run: RunData) -> list[Phrase]:
    """The verdict over all bit widths (or the last there is) in a sentence."""
    row = _by_width(run).to_dict("records")[-1]
    verbs = {"holds": "mislead", "does not hold": "rank layers about as well as those after it"}
    verb = verbs.get(str(row["verdict"]), f"may or may not mislead ({row['verdict']})")
    start = f"Sensitivities measured before training {verb}: over {row['width']}, Spearman’s ρ of "
    start += f"{row['metric']} with the trained truth is "
    if math.isnan(row["gain"] + row["ρ before"] + row["ρ after"]):
        return sentence(f"{start}not defined.")
    before, after = (f"{_rho(row[head])} {row[f'{head} limits']}" for head in _RHOS[:2])
    cap = "" if math.isnan(row["cap"]) else f"; the truth’s noise caps ρ near {_rho(row['cap'])}"
    return sentence(
        f"{start}{before} before training and {after} after "
        f"{plural(int(row['steps_after']), 'step')}, ",
        Phrase(f"a gain of {significant(row['gain'], 2)} {row['gain limits']}", run.href),
        f"{cap}.",
    )


def _blocks(run: RunData) -> list[Block]:
    judged = _by_width(run)
    folds = {"agreement": _steps_fold, "metrics": _type_fold, "interactions": _additivity_fold,
             "timesteps": _timestep_fold}  # fmt: skip
    return [
        _agreement_figures(run, judged),
        _width_sheet(run, judged),
        _truth_figures(run),
        *([_regret_sheet(run)] if "regret" in run.tables else []),
        Fold("What this cannot say", [Points(_caveats(run))]),
        *(fold(run) for name, fold in folds.items() if name in run.tables),
        *(table_fold(run, name) for name in _RAW if name in run.tables),
    ]


def _agreement_figures(run: RunData, judged: pd.DataFrame) -> Figures:
    """ρ of every metric before and after training: over all bit widths, and at 2 or the fewest."""
    found = _ends(run, "agreement").merge(judged[["target"]].head(1)).dropna(subset="spearman")
    usual = min(judged["bits"], key=lambda bits: (bits != "2", bits))
    pictures = []
    for bits in dict.fromkeys([judged["bits"].iloc[-1], usual]):
        own, title, cap = found[found["bits"] == bits], bits_text(bits), judged["cap"][bits]
        if own.empty:
            continue
        texts = own["metric"] + " " + own["when"] + " " + own["spearman"].map(_rho)
        noted = "" if math.isnan(cap) else f"; cap {_rho(cap)}"
        alt = f"Spearman's rho with the truth, {title}: {'; '.join(texts)}{noted}"
        with panel(f"sensitivity-rho-{bits}-{run.anchor}", alt, height=2.9, title=title) as drawn:
            points(own, drawn.axes, "metric", ["spearman_low", "spearman", "spearman_high"],
                   hue="when", hue_order=_WHEN, dodge=0.4, markersize=4,
                   palette=[colour(when) for when in _WHEN])  # fmt: skip
            if noted:
                drawn.axes.axvline(cap, color=colour("reference"), linestyle=":")
            drawn.axes.set(xlabel="Spearman’s ρ with the truth", ylabel="")
        pictures.append(drawn.picture)
    caption = (
        "Spearman’s ρ of every metric with the truth; 95 % intervals from resampling layers. A "
        "perfect metric reaches the cap, which follows from how well training seeds agree."
    )
    key = [*((when, f"● {when}") for when in _WHEN), ("reference", "┄ cap, where it is known")]
    return Figures(pictures, caption, key)


def _width_sheet(run: RunData, judged: pd.DataFrame) -> Sheet:
    small = {name: f"{name} limits" for name in [*_RHOS, "gain"]}
    first = judged.to_dict("records")[0]
    columns = ["width", "verdict", "gain", *_RHOS, "seed_agreement", "cap", *small.values()]
    return Sheet(
        judged[columns].assign(run=run.href),
        f"Do sensitivities measured before training mislead? {run.title}",
        f"Agreement of {first['metric']} with the increase of {first['target']} before training "
        f"and after {plural(int(first['steps_after']), 'step')}, 95 % intervals below; gain: of "
        "Spearman’s ρ. Seeds: ρ of one seed’s truth with the mean of the others.",
        formats={
            "gain": lambda value: significant(value, 2),
            **dict.fromkeys([*_RHOS, "seed_agreement", "cap"], _rho),
        },
        heads={"width": "bits", "seed_agreement": "seeds", "cap": "cap of ρ"},
        links={"gain": "run"},
        small=small,
    )


def _paired(run: RunData) -> pd.DataFrame:
    """The judged metric beside the truth, per layer and bits, before and after training."""
    metrics = _ends(run, "metrics").merge(_judged(run)[["metric"]].head(1))
    return metrics.merge(_truth(run)[["layer", "bits", "increase"]])


def _truth_figures(run: RunData) -> Figures:
    """Metric against truth, and the truth as a heat map."""
    metric, paired = _judged(run)["metric"].iloc[0], _paired(run)
    above = paired[(paired["increase"] > 0) & (paired["value"] > 0)]
    pictures = []
    for when, own in above.groupby("when", sort=False):
        rho = _rho(own["value"].corr(own["increase"], method="spearman"))
        alt = f"{metric} {when} against the truth, {len(own)} points: rank correlation {rho}"
        with panel(f"sensitivity-{when}-{run.anchor}", alt, height=2.5, title=str(when)) as drawn:
            sns.scatterplot(
                own.assign(bits=own["bits"].map(bits_text)), x="value", y="increase", style="bits",
                ax=drawn.axes, color=colour(str(when)), s=26,
            )  # fmt: skip
            log_axis(drawn.axes, "x")
            log_axis(drawn.axes, "y")
            drawn.axes.set(xlabel=metric, ylabel="increase of the loss")
            drawn.axes.legend(handletextpad=0.1, borderpad=0)
        pictures.append(drawn.picture)
    below = int((_truth(run)["increase"] <= 0).sum())
    return Figures(
        [*pictures, *_truth_heat(run)],
        "Metric against truth, one mark per layer and bit width, both axes logarithmic "
        f"({plural(below, 'truth')} not above 0 left out), and the truth itself.",
    )


def _truth_heat(run: RunData) -> list[Picture]:
    """Increase of the loss by layer (by layer type where there are many) and bits."""
    truth = _truth(run)
    rows = "layer_type" if truth["layer"].nunique() > _MAX_LAYERS else "place"
    values = truth.pivot_table("increase", rows, "bits", sort=False)
    above = values.where(values > 0)
    edges = log_edges(above.min().min(), above.max().max())
    worst = truth.nlargest(3, "increase")
    texts = worst["place"] + ", " + worst["bits"].map(bits_text)
    texts += worst["increase"].map(": {:.2g}".format)
    alt = f"Increase of the loss when one layer trains at these bits; greatest: {'; '.join(texts)}"
    cells = values.map(lambda value: f"{value:.2g}".replace("-", "−"))
    name, label = f"sensitivity-truth-{run.anchor}", "increase of the loss"
    return [heat_panel(name, alt, "truth", above, edges, label, cells, "bits")] if edges else []


def _regret_sheet(run: RunData) -> Sheet:
    """What the bits chosen by each metric lose by the truth."""
    frame = _ends(run, "regret").sort_values(["budget", "steps"], kind="stable")
    frame["place"] = frame["budget"].map("{:g} bits, ".format) + frame["when"]
    wide = frame.pivot_table("regret", "metric", "place", sort=False)
    gains = pd.DataFrame()
    if "headroom" in frame:  # since version 4
        texts = frame.assign(text=frame["headroom"].map("headroom {:.3g}".format))
        gains = texts.pivot(index="metric", columns="place", values="text").add_suffix(" headroom")
    return Sheet(
        wide.join(gains).reset_index(),
        f"Regret of the bits that a metric chooses: {run.title}",
        "Sum of the truth over layers at the bits that the exact optimum for the metric chooses, "
        "minus the least sum of any bits at that mean: 0 is the best allocation. Noise of the "
        "truth is part of it. Headroom: what the metric predicts of the same bits everywhere over "
        "what it predicts of its choice; near 1, it sees nothing to gain.",
        formats=dict.fromkeys(map(str, wide), lambda value: significant(value, 2)),
        small={name: f"{name} headroom" for name in map(str, wide) if f"{name} headroom" in gains},
    )


def _sheet_fold(summary: str, frame: pd.DataFrame, caption: str, note: str) -> Fold:
    heads = {"layer_type": "layers", "when": "measured"}
    frame = frame.reset_index().rename(columns=heads)
    return Fold(summary, [Sheet(frame, caption, note, kind="dense")])


def _steps_fold(run: RunData) -> Fold:
    """Agreement of every metric at every measurement, not only before and after training."""
    found = _table(run, "agreement").merge(_judged(run)[["target"]].head(1))
    wide = found.pivot_table("spearman", ["bits", "metric"], "steps", sort=False, dropna=False)
    return _sheet_fold(
        "Agreement after every number of steps",
        wide.sort_index(axis=1).rename(columns=lambda steps: plural(steps, "step")),
        f"Spearman’s ρ with the truth by training steps before measuring: {run.title}",
        "",
    )


def _type_fold(run: RunData) -> Fold:
    """Truth over metric by layer type: which types training helps more than the metric says."""
    sums = _paired(run).groupby(["layer_type", "bits", "when"], sort=False)
    totals = sums[["increase", "value"]].sum()
    ratio = totals["increase"] / totals["value"]
    return _sheet_fold(
        "Truth over metric, by layer type",
        ratio[np.isfinite(ratio)].unstack("when").reindex(columns=[*_WHEN]),
        f"Truth over metric by layer type: {run.title}",
        "Sums over the layers of a type; both are mean squares of the noise prediction. Below 1, "
        "training mends what the metric says is lost; below 0, the type lost nothing. A rank "
        "correlation cannot show this.",
    )


def _additivity_fold(run: RunData) -> Fold:
    """Whether sensitivities add up, as the allocator assumes."""
    frame = run.table("interactions")
    frame["bits lowered in"] = frame["kind"].map({"pair": "pairs", "whole": "whole allocations"})
    ratios = frame.groupby(["bits lowered in", "steps"])["ratio"]
    return _sheet_fold(
        "Additivity: do sensitivities of layers add up?",
        ratios.agg(["count", "median", "min", "max"]),
        f"Measured over predicted change of the noise prediction: {run.title}",
        "Predicted is the sum over layers, as the allocator assumes; 1 is exact additivity.",
    )


def _timestep_fold(run: RunData) -> Fold:
    """The judged metric by timestep bucket and layer type, before and after training."""
    frame = _ends(run, "timesteps")
    frame["bucket"] = "bucket " + (frame["bucket"] + 1).astype(str)
    return _sheet_fold(
        "Sensitivity by timestep",
        frame.pivot_table("value", ["layer_type", "bits", "when"], "bucket", sort=False),
        f"Change of the noise prediction by timestep: {run.title}",
        "Mean over the layers of a type; bucket 1 has the least noise.",
    )


def _caveats(run: RunData) -> list[str]:
    truth = _truth(run)
    noisy = int((truth["std"] >= truth["increase"].abs()).sum())
    steps = run.options.get("truth_steps", "an unrecorded number of")
    seeds = listing(str(count) for count in sorted(truth["seeds"].unique()))
    return [
        f"One model of {truth['layer'].nunique()} layers on {run.workload_name}: orders of layers "
        "in a large model may differ.",
        f"The truth is the mean of {seeds} training seeds of {steps} steps each; in {noisy} of "
        f"{len(truth)} cells its spread over seeds is at least its mean, and order among those is "
        "chance.",
        "Intervals resample layers, not training seeds or calibration batches.",
        "The cap supposes independent errors of equal size, and rank correlation only follows it "
        "roughly: a metric may come out above it.",
        "An order of layers is not the worth of the bits chosen by it: that is the question of "
        "study allocation.",
    ]
