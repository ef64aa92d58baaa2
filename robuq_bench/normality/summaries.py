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
    with_draws,
)
from robuq_bench.normality.names import VERDICT_LIMIT
from robuq_bench.normality.transforms import matrix_name
from robuq_bench.quantization.convert import layer_type

KEY_FIELDS = ("subject", "layer_type", "width", "transform")
RANDOM = "randomized-hadamard"
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
    """Ratios under several draws of signs or matrices, [T, draws, bits]; None where nothing is."""
    outputs: NDArray[np.float64] | None = None
    """Squared output errors, [T, draws or 1, bits]; None where no weight is known."""
    centred: NDArray[np.float64] | None = None
    """The same of centred tokens under the first draw, [T, bits]; None without a centre."""


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
                    "matrix": matrix_name(key[3], key[2]),
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
    """Per bit width, what several draws of the transform say; empty for one draw.

    Of random signs: mean ratio over tokens and draws, its interval widened for their spread (see
    `with_draws`), and the draws' range. Of the plain transform, whose own matrix is fixed: the
    range over matrices alone.
    """
    parts = [cell.draws for cell in group if cell.draws is not None]
    if not parts or parts[0].shape[1] < 2:
        return {}
    table = pooled(group)
    valid = table.valid
    values = np.concatenate(parts)[valid]
    by_draw = values.mean(0)  # [draws, bits]
    fields = {
        bits: draw_range(group[0].transform, by_draw[:, index]) for index, bits in enumerate(BITS)
    }
    if group[0].transform != RANDOM:
        return fields
    estimate = with_draws(
        cluster_bootstrap_mean(values.mean(1), table.images[valid], settings.draws, settings.seed),
        by_draw,
    )
    for index, bits in enumerate(BITS):
        mean, low, high = (float(part[index]) for part in estimate)
        fields[bits] |= {"ratio": mean, "low": low, "high": high}
    return fields


def draw_range(transform: str, by_draw: NDArray[np.float64]) -> Row:
    """Number of draws of a transform, the range of their ratios [draws], and how many pass."""
    return {
        "sign_draws" if transform == RANDOM else "matrix_draws": len(by_draw),
        "draws_min": float(by_draw.min()),
        "draws_max": float(by_draw.max()),
        "draws_passing": int((by_draw < VERDICT_LIMIT).sum()),
    }


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
