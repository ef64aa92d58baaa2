"""What the kernels compute and how fast: checks against plain PyTorch, rooflines, times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import seaborn as sns

from reports.generic import MAX_ROWS, claims_of, rule_of
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Points, Section, Sheet, claims_sheet, sentence
from reports.text import Phrase, listing, percent, plural, significant, times
from robuq_bench.figures import Picture, colour, legend_below, log_axis, panel
from robuq_bench.statistics.verdicts import Verdict

ORDER = 75
QUESTION = "Are the kernels right, and how near to the hardware do they come?"
OPEN: tuple[str, ...] = ()
EXPORTS = ("kernels-kernels.csv", "kernels-kernel_checks.csv", "kernels-roofline.csv",
           "kernels.tex")  # fmt: skip
_OURS, _BASELINE, _PRODUCT = "robuq-bench", "cuBLAS bf16", "ternary_matmul"
_INTERPRETER = "in Triton’s interpreter"
_SPEEDUP, _SHARE = "speedup_over_cublas_bf16", "share_of_ceiling"
_MODEL = "a model from data-sheet peaks, not measured"
_OLD_RULE = "A kernel holds where every call of it passed the check of its study."
_KEY = (("rotated", "● ternary × int8"), ("reference", "× bf16"))
_CAVEATS = (
    "A deviation is in units of what its check allows, so 1 is the limit; limits of different "
    "kernels do not compare.",
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
    "The ceiling is the copy bandwidth and product rate of this device in this run; a share above "
    "100 % says that measuring the ceiling itself did not reach the best.",
)


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tables of one run; `timed` is empty without a GPU."""

    run: RunData
    roofline: pd.DataFrame
    timed: pd.DataFrame

    @cached_property
    def ours(self) -> pd.DataFrame:
        """Rows of our kernels on the device; empty without one."""
        return self.timed if self.timed.empty else self.timed.query("implementation == @_OURS")

    @cached_property
    def speedups(self) -> pd.Series[float]:
        """Times as fast as cuBLAS bf16, of every product that was timed beside it."""
        return self.ours.get(_SPEEDUP, pd.Series(dtype=float)).dropna()

    @cached_property
    def checks(self) -> pd.DataFrame:
        """Every check: on the device where there was one, else in the interpreter."""
        found = self.run.table("kernel_checks") if self.timed.empty else self.ours
        return found if found.empty else found.assign(correct=found["correct"].astype(bool))

    @property
    def where(self) -> str:
        """With its preposition."""
        return _INTERPRETER if self.timed.empty else f"on {self.timed['device_name'].iloc[0]}"

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
        name = next((n for n in names if n.split()[0] in self.where.split()), names[0])
        return self.roofline[self.roofline["device"] == name]


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Checks, roofline and times of each run; None where no run wrote its tables."""
    found = [_Tables(run, run.table("roofline"), run.table("kernels")) for run in runs]
    found = [tables for tables in found if not (tables.roofline.empty or tables.checks.empty)]
    if not found:
        return None
    blocks: list[Block] = []
    claims: list[Claim] = []
    for tables in found:
        own = _claims(tables)
        claims += own
        blocks += _blocks(tables, own)
    frames = {
        name: [t.run.table(name).assign(run=t.run.id) for t in found if name in t.run.tables]
        for name in ("kernels", "kernel_checks", "roofline")
    }
    return Section(
        anchor="kernels",
        title="Kernels",
        answer=_answer(found[0]),
        blocks=blocks,
        claims=claims,
        rule=rule_of([tables.run for tables in found]) or _OLD_RULE,
        exports={f"kernels-{name}": pd.concat(own) for name, own in frames.items() if own},
        tex={"kernels": [_check_sheet(tables) for tables in found]},
    )


def _claims(tables: _Tables) -> list[Claim]:
    """The run's verdicts; of a run without them, what its checks say of each kernel."""
    return claims_of([tables.run]) or [
        Claim(
            Verdict(
                claim=f"{row['kernel']} agrees with plain PyTorch {tables.where}",
                subject=str(row["kernel"]),
                verdict="holds" if row["passed"] == row["calls"] else "does not hold",
                effect=None if math.isnan(row["worst"]) else float(row["worst"]),
                effect_name="largest deviation over what is allowed",
                low=None,
                high=None,
                n=int(row["calls"]),
                n_of="calls",
                test="comparison with plain PyTorch",
                p_value=None,
            ),
            tables.title,
            tables.run.href,
        )
        for row in _by_kernel(tables).reset_index().to_dict("records")
    ]


