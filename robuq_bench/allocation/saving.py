"""Allocation files: bits per layer with where they come from, to be loaded into any plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from robuq_bench.allocation.problem import Allocation, Sensitivities
from robuq_bench.errors import UsageError
from robuq_bench.files import atomic_write_text, sha256_bytes


def save_allocation(
    path: Path | str,
    allocation: Allocation,
    *,
    metric: str,
    solver: str,
    sensitivities_sha256: str,
    **extra: str | int | float,
) -> Path:
    """Write an allocation as TOML or JSON, by the suffix, for a plan with `bits.path`.

    The file holds `metric`, `solver`, `budget` (mean bits; left out when not limited), `mean_bits`,
    `objective`, `sensitivities_sha256`, whatever `extra` names, the reached `costs` and allowed
    `budgets` by name, and `bits_by_layer`.

    Raises:
        UsageError: another suffix, or bits that plans do not take (1 to 8).
        RobuqError: the file cannot be written.
    """
    path = Path(path)
    for layer, bits in allocation.bits_by_layer.items():
        if not 1 <= bits <= 8:
            raise UsageError(f"layer {layer!r} has {bits} bits, but plans take 1 to 8")
    facts: dict[str, Any] = {
        "metric": metric,
        "solver": solver,
        "budget": allocation.budget,
        "mean_bits": allocation.mean_bits,
        "objective": allocation.objective,
        "sensitivities_sha256": sensitivities_sha256,
        **extra,
    }
    tables: dict[str, Mapping[str, float]] = {
        "costs": allocation.costs,
        "budgets": allocation.budgets,
        "bits_by_layer": allocation.bits_by_layer,
    }
    facts = {key: value for key, value in facts.items() if _is_known(value)}
    tables = {
        name: {key: value for key, value in table.items() if _is_known(value)}
        for name, table in tables.items()
    }
    if path.suffix == ".json":
        text = json.dumps(facts | tables, indent=1, allow_nan=False) + "\n"
    elif path.suffix == ".toml":
        text = tomli_w.dumps(facts | tables)
    else:
        raise UsageError(f"{path}: an allocation file ends in .toml or .json")
    return atomic_write_text(path, text)


def sensitivities_sha256(sensitivity: Sensitivities) -> str:
    """Return the SHA-256 of a sensitivity table; the order of its entries does not matter."""
    values = {
        layer: {str(int(bits)): float(value) for bits, value in by_bits.items()}
        for layer, by_bits in sensitivity.items()
    }
    return sha256_bytes(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def _is_known(value: str | float) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
