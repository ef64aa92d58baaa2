"""Rank agreement against SciPy, one resample at a time, and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.sensitivity.agreement import (
    agreement_gain,
    kendall,
    rank_agreement,
    recovered_layers,
    seed_agreement,
    spearman,
)

Table = dict[str, dict[int, float]]


def tables(layers: int = 12, seed: int = 0, noise: float = 0.5) -> tuple[Table, Table]:
    """Two tables over bits 1 to 3 that agree in part, with some ties."""
    generator = np.random.default_rng(seed)
    truth = generator.exponential(size=(layers, 3))
    metric = np.round(truth * np.exp(noise * generator.normal(size=truth.shape)), 1)
    names = [f"blocks.{i}" for i in range(layers)]
    made = [
        {name: {b + 1: float(v) for b, v in enumerate(row)} for name, row in zip(names, m)}  # noqa: B905
        for m in (metric, truth)
    ]
    return made[0], made[1]


def columns(*pair: Table, bits: list[int]) -> list[np.ndarray]:
    return [np.array([[table[n][b] for b in bits] for n in pair[1]]) for table in pair]


@pytest.mark.parametrize("ties", [1, 3, 100])
def test_statistics_match_scipy_on_every_resample(ties: int) -> None:
    generator = np.random.default_rng(ties)
    x, y = generator.integers(0, ties + 2, size=(2, 15)).astype(float)
    counts = np.stack(
        [np.bincount(generator.integers(0, 15, 15), minlength=15) for _ in range(60)]
    ).astype(float)
    rho, tau = spearman(x, y, counts), kendall(x, y, counts)
    for row, r, t in zip(counts.astype(int), rho, tau, strict=True):
        a, b = np.repeat(x, row), np.repeat(y, row)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            assert np.isnan(r)
            assert np.isnan(t)
            continue
        assert r == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert t == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("bits", [2, None])
def test_agreement_matches_scipy_and_a_loop_bootstrap(bits: int | None) -> None:
    metric, truth = tables()
    widths = [1, 2, 3] if bits is None else [bits]
    x, y = columns(metric, truth, bits=widths)
    found = rank_agreement(metric, truth, bits=bits, resamples=300, confidence=0.9, seed=5)
    assert found.items == x.size
    assert found.spearman.value == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert found.kendall.value == pytest.approx(stats.kendalltau(x.ravel(), y.ravel()).statistic)
    drawn = np.random.default_rng(5).integers(0, 12, size=(300, 12))
    rho = [stats.spearmanr(x[rows].ravel(), y[rows].ravel()).statistic for rows in drawn]
    tau = [stats.kendalltau(x[rows].ravel(), y[rows].ravel()).statistic for rows in drawn]
    for estimate, values in ((found.spearman, rho), (found.kendall, tau)):
        low, high = np.quantile(values, [0.05, 0.95])
        assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
        assert low < estimate.value < high


def test_p_values_of_a_gain_count_the_resamples_beyond_a_null() -> None:
    better, truth = tables(seed=1, noise=0.3)
    worse, _ = tables(seed=1, noise=2.0)
    nulls = (0.0, 0.2, 5.0)
    found = agreement_gain(better, worse, truth, resamples=400, seed=5, nulls=nulls)
    x, y = columns(better, truth, bits=[1, 2, 3])
    z, _ = columns(worse, truth, bits=[1, 2, 3])
    gains = [
        stats.spearmanr(x[rows].ravel(), y[rows].ravel()).statistic
        - stats.spearmanr(z[rows].ravel(), y[rows].ravel()).statistic
        for rows in np.random.default_rng(5).integers(0, 12, size=(400, 12))
    ]
    for null, p_value in zip(nulls, found.p_values, strict=True):
        beyond = min(sum(g <= null for g in gains), sum(g >= null for g in gains))
        assert p_value == pytest.approx(min(1.0, 2 * (beyond + 1) / 401))
    assert found.p_values[1] > found.p_values[2] == pytest.approx(2 / 401)


def test_order_of_the_tables_does_not_matter() -> None:
    metric, truth = tables()
    shuffled = {name: dict(reversed(metric[name].items())) for name in reversed(metric)}
    assert rank_agreement(shuffled, truth) == rank_agreement(metric, truth)
    assert rank_agreement(metric, truth) == rank_agreement(metric, truth)
    assert rank_agreement(metric, truth, seed=1) != rank_agreement(metric, truth)


def test_perfect_and_reversed_orders() -> None:
    _, truth = tables()
    same = {name: {b: v**3 for b, v in row.items()} for name, row in truth.items()}
    found = rank_agreement(same, truth, top=(3, 5, 1000))
    assert found.spearman == found.kendall
    assert (found.spearman.low, found.spearman.high) == (1.0, 1.0)
    assert found.overlap == {3: 1.0, 5: 1.0}
    opposite = {name: {b: -v for b, v in row.items()} for name, row in truth.items()}
    assert rank_agreement(opposite, truth, bits=1).kendall.value == -1.0


def test_top_k_overlap_is_the_share_of_common_layers() -> None:
    metric, truth = tables(noise=1.5)
    found = rank_agreement(metric, truth, bits=2, top=range(1, 13)).overlap
    for k in range(1, 13):
        best = [
            set(sorted(table, key=lambda n, t=table: (-t[n][2], int(n[7:])))[:k])
            for table in (metric, truth)
        ]
        assert found[k] == len(best[0] & best[1]) / k
    assert found[12] == 1.0


def test_an_order_without_differences_has_no_correlation() -> None:
    metric, truth = tables()
    flat = {name: dict.fromkeys(row, 0.0) for name, row in metric.items()}
    found = rank_agreement(flat, truth, bits=1)
    assert found.spearman.value is None
    assert found.kendall.low is None


def test_recovered_layers_by_brute_force() -> None:
    metric, truth = tables(noise=1.5)
    for bits, k in itertools.product((1, 2, 3), (1, 4, 12)):

        def worse(table: Table, name: str, bits: int = bits) -> int:
            """How many layers come before this one."""
            own, place = table[name][bits], [*truth].index(name)
            return sum(
                table[n][bits] > own or (table[n][bits] == own and i < place)
                for i, n in enumerate(truth)
            )

        expected = [n for n in truth if worse(metric, n) < k <= worse(truth, n)]
        found = recovered_layers(metric, truth, k, bits=bits)
        assert sorted(found) == sorted(expected)
        assert found == sorted(found, key=lambda n: worse(metric, n))
    assert recovered_layers(truth, truth, 4, bits=1) == []
    for k in (0, 13):
        with pytest.raises(UsageError, match="1 to 12"):
            recovered_layers(metric, truth, k, bits=1)


def test_tables_that_cannot_be_compared_are_refused() -> None:
    metric, truth = tables()
    extra = {**metric, "blocks.99": metric["blocks.1"]}
    with pytest.raises(UsageError, match=r"truth lacks layer 'blocks\.99'"):
        rank_agreement(extra, truth)
    with pytest.raises(UsageError, match=r"metric lacks 1 layers: blocks\.3"):
        rank_agreement({n: v for n, v in metric.items() if n != "blocks.3"}, truth)
    with pytest.raises(UsageError, match="three layers"):
        rank_agreement({"a": {1: 1.0}}, {"a": {1: 1.0}})
    with pytest.raises(UsageError, match=r"7 bits; all have \[1, 2, 3\]"):
        rank_agreement(metric, truth, bits=7)
    with pytest.raises(UsageError, match="no bit width in common"):
        rank_agreement({n: {8: 1.0} for n in truth}, truth)
    with pytest.raises(UsageError, match="bootstrap"):
        rank_agreement(metric, truth, resamples=0)
    broken = {**truth, "blocks.2": {1: 1.0, 2: float("nan"), 3: 1.0}}
    with pytest.raises(RobuqError, match=r"truth of layer 'blocks\.2' at 2 bits is nan"):
        rank_agreement(metric, broken)
    assert rank_agreement(metric, broken, bits=1).items == 12


def test_gain_is_the_difference_of_two_agreements_on_the_same_resamples() -> None:
    generator = np.random.default_rng(3)
    names = [f"l{i}" for i in range(12)]
    truth = {name: {2: float(i)} for i, name in enumerate(names)}
    near = {name: {2: float(i + generator.normal())} for i, name in enumerate(names)}
    far = {name: {2: float(generator.normal())} for name in names}
    gain = agreement_gain(near, far, truth, bits=2, resamples=500)
    a = rank_agreement(near, truth, bits=2).spearman.value
    b = rank_agreement(far, truth, bits=2).spearman.value
    assert a is not None
    assert b is not None
    assert gain.value == pytest.approx(a - b)
    assert gain.low is not None
    assert gain.high is not None
    assert 0 < gain.low < gain.value < gain.high
    none = agreement_gain(near, near, truth, bits=2, resamples=100)
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)


def test_seeds_agree_as_scipy_says_of_one_and_the_mean_of_the_others() -> None:
    values = np.random.default_rng(4).normal(size=(9, 2, 3))  # layers, widths, seeds
    by_seed = {
        f"l{i}": {b + 1: [*row] for b, row in enumerate(rows)} for i, rows in enumerate(values)
    }
    for bits, part in ((2, values[:, 1:]), (None, values)):
        found = seed_agreement(by_seed, bits=bits)
        for seed, (rho, tau) in enumerate(found):
            one, others = part[..., seed].ravel(), np.delete(part, seed, axis=2).mean(2).ravel()
            assert rho == pytest.approx(stats.spearmanr(one, others).statistic)
            assert tau == pytest.approx(stats.kendalltau(one, others).statistic)
        assert len(found) == 3
    alone = {layer: {b: v[:1] for b, v in row.items()} for layer, row in by_seed.items()}
    assert seed_agreement(alone) == []
