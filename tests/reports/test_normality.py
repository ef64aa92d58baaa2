"""The section on normality: its words and numbers are those of the run's tables, old or new."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports import build_report
from robuq_bench.config import resolve
from robuq_bench.normality.judgements import output_verdicts, verdict_word, verdicts
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows

from .conftest import Page, parse

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "reports/recorded/digits-normality/runs/normality"
OLD = ROOT / "tests/golden/assets/old/finished/normality"
EARLY, LATE = "a2 after 20 steps", "a2 after 100 steps"
SUBJECTS = (LATE, EARLY, "teacher")
WIDTHS = {"adaLN": 12, "fc2": 48, "qkv": 12}
TRANSFORMS = ("identity", "hadamard", "randomized-hadamard")
BITS = (1, 2, 3, 4, 8)
#: (low, ratio, high); what is not named is (0.98, 0.99, 1.0).
RATIOS = {
    ("teacher", "qkv", "identity", 2): (2.1, 2.25, 2.4),
    ("teacher", "fc2", "hadamard", 2): (1.5, 1.625, 1.75),
    ("teacher", "fc2", "randomized-hadamard", 2): (1.03, 1.0442, 1.0496),
    ("teacher", "qkv", "randomized-hadamard", 4): (1.01, 1.04, 1.07),
    ("teacher", "fc2", "randomized-hadamard", 8): (1.0504, 1.06, 1.07),
}
Rows = list[dict[str, Any]]


def made_up() -> dict[str, Rows]:
    """Tables with the columns that the study writes; adaLN has too few images for a verdict."""
    names = ("types", "judgements", "cells", "output", "constant")
    tables: dict[str, Rows] = {name: [] for name in names}
    for transform, subject, (kind, width) in product(TRANSFORMS, SUBJECTS, WIDTHS.items()):
        key = {"subject": subject, "layer_type": kind, "width": width, "transform": transform}
        kl = 0.125 if transform == "identity" else -0.0021
        tables["types"].append(
            key
            | {
                "images": 16,
                "alpha": 0.05,
                "shapiro_w_median": 0.9 + width / 1000,
                "kl": kl,
                "kl_low": kl - 0.001,
                "kl_high": kl + 0.001,
                "kl_null_error": 0.0042,
            }
        )
        for bits in BITS if kind != "adaLN" else ():
            low, ratio, high = RATIOS.get((subject, kind, transform, bits), (0.98, 0.99, 1.0))
            judged = key | {
                "bits": bits,
                "ratio": ratio,
                "lower_95": low,
                "upper_95": high,
                "null_ratio": 1.0637 if bits == 8 else 1.001,
                "verdict": verdict_word(low, high),
            }
            is_drawn = transform == "randomized-hadamard"
            draws = {"sign_draws": 8} if is_drawn else {}
            if transform == "hadamard":
                draws = {"matrix_draws": 8, "draws_min": 0.9, "draws_max": 1.75}
                judged["matrix"] = "Sylvester 4 x Paley II 12"
            # fc2 at 4 bits is the only one that passes the rule of outputs.
            at = 1.02 if (kind, bits) == ("fc2", 4) else 2.0 + bits / 100
            output = {"error": at / 10, "ratio": at, "low": at - 0.01, "high": at + 0.01}
            tables["output"].append(
                key
                | output
                | {"bits": bits, "images": 16, "normal_error": 0.1, "error_low": at / 10 - 0.01}
                | {"error_high": at / 10 + 0.01, "centring_gain": 1.75, "gain_low": 1.5}
                | {"gain_high": 2.125}
            )
            judged |= {
                "output_ratio": at,
                "output_verdict": verdict_word(output["low"], output["high"]),
            }
            tables["judgements"].append(judged | draws)
        for block, timestep in product((0, 1), (250, 750)):
            ratio = 1.0 + block / 10 + (transform == "identity")
            tables["cells"].append(
                key
                | {
                    "layer": f"blocks.{block}.{kind}",
                    "block": block,
                    "timestep": timestep,
                    "ratio_2": ratio,
                    "ratio_2_high": ratio + 0.04,
                }
            )
    for subject, (kind, width) in product(SUBJECTS, WIDTHS.items()):
        share = {"share": 0.4375, "share_low": 0.42, "share_high": 0.45}
        key = {"subject": subject, "layer": None, "layer_type": kind, "width": width}
        tables["constant"].append(key | share)
    words = verdicts(tables["types"], tables["judgements"])
    of_outputs = output_verdicts(tables["types"], tables["output"])
    controls = [("gaussian", 12, 0.0625), ("laplace", 12, 0.75), ("gaussian", 48, 0.03125)]
    tests = [f"{test}_rejected" for test in ("shapiro", "anderson", "lilliefors", "dagostino")]
    return tables | {
        "verdicts": verdict_rows(words, "Holds below 1.05.")
        + verdict_rows(of_outputs, "Output below 1.05."),
        "controls": [
            {"control": name, "width": width, "transform": "identity", "shapiro_w_median": 0.987}
            | dict.fromkeys(tests, share)
            for name, width, share in controls
        ],
        "bound": [
            {
                "subject": "teacher",
                "layer_type": "qkv",
                "width": 12,
                "l3": l3,
                "bound": 0.56 * l3,
                "exact_distance": l3 / 50,
                "violated": l3 > 0.4,
                "alpha": 0.05,
            }
            for l3 in (0.3, 0.4, 0.5)
        ],
        "decay_slopes": [{"source": "real qkv", "slope": -1.11, "low": -1.28, "high": -0.996}],
        "sample_size": [
            {
                "layer_type": "qkv",
                "width": 12,
                "sample": sample,
                "n": n,
                "alpha": 0.05,
                "rejected": share,
            }
            for sample, share in (("identity", 0.75), ("gaussian null", 0.0625))
            for n in (8, 12)
        ],
    }


def write(root: Path, tables: dict[str, Rows], seed: int = 0) -> Path:
    config = resolve("normality", "3", "a2", "digits", seed)
    with Run.open(root, config, ["bench.py", "study", "normality"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.finish()
    return run.path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("normality")
    return build_report([write(root / "runs", made_up())], root / "report.html")


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return parse(report)


def claims_beside(report: Path) -> pd.DataFrame:
    """The section's claims; a report also has those of GPU runs that the package records."""
    claims = pd.read_csv(report.with_name(f"{report.stem}-claims.csv"))
    return claims[claims["claim"].str.startswith("Activations are normal enough for ")]


