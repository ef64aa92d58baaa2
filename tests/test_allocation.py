"""The AMPN programme against brute force, HiGHS and its own promises."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from robuq_bench import allocation
from robuq_bench.allocation import (
    allocation_table,
    knapsack,
    mean_bits,
    mean_bits_by_type,
    solve_ampn,
)
from robuq_bench.errors import UsageError

BITS = (1, 2, 3, 4)
Sensitivity = dict[str, dict[int, float]]
Macs = dict[str, int]


def brute_force(sensitivity: Sensitivity, macs: Macs, budget: float) -> float:
    layers, widths = list(sensitivity), list(next(iter(sensitivity.values())))
    total = sum(macs.values())
    objectives = [
        math.fsum(sensitivity[layer][b] for layer, b in zip(layers, bits, strict=True))
        for bits in itertools.product(widths, repeat=len(layers))
        if sum(macs[layer] * b for layer, b in zip(layers, bits, strict=True)) / total <= budget
    ]
    return min(objectives)


def random_instance(
    rng: np.random.Generator, layers: int, widths: tuple[int, ...] = BITS, max_macs: int = 12
) -> tuple[Sensitivity, Macs]:
    """Sensitivities that mostly fall with the bits, but not always."""
    sensitivity = {
        f"layer{i}": {b: float(rng.exponential() * 4.0 ** -(b * rng.random())) for b in widths}
        for i in range(layers)
    }
    return sensitivity, {name: int(rng.integers(1, max_macs + 1)) for name in sensitivity}


def dit_instance(seed: int, blocks: int = 28) -> tuple[Sensitivity, Macs]:
    """DiT-shaped problem: four linears a block with MACs 3:1:4:4 (of 1152 channels, 256 tokens)."""
    rng = np.random.default_rng(seed)
    units = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 4}
    macs = {f"blocks.{i}.{k}": m * 256 * 1152**2 for i in range(blocks) for k, m in units.items()}
    sensitivity = {
        name: {b: float(rng.lognormal(-2.0 * b, 1.0)) if b < 4 else 0.0 for b in BITS}
        for name in macs
    }
    return sensitivity, macs


def milp_objective(sensitivity: Sensitivity, macs: Macs, budget: float) -> float:
    layers = list(sensitivity)
    values = np.array([[sensitivity[name][b] for b in BITS] for name in layers])
    units = np.array([macs[name] for name in layers]) / min(macs.values())
    one_each = np.kron(np.eye(len(layers)), np.ones(len(BITS)))
    spent = (units[:, None] * np.array(BITS)).ravel()
    result = milp(
        values.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None], -np.inf, budget * units.sum() + 1e-9),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success
    return float(result.fun)


def test_equals_brute_force_on_500_random_instances() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        widths = BITS if rng.random() < 0.7 else (2, 3, 8)
        sensitivity, macs = random_instance(rng, int(rng.integers(1, 6)), widths)
        budget = float(rng.uniform(widths[0], widths[-1]))
        found = solve_ampn(sensitivity, macs, budget)
        assert found.objective == pytest.approx(brute_force(sensitivity, macs, budget), rel=1e-12)
        chosen = math.fsum(sensitivity[name][b] for name, b in found.bits_by_layer.items())
        assert found.objective == pytest.approx(chosen, rel=1e-12)
        assert found.mean_bits == mean_bits(found.bits_by_layer, macs) <= budget


def test_equals_brute_force_at_eight_layers() -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        sensitivity, macs = random_instance(rng, 8)
        found = solve_ampn(sensitivity, macs, 2.3)
        assert found.objective == pytest.approx(brute_force(sensitivity, macs, 2.3), rel=1e-12)


@pytest.mark.parametrize("budget", [1.5, 2.0, 2.85, 3.5])
def test_equals_highs_on_dit_xl(budget: float) -> None:
    sensitivity, macs = dit_instance(seed=int(budget * 100))
    assert len(sensitivity) == 112
    found = solve_ampn(sensitivity, macs, budget)
    assert found.objective == pytest.approx(milp_objective(sensitivity, macs, budget), rel=1e-6)
    assert found.mean_bits <= budget


def test_more_budget_is_never_worse_and_the_front_is_the_same_optimum() -> None:
    sensitivity, macs = dit_instance(seed=5, blocks=6)
    table = allocation_table(sensitivity, macs)
    objectives = [solve_ampn(sensitivity, macs, b).objective for b in np.linspace(1, 4, 500)]
    assert all(b <= a for a, b in itertools.pairwise(objectives))
    front = table.front()
    assert front[0].mean_bits == 1.0
    assert len(front) > 50
    for a, b in itertools.pairwise(front):
        assert a.mean_bits < b.mean_bits
        assert a.objective > b.objective
    for point in front[::7]:
        assert point == solve_ampn(sensitivity, macs, point.budget)
        assert point.mean_bits == mean_bits(point.bits_by_layer, macs)


def test_whole_front_of_112_layers_is_fast() -> None:
    sensitivity, macs = dit_instance(seed=9)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        front = allocation_table(sensitivity, macs).front()
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.2
    assert len(front) > 200


@st.composite
def instances(draw: st.DrawFn) -> tuple[Sensitivity, Macs, float]:
    widths = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    size = draw(st.integers(1, 4))
    # Small integers make ties common, and keep every sum exact.
    value = st.integers(0, 5)
    sensitivity = {f"l{i}": {b: float(draw(value)) for b in widths} for i in range(size)}
    macs = {name: draw(st.integers(1, 5)) for name in sensitivity}
    return sensitivity, macs, draw(st.floats(widths[0], widths[-1] + 1.0))


@settings(max_examples=200, deadline=None)
@given(instances())
def test_optimal_within_budget_and_thrifty_on_ties(case: tuple[Sensitivity, Macs, float]) -> None:
    sensitivity, macs, budget = case
    found = solve_ampn(sensitivity, macs, budget)
    assert found.objective == brute_force(sensitivity, macs, budget)
    assert found.mean_bits <= budget
    backwards = {name: dict(reversed(list(s.items()))) for name, s in reversed(sensitivity.items())}
    assert solve_ampn(backwards, macs, budget) == found
    if found.mean_bits > min(next(iter(sensitivity.values()))):
        tighter = math.nextafter(found.mean_bits, 0)
        assert brute_force(sensitivity, macs, tighter) > found.objective


def test_budget_that_was_reached_can_be_asked_for_again() -> None:
    sensitivity, macs = dit_instance(seed=2, blocks=5)
    for budget in np.linspace(1.0, 4.0, 40):
        found = solve_ampn(sensitivity, macs, float(budget))
        assert solve_ampn(sensitivity, macs, found.mean_bits).bits_by_layer == found.bits_by_layer


def test_interchangeable_layers_are_told_apart_by_name() -> None:
    same = {1: 1.0, 2: 0.0}
    found = [
        solve_ampn(dict.fromkeys(names, same), dict.fromkeys(names, 1), 1.5)
        for names in ("ab", "ba")
    ]
    assert found[0] == found[1]


def test_useless_bits_are_not_spent() -> None:
    flat = {name: dict.fromkeys(BITS, 0.25) for name in "abc"}
    found = solve_ampn(flat, {"a": 3, "b": 1, "c": 4}, 4.0)
    assert found.bits_by_layer == {"a": 1, "b": 1, "c": 1}
    assert found.mean_bits == 1.0


def test_budget_above_the_largest_width_is_slack() -> None:
    rising = {"a": {1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0}, "b": {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}}
    found = solve_ampn(rising, {"a": 1, "b": 1}, 100.0)
    assert found.bits_by_layer == {"a": 2, "b": 4}
    assert found.budget == 100.0


def test_huge_macs_do_not_overflow() -> None:
    sensitivity = {"a": {1: 1.0, 4: 0.0}, "b": {1: 2.0, 4: 0.0}}
    found = solve_ampn(sensitivity, {"a": 2**70, "b": 2**70}, 2.5)
    assert found.bits_by_layer == {"a": 1, "b": 4}


@pytest.mark.parametrize("budget", [0.5, 0.0, -1.0, 0.999999])
def test_unreachable_budget_names_the_range(budget: float) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=1)
    with pytest.raises(UsageError, match=r"from 1 to 4") as error:
        solve_ampn(sensitivity, macs, budget)
    assert f"{budget:g} bits cannot be reached" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("budget", [math.nan, math.inf, True])
def test_budget_must_be_finite(budget: float) -> None:
    with pytest.raises(UsageError, match="finite number"):
        solve_ampn({"a": {1: 0.0}}, {"a": 1}, budget)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_bad_sensitivity_names_layer_and_bits(value: float) -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    sensitivity["blocks.1.mlp.fc2"][3] = value
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc2' at 3 bits"):
        solve_ampn(sensitivity, macs, 2.0)


def test_missing_bits_and_unmatched_layers_are_named() -> None:
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    del sensitivity["blocks.0.attn.qkv"][2]
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.qkv' has no sensitivity at 2 bits"):
        solve_ampn(sensitivity, macs, 2.0)
    sensitivity, macs = dit_instance(seed=0, blocks=2)
    renamed = {**macs, "blocks.0.attn.qvk": 3}
    with pytest.raises(UsageError, match=r"did you mean 'blocks\.0\.attn\.qkv'"):
        solve_ampn(sensitivity, renamed, 2.0)
    del macs["blocks.1.mlp.fc1"]
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc1' has sensitivities but no MACs"):
        solve_ampn(sensitivity, macs, 2.0)


@pytest.mark.parametrize("macs", [0, -3, 2.5, True])
def test_macs_must_be_positive_integers(macs: int) -> None:
    with pytest.raises(UsageError, match=r"MACs of layer 'a'"):
        solve_ampn({"a": {1: 0.0}}, {"a": macs}, 1.0)


@pytest.mark.parametrize("sensitivity", [{}, {"a": {}}])
def test_nothing_to_allocate(sensitivity: Sensitivity) -> None:
    with pytest.raises(UsageError, match="no sensitivities"):
        solve_ampn(sensitivity, dict.fromkeys(sensitivity, 1), 2.0)


def test_bit_widths_must_be_integers() -> None:
    with pytest.raises(UsageError, match="positive integers, got '2'"):
        solve_ampn({"a": {"2": 0.0}}, {"a": 1}, 2.0)  # type: ignore[dict-item]


def test_too_many_units_are_refused_before_memory_is_taken() -> None:
    sensitivity = {name: dict.fromkeys(BITS, 1.0) for name in "ab"}
    with pytest.raises(UsageError, match=r"common divisor 1,.*coarser common unit"):
        solve_ampn(sensitivity, {"a": 10**12, "b": 10**12 + 1}, 2.0)


def test_a_tight_budget_keeps_the_table_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity, macs = dit_instance(seed=0)
    monkeypatch.setattr(allocation, "MAX_TABLE_CELLS", 112 * 340)
    assert solve_ampn(sensitivity, macs, 2.0).mean_bits <= 2.0
    with pytest.raises(UsageError, match="limit 340"):
        solve_ampn(sensitivity, macs, 4.0)


def test_knapsack_takes_any_costs() -> None:
    values = np.array([[5.0, 1.0], [4.0, 0.0]])
    best, choices = knapsack(values, np.array([[2, 0], [0, 7]]), capacity=6)
    assert best.tolist() == [5.0, np.inf, 9.0, np.inf, np.inf, np.inf, np.inf]
    assert choices[0, 0] == 1
    assert choices[1, 2] == 0
    _, choices = knapsack(np.ones((1, 3)), np.zeros((1, 3), dtype=np.int64), capacity=0)
    assert choices.item() == 0


def test_mean_bits_is_weighted_by_macs() -> None:
    bits = {"a": 1, "b": 4}
    assert mean_bits(bits, {"a": 3, "b": 1, "unused": 9}) == 1.75
    with pytest.raises(UsageError, match="no MACs for layer 'b'"):
        mean_bits(bits, {"a": 3})
    with pytest.raises(UsageError, match="empty"):
        mean_bits({}, {})


def test_published_a2_means_match_a_mac_weighted_budget_of_two() -> None:
    published = {"qkv": (2.21, 3), "proj": (2.75, 1), "fc1": (2.00, 4), "fc2": (1.64, 4)}
    weighted = sum(bits * units for bits, units in published.values()) / 12
    assert weighted == pytest.approx(1.995, abs=5e-4)


def test_mean_bits_by_type() -> None:
    bits = {
        "blocks.0.attn.qkv": 2,
        "blocks.0.mlp.fc1": 4,
        "blocks.1.attn.qkv": 3,
        "blocks.1.mlp.fc1": 1,
    }
    assert mean_bits_by_type(bits) == {"fc1": 2.5, "qkv": 2.5}
