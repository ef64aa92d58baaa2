"""What the packed model saves, against what: the paper's factors beside ours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
import seaborn as sns

from reports.generic import claims_of, cpu, old_claims, rule_of, table_fold, whole_tables
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, sentence
from reports.settings import section
from reports.text import Phrase, bytes_text, fixed
from robuq_bench.figures import SEQUENTIAL, Picture, colour, legend_below, log_axis, panel

ORDER = 78
QUESTION = "What does the packed model save in bytes and time, and against what?"
OPEN = (
    "DiT-XL/2 becomes 13.2× smaller in theory",
    "DiT-XL/2 becomes 15.2× smaller as a checkpoint",
    "DiT-XL/2 takes 7.1× less GPU memory",
    "DiT-XL/2 runs 3.5× faster",
)
_NAMES = ("claims", "checkpoints", "weights", "end_to_end", "end_to_end_model", "cpu_factors")
EXPORTS = (*(f"efficiency-{name}.csv" for name in _NAMES), "efficiency.tex")
_WORDS = {"theory": "smaller checkpoint in theory", "checkpoint size": "smaller checkpoint",
          "GPU memory": "less GPU memory", "speed": "faster"}  # fmt: skip
_PARTS = {"codes_bytes": "codes", "scales_bytes": "scales", "low_rank_bytes": "low-rank branch",
          "signs_bytes": "signs", "rest_bytes": "kept in full precision"}  # fmt: skip
_MODEL = "a model, not measured"
_factor = "{:.2f}×".format
#: The strongest baseline, the likely one of the paper, and the one that flatters most.
_MAIN = ("bf16-graph", "tf32", "fp32")
_OLD_RULE = "Its run is of an older form, which set factors beside the paper’s and judged none."
_CAVEATS = (
    "The paper does not say against which baseline or batch it measured memory and speed; its "
    "speed is of an RTX 4090.",
    "Sizes count codes, scales, low-rank branch, signs and everything kept in full precision. "
    "Rows named “reading” and “bound” are what the paper may have counted; no file has them.",
    f"Times end to end are {_MODEL}, unless a device is named: it adds up layers at rates that "
    "good kernels reach on an H100, knows no launch overhead, and does not tell activation bits "
    "apart.",
)
_MEASURED = (
    "Weights are random, which changes neither bytes nor times.",
    "Variants were timed one after the other: a drift of the device between them is not averaged "
    "out. Eager and compiled variants pay for their launches, CUDA graphs do not: the fair "
    "baseline of a packed model in a graph is bf16-graph.",
    "“faster” and “slower” need p < .002 (Mann-Whitney) and 5 %; “unstable”: the interquartile "
    "range exceeds 10 % of the median. Memory is the peak of the allocator over a step; workspace "
    "is cuBLAS’s.",
)


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Factors, sizes and times of each run; None where no run wrote its tables."""
    whole = [run for run in runs if not any(run.table(name).empty for name in _NAMES[:3])]
    if not whole:
        return None
    factors = {run: _factors(run) for run in whole}
    return Section(
        anchor="efficiency",
        title="Efficiency",
        answer=_answer(whole[0], factors[whole[0]]),
        blocks=[block for run in whole for block in _blocks(run, factors[run])],
        claims=[claim for run in whole for claim in _claims(run, factors[run])],
        rule=rule_of(whole) or _OLD_RULE,
        exports=whole_tables(whole, _NAMES),
        tex={"efficiency": [_factor_sheet(run, factors[run]) for run in whole]},
    )


def _factors(run: RunData) -> pd.DataFrame:
    """The run's table of claims, `against` split into `baseline` and `kind`; theory comes first."""
    frame = run.table("claims")
    split = frame["against"].str.partition(", ")
    frame = frame.assign(baseline=split[0], kind=split[2].mask(split[1] == "", "file"))
    readings = run.table("checkpoints").dropna(subset="published")
    theory = readings[readings["published"] == 13.2].assign(
        claim="theory", baseline="fp32 file", kind="file", basis="exact"
    )
    names = {"published": "paper", "reading": "ours", "size_reduction": "factor"}
    rows = theory.rename(columns=names)[["claim", "baseline", "kind", "basis", *names.values()]]
    return pd.concat([rows, frame], ignore_index=True)