def alt(page: Page, start: str) -> str:
    alts = [found.get("aria-label", "") for tag, found in page.tags if tag == "svg"]
    return next(text for text in alts if text.startswith(start))


def test_the_answer_counts_layer_types_and_names_the_worst(page: Page) -> None:
    assert (
        "Layer types of the teacher that are normal enough with random signs before the Hadamard "
        "transform: 2 of 3 for 1, 2 and 3 bits and 1 of 3 for 4 and 8 bits; at 2 bits the highest "
        "error ratio is 1.044 [1.0300 to 1.0496] in fc2 (48), without the signs 1.625 [1.5 to 1.8] "
        "in fc2 (48)."
    ) in page.text


def test_every_verdict_of_every_subject_stands_with_its_numbers(page: Page) -> None:
    words = {"identity": "identity", "hadamard": "plain", "randomized-hadamard": "random signs"}
    for row in made_up()["judgements"]:
        if row["subject"] != "teacher" and row["transform"] == "identity":
            continue
        caption = f"Normal enough? {row['subject']}, {words[row['transform']]}"
        if row["transform"] == "identity":
            caption = f"Normal enough? {row['subject']}, before"
        unit = "bit" if row["bits"] == 1 else "bits"
        place = f"{row['layer_type']} ({row['width']})"
        cell = page.table(caption).cell(place, f"{row['bits']} {unit}")
        assert cell.text == row["verdict"]
        assert cell.small.startswith(f"{row['ratio']:.3f} [")
    shown = page.table("Normal enough? teacher, random signs")
    assert shown.cell("adaLN (12)", "2 bits").text == "not judged"
    assert [row[0].text for row in shown.rows] == ["qkv (12)", "fc2 (48)", "adaLN (12)"]
    assert "normal tokens: 1.064" in shown.head[5].small
    starts = [page.text.index(f"Before and after: {subject}") for subject in (EARLY, LATE)]
    assert starts == sorted(starts)


