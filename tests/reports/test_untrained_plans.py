"""Plans without training, or with weights of other bits: told apart, never mixed in a claim."""

from __future__ import annotations

import csv

import pytest

from reports import build_report
from reports.aggregate import group_runs
from reports.claims import HOLDS, NOT_RUN, group_claims
from reports.loading import find_runs
from reports.settings import PARTIAL, UNIFORM
from reports.story import plain_words
from reports.text import plain

UNTRAINED = ["train.steps=0"]
ALLOCATED = ["bits.of=weight", "bits.mean=3", "bits.choices=[2,3,4]", "bits.steps=0"]


@pytest.fixture
def fabricate(fabricate):
    """Without pictures, which no test here looks at."""
    fabricate.pictures = False
    return fabricate


def run_seeds(fabricate, plan, **kwargs):
    for seed in (0, 1):
        fabricate.run(plan, seed, **kwargs)


def judged(fabricate):
    (group,) = group_runs(find_runs([fabricate.root]).runs)
    claims = group_claims(group)

    def about(*words):
        return next(claim for claim in claims if all(word in claim.claim for word in words))

    return group, about


def test_labels_say_ptq_and_trained_rows_come_first(fabricate):
    fabricate.run("a4", overrides=UNTRAINED)
    fabricate.run("a4")
    fabricate.run("rtn-w4a4")
    group, _ = judged(fabricate)
    labels = [row.label for row in group.rows]
    assert labels[0].startswith("a4 (train.steps = not set")
    assert labels[1].startswith("a4 (PTQ, train.steps = ")
    assert labels[2:] == ["rtn-w4a4 (PTQ)"]
    assert [row.qat_steps for row in group.rows] == [500, 0, 0]


def test_a_claim_compares_plans_of_equal_training_only(fabricate):
    run_seeds(fabricate, "a4", fid=6)
    run_seeds(fabricate, "baseline-a4", fid=60, overrides=UNTRAINED)
    _, about = judged(fabricate)
    assert about("With 4", "Hadamard").verdict == NOT_RUN
    run_seeds(fabricate, "baseline-a4", fid=9)
    _, about = judged(fabricate)
    claim = about("With 4", "Hadamard")
    assert claim.verdict == HOLDS
    assert "PTQ" not in plain(claim.evidence)
    run_seeds(fabricate, "bitnetv2-a4", fid=20, overrides=["train.steps=900"])
    _, about = judged(fabricate)
    assert about("A4", "BitNet v2").verdict == NOT_RUN


def test_trained_pairs_are_preferred_to_nearer_ones_without_training(fabricate):
    run_seeds(fabricate, "a4", fid=6)
    run_seeds(fabricate, "baseline-a4", fid=9)
    for name, fid in (("a4", 60), ("a4", 50)):
        unrotated = ["layers.adaln.rotation=none", "layers.block.rotation=none"]
        run_seeds(fabricate, name, fid=fid, overrides=[*UNTRAINED, *unrotated * (fid == 50)])
    _, about = judged(fabricate)
    claim = about("With 4", "Hadamard")
    assert claim.verdict == HOLDS
    assert "PTQ" not in plain(claim.evidence)


def test_a_claim_compares_weights_of_one_precision_only(fabricate):
    run_seeds(fabricate, "quarot-w4a4", fid=6)
    run_seeds(fabricate, "baseline-a4", fid=60, overrides=UNTRAINED)
    _, about = judged(fabricate)
    assert about("With 4", "Hadamard").verdict == NOT_RUN
    run_seeds(fabricate, "rtn-w4a4", fid=9)
    _, about = judged(fabricate)
    claim = about("With 4", "Hadamard")
    assert claim.verdict == HOLDS
    words = plain(claim.evidence)
    assert "(quarot-w4a4 (PTQ), 2 seeds) against" in words
    assert "(rtn-w4a4 (PTQ), 2 seeds)" in words
    assert "also differ in" in words
    assert "weight.method" in words


def test_w158_claims_are_of_ternary_weights(fabricate):
    block, projections = (f"layers.{name}.weight.method=rtn" for name in ("block", "projections"))
    run_seeds(fabricate, "a4", fid=6, overrides=[block])
    run_seeds(fabricate, "bitnetv2-a4", fid=9, overrides=[block, projections])
    group, about = judged(fabricate)
    assert [row.family for row in group.rows] == [UNIFORM, PARTIAL]
    assert about("W1.58A4", "BitNet v2").verdict == NOT_RUN
    run_seeds(fabricate, "a4", fid=6)
    run_seeds(fabricate, "bitnetv2-a4", fid=9)
    _, about = judged(fabricate)
    assert about("W1.58A4", "BitNet v2").verdict == HOLDS


def test_plain_words_do_not_call_a_plan_trained_that_is_not(fabricate):
    fabricate.run("a4")
    fabricate.run("rtn-w4a4")
    words = plain(plain_words(judged(fabricate)[0]))
    assert "2 quantized plans were judged; 1 of them without training (PTQ)" in words
    assert "Seeds: 1 for a4 and rtn-w4a4 (PTQ)" in words


@pytest.fixture
def untrained_report(fabricate, tmp_path):
    fabricate.run("quarot-w4a4")
    fabricate.run("quarot-w4a4", 1, overrides=ALLOCATED)
    fabricate.run("a2")
    return build_report([fabricate.root], tmp_path / "report.html")


def test_the_report_shows_weight_bits_and_no_training(untrained_report, parse_page):
    page = parse_page(untrained_report)
    table = page.table("What each plan on")
    rows = {(row[0].text, row[0].small): row for row in table.rows}
    names = [cell.text for cell in table.head]
    assert "scaling" not in names
    assert "other layers" not in names
    place = ("quarot-w4a4", "PTQ, bits.mean = not set")
    w4a4 = rows[place]
    assert w4a4[names.index("weights")].text.startswith("gptq, 4 bits, ")
    assert w4a4[names.index("QAT steps")].text == "0 (PTQ)"
    assert rows["a2", ""][names.index("QAT steps")].text == "500"
    costs = {(row[0].text, row[0].small): row for row in page.table("What each plan costs").rows}
    cell = costs[place][1]
    # A scale of 16 bits for each of 1,296 rows of 248,832 weights.
    assert (cell.text, cell.small) == ("4", f"{4 + 16 * 1296 / 248832:.2f}")


def test_allocated_weight_bits_are_not_called_activation_bits(untrained_report, parse_page):
    page = parse_page(untrained_report)
    assert "Weight bits, training seed 1" in page.text
    labels = [a.get("aria-label", "") for tag, a in page.tags if tag == "svg"]
    assert any(label.startswith("Weight bits per block") for label in labels)
    with untrained_report.with_name("report-allocation.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    filled = {
        (line["plan"], line["seed"], bool(line["activation_bits"]), bool(line["weight_bits"]))
        for line in lines
    }
    assert filled == {
        ("a2", "0", True, False),
        ("quarot-w4a4", "0", True, False),
        ("quarot-w4a4", "1", False, True),
    }
