"""Published numbers: sourced, consistent, and beside nothing they cannot be compared with."""

from __future__ import annotations

import pytest

from reports.published import EVIDENCE, load_published, published_values


def test_published_numbers_have_sources_and_the_papers_values():
    numbers = load_published()["number"]
    assert len({entry["id"] for entry in numbers}) == len(numbers)
    assert all(entry["source"] and entry["setting"] for entry in numbers)
    assert {entry["evidence"] for entry in numbers} <= set(EVIDENCE)
    values = published_values()
    weights = {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}
    # The published means per layer type, weighted by MACs, spend the 2-bit budget.
    mean = sum(values[f"bits-a2-{name}"] * w for name, w in weights.items()) / 12
    assert mean == pytest.approx(1.995, abs=5e-4)
    assert values["ablation-hadamard"] / values["ablation-bitnetv2"] == pytest.approx(
        values["ablation-ratio"], abs=5e-4
    )


def test_measured_numbers_stand_beside_published_ones(page):
    table = page.table("Published numbers beside measured ones")
    rows = {(row[0].text, row[0].small): row for row in table.rows}
    summary = page.table("Plans and metrics")
    ours, over = (summary.cell(name, "fid_digits") for name in ("a4", "bitnetv2-a4"))
    row = rows["BitNet v2 W1.58A4", "FID"]
    assert [cell.text for cell in row[1:4]] == [
        "41.59",
        f"{over.text} {over.small}",
        "not comparable",
    ]
    assert row[2].href == over.href
    ratio = rows["RobuQ over BitNet v2, W1.58A4", "ratio of FIDs"]
    assert float(ratio[2].text) == pytest.approx(float(ours.text) / float(over.text), abs=2e-3)
    bits = rows["RobuQ W1.58A2", "mean activation bits of proj"]
    assert [cell.text for cell in bits[1:4]] == ["2.75", "3.00", "+0.25"]
    assert [cell.text for cell in rows["RobuQ", "faster"][1:4]] == ["3.5×", "not run", "not run"]
    assert rows["RobuQ", "smaller than FP32, in theory"][2].small == "needs a run on DiT-XL/2"


def test_rivals_stand_alone_with_their_source(page):
    table = page.table("DiT-XL/2 on ImageNet 256")
    assert table.cell("Q-DiT", "FID").text == "6.40"
    assert table.cell("Q-DiT", "precision").text == "0.7609"
    assert load_published()["rivals"]["source"] in page.text
