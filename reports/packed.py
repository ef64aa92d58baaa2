"""What packing costs in quality: a trained student beside its packed variants."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import seaborn as sns

from reports.generic import answer_of, claims_of, rule_of
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Fold, Section, Sheet, sentence
from reports.text import Phrase, bytes_text, of_metric, percent, spread, stem, times
from robuq_bench.figures import Picture, colour, panel
from robuq_bench.statistics.verdicts import Verdict

ORDER = 70
QUESTION = "Does a packed model keep the quality of the trained one?"
OPEN: tuple[str, ...] = ()
EXPORTS = ("packed.csv",)
_NOTE = (
    "Mean over seed ranges, the least and the greatest below. Pixel difference is the mean "
    "absolute difference to the trained student’s images in grey levels of 255; an image with any "
    "difference is not equal. The trained student’s file is that in FP32."
)
_OLD_RULE = "A lossless file holds where every image is the trained student’s, bit for bit."


def view(runs: Sequence[RunData], every: Sequence[RunData]) -> Section | None:
    """Size and quality of each variant; None where no run wrote its table."""
    frames = {run: run.table("packed") for run in runs}
    whole = [run for run, frame in frames.items() if not frame.empty]
    if not whole:
        return None
    blocks: list[Block] = []
    for run in whole:
        fid = _fid(frames[run])
        if fid:
            caption = f"{fid} of each variant on {run.title}: mean and range over seed ranges."
            blocks.append(Figures([_fid_panel(run, frames[run], fid)], caption))
        blocks.append(_sheet(run, frames[run], fid))
    folded = [sheet for run in whole for sheet in (_metric_sheet(run, frames[run]),
              Sheet(frames[run][["variant", "storage", "backend", "plan", "run"]],
                    f"What the variants of {run.title} are"))]  # fmt: skip
    blocks.append(Fold("Every metric, and what the variants are", folded))
    claims = claims_of(whole) or [_lossless(run, frames[run]) for run in whole]
    return Section(
        anchor="packed",
        title="Packed models",
        answer=_answer(whole[0], frames[whole[0]]) or answer_of(claims),
        blocks=blocks,
        claims=claims,
        rule=rule_of(whole) or _OLD_RULE,
        exports={"packed": pd.concat([frames[run].assign(packed_run=run.id) for run in whole])},
    )


def _fid(frame: pd.DataFrame) -> str:
    names = [str(name) for name in frame if stem(str(name)) == "fid"]
    return names[0] if names else ""


def _lossless(run: RunData, frame: pd.DataFrame) -> Claim:
    """What a run from before verdicts says of its lossless file, by the rule of its study."""
    row = next((r for r in frame.to_dict("records") if r["variant"] == "reference"), None)
    share = None if row is None else float(row["share_of_images_equal"])
    verdict = Verdict(
        claim="A lossless packed file gives the trained student’s images",
        subject="reference",
        verdict="not judged" if share is None else "holds" if share == 1 else "does not hold",
        effect=share,
        effect_name="share of images equal",
        low=None,
        high=None,
        n=0 if row is None else int(row["num_samples"] * row["seed_ranges"]),
        n_of="images",
        test="comparison bit for bit",
        p_value=None,
    )
    return Claim(verdict, run.title, run.href)


def _answer(run: RunData, frame: pd.DataFrame) -> list[Phrase]:
    """What the lossless file weighs and keeps; empty where the run has no such variant or FID."""
    by_variant = {str(row["variant"]): row for row in frame.to_dict("records")}
    fid = _fid(frame)
    if not fid or not {"trained", "reference"} <= by_variant.keys():
        return []
    trained, packed = by_variant["trained"], by_variant["reference"]
    equal = percent(packed["share_of_images_equal"])
    return sentence(
        f"A packed file of {bytes_text(packed['file_bytes'])} ({times(packed['size_reduction'])} "
        f"smaller) gives {equal} of the trained student’s images unchanged, at {fid} ",
        Phrase(
            f"{of_metric(fid)(packed[fid])} "
            f"{spread(fid, packed[f'{fid}_min'], packed[f'{fid}_max'])}",
            run.href,
        ),
        f" where the trained student has {of_metric(fid)(trained[fid])} "
        f"{spread(fid, trained[f'{fid}_min'], trained[f'{fid}_max'])}.",
    )


def _fid_panel(run: RunData, frame: pd.DataFrame, fid: str) -> Picture:
    ranges = frame.melt("variant", [fid, f"{fid}_min", f"{fid}_max"])
    alt = "; ".join(
        f"{v} {of_metric(fid)(x)}" for v, x in zip(frame["variant"], frame[fid], strict=True)
    )
    with panel(f"packed-{run.anchor}", f"{fid} by variant: {alt}", height=1.9) as drawn:
        sns.pointplot(
            ranges, x="value", y="variant", ax=drawn.axes, color=colour("rotated"),
            linestyle="none", errorbar=("pi", 100), marker="D", markersize=5,
        )  # fmt: skip
        drawn.axes.set(xlabel=f"{fid} (lower is better)", ylabel="")
    return drawn.picture


def _sheet(run: RunData, frame: pd.DataFrame, fid: str) -> Sheet:
    packed = frame.dropna(subset="file_bytes").head(1)
    full = float((packed["file_bytes"] * packed["size_reduction"]).sum())
    columns = ["variant", "file_bytes", "size_reduction", "share_of_images_equal"]
    columns += ["pixel_difference", "distillation_loss", *filter(None, [fid])]
    shown = frame[columns].copy()
    shown.loc[shown["variant"] == "trained", ["file_bytes", "size_reduction"]] = [full, 1.0]
    ranges = _ranges(frame, [fid] if fid else [])
    return Sheet(
        shown.assign(run=run.href, **ranges),
        f"Variants of {run.title}",
        _NOTE,
        formats={
            "file_bytes": bytes_text,
            "size_reduction": times,
            "share_of_images_equal": percent,
            **({fid: of_metric(fid)} if fid else {}),
        },
        heads={
            "file_bytes": "file",
            "size_reduction": "smaller",
            "share_of_images_equal": "images equal",
            "pixel_difference": "pixel difference",
            "distillation_loss": "distillation loss",
        },
        links={"variant": "run"},
        small={name.removesuffix(" range"): name for name in ranges},
    )


def _metric_sheet(run: RunData, frame: pd.DataFrame) -> Sheet:
    metrics = [str(name) for name in frame if f"{name}_min" in frame]
    ranges = _ranges(frame, metrics)
    return Sheet(
        frame[["variant", *metrics]].assign(**ranges),
        f"Metrics of {run.title}",
        formats={name: of_metric(name) for name in metrics},
        small={name.removesuffix(" range"): name for name in ranges},
        kind="dense",
    )


def _ranges(frame: pd.DataFrame, metrics: Sequence[str]) -> dict[str, list[str]]:
    """Column of small print by metric: least and greatest over seed ranges."""
    return {
        f"{name} range": [
            spread(name, low, high)
            for low, high in zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        ]
        for name in metrics
    }
