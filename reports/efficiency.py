"""What the packed model saves, against what: the paper's factors beside ours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
import seaborn as sns

from reports.generic import claims_of, rule_of
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, sentence
from reports.settings import section
from reports.text import Phrase, bytes_text, fixed, significant
from robuq_bench.figures import SEQUENTIAL, Picture, colour, legend_below, log_axis, panel
from robuq_bench.statistics.verdicts import Verdict

ORDER = 78
QUESTION = "What does the packed model save in bytes and time, and against what?"
OPEN = (
    "DiT-XL/2 becomes 13.2× smaller in theory",
    "DiT-XL/2 becomes 15.2× smaller as a checkpoint",
    "DiT-XL/2 takes 7.1× less GPU memory",
    "DiT-XL/2 runs 3.5× faster",
)
_NAMES = ("claims", "checkpoints", "weights", "end_to_end", "end_to_end_model")
EXPORTS = (*(f"efficiency-{name}.csv" for name in _NAMES), "efficiency.tex")
_CHECKPOINT, _MEMORY, _SPEED = "checkpoint size", "GPU memory", "speed"
_WORDS = {_CHECKPOINT: "smaller checkpoint", _MEMORY: "less GPU memory", _SPEED: "faster"}
_PARTS = {
    "codes": "codes",
    "scales": "scales",
    "low_rank": "low-rank branch",
    "signs": "signs",
    "rest": "kept in full precision",
}
_MODEL = "a model, not measured"
_FILES = ("base3/", "2bit/")
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
)


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Factors, sizes and times of each run; None where no run wrote its tables."""
    whole = [
        run
        for run in runs
        if all(not run.table(name).empty for name in ("claims", "checkpoints", "weights"))
    ]
    if not whole:
        return None
    factors = {run: _factors(run) for run in whole}
    exports = {
        f"efficiency-{name}": pd.concat(
            [r.table(name).assign(run=r.id) for r in whole if name in r.tables]
        )
        for name in _NAMES
        if any(name in r.tables for r in whole)
    }
    sheets = {run: _factor_sheet(run, factors[run]) for run in whole}
    return Section(
        anchor="efficiency",
        title="Efficiency",
        answer=_answer(whole[0], factors[whole[0]]),
        blocks=[block for run in whole for block in _blocks(run, factors[run], sheets[run])],
        claims=[claim for run in whole for claim in _claims(run, factors[run])],
        rule=rule_of(whole) or _OLD_RULE,
        exports=exports,
        tex={"efficiency": list(sheets.values())},
    )


def _factors(run: RunData) -> pd.DataFrame:
    """The run's table of claims, `against` split into `baseline` and `kind`; theory comes first."""
    frame = run.table("claims")
    split = frame["against"].str.partition(", ")
    frame = frame.assign(baseline=split[0], kind=split[2].mask(split[1] == "", "file"))
    readings = run.table("checkpoints").dropna(subset="published")
    theory = readings[readings["published"] == 13.2]
    rows = pd.DataFrame(
        {
            "claim": "theory",
            "paper": theory["published"],
            "ours": theory["reading"],
            "baseline": "fp32 file",
            "kind": "file",
            "factor": theory["size_reduction"],
            "basis": "exact",
        }
    )
    return pd.concat([rows, frame], ignore_index=True)


def _claims(run: RunData, factors: pd.DataFrame) -> list[Claim]:
    """The run's verdicts; of a run without them, its exact factors, unjudged as they were."""
    exact = factors[factors["basis"] == "exact"]
    return claims_of([run]) or [
        Claim(
            Verdict(
                claim=f"{_model(run)} has a {row['paper']:g}× {_word(row['claim'])}",
                subject=f"{row['ours']} against {row['baseline']}, {row['kind']}",
                verdict="not judged",
                effect=float(row["factor"]),
                effect_name="factor",
                low=None,
                high=None,
                n=1,
                n_of="count",
                test="exact accounting",
                p_value=None,
                note=_OLD_RULE,
            ),
            run.title,
            run.href,
        )
        for row in exact.to_dict("records")
    ]