def _claims(run: RunData, factors: pd.DataFrame) -> list[Claim]:
    """The run's verdicts; of a run without them, its exact factors, unjudged as they were."""
    exact = factors[factors["basis"] == "exact"]
    papers = exact["paper"].map("{:g}× ".format) + exact["claim"].map(_WORDS)
    old = exact.assign(
        claim=f"{_model(run)} has a " + papers,
        subject=exact["ours"] + " against " + exact["baseline"] + ", " + exact["kind"],
        verdict="not judged",
        effect=exact["factor"],
        effect_name="factor",
        n=1,
        n_of="count",
        test="exact accounting",
        note=_OLD_RULE,
    )
    return claims_of([run]) or old_claims(run, old)


def _model(run: RunData) -> str:
    model = section(run.workload, "model")
    if (model.get("hidden_size"), model.get("depth")) == (1152, 28):
        return "DiT-XL/2"
    return f"The DiT of {run.workload_name} (width {model.get('hidden_size')})"


def _device(run: RunData) -> str:
    measured = run.table("end_to_end")
    return "" if measured.empty else str(measured["device_name"].iloc[0])


def _span(amounts: pd.Series[float]) -> str:
    """`least to greatest`, one number where they print alike, nothing where there is none."""
    if amounts.isna().all():
        return ""
    low, high = _factor(amounts.min()), _factor(amounts.max())
    return low if low == high else f"{low} to {high}"


def _files(run: RunData) -> pd.DataFrame:
    """The packings that a file can have, the smallest first."""
    frame = run.table("checkpoints")
    return frame[frame["packing"].str.startswith(("base3/", "2bit/"))].sort_values("total_bytes")


def _answer(run: RunData, factors: pd.DataFrame) -> list[Phrase]:
    # int8 rounds what the plan keeps in full precision: a mode, not the headline.
    best = _files(run).query("not packing.str.contains('int8')").iloc[0]
    weights = factors.query("kind == 'weights alone'").dropna(subset="factor")
    memory = weights["factor"].map(_factor) + " less than in " + weights["baseline"]
    paper = factors.groupby("claim")["paper"].first().map("{:g}×".format)
    step = factors.query("kind == 'step' and baseline in ('bf16-graph', 'tf32')")
    spans = step.dropna(subset="factor").groupby("baseline")["factor"].agg(_span)
    ratios = " and ".join(f"{span} as fast as {name}" for name, span in spans.items())
    speed: list[str | Phrase] = [f"speed (the paper: {paper['speed']}) needs a GPU: not run."]
    if ratios:
        where = f" on {_device(run)} (the paper: {paper['speed']})."
        speed = ["a step is ", Phrase(ratios, run.href), where]
    speed += [" ", *run.table("cpu_machine").get("answer", ())]
    return sentence(
        f"Packed to W1.58, {_model(run)} is a file ",
        Phrase(_factor(best["size_reduction"]), run.href),
        f" smaller than FP32 ({best['packing']}; the paper: {paper['checkpoint size']}), its "
        "weights take ",
        Phrase(" and ".join(memory), run.href),
        f" (the paper, of GPU memory: {paper['GPU memory']}), and ",
        *speed,
    )


def _blocks(run: RunData, factors: pd.DataFrame) -> list[Block]:
    return [
        _factor_sheet(run, factors),
        _figures(run, factors),
        *cpu(run),
        Points([*_CAVEATS, *(_MEASURED if _device(run) else ())]),
        Fold("Bytes of a checkpoint by part", [_checkpoint_sheet(run)]),
        *(table_fold(run, name) for name in run.tables if name not in ("checkpoints", "verdicts")),
    ]


def _factor_sheet(run: RunData, factors: pd.DataFrame) -> Sheet:
    """One line per factor and baseline, over packed variants and batches; the others are folded."""
    is_main = factors["baseline"].isin(_MAIN) & (factors["kind"] != "sampling")
    factors = factors[(factors["basis"] == "exact") | is_main]
    is_file = factors["kind"] == "file"
    place = factors["baseline"] + (", " + factors["kind"]).mask(is_file, "")
    found = (
        factors.assign(of=factors["ours"].where(is_file, ""), against=place)
        .groupby(["claim", "paper", "of", "against", "basis"], sort=False, as_index=False)
        .agg({"factor": _span, "modelled_factor": _span})
    )
    # A line for each baseline that was not run would say the same many times.
    silent = (found[["factor", "modelled_factor"]] == "").all(axis=1)
    every = found["against"].str.replace(r"^.*, ", "every baseline, ", regex=True)
    found = found.assign(
        paper=found["paper"].map("{:g}× ".format) + found["claim"].map(_WORDS),
        factor=found["factor"].replace("", None),
        modelled_factor=found["modelled_factor"].replace("", "–"),
        against=found["against"].mask(silent, every),
        basis=found["basis"].replace("not run", None),
        run=run.href,
    )[~(silent & found["claim"].where(silent).duplicated())]
    return Sheet(
        found[["paper", "factor", "against", "modelled_factor", "basis", "of", "run"]],
        f"The paper’s factors beside ours: {_model(run)}, {_device(run) or 'without a GPU'}",
        "Ranges are over packed variants and batches. Exact numbers count bytes and need no GPU. "
        f"What the model expects of a step on an H100 is {_MODEL}. Further baselines, and "
        "sampling, are in efficiency-claims.csv beside the report.",
        heads={"paper": "the paper", "factor": "ours", "modelled_factor": "the model expects"},
        links={"factor": "run"},
        small={"factor": "basis", "against": "of"},
    )


