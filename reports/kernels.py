"""What the kernels compute and how fast: checks against plain PyTorch, rooflines, times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import seaborn as sns

from reports.generic import MAX_ROWS, claims_of, cpu, old_claims, plain_sheet, rule_of, whole_tables
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, claims_sheet, sentence
from reports.text import Phrase, listing, percent, plural, significant, times
from robuq_bench.figures import Picture, colour, legend_below, log_axis, panel

ORDER = 75
QUESTION = "Are the kernels right, and how near to the hardware do they come?"
OPEN: tuple[str, ...] = ()
_NAMES = ("kernels", "kernel_checks", "roofline", "cpu_kernels")
EXPORTS = (*(f"kernels-{name}.csv" for name in _NAMES), "kernels.tex")
_OURS, _BASELINE, _PRODUCT = "robuq-bench", "cuBLAS bf16", "ternary_matmul"
_SPEEDUP, _SHARE, _LEAST = "speedup_over_cublas_bf16", "share_of_ceiling", "bf16_over_ternary"
_CASE = ["kernel", "model", "layer", "images"]
_TIMES = ["layer", "model", "kernel", "rows", "status", "median_us", "p20_us", "p80_us",
          "stability", _SPEEDUP, "verdict", _SHARE, "limit", "gb_s", "tflop_s", "images",
          "settings"]  # fmt: skip
# A run without a single time writes no columns for them.
_COLUMNS = [*_TIMES, "implementation", "device_name", "correct", "max_error"]
_KEY = (("rotated", "● ternary × int8"), ("reference", "× bf16"))
_MODEL = "a model from data-sheet peaks, not measured"
_OLD_RULE = "A kernel holds where every call of it passed the check of its study."
_CAVEATS = (
    "A deviation of 1 is all that its check allows; those of different kernels do not compare.",
    "Roofline and least times are a model: bytes that must move and operations, over the peaks of "
    "a data sheet. No kernel reaches it.",
)
_UNTIMED = (
    "The interpreter ran few rows at the true widths, in fp16: it shows that the arithmetic is "
    "right, not that a GPU’s machine code is, and nothing about speed.",
)
_TIMED = (
    "Peers compute a plain product with bias; our time includes GELU, gate and residual where the "
    "layer has them, and not the quantization of its input, which has rows of its own.",
    "The ceiling is the copy bandwidth and product rate measured in this run: not quite the best.",
    "Times are medians of all replays of a CUDA graph. “faster” and “slower” need p < .002 "
    "(Mann-Whitney) and 5 %; “unstable”: the interquartile range exceeds 10 % of the median. A "
    "call whose check failed has no time.",
)


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tables of one run; `timed` has no rows without a GPU."""

    run: RunData
    roofline: pd.DataFrame
    timed: pd.DataFrame

    @cached_property
    def ours(self) -> pd.DataFrame:
        """Rows of our kernels on the device."""
        return self.timed[self.timed["implementation"] == _OURS]

    @cached_property
    def speedups(self) -> pd.Series[float]:
        """Times as fast as cuBLAS bf16, of every product that was timed beside it."""
        return self.ours[_SPEEDUP].dropna()

    @cached_property
    def checks(self) -> pd.DataFrame:
        """Every check: on the device where there was one, else in the interpreter."""
        found = self.run.table("kernel_checks") if self.timed.empty else self.ours
        return found if found.empty else found.astype({"correct": bool})

    @property
    def where(self) -> str:
        """With its preposition."""
        devices = self.timed["device_name"]
        return "in Triton’s interpreter" if devices.empty else f"on {devices.iloc[0]}"

    @property
    def models(self) -> list[str]:
        """DiT sizes, the widest first."""
        widths = self.roofline.groupby("model")["width"].max()
        return list(widths.sort_values(ascending=False).index)

    @property
    def title(self) -> str:
        return f"DiT-{'/'.join(self.models)} {self.where}"

    @cached_property
    def sheet(self) -> pd.DataFrame:
        """Rows of the roofline for the device that ran, else for the first data sheet."""
        names = list(self.roofline["device"].unique())
        name = next((name for name in names if _is_model(name, self.where)), names[0])
        return self.roofline[self.roofline["device"] == name]


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Checks, roofline and times of each run; None where no run wrote its tables."""
    found = [
        _Tables(run, run.table("roofline"), run.table("kernels").reindex(columns=_COLUMNS))
        for run in runs
    ]
    found = [tables for tables in found if not (tables.roofline.empty or tables.checks.empty)]
    if not found:
        return None
    whole = [tables.run for tables in found]
    return Section(
        anchor="kernels",
        title="Kernels",
        answer=_answer(found[0]),
        blocks=[block for tables in found for block in _blocks(tables)],
        claims=[claim for tables in found for claim in _claims(tables)],
        rule=rule_of(whole) or _OLD_RULE,
        exports=whole_tables(whole, _NAMES),
        tex={"kernels": [_check_sheet(tables) for tables in found]},
    )


def _claims(tables: _Tables) -> list[Claim]:
    """The run's verdicts; of a run without them, what its checks say of each kernel."""
    checks = _by_kernel(tables)
    old = checks.assign(
        claim=checks["kernel"] + f" agrees with plain PyTorch {tables.where}",
        subject=checks["kernel"],
        verdict=np.where(checks["passed"] == checks["n"], "holds", "does not hold"),
        effect_name="largest deviation over what is allowed",
        n_of="calls",
        test="comparison with plain PyTorch",
    )
    return claims_of([tables.run]) or old_claims(tables.run, old)


