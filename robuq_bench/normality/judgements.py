"""From summaries to words: the two rules, side by side; see `studies/normality/study.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from robuq_bench.normality.consequence import BITS, REFERENCE
from robuq_bench.normality.intervals import MIN_CLUSTERS
from robuq_bench.normality.names import VERDICT_LIMIT
from robuq_bench.normality.summaries import KEY_FIELDS, RANDOM, Row
from robuq_bench.statistics.verdicts import Verdict

DRAW_FIELDS = ("matrix", "sign_draws", "matrix_draws", "draws_min", "draws_max", "draws_passing")
OUTPUT_FIELDS = {
    "output_error": "error",
    "output_null_error": "normal_error",
    "output_ratio": "ratio",
    "output_lower_95": "low",
    "output_upper_95": "high",
}
"""Columns of the judgements from those of the table `output`."""
Key = tuple[object, ...]


def judgement_rows(
    errors: Iterable[Row], cells: Sequence[Row], outputs: Iterable[Row] = ()
) -> list[Row]:
    """Apply both rules fixed beforehand to every layer type, transform and bit width.

    `cells_passing` is the share of (layer, timestep) cells that pass on their own, with the worst.
    The columns `output_...` are the second rule's, absent where no output error is known.
    """
    rows = []
    by_key = _by_key(outputs)
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
        output = by_key.get(_key(row))
        if output is not None and "ratio" in output:
            rows[-1] |= {name: output[column] for name, column in OUTPUT_FIELDS.items()}
            rows[-1]["output_verdict"] = verdict_word(output["low"], output["high"])
    return rows


def verdict_word(low: float, high: float) -> str:
    """Of either claim: undecided where the interval spans the limit."""
    if high < VERDICT_LIMIT:
        return "holds"
    return "does not hold" if low >= VERDICT_LIMIT else "undecided"


def verdicts(types: Iterable[Row], judgements: Iterable[Row]) -> list[Verdict]:
    """By the rule of token errors: one per row of `type_rows` and bits, random signs first.

    The subject reads "teacher, randomized-hadamard, qkv (144)", with the layer type's width. A
    layer type without a judgement, for want of images, is not judged.
    """
    judged = _by_key(judgements)
    return [_verdict(row, bits, judged.get(_key(row, bits))) for row, bits in _in_order(types)]


def output_verdicts(types: Iterable[Row], outputs: Iterable[Row]) -> list[Verdict]:
    """By the rule of output errors, in the same order; see `robuq_bench/normality/output.py`."""
    found = _by_key(outputs)
    return [
        _output_verdict(row, bits, found.get(_key(row, bits))) for row, bits in _in_order(types)
    ]


def _key(row: Row, bits: int | None = None) -> Key:
    return *(row[k] for k in KEY_FIELDS), row["bits"] if bits is None else bits


def _by_key(rows: Iterable[Row]) -> Mapping[Key, Row]:
    return {_key(row): row for row in rows}


def _in_order(types: Iterable[Row]) -> list[tuple[Row, int]]:
    ordered = sorted(types, key=lambda row: row["transform"] != RANDOM)
    return [(row, bits) for row in ordered for bits in BITS]


def _subject(row: Row) -> str:
    return f"{row['subject']}, {row['transform']}, {row['layer_type']} ({row['width']})"


def _test(found: Row) -> str:
    test = "cluster bootstrap over images"
    draws = f", spread over {found['sign_draws']} sign draws" if "sign_draws" in found else ""
    return test + draws


def _verdict(row: Row, bits: int, judgement: Row | None) -> Verdict:
    found = judgement or {}
    note = f"fewer than {MIN_CLUSTERS} usable images"
    if judgement:
        note = f"ratio of normal tokens: {judgement['null_ratio']:.3f}"
    return Verdict(
        claim=f"Activations are normal enough for {bits} bit{'s' if bits > 1 else ''}",
        subject=_subject(row),
        verdict=found.get("verdict", "not judged"),
        effect=found.get("ratio"),
        effect_name="mean error ratio",
        low=found.get("lower_95"),
        high=found.get("upper_95"),
        n=row["images"],
        n_of="images",
        test=_test(found),
        p_value=None,
        note=note,
    )


def _output_verdict(row: Row, bits: int, output: Row | None) -> Verdict:
    found = output or {}
    low, high = found.get("low"), found.get("high")
    if output is None:
        note = "no weight of these layers is known"
    elif low is None:
        note = f"fewer than {MIN_CLUSTERS} images, or outputs that do not vary"
    else:
        note = f"output error {output['error']:.3g}, of normal tokens {output['normal_error']:.3g}"
    return Verdict(
        claim=f"Activations are as good as normal in the output for {bits} "
        f"bit{'s' if bits > 1 else ''}",
        subject=_subject(row),
        verdict="not judged" if low is None or high is None else verdict_word(low, high),
        effect=found.get("ratio"),
        effect_name="mean output ratio",
        low=low,
        high=high,
        n=row["images"] if output is None else output["images"],
        n_of="images",
        test=_test(found),
        p_value=None,
        note=note,
    )