def _factor(amount: float) -> str:
    return f"{fixed(amount, 2)}×"


def _word(claim: object) -> str:
    return _WORDS.get(str(claim), "smaller checkpoint in theory")


def _model(run: RunData) -> str:
    model = section(run.workload, "model")
    width = model.get("hidden_size")
    if (width, model.get("depth")) == (1152, 28):
        return "DiT-XL/2"
    return f"The DiT of {run.workload_name} (width {width})"


def _device(run: RunData) -> str:
    times_ = run.table("end_to_end")
    return "" if times_.empty else str(times_["device_name"].iloc[0])


def _title(run: RunData) -> str:
    return f"{_model(run)}, {_device(run) or 'without a GPU'}"


def _span(amounts: pd.Series[float]) -> str:
    """`least to greatest`, one number where they print alike, nothing where there is none."""
    if amounts.isna().all():
        return ""
    low, high = _factor(amounts.min()), _factor(amounts.max())
    return low if low == high else f"{low} to {high}"


def _files(run: RunData) -> pd.DataFrame:
    """The packings that a file can have, the smallest first."""
    frame = run.table("checkpoints")
    return frame[frame["packing"].str.startswith(_FILES)].sort_values("total_bytes")


def _answer(run: RunData, factors: pd.DataFrame) -> list[Phrase]:
    files = _files(run)
    # int8 rounds what the plan keeps in full precision: a mode, not the headline.
    best = files[~files["packing"].str.contains("int8")].iloc[0]
    weights = factors.query("kind == 'weights alone'").dropna(subset="factor")
    memory = " and ".join(
        f"{_factor(row['factor'])} less than in {row['baseline']}"
        for row in weights.to_dict("records")
    )
    parts: list[str | Phrase] = [
        f"Packed to W1.58, {_model(run)} is a file ",
        Phrase(_factor(best["size_reduction"]), run.href),
        f" smaller than FP32 ({best['packing']}; the paper: {_paper(factors, _CHECKPOINT)}), its "
        "weights take ",
        Phrase(memory, run.href),
        f" (the paper, of GPU memory: {_paper(factors, _MEMORY)}), and ",
    ]
    step = factors[(factors["kind"] == "step") & factors["factor"].notna()]
    if step.empty:
        return sentence(
            *parts, f"speed (the paper: {_paper(factors, _SPEED)}) needs a GPU: not run."
        )
    spans = [
        f"{_span(own['factor'])} as fast as {baseline}"
        for baseline in ("bf16-graph", "tf32")
        if not (own := step[step["baseline"] == baseline]).empty
    ]
    return sentence(
        *parts,
        "a step is ",
        Phrase(" and ".join(spans), run.href),
        f" on {_device(run)} (the paper: {_paper(factors, _SPEED)}).",
    )


def _paper(factors: pd.DataFrame, claim: str) -> str:
    return f"{factors.loc[factors['claim'] == claim, 'paper'].iloc[0]:g}×"


def _blocks(run: RunData, factors: pd.DataFrame, sheet: Sheet) -> list[Block]:
    blocks: list[Block] = [sheet, _figures(run, factors)]
    is_measured = bool(_device(run))
    blocks.append(Points([*_CAVEATS, *(_MEASURED if is_measured else ())]))
    blocks.append(Fold("Bytes of a checkpoint by part", [_checkpoint_sheet(run)]))
    blocks.append(Fold("Weights in memory", [_weight_sheet(run)]))
    if is_measured:
        sheets = [_time_sheet(run), _ratio_sheet(run, factors)]
        blocks.append(Fold("Measured times and memory", sheets))
    if "end_to_end_model" in run.tables:
        blocks.append(Fold(f"Times end to end on an H100, {_MODEL}", [_model_sheet(run)]))
    return blocks


