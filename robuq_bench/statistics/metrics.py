"""Metrics by their names in the records of a run: which is meant, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable

HIGHER_IS_BETTER = frozenset({"is", "precision", "recall", "accuracy", "coverage", "density"})
"""Stems of the metrics of which more is better; of all others, less is."""


def stem(metric: str) -> str:
    """`fid_digits` -> `fid`: the metric without the name of its feature space."""
    return metric.split("_", 1)[0]


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, as of FID and losses."""
    return stem(metric) not in HIGHER_IS_BETTER


def find_metric(asked: str, recorded: Iterable[str]) -> str | None:
    """The metric of this name, else the first of this stem; None where there is none."""
    names = list(recorded)
    if asked in names:
        return asked
    return next((name for name in names if stem(name) == asked), None)
