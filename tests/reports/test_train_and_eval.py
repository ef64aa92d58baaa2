"""The main job's section: the answer, its figures, and what plans do, gave and cost."""

from __future__ import annotations

import csv
import html
import io
import json
import random
import re
import statistics

import pytest
from PIL import Image

from reports import build_report
from reports.layer_bits import by_block
from reports.samples import fit
from reports.train_and_eval import MARKS
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run

TABLES = {"metrics", "summary", "allocation", "sensitivity", "training", "accounting"}


def records_of(path):
    return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def alts(page, words):
    found = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    return [text for text in found if words in text]


def chart(report, words):
    """The SVG element whose alternative text starts with `words`."""
    text = report.read_text(encoding="utf-8")
    return next(c for c in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
                if f'aria-label="{html.escape(words)}' in c)  # fmt: skip


def test_the_answer_is_the_nearest_plan_the_teacher_and_the_farthest(twelve_plans, page):
    def of(plan, subject):
        folders = twelve_plans.glob(f"train-and-eval/{plan}-digits-*")
        found = [
            r["fid_digits"] for p in folders for r in records_of(p) if r.get("subject") == subject
        ]
        return f"{statistics.fmean(found):.2f} [{min(found):.2f}–{max(found):.2f}]"

    answer = (
        f"On digits, a8 comes nearest to its teacher of 11 quantized plans: fid_digits "
        f"{of('a8', 'student')} against {of('fp', 'student')}; baseline-a2 is farthest with "
        f"{of('baseline-a2', 'student')}"
    )
    assert page.text.count(answer) == 2  # above all, and in its section


def test_the_fid_chart_shows_every_plan_in_the_colour_and_mark_of_its_kind(report, page):
    (alt,) = alts(page, "fid_digits by plan")
    svg = chart(report, "fid_digits by plan")
    table = page.table("Plans and metrics")
    for row in table.rows[1:]:
        cell = table.cell(row[0].text, "fid_digits")
        assert f"{row[0].text} {cell.text} {cell.small}" in alt
        assert f">{row[0].text}</text>" in svg
    for words in ("◆ Hadamard, AMPN bits", "● Hadamard, uniform bits", "┃ teacher"):
        assert all(word in page.text for word in words.split(maxsplit=1))
    assert len({(hue, mark) for hue, mark, _ in MARKS.values()}) == len(MARKS)


def test_no_report_speaks_of_ternary_weights_where_no_plan_has_them(
    fabricate, tmp_path, parse_page
):
    fabricate.pictures = False
    fabricate.run("rtn-w4a4")
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert "ternary" not in page.text.split("Plans and metrics on")[0].lower()
    assert "of 1 quantized plan (1 without training)" in page.text


def test_sensitivity_to_bits_that_change_nothing_is_left_out_and_said(
    fabricate, tmp_path, parse_page
):
    fabricate.pictures = False
    records = records_of(fabricate.run("a2", finish=False))
    for record in records:
        if record["kind"] == "sensitivity" and record["bits"] == 4:
            record["mse"] = 0.0
    fabricate.run("a2", 1, records=records)
    report = build_report([fabricate.root], tmp_path / "report.html")
    page = parse_page(report)
    titles = [text.split(" by layer type")[0] for text in alts(page, "Sensitivity to")]
    assert titles == ["Sensitivity to 1 bit", "Sensitivity to 2 bits", "Sensitivity to 3 bits"]
    assert "Left out: 4 bits, which changes nothing" in page.text
    worst = max((r for r in records if r["kind"] == "sensitivity" and r["bits"] == 1),
                key=lambda record: record["mse"])  # fmt: skip
    assert f"to {worst['mse']:.3g} in {worst['layer']}"[:9] in alts(page, "Sensitivity to 1 bit")[0]
    assert alts(page, "Sensitivity to 1 bit")[0].endswith(f"in {worst['layer']}")


def test_samples_that_came_with_the_teacher_are_said(fabricate, tmp_path, parse_page):
    fabricate.pictures = False
    records = records_of(fabricate.run("a2"))
    teacher = [record for record in records if record.get("subject") == "teacher"]
    drawn = parse_page(build_report([fabricate.root], tmp_path / "drawn.html"))
    assert "came with the suite" not in drawn.text
    for record in teacher:
        del record["sample_seconds"]
        record["samples"] = "asset:of_the_teacher.safetensors"
    fabricate.run("a2", 1, records=records)
    config = resolve("teacher-eval", "2", "fp", "digits", 0, [])
    with Run.open(fabricate.root, config, ["bench.py"]) as run:
        for record in teacher:
            run.append(**{k: v for k, v in record.items() if k != "source_run"})
        run.add_input_digest("teacher samples", "0" * 64, note="made by: some command")
        run.finish()
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert "samples that came with the suite (asset:of_the_teacher.safetensors)" in page.text
    assert "made by: some command" in page.text


def test_one_curve_that_diverges_does_not_flatten_the_others(fabricate, tmp_path, parse_page):
    fabricate.pictures = False
    fabricate.run("a4")
    fabricate.run("a3")
    records = records_of(fabricate.run("a2", finish=False))
    steps = [record for record in records if record["kind"] == "train"]
    for place, record in enumerate(steps):
        record["loss"] = 0.05 * 30.0**place
    fabricate.run("a2", 1, records=records)
    report = build_report([fabricate.root], tmp_path / "report.html")
    page = parse_page(report)
    assert re.search(r"Cut off above [\d.]+: a2 \(up to 1\.2\de\+06\)", page.text)
    panels = [chart(report, f"Training loss by step of {name}") for name in ("a4", "a3", "a2")]
    ticks = [re.findall(r">([\d.]+)</text>", panel) for panel in panels]
    assert ticks[0] == ticks[1] == ticks[2]  # the same axes
    assert all(float(tick) < 1000 for tick in ticks[0])
    last = next(r for r in reversed(records) if r["kind"] == "train")["loss"]
    assert f"{last:.2e}"[:4] in alts(page, "Training loss by step of a2")[0]