def _factor_sheet(run: RunData, factors: pd.DataFrame) -> Sheet:
    """One line per factor and baseline, over packed variants and batches; the others are folded."""
    is_exact = factors["basis"] == "exact"
    is_main = factors["baseline"].isin(_MAIN) & (factors["kind"] != "sampling")
    factors = factors[is_exact | is_main]
    ours = factors["ours"].where(factors["kind"] == "file", "")
    against = factors["baseline"].where(
        factors["kind"] == "file", factors["baseline"] + ", " + factors["kind"]
    )
    found = (
        factors.assign(ours=ours, against=against)
        .groupby(["claim", "paper", "ours", "against", "basis"], sort=False)[
            ["factor", "modelled_factor"]
        ]
        .agg(_span)
        .reset_index()
    )
    # A line for each baseline that was not run would say the same many times.
    is_silent = (found["factor"] == "") & (found["modelled_factor"] == "")
    silent = found[is_silent].drop_duplicates("claim")
    silent["against"] = silent["against"].str.replace(r"^.*, ", "every baseline, ", regex=True)
    found = pd.concat([found[~is_silent], silent])
    order = ["theory", *_WORDS]
    found = found.sort_values("claim", key=lambda own: own.map(order.index), kind="stable")
    papers = [f"{row['paper']:g}× {_word(row['claim'])}" for row in found.to_dict("records")]
    frame = pd.DataFrame(
        {
            "the paper": papers,
            "ours": found["factor"].replace("", None),
            "basis": found["basis"].replace("not run", None),
            "against": found["against"],
            "of": found["ours"],
            "the model expects": found["modelled_factor"].replace("", "–"),
        }
    )
    return Sheet(
        frame.assign(run=run.href),
        f"The paper’s factors beside ours: {_title(run)}",
        "Ranges are over packed variants and batches. Exact numbers count bytes and need no GPU. "
        f"What the model expects of a step on an H100 is {_MODEL}. Further baselines, and "
        "sampling, are in efficiency-claims.csv beside the report.",
        links={"ours": "run"},
        small={"ours": "basis", "against": "of"},
    )


def _figures(run: RunData, factors: pd.DataFrame) -> Figures:
    pictures = [_checkpoint_panel(run)]
    device = _device(run)
    where = f"measured on {device}" if device else _MODEL
    panels = {"Peak memory of a step": ("peak of a step", "factor")}
    panels |= {"Speed of a step": ("step", "factor" if device else "modelled_factor")}
    for title, (kind, column) in panels.items():
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
    long = files.rename(columns={f"{part}_bytes": words for part, words in _PARTS.items()}).melt(
        ["packing", "size_reduction"], list(_PARTS.values()), "part", "bytes"
    )
    long["packing"] = long["packing"].map(lambda name: "\n".join(textwrap.wrap(name, 16)))
    words = "; ".join(
        f"{r['packing']} {bytes_text(r['total_bytes'])}, {_factor(r['size_reduction'])} smaller"
        for r in files.to_dict("records")
    )
    alt = f"Bytes of a checkpoint of {_model(run)}: {words}"
    height = 1.4 + 0.25 * len(files)
    with panel(f"{run.anchor}-checkpoints", alt, height=height, title="Checkpoint") as drawn:
        sns.histplot(
            long.assign(mib=long["bytes"] / 2**20), y="packing", weights="mib", hue="part",
            multiple="stack", discrete=True, shrink=0.75, alpha=1, ax=drawn.axes,
            palette=sns.color_palette(SEQUENTIAL, len(_PARTS)),
        )  # fmt: skip
        drawn.axes.set(xlabel="MiB", ylabel="")
        legend_below(drawn)
    return drawn.picture


def _factor_panel(run: RunData, rows: pd.DataFrame, column: str, title: str, where: str) -> Picture:
    spans = rows.groupby("baseline", sort=False)[column].agg(_span)
    alt = f"{title}, {where}: {'; '.join(f'{span} against {name}' for name, span in spans.items())}"
    shown = title if _device(run) else f"{title}, {where}"
    with panel(f"{run.anchor}-{title}", alt, title=shown) as drawn:
        sns.pointplot(rows, x=column, y="baseline", color=colour("rotated"), linestyle="none",
                      errorbar=("pi", 100), markersize=5, ax=drawn.axes)  # fmt: skip
        drawn.axes.axvline(rows["paper"].iloc[0], color=colour("reference"), linewidth=1.4)
        drawn.axes.set(xlabel="times better than the baseline", ylabel="")
        log_axis(drawn.axes, "x")
    return drawn.picture


