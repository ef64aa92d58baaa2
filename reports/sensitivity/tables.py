"""Tables of the sensitivity section: verdicts, rank agreement, layers that training recovers."""

from __future__ import annotations

import statistics

from reports.sensitivity.story import (
    RULE,
    after,
    ceiling,
    layer_words,
    main_target,
    metric_words,
    steps_of,
    width_words,
)
from reports.study_tables import Row, StudyRun, group, number_cell, span, two, value
from reports.tables import MISSING, Cell, Column, Table, header_cell, text_cell


def verdict_table(study: StudyRun) -> Table:
    """Gain of K steps in rank correlation, and the verdict, at every bit width."""
    columns = [
        Column("bits", False),
        Column("PTQ sensitivities mislead", False),
        Column("gain of ρ", note="[95 % interval]"),
        Column("metric", False),
        Column("K"),
        Column("truth", False),
    ]
    table = Table(f"Do sensitivities measured before training mislead? {study.title}", columns)
    for row in study.tables["verdicts"]:
        verdict = row["ptq_sensitivities_mislead"]
        low, high = value(row, "low"), value(row, "high")
        sub = "" if low is None or high is None else f"[{two(low)} to {two(high)}]"
        table.rows.append(
            [
                header_cell(row["bits"]),
                text_cell(verdict, tone="verdict " + verdict.replace(" ", "-")),
                number_cell(value(row, "gain"), two, study.href, sub),
                text_cell(row["metric"]),
                text_cell(row["steps_after"]),
                text_cell(row["target"]),
            ]
        )
    table.note = RULE
    return table


def agreement_table(study: StudyRun, target: str) -> Table:
    """Metric and steps × bit width against one target; the ceiling first."""
    widths = study.distinct("agreement", "bits")
    columns = [Column("metric", False), Column("measured", False)]
    columns += [Column(width_words(bits), note="ρ [95 %] · τ · top-k") for bits in widths]
    table = Table(f"Rank agreement with the increase of {target}: {study.title}", columns)
    if any(ceiling(study, target, bits) for bits in widths):
        cells = [_ceiling_cell(study, target, bits) for bits in widths]
        table.rows.append([header_cell("ceiling"), text_cell("one seed’s truth"), *cells])
    for (metric,), rows in group(study.of("agreement", target=target), "metric").items():
        for (steps,), at in group(rows, "steps").items():
            by_width = {row["bits"]: row for row in at}
            cells = [
                _agreement_cell(study, by_width[bits]) if bits in by_width else MISSING
                for bits in widths
            ]
            head = header_cell(metric, sub=metric_words(metric) if steps == "0" else "")
            table.rows.append([head, text_cell(after(steps)), *cells])
    ks = study.distinct("agreement", "top_k")
    table.note = (
        "ρ: Spearman, with the interval from resampling layers; τ: Kendall; top-k: share of the "
        f"{' or '.join(ks)} most sensitive layers in common. Ceiling: mean [least to greatest] "
        "over seeds of one seed’s truth against the mean of the others."
    )
    return table


def recovered_table(study: StudyRun) -> Table | None:
    """Layers that look bad before training and are not, with their ranks."""
    rows = study.tables.get("recovered", [])
    if not rows:
        return None
    last = steps_of(study)[-1]
    columns = [
        Column("layer", False),
        Column("bits"),
        Column("rank before training"),
        Column(f"rank {after(last)}"),
        Column("rank of the truth"),
        Column("layers"),
    ]
    table = Table(f"Layers that PTQ calls bad and training recovers: {study.title}", columns)
    for row in rows:
        bits, layer = row["bits"], row["layer"]
        found = [metric_ranks(study, row["metric"], steps, bits) for steps in ("0", last)]
        found.append(truth_ranks(study, bits))
        cells = [text_cell(str(ranks[layer])) if layer in ranks else MISSING for ranks in found]
        name = header_cell(layer_words(layer), sub=layer)
        table.rows.append([name, text_cell(bits), *cells, text_cell(str(len(found[-1])))])
    table.note = "Rank 1 is the most sensitive layer."
    return table


def metric_ranks(study: StudyRun, metric: str, steps: str, bits: str) -> dict[str, int]:
    """Layer -> rank by a metric, 1 the most sensitive."""
    return _ranks(study.of("metrics", metric=metric, steps=steps, bits=bits), "value")


def truth_ranks(study: StudyRun, bits: str) -> dict[str, int]:
    return _ranks(study.of("truth", target=main_target(study), bits=bits), "increase")


def _ranks(rows: list[Row], column: str) -> dict[str, int]:
    values = {row["layer"]: number for row in rows if (number := value(row, column)) is not None}
    ordered = sorted(values, key=lambda layer: -values[layer])
    return {layer: place for place, layer in enumerate(ordered, start=1)}


def _ceiling_cell(study: StudyRun, target: str, bits: str) -> Cell:
    found = ceiling(study, target, bits)
    if not found:
        return MISSING
    sub = f"[{two(min(found))} to {two(max(found))}]"
    kendall = ceiling(study, target, bits, "kendall")
    sub += f" · τ {two(statistics.fmean(kendall))}" if kendall else ""
    return text_cell(two(statistics.fmean(found)), study.href, sub=sub)


def _agreement_cell(study: StudyRun, row: Row) -> Cell:
    parts = [span(row, "spearman", two)]
    for name, sign in (("kendall", "τ "), ("top_k_overlap", "")):
        number = value(row, name)
        parts.append("" if number is None else f"{sign}{two(number)}")
    sub = " · ".join(part for part in parts if part)
    return number_cell(value(row, "spearman"), two, study.href, sub)
