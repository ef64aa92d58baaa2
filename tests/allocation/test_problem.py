"""What a problem may hold, and the errors that name what it may not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from robuq_bench.allocation import (
    Cost,
    activation_bytes_cost,
    allocation_problem,
    exact,
    latency_cost,
    mac_cost,
    solve_ampn,
)
from robuq_bench.errors import UsageError

SENSITIVITY = {"a": {2: 3.0, 4: 1.0, 8: 0.0}, "b": {2: 5.0, 4: 2.0, 8: 0.0}}
MACS = {"a": 1, "b": 1}


def test_bit_choices_may_be_a_subset_or_differ_by_layer() -> None:
    assert solve_ampn(SENSITIVITY, MACS, 8.0, (2, 4)).bits_by_layer == {"a": 4, "b": 4}
    found = solve_ampn(SENSITIVITY, MACS, 5.0, {"a": (8, 2), "b": (2, 4)})
    assert found.bits_by_layer == {"a": 2, "b": 4}
    found = solve_ampn({"a": {8: 0.1}, "b": {1: 0.7, 2: 0.5}}, MACS, 5.0, {"a": [8], "b": [1, 2]})
    assert found.bits_by_layer == {"a": 8, "b": 2}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((2, 3), "layer 'a' has no sensitivity at 3 bits; it needs all of 2, 3"),
        ((), "1 to 255 bit choices, got []"),
        ((0, 2), "bit widths must be positive integers, got 0"),
        ((2.0,), "bit widths must be positive integers, got 2.0"),
        ({"a": (2,)}, "layer 'b' has no bit choices"),
        ({"a": (2,), "b": ()}, "bit choices of layer 'b', got []"),
        ({"a": (2,), "b": (2,), "blocks": (2,)}, "layer 'blocks' has bit choices but no"),
    ],
)
def test_bad_bit_choices_are_named(choices: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        solve_ampn(SENSITIVITY, MACS, 4.0, choices)


@pytest.mark.parametrize("value", ["0.5", None, True, math.nan, -math.inf])
def test_sensitivities_that_are_no_numbers(value: Any) -> None:
    broken = {**SENSITIVITY, "b": {2: 1.0, 4: value, 8: 0.0}}
    with pytest.raises(UsageError, match=r"sensitivity of layer 'b' at 4 bits is .* finite"):
        solve_ampn(broken, MACS, 4.0)


def test_costs_that_do_not_match_are_named() -> None:
    def attempt(cost: Cost) -> None:
        allocation_problem(SENSITIVITY, MACS, [cost])

    table = {name: {2: 1, 4: 2, 8: 3} for name in MACS}
    with pytest.raises(UsageError, match="layer 'bb' has a heat cost but no sensitivity"):
        attempt(Cost("heat", {**table, "bb": {2: 1}}, 9))
    with pytest.raises(UsageError, match="layer 'b' has sensitivities but no heat cost"):
        attempt(Cost("heat", {"a": table["a"]}, 9))
    with pytest.raises(UsageError, match="layer 'b' has no heat cost at 8 bits"):
        attempt(Cost("heat", {**table, "b": {2: 1, 4: 2}}, 9))
    for value in (-1, 1.5, math.nan, True):
        with pytest.raises(UsageError, match=r"heat cost of layer 'b' at 4 bits.*smaller unit"):
            attempt(Cost("heat", {**table, "b": {2: 1, 4: value, 8: 3}}, 9))  # type: ignore[dict-item]
    for budget in (math.nan, -math.inf, True):
        with pytest.raises(UsageError, match="heat budget must be a finite number"):
            attempt(Cost("heat", table, budget))
    with pytest.raises(UsageError, match=r"heat budget of 1 K cannot be reached.*from 2 to 6"):
        attempt(Cost("heat", table, 1, unit="K"))
    for costs in ([], [Cost("heat", table, 9), Cost("heat", table, 8)]):
        with pytest.raises(UsageError, match="costs with different names"):
            allocation_problem(SENSITIVITY, MACS, costs)


def test_latency_is_rounded_up_to_steps() -> None:
    cost = latency_cost({"a": {2: 0.003, 4: 0.0031}}, 1.0)
    assert cost.table == {"a": {2: 3, 4: 4}}
    assert latency_cost({"a": {2: 0.3}}, 1.0, steps_per_ms=10).table == {"a": {2: 3}}
    for value in (math.nan, -0.1, math.inf, "1"):
        with pytest.raises(UsageError, match="latency of layer 'a' at 2 bits is"):
            latency_cost({"a": {2: value}}, 1.0)  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="steps_per_ms"):
        latency_cost({}, 1.0, steps_per_ms=0)
    with pytest.raises(UsageError, match="activation elements of layer 'a'"):
        activation_bytes_cost({"a": 0}, 1.0)


def test_latency_budget_that_cannot_be_met_names_the_range() -> None:
    table = {name: {2: 0.5, 4: 0.75, 8: 1.0} for name in MACS}
    with pytest.raises(UsageError, match=r"latency_ms budget of 0.9 ms.*from 1 to 2"):
        allocation_problem(SENSITIVITY, MACS, [latency_cost(table, 0.9)])
    found = exact(allocation_problem(SENSITIVITY, MACS, [latency_cost(table, 1.5)]))
    assert found.costs == {"latency_ms": 1.5}
    assert (found.budget, found.mean_bits) == (math.inf, 4.0)
    unlimited = exact(allocation_problem(SENSITIVITY, MACS, [mac_cost(MACS, math.inf)]))
    assert unlimited.bits_by_layer == {"a": 8, "b": 8}
