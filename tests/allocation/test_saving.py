"""Allocation files, there and back through a plan."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robuq_bench.accounting import account as accounting
from robuq_bench.allocation import (
    Allocation,
    save_allocation,
    sensitivities_sha256,
    solve_ampn,
)
from robuq_bench.config import config_hash, load_allocation_file, load_plan, resolve
from robuq_bench.errors import UsageError
from robuq_bench.files import sha256_file

BITS = (1, 2, 3, 4)
ORIGIN = {"metric": 'ε-MSE after 1,000 "QAT" steps\x7f', "solver": "exact"}


def facts_of(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    values: dict[str, Any] = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    return values


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_load_into_any_plan(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    model = resolve("train-and-eval", "1", "a4", "digits").workload.model
    structure = accounting.dit_structure(model, load_plan("a4"))
    macs = {layer.name: layer.macs for layer in structure.block_linears}
    sensitivity = {name: {b: float(rng.lognormal(-2 * b)) for b in BITS} for name in macs}
    digest = sensitivities_sha256(sensitivity)
    found = solve_ampn(sensitivity, macs, np.float64(2.25))
    path = save_allocation(
        tmp_path / f"found{suffix}", found, **ORIGIN, sensitivities_sha256=digest, seed=3
    )
    assert facts_of(path) == {
        **ORIGIN,
        "budget": 2.25,
        "mean_bits": found.mean_bits,
        "objective": found.objective,
        "sensitivities_sha256": digest,
        "seed": 3,
        "costs": {"mean_bits": found.mean_bits},
        "budgets": {"mean_bits": 2.25},
        "bits_by_layer": found.bits_by_layer,
    }
    overrides = [f"bits.path={path}"]
    hashes = set()
    for name in ("bitnetv2-a4", "baseline-a3", "a4"):
        config = resolve("train-and-eval", "1", name, "digits", overrides=overrides)
        assert config.plan.bits is not None
        assert config.plan.bits.sha256 == sha256_file(path)
        assert load_allocation_file(config.plan.bits, macs) == found.bits_by_layer
        hashes.add(config_hash(config))
    assert config.plan.bits is not None
    account = accounting.account(model, config.plan, load_allocation_file(config.plan.bits, macs))
    assert account["mean_activation_bits"] == found.mean_bits
    other = solve_ampn(sensitivity, macs, 2.0)
    save_allocation(path, other, **ORIGIN, sensitivities_sha256=digest)
    config = resolve("train-and-eval", "1", "a4", "digits", overrides=overrides)
    assert config_hash(config) not in hashes


def test_names_that_need_quotes_and_values_without_limit(tmp_path: Path) -> None:
    bits = {"transformer_blocks.0.ff.net.0.proj": 2, 'odd "name"\\\n': 3, "plain": 4, "ε": 1}
    for suffix in (".toml", ".json"):
        path = save_allocation(
            tmp_path / f"new/a{suffix}",
            Allocation(bits, 1e-7, 2.0, math.inf, {"ms": 1e22}, {"ms": math.inf}),
            **ORIGIN,
            sensitivities_sha256="",
        )
        facts = facts_of(path)
        assert facts["bits_by_layer"] == bits
        assert facts["objective"] == 1e-7
        assert facts["costs"] == {"ms": 1e22}
        assert facts["budgets"] == {}
        assert "budget" not in facts


def test_files_that_could_not_be_loaded_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(UsageError, match=r"a\.yaml: an allocation file ends in \.toml or \.json"):
        save_allocation(
            path, Allocation({"a": 2}, 0.0, 2.0, 2.0), **ORIGIN, sensitivities_sha256=""
        )
    with pytest.raises(UsageError, match="layer 'a' has 16 bits"):
        save_allocation(
            path, Allocation({"a": 16}, 0.0, 2.0, 2.0), **ORIGIN, sensitivities_sha256=""
        )
    assert not list(tmp_path.iterdir())


def test_digest_of_sensitivities(dit_instance: Callable[..., Any]) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=1)
    digest = sensitivities_sha256(sensitivity)
    shuffled = {n: dict(reversed(list(s.items()))) for n, s in reversed(sensitivity.items())}
    assert sensitivities_sha256(shuffled) == digest
    # the canonical text is part of the format
    canonical = b'{"a":{"2":0.5,"4":0.0},"b":{"2":1.0}}'
    small = {"b": {2: 1}, "a": {4: 0, 2: np.float64(0.5)}}
    assert sensitivities_sha256(small) == hashlib.sha256(canonical).hexdigest()
    name = next(iter(macs))
    sensitivity[name][2] = math.nextafter(sensitivity[name][2], 1)
    assert sensitivities_sha256(sensitivity) != digest
