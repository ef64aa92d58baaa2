"""Tables of `study incoherence`: responses to outliers, their slopes, verdicts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from robuq_bench.errors import CheckError
from robuq_bench.incoherence_figure import at_shared_scales, response_pictures, t_interval
from robuq_bench.runs.run import Run
from robuq_bench.statistics.comparisons import (
    CONFIDENCE,
    MIN_SEEDS,
    POWER,
    compare_plans,
    judge_family,
    judge_interval,
)
from robuq_bench.statistics.verdicts import Verdict, verdict_rows
from studies.incoherence.settings import NONE, Settings

BEFORE, AFTER = "before training", "after training"

ERRORS = ("error", "weight_error", "student_error")
"""Of predictions: what is judged, of quantized activations; then by unquantized ones, and whole."""

DOUBLING = 1.02
"""Factors of error per doubling of the outliers from its reciprocal to this are of no consequence:
8 % from outliers of 1 to 16."""

_CELL = ["when", "bits", "rotation"]


def summarise(run: Run, options: Settings, rule: str) -> list[dict[str, Any]]:
    """Write all tables and the figure; return the headline: errors at both ends, and the slope.

    `rule` is what verdicts are given by, as text.
    """
    records = [record for record in run.results() if record["kind"] == "trial"]
    frame = ordered(pd.DataFrame(records), options)
    trials = frame[[*_CELL, "scale", "seed", *ERRORS]].astype(dict.fromkeys(ERRORS, float))
    run.write_table("trials", records_of(trials))
    run.write_table("responses", responses(trials))
    run.write_table("layers", layer_rows(frame))
    run.write_table("inputs", input_rows(frame))
    shared = at_shared_scales(trials)
    slopes = slopes_of(shared)
    run.write_table("slopes", records_of(slopes))
    run.write_table("verdicts", verdict_rows(judge(slopes, shared), rule))
    for picture, name in zip(response_pictures(trials, run.id), cells(trials), strict=True):
        picture.save(run.figure_path(f"errors-{name[0].split()[0]}-{name[1]}-bits"))
    return headline(shared, slopes)


def ordered(frame: pd.DataFrame, options: Settings) -> pd.DataFrame:
    """Rows in the order of the settings, whatever order shards finished in."""
    rank = {name: place for place, name in enumerate((BEFORE, AFTER, *options.rotations))}
    keys = ["when", "bits", "rotation", "scale", "seed"]
    return frame.sort_values(
        keys, key=lambda column: column.map(rank) if column.name in ("when", "rotation") else column
    ).reset_index(drop=True)


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table; None for NaN."""
    rows: Any = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return list(rows)


def cells(trials: pd.DataFrame) -> list[tuple[str, int]]:
    """(when, bits) in order: the panels of the figure."""
    return list(dict.fromkeys(trials[["when", "bits"]].itertuples(index=False, name=None)))


