"""From token tables to the tidy rows that the study writes: shares, intervals, verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robuq_bench.normality.analysis import TESTS, TokenTable
from robuq_bench.normality.berry_esseen import SHEVTSOVA_2010
from robuq_bench.normality.consequence import BITS, REFERENCE, SETTINGS
from robuq_bench.normality.intervals import (
    MIN_CLUSTERS,
    cluster_bootstrap_mean,
    rejected_share,
)
from robuq_bench.normality.names import VERDICT_LIMIT
from robuq_bench.quantization.convert import layer_type
from robuq_bench.statistics.verdicts import Verdict

KEY_FIELDS = ("subject", "layer_type", "width", "transform")
DRAW_FIELDS = ("sign_draws", "draws_min", "draws_max", "draws_passing")
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """All tokens of one layer at one timestep under one transform."""

    subject: str
    layer: str
    timestep: int
    transform: str
    width: int
    table: TokenTable
    draws: NDArray[np.float64] | None = None
    """Ratios under several sign draws, [T, draws, bits]: the randomised transform only."""


@dataclass(frozen=True)
class Settings:
    """What every row states: level of the tests, draws and seed of the bootstrap."""

    alpha: float
    draws: int
    seed: int


def cell_rows(cells: Iterable[Cell], settings: Settings) -> list[Row]:
    """One row per layer, timestep and transform, for heat maps."""
    rows = []
    for cell in cells:
        table, valid = cell.table, cell.table.valid
        row: Row = {
            "subject": cell.subject,
            "layer": cell.layer,
            "layer_type": layer_type(cell.layer),
            "block": block_of(cell.layer),
            "timestep": cell.timestep,
            "transform": cell.transform,
            "width": cell.width,
            "n": table.n,
            "tokens": len(valid),
            "degenerate": int((~valid).sum()),
        }
        if valid.any():
            row["shapiro_w_median"] = float(np.median(table.column("shapiro_w")[valid]))
            row["kurtosis_median"] = float(np.median(table.column("excess_kurtosis")[valid]))
            p = table.column("shapiro_p")[valid]
            row["alpha"] = settings.alpha
            row["shapiro_rejected"], row["shapiro_rejected_bh"] = rejected_share(p, settings.alpha)
        if has_enough_images(table):
            columns = [f"{REFERENCE}/{bits}" for bits in BITS]
            means, lows, highs = intervals(table, columns, settings)
            for bits, mean, low, high in zip(BITS, means, lows, highs, strict=True):
                row[f"ratio_{bits}"] = mean
                row[f"ratio_{bits}_low"], row[f"ratio_{bits}_high"] = low, high
        rows.append(row)
    return rows


def type_rows(
    cells: Sequence[Cell], nulls: Mapping[int, TokenTable], settings: Settings
) -> list[Row]:
    """One row per subject, layer type, width and transform: tests, effect sizes, KL, null."""
    rows = []
    for key, group in grouped(cells).items():
        table = pooled(group)
        null = nulls[table.n]
        valid = table.valid
        row: Row = {
            **key_fields(key),
            "n": table.n,
            "layers": len({cell.layer for cell in group}),
            "timesteps": len({cell.timestep for cell in group}),
            "images": table.usable_images,
            "tokens": len(valid),
            "degenerate": int((~valid).sum()),
            "alpha": settings.alpha,
            "seed": settings.seed,
        }
        if has_enough_images(table):
            row |= effect_sizes(table)
            row |= kl_fields(table, null, settings)
            for test, column in TESTS.items():
                shares = _shares_by_layer(group, column, settings.alpha)
                row[f"{test}_rejected"], row[f"{test}_rejected_bh"] = shares
                row[f"{test}_rejected_null"] = rejected_share(null.column(column), settings.alpha)[
                    0
                ]
        rows.append(row)
    return rows


def error_rows(
    cells: Sequence[Cell], nulls: Mapping[int, TokenTable], settings: Settings
) -> list[Row]:
    """One row per subject, layer type, width, transform, quantizer and bits: the mean ratio."""
    columns = [f"{s.quantizer}/{s.bits}" for s in SETTINGS]
    rows = []
    for key, group in grouped(cells).items():
        table = pooled(group)
        if not has_enough_images(table):
            continue
        means, lows, highs = intervals(table, columns, settings)
        null = nulls[table.n]
        over_draws = sign_draw_fields(group, settings)
        for setting, column, mean, low, high in zip(
            SETTINGS, columns, means, lows, highs, strict=True
        ):
            averaged = over_draws.get(setting.bits, {}) if setting.quantizer == REFERENCE else {}
            rows.append(
                {
                    **key_fields(key),
                    "quantizer": setting.quantizer,
                    "bits": setting.bits,
                    "ratio": mean,
                    "low": low,
                    "high": high,
                    "null_ratio": float(null.column(column).mean()),
                    "tokens": int(table.valid.sum()),
                    "images": table.usable_images,
                    **averaged,
                }
            )
    return rows


def sign_draw_fields(group: Sequence[Cell], settings: Settings) -> dict[int, Row]:
    """Per bit width: mean ratio over tokens and sign draws, its interval, and the draws' range.

    The interval joins, in quadrature, the bootstrap over images of the mean over draws and the
    95 % half-width of Student's t between draws; empty for other transforms or a single draw.
    """
    from scipy.stats import t

    parts = [cell.draws for cell in group if cell.draws is not None]
    if not parts or parts[0].shape[1] < 2:
        return {}
    table = pooled(group)
    valid = table.valid
    values = np.concatenate(parts)[valid]
    by_draw = values.mean(0)  # [draws, bits]
    count = len(by_draw)
    estimate = cluster_bootstrap_mean(
        values.mean(1), table.images[valid], settings.draws, settings.seed
    )
    between = t.ppf(0.975, count - 1) * by_draw.std(0, ddof=1) / np.sqrt(count)
    fields = {}
    for index, bits in enumerate(BITS):
        mean = float(estimate.mean[index])
        below, above = mean - estimate.low[index], estimate.high[index] - mean
        fields[bits] = {
            "ratio": mean,
            "low": mean - float(np.hypot(below, between[index])),
            "high": mean + float(np.hypot(above, between[index])),
            "sign_draws": count,
            "draws_min": float(by_draw[:, index].min()),
            "draws_max": float(by_draw[:, index].max()),
            "draws_passing": int((by_draw[:, index] < VERDICT_LIMIT).sum()),
        }
    return fields


def judgement_rows(errors: Iterable[Row], cells: Sequence[Row]) -> list[Row]:
    """Apply the rule fixed beforehand to every layer type, transform and bit width.

    `cells_passing` is the share of (layer, timestep) cells that pass on their own, with the worst.
    """
    rows = []
    for row in errors:
        if row["quantizer"] != REFERENCE:
            continue
        own = [
            cell
            for cell in cells
            if all(cell[k] == row[k] for k in KEY_FIELDS) and f"ratio_{row['bits']}" in cell
        ]
        passing = [cell for cell in own if cell[f"ratio_{row['bits']}_high"] < VERDICT_LIMIT]
        worst = max(own, key=lambda cell: cell[f"ratio_{row['bits']}"])
        rows.append(
            {
                **{k: row[k] for k in (*KEY_FIELDS, "bits")},
                "quantizer": REFERENCE,
                "ratio": row["ratio"],
                "lower_95": row["low"],
                "upper_95": row["high"],
                "null_ratio": row["null_ratio"],
                "verdict": verdict_word(row["low"], row["high"]),
                "cells": len(own),
                "cells_passing": len(passing) / len(own),
                "worst_ratio": worst[f"ratio_{row['bits']}"],
                "worst_layer": worst["layer"],
                "worst_timestep": worst["timestep"],
                **{name: row[name] for name in DRAW_FIELDS if name in row},
            }
        )
    return rows


def verdict_word(low: float, high: float) -> str:
    """Of the claim "normal enough": undecided where the interval spans the limit."""
    if high < VERDICT_LIMIT:
        return "holds"
    return "does not hold" if low >= VERDICT_LIMIT else "undecided"


def verdicts(types: Iterable[Row], judgements: Iterable[Row]) -> list[Verdict]:
    """One verdict per row of `type_rows` and bit width, those on random signs first.

    The subject reads "teacher, randomized-hadamard, qkv (144)", with the layer type's width. A
    layer type without a judgement, for want of images, is not judged.
    """
    judged = {tuple(row[k] for k in (*KEY_FIELDS, "bits")): row for row in judgements}
    ordered = sorted(types, key=lambda row: row["transform"] != "randomized-hadamard")
    return [
        _verdict(row, bits, judged.get((*(row[k] for k in KEY_FIELDS), bits)))
        for row in ordered
        for bits in BITS
    ]


def _verdict(row: Row, bits: int, judgement: Row | None) -> Verdict:
    found = judgement or {}
    test, note = "cluster bootstrap over images", f"fewer than {MIN_CLUSTERS} usable images"
    if judgement:
        note = f"ratio of normal tokens: {judgement['null_ratio']:.3f}"
        if "sign_draws" in judgement:
            test += f", spread over {judgement['sign_draws']} sign draws"
    return Verdict(
        claim=f"Activations are normal enough for {bits} bit{'s' if bits > 1 else ''}",
        subject=f"{row['subject']}, {row['transform']}, {row['layer_type']} ({row['width']})",
        verdict=found.get("verdict", "not judged"),
        effect=found.get("ratio"),
        effect_name="mean error ratio",
        low=found.get("lower_95"),
        high=found.get("upper_95"),
        n=row["images"],
        n_of="images",
        test=test,
        p_value=None,
        note=note,
    )


def lyapunov_rows(cells: Sequence[Cell]) -> list[Row]:
    """L3 of the untransformed tokens by layer type, and where the Berry-Esseen bound is void."""
    rows = []
    for key, group in grouped([c for c in cells if c.transform == "identity"]).items():
        l3 = pooled(group).column("l3")
        l3 = l3[np.isfinite(l3)]
        if not len(l3):
            continue
        bound = SHEVTSOVA_2010 * l3
        fields = key_fields(key)
        del fields["transform"]
        low, median, high = np.quantile(l3, [0.05, 0.5, 0.95])
        rows.append(
            {
                **fields,
                "tokens": len(l3),
                "l3_least_possible": key[2] ** -0.5,
                "l3_q05": low,
                "l3_median": median,
                "l3_q95": high,
                "bound_median": float(np.median(bound)),
                "void_share": float((bound >= 1).mean()),
            }
        )
    return rows


def has_enough_images(table: TokenTable) -> bool:
    """Whether an interval can be given: a layer may be degenerate on most images."""
    return table.usable_images >= MIN_CLUSTERS


def effect_sizes(table: TokenTable) -> Row:
    """Medians over tokens, which do not grow with the number of tokens as p-values do."""
    valid = table.valid

    def median(name: str) -> float:
        return float(np.median(table.column(name)[valid]))

    return {
        "shapiro_w_median": median("shapiro_w"),
        "shapiro_w_q05": float(np.quantile(table.column("shapiro_w")[valid], 0.05)),
        "anderson_a2_median": median("anderson_a2"),
        "dagostino_k2_median": median("dagostino_k2"),
        "ks_median": median("ks_distance"),
        "wasserstein_median": median("wasserstein"),
        "abs_skewness_median": float(np.median(np.abs(table.column("skewness")[valid]))),
        "kurtosis_median": median("excess_kurtosis"),
        "dc_share_median": median("dc_share"),
    }


def kl_fields(table: TokenTable, null: TokenTable, settings: Settings) -> Row:
    """KL to the fitted normal: Vasicek negentropy minus its mean on the null, mean over tokens.

    `kl_null_error` is 1.96 standard errors of the null's mean, to be held against `kl`; the band
    `kl_null_token_low` to `_high` holds 95 % of single null tokens. Tokens with so many equal
    entries that the estimate is infinite are counted in `kl_undefined`. The total variation is
    min(sqrt(KL / 2), sqrt(1 - exp(-KL))) (Pinsker; Bretagnolle-Huber, see Canonne 2022) with the
    estimate put in: a bound of the true one only as far as the estimate, biased low, is right.
    """
    base = null.column("negentropy")
    base = base[np.isfinite(base)]
    entropy = table.column("negentropy")
    finite = np.isfinite(entropy)
    undefined = int((table.valid & ~finite).sum())
    if not finite.any() or not len(base):
        return {"kl_undefined": undefined}
    centre = float(base.mean())
    estimate = cluster_bootstrap_mean(
        entropy[finite], table.images[finite], settings.draws, settings.seed
    )
    mean, low, high = (float(part) for part in estimate)
    band = np.quantile(base - centre, [0.025, 0.975])
    null_error = 1.96 * float(base.std(ddof=1)) / np.sqrt(len(base))
    kl = max(mean - centre, 0.0)
    return {
        "kl": mean - centre,
        "kl_low": low - centre,
        "kl_high": high - centre,
        "kl_null_error": null_error,
        "kl_null_token_low": float(band[0]),
        "kl_null_token_high": float(band[1]),
        "kl_undefined": undefined,
        "total_variation_plug_in": float(min(np.sqrt(kl / 2), np.sqrt(1 - np.exp(-kl)))),
    }


def intervals(
    table: TokenTable, columns: Sequence[str], settings: Settings
) -> tuple[list[float], list[float], list[float]]:
    """Means and 95 % bounds of columns over non-degenerate tokens, resampling whole images."""
    valid = table.valid
    index = [table.columns.index(name) for name in columns]
    mean, low, high = cluster_bootstrap_mean(
        table.values[valid][:, index], table.images[valid], settings.draws, settings.seed
    )
    return mean.tolist(), low.tolist(), high.tolist()


Key = tuple[str, str, int, str]


def grouped(cells: Sequence[Cell]) -> dict[Key, list[Cell]]:
    """Cells by (subject, layer type, width, transform), in order of appearance."""
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        key = (cell.subject, layer_type(cell.layer), cell.width, cell.transform)
        groups.setdefault(key, []).append(cell)
    return groups


def key_fields(key: Key) -> Row:
    """The key as named columns."""
    return dict(zip(KEY_FIELDS, key, strict=True))


def pooled(group: Sequence[Cell]) -> TokenTable:
    """All tokens of several cells of one width as one table."""
    first = group[0].table
    values = np.concatenate([cell.table.values for cell in group])
    images = np.concatenate([cell.table.images for cell in group])
    return TokenTable(first.columns, values, images, first.n)


def _shares_by_layer(group: Sequence[Cell], column: str, alpha: float) -> tuple[float, float]:
    """Rejected shares, raw and after Benjamini-Hochberg within each layer; mean over layers."""
    layers: dict[str, list[NDArray[np.float64]]] = {}
    for cell in group:
        layers.setdefault(cell.layer, []).append(cell.table.column(column)[cell.table.valid])
    pooled_p = [np.concatenate(p) for p in layers.values()]
    raw, corrected = np.mean([rejected_share(p, alpha) for p in pooled_p if len(p)], axis=0)
    return float(raw), float(corrected)


def block_of(layer: str) -> int | None:
    """Depth of a layer from its name ("blocks.3.attn.qkv" is 3), or None."""
    found = re.search(r"blocks\.(\d+)\.", layer)
    return None if found is None else int(found[1])