def _by_kernel(tables: _Tables) -> pd.DataFrame:
    """Calls, how many passed, and the largest deviation of each kernel."""
    return tables.checks.groupby("kernel", sort=False).agg(
        calls=("correct", "size"), passed=("correct", "sum"), worst=("max_error", "max")
    )


def _answer(tables: _Tables) -> list[Phrase]:
    checks, href = tables.checks, tables.run.href
    passed = f"{checks['correct'].sum():,} of {plural(len(checks), 'kernel call')}"
    parts: list[str | Phrase] = [
        Phrase(passed, href),
        f" of {listing(f'DiT-{model}/2' for model in tables.models)} agree with plain PyTorch "
        f"{tables.where}, with at most {significant(checks['max_error'].max(), 2)} of the "
        "deviation that is allowed; ",
    ]
    if tables.timed.empty:
        return sentence(*parts, "timings need a GPU: not run.")
    timed = tables.speedups
    if timed.empty:
        return sentence(*parts, f"none was timed beside {_BASELINE}.")
    share = tables.ours[_SHARE]
    return sentence(
        *parts,
        "products of ternary weights are ",
        Phrase(f"{times(timed.min())} to {times(timed.max())}", href),
        f" (median {times(timed.median())}) as fast as {_BASELINE}, and kernels reach "
        f"{percent(share.min())} to {percent(share.max())} of what the device allows.",
    )


def _blocks(tables: _Tables, claims: Sequence[Claim]) -> list[Block]:
    blocks: list[Block] = [*_figures(tables), _check_sheet(tables)]
    speeds = [claim for claim in claims if not claim.verdict.effect_name.startswith("largest dev")]
    if speeds and not tables.timed.empty:
        note = "Set by this project for DiT-XL/2 on an H100; the paper states none per kernel."
        blocks.append(claims_sheet(speeds, f"Targets: {tables.title}", note))
    caveats = [*_CAVEATS, *(_UNTIMED if tables.timed.empty else _TIMED)]
    blocks.append(Fold("What these numbers cannot say", [Points(caveats)]))
    blocks.append(Fold("Every check by layer", [_layer_sheet(tables)]))
    blocks.append(Fold("Least times by layer and images, a model", [_least_sheet(tables)]))
    if not tables.timed.empty:
        summary = f"Times of {plural(len(tables.ours), 'call')}, and peers"
        blocks.append(Fold(summary, [_time_sheet(tables), *_peer_sheets(tables)]))
    return blocks


def _figures(tables: _Tables) -> list[Figures]:
    """Roofline and lines by images of the widest model; none where the run has no products."""
    model = tables.models[0]
    points = _rates(tables, model)
    if points.empty:
        return []
    source = tables.sheet.iloc[0]
    what = (
        f"what the data sheet allows each product of a block, {_MODEL}"
        if tables.speedups.empty
        else f"products of a block as measured {tables.where}, below the roofs of the data sheet"
    )
    return [
        Figures(
            [
                _roofline(tables, model, points),
                *(_line_panel(tables, model, *line) for line in _lines(tables, model)),
            ],
            f"DiT-{model}/2 on {source['device']} ({source['source']}; {source['peaks']}): {what}. "
            "On a slope memory sets the time, on a flat roof arithmetic.",
            _KEY,
        )
    ]


def _products(tables: _Tables, model: str) -> pd.DataFrame:
    """Products of a block with their operations per byte; adaLN's, which has far fewer, not."""
    rows = tables.sheet.query("model == @model and kernel == @_PRODUCT").copy()
    wide = rows["width"] * rows["outputs"] + rows["rows"] * (rows["width"] + rows["outputs"])
    rows["ternary"] = rows["operations"] / rows["bytes"]
    rows["bf16"] = rows["operations"] / (2 * rows["groups"] * wide)
    return rows


def _rates(tables: _Tables, model: str) -> pd.DataFrame:
    """Operations per byte and TOP/s of products: measured where timed, else the most possible."""
    rows = _products(tables, model)
    case = ["kernel", "model", "layer", "images"]
    kinds = {"ternary": (_OURS, "least_us"), "bf16": (_BASELINE, "bf16_least_us")}
    found = []
    for kind, (implementation, least) in kinds.items():
        if tables.speedups.empty:
            rate = rows["operations"] / rows[least] / 1e6
        else:
            own = tables.timed[tables.timed["implementation"] == implementation]
            rate = rows[case].merge(own, "left", on=case)["tflop_s"].set_axis(rows.index)
        found.append(pd.DataFrame({"kind": kind, "intensity": rows[kind], "rate": rate}))
    return pd.concat(found, ignore_index=True).dropna()