def _by_kernel(tables: _Tables) -> pd.DataFrame:
    """Calls, how many passed, the largest deviation and the most rows of each kernel."""
    return tables.checks.groupby("kernel", sort=False, as_index=False).agg(
        n=("correct", "size"), passed=("correct", "sum"), effect=("max_error", "max"),
        rows=("rows", "max"),
    )  # fmt: skip


def _answer(tables: _Tables) -> list[Phrase]:
    checks, timed, share = tables.checks, tables.speedups, tables.ours[_SHARE]
    told: list[str | Phrase] = ["timings need a GPU: not run."]
    if not timed.empty:
        told = [
            "products of ternary weights are ",
            Phrase(f"{times(timed.min())} to {times(timed.max())}", tables.run.href),
            f" (median {times(timed.median())}) as fast as {_BASELINE}, and kernels reach "
            f"{percent(share.min())} to {percent(share.max())} of what the device allows.",
        ]
    elif not tables.timed.empty:
        told = [f"none was timed beside {_BASELINE}."]
    told += [" ", *tables.run.table("cpu_machine").get("answer", ())]
    passed = f"{checks['correct'].sum():,} of {plural(len(checks), 'kernel call')}"
    return sentence(
        Phrase(passed, tables.run.href),
        f" of {listing(f'DiT-{model}/2' for model in tables.models)} agree with plain PyTorch "
        f"{tables.where}, with at most {significant(checks['max_error'].max(), 2)} of the "
        "deviation that is allowed; ",
        *told,
    )


