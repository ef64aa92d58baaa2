"""The section on `study packed`: every number is made up, none was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import Verdict, verdict_rows

Row = dict[str, Any]


def variant(name: str, file_bytes: int | None, difference: float, fid: float | None) -> Row:
    row = {
        "variant": name, "plan": "a2", "run": "train-and-eval/a2-digits-1",
        "storage": None if file_bytes is None else "base3/fp32/fp32",
        "backend": None if file_bytes is None else "reference", "file_bytes": file_bytes,
        "size_reduction": None if file_bytes is None else 6_000_000 / file_bytes,
        "pixel_difference": difference, "share_of_images_equal": float(difference == 0),
        "distillation_loss": 0.0035, "denoising_loss": 0.08, "num_samples": 1000, "seed_ranges": 3,
    }  # fmt: skip
    if fid is not None:
        row |= {"fid_digits": fid, "fid_digits_min": fid - 0.11, "fid_digits_max": fid + 0.13}
        row |= {"is_digits": 9.0, "is_digits_min": 8.5, "is_digits_max": 9.5}
    return row


def table(fid: float | None = 0.5, lossless: float = 0.0) -> list[Row]:
    worse = None if fid is None else fid + 0.25
    return [
        variant("trained", None, 0.0, fid),
        variant("reference", 1_200_000, lossless, fid),
        variant("int8", 500_000, 1.6, worse),
    ]


def report(root: Path, rows: Sequence[Row], judged: Sequence[Verdict] = ()) -> Path:
    with Run.open(root / "runs", resolve("packed", "2", "a2", "digits", 0, []), []) as run:
        run.write_table("packed", rows)
        if judged:
            run.write_table("verdicts", verdict_rows(judged, "As it was agreed."))
        run.finish()
    return build_report([root / "runs"], root / "report.html")


def test_variants_print_the_run(tmp_path: Path, parse_page: Callable[[Path], Any]) -> None:
    page = parse_page(report(tmp_path, table()))
    lead = page.text.split("Variants of")[0]
    assert "A packed file of 1.14 MiB (5× smaller) gives 100 % of the trained student’s" in lead
    assert "0.50 [0.39–0.63]" in lead
    shown = page.table("Variants of a2")
    assert shown.cell("int8", "file").text == "488 KiB"
    assert shown.cell("int8", "smaller").text == "12×"
    assert shown.cell("int8", "images equal").text == "0 %"
    assert float(shown.cell("int8", "pixel difference").text) == 1.6
    fid = shown.cell("int8", "fid_digits")
    assert (fid.text, fid.small) == ("0.75", "[0.64–0.88]")
    # What the trained student weighs is the FP32 size that the factors are of.
    assert shown.cell("trained", "file").text == "5.72 MiB"
    metric = page.table("packed of a2").cell("int8", "is_digits")
    assert (metric.text, metric.small) == ("9.00", "[8.50–9.50]")
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert any("trained 0.50; reference 0.50; int8 0.75" in label for label in labels)


def test_the_studys_verdicts_are_shown_under_its_rule(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    judged = Verdict(
        claim="int8 changes images by less than one grey level of 255", subject="int8",
        verdict="does not hold", effect=1.6, effect_name="mean absolute pixel difference",
        low=1.55, high=1.65, n=3000, n_of="images", test="t interval over images", p_value=None,
    )  # fmt: skip
    page = parse_page(report(tmp_path, table(), [judged]))
    claims = next(t for t in page.tables if t.caption == "Packed models")
    assert [cell.text for cell in claims.rows[0][:2]] == [judged.claim, "does not hold"]
    assert "mean absolute pixel difference 1.60" in claims.rows[0][2].text
    assert "n = 3,000 images" in claims.rows[0][2].text
    assert "As it was agreed." in page.text


@pytest.mark.parametrize(("difference", "word"), [(0.0, "holds"), (0.5, "does not hold")])
def test_a_run_from_before_verdicts_says_what_its_lossless_file_kept(
    tmp_path: Path, parse_page: Callable[[Path], Any], difference: float, word: str
) -> None:
    page = parse_page(report(tmp_path, table(lossless=difference)))
    (row,) = next(t for t in page.tables if t.caption == "Packed models").rows
    assert row[1].text == word
    assert "n = 3,000 images" in row[2].text


def test_a_run_without_fid_or_table_does_not_break(
    tmp_path: Path, parse_page: Callable[[Path], Any]
) -> None:
    page = parse_page(report(tmp_path / "without-fid", table(fid=None)))
    shown = page.table("Variants of a2")
    assert [head.text for head in shown.head][-1] == "distillation loss"
    assert "A lossless packed file gives the trained student’s images: holds" in page.text
    with Run.open(tmp_path / "bare", resolve("packed", "2", "a2", "digits", 0, []), []) as run:
        run.finish()
    assert build_report([tmp_path / "bare"], tmp_path / "report.html").is_file()


def test_the_export_is_the_table(tmp_path: Path) -> None:
    rows = table()
    html = report(tmp_path, rows)
    written = pd.read_csv(html.with_name("report-packed.csv"))
    assert list(written["pixel_difference"]) == [row["pixel_difference"] for row in rows]
    assert written["packed_run"].str.startswith("packed/a2-digits-").all()