def _roofline(tables: _Tables, model: str, points: pd.DataFrame) -> Picture:
    memory, *peaks = _peaks(str(tables.sheet["peaks"].iloc[0]))
    low, high = points["intensity"].min() / 1.5, points["intensity"].max() * 1.5
    roofs = pd.DataFrame(
        [
            {"kind": kind, "intensity": x, "rate": min(x * memory, peak)}
            for kind, peak in zip(("bf16", "ternary"), peaks, strict=True)
            for x in (low, peak / memory, max(high, 1.5 * peak / memory))
        ]
    )
    palette = {"ternary": colour("rotated"), "bf16": colour("reference")}
    words = "; ".join(
        f"{kind} {significant(own['rate'].min())} to {significant(own['rate'].max())} TOP/s"
        for kind, own in points.groupby("kind")
    )
    alt = f"Roofline of DiT-{model}: {words}"
    with panel(f"{tables.run.anchor}-roofline", alt, title="Roofline") as drawn:
        sns.lineplot(roofs, x="intensity", y="rate", hue="kind", palette=palette, legend=False,
                     ax=drawn.axes, linewidth=1)  # fmt: skip
        sns.scatterplot(points, x="intensity", y="rate", hue="kind", style="kind", palette=palette,
                        markers={"ternary": "o", "bf16": "X"}, legend=False, ax=drawn.axes,
                        s=26)  # fmt: skip
        drawn.axes.set(xlabel="operations per byte", ylabel="TOP/s")
        log_axis(drawn.axes, "x")
        log_axis(drawn.axes, "y")
    return drawn.picture


def _peaks(text: str) -> list[float]:
    """TB/s, bf16 and int8 TOP/s of "3.35 TB/s, bf16 989.4, int8 1978.9 TOPS"."""
    memory, bf16, int8 = text.split(", ")
    return [float(memory.split()[0]), float(bf16.split()[1]), float(int8.split()[1])]


def _lines(tables: _Tables, model: str) -> list[tuple[str, str, pd.DataFrame]]:
    """Title, column and rows of the panels by images: measured, or the most that is possible."""
    ours = tables.ours
    if tables.speedups.empty:
        title = "Least bf16 time ÷ least ternary time (a model)"
        return [(title, "bf16_over_ternary", _products(tables, model))]
    ours = ours[(ours["model"] == model) & (ours["images"] > 0)]
    found = [
        ("Times as fast as cuBLAS bf16", _SPEEDUP, ours[ours["kernel"] == _PRODUCT]),
        ("Share of the measured ceiling", _SHARE, ours[ours["kernel"] == "hadamard_quantize"]),
    ]
    return [line for line in found if not line[2][line[1]].dropna().empty]


def _line_panel(
    tables: _Tables, model: str, title: str, column: str, rows: pd.DataFrame
) -> Picture:
    most = rows[rows["images"] == rows["images"].max()]
    words = "; ".join(f"{r['layer']} {significant(r[column])}" for r in most.to_dict("records"))
    alt = f"{title} of DiT-{model}, at {rows['images'].max()} images: {words}"
    with panel(f"{tables.run.anchor}-{column}", alt, height=2.8, title=title) as drawn:
        sns.lineplot(rows, x="images", y=column, style="layer", markers=True, errorbar=None,
                     color=colour("rotated"), ax=drawn.axes)  # fmt: skip
        drawn.axes.set(xlabel="images in a step", ylabel="")
        drawn.axes.set_ylim(bottom=0)
        drawn.axes.axhline(1, color=colour("reference"), linewidth=1)
        log_axis(drawn.axes, "x")
        legend_below(drawn)
    return drawn.picture


def _check_sheet(tables: _Tables) -> Sheet:
    frame = _by_kernel(tables).reset_index()
    rows = tables.checks.groupby("kernel", sort=False)["rows"].agg(["min", "max"]).to_numpy()
    frame["rows of a call"] = [
        f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in rows
    ]
    frame["run"] = tables.run.href
    failed = tables.checks[~tables.checks["correct"]].drop_duplicates(["kernel", "layer", "model"])
    wrong = [f"{r['kernel']}, {r['layer']}, DiT-{r['model']}: {r['status']}"
             for r in failed.head(5).to_dict("records")]  # fmt: skip
    note = (
        "Every output against plain PyTorch on the same random inputs, memory filled with NaN "
        "beforehand; at most 1 passes."
    )
    return Sheet(
        frame,
        f"Kernels and their checks: {tables.title}",
        note
        + (
            f" Failed: {'; '.join(wrong)}{' and more' if len(failed) > 5 else ''}." if wrong else ""
        ),
        formats={"worst": lambda value: significant(value, 2)},
        heads={"worst": "largest deviation"},
        hints={"worst": "over what is allowed"},
        links={"kernel": "run"},
    )


