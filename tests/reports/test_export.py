"""CSV and LaTeX beside the report, and the small pieces behind it."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from reports import build_report, text
from reports.aggregate import Summary
from reports.figures import MAX_CURVE_POINTS, by_block, log_ticks, loss_curve
from reports.loading import find_runs
from reports.pictures import fit_png, png_size
from reports.published import EVIDENCE, load_published, published_values

STYLE = Path(__file__).resolve().parents[2] / "reports/templates/style.css"


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_metrics_csv_holds_every_value_exactly(twelve_plans, report):
    rows = rows_of(report.with_name("report-metrics.csv"))
    for folder in twelve_plans.glob("train-and-eval/a2-digits-*"):
        for record in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
            if record.get("subject") == "student":
                (row,) = [
                    r
                    for r in rows
                    if r["run"].endswith(folder.name)
                    and r["subject"] == "student"
                    and r["metric"] == "fid_digits"
                    and r["seed_range"] == str(record["seed_range"])
                ]
                assert float(row["value"]) == record["fid_digits"]
    assert {row["num_samples"] for row in rows} == {"1000"}


def test_the_other_tables_hold_their_records(report, twelve_plans):
    tables = {path.stem.removeprefix("report-") for path in report.parent.glob("report-*.csv")}
    assert tables == {
        *("metrics", "summary", "allocation", "sensitivity", "training", "accounting", "claims")
    }
    sensitivity = rows_of(report.with_name("report-sensitivity.csv"))
    assert len(sensitivity) == 4 * 16 * 4  # runs of a3 and a2, layers, bit widths
    summary = rows_of(report.with_name("report-summary.csv"))
    assert {row["training_seeds"] for row in summary if row["plan"] == "a2"} == {"3"}
    verdicts = {row["verdict"] for row in rows_of(report.with_name("report-claims.csv"))}
    assert "holds" in verdicts
    assert "not run" in verdicts


def test_an_older_table_does_not_stay_behind(fabricate, tmp_path):
    fabricate.run("a4")
    stale = tmp_path / "report-sensitivity.csv"
    stale.write_text("old\n")
    build_report([fabricate.root], tmp_path / "report.html")
    assert rows_of(stale) == []
    assert "mse" in stale.read_text()


def test_latex_is_booktabs_and_escaped(report):
    latex = report.with_name("report-summary.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex
    assert r"fid\_digits" in latex
    assert not re.search(r"(?<!\\)[_#&%](?![^\n]*\\\\)", latex.replace("&", ""))
    assert latex.count(r"\\") == 1 + 12  # head and rows


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (1.9951, "1.995"),
        (0.012345, "0.01235"),
        (123456.7, "123457"),
        (2.5e-7, "2.500e-07"),
        (6.75e8, "6.750e+08"),
        (-0.5, "-0.5000"),
        (float("nan"), "not finite"),
    ],
)
def test_four_significant_digits(value, printed):
    assert text.significant(value) == printed


@pytest.mark.parametrize(
    ("value", "printed"),
    [(96, "96 B"), (2048, "2 KiB"), (177_620_000, "169 MiB"), (2_700_520_000, "2.52 GiB")],
)
def test_bytes_in_binary_units(value, printed):
    assert text.bytes_text(value) == printed


def test_a_range_below_zero_is_readable():
    summary = Summary(mean=-0.05, low=-0.0584, high=0.0531, count=3, seeds=1)
    assert text.spread("kid_digits", summary) == "[-0.0584 to 0.0531]"


def test_words_for_counts_and_times():
    assert text.count_text(675_130_000) == "675 M"
    assert text.count_text(7) == "7"
    assert text.seconds_text(41.37) == "41.4 s"
    assert text.seconds_text(305) == "5 min 05 s"
    assert text.seconds_text(3.5 * 3600) == "3 h 30 min"
    assert text.listing(["a", "b", "c"]) == "a, b and c"
    assert text.signed(-0.636) == "−0.64"


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


def test_long_curves_are_thinned_and_keep_their_last_point(fabricate):
    records = [
        {"key": f"train/{step}", "kind": "train", "step": step, "loss": 1 / step}
        for step in range(1, 1001)
    ]
    fabricate.run("a4", records=records, finish=False)
    curve = loss_curve(find_runs([fabricate.root]).runs[0])
    assert curve[0] == (1, 1)
    assert curve[-1] == (1000, 1 / 1000)
    assert len(curve) <= MAX_CURVE_POINTS + 1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.012, 0.9, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (1e-4, 1.0, [1e-4, 1e-3, 1e-2, 0.1, 1.0]),
        (0.021, 0.05, [0.025, 0.03, 0.04, 0.05]),
        (3.4, 120.0, [5.0, 10.0, 20.0, 50.0, 100.0]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round(low, high, ticks):
    assert log_ticks(low, high) == ticks


def test_layer_names_become_places_in_the_grid():
    names = {"blocks.10.attn.qkv": 1, "transformer_blocks.3.ff.net.2": 2, "final_layer.linear": 3}
    assert by_block(names) == {(10, "qkv"): 1, (3, "ff.net.2"): 2}


def test_a_large_picture_is_halved_until_it_fits_and_a_small_one_is_left_alone():
    noise = Image.frombytes("RGB", (512, 512), random.Random(0).randbytes(512 * 512 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    data, factor = fit_png(buffer.getvalue(), 100_000)
    assert len(data) <= 100_000
    assert png_size(data) == (512 // factor, 512 // factor)
    assert fit_png(buffer.getvalue(), 2_000_000) == (buffer.getvalue(), 1)


def luminance(colour):
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(theme):
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w[\w-]*): (#\w+);", blocks[theme]))
    pairs = [(name, "page") for name in ("text", "muted", "link", "neutral", "blue", "green")]
    pairs += [(name, "page") for name in ("orange", "purple")]
    pairs += [(name, "panel") for name in ("text", "muted")]
    pairs += [("good", "good-bg"), ("bad", "bad-bg"), ("open", "open-bg")]
    pairs += [(f"on{bits}", f"bits{bits}") for bits in (1, 2, 3, 4)]
    for front, back in pairs:
        lighter, darker = sorted((luminance(colours[front]), luminance(colours[back])))[::-1]
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)