def test_no_limit_is_rounded_across_the_rule(page: Page) -> None:
    shown = page.table("Normal enough? teacher, random signs")
    assert shown.cell("fc2 (48)", "2 bits").small == "1.044 [1.0300 to 1.0496]"
    assert shown.cell("fc2 (48)", "8 bits").small == "1.060 [1.0504 to 1.0700]"


def test_the_checklist_has_the_first_subject_under_random_signs(report: Path) -> None:
    claims = claims_beside(report)
    assert len(claims) == len(WIDTHS) * len(BITS)
    assert claims["subject"].str.startswith("teacher, randomized-hadamard, ").all()
    judged = claims[claims["subject"].str.contains("fc2") & claims["claim"].str.endswith("2 bits")]
    (row,) = judged.to_dict("records")
    assert row["verdict"] == "holds"
    assert row["evidence"].startswith("mean error ratio 1.04 [1.0")
    assert "n = 16 images" in row["evidence"]
    assert "spread over 8 sign draws" in row["evidence"]
    assert (claims["verdict"] == "not judged").sum() == len(BITS)


def test_effects_stand_beside_those_of_normal_tokens(page: Page) -> None:
    shown = page.table("Before and after: teacher")
    assert shown.cell("qkv (12)", "W before").text == "0.9120"
    assert shown.cell("qkv (12)", "W normal").text == "0.9870"
    assert shown.cell("fc2 (48)", "KL before").text == "0.1250"
    assert shown.cell("fc2 (48)", "KL before").small == "[0.12 to 0.13]"
    assert shown.cell("fc2 (48)", "KL signs").text == "−0.0021"
    assert shown.cell("fc2 (48)", "KL normal").text == "0 ± 0.0042"


def test_figures_say_their_numbers(page: Page) -> None:
    ratios = alt(page, "Error ratio")
    assert "qkv (12) before 2.250 [2.1 to 2.4]" in ratios
    assert "fc2 (48) random signs 1.044 [1.0300 to 1.0496]" in ratios
    assert alt(page, "random signs") == (
        "random signs: in 6 of 12 cells the whole interval lies below 1.05; ratios from 1 to 1.10"
    )
    assert "before 75 % at n = 8, 75 % at n = 12; " in alt(page, "Share rejected") + "; "
    assert "normal tokens 6.25 % at n = 8" in alt(page, "Share rejected")
    assert alt(page, "3 tokens").endswith("exact distance 0.00600 to 0.0100, bound 0.168 to 0.280")


def test_evidence_and_caveats_are_those_of_the_tables(page: Page) -> None:
    assert "reject 3.12 % to 6.25 % of normal tokens" in page.text
    assert "at least 75 % before a transform (laplace, width 12)" in page.text
    assert "violated for 1 of 3 tokens" in page.text
    assert "it is 28.0× the exact distance in the median, which is at most 0.0100" in page.text
    assert "symmetric sums can reach −1: real qkv −1.11 [−1.280 to −0.996]." in page.text
    assert "the mean over 8 draws" in page.text
    assert "of the 10 in the first table, up to 0.25 can be expected" in page.text
    assert "Holds below 1.05." in page.text