def _layer_sheet(tables: _Tables) -> Sheet:
    checks = tables.checks
    worst = checks["max_error"].where(checks["correct"], math.inf).fillna(math.inf)
    frame = (
        checks.assign(worst=worst)
        .pivot_table(
            index=["kernel", "layer"], columns="model", values="worst", aggfunc="max", sort=False
        )
        .reindex(columns=tables.models)
        .add_prefix("DiT-")
        .reset_index()
    )
    return Sheet(
        frame,
        f"Largest deviation over what is allowed, by layer: {tables.title}",
        formats={
            f"DiT-{model}": lambda value: "fails" if math.isinf(value) else significant(value, 2)
            for model in tables.models
        },
        kind="dense",
    )


def _least_sheet(tables: _Tables) -> Sheet:
    rows = tables.sheet.dropna(subset="bf16_over_ternary")
    shown = ["layer", "model", "images", "least_us", "limit", "bf16_least_us", "bf16_over_ternary"]
    return Sheet(
        rows[shown].head(MAX_ROWS),
        f"Least times on {tables.sheet['device'].iloc[0]}, a model",
        f"{_MODEL[0].upper()}{_MODEL[1:]}. No kernel can gain more than the last column on such a "
        f"device. The first rows; all {len(tables.roofline):,}, of every kernel and of other "
        "devices, are in kernels-roofline.csv beside the report.",
        formats={"bf16_over_ternary": times},
        heads={
            "least_us": "least time (µs)",
            "limit": "set by",
            "bf16_least_us": "in bf16 (µs)",
            "bf16_over_ternary": "bf16 ÷ ternary",
        },
        kind="dense",
    )


def _time_sheet(tables: _Tables) -> Sheet:
    rows = tables.ours
    shown = ["layer", "model", "rows", "median_us", "gb_s", "tflop_s", _SHARE, _SPEEDUP]
    frame = rows.reindex(columns=[*shown, "limit"]).assign(
        what=rows["kernel"] + ", " + rows["settings"],
        judged=rows.get("verdict"),
        spread=[_spread(row) for row in rows.to_dict("records")],
    )
    return Sheet(
        frame,
        f"Times of our kernels {tables.where}",
        "Medians of all replays of a CUDA graph, 20 and 80 % quantiles below. “faster” and "
        "“slower” need p < .002 (Mann-Whitney) and 5 %; “unstable”: the interquartile range "
        "exceeds 10 % of the median. A call whose check failed has no time.",
        formats={_SHARE: percent, _SPEEDUP: times},
        heads={
            "median_us": "median (µs)",
            "gb_s": "GB/s",
            "tflop_s": "TOP/s",
            _SHARE: "share of ceiling",
            _SPEEDUP: "over cuBLAS bf16",
        },
        small={"layer": "what", "median_us": "spread", _SHARE: "limit", _SPEEDUP: "judged"},
        kind="dense",
    )


def _spread(row: Mapping[Any, Any]) -> str:
    low, high = row.get("p20_us"), row.get("p80_us")
    if not (isinstance(low, float) and isinstance(high, float)) or math.isnan(low):
        return str(row["status"]) if row["status"] != "ok" else ""
    shaky = " unstable" if row.get("stability") == "unstable" else ""
    return f"[{significant(low)} to {significant(high)}]{shaky}"


def _peer_sheets(tables: _Tables) -> list[Sheet]:
    """Median times of every implementation by case; none where no peer was timed."""
    rows = tables.timed.reindex(columns=["layer", "model", "rows", "implementation", "median_us"])
    frame = rows.pivot_table(
        index=["layer", "model", "rows"], columns="implementation", values="median_us", sort=False
    ).dropna(thresh=2)
    if frame.empty:
        return []
    absent = sorted(set(rows["implementation"]) - set(frame.columns))
    note = f"Without a time: {listing(absent)}." if absent else ""
    return [Sheet(frame.reset_index(), "Median µs of every implementation", note, kind="dense")]
