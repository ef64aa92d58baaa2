"""What packing costs in quality: a trained student beside its packed variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from reports.generic import answer_of, claims_of, old_claims, plain_sheet, rule_of, table_fold
from reports.loading import RunData
from reports.page import Block, Claim, Figures, Section, Sheet, sentence
from reports.text import Phrase, bytes_text, number, percent, spread, stem, times
from robuq_bench.figures import Picture, colour, panel, points

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
    blocks += [table_fold(run, "packed") for run in whole]
    claims = [c for run in whole for c in claims_of([run]) or _lossless(run, frames[run])]
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
    return next((str(name) for name in frame if stem(str(name)) == "fid"), "")


def _lossless(run: RunData, frame: pd.DataFrame) -> list[Claim]:
    """What a run from before verdicts says of its lossless file, by the rule of its study."""
    own = frame.set_index("variant").reindex(["reference"]).reset_index(names="subject")
    share = own["share_of_images_equal"]
    old = own.assign(
        claim="A lossless packed file gives the trained student’s images",
        verdict=np.select([share.isna(), share == 1], ["not judged", "holds"], "does not hold"),
        effect=share,
        effect_name="share of images equal",
        n=(own["num_samples"] * own["seed_ranges"]).fillna(0),
        n_of="images",
        test="comparison bit for bit",
    )
    return old_claims(run, old)


def _answer(run: RunData, frame: pd.DataFrame) -> list[Phrase]:
    """What the lossless file weighs and keeps; empty where the run has no such variant or FID."""
    by_variant = {str(row["variant"]): row for row in frame.to_dict("records")}
    fid = _fid(frame)
    if not fid or not {"trained", "reference"} <= by_variant.keys():
        return []
    trained, packed = by_variant["trained"], by_variant["reference"]
    quality = [
        f"{number(fid, row[fid])} {spread(fid, row[f'{fid}_min'], row[f'{fid}_max'])}"
        for row in (packed, trained)
    ]
    equal = percent(packed["share_of_images_equal"])
    return sentence(
        f"A packed file of {bytes_text(packed['file_bytes'])} ({times(packed['size_reduction'])} "
        f"smaller) gives {equal} of the trained student’s images unchanged, at {fid} ",
        Phrase(quality[0], run.href),
        f" where the trained student has {quality[1]}.",
    )


def _fid_panel(run: RunData, frame: pd.DataFrame, fid: str) -> Picture:
    alt = "; ".join(f"{r['variant']} {number(fid, r[fid])}" for r in frame.to_dict("records"))
    with panel(f"packed-{run.anchor}", f"{fid} by variant: {alt}", height=1.9) as drawn:
        limits = [f"{fid}_min", fid, f"{fid}_max"]
        look = {"color": colour("rotated"), "marker": "D", "markersize": 5}
        points(frame[["variant", *limits]], drawn.axes, "variant", limits, **look)
        drawn.axes.set_xlabel(f"{fid} (lower is better)")
    return drawn.picture


def _sheet(run: RunData, frame: pd.DataFrame, fid: str) -> Sheet:
    packed = frame.dropna(subset="file_bytes").head(1)
    full = float((packed["file_bytes"] * packed["size_reduction"]).sum())
    heads = {
        "file_bytes": "file",
        "size_reduction": "smaller",
        "share_of_images_equal": "images equal",
        "pixel_difference": "pixel difference",
        "distillation_loss": "distillation loss",
    }
    shown = frame[["variant", *heads, *([fid, f"{fid}_min", f"{fid}_max"] if fid else [])]].copy()
    shown.loc[shown["variant"] == "trained", ["file_bytes", "size_reduction"]] = [full, 1.0]
    return plain_sheet(
        shown.assign(run=run.href),
        f"Variants of {run.title}",
        _NOTE,
        heads=heads,
        links={"variant": "run"},
        kind="",
    )