def _checkpoint_sheet(run: RunData) -> Sheet:
    frame = run.table("checkpoints")
    parts = {f"{part}_bytes": words for part, words in _PARTS.items()}
    counts = [*parts, "total_bytes"]
    shown = frame[["packing", "reading", *counts, "size_reduction", "published"]]
    return Sheet(
        shown.assign(published=[f"{v:g}×" if v == v else "–" for v in frame["published"]]),
        f"Bytes of a checkpoint by part, rank {frame['rank'].iloc[0]}: {_model(run)}",
        "“ideal”, “reading” and “bound” are no files: an entropy bound, what the paper may have "
        "counted, and the most that two bits a code can give.",
        formats={**dict.fromkeys(counts, lambda v: fixed(v / 2**20, 2)), "size_reduction": _factor},
        heads={**parts, "total_bytes": "total", "size_reduction": "smaller", "published": "paper"},
        hints=dict.fromkeys(counts, "MiB"),
        small={"packing": "reading"},
        kind="dense",
    )


def _weight_sheet(run: RunData) -> Sheet:
    return Sheet(
        run.table("weights")[["variant", "description", "weight_bytes", "reduction_from_fp32"]],
        f"Weights in memory: {_model(run)}",
        "Exact: parameters and buffers.",
        formats={"weight_bytes": bytes_text, "reduction_from_fp32": _factor},
        heads={"weight_bytes": "bytes", "reduction_from_fp32": "smaller than fp32"},
        small={"variant": "description"},
    )


def _time_sheet(run: RunData) -> Sheet:
    columns = ["variant", "measured", "batch", "status", "median_ms", "p20_ms", "p80_ms"]
    memory = [f"{part}_bytes" for part in ("weights", "activations", "workspace", "peak")]
    columns += ["stability", *memory]
    frame = run.table("end_to_end").reindex(columns=columns)
    return Sheet(
        frame,
        f"Times and memory on {_device(run)}: {_model(run)}",
        "“unstable”: the interquartile range exceeds 10 % of the median. Memory is the peak of the "
        "allocator over a step; workspace is cuBLAS’s.",
        formats=dict.fromkeys(memory, bytes_text),
        heads={name: name.replace("_", " ") for name in columns},
        kind="dense",
    )


def _ratio_sheet(run: RunData, factors: pd.DataFrame) -> Sheet:
    rows = factors[factors["basis"] == "measured"]
    return Sheet(
        rows[["ours", "baseline", "kind", "batch", "factor", "verdict", "paper"]].rename(
            columns={"verdict": "difference"}
        ),
        f"Ours against every baseline: {_title(run)}",
        "Above 1 is better; “faster” and “slower” need p < .002 (Mann-Whitney) and 5 %.",
        formats={"factor": _factor, "paper": _factor},
        heads={"ours": "packed", "baseline": "against"},
        kind="dense",
    )


def _model_sheet(run: RunData) -> Sheet:
    frame = run.table("end_to_end_model")
    ratios = {f"ratio_to_{name}": f"{name} ÷ W1.58" for name in ("bf16", "tf32", "fp32")}
    times_ = {"bf16_total_ms": "bf16 compiled (ms)", "w1.58a8_total_ms": "W1.58A8 (ms)"}
    parts = {
        f"{kind}_{part}_ms": f"{kind} {part} (ms)"
        for kind in ("bf16", "w1.58a8")
        for part in ("products", "elementwise", "attention", "modulation")
    }
    frame = frame.assign(batch="batch " + frame["batch"].astype(str))
    return Sheet(
        frame[["batch", "images", *times_, *ratios, *parts]],
        f"A step of {_model(run)} on an H100, {_MODEL}",
        f"Assumed rates, {frame['assumptions'].iloc[0]}.",
        formats=dict.fromkeys([*times_, *parts], significant) | dict.fromkeys(ratios, _factor),
        heads={**times_, **ratios, **parts},
        kind="dense",
    )