def _blocks(tables: _Tables) -> list[Block]:
    blocks: list[Block] = [*_figures(tables), _check_sheet(tables), *cpu(tables.run)]
    is_timed = not tables.timed.empty
    judged = claims_of([tables.run]) if is_timed else []
    speeds = [claim for claim in judged if not claim.verdict.effect_name.startswith("largest dev")]
    if speeds:
        note = "Set by this project for DiT-XL/2 on an H100; the paper states none per kernel."
        blocks.append(claims_sheet(speeds, f"Targets: {tables.title}", note))
    caveats = Points([*_CAVEATS, *(_TIMED if is_timed else _UNTIMED)])
    checks = tables.checks.sort_values(["correct", "max_error"], ascending=[True, False])
    worst = plain_sheet(
        checks[[*_CASE, "rows", "max_error", "status"]].head(MAX_ROWS),
        f"Failed checks and the largest deviations: {tables.title}",
    )
    model = tables.sheet.dropna(subset=_LEAST).head(MAX_ROWS)
    least = plain_sheet(
        model[[*_CASE[1:], "least_us", "limit", "bf16_least_us", _LEAST]],
        f"Least times on {tables.sheet['device'].iloc[0]}, {_MODEL}",
        "No product can gain more than the last column on such a device. kernels-roofline.csv "
        f"beside the report has {len(tables.roofline):,} rows, of every kernel and device.",
    )
    blocks += [
        Fold("What these numbers cannot say", [caveats]),
        Fold("Checks by layer", [worst]),
        Fold("Least times by layer and images, a model", [least]),
    ]
    if is_timed:
        peers = tables.timed.pivot_table(
            "median_us", ["layer", "model", "rows"], "implementation", sort=False
        ).reset_index()
        absent = sorted(set(tables.timed["implementation"]) - set(peers.columns))
        note = f"Without a time: {listing(absent)}." if absent else ""
        sheets = [
            plain_sheet(tables.ours[_TIMES], f"Times of our kernels {tables.where}"),
            plain_sheet(peers, "Median µs of every implementation", note),
        ]
        blocks.append(Fold(f"Times of {plural(len(tables.ours), 'call')}, and peers", sheets))
    return blocks


def _figures(tables: _Tables) -> list[Figures]:
    """Roofline and lines by images of the widest model; none where the run has no products."""
    model = tables.models[0]
    products = tables.sheet.query("model == @model and kernel == @_PRODUCT")
    points = _rates(tables, products)
    if points.empty:
        return []
    if tables.speedups.empty:
        what = f"what the data sheet allows each product of a block, {_MODEL}"
        lines = [("Least bf16 time ÷ least ternary time (a model)", _LEAST, products)]
    else:
        what = f"products of a block as measured {tables.where}, below the roofs of the data sheet"
        own = tables.ours.query("model == @model and images > 0")
        rotations = own[own["kernel"] == "hadamard_quantize"]
        lines = [
            ("Times as fast as cuBLAS bf16", _SPEEDUP, own[own["kernel"] == _PRODUCT]),
            ("Share of the measured ceiling", _SHARE, rotations),
        ]
    drawn = [_line_panel(tables, *line) for line in lines if line[2][line[1]].notna().any()]
    has_roofs = _is_model(str(tables.sheet["device"].iloc[0]), tables.where)
    if not (has_roofs or tables.speedups.empty):
        return [Figures(drawn, f"DiT-{model}/2 {tables.where}; its data sheet is not known.")]
    source = tables.sheet.iloc[0]
    caption = (
        f"DiT-{model}/2 on {source['device']} ({source['source']}; {source['peaks']}): {what}. "
        "On a slope memory sets the time, on a flat roof arithmetic."
    )
    return [Figures([_roofline(tables, points), *drawn], caption, _KEY)]


def _is_model(sheet: str, device: str) -> bool:
    """Whether a data sheet's name, "RTX 4090", is of the model of "NVIDIA GeForce RTX 4090"."""
    numbers = [word for word in sheet.split() if any(map(str.isdigit, word))]
    return bool(numbers) and set(numbers) <= set(device.split())


