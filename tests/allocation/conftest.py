"""Instances and brute force, shared by the tests of allocation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

BITS = (1, 2, 3, 4)
Sensitivity = dict[str, dict[int, float]]
Instance = tuple[Sensitivity, dict[str, int]]


@pytest.fixture
def random_instance() -> Callable[..., Instance]:
    def make(
        rng: np.random.Generator, layers: int, widths: tuple[int, ...] = BITS, max_macs: int = 12
    ) -> Instance:
        """Sensitivities that mostly fall with the bits, but not always."""
        sensitivity = {
            f"layer{i}": {b: float(rng.exponential() * 4.0 ** -(b * rng.random())) for b in widths}
            for i in range(layers)
        }
        return sensitivity, {name: int(rng.integers(1, max_macs + 1)) for name in sensitivity}

    return make


@pytest.fixture
def dit_instance() -> Callable[..., Instance]:
    def make(seed: int, blocks: int = 28) -> Instance:
        """DiT-shaped: four linears a block with MACs 3:1:4:4 (of 1152 channels, 256 tokens)."""
        rng = np.random.default_rng(seed)
        units = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 4}
        macs = {
            f"blocks.{i}.{k}": m * 256 * 1152**2 for i in range(blocks) for k, m in units.items()
        }
        sensitivity = {
            name: {b: float(rng.lognormal(-2.0 * b, 1.0)) if b < 4 else 0.0 for b in BITS}
            for name in macs
        }
        return sensitivity, macs

    return make


@pytest.fixture
def brute_force() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def enumerate_all(
        sensitivity: Sensitivity, table: dict[str, dict[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Objective and total cost of every allocation there is."""
        objectives, costs = np.zeros(1), np.zeros(1, dtype=np.int64)
        for layer, by_bits in sensitivity.items():
            values = np.array(list(by_bits.values()))
            prices = np.array([table[layer][bits] for bits in by_bits])
            objectives = np.add.outer(objectives, values).ravel()
            costs = np.add.outer(costs, prices).ravel()
        assert len(costs) == len(list(itertools.product(*sensitivity.values())))
        return objectives, costs

    return enumerate_all
