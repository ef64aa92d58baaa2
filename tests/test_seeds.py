"""The one derivation of seeds: the numbers of recorded runs, and streams that are unrelated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.seeds import generator, seeded

ROOT = Path(__file__).resolve().parents[1]
PARTS = st.lists(st.text(max_size=9) | st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("parts", "digest", "seed"),
    [  # digests by coreutils' sha256sum; seeds are those of recorded trainings
        (("qat", 0, 1), "6a2d71cf3dc698fc", 9100757931396732597),
        (("teacher", 7, 123), "b638af89a7b28c32", 1821241315637566555),
    ],
)
def test_seeds_are_those_of_recorded_runs(
    parts: tuple[str | int, ...], digest: str, seed: int
) -> None:
    assert seeded(*parts) == int(np.frombuffer(bytes.fromhex(digest), "<u8")[0]) // 2 == seed
    assert generator(*parts).initial_seed() == seed


@given(PARTS)
def test_every_generator_takes_a_seed(parts: list[str | int]) -> None:
    seed = seeded(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)
    np.random.default_rng(seed)


def test_purposes_seeds_and_draws_are_unrelated_streams() -> None:
    draws = torch.stack(
        [
            torch.randn(2000, generator=generator(purpose, seed, draw))
            for purpose in ("qat", "calibration")
            for seed in range(3)
            for draw in range(3)
        ]
    )
    correlations = torch.corrcoef(draws).fill_diagonal_(0).abs()
    assert correlations.max() < 5 / 2000**0.5  # five standard deviations of unrelated samples


def test_seeds_need_no_torch() -> None:
    code = "import sys, robuq_bench.seeds as s; s.seeded('a', 1); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr
