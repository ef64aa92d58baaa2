"""Bits per layer and timestep bucket: the same problem over (layer, bucket) pairs.

A bucket is a range of sampling steps. A pair's cost is the layer's cost times the steps of the
bucket, so every budget limits the mean over the sampling trajectory: run-time cost is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robuq_bench.allocation.costs import Cost, is_integer
from robuq_bench.allocation.problem import Sensitivities
from robuq_bench.errors import UsageError, suggest

SEPARATOR = "@"


def expand_over_buckets(
    sensitivity_by_bucket: Mapping[str, Sensitivities],
    macs: Mapping[str, int],
    costs: Sequence[Cost],
    steps: Mapping[str, int],
) -> tuple[dict[str, dict[int, float]], dict[str, int], list[Cost]]:
    """Return sensitivities, MACs and costs for `allocation_problem`, with layers 'layer@bucket'.

    Args:
        sensitivity_by_bucket: per bucket, the sensitivities measured on its timesteps; the
            objective is their mean over the steps.
        macs, costs: as for an allocation without buckets; budgets keep their meaning.
        steps: sampling steps of every bucket.

    Raises:
        UsageError: buckets that do not match or are named with '@', or a step count below 1.
    """
    for bucket in sensitivity_by_bucket:
        if SEPARATOR in bucket:
            raise UsageError(f"bucket {bucket!r} must not contain {SEPARATOR!r}")
        if bucket not in steps:
            raise UsageError(f"bucket {bucket!r} has no steps{suggest(bucket, steps)}")
    for bucket, count in steps.items():
        if bucket not in sensitivity_by_bucket:
            raise UsageError(
                f"bucket {bucket!r} has no sensitivities{suggest(bucket, sensitivity_by_bucket)}"
            )
        if not is_integer(count) or count < 1:
            raise UsageError(f"the steps of bucket {bucket!r} must be at least 1, got {count!r}")
    total = sum(steps.values())
    sensitivity = {
        f"{layer}{SEPARATOR}{bucket}": {
            bits: value * steps[bucket] / total for bits, value in by_bits.items()
        }
        for bucket, layers in sensitivity_by_bucket.items()
        for layer, by_bits in layers.items()
    }
    return sensitivity, _times(macs, steps), [_over(cost, steps) for cost in costs]


def collapse(bits_by_pair: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return {bucket: {layer: bits}} of an allocation over 'layer@bucket'."""
    by_bucket: dict[str, dict[str, int]] = {}
    for pair, bits in bits_by_pair.items():
        layer, separator, bucket = pair.rpartition(SEPARATOR)
        if not separator:
            raise UsageError(f"{pair!r} is not a layer and bucket, 'layer{SEPARATOR}bucket'")
        by_bucket.setdefault(bucket, {})[layer] = bits
    return by_bucket


def _times(macs: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
    return {
        f"{layer}{SEPARATOR}{bucket}": value * count
        for bucket, count in steps.items()
        for layer, value in macs.items()
    }


def _over(cost: Cost, steps: Mapping[str, int]) -> Cost:
    table = {
        f"{layer}{SEPARATOR}{bucket}": {bits: value * count for bits, value in by_bits.items()}
        for bucket, count in steps.items()
        for layer, by_bits in cost.table.items()
    }
    return Cost(cost.name, table, cost.budget, cost.divisor * sum(steps.values()), cost.unit)
