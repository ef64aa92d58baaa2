"""Verdicts, the checklist, the answer in words and the caveats of a normality run."""

from __future__ import annotations

import re

import pytest
import torch

from reports import build_report
from reports.claims import FAILS, HOLDS, UNDECIDED
from reports.loading import find_runs
from reports.normality.claims import normality_claims
from reports.normality.data import LIMIT, REFERENCE, normality_runs, percent, ratio_text
from reports.normality.story import answer, caveats, verdict_words
from reports.text import plain
from robuq_bench.normality import analysis, consequence, summaries


def read(study):
    (found,) = normality_runs(find_runs([study.root]).runs)
    return found


def test_the_limit_and_the_columns_are_those_of_the_study(made_up):
    assert summaries.VERDICT_LIMIT == LIMIT
    assert consequence.REFERENCE == REFERENCE
    tokens = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    table = analysis.analyse(tokens, torch.arange(16).repeat(2), lambda x: x, 0)
    cells = [summaries.Cell(made_up.teacher, made_up.layers["qkv"][0], 250, "identity", 16, table)]
    settings = summaries.Settings(0.05, 20, 0)
    written = {
        "cells": summaries.cell_rows(cells, settings),
        "types": summaries.type_rows(cells, {16: table}, settings),
        "errors": summaries.error_rows(cells, {16: table}, settings),
        "lyapunov": summaries.lyapunov_rows(cells),
    }
    written["verdicts"] = summaries.verdict_rows(written["errors"], written["cells"])
    made_up = made_up.tables([made_up.teacher])
    for name, rows in written.items():
        assert set(made_up[name][0]) <= set(rows[0]), name


def test_verdicts_are_judged_by_the_interval(made_up, study):
    found = read(study)
    assert found.subjects == [made_up.teacher, made_up.early, made_up.late]
    by_place = {p[0]: found.judgement(made_up.teacher, p, "hadamard", 2) for p in found.places}
    assert by_place["qkv"].verdict == FAILS
    assert by_place["fc2"].verdict == UNDECIDED
    assert by_place["fc2"].low < LIMIT <= by_place["fc2"].high
    assert found.outcome(made_up.teacher, "hadamard", 2).verdict == FAILS
    assert found.outcome(made_up.teacher, "randomized-hadamard", 2).verdict == HOLDS
    assert found.outcome(made_up.teacher, "block-hadamard-64", 2) is None


def test_a_layer_type_without_interval_leaves_the_claim_open(made_up, tmp_path):
    tables = made_up.tables([made_up.teacher])
    for name in ("verdicts", "errors"):
        tables[name] = [
            row
            for row in tables[name]
            if (row["layer_type"], row["transform"]) != ("fc2", "randomized-hadamard")
        ]
    for row in tables["types"]:
        if (row["layer_type"], row["transform"]) == ("fc2", "randomized-hadamard"):
            row |= {"shapiro_w_median": None, "kl": None, "shapiro_rejected": None}
    made = made_up.run(tmp_path / "runs", tables)
    found = read(made)
    assert found.outcome(made_up.teacher, "randomized-hadamard", 2).verdict == UNDECIDED
    signs = [c for c in normality_claims(found) if "random signs" in c.claim]
    assert {c.verdict for c in signs} == {UNDECIDED}
    assert "no interval for fc2" in plain(signs[0].evidence)
    text = build_report([made.root], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "undefined" in text
    assert "nan" not in re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).lower().split()


def test_the_checklist_has_a_row_per_transform_and_bits(made_up, study, page):
    claims = normality_claims(read(study))
    assert [c.verdict for c in claims] == [FAILS] * 5 + [HOLDS] * 5
    assert len({c.claim for c in claims}) == 10
    evidence = plain(claims[1].evidence)
    assert "qkv 1.274 [≤ 1.300]" in evidence
    assert "undecided fc2 1.049 [≤ 1.060]" in evidence
    assert all(subject in evidence for subject in (made_up.teacher, made_up.early, made_up.late))
    assert "normal tokens themselves reach 1.064" in plain(claims[4].evidence)
    table = page.table("Normality of activations")
    assert [row[1].text for row in table.rows] == [c.verdict for c in claims]


def test_the_answer_is_made_from_the_tables(made_up, study, page, tmp_path):
    headline, points = answer(read(study))
    text = plain(headline)
    assert "does not hold at 1, 2, 3, 4 and 8 bits with the plain transform" in text
    assert "1.274 times that of normal tokens in qkv" in text
    assert "With random signs before it, the claim holds at 1, 2, 3, 4 and 8 bits." in text
    assert f"In {made_up.late}, with random signs, it holds at 1" in text
    assert text in page.text
    rest = " ".join(plain(point) for point in points)
    assert "What fails in fc2 (1.049 → 0.990)" in rest
    assert "2.549 in the worst layer and timestep (block 1, 750)" in rest
    assert f"In {made_up.late}" in rest
    other = {
        ("fc2", "randomized-hadamard"): (1.3, 1.4, 1.5),
        ("qkv", "hadamard"): (1.0, 1.02, 1.06),
    }
    changed = read(made_up.run(tmp_path, made_up.tables([made_up.teacher], other)))
    assert verdict_words(changed, made_up.teacher, "hadamard").startswith("is undecided at 1, 2")
    assert verdict_words(changed, made_up.teacher, "randomized-hadamard").startswith(
        "does not hold"
    )
    assert "fc2 falls short." in plain(answer(changed)[0])


def test_caveats_name_this_runs_numbers(study):
    text = " ".join(caveats(read(study)))
    for part in ("n = 16 and 32", "16 images", "seed 0", "widths 16 and 32", "1.064 at 8 bits"):
        assert part in text
    assert "has a ratio of 0.021 at 1 bit" in text
    assert f"infinite) for {7 * 2 * 3} measured tokens" in text


@pytest.mark.parametrize(
    ("number", "text"), [(0.9441, "0.944"), (1.0505, "1.050"), (24.31, "24.3"), (1030.6, "1031")]
)
def test_ratios_as_printed(number, text):
    assert ratio_text(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.0002, "0.02 %"),
        (0.047, "4.7 %"),
        (0.0996, "10 %"),
        (0.81, "81 %"),
        (1, "100 %"),
    ],
)
def test_shares_as_printed(share, text):
    assert percent(share) == text
