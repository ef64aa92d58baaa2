"""Metrics of a run's records, by name and over seed ranges."""

from __future__ import annotations

from typing import Any


def metric_names(records: list[dict[str, Any]]) -> list[str]:
    """Return the metric columns of `metrics` records, in the order they were measured."""
    prefixes = ("fid", "sfid", "is", "kid", "precision", "recall", "accuracy", "nn")
    return [
        name
        for name, value in records[0].items()
        if isinstance(value, float)
        and name.split("_")[0] in prefixes
        and not name.endswith(("_std", "_torch_fidelity", "_at_floor"))  # details of a metric
    ]


def metric_summary(records: list[dict[str, Any]], subject: str) -> dict[str, Any]:
    """N, seed ranges, and mean, minimum and maximum of a subject's metrics; {} without any."""
    own = [r for r in records if r["kind"] == "metrics" and r["subject"] == subject]
    if not own:
        return {}
    row: dict[str, Any] = {"num_samples": own[0]["num_samples"], "seed_ranges": len(own)}
    for name in metric_names(own):
        values = [record[name] for record in own]
        row[name] = sum(values) / len(values)
        row[f"{name}_min"], row[f"{name}_max"] = min(values), max(values)
    return row