def test_a_run_without_metrics_or_plans_breaks_nothing(fabricate, tmp_path, parse_page):
    fabricate.pictures = False
    fabricate.run("a2", records=[])
    page = parse_page(build_report([fabricate.root], tmp_path / "report.html"))
    assert "On digits, no quantized plan’s FID was measured: not run." in page.text
    assert page.table("What each plan costs").cell("a2", "BitOPs").text == "not run"
    assert {row["mean"] for row in rows_of(tmp_path / "report-summary.csv")} == set()


def test_metrics_csv_holds_every_value_exactly(twelve_plans, report):
    rows = rows_of(report.with_name("report-metrics.csv"))
    found = {
        (r["run"], r["seed_range"]): float(r["value"])
        for r in rows
        if r["metric"] == "fid_digits" and r["subject"] == "student"
    }
    for folder in twelve_plans.glob("train-and-eval/a*-digits-*"):
        for record in records_of(folder):
            if record.get("subject") == "student":
                key = f"train-and-eval/{folder.name}", str(record["seed_range"])
                assert found[key] == record["fid_digits"]
    assert {row["num_samples"] for row in rows} == {"1000"}


def test_the_other_tables_hold_their_records(report):
    assert {path.stem.removeprefix("report-") for path in report.parent.glob("report-*.csv")} == {
        *TABLES,
        *("claims", "real_images"),
    }
    assert len(rows_of(report.with_name("report-sensitivity.csv"))) == 4 * 16 * 4
    summary = rows_of(report.with_name("report-summary.csv"))
    assert {row["training_seeds"] for row in summary if row["plan"] == "a2"} == {"3"}
    claims = rows_of(report.with_name("report-claims.csv"))
    assert list(claims[0])[:4] == ["protocol", "claim", "verdict", "evidence"]
    assert {row["verdict"] for row in claims} == {"holds", "not judged", "not run"}


def test_an_older_table_does_not_stay_behind(fabricate, tmp_path):
    fabricate.pictures = False
    fabricate.run("a4")
    stale = tmp_path / "report-sensitivity.csv"
    stale.write_text("old\n")
    build_report([fabricate.root], tmp_path / "report.html")
    assert stale.read_text() == "run,plan,seed,layer,activation_bits,mse\n"


def test_latex_is_booktabs_and_escaped(report):
    latex = report.with_name("report-summary.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex
    assert r"fid\_digits" in latex
    assert latex.count(r"\\") == 1 + 12  # head and rows


@pytest.fixture
def untrained_report(fabricate, tmp_path):
    fabricate.pictures = False
    fabricate.run("quarot-w4a4")
    allocated = ["bits.of=weight", "bits.mean=3", "bits.choices=[2,3,4]", "bits.steps=0"]
    fabricate.run("quarot-w4a4", 1, overrides=allocated)
    fabricate.run("a2")
    return build_report([fabricate.root], tmp_path / "report.html")


def test_the_report_shows_weight_bits_and_no_training(untrained_report, parse_page):
    page = parse_page(untrained_report)
    table = page.table("What each plan on")
    rows = {(row[0].text, row[0].small): row for row in table.rows}
    names = [cell.text for cell in table.head]
    assert {"centring", "scaling", "other layers"}.isdisjoint(names)
    place = ("quarot-w4a4", "PTQ, bits.mean = not set")
    assert rows[place][names.index("weights")].text == "gptq, 4 bits"
    assert rows[place][names.index("QAT steps")].text == "0 (PTQ)"
    assert rows["a2", ""][names.index("QAT steps")].text == "500"
    costs = {(row[0].text, row[0].small): row for row in page.table("What each plan costs").rows}
    cell = costs[place][1]
    # A scale of 16 bits for each of 1,296 rows of 248,832 weights.
    assert (cell.text, cell.small) == ("4", f"{4 + 16 * 1296 / 248832:.2f}")


def test_allocated_weight_bits_are_not_called_activation_bits(untrained_report, parse_page):
    page = parse_page(untrained_report)
    assert "Weight bits, training seed 1." in page.text
    assert len(alts(page, "Weight bits of quarot-w4a4")) == 1
    lines = rows_of(untrained_report.with_name("report-allocation.csv"))
    filled = {
        (line["plan"], line["seed"], bool(line["activation_bits"]), bool(line["weight_bits"]))
        for line in lines
    }
    assert filled == {
        ("a2", "0", True, False),
        ("quarot-w4a4", "0", True, False),
        ("quarot-w4a4", "1", False, True),
    }


def test_layer_names_become_places_in_the_grid():
    names = {"blocks.10.attn.qkv": 1, "transformer_blocks.3.ff.net.2": 2, "final_layer.linear": 3}
    found = by_block(names)
    assert found.stack().dropna().to_dict() == {("qkv", 10): 1, ("ff.net.2", 3): 2}


def test_a_large_picture_is_halved_until_it_fits_and_a_small_one_is_left_alone():
    noise = Image.frombytes("RGB", (512, 512), random.Random(0).randbytes(512 * 512 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    data, factor = fit(buffer.getvalue(), 100_000)
    assert len(data) <= 100_000
    assert Image.open(io.BytesIO(data)).size == (512 // factor, 512 // factor)
    assert fit(buffer.getvalue(), 2_000_000) == (buffer.getvalue(), 1)
