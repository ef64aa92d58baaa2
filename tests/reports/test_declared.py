"""Verdicts on declared claims from run folders, recomputed by SciPy; their CSV, export and page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reports import build_report
from reports.declared import declared_section
from robuq_bench.claims.declared import Claim, parse_claims
from robuq_bench.claims.exporting import export_runs
from robuq_bench.claims.judging import Runs, _holds, judge
from robuq_bench.claims.measured import Measured
from robuq_bench.claims.planning import Cell, Planner
from robuq_bench.claims.tables import claims_rows, steps_to_teacher, teacher_curves
from robuq_bench.runs.run_files import run_folders, verify_run
from robuq_bench.statistics.comparisons import MARGIN
from robuq_bench.statistics.verdicts import Verdict
from robuq_bench.study_index import find_study

from .conftest import RANGES

TEXT = """
[defaults]
budgets = [500]
[arms]
a4 = {plan = "a4", set = [ONE]}
b4 = {plan = "baseline-a4", set = [ONE]}
a2 = {plan = "a2-uniform", set = [ONE]}
b2 = {plan = "baseline-a2", set = [ONE]}
fp = {plan = "fp", set = [ONE]}
wide4 = {plan = "a4", set = [WIDE]}
own4 = {plan = "a4", set = [OWN]}
wide2 = {plan = "a2-uniform", set = [WIDE]}
own2 = {plan = "a2-uniform", set = [OWN]}
[claims]
h4 = {text = "Hadamard at 4", candidate = "a4", baseline = "b4", expect = "better", family = "f"}
h2 = {text = "Hadamard at 2", candidate = "a2", baseline = "b2", expect = "worse", family = "f"}
gain = {text = "Gain", candidate = ["a2", "b2"], baseline = ["a4", "b4"], expect = "better", family = "f"}
teacher = {text = "Teacher", candidate = "a4", baseline = "fp", expect = "equivalent", family = "t"}
ranges = {text = "Ranges", candidate = "wide2", baseline = "wide4", expect = "worse", family = "w"}
own = {text = "Own ranges", candidate = "own2", baseline = "own4", expect = "worse", family = "o"}
recall = {text = "Recall", candidate = "a4", baseline = "b4", expect = "better", family = "m", metric = "recall"}
budgets = {text = "Steps", candidate = "a2", baseline = "b2", expect = "better", family = "s", budgets = [500, 2000]}
"""  # noqa: E501
WIDE = list(RANGES)
ONE = [*RANGES, "evaluation.seed_ranges=1"]
OWN = [*RANGES, "evaluation.image_seeds=own"]
for name, given in (("ONE", ONE), ("WIDE", WIDE), ("OWN", OWN)):
    TEXT = TEXT.replace(f"[{name}]", str(given).replace("'", '"'))
SEEDS = range(8)
VERSION = find_study("train-and-eval").version
FIDS = {"a4": 6.0, "baseline-a4": 8.0, "a2-uniform": 17.0, "baseline-a2": 30.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, fabricator) -> Path:
    """Runs of every arm; the recall of the arms is that of the fabricator."""
    maker = fabricator(tmp_path_factory.mktemp("claims") / "runs", logged=1, pictures=False)
    maker.run("fp", version=VERSION, overrides=ONE[-1:])
    for seed in SEEDS:
        for plan, fid in FIDS.items():
            maker.run(plan, seed, version=VERSION, overrides=ONE[-1:], fid=fid)
        for plan in ("a4", "a2-uniform"):
            maker.run(plan, seed, version=VERSION, fid=FIDS[plan])
            maker.run(plan, seed, version=VERSION, overrides=OWN[-1:], fid=FIDS[plan])
        for plan in ("a2-uniform", "baseline-a2"):
            longer = [ONE[-1], "training.steps=2000"]
            maker.run(
                plan,
                seed,
                version=VERSION,
                overrides=longer,
                fid=FIDS[plan] / (4 if plan[0] == "a" else 2),
            )
    return maker.root


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "claims.toml"
    path.write_text(TEXT)
    return path


def runs_in(root: Path) -> Runs:
    return Runs(Planner(parse_claims(TEXT, "claims")), run_folders(root))


@pytest.fixture(scope="module")
def judged(root: Path, file: Path):
    return {(one.key, one.steps): one for one in judge(runs_in(root), file)}


def measured(
    root: Path, plan: str, metric="fid_digits", ranges=1, steps=500, images="none"
) -> np.ndarray:
    """[seeds, ranges] straight from config.toml and results.jsonl."""
    found = {}
    for folder in root.glob(f"train-and-eval/{plan}-digits-*"):
        config = (folder / "config.toml").read_text()
        lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        own = [r[metric] for r in lines if r.get("subject") == "student"]
        if (
            len(own) == ranges
            and f'image_seeds = "{images}"' in config
            and f"steps = {steps}\nbatch_size = 64\nlearning_rate = 0.001\n" in config
        ):
            found[int(config.partition("seed = ")[2].partition("\n")[0])] = own
    return np.array([found[seed] for seed in sorted(found)])


def test_verdicts_are_those_of_scipy_on_the_run_folders(root, judged):
    logs = {plan: np.log(measured(root, plan)).ravel() for plan in FIDS}
    assert all(len(values) == 8 for values in logs.values())
    contrasts = {
        "h4": logs["a4"] - logs["baseline-a4"],
        "h2": logs["a2-uniform"] - logs["baseline-a2"],
        "gain": logs["a2-uniform"] - logs["baseline-a2"] - logs["a4"] + logs["baseline-a4"],
        "teacher": logs["a4"] - np.log(measured(root, "fp")).ravel(),
    }
    recalls = [measured(root, plan, "recall_digits") for plan in ("a4", "baseline-a4")]
    contrasts["recall"] = np.log(recalls[0] / recalls[1]).ravel()
    p_values = {}
    for key, d in contrasts.items():
        expected = stats.ttest_1samp(d, 0)
        interval = expected.confidence_interval(0.95)
        verdict = judged[key, 500].verdict
        assert verdict.n == 8
        assert verdict.effect == pytest.approx(math.exp(d.mean()), rel=1e-9)
        assert np.log([verdict.low, verdict.high]) == pytest.approx([*interval], abs=1e-9)
        assert verdict.p_value == pytest.approx(expected.pvalue, rel=1e-6)
        error, t = stats.sem(d), stats.t(7)
        assert math.log(verdict.detectable) == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * error)
        p_values[key] = expected.pvalue
    # Holm: the smallest of three is tripled, the next doubled, and none below one before it
    least = 0.0
    for place, key in enumerate(sorted(("h4", "h2", "gain"), key=p_values.__getitem__)):
        least = max(least, min(1.0, (3 - place) * p_values[key]))
        assert judged[key, 500].verdict.p_adjusted == pytest.approx(least, rel=1e-6)


def test_seeds_and_ranges_are_paired(root, judged):
    d = np.log(measured(root, "a2-uniform", ranges=3) / measured(root, "a4", ranges=3))
    verdict = judged["ranges", 500].verdict
    assert d.shape == (8, 3)
    assert verdict.effect == pytest.approx(math.exp(d.mean()), rel=1e-3)
    assert "image range" in verdict.test
    assert (verdict.verdict, judged["ranges", 500].holds) == ("worse", "holds")


def test_ranges_of_own_images_are_averaged_seed_by_seed(root, judged):
    a2, a4 = (measured(root, plan, ranges=3, images="own") for plan in ("a2-uniform", "a4"))
    expected = stats.ttest_1samp(np.log(a2 / a4).mean(axis=1), 0)
    interval, verdict = expected.confidence_interval(0.95), judged["own", 500].verdict
    assert np.log([verdict.low, verdict.high]) == pytest.approx([*interval], abs=1e-9)
    assert verdict.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert verdict.test == "paired t over seeds (images of its own for each seed)"


def test_words_follow_from_what_was_expected(judged):
    words = {key: (one.verdict.verdict, one.holds) for key, one in judged.items()}
    assert words["h4", 500] == words["gain", 500] == ("better", "holds")
    assert words["h2", 500] == ("better", "does not hold")  # worse was expected
    assert words["teacher", 500] == ("worse", "does not hold")
    assert words["budgets", 2000] == ("better", "holds")
    assert judged["recall", 500].metric == "recall_digits"
    assert judged["recall", 500].verdict.effect > 1  # and of recall, more is better
    assert words["recall", 500][0] in ("better", "equivalent")


@pytest.mark.parametrize(
    ("low", "high", "word", "expect", "holds"),
    [
        (0.98, 1.02, "equivalent", "equivalent", "holds"),
        (0.98, 1.02, "equivalent", "better", "does not hold"),
        (0.90, 0.99, "better", "equivalent", "undecided"),  # partly within the margin
        (0.90, 0.96, "better", "equivalent", "does not hold"),
        (1.04, 1.20, "worse", "equivalent", "does not hold"),
        (0.90, 0.96, "undecided", "better", "undecided"),  # Holm took the word
        (0.90, 0.96, "better", "worse", "does not hold"),
        (0.90, 1.20, "not judged", "better", "not judged"),
    ],
)
def test_holds(low, high, word, expect, holds):
    claim = Claim(text="x", candidate="a", baseline="b", expect=expect, family="f")
    verdict = Verdict(
        claim="x", subject="y", verdict=word, effect=(low * high) ** 0.5, effect_name="ratio",
        low=low, high=high, n=8, n_of="training seeds", test="t", p_value=None,
    )  # fmt: skip
    assert _holds(verdict, claim) == holds
    assert claim.margin == pytest.approx(1 - MARGIN)


def test_no_word_before_every_declared_seed_is_finished(fabricate, file):
    fabricate.pictures = False
    for seed in range(8):
        fabricate.run("a4", seed, version=VERSION, overrides=ONE[-1:], fid=6)
        fabricate.run(
            "baseline-a4", seed, version=VERSION, overrides=ONE[-1:], fid=8, finish=seed != 3
        )
    found = {one.key: one for one in judge(runs_in(fabricate.root), file)}["h4"]
    assert (found.verdict.n, found.verdict.verdict, found.holds) == (7, *["not judged"] * 2)
    assert found.verdict.effect < found.verdict.high < 1  # the numbers stand
    assert found.verdict.p_value is None
    assert found.verdict.note == "not all declared runs are finished: b4 lacks seed 3"
    manifest = next(p for p in fabricate.root.glob("*/baseline-a4-*/manifest.json")
                    if not (p.parent / "DONE").exists())  # fmt: skip
    held = json.loads(manifest.read_text())
    held["sessions"][-1]["status"] = "failed: RobuqError"
    manifest.write_text(json.dumps(held))
    found = {one.key: one for one in judge(runs_in(fabricate.root), file)}["h4"]
    assert (found.verdict.verdict, found.holds) == ("not judged", "not judged")
    assert "b4 seed 3 failed: RobuqError" in found.verdict.note


class _Given(Runs):
    """Values by cell in place of run folders; None is of a cell without a run."""

    def __init__(self, planner, value, cpu_hours=0.5):
        super().__init__(planner, [])
        self.value, self.cpu_hours = value, cpu_hours

    def of(self, cell):
        value = self.value(cell)
        if value is None:
            return None
        lines = (
            *(("teacher", 0, "fid", 1.0), ("student", 0, "fid", value)),
            ("student", 0, "recall", 1.0),
        )
        return Measured(f"{cell.arm}-{cell.seed}", lines, self.cpu_hours, "")


def _noisy(cell: Cell) -> float:
    level = {"a4": 0.965, "b4": 1.0, "a2": 1.02, "b2": 1.03}.get(cell.arm, 1.1)
    return level * math.exp(0.02 * math.sin(7 * cell.seed + 3 * len(cell.arm) + ord(cell.arm[0])))


def test_claims_of_a_family_that_are_not_judged_yet_count(file):
    planner = Planner(parse_claims(TEXT, "claims"))
    alone = _Given(planner, lambda cell: _noisy(cell) if cell.arm in ("a4", "b4") else None)
    early = {one.key: one.verdict for one in judge(alone, file)}
    assert [early[key].verdict for key in ("h2", "gain")] == ["not judged", "not judged"]
    assert early["h2"].p_adjusted is None
    # of three hypotheses, whatever the others will say: the most that Holm can ask
    assert early["h4"].p_adjusted == pytest.approx(min(1, 3 * early["h4"].p_value))
    late = {one.key: one.verdict for one in judge(_Given(planner, _noisy), file)}
    assert late["h4"].p_adjusted <= early["h4"].p_adjusted


def test_tuned_beside_untuned_is_not_judged(file):
    declared = parse_claims(TEXT, "claims")

    def note(*arms: str) -> dict[str, str]:
        planner = Planner(declared, {("digits", arm): 2e-3 for arm in arms})
        judged = judge(_Given(planner, _noisy), file)
        return {one.key: one.verdict.note for one in judged if one.holds == "not judged"}

    assert note() == note("a4", "b4", "a2", "b2") == {}
    half = note("a4")
    assert half["h4"] == "learning rate tuned of a4 but not of b4; run `claims tune`"
    assert sorted(half) == ["gain", "h4", "recall"]  # of the teacher nothing is trained


def test_a_value_without_logarithm_costs_its_claim_alone(file):
    planner = Planner(parse_claims(TEXT, "claims"))
    runs = _Given(planner, lambda c: -0.1 if (c.arm, c.seed) == ("b2", 3) else _noisy(c))
    found = {(one.key, one.steps): one for one in judge(runs, file)}
    note = found["h2", 500].verdict.note
    assert "b2, seed 3" in note
    assert "difference_margin" in note
    assert found["h2", 500].holds == "not judged"
    assert found["h4", 500].holds != "not judged"
    assert set(teacher_curves(runs)["arm"]) == {"a2"}


def test_hours_that_were_not_recorded_are_not_known(file):
    planner = Planner(parse_claims(TEXT, "claims"))
    for hours, total in ((0.5, 8.0), (None, None)):
        found = {one.key: one for one in judge(_Given(planner, _noisy, hours), file)}
        assert found["h4"].cpu_hours == total


def test_the_table_names_file_runs_and_hours(root, file, judged):
    frame = pd.DataFrame(claims_rows(judged.values(), file)).set_index(["claim", "steps"])
    row = frame.loc[("h4", 500.0)]
    assert len(row["runs"].split()) == 16
    assert row["claims_commit"] == ""  # not in a repository
    assert len(set(frame["claims_sha256"])) == 1
    texts = [(root / "train-and-eval" / name / "results.jsonl").read_text()
             for name in row["runs"].split()]  # fmt: skip
    seconds = [json.loads(text.splitlines()[-1])["cpu_s"] for text in texts]
    assert row["cpu_hours"] == pytest.approx(sum(seconds) / 3600, abs=1e-4)


def test_exported_runs_give_the_same_verdicts(root, file, judged, tmp_path):
    folders = [folder for folder in run_folders(root) if "a4" in folder.name]
    written = export_runs(folders, tmp_path / "kept")
    assert [verify_run(folder) for folder in written] == [[]] * len(folders)
    found = {one.key: one for one in judge(runs_in(tmp_path / "kept"), file)}
    assert found["h4"].verdict == judged["h4", 500].verdict or (
        found["h4"].verdict.p_value == judged["h4", 500].verdict.p_value  # another family
    )
    assert found["h2"].verdict.verdict == "not judged"
    manifest = json.loads((written[0] / "manifest.json").read_text())
    assert set(manifest["outputs"]) == {"config.toml", "results.jsonl"}
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 30_000 * len(folders)
    again = export_runs(written, tmp_path / "again")
    assert (again[0] / "DONE").read_text() == (written[0] / "DONE").read_text()


def test_curves_and_steps_to_the_teacher(root):
    curves = teacher_curves(runs_in(root))
    assert sorted(set(curves["arm"])) == ["a2", "b2"]
    own = curves[curves["arm"] == "a2"].set_index("steps")
    level = np.log(measured(root, "fp")).mean()  # the teacher's values are cited in every run
    for steps in (500, 2000):
        expected = math.exp(np.log(measured(root, "a2-uniform", steps=steps)).mean() - level)
        assert own.loc[steps, "ratio"] == pytest.approx(expected)
        assert own.loc[steps, "low"] < expected < own.loc[steps, "high"]
    within = 1.5
    near = steps_to_teacher(curves, within).set_index("arm")
    x, y = np.log([2000, 500]), np.log(own["ratio"].loc[[2000, 500]])
    assert near.loc["a2", "relation"] == "about"
    assert math.log(near.loc["a2", "steps"]) == pytest.approx(np.interp(math.log(within), y, x))
    assert tuple(near.loc["b2", ["relation", "steps"]]) == ("more than", 2000)
    assert set(steps_to_teacher(curves, 99)["relation"]) == {"at most"}


def test_the_report_shows_effects_curves_and_the_checklist(
    root, file, judged, tmp_path, parse_page
):
    runs = runs_in(root)
    curves = teacher_curves(runs)
    rows = claims_rows(judged.values(), file)
    section = declared_section([*judged.values()], rows, curves, steps_to_teacher(curves))
    assert section is not None
    output = build_report([root], tmp_path / "report.html", first=[section])
    page = parse_page(output)
    table = page.table("Declared claims on digits")
    cell = table.cell("Hadamard at 4", "effect")
    assert cell.text == f"{judged['h4', 500].verdict.effect:.3f}"
    assert cell.href.removeprefix("#") in page.ids
    assert table.cell("Hadamard at 2", "holds").text == "does not hold"
    checklist = page.table("Claims declared before their runs")
    assert checklist.cell("Hadamard at 4", "verdict").text == "holds"
    pictures = [attributes["aria-label"] for tag, attributes in page.tags
                if tag == "svg" and "aria-label" in attributes]  # fmt: skip
    assert any(text.startswith("Effects of claims: ") for text in pictures)
    assert any(text.startswith("candidate ÷ baseline by steps") for text in pictures)
    assert any(text.startswith("fid_digits ÷ teacher’s by steps") for text in pictures)
    assert "Steps to 1.2× the teacher’s value" in page.text
    exported = pd.read_csv(tmp_path / "report-declared.csv")
    assert exported["holds"].tolist() == [one.holds for one in judged.values()]
    words = [one.holds for one in judged.values()]
    assert (
        f"Of 9 declared claims (by workload and budget), {words.count('holds')} holds" in page.text
    )
    assert declared_section([*judged.values()][:0], rows, curves, curves) is None


def test_a_cell_names_itself():
    assert str(Cell("digits", "a4", 2000, 3)) == "a4 on digits, 2,000 steps, seed 3"
