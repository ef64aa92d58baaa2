"""The main job: plans and metrics by protocol, then what each plan does, gave and cost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns

from reports import page
from reports.comparing import RULE, judge
from reports.exports import exports
from reports.layer_bits import allocation_blocks
from reports.loading import RunData
from reports.plan_tables import cost_sheet, plans_sheet, timing_sheet
from reports.protocols import AT_FLOOR, KID_UNBIASED_SINCE, TEACHER, Group, Row, group_runs
from reports.published import published_sheet, rivals_sheet
from reports.real_images import (
    Real,
    draws_sheet,
    hints_of,
    order_in,
    over_real,
    real_of,
    spaces_of,
)
from reports.samples import BUDGET_BYTES, nearest_training_images, sample_grids
from reports.settings import Family
from reports.text import NOT_RUN, Phrase, listing, of_metric, plural, significant, spread, stem
from reports.train_teacher import Curves, loss_blocks
from robuq_bench.figure_cache import drawn_once
from robuq_bench.figures import Picture, colour, log_axis, panel
from robuq_bench.statistics.comparisons import MIN_SEEDS
from robuq_bench.statistics.metrics import HIGHER_IS_BETTER

ORDER = 0
QUESTION = "How much of a Diffusion Transformer’s quality does each way of quantizing it keep?"
OPEN = (
    "The plan with Hadamard beats the plan without, most of all at 2 activation bits",
    "AMPN beats the same number of bits in every layer",
    "RobuQ beats BitNet v2 at equal bits",
    "W1.58A2 trains stably",
)
CITES = ("teacher-eval",)  # its numbers are the rows of the teacher
EXPORTS = (
    *("metrics.csv", "summary.csv", "allocation.csv", "sensitivity.csv", "training.csv"),
    *("accounting.csv", "real_images.csv", "summary.tex"),
)
MARKS = {
    Family.AMPN: ("rotated", "D", "◆ Hadamard, AMPN bits"),
    Family.ALLOCATED: ("rotated", "s", "■ Hadamard, bits allocated otherwise"),
    Family.FROM_FILE: ("rotated", "P", "✚ Hadamard, bits from a file"),
    Family.UNIFORM: ("uniform bits", "o", "● Hadamard, uniform bits"),
    Family.PARTIAL: ("partly rotated", "^", "▲ Hadamard in some layers"),
    Family.UNROTATED: ("not rotated", "X", "✖ no rotation"),
    Family.FULL_PRECISION: ("reference", "s", "■ full precision"),
}
_ROWS_OF_A_PANEL = 40
_DAGGER = "†"


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> page.Section | None:
    """Results, bits, cost and samples of every protocol, and the published numbers."""
    groups = group_runs(every)
    judged = [judge(group) for group in groups]
    claimed = {claim.verdict.claim for found in judged for claim in found.claims}
    blocks: list[page.Block] = list(_caveats(groups))
    budget = BUDGET_BYTES // len(groups)
    for place, group in enumerate(groups):
        if len(groups) > 1:
            blocks.append(page.Heading(f"Results on {group.title}", f"results-{place}"))
            blocks += [page.Prose(_answer(group))] if place else []
        blocks += _results(group, budget)
    timing = timing_sheet(runs)
    blocks += [page.Fold("Time of each run", [timing])] if timing else []
    blocks += [
        page.Heading("Published numbers", "published"),
        page.Fold(
            "Numbers of others, each with its source, beside what these runs measured",
            [published_sheet(groups), rivals_sheet()],
        ),
    ]
    return page.Section(
        anchor="results",
        title="Plans and their quality",
        answer=_answer(groups[0]),
        blocks=blocks,
        claims=[claim for found in judged for claim in found.claims],
        open={c: needs for c, needs in judged[0].open.items() if c not in claimed},
        rule=RULE,
        exports=exports(groups, every),
        tex={"summary": [_summary_tex(group) for group in groups]},
    )


def _answer(group: Group) -> list[Phrase]:
    """Which plan is nearest to the teacher, and which is farthest."""
    metric = group.fid
    rows = [row for row in group.rows if row.family != Family.FULL_PRECISION]
    means = {row: found.mean for row in rows if (found := group.found(row, metric))}
    teacher = group.found(group.teacher, metric)
    if metric is None or not means:
        return page.sentence(f"On {group.title}, no quantized plan’s FID was measured: {NOT_RUN}.")
    ranked = sorted(means, key=lambda row: abs(means[row] - (teacher.mean if teacher else 0)))
    untrained = sum(row.is_ptq for row in means)
    of = f"{plural(len(means), 'quantized plan')}"
    of += f" ({untrained} without training)" if untrained else ""
    near, far = ranked[0], ranked[-1]
    values = {
        row: Phrase(group.text(row, metric), f"#{row.anchor}" if group.found(row, metric) else "")
        for row in (near, far, group.teacher)
    }
    return page.sentence(
        f"On {group.title}, {near.label} comes nearest to its teacher of {of}: {metric} ",
        *(values[near], " against ", values[group.teacher]),
        *((f"; {far.label} is farthest with ", values[far]) if far is not near else ()),
        " (mean and range over training seeds and image seeds).",
    )


def _caveats(groups: Sequence[Group]) -> Iterable[page.Block]:
    items = []
    if len(groups) > 1:
        items.append(
            "Runs of different workloads, teachers, samplers, numbers of samples or versions of "
            "the study cannot be compared, so each protocol has tables of its own."
        )
    if any(g.version < KID_UNBIASED_SINCE and "kid" in map(stem, g.metrics) for g in groups):
        items.append(
            "KID of version 1 of the study is biased low: it takes the labels of images for "
            "random, though the number of each class is fixed (about 0.015 on digits, N = 1,000)."
        )
    by_count: dict[int, list[str]] = {}
    for row in groups[0].rows:
        by_count.setdefault(len(row.seeds), []).append(row.label)
    if by_count and min(by_count) < MIN_SEEDS:
        seeds = "; ".join(f"{n} for {_some(by_count[n])}" for n in sorted(by_count))
        items.append(f"Training seeds: {seeds}. Below {MIN_SEEDS}, plans are not judged.")
    by_steps: dict[int, list[str]] = {}
    for row in groups[0].rows:
        by_steps.setdefault(row.qat_steps or 0, []).append(row.label)
    if len(by_steps) > 1:
        steps = "; ".join(f"{n:,} for {_some(by_steps[n])}" for n in sorted(by_steps))
        items.append(f"Plans had unequal numbers of QAT steps: {steps}.")
    cited = (run for group in groups for row in group.rows for run in row.runs)
    known = {str(r["samples"]) for run in cited for r in run.of_kind("metrics") if "samples" in r}
    if known:
        items.append(
            f"Teacher: judged by samples that came with the suite ({listing(sorted(known))}), not "
            "drawn anew; its run, under Provenance, says how they were made."
        )
    return [page.Points(items)] if items else []


def _some(labels: Sequence[str]) -> str:
    """The labels, or how many there are."""
    return listing(labels) if len(labels) <= 8 else f"{len(labels)} plans"


def _results(group: Group, budget: int) -> list[page.Block]:
    curves = [Curves(row.label, row.runs, MARKS[row.family][0]) for row in group.rows]
    losses = [name for name in group.metrics if name.endswith("_loss")]
    metrics, further = spaces_of(group)
    of = {
        run.first("validation").get("validation_images") for row in group.rows for run in row.runs
    }
    images = "".join(f", of {name} images" for name in sorted(filter(None, of)))
    batches = f"Means over fixed validation batches{images}."
    means_of_losses = _summary(group, losses, "Losses", batches)
    real = real_of(group)
    grids = sample_grids(group, budget - budget // 8)
    nearest = nearest_training_images(group, budget // 8)
    near = (
        "Samples of the teacher; below, the data’s nearest training images by pixels and features."
    )
    folds: dict[str, Sequence[page.Block | None]] = {
        "What each plan does": [plans_sheet(group) if group.rows else None],
        "Every measured value": [*_values(group), draws_sheet(group, real) if real else None],
        "In a second feature space": [
            block
            for fid, names in further.items()
            for block in (
                _summary(group, names, f"In the space of {fid}", ""),
                order_in(group, fid),
            )
        ],
        "Nearest training images": [page.Prose([Phrase(near)]), page.Images(nearest)]
        * bool(nearest),
        "Losses": [*loss_blocks(curves, group.teacher.anchor), means_of_losses if losses else None],
        "Bits and sensitivity of each layer": allocation_blocks(group),
        "Cost of each plan": [cost_sheet(group) if group.rows else None],
    }
    table = _summary(group, metrics, "Plans and metrics", _protocol(group), real)
    blocks = [*_fid_figure(group, real), table]
    blocks += [page.Prose(said)] if real and (said := real.about(group)) else []
    if grids:
        same = "Samples: the same image seeds and labels in every grid; the model differs."
        blocks += [page.Prose([Phrase(same)]), page.Images(grids)]
    for name, folded in folds.items():
        shown = [block for block in folded if block]
        blocks += [page.Fold(name, shown)] if shown else []
    return blocks


def _fid_figure(group: Group, real: Real | None) -> list[page.Block]:
    metric = group.fid
    rows = [row for row in group.rows if group.found(row, metric)]
    if metric is None or not rows:
        return []
    pieces = [rows[i : i + _ROWS_OF_A_PANEL] for i in range(0, len(rows), _ROWS_OF_A_PANEL)]
    found = group.values[group.values["metric"] == metric]
    floor = tuple(real.values(metric)) if real else ()
    pictures = [_fid_panel(group, piece, found, i, floor) for i, piece in enumerate(pieces)]
    families = {row.family for row in rows}
    key = [(hue, words) for kind, (hue, _, words) in MARKS.items() if kind in families]
    if group.found(group.teacher, metric):
        key.append(("reference", "┃ teacher, its range shaded"))
    if real and floor:
        key.append(("neutral", f"┊ real images, their range shaded: {real.sides}"))
    caption = (
        f"{metric} by plan on {group.title}: the mark is the mean, dots are single values "
        "(training seed × seed range), the bar spans them."
    )
    return [page.Figures(pictures, caption, key)]


def _fid_panel(
    group: Group, rows: Sequence[Row], found: pd.DataFrame, place: int, floor: tuple[float, ...]
) -> Picture:
    metric, kinds = str(group.fid), {row.label: row.family for row in rows}
    alt = f"{metric} by plan: " + "; ".join(f"{r.label} {group.text(r, metric)}" for r in rows)
    values = found[["plan", "value"]].reset_index(drop=True)
    return _points(f"fid-{group.teacher.anchor}-{place}", alt, metric, values, kinds, floor)


@drawn_once
def _points(
    name: str,
    alt: str,
    metric: str,
    found: pd.DataFrame,
    kinds: Mapping[str, Family],
    floor: tuple[float, ...],
) -> Picture:
    """Values of all plans and of the teacher (for limits), drawn for the plans in `kinds`.

    `floor` are those of real images.
    """
    labels = {label: textwrap.fill(label, 20) for label in kinds}
    shown = found[found["plan"].isin(labels)]
    data = shown.assign(label=shown["plan"].map(labels), kind=shown["plan"].map(kinds))
    order, used = list(labels.values()), list(dict.fromkeys(kinds.values()))
    look: dict[str, Any] = {
        "data": data, "x": "value", "y": "label", "order": order, "hue": "kind",
        "hue_order": used, "palette": {kind: colour(MARKS[kind][0]) for kind in used},
        "legend": False,
    }  # fmt: skip
    lines = max(text.count("\n") + 1 for text in order) * len(order)  # rows are spaced evenly
    with panel(name, alt, height=0.6 + 0.14 * lines + 0.07 * len(order)) as drawn:
        axes = drawn.axes
        sns.stripplot(**look, ax=axes, jitter=False, size=3, alpha=0.5)
        sns.pointplot(
            **look, ax=axes, linestyle="none", errorbar=("pi", 100), markersize=5.5,
            markers=[MARKS[kind][1] for kind in used], err_kws={"linewidth": 1.2},
        )  # fmt: skip
        values = pd.concat([found["value"], pd.Series(floor, dtype=float)])
        teacher = found.loc[found["plan"] == TEACHER, "value"]
        if len(teacher):
            neutral = colour("reference")
            axes.axvspan(teacher.min(), teacher.max(), color=neutral, alpha=0.2, linewidth=0)
            axes.axvline(teacher.mean(), color=neutral, linewidth=1.2)
        if floor:
            grey = colour("neutral")
            axes.axvspan(min(floor), max(floor), color=grey, alpha=0.2, linewidth=0)
            axes.axvline(sum(floor) / len(floor), color=grey, linewidth=1.2, linestyle=":")
        if 0 < values.min() < values.max() / 5:
            axes.set(xlim=(values.min() / 1.15, values.max() * 1.15))
            log_axis(axes, "x")
        axes.set(xlabel=f"{metric} (lower is better)", ylabel="")
    return drawn.picture


def _summary(
    group: Group, metrics: Sequence[str], what: str, note: str, real: Real | None = None
) -> page.Sheet:
    """Plans × metrics: mean and [min–max] over training seeds and seed ranges."""
    rows = group.all_rows
    means = group.summary["mean"].unstack("metric").reindex([row.label for row in rows])
    frame = means.reindex(columns=list(metrics)).reset_index(drop=True)
    formats: dict[str, page.Format] = {name: of_metric(name) for name in metrics}
    teacher = group.found(group.teacher, group.fid)
    if group.fid in formats and teacher and teacher.mean > 0:
        place = list(frame).index(group.fid) + 1
        frame.insert(place, "÷ teacher", frame[group.fid] / teacher.mean)
        formats["÷ teacher"] = significant
    ratios = [over_real(group, real, row) for row in rows] if real else []
    if any(ratios):
        frame.insert(list(frame).index(str(group.fid)) + 1, "÷ real", ratios)
        formats["÷ real"] = significant
    better = {m: f"{'↑' if stem(m) in HIGHER_IS_BETTER else '↓'} is better" for m in metrics}
    better |= {name: hint for name, hint in hints_of(group, metrics).items() if hint}
    frame.insert(0, "plan", [row.name for row in rows])
    for metric in metrics:
        frame[f"{metric} range"] = [_range(group, row, metric) for row in rows]
    frame["href"] = [f"#{row.anchor}" for row in rows]
    frame["about"] = [_about(row, row is group.teacher) for row in rows]
    return page.Sheet(
        frame,
        f"{what} on {group.title}",
        note,
        formats=formats,
        hints=better,
        links=dict.fromkeys(formats, "href"),
        small={"plan": "about", **{name: f"{name} range" for name in metrics}},
    )


def _protocol(group: Group) -> str:
    """The note below the summary: how its numbers were measured."""
    biased = (
        f" {_DAGGER} Too few images for the number of features, so the covariance is "
        "rank-deficient and the value biased."
    )
    return (
        f"Protocol: {group.protocol}. Means are over all training seeds and seed ranges of the "
        "row; brackets hold the least and the greatest of these values. Every plan is sampled from "
        "the image seeds of the teacher."
    ) + (biased if group.values["is_rank_deficient"].any() else "")


def _range(group: Group, row: Row, metric: str) -> str:
    """`[min–max]` of a cell, and the mark of a rank-deficient one."""
    found = group.found(row, metric)
    mark = f" {_DAGGER}" if found and found.is_rank_deficient else ""
    return f"{spread(metric, found.low, found.high)}{mark}".strip() if found else ""


def _about(row: Row, is_teacher: bool) -> str:
    """Steps of training, seeds and notes of a row, for the small print below its name."""
    if is_teacher:
        return "full precision"
    seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
    if len(row.seeds) > MIN_SEEDS:
        seeds = f"{len(row.seeds)} seeds"
    steps = f"{row.qat_steps:,} QAT steps{row.warmup_text}" if row.qat_steps else ""
    return "; ".join(filter(None, [steps, seeds, row.notes]))


def _values(group: Group) -> list[page.Block]:
    """Every value behind the summary, each line linked to its run; samples, then losses."""
    rows = group.all_rows
    values = group.values.assign(
        plan=pd.Categorical(group.values["plan"], [row.label for row in rows]),
        run=group.values["run"].map({run.id: run.href for row in rows for run in row.runs}),
    )
    is_sample = values["seed_range"].notna()
    blocks: list[page.Block] = []
    for what, shown in (
        ("Every measured value", values[is_sample]),
        ("Every loss on validation batches", values[~is_sample].drop(columns="seed_range")),
    ):
        keys = [name for name in ("plan", "seed", "seed_range", "run") if name in shown]
        table = shown.set_index([*keys, "metric"])["value"].unstack().reset_index()
        metrics = [name for name in group.metrics if name in table]
        table["seed"] = table["seed"].astype(object).where(table["seed"].notna(), "none")
        anchors = table["plan"].map({row.label: row.anchor for row in rows}).astype(object)
        table["anchor"] = anchors.where(~table["plan"].duplicated() & ("seed_range" in keys), None)
        sheet = page.Sheet(
            table[[*keys, *metrics, "anchor"]],
            f"{what} on {group.title}",
            "Each line’s training seed links to its run.",
            formats={name: of_metric(name) for name in metrics},
            heads={"seed": "training seed", **dict.fromkeys(keys[2:-1], "seed range")},
            links={"seed": "run"},
            anchors="anchor",
            kind="dense",
        )
        blocks += [sheet] * bool(len(table))
    return blocks


def _summary_tex(group: Group) -> page.Sheet:
    frame = pd.DataFrame({"plan": [row.label for row in group.all_rows]})
    for metric in [name for name in group.metrics if not name.endswith(AT_FLOOR)]:
        frame[metric] = [group.text(row, metric) for row in group.all_rows]
    return page.Sheet(frame, f"{group.title}: mean [min–max]", f"{group.protocol}.")
