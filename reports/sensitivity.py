"""Do sensitivities measured before training mislead: metrics beside what training says itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns

from reports.generic import VERDICTS, rule_of, table_fold
from reports.loading import RunData
from reports.mixed import SENSITIVITY_RULE, bits_text, is_older, sensitivity_claims, stacked
from reports.page import Block, Claim, Figures, Fold, Heading, Points, Section, Sheet, sentence
from reports.text import Phrase, fixed, listing, plural, significant
from robuq_bench.figures import Picture, colour, heat, log_axis, log_edges, panel
from robuq_bench.statistics.verdicts import interval_text

ORDER = 50
QUESTION = "Do sensitivities measured before training mislead?"
OPEN = ("Sensitivities measured before training misrank layers",)
EXPORTS = ("sensitivity-agreement.csv",)
_WHEN = ("before training", "after training")
_COLUMNS = ("bits", "metric", "target", "steps_before", "steps_after", "gain", "low", "high")
_MAX_LAYERS = 40


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Agreement with the truth before and after training; None where no run has its tables."""
    whole = [
        run
        for run in runs
        if not any(run.table(n).empty for n in ("metrics", "truth", "agreement", VERDICTS))
    ]
    if not whole:
        return None
    claims = {run: sensitivity_claims(run) for run in whole}
    blocks: list[Block] = []
    for run in whole:
        blocks += [Heading(run.title)] if len(whole) > 1 else []
        blocks += _blocks(run, claims[run])
    first = whole[0]
    return Section(
        anchor="sensitivity",
        title="Sensitivity",
        answer=_answer(first, claims[first]),
        blocks=blocks,
        claims=[claim for own in claims.values() for claim in own],
        rule=SENSITIVITY_RULE if is_older(first) else rule_of([first]),
        exports={"sensitivity-agreement": stacked(whole, "agreement")},
    )


def _judged(run: RunData) -> pd.DataFrame:
    """Rows of the metric that verdicts are given on, one per bit width (a text)."""
    frame = run.table(VERDICTS if is_older(run) else "gains")
    frame = frame[frame["metric"] == frame["metric"].iloc[0]]
    return frame.loc[:, list(_COLUMNS)].astype({"bits": str})


