"""A study that no module here knows: what it wrote is shown, and nothing else is needed."""

from __future__ import annotations

import base64
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import seaborn as sns

from reports import build_report, builder, generic
from reports.builder import section_modules
from robuq_bench.config import resolve
from robuq_bench.errors import CheckpointError
from robuq_bench.figures import colour, panel
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import Verdict, verdict_rows

from .conftest import parse

VERDICT = Verdict(
    claim="Warm tokens are wider", subject="tokens", verdict="holds", effect=1.25,
    effect_name="ratio of widths", low=1.1, high=1.4, n=6, n_of="images", test="paired t interval",
    p_value=0.01,
)  # fmt: skip


def write_run(
    root: Path, *, verdicts: list[dict[str, object]], rows: int = 2, seed: int = 0
) -> Path:
    config = resolve("my-question", "1", "a2", "digits", seed)
    with Run.open(root, config, ["bench.py", "study", "my_question.py"]) as run:
        run.write_table("verdicts", verdicts)
        run.write_table("widths", [{"image": i, "width": 1.5 * i} for i in range(rows)])
        with panel("widths", "widths by image") as drawn:
            sns.lineplot(x=[0, 1], y=[0, 1.5], ax=drawn.axes, color=colour("rotated"))
        drawn.picture.save(run.figure_path("widths"))
        run.finish()
        return run.path


def test_its_verdict_figure_and_table_are_on_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "runs", verdicts=verdict_rows([VERDICT], "holds above 1"))
    report = build_report([path], tmp_path / "report.html")
    page = parse(report)
    row = page.table("Verdicts").rows[0]
    assert [cell.text for cell in row] == [
        "Warm tokens are wider",
        "holds",
        "ratio of widths 1.25 [1.1 to 1.4]; n = 6 images; paired t interval",
    ]
    assert "Warm tokens are wider: holds" in page.text
    assert "holds above 1" in page.text
    assert page.table("widths of a2 on digits").cell("1", "width").text == "1.50"
    drawn = [found for tag, found in page.tags if tag == "img"]
    shown = base64.b64decode(drawn[0]["src"].partition(",")[2])
    assert shown == (path / "figures" / "widths.svg").read_bytes()
    claims = pd.read_csv(tmp_path / "report-claims.csv")
    assert claims["verdict"].tolist() == ["holds"]


def test_an_older_table_of_verdicts_is_a_table_among_others(tmp_path: Path) -> None:
    path = write_run(tmp_path / "runs", verdicts=[{"layer_type": "qkv", "verdict": "holds"}])
    page = parse(build_report([path], tmp_path / "report.html"))
    assert page.table("verdicts of a2 on digits").cell("qkv", "verdict").text == "holds"
    assert pd.read_csv(tmp_path / "report-claims.csv").empty


def test_a_damaged_verdict_leaves_the_run_out_and_names_the_file(tmp_path: Path) -> None:
    rows = verdict_rows([VERDICT], "holds above 1")
    bad = write_run(tmp_path / "bad", verdicts=[{**rows[0], "verdict": "perhaps"}])
    good = write_run(tmp_path / "good", verdicts=rows, seed=1)
    page = parse(build_report([bad, good], tmp_path / "report.html"))
    assert "perhaps" in page.table("Runs left out").rows[0][1].text
    assert "tables/verdicts.csv" in page.table("Runs left out").rows[0][1].text


def test_of_many_verdicts_the_answer_counts_the_words(tmp_path: Path) -> None:
    words = ["holds"] * 6 + ["does not hold"] * 3
    verdicts = [replace(VERDICT, subject=f"t{i}", verdict=word) for i, word in enumerate(words)]
    path = write_run(tmp_path / "runs", verdicts=verdict_rows(verdicts, "rule"))
    page = parse(build_report([path], tmp_path / "report.html"))
    counted = "Warm tokens are wider: holds for 6 of 9 and does not hold for 3 of 9; first t0, "
    assert counted in page.text
    assert "9 verdicts" in page.text


def test_one_bad_run_among_many_costs_few_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = verdict_rows([VERDICT], "rule")
    for seed in range(16):
        bad = seed == 11
        write_run(
            tmp_path / "runs", verdicts=[rows[0] | {"effect": "x"}] if bad else rows, seed=seed
        )
    made, make = [], builder._made
    monkeypatch.setattr(builder, "_made", lambda runs, *a: made.append(len(runs)) or make(runs, *a))
    # Those that are only tried are not written anywhere: another process may clean that.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    page = parse(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert len(page.table("Runs left out").rows) == 1
    assert len(page.table("Verdicts").rows) + len(page.table("Study: my-question").rows) >= 15
    assert sum(made) <= 6 * 16  # alone, each of them costs a report of its own


def test_a_fault_of_a_section_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run(tmp_path / "runs", verdicts=verdict_rows([VERDICT], "rule"))
    monkeypatch.setattr(generic, "drawn", lambda run: run.table("widths")["no such column"])
    with pytest.raises(
        CheckpointError, match=r"KeyError: 'no such column' in test_generic\.py, line \d"
    ):
        build_report([path], tmp_path / "report.html")


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "runs", verdicts=[{"verdict": "holds"}], rows=240)
    page = parse(build_report([path], tmp_path / "report.html"))
    assert len(page.table("widths of a2").rows) == 200
    assert "The first 200 of 240 rows" in page.text


def test_units_ranges_and_what_is_alike_are_printed_for_readers(tmp_path: Path) -> None:
    rows = [
        {"layer": layer, "peak_bytes": 2048 * n, "share_of_ceiling": 0.125 * n, "gb_s": 1500.0 * n,
         "fid": 0.5 * n, "fid_min": 0.4 * n, "fid_max": 0.5 * n + 0.1, "basis": "exact"}
        for n, layer in enumerate(("qkv", "proj"), start=1)
    ]  # fmt: skip
    with Run.open(tmp_path / "runs", resolve("my-question", "1", "a2", "digits", 0), []) as run:
        run.write_table("costs", rows)
        run.finish()
    table = parse(build_report([run.path], tmp_path / "report.html")).table("costs of a2")
    assert [cell.text for cell in table.head] == [
        *("layer", "peak_bytes", "share_of_ceiling", "gb_s", "fid")
    ]
    cells = [(cell.text, cell.small) for cell in table.rows[1]]
    assert cells[1:4] == [("4 KiB", ""), ("25 %", ""), ("3000", "")]
    assert cells[4] == ("1.00", "[0.80–1.10]")


def test_every_section_says_what_it_asks_and_what_it_writes() -> None:
    found = section_modules()
    assert "packed" in found
    assert "generic" not in found
    orders = [module.ORDER for module in found.values()]
    assert orders == sorted(set(orders))
    for module in found.values():
        assert module.QUESTION.endswith("?")
        assert all(name.endswith((".csv", ".tex")) for name in module.EXPORTS)
        assert isinstance(module.OPEN, tuple)


@pytest.mark.parametrize("name", ["packed.csv"])
def test_a_table_that_these_runs_lack_is_emptied(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path / "runs", verdicts=verdict_rows([VERDICT], "rule"))
    (tmp_path / f"report-{name}").write_text("of an older report\n")
    (tmp_path / "report-notes.csv").write_text("mine\n")
    build_report([path], tmp_path / "report.html")
    assert (tmp_path / f"report-{name}").read_text() == ""
    assert (tmp_path / "report-notes.csv").read_text() == "mine\n"