def _rates(tables: _Tables, products: pd.DataFrame) -> pd.DataFrame:
    """Operations per byte and TOP/s of products: measured where timed, else the most possible."""
    if tables.speedups.empty:
        micros = products[["least_us", "bf16_least_us"]]
    else:
        timed = tables.timed.pivot_table("median_us", _CASE, "implementation")
        micros = products[_CASE].join(timed, on=_CASE)[[_OURS, _BASELINE]]
    width, outputs, rows = (products[name] for name in ("width", "outputs", "rows"))
    dense = 2 * products["groups"] * (width * outputs + rows * (width + outputs))
    operations, found = products["operations"], []
    for kind, moved, column in zip(
        ("ternary", "bf16"), (products["bytes"], dense), micros, strict=True
    ):
        rates = {"intensity": operations / moved, "rate": operations / micros[column] / 1e6}
        found.append(pd.DataFrame({"kind": kind, **rates}))
    return pd.concat(found, ignore_index=True).dropna()


def _roofline(tables: _Tables, points: pd.DataFrame) -> Picture:
    # "3.35 TB/s, bf16 989.4, int8 1978.9 TOPS"
    memory, bf16, int8 = map(float, re.findall(r"(?<![\w.])[\d.]+", tables.sheet["peaks"].iloc[0]))
    palette = {"ternary": colour("rotated"), "bf16": colour("reference")}
    ends = points.groupby("kind")["rate"].agg(["min", "max"]).map(significant)
    words = "; ".join(f"{kind} {low} to {high} TOP/s" for kind, low, high in ends.itertuples())
    alt = f"Roofline of DiT-{tables.models[0]}: {words}"
    low, high = points["intensity"].min() / 1.5, points["intensity"].max() * 1.5
    with panel(f"{tables.run.anchor}-roofline", alt, title="Roofline") as drawn:
        for kind, peak in (("ternary", int8), ("bf16", bf16)):
            x = np.array([low, peak / memory, max(high, 1.5 * peak / memory)])
            sns.lineplot(x=x, y=np.minimum(x * memory, peak), color=palette[kind], linewidth=1,
                         ax=drawn.axes)  # fmt: skip
        sns.scatterplot(points, x="intensity", y="rate", hue="kind", style="kind", palette=palette,
                        markers={"ternary": "o", "bf16": "X"}, legend=False, ax=drawn.axes,
                        s=26)  # fmt: skip
        drawn.axes.set(xlabel="operations per byte", ylabel="TOP/s")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    return drawn.picture


def _line_panel(tables: _Tables, title: str, column: str, rows: pd.DataFrame) -> Picture:
    most = rows[rows["images"] == rows["images"].max()]
    words = "; ".join(f"{r['layer']} {significant(r[column])}" for r in most.to_dict("records"))
    alt = f"{title} of DiT-{tables.models[0]}, at {rows['images'].max()} images: {words}"
    with panel(f"{tables.run.anchor}-{column}", alt, height=2.8, title=title) as drawn:
        sns.lineplot(rows, x="images", y=column, style="layer", markers=True, errorbar=None,
                     color=colour("rotated"), ax=drawn.axes)  # fmt: skip
        drawn.axes.set(xlabel="images in a step", ylabel="", ylim=(0, None))
        drawn.axes.axhline(1, color=colour("reference"), linewidth=1)
        log_axis(drawn.axes, "x")
        legend_below(drawn)
    return drawn.picture


def _check_sheet(tables: _Tables) -> Sheet:
    failed = tables.checks[~tables.checks["correct"]].drop_duplicates(["kernel", "layer", "model"])
    wrong = [f"{r['kernel']}, {r['layer']}, DiT-{r['model']}: {r['status']}"
             for r in failed.head(5).to_dict("records")]  # fmt: skip
    return Sheet(
        _by_kernel(tables).assign(run=tables.run.href),
        f"Kernels and their checks: {tables.title}",
        "Every output against plain PyTorch on the same random inputs, memory filled with NaN "
        "beforehand; at most 1 passes."
        + (f" Failed ({len(failed)}, all below): {'; '.join(wrong)}." if wrong else ""),
        formats={"effect": lambda value: significant(value, 2)},
        heads={"n": "calls", "effect": "largest deviation", "rows": "most rows"},
        hints={"effect": "over what is allowed", "rows": "of a call"},
        links={"kernel": "run"},
    )
