"""What a report says of real images in place of samples, and of a second feature space."""

from __future__ import annotations

import re
from typing import Any

import pytest

from reports import train_and_eval
from reports.exports import exports
from reports.loading import find_runs
from reports.page import Figures, Fold, Images, Prose, Sheet
from reports.protocols import group_runs
from reports.real_images import order_in, over_real, real_of, spaces_of
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run

from .conftest import RANGES, picture

FLOORS = [0.11, 0.1, 0.12]
OTHER = "other-1a2b3c4d"
IN_OTHER = {"teacher": 3.0, "a4": 5.0, "a3": 9.0, "a2": 7.0}


def records_of(fabricate: Any, plan: str, seed: int, *, two_spaces: bool = True) -> list[Any]:
    """Those of a run of the present code, its FIDs at the floor twice the FID."""
    lines = fabricate.records(resolve("train-and-eval", "3", plan, "digits", seed, RANGES))
    for line in lines:
        if line["kind"] != "metrics":
            continue
        name = "teacher" if line["subject"] == "teacher" else plan
        line |= {"accuracy_digits": 0.9, "fid_digits_at_floor": 2 * line["fid_digits"]}
        line |= {"nn_ratio_pixels": 1.1, "nn_ratio_digits": 1.2, "images_searched": 1797}
        if two_spaces:
            line |= {f"fid_{OTHER}": IN_OTHER[name], f"accuracy_{OTHER}": 0.8}
            line[f"fid_{OTHER}_at_floor"] = 1.5 * IN_OTHER[name]
        if line["kind"] == "validation":
            line["validation_images"] = "held-out"
    for index, value in enumerate(FLOORS):
        floor = {
            "images": "training", "num_images": 870, "num_reference": 870, "disjoint_draws": 1,
            "reference": "the other training images", "fid_digits": value, f"fid_{OTHER}": 1.0,
        }  # fmt: skip
        lines.append({"key": f"floor/{index}", "kind": "floor", "draw": index, **floor})
    known = {"features": "digits", "accuracy": 0.994429, "images": "held out"}
    lines.append({"key": "classifier/digits", "kind": "classifier", **known})
    return lines


@pytest.fixture
def runs(fabricate: Any) -> Any:
    for plan in ("a4", "a3", "a2"):
        for seed in (0, 1):
            records = records_of(fabricate, plan, seed)
            fabricate.run(plan, seed, records=records, version="3")
    return find_runs([fabricate.root]).runs


def texts(sheet: Sheet) -> dict[str, dict[str, str]]:
    return {
        cells[0].text: dict(zip(sheet.columns, [cell.text for cell in cells], strict=True))
        for _, cells in sheet.rows()
    }


def test_ratios_are_of_like_with_like(runs: Any) -> None:
    (group,) = group_runs(runs)
    real = real_of(group)
    assert real is not None
    floor = sum(FLOORS) / len(FLOORS)
    for row in group.all_rows:
        fid = group.found(row, "fid_digits")
        ratio = over_real(group, real, row)
        assert fid is not None
        assert ratio == pytest.approx(2 * fid.mean / floor)
    said = "".join(phrase.text for phrase in real.about(group))
    assert "have fid_digits 0.11 [0.10–0.12] (870 training images against 870 of the others" in said
    assert "3 random draws). There are too few for N = 1,000." in said
    view = train_and_eval.view(runs, runs)
    assert view is not None
    figure = next(block for block in view.blocks if isinstance(block, Figures))
    assert any("870 training images against 870" in words for _, words in figure.key)
    table = next(block for block in view.blocks if isinstance(block, Sheet))
    assert table.columns[1:3] == ["fid_digits", "÷ real"]
    assert "accuracy_digits" in table.columns
    assert not [name for name in table.columns if OTHER in name or name.endswith("at_floor")]
    assert table.hints["accuracy_digits"] == "↑ is better; 0.994 of real images, held out"
    assert "nearest training image of the 1,797 searched;" in table.hints["nn_ratio_pixels"]
    assert "images_searched" not in group.metrics
    place = view.blocks.index(table) + 1
    assert isinstance(view.blocks[place], Prose)
    rows = exports([group], runs)["real_images"]
    assert rows["fid_digits"].tolist() == FLOORS * len(runs)


def test_the_second_space_has_a_table_and_the_order_of_plans(runs: Any) -> None:
    (group,) = group_runs(runs)
    assert group.fid == "fid_digits"
    first, further = spaces_of(group)
    assert further == {f"fid_{OTHER}": [f"fid_{OTHER}", f"accuracy_{OTHER}"]}
    assert not set(first) & set(further[f"fid_{OTHER}"])
    (said,) = order_in(group, f"fid_{OTHER}").items
    # a4 < a3 < a2 by digits, a4 < a2 < a3 by the other: one of three pairs is swapped.
    assert "3 plans" in said
    assert "τ 0.33. Pairs in another order: a3 and a2" in re.sub(r"\s+", " ", said)
    folds = {b.summary: b for b in train_and_eval.view(runs, runs).blocks if isinstance(b, Fold)}
    sheet = next(b for b in folds["In a second feature space"].blocks if isinstance(b, Sheet))
    assert texts(sheet)["a3"][f"fid_{OTHER}"] == "9.00"


def test_neighbours_of_the_teacher_are_shown(fabricate: Any) -> None:
    path = fabricate.run("a4", records=records_of(fabricate, "a4", 0), version="3", finish=False)
    config = resolve("train-and-eval", "3", "a4", "digits", 0, RANGES)
    with Run.open(fabricate.root, config, ["bench.py"]) as run:
        assert run.path == path
        run.write_bytes("samples/neighbours-teacher.png", picture("near"))
        run.finish()
    found = find_runs([fabricate.root]).runs
    folds = {b.summary: b for b in train_and_eval.view(found, found).blocks if isinstance(b, Fold)}
    (shown,) = (b for b in folds["Nearest training images"].blocks if isinstance(b, Images))
    assert shown.images[0].alt.startswith("Images sampled from teacher (full precision), below")


def test_older_runs_have_neither(fabricate: Any) -> None:
    fabricate.run("a4")
    found = find_runs([fabricate.root]).runs
    (group,) = group_runs(found)
    assert real_of(group) is None
    assert spaces_of(group)[1] == {}
    view = train_and_eval.view(found, found)
    assert view is not None
    table = next(block for block in view.blocks if isinstance(block, Sheet))
    assert "÷ real" not in table.columns
    folds = [block.summary for block in view.blocks if isinstance(block, Fold)]
    assert not {"In a second feature space", "Nearest training images"} & set(folds)
    assert exports([group], found)["real_images"].empty
