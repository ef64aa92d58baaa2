"""Verdicts: what they refuse, their table through CSV, and intervals that keep their side."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.errors import UsageError
from robuq_bench.runs.run_files import to_csv
from robuq_bench.statistics.verdicts import (
    COLUMNS,
    WORDS,
    Verdict,
    interval_text,
    read_verdicts,
    verdict_rows,
)

ROOT = Path(__file__).parents[2]


def verdict(**changes: Any) -> Verdict:
    fields: dict[str, Any] = {
        "claim": "Tokens of qkv are normal enough for 2 bits.",
        "subject": "qkv",
        "verdict": "holds",
        "effect": 1.02,
        "effect_name": "mean MSE ratio",
        "low": 1.01,
        "high": 1.03,
        "n": 16,
        "n_of": "images",
        "test": "cluster bootstrap",
        "p_value": None,
    }
    return Verdict(**(fields | changes))


def through_csv(rows: list[dict[str, Any]], **options: Any) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(to_csv(rows)), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "good"}, "'good' is none of holds"),
        ({"low": None}, "two limits"),
        ({"low": 1.04}, "above high"),
        ({"effect": math.nan}, "effect is NaN"),
        ({"high": math.nan}, "high is NaN"),
        ({"p_value": 1.1}, "p_value lies"),
        ({"p_adjusted": math.nan}, "p_adjusted lies"),
        ({"confidence": 95.0}, "confidence lies"),
        ({"n": -1}, "n is a count"),
    ],
)
def test_what_is_no_verdict_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verdict(**changes)


numbers = st.floats(-1e300, 1e300)
texts = st.text("aZ é,\"'\n;−%", min_size=1).filter(lambda text: text.strip() == text)


@given(
    subject=texts,
    note=st.one_of(st.just(""), texts),
    word=st.sampled_from(WORDS),
    effect=st.none() | numbers,
    limits=st.none() | st.tuples(numbers, numbers).map(sorted),
    p=st.none() | st.floats(0, 1),
    n=st.integers(0, 10**6),
    as_text=st.booleans(),
)
def test_verdicts_survive_csv(
    subject: str,
    note: str,
    word: str,
    effect: float | None,
    limits: list[float] | None,
    p: float | None,
    n: int,
    as_text: bool,
) -> None:
    low, high = limits or (None, None)
    verdicts = [
        verdict(),
        verdict(
            subject=subject, note=note, verdict=word, effect=effect, low=low, high=high, n=n,
            p_value=p, p_adjusted=p, detectable=effect,
        ),
    ]  # fmt: skip
    rows = verdict_rows(verdicts, "Holds below 1.05.")
    assert all(tuple(row) == COLUMNS for row in rows)
    options = {"dtype": str, "keep_default_na": False} if as_text else {}
    frame = through_csv(rows, **options)
    assert read_verdicts(frame) == verdicts
    assert list(frame["rule"]) == ["Holds below 1.05."] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns=["n_of", "low"]), "missing: low, n_of; unknown: none"),
        (lambda frame: frame.assign(width=3), "missing: none; unknown: width"),
        (lambda frame: frame.assign(verdict=["holds", "maybe"]), "row 2 .*'maybe'"),
        (lambda frame: frame.assign(subject=["", "qkv"]), "row 1 .*subject is empty"),
        (lambda frame: frame.assign(n=[16, 1.5]), "row 2 .*n is a count"),
        (lambda frame: frame.assign(effect=["1.0", "high"]), "row 2 .*high"),
    ],
)
def test_a_damaged_table_is_refused(change: Any, message: str) -> None:
    frame = through_csv(verdict_rows([verdict(), verdict()], "rule"))
    with pytest.raises(UsageError, match=message):
        read_verdicts(change(frame))


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ((-0.001, 0.053), "[−0.0010 to 0.0530]"),
        ((0.88, 1.1), "[0.88 to 1.10]"),
        ((0.971, 0.9996), "[0.9710 to 0.9996]"),
        ((1.0, 1.049), "[1.00 to 1.05]"),
        ((1.0004, 1.049), "[1.0004 to 1.0490]"),
        ((0.0, 12.3), "[0 to 12]"),
        ((-0.0, 100.0), "[0 to 100]"),
        ((-3.2e-9, 1.0), "[−3.2e-09 to 1]"),
        ((2.5e7, math.inf), "[2.5e+07 to ∞]"),
        ((-math.inf, 3.0), "[−∞ to 3.0]"),
    ],
)
def test_intervals_as_text(limits: tuple[float, float], text: str) -> None:
    assert interval_text(*limits) == text


def test_a_margin_is_a_threshold_too() -> None:
    assert interval_text(0.9703, 1.0301, [0.97, 1 / 0.97]) == "[0.9703 to 1.0301]"
    # four decimals would print 0.97496 as 0.9750
    assert interval_text(0.97496, 2.0, [0.975]) == "[0.97 to 2.00]"
    assert interval_text(0.97496, 2.034, [0.975, 2.03]) == "[0.97496 to 2.03400]"


@pytest.mark.parametrize("limits", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_no_interval(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="from low to high"):
        interval_text(*limits)


@given(
    st.lists(numbers | st.floats(0.9, 1.1) | st.floats(-1e-3, 1e-3), min_size=2, max_size=2),
    st.lists(numbers | st.sampled_from([0.0, 1.0, 0.97, 1.05]), max_size=3),
)
def test_no_limit_changes_its_side_of_a_threshold(
    limits: list[float], thresholds: list[float]
) -> None:
    low, high = sorted(limits)
    text = interval_text(low, high, thresholds)
    shown = [float(part.replace("−", "-")) for part in text[1:-1].split(" to ")]
    for limit, value in zip((low, high), shown, strict=True):
        assert value == pytest.approx(limit, rel=0.05)
        for threshold in thresholds:
            if limit != threshold:
                assert (value < threshold) == (limit < threshold)
                assert value != threshold


def test_the_package_is_free_of_torch() -> None:
    code = (
        "import sys, robuq_bench.statistics.verdicts, robuq_bench.statistics.comparisons\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