def _figures(run: RunData, factors: pd.DataFrame) -> Figures:
    pictures = [_checkpoint_panel(run)]
    device = _device(run)
    where, column = (f"measured on {device}", "factor") if device else (_MODEL, "modelled_factor")
    for title, kind in (("Peak memory of a step", "peak of a step"), ("Speed of a step", "step")):
        rows = factors[factors["kind"] == kind].dropna(subset=column)
        if not rows.empty:
            pictures.append(_factor_panel(run, rows, column, title, where))
    caption = "Bytes of a packed file by part (packing: codes / low-rank branch / rest), exact."
    if len(pictures) > 1:
        caption += (
            f" Times better than each baseline, {where}: the least and the greatest of packed "
            "variants and batches. Grey: the paper’s factor."
        )
    return Figures(pictures, caption)


def _checkpoint_panel(run: RunData) -> Picture:
    files = _files(run)
    names = files["packing"].map(lambda name: "\n".join(textwrap.wrap(name, 16)))
    parts = (files[[*_PARTS]] / 2**20).rename(columns=_PARTS).assign(packing=names)
    words = "; ".join(
        f"{r['packing']} {bytes_text(r['total_bytes'])}, {_factor(r['size_reduction'])} smaller"
        for r in files.to_dict("records")
    )
    alt = f"Bytes of a checkpoint of {_model(run)}: {words}"
    height = 1.4 + 0.25 * len(files)
    with panel(f"{run.anchor}-checkpoints", alt, height=height, title="Checkpoint") as drawn:
        sns.histplot(
            parts.melt("packing", var_name="part"), y="packing", weights="value", hue="part",
            multiple="stack", discrete=True, shrink=0.75, alpha=1, ax=drawn.axes,
            palette=sns.color_palette(SEQUENTIAL, len(_PARTS)),
        )  # fmt: skip
        drawn.axes.set(xlabel="MiB", ylabel="")
        legend_below(drawn)
    return drawn.picture


def _factor_panel(run: RunData, rows: pd.DataFrame, column: str, title: str, where: str) -> Picture:
    spans = rows.groupby("baseline", sort=False)[column].agg(_span)
    alt = f"{title}, {where}: {'; '.join(f'{span} against {name}' for name, span in spans.items())}"
    shown = title if column == "factor" else f"{title}, {where}"
    with panel(f"{run.anchor}-{title}", alt, title=shown) as drawn:
        sns.pointplot(rows, x=column, y="baseline", color=colour("rotated"), linestyle="none",
                      errorbar=("pi", 100), markersize=5, ax=drawn.axes)  # fmt: skip
        drawn.axes.axvline(rows["paper"].iloc[0], color=colour("reference"), linewidth=1.4)
        drawn.axes.set(xlabel="times better than the baseline", ylabel="")
        log_axis(drawn.axes, "x")
    return drawn.picture


def _checkpoint_sheet(run: RunData) -> Sheet:
    frame = run.table("checkpoints")
    counts = {**_PARTS, "total_bytes": "total"}
    return Sheet(
        frame[["packing", "reading", *counts, "size_reduction"]],
        f"Bytes of a checkpoint by part, rank {frame['rank'].iloc[0]}: {_model(run)}",
        "“ideal”, “reading” and “bound” are no files: an entropy bound, what the paper may have "
        "counted, and the most that two bits a code can give.",
        formats={**dict.fromkeys(counts, lambda v: fixed(v / 2**20, 2)), "size_reduction": _factor},
        heads={**counts, "size_reduction": "smaller"},
        hints=dict.fromkeys(counts, "MiB"),
        small={"packing": "reading"},
        kind="dense",
    )