def _ends(run: RunData, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows measured before and after training, in a column `when`, bits as texts."""
    judged = _judged(run).iloc[0]
    steps = {judged["steps_after"]: _WHEN[1], judged["steps_before"]: _WHEN[0]}
    frame = frame.astype({"bits": str}).assign(when=frame["steps"].map(steps))
    return frame.dropna(subset="when")


def _truth(run: RunData) -> pd.DataFrame:
    truth = run.table("truth").astype({"bits": str})
    return truth[truth["target"] == _judged(run)["target"].iloc[0]]


def _by_width(run: RunData, claims: Sequence[Claim]) -> pd.DataFrame:
    """Per bit width: ρ and τ before and after, gain, verdict, agreement of seeds and its cap."""
    judged = _judged(run).set_index("bits")
    metric, target = judged["metric"].iloc[0], judged["target"].iloc[0]
    found = _ends(run, run.table("agreement"))
    found = found[(found["target"] == target) & (found["metric"] == metric)]
    for name, sign in (("spearman", "ρ"), ("kendall", "τ")):
        for when, own in found.set_index("bits").groupby("when"):
            head = f"{sign} {str(when).split()[0]}"
            judged[head] = own[name]
            judged[f"{head} limits"] = _limits(own[f"{name}_low"], own[f"{name}_high"])
    judged["seeds"] = np.nan
    ceiling = run.table("ceiling")
    if not ceiling.empty:
        own = ceiling[ceiling["target"] == target].astype({"bits": str})
        judged["seeds"] = own.groupby("bits")["spearman"].mean()
    seeds = int(_truth(run)["seeds"].min())
    judged["cap"] = judged["seeds"].map(lambda rho: _cap(rho, seeds))
    judged["width"] = [bits_text(bits) for bits in judged.index]
    words = {claim.verdict.subject: claim.verdict.verdict for claim in claims}
    judged["verdict"] = judged["width"].map(words)
    judged["gain limits"] = _limits(judged["low"], judged["high"], (0.0, 0.05))
    return judged.reset_index()


def _cap(agreement: float, seeds: int) -> float:
    """Greatest correlation that a perfect metric reaches with a mean over seeds.

    `agreement` is c, the correlation of one seed with the mean of the k - 1 others. With r the
    reliability of one seed, c² = r · (k-1)r / (1 + (k-2)r) by Spearman-Brown; the mean of k seeds
    correlates with what it estimates to sqrt(kr / (1 + (k-1)r)).
    """
    if not agreement > 0 or seeds < 2:
        return math.nan
    c, k = agreement**2, seeds
    r = (c * (k - 2) + math.sqrt(c**2 * (k - 2) ** 2 + 4 * (k - 1) * c)) / (2 * (k - 1))
    return math.sqrt(k * r / (1 + (k - 1) * r))


def _limits(low: pd.Series, high: pd.Series, thresholds: Sequence[float] = (0.0, 1.0)) -> pd.Series:
    """`[low to high]` of every row, "" where there is no interval."""
    texts = [
        "" if math.isnan(a + b) else interval_text(a, b, thresholds)
        for a, b in zip(low, high, strict=True)
    ]
    return pd.Series(texts, low.index)


def _rho(value: float) -> str:
    return fixed(value, 2)


def _answer(run: RunData, claims: Sequence[Claim]) -> list[Phrase]:
    """The verdict over all bit widths (or the last there is) in a sentence."""
    row = _by_width(run, claims).to_dict("records")[-1]
    verb = {
        "holds": "mislead",
        "does not hold": "rank layers about as well as those after it",
    }.get(str(row["verdict"]), f"may or may not mislead ({row['verdict']})")
    start = f"Sensitivities measured before training {verb}: over {row['width']}, Spearman’s ρ of "
    if math.isnan(row["gain"] + row["ρ before"] + row.get("ρ after", math.nan)):
        return sentence(f"{start}{row['metric']} with the trained truth is not defined.")
    cap = "" if math.isnan(row["cap"]) else f"; the truth’s noise caps ρ near {_rho(row['cap'])}"
    return sentence(
        f"{start}{row['metric']} with the trained truth is {_rho(row['ρ before'])} "
        f"{row['ρ before limits']} before training and {_rho(row['ρ after'])} "
        f"{row['ρ after limits']} "
        f"after {plural(int(row['steps_after']), 'step')}, ",
        Phrase(f"a gain of {significant(row['gain'], 2)} {row['gain limits']}", run.href),
        f"{cap}.",
    )


def _blocks(run: RunData, claims: Sequence[Claim]) -> list[Block]:
    judged = _by_width(run, claims)
    found = _ends(run, run.table("agreement")).dropna(subset="spearman")
    found = found[found["target"] == judged["target"].iloc[0]]
    caps = judged.set_index("bits")["cap"]
    pictures = [
        _agreement_panel(run, own, bits, float(caps[bits]))
        for bits in dict.fromkeys([judged["bits"].iloc[-1], _usual(run)])
        if not (own := found[found["bits"] == bits]).empty
    ]
    caption = (
        "Spearman’s ρ of every metric with the truth; 95 % intervals from resampling layers. A "
        "perfect metric reaches the cap, which follows from how well training seeds agree."
    )
    key = [*((when, f"● {when}") for when in _WHEN), ("reference", "┄ cap by the truth’s noise")]
    drawn = [Figures(pictures, caption, key[: 2 if caps.isna().all() else 3])] if pictures else []
    folds = (_steps_fold(run), _type_fold(run), _additivity_fold(run), _timestep_fold(run))
    raw = (name for name in ("agreement", "gains", "ceiling", "recovered") if name in run.tables)
    return [
        *drawn,
        _width_sheet(run, judged),
        *_truth_figures(run),
        *_regret(run),
        Fold("What this cannot say", [Points(_caveats(run))]),
        *(fold for fold in folds if fold is not None),
        *(table_fold(run, name) for name in raw),
    ]


def _usual(run: RunData) -> str:
    """2 bits, or the fewest that the truth has."""
    widths = sorted(_truth(run)["bits"].unique())
    return "2" if "2" in widths else str(widths[0])


def _agreement_panel(run: RunData, found: pd.DataFrame, bits: str, cap: float) -> Picture:
    ends = found.melt(["metric", "when"], ["spearman", "spearman_low", "spearman_high"])
    listed = "; ".join(
        f"{row['metric']} {row['when']} {_rho(row['spearman'])}" for row in found.to_dict("records")
    )
    noted = "" if math.isnan(cap) else f"; cap {_rho(cap)}"
    alt = f"Spearman's rho with the truth, {bits_text(bits)}: {listed}{noted}"
    with panel(
        f"sensitivity-rho-{bits}-{run.anchor}", alt, height=2.9, title=bits_text(bits)
    ) as at:
        sns.pointplot(
            ends, x="value", y="metric", hue="when", hue_order=_WHEN, ax=at.axes, dodge=0.4,
            palette=[colour(when) for when in _WHEN], estimator="median", errorbar=("pi", 100),
            linestyle="none", marker="o", markersize=4, legend=False,
        )  # fmt: skip
        if not math.isnan(cap):
            at.axes.axvline(cap, color=colour("reference"), linestyle=":")
        at.axes.set(xlabel="Spearman’s ρ with the truth", ylabel="")
    return at.picture


def _width_sheet(run: RunData, judged: pd.DataFrame) -> Sheet:
    names = ("ρ before", "ρ after", "τ before", "τ after")
    rhos = [name for name in names if name in judged]
    small = {name: f"{name} limits" for name in [*rhos, "gain"]}
    first = judged.to_dict("records")[0]
    return Sheet(
        judged[["width", "verdict", "gain", *rhos, "seeds", "cap", *small.values()]].assign(
            run=run.href
        ),
        f"Do sensitivities measured before training mislead? {run.title}",
        f"Agreement of {first['metric']} with the increase of {first['target']} before training "
        f"and after {plural(int(first['steps_after']), 'step')}, 95 % intervals below; gain: of "
        "Spearman’s ρ. Seeds: ρ of one seed’s truth with the mean of the others.",
        formats={
            "gain": lambda value: significant(value, 2),
            **dict.fromkeys([*rhos, "seeds", "cap"], _rho),
        },
        heads={"width": "bits", "cap": "cap of ρ"},
        links={"gain": "run"},
        small=small,
    )


def _paired(run: RunData) -> pd.DataFrame:
    """The judged metric beside the truth, per layer and bits, before and after training."""
    metrics = _ends(run, run.table("metrics"))
    own = metrics[metrics["metric"] == _judged(run)["metric"].iloc[0]]
    return own.merge(_truth(run)[["layer", "bits", "increase"]])


def _truth_figures(run: RunData) -> list[Block]:
    """Metric against truth, and the truth as a heat map."""
    judged = _judged(run).iloc[0]
    paired, truth = _paired(run), _truth(run)
    above = paired[(paired["increase"] > 0) & (paired["value"] > 0)]
    pictures = []
    for when, own in above.groupby("when", sort=False):
        alt = (
            f"{judged['metric']} {when} against the truth, {len(own)} points: rank correlation "
            f"{_rho(own['value'].corr(own['increase'], method='spearman'))}"
        )
        with panel(f"sensitivity-{when}-{run.anchor}", alt, height=2.5, title=str(when)) as at:
            sns.scatterplot(
                own.assign(bits=own["bits"].map(bits_text)), x="value", y="increase", style="bits",
                ax=at.axes, color=colour(str(when)), s=26,
            )  # fmt: skip
            log_axis(at.axes, "x")
            log_axis(at.axes, "y")
            at.axes.set(xlabel=str(judged["metric"]), ylabel="increase of the loss")
            at.axes.legend(handletextpad=0.1, borderpad=0)
        pictures.append(at.picture)
    below = int((truth["increase"] <= 0).sum())
    caption = "Metric against truth, one mark per layer and bit width, both axes logarithmic"
    caption += f" ({plural(below, 'truth')} not above 0 left out)" if below else ""
    heat_map = _truth_heat(run, truth)
    if heat_map is not None:
        pictures.append(heat_map)
        caption += ". The heat map is the truth itself"
    return [Figures(pictures, f"{caption}.")] if pictures else []


def _truth_heat(run: RunData, truth: pd.DataFrame) -> Picture | None:
    """Increase of the loss by layer (by layer type where there are many) and bits."""
    many = truth["layer"].nunique() > _MAX_LAYERS
    rows = truth["layer_type"] if many else truth["layer"].map(_short)
    values = truth.assign(row=rows).pivot_table("increase", "row", "bits", sort=False)
    above = values.where(values > 0)
    edges = log_edges(above.min().min(), above.max().max())
    if not edges:
        return None
    worst = truth.nlargest(3, "increase").to_dict("records")
    listed = "; ".join(
        f"{_short(row['layer'])}, {bits_text(row['bits'])}: {row['increase']:.2g}" for row in worst
    )
    alt = f"Increase of the loss when one layer trains at these bits; greatest: {listed}"
    height = 1.2 + 0.19 * len(above)
    with panel(f"sensitivity-truth-{run.anchor}", alt, height=height, title="truth") as at:
        texts = values.map(lambda value: f"{value:.2g}".replace("-", "−"))
        heat(above, at.axes, edges, "increase of the loss", texts=texts)
        at.axes.set(xlabel="bits", ylabel="")
    return at.picture


def _short(layer: str) -> str:
    """`blocks.3.attn.qkv` as `b3 qkv`."""
    parts = layer.split(".")
    number = next((f"b{part} " for part in parts if part.isdigit()), "")
    return f"{number}{parts[-1]}" if number else layer


def _regret(run: RunData) -> list[Block]:
    """What the bits chosen by each metric lose by the truth."""
    frame = run.table("regret")
    if frame.empty:
        return []
    frame = frame.sort_values(["budget", "steps"], kind="stable")
    frame = frame[frame["steps"].isin([frame["steps"].min(), frame["steps"].max()])]
    when = frame["steps"].map(lambda steps: plural(steps, "step") if steps else "before training")
    frame["place"] = frame["budget"].map("{:g} bits, ".format) + when
    wide = frame.pivot_table("regret", "metric", "place", sort=False)
    places = [str(name) for name in wide]
    return [
        Sheet(
            wide.reset_index(),
            f"Regret of the bits that a metric chooses: {run.title}",
            "Sum of the truth over layers at the bits that the exact optimum for the metric "
            "chooses, minus the least sum of any bits at that mean: 0 is the best allocation. "
            "Noise of the truth is part of it.",
            formats=dict.fromkeys(places, lambda value: significant(value, 2)),
        )
    ]


def _steps_fold(run: RunData) -> Fold | None:
    """Heat maps of agreement by metric and training steps, one per bit width."""
    found = run.table("agreement").dropna(subset="spearman").astype({"bits": str})
    found = found[found["target"] == _judged(run)["target"].iloc[0]]
    pictures = []
    for bits, own in found.groupby("bits", sort=False):
        table = own.pivot_table("spearman", "metric", "steps", sort=False).sort_index(axis=1)
        best = own.nlargest(1, "spearman").to_dict("records")[0]
        alt = (
            f"Spearman's rho by metric and steps, {bits_text(bits)}; greatest: {best['metric']} "
            f"after {best['steps']} steps, {_rho(best['spearman'])}"
        )
        name, edges = f"sensitivity-steps-{bits}-{run.anchor}", [-0.5, 0, 0.25, 0.5, 0.75, 1]
        with panel(name, alt, height=1.3 + 0.24 * len(table), title=bits_text(bits)) as at:
            heat(table, at.axes, edges, "Spearman’s ρ", texts=table.map(_rho))
            at.axes.set(xlabel="training steps before measuring", ylabel="")
        pictures.append(at.picture)
    if not pictures:
        return None
    caption = "Spearman’s ρ with the truth by training steps before measuring."
    return Fold("Agreement after every number of steps", [Figures(pictures, caption)])


def _type_fold(run: RunData) -> Fold | None:
    """Truth over metric by layer type: which types training helps more than the metric says."""
    paired = _paired(run)
    sums = paired.groupby(["layer_type", "bits", "when"], sort=False)[["increase", "value"]].sum()
    whole = paired.groupby(["bits", "when"])[["increase", "value"]].sum()
    ratio = (sums["increase"] / sums["value"]) / (whole["increase"] / whole["value"])
    wide = ratio[np.isfinite(ratio)].unstack("when")
    if wide.empty:
        return None
    sheet = Sheet(
        wide[[when for when in _WHEN if when in wide]].reset_index(),
        f"Truth over metric by layer type: {run.title}",
        "Sums over the layers of a type, relative to all layers at these bits: below 1, training "
        "mends more than the metric says; below 0, the type lost nothing.",
        formats={when: _rho for when in _WHEN if when in wide},
        heads={"layer_type": "layers"},
        kind="dense",
    )
    return Fold("Truth over metric, by layer type", [sheet])


def _additivity_fold(run: RunData) -> Fold | None:
    """Whether sensitivities add up, as the allocator assumes."""
    frame = run.table("interactions")
    if frame.empty:
        return None
    frame["bits lowered in"] = frame["kind"].map({"pair": "pairs", "whole": "whole allocations"})
    ratios = frame.groupby(["bits lowered in", "steps"])["ratio"]
    sheet = Sheet(
        ratios.agg(["count", "median", "min", "max"]).reset_index(),
        f"Measured over predicted change of the noise prediction: {run.title}",
        "Predicted is the sum over layers, as the allocator assumes; 1 is exact additivity.",
        kind="dense",
    )
    return Fold("Additivity: do sensitivities of layers add up?", [sheet])


def _timestep_fold(run: RunData) -> Fold | None:
    """The judged metric by timestep bucket and layer type, before and after training."""
    frame = run.table("timesteps")
    if frame.empty:
        return None
    bits, frame = _usual(run), _ends(run, frame)
    frame["bucket"] = "bucket " + (frame["bucket"] + 1).astype(str)
    keys = ["layer_type", "when"]
    means = frame[frame["bits"] == bits].groupby([*keys, "bucket"], sort=False)["value"].mean()
    sheet = Sheet(
        means.unstack("bucket").reset_index(),
        f"Change of the noise prediction by timestep, {bits_text(bits)}: {run.title}",
        "Mean over the layers of a type; bucket 1 has the least noise.",
        heads={"layer_type": "layers", "when": "measured"},
        kind="dense",
    )
    return Fold("Sensitivity by timestep", [sheet])


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