def test_both_rules_stand_side_by_side_and_their_disagreement_is_said(page: Page) -> None:
    shown = page.table("Two rules side by side: teacher, random signs")
    assert shown.cell("fc2 (48), 2 bits", "token rule").text == "holds"
    cell = shown.cell("fc2 (48), 2 bits", "output rule")
    assert (cell.text, cell.small) == ("does not hold", "2.02 [2.01 to 2.03]")
    assert shown.cell("fc2 (48), 4 bits", "output rule").text == "holds"
    assert shown.cell("qkv (12), 2 bits", "constant energy").text == "43.8 %"
    assert shown.cell("qkv (12), 2 bits", "centring").text == "1.75×"
    assert (
        "The rules disagree for 8 of 10 of teacher, random signs: tokens “holds” but output “does "
        "not hold”: qkv (12) and fc2 (48) at 1 bit; qkv (12) and fc2 (48) at 2 bits"
    ) in page.text
    assert (
        "As good as normal in the layer’s output, where constant energy counts: 0 of 2 at 2 bits, "
        "with output ratios from 2.02. The limit is 1.05 of both."
    ) in page.text
    models = page.table("Output ratio, random signs, 2 bits by model")
    assert models.cell("fc2 (48)", "teacher").text == models.cell("fc2 (48)", LATE).text == "2.02"
    assert "Holds below 1.05. For outputs: Output below 1.05." in page.text


def test_the_matrix_and_the_range_over_others_are_named(page: Page) -> None:
    assert (
        "these are numbers of Sylvester 4 x Paley II 12. Error ratio at 2 bits of that matrix, and "
        "over 8 with it that have permuted rows and another column constant: "
    ) in page.text
    assert "fc2 (48) 1.62, range 0.90 to 1.75" in page.text


def test_exports_are_the_tables_of_the_run(report: Path) -> None:
    for name, source in (("types", "types"), ("verdicts", "judgements")):
        exported = pd.read_csv(report.with_name(f"report-normality-{name}.csv"))
        assert exported["run"].str.startswith("normality/a2-digits-").all()
        expected = pd.DataFrame(made_up()[source])
        pd.testing.assert_frame_equal(exported.drop(columns="run"), expected)
    assert r"fc2 (48) & 0.990" in report.with_name("report-normality.tex").read_text()


@pytest.mark.parametrize("folder", [RECORDED, OLD], ids=["recorded", "tiny"])
def test_runs_from_before_verdicts_had_one_form(folder: Path, tmp_path: Path) -> None:
    """Their words are translated, not judged again."""
    page = parse(build_report([folder], tmp_path / "report.html"))
    (path,) = folder.glob("*/tables/verdicts.csv")
    frame = pd.read_csv(path)
    own = frame[(frame["subject"] == "teacher") & (frame["transform"] == "randomized-hadamard")]
    new = {"normal enough": "holds", "not normal enough": "does not hold"}
    shown = page.table("Normal enough? teacher, random signs")
    for row in own.to_dict("records"):
        place = f"{row['layer_type']} ({row['width']})"
        cell = shown.cell(place, f"{row['bits']} bit{'s' if row['bits'] > 1 else ''}")
        assert cell.text == new.get(row["verdict"], row["verdict"])
    claims = claims_beside(tmp_path / "report.html")
    assert len(claims) == len(own)
    assert set(claims["verdict"]) == {new.get(word, word) for word in own["verdict"]}
    exported = pd.read_csv(tmp_path / "report-normality-verdicts.csv")
    pd.testing.assert_frame_equal(exported.drop(columns="run"), frame)


def test_a_run_that_judged_nothing_has_no_section(tmp_path: Path) -> None:
    tables = {"skipped": [{"transform": "every transform", "layer_type": "x", "width": 4}]}
    page = parse(build_report([write(tmp_path / "runs", tables)], tmp_path / "report.html"))
    assert "normality" not in page.ids
    assert "Study: normality" in page.text


def test_verdicts_alone_are_enough_and_other_runs_are_folded(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    tables = {name: made_up()[name] for name in ("types", "judgements", "verdicts")}
    paths = [write(root, tables, seed) for seed in (0, 1)]
    page = parse(build_report(paths, tmp_path / "report.html"))
    captions = [table.caption for table in page.tables]
    assert captions.count("Normal enough? teacher, random signs") == 2
    assert page.table("Before and after: teacher").cell("qkv (12)", "W normal").text == "not run"
    assert len(page.ids) == len(set(page.ids))