def responses(trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Geometric mean error of every dose with its t interval, and its ratio to no rotation.

    Empty where a training diverged: the other seeds would be no fair sample.
    """
    keys = ["when", "bits", "scale", "seed"]
    none = trials[trials["rotation"] == NONE].set_index(keys)["error"].rename("none")
    rows = []
    for cell, own in trials.join(none, on=keys).groupby([*_CELL, "scale"], sort=False):
        low, high = t_interval(own["error"])
        row = dict(zip([*_CELL, "scale"], cell, strict=True))
        row |= {"seeds": len(own), "error": stats.gmean(own["error"]), "low": low, "high": high}
        row |= {name: stats.gmean(own[name]) for name in ERRORS[1:]}
        ratio = own["error"] / own["none"]
        if row["rotation"] != NONE and ratio.notna().all():
            low, high = t_interval(ratio)
            row |= {"over_none": stats.gmean(ratio), "over_none_low": low, "over_none_high": high}
        rows.append(row)
    return records_of(pd.DataFrame(rows))


def layer_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Error of layers' outputs, a column per layer type: means over seeds."""
    rows = []
    for cell, own in frame.groupby([*_CELL, "scale"], sort=False):
        means: Any = pd.DataFrame(list(own["layer_errors"])).mean(skipna=False).to_dict()
        rows.append({**dict(zip([*_CELL, "scale"], cell, strict=True)), **means})
    return records_of(pd.DataFrame(rows))


def input_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """How far inputs stand out, by scale, rotation and layer type: means over seeds."""
    measured = frame[frame["when"] == BEFORE].drop_duplicates(["rotation", "scale", "seed"])
    rows = []
    for (rotation, scale), own in measured.groupby(["rotation", "scale"], sort=False):
        quantities = [
            pd.DataFrame(each).rename_axis("layer_type").reset_index() for each in own["inputs"]
        ]
        means = pd.concat(quantities).groupby("layer_type", sort=False).mean().reset_index()
        rows += [{"rotation": rotation, "scale": scale, **row} for row in records_of(means)]
    return rows


def slopes_of(trials: pd.DataFrame) -> pd.DataFrame:
    """Slope of log error against log2 scale by cell and seed, in `slope`: log factor a doubling.

    NaN where a training of the seed diverged, which has no error.

    Raises:
        CheckError: an error is infinite or not above 0.
    """
    errors = trials["error"]
    for row in trials[errors.notna() & ~(np.isfinite(errors) & (errors > 0))].itertuples():
        raise CheckError(
            f"{row.rotation} at s = {row.scale:g}, {row.bits} bits, seed {row.seed}, {row.when}: "
            f"the error is {row.error}; a number above 0 is needed"
        )
    rows = []
    for cell, own in trials.groupby([*_CELL, "seed"], sort=False):
        fit = stats.linregress(np.log2(own["scale"]), np.log(own["error"]))
        rows.append({**dict(zip([*_CELL, "seed"], cell, strict=True)), "slope": fit.slope})
    return pd.DataFrame(rows)


def judge(slopes: pd.DataFrame, trials: pd.DataFrame) -> list[Verdict]:
    """Verdicts of the study's rule, a family before training and one after it.

    First every rotation's own response, then its response and its error at the greatest outliers
    beside those of no rotation.
    """
    found = []
    for when, family in slopes.groupby("when", sort=False):
        own, beside = [], []
        errors = trials[trials["when"] == when]
        greatest = errors["scale"].max()
        errors = errors[errors["scale"] == greatest]
        errors = errors.rename(columns={"rotation": "plan", "error": "value"}).assign(image_range=0)
        groups = family.set_index("seed").groupby(["bits", "rotation"], sort=False)["slope"]
        by_bits = dict(iter(groups))  # without iter, it would be taken for a mapping
        for (bits, rotation), values in by_bits.items():
            where = f"{rotation}, {bits} bits, {when}"
            own.append(_response(values, where))
            if rotation == NONE or (bits, NONE) not in by_bits:
                continue
            none = by_bits[bits, NONE]
            values, none = values.align(none, join="inner")
            beside.append(_difference(values - none, where))
            claim = (
                f"At outliers of {greatest:g}, the error with {rotation} differs from that without"
            )
            pair = errors[(errors["bits"] == bits) & errors["plan"].isin([rotation, NONE])]
            if pair["value"].isna().any():
                compared = dataclasses.replace(
                    _not_judged(pair.set_index("seed")["value"], claim, where),
                    effect_name="ratio of geometric means of error",
                )
            else:
                compared = compare_plans(pair, rotation, NONE, "error")
            beside.append(dataclasses.replace(compared, claim=claim, subject=where))
        found += judge_family([*own, *beside])
    return found


def _response(values: pd.Series[float], where: str) -> Verdict:
    """Whether the error depends on outliers: `values` are slopes by seed."""
    margin = math.log(DOUBLING)
    rotation = where.partition(",")[0]
    arm = "Without rotation" if rotation == NONE else f"With {rotation}"
    verdict = _not_judged(values, f"{arm}, the error does not depend on outliers", where)
    if verdict.note:
        return verdict
    mean, error, t, reach = _spread(values)
    if abs(mean) + reach <= margin:
        word = "holds"
    else:
        word = "does not hold" if abs(mean) - reach > margin else "undecided"
    # Twice the one-sided p-value of what a word rejects: at most 5 % just where its interval is.
    p_values = [
        float(t.sf((margin - abs(mean)) / error)),
        float(t.sf((abs(mean) - margin) / error)),
    ]
    return dataclasses.replace(verdict, verdict=word, p_value=min(1.0, 2 * min(p_values)))


def _difference(values: pd.Series[float], where: str) -> Verdict:
    """Whether a rotation weakens the dependence: `values` are slopes less those of no rotation."""
    verdict = _not_judged(
        values, f"With {where.partition(',')[0]}, the error depends less on outliers than without",
        where,
    )  # fmt: skip
    verdict = dataclasses.replace(verdict, effect_name="ratio of factors of error per doubling")
    if verdict.note:
        return verdict
    mean, error, t, reach = _spread(values)
    word = judge_interval(mean - reach, mean + reach, math.log(DOUBLING))
    return dataclasses.replace(verdict, verdict=word, p_value=float(2 * t.sf(abs(mean) / error)))


def _not_judged(values: pd.Series[float], claim: str, where: str) -> Verdict:
    """The numbers of log factors by seed, without a word; `note` says why there can be none.

    NaN is a training that diverged: then there are no numbers, which would be of the others.
    """
    lost = sorted({*values.index[values.isna()]})
    few = len(values) < MIN_SEEDS
    note = f"{MIN_SEEDS} training seeds are needed" if few else ""
    if lost:
        note = f"training diverged: seed {', '.join(map(str, lost))}"
    low, high = t_interval(np.exp(values)) if len(values) > 1 and not lost else (None, None)
    seen = None
    if not note:
        _, error, t, reach = _spread(values)
        seen = math.exp(reach + float(t.ppf(POWER)) * error)
    return Verdict(
        claim=claim,
        subject=where,
        verdict="not judged",
        effect=None if lost else math.exp(values.mean()),
        effect_name="factor of error per doubling",
        low=low,
        high=high,
        confidence=CONFIDENCE,
        n=values.index.nunique(),
        n_of="training seeds",
        test="paired t over seeds",
        p_value=None,
        detectable=seen,
        note=note,
    )


def _spread(values: pd.Series[float]) -> tuple[float, float, Any, float]:
    """Mean, standard error (above 0, to divide by), t distribution, half the interval."""
    error = max(float(stats.sem(values)), np.finfo(float).tiny)
    t = stats.t(len(values) - 1)
    return float(values.mean()), error, t, float(t.ppf((1 + CONFIDENCE) / 2)) * error


def headline(trials: pd.DataFrame, slopes: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean error at the least and the greatest outliers, and the factor per doubling."""
    rows = []
    for cell, own in trials.groupby(_CELL, sort=False):
        ends = own["scale"].min(), own["scale"].max()
        errors = {f"s = {s:g}": stats.gmean(own[own["scale"] == s]["error"]) for s in ends}
        keys = dict(zip(_CELL, cell, strict=True))
        match = (slopes[_CELL] == pd.Series(keys)).all(axis=1)
        factors = np.exp(slopes[match]["slope"])
        low, high = t_interval(factors)
        rows.append(
            {
                **keys,
                "error_at_least": errors[f"s = {ends[0]:g}"],
                "least_scale": ends[0],
                "error_at_greatest": errors[f"s = {ends[1]:g}"],
                "greatest_scale": ends[1],
                "factor_per_doubling": stats.gmean(factors),
                "low": low,
                "high": high,
            }
        )
    return records_of(pd.DataFrame(rows))
