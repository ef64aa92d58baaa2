"""Claims between plans: which rows are compared, and what the words rest on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from reports.comparing import RULE, judge
from reports.loading import find_runs
from reports.protocols import group_runs
from robuq_bench.statistics.comparisons import MIN_SEEDS
from robuq_bench.statistics.comparisons import RULE as RULE_OF_PAIRS

HADAMARD_2 = "With 2 activation bits, the plan with Hadamard beats the plan without"
HADAMARD_4 = "With 4 activation bits, the plan with Hadamard beats the plan without"
AMPN_2 = "At a mean of 2 bits, AMPN beats the same 2 bits in every layer"
BITNET_4 = "At W1.58A4, RobuQ beats BitNet v2"
GAIN_4 = "The gain by Hadamard is greater at 2 bits than at 4"
BUDGET = "AMPN keeps its budget of mean activation bits, weighted by MACs"
ORDER_2 = "At a mean of 2 bits, AMPN gives most bits to proj and fewest to fc2"
STABLE = "W1.58A2 trains stably (every logged loss finite; the last tenth below the first)"
ANOMALY = "At cfg 4.0, quantized models get a lower FID than full precision (a metric anomaly)"
UNTRAINED = ["train.steps=0"]
UNROTATED = ["layers.adaln.rotation=none", "layers.block.rotation=none"]


@pytest.fixture
def fabricate(fabricate):
    """Without pictures, which no test here looks at."""
    fabricate.pictures = False
    return fabricate


def run_seeds(fabricate, plan, fid, seeds=MIN_SEEDS, **kwargs):
    return [fabricate.run(plan, seed, fid=fid, **kwargs) for seed in range(seeds)]


def judged(fabricate):
    """Claim -> verdict, and what is open."""
    (group,) = group_runs(find_runs([fabricate.root]).runs)
    found = judge(group)
    assert found.open.keys().isdisjoint(claim.verdict.claim for claim in found.claims)
    return {claim.verdict.claim: claim.verdict for claim in found.claims}, found.open


def fids(paths):
    """[seeds, ranges] of FID, straight from results.jsonl."""
    lines = [map(json.loads, (p / "results.jsonl").read_text().splitlines()) for p in paths]
    return np.array(
        [[r["fid_digits"] for r in own if r.get("subject") == "student"] for own in lines]
    )


@pytest.mark.parametrize(
    ("ampn", "uniform", "word"),
    [(13.0, 17.3, "holds"), (17.3, 13.0, "does not hold"), (13.0, 13.3, "undecided")],
)
def test_one_image_range_is_a_paired_t_test_over_training_seeds(fabricate, ampn, uniform, word):
    one = ["evaluation.seed_ranges=1"]
    ours = fids(run_seeds(fabricate, "a2", ampn, overrides=one))
    theirs = fids(run_seeds(fabricate, "a2-uniform", uniform, overrides=one))
    logs = np.log(ours / theirs).ravel()
    expected = ttest_1samp(logs, 0)
    interval = expected.confidence_interval(0.95)
    found, needs = judged(fabricate)
    verdict = found[AMPN_2]
    assert verdict.verdict == word
    assert verdict.effect == pytest.approx(np.exp(logs.mean()), rel=1e-12)
    assert np.log([verdict.low, verdict.high]) == pytest.approx([interval.low, interval.high])
    assert verdict.p_value == pytest.approx(expected.pvalue)
    assert (verdict.n, verdict.n_of) == (5, "training seeds")
    assert f"a2: {ours.mean():.2f} [{ours.min():.2f}–{ours.max():.2f}]" in verdict.note
    assert "also differ" not in verdict.note  # in bits alone, which is what is claimed
    assert needs[AMPN_2.replace("2", "3")] == "needs an AMPN plan and a uniform plan at 3 bits"


def test_equal_plans_are_equivalent_and_so_the_claim_does_not_hold(fabricate):
    paths = run_seeds(fabricate, "a2", 13)
    for seed, path in enumerate(paths):
        records = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
        for record in records:
            if record.get("subject") == "student":
                record["fid_digits"] *= 1.002 + 0.001 * seed
        fabricate.run("a2-uniform", seed, records=records)
    verdict = judged(fabricate)[0][AMPN_2]
    assert (verdict.verdict, verdict.note[:25]) == ("does not hold", "equivalent within ±3 %; a")


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (4, 4), (5, 4), (3, 7)])
def test_few_common_seeds_are_not_judged_but_shown(fabricate, ours, theirs):
    a = fids(run_seeds(fabricate, "a4", 0.22, ours))
    b = fids(run_seeds(fabricate, "bitnetv2-a4", 1.5, theirs))
    verdict = judged(fabricate)[0][BITNET_4]
    common = min(ours, theirs)
    assert (verdict.verdict, verdict.n, verdict.p_value) == ("not judged", common, None)
    assert (verdict.low is None) == (common == 1)
    expected = np.exp(np.log(a[:common] / b[:common]).mean())
    assert verdict.effect == pytest.approx(expected, rel=1e-12)
    assert "5 training seeds that both plans have are needed" in verdict.note
    assert "also differ in" in verdict.note
    assert "branch.method" in verdict.note


def test_many_comparisons_of_one_protocol_are_one_family(fabricate):
    for plan, fid in {"a4": 6, "baseline-a4": 8, "a2-uniform": 17, "baseline-a2": 76}.items():
        run_seeds(fabricate, plan, fid)
    found, _ = judged(fabricate)
    family = [found[claim] for claim in (HADAMARD_4, HADAMARD_2, GAIN_4)]
    assert [verdict.verdict for verdict in family] == ["holds"] * 3
    raw = sorted(verdict.p_value for verdict in family)
    smallest = next(verdict for verdict in family if verdict.p_value == raw[0])
    assert smallest.p_adjusted == pytest.approx(3 * raw[0])  # Holm's first step
    gain = np.log([6 / 8, 17 / 76])
    assert found[GAIN_4].effect == pytest.approx(np.exp(gain[1] - gain[0]), rel=0.05)
    assert "also differ in activation.method" in found[HADAMARD_2].note


def test_the_gain_at_2_bits_is_not_greatest_where_it_is_greater_elsewhere(fabricate):
    for plan, fid in {"a4": 6, "baseline-a4": 80, "a2-uniform": 17, "baseline-a2": 76}.items():
        run_seeds(fabricate, plan, fid)
    assert judged(fabricate)[0][GAIN_4].verdict == "does not hold"


def test_the_pure_ablation_is_preferred_over_a_plan_that_differs_more(fabricate):
    fabricate.run("a4", fid=6)
    fabricate.run("baseline-a4", fid=9)
    fabricate.run("a4", overrides=UNROTATED, fid=7)
    verdict = judged(fabricate)[0][HADAMARD_4]
    assert "rotation.method = none" in verdict.subject
    assert "also differ" not in verdict.note


def test_a_claim_compares_plans_of_equal_training_only(fabricate):
    fabricate.run("a4", fid=6)
    fabricate.run("baseline-a4", fid=60, overrides=UNTRAINED)
    fabricate.run("bitnetv2-a4", fid=20, overrides=["train.steps=900"])
    _, needs = judged(fabricate)
    assert {HADAMARD_4, BITNET_4} <= needs.keys()
    fabricate.run("baseline-a4", fid=9)
    verdict = judged(fabricate)[0][HADAMARD_4]
    assert verdict.subject.startswith("a4 against baseline-a4")
    assert "PTQ" not in verdict.subject


def test_trained_pairs_are_preferred_to_nearer_ones_without_training(fabricate):
    fabricate.run("a4", fid=6)
    fabricate.run("baseline-a4", fid=9)
    fabricate.run("a4", fid=60, overrides=UNTRAINED)
    fabricate.run("a4", fid=50, overrides=[*UNTRAINED, *UNROTATED])
    assert "PTQ" not in judged(fabricate)[0][HADAMARD_4].subject


def test_a_claim_compares_weights_of_one_precision_only(fabricate):
    fabricate.run("quarot-w4a4", fid=6)
    fabricate.run("baseline-a4", fid=60, overrides=UNTRAINED)
    assert HADAMARD_4 in judged(fabricate)[1]
    fabricate.run("rtn-w4a4", fid=9)
    verdict = judged(fabricate)[0][HADAMARD_4]
    assert verdict.subject == "quarot-w4a4 (PTQ) against rtn-w4a4 (PTQ)"
    assert "weight.method" in verdict.note


def test_w158_claims_are_of_ternary_weights(fabricate):
    block, projections = (f"layers.{name}.weight.method=rtn" for name in ("block", "projections"))
    fabricate.run("a4", fid=6, overrides=[block])
    fabricate.run("bitnetv2-a4", fid=9, overrides=[block, projections])
    assert BITNET_4 in judged(fabricate)[1]
    fabricate.run("a4", fid=6)
    fabricate.run("bitnetv2-a4", fid=9)
    assert judged(fabricate)[0][BITNET_4].effect == pytest.approx(6 / 9, rel=0.09)


def test_claims_about_each_training(fabricate):
    run_seeds(fabricate, "a2", 13, 4)
    found, _ = judged(fabricate)
    words = Counter(found[claim].verdict for claim in (BUDGET, ORDER_2, STABLE))
    assert words == {"holds": 1, "not judged": 2}  # the budget is a check of each run
    fabricate.run("a2", 4, fid=13)
    found, needs = judged(fabricate)
    assert [found[claim].verdict for claim in (BUDGET, ORDER_2, STABLE)] == ["holds"] * 3
    # all of 5: the exact lower limit is (alpha / 2)^(1/5)
    assert found[ORDER_2].low == pytest.approx(0.025**0.2)
    assert "2.75 / 2.21 / 2.00 / 1.64" in found[ORDER_2].note
    assert ORDER_2.replace("2", "3", 1) in needs


def test_a_broken_budget_and_a_diverged_training_do_not_hold(fabricate):
    source = fabricate.run("a2", finish=False)
    records = [json.loads(line) for line in (source / "results.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "allocation":
            record["mean_bits"] = 2.01
        if record["kind"] == "train":
            record["loss"] = float(record["step"])
    fabricate.run("a2", 1, records=records)
    run_seeds(fabricate, "a2-uniform", 17)
    found, _ = judged(fabricate)
    assert found[BUDGET].verdict == "does not hold"
    assert found[BUDGET].effect == pytest.approx(0.01)
    assert (found[STABLE].verdict, found[STABLE].effect) == ("does not hold", 5 / 6)
    assert found[STABLE].note == "not stable: a2 seed 1"


def test_a_lower_fid_than_full_precision_counts_only_at_cfg_4(fabricate):
    fabricate.run("a4", fid=3.0)
    assert judged(fabricate)[1][ANOMALY] == "these runs were sampled at cfg 1"
    fabricate.root = fabricate.root / "cfg"
    run_seeds(fabricate, "a4", 3.0, overrides=["evaluation.cfg_scale=4.0"])
    verdict = judged(fabricate)[0][ANOMALY]
    assert (verdict.verdict, verdict.n) == ("holds", 5)
    assert verdict.effect == pytest.approx(3.0 / 4.3, rel=0.05)


def test_what_cannot_be_compared_is_said_and_not_judged(fabricate):
    for plan in ("a2", "a2-uniform"):
        source = fabricate.run(plan, 9, finish=False)
        text = (source / "results.jsonl").read_text()
        for seed in range(5):
            records = [json.loads(line) for line in text.splitlines()]
            zero = [
                r | {"fid_digits": 0.0} if r["key"] == "metrics/student/1" else r for r in records
            ]
            fabricate.run(plan, seed, records=zero)
    verdict = judged(fabricate)[0][AMPN_2]
    assert verdict.verdict == "not judged"
    assert "range 1, is not above 0" in verdict.note


def test_the_rule_is_that_of_comparisons_and_fixed():
    assert RULE.startswith(RULE_OF_PAIRS)
    assert "does not hold where it is worse or equivalent" in RULE
