"""Statistics, rounds, memory split and JSON records of the GPU studies, without a GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from robuq_bench.config import config_hash, resolve
from robuq_bench.errors import MissingResourceError
from robuq_bench.measuring import record
from robuq_bench.measuring.ceilings import measure_ceilings
from robuq_bench.measuring.memory import measure_peak, resident_bytes, split_peak, weight_bytes
from robuq_bench.measuring.statistics import (
    Timing,
    compare,
    median_interval,
    speedup_interval,
)
from robuq_bench.measuring.timing import (
    EagerCalls,
    GraphReplay,
    cache_bytes,
    copies_beyond_cache,
    time_interleaved,
)
from robuq_bench.runs.run import Run


def timing(*rounds: list[float]) -> Timing:
    return Timing(tuple(tuple(samples) for samples in rounds), "test")


def test_a_summary_of_known_samples() -> None:
    found = timing([1e-6, 2e-6, 3e-6], [4e-6, 5e-6, 6e-6], [7e-6, 8e-6, 9e-6, 10e-6, 11e-6])
    summary = found.summary("us")
    assert summary["median_us"] == pytest.approx(6)
    assert summary["p20_us"] == pytest.approx(3)  # numpy's linear rule on 1..11
    assert summary["p80_us"] == pytest.approx(9)
    assert summary["iqr_over_median"] == pytest.approx(5 / 6)
    assert summary["stability"] == "unstable"
    assert (summary["samples"], summary["rounds"], summary["method"]) == (11, 3, "test")
    assert found.summary("ms")["median_ms"] == pytest.approx(6e-3)


def test_intervals_over_rounds_are_those_of_scipy() -> None:
    ours, theirs = timing([1.0], [1.1], [0.9], [1.05]), timing([2.0], [2.3], [1.9], [2.0])
    mine, other = (np.log([r[0] for r in t.rounds_s]) for t in (ours, theirs))
    expected = stats.ttest_rel(other, mine).confidence_interval(0.9)
    found = speedup_interval(ours, theirs, interleaved=True, confidence=0.9)
    assert np.log(found) == pytest.approx([expected.low, expected.high])
    alone = stats.ttest_1samp(mine, 0).confidence_interval(0.95)
    assert np.log(median_interval(ours)) == pytest.approx([alone.low, alone.high])
    # Rounds that took no turns are not paired: wider than by Welch's rule, never narrower.
    welch = stats.ttest_ind(other, mine, equal_var=False).confidence_interval(0.95)
    low, high = np.log(speedup_interval(ours, theirs, interleaved=False))
    assert low <= welch.low + 1e-12
    assert high >= welch.high - 1e-12
    still = timing([1.0], [1.0], [1.0])
    assert speedup_interval(still, timing([2.0], [2.0], [2.0]), interleaved=True) == (
        pytest.approx((2, 2))
    )


def test_drift_between_rounds_is_unstable_though_each_round_is_quiet() -> None:
    quiet = [1.0, 1.001, 0.999] * 5
    assert timing(quiet, quiet, quiet).summary()["stability"] == "stable"
    slower = [1.3 * sample for sample in quiet]
    assert not timing(quiet, quiet, slower).is_stable


def exact_p_value(x: list[float], y: list[float]) -> float:
    """Two-sided Mann-Whitney p by counting every split of the pooled values (no ties)."""
    pooled = x + y

    def statistic(chosen: tuple[int, ...]) -> int:
        rest = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        return sum(pooled[i] > value for i in chosen for value in rest)

    centre = len(x) * len(y) / 2
    observed = abs(statistic(tuple(range(len(x)))) - centre)
    splits = list(itertools.combinations(range(len(pooled)), len(x)))
    return sum(abs(statistic(s) - centre) >= observed for s in splits) / len(splits)


def test_the_p_value_counts_permutations() -> None:
    x, y = [1.0, 2.5, 3.0, 4.2, 6.0], [2.0, 5.0, 7.0, 8.0, 9.0]
    found = compare(x, y)
    assert found.p_value == pytest.approx(exact_p_value(x, y))
    assert found.verdict == "no difference shown"
    assert found.speedup == pytest.approx(7 / 3)


def test_identical_timings_never_win() -> None:
    generator = np.random.default_rng(0)
    for noise in (0.02, 0.1, 0.3):
        for _ in range(20):
            a, b = np.exp(noise * generator.normal(size=(2, 150)))
            assert compare(a, b).verdict == "no difference shown"


def test_faster_needs_both_conditions() -> None:
    generator = np.random.default_rng(1)
    base = 1 + 0.01 * generator.normal(size=300)
    slightly = compare(base / 1.03, base)
    assert slightly.p_value < 0.002  # a real difference, of 3 %
    assert slightly.verdict == "no difference shown"
    few = compare([0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    assert few.speedup == 2
    assert few.verdict == "no difference shown"  # three samples cannot reach p < .002
    assert compare(base / 1.06, base).verdict == "faster"
    assert compare(base * 1.06, base).verdict == "slower"


@dataclass
class Watch:
    """A stopwatch with scripted seconds per sample, writing down who ran."""

    name: str
    seconds: Callable[[int], float]
    log: list[str] = field(default_factory=list)
    calls: int = 4
    method: str = "scripted"
    count: int = 0

    def __call__(self) -> float:
        self.log.append(self.name)
        self.count += 1
        return self.seconds(self.count)


def test_rounds_interleave_rotate_and_leave_out_their_first_sample() -> None:
    log: list[str] = []
    watches = {
        name: Watch(name, lambda n: 100.0 if n in (1, 5, 9) else 0.04, log) for name in "abc"
    }
    found = time_interleaved(watches, rounds=3, round_s=0.1, min_samples=3)
    order = [name for name, _ in itertools.groupby(log)]
    assert order == [*"abc", *"bca", *"cab"]
    # 3 x 0.04 s reach 0.1 s; the 100 s of every first sample are left out
    assert found["a"].rounds_s == ((0.01,) * 3,) * 3
    assert found["a"].method == "scripted"


def test_short_work_gets_many_samples_and_endless_work_an_end() -> None:
    quick = {"quick": Watch("quick", lambda n: 0.001)}
    found = time_interleaved(quick, rounds=1, round_s=0.1)
    assert len(found["quick"].samples_s) in (100, 101)
    nothing = {"nothing": Watch("nothing", lambda n: 0.0)}
    assert len(time_interleaved(nothing, rounds=1, round_s=0.1)["nothing"].samples_s) == 2000


def test_copies_fill_twice_the_cache() -> None:
    cache = 50 * 2**20
    assert copies_beyond_cache(10 * 2**20, cache) == 10
    assert copies_beyond_cache(2**30, cache) == 1
    assert copies_beyond_cache(1, cache) == 64


def test_the_parts_of_a_peak_add_up() -> None:
    found = split_peak(weights=100, resident_before=7, peak=180, workspace=20, reserved=200)
    assert found["activations_bytes"] == 180 - 7 - 100 - 20
    parts = ("weights_bytes", "workspace_bytes", "activations_bytes")
    assert sum(found[part] for part in parts) == found["peak_bytes"] == 173
    assert found["allocator_unused_bytes"] == 20


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(6, dtype=torch.float16))
    model.register_buffer("shared", model[0].bias.data[:4])
    assert weight_bytes(model) == 4 * (64 + 8 + 8) + 12


def make_run(root: Path, gpu: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    from robuq_bench.runs import provenance

    real = provenance.collect
    monkeypatch.setattr(provenance, "collect", lambda *a: {**real(*a), "gpu": gpu})
    with Run.open(root, resolve("kernels", "1", "a4", "digits"), []) as run:
        run.write_table("kernels", [{"a": 1, "b": 0.5, "c": None, "d": True, "e": "1e"}])
        run.finish()
    return run.path


def test_records_hold_tables_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs", {"name": "NVIDIA H100 80GB HBM3", "cuda": "12.8"}, monkeypatch)
    (path,) = record.record_runs(tmp_path / "runs", tmp_path / "to")
    assert path.parent == tmp_path / "to" / "nvidia-h100-80gb-hbm3"
    assert path.name == f"kernels-{config_hash(resolve('kernels', '1', 'a4', 'digits'))[:12]}.json"
    document = json.loads(path.read_text())
    row = {"a": 1, "b": 0.5, "c": None, "d": True, "e": "1e"}
    assert document["tables"] == {"kernels": [row]}
    assert document["device"]["cuda"] == "12.8"
    assert document["config"]["kernels"]["rounds"] == 3


def test_runs_without_a_gpu_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs", None, monkeypatch)
    with pytest.raises(MissingResourceError, match="no finished run on a CUDA device"):
        record.record_runs(tmp_path / "runs", tmp_path / "to")
    assert record.main(["--runs", str(tmp_path / "runs"), "--to", str(tmp_path / "to")]) == 4
    assert "make gpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_a_graph_does_the_work_and_takes_less_than_eager_calls() -> None:
    counter = torch.zeros(1, device="cuda")
    graph = GraphReplay([lambda: counter.add_(1), lambda: counter.add_(1)])
    assert graph.calls > 2  # two short kernels are far below a millisecond
    counter.zero_()
    watches = {"graph": graph, "eager": EagerCalls([lambda: counter.add_(1)] * 20)}
    counter.zero_()
    assert graph() > 0
    assert int(counter) == graph.calls
    found = time_interleaved(watches, round_s=0.01)
    assert 0 < found["graph"].median_s < found["eager"].median_s
    assert cache_bytes("cuda") > 2**20


@pytest.mark.gpu
def test_on_a_gpu_memory_is_split() -> None:
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # makes a workspace
    before = resident_bytes()
    model = nn.Linear(1024, 1024, bias=False, device="cuda")
    x = torch.randn(4096, 1024, device="cuda")
    with torch.no_grad():
        found = measure_peak(lambda: model(x), model, before)
    assert found["weights_bytes"] == 4 * 2**20
    # input and at least one output of 16 MiB each
    assert found["activations_bytes"] >= 32 * 2**20
    assert found["workspace_bytes"] >= 0


@pytest.mark.gpu
def test_on_a_gpu_ceilings_are_plausible() -> None:
    found = measure_ceilings("cuda", round_s=0.02)
    assert 1e11 < found.copy_bytes_s < 2e13
    assert found.bf16_ops_s > 1e13
