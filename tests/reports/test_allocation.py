"""The section on `study allocation`, on recorded tables of an older format and on made-up ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from copies import RecordedTables, judged

from reports import build_report
from robuq_bench.statistics.verdicts import Verdict, verdict_rows

from .conftest import parse

TABLES = RecordedTables("allocation")
make_run = TABLES.make_run


def number(text: str) -> float:
    return float(text.replace("−", "-").rstrip("×% s"))


def test_recorded_tables_are_shown_with_their_verdicts(tmp_path: Path) -> None:
    page = parse(build_report([make_run(tmp_path / "runs")], tmp_path / "report.html"))
    table = page.table("Candidates beside uniform bits")
    for row in TABLES["verdicts"].to_dict("records"):
        metric = "fid_digits" if row["target"] == "fid" else row["target"]
        cell = table.cell(row["candidate"], f"{metric}, {row['budget']:g} bits")
        assert number(cell.text) == pytest.approx(row["ratio_of_means"], rel=0.005)
        assert cell.small == row["beats_uniform"]
    assert (
        "At a mean of 2 bits, AMPN (qat) reaches 0.962× the distillation_loss of uniform bits "
        "(undecided) and 1.01× the fid_digits of uniform bits (undecided), over 3 training seeds."
    ) in page.text
    assert "candidate’s worst training seed" in page.text
    assert judged(tmp_path) == TABLES["verdicts"]["beats_uniform"].tolist()
    beside = pd.read_csv(tmp_path / "report-allocation-candidates.csv")
    assert beside.columns[0] == "run"
    pd.testing.assert_frame_equal(beside.drop(columns="run"), TABLES["candidates"])


def test_means_bits_solvers_and_timesteps_are_those_of_the_run(tmp_path: Path) -> None:
    page = parse(build_report([make_run(tmp_path / "runs")], tmp_path / "report.html"))
    table = page.table("Trained networks of every candidate")
    heads = [cell.text for cell in table.head]
    for row, line in zip(TABLES["candidates"].to_dict("records"), table.rows, strict=True):
        cells = dict(zip(heads, line, strict=True))
        assert cells["candidate"].text == row["candidate"]
        loss = cells["distillation_loss"]
        assert number(loss.text) == pytest.approx(row["distillation_loss"], rel=0.005)
        low, high = loss.small.strip("[]").split("–")
        assert float(low) == pytest.approx(row["distillation_loss_min"], rel=0.005)
        assert float(high) == pytest.approx(row["distillation_loss_max"], rel=0.005)
        assert cells["fid_digits"].text == f"{row['fid']:.2f}"
    for name in ("solvers", "timestep_aware"):
        assert len(page.table(f"{name} of a4").rows) == len(TABLES[name])
    labels = [found["aria-label"] for tag, found in page.tags if tag == "svg"]
    bits = next(text for text in labels if text.startswith("bits by layer type, mean of 2"))
    means = TABLES["by_type"].query("candidate == 'fisher' and budget == 2").iloc[0]
    assert f"fisher proj {means['proj']:.3g} qkv {means['qkv']:.3g}" in bits
    assert "the paper proj 2.75 qkv 2.21 fc1 2 fc2 1.64" in bits
    assert "qat and ptq name the same bits at a mean of 3." in page.text


def test_new_verdicts_are_read_and_not_judged_again(tmp_path: Path) -> None:
    metric = "distillation_loss"
    verdicts = [
        Verdict(
            claim=f"{metric} of {candidate} differs from that of {baseline} at a mean of 2 bits",
            subject=f"{candidate} over {baseline}, 2 bits, {metric}",
            verdict=word,
            effect=0.98,
            effect_name=f"ratio of geometric means of {metric}",
            low=0.9696,
            high=0.9996,
            n=5,
            n_of="training seeds",
            test="paired t over seeds",
            p_value=0.04,
        )
        for candidate, baseline, word in (
            ("qat", "uniform", "better"),
            ("random", "uniform", "worse"),
            ("qat", "ptq", "equivalent"),
        )
    ]
    rows = pd.DataFrame(verdict_rows(verdicts, "the rule of this study"))
    path = make_run(tmp_path / "runs", verdicts=rows)
    page = parse(build_report([path], tmp_path / "report.html"))
    # Neither limit is rounded to the other side of 0.97 or of 1.
    limits = "[0.9696 to 0.9996]"
    assert f"AMPN (qat) reaches 0.980× {limits} the distillation_loss of uniform" in page.text
    table = page.table("Candidates beside uniform bits")
    assert [line[0].text for line in table.rows] == ["qat", "random"]
    assert table.cell("random", f"{metric}, 2 bits").small == f"{limits} worse"
    assert "the rule of this study" in page.text
    assert judged(tmp_path) == [
        "better",
        "worse",
        "equivalent",
    ]


def test_one_seed_of_version_1_is_not_judged(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", verdicts=TABLES["verdicts"].assign(seeds=1))
    page = parse(build_report([path], tmp_path / "report.html"))
    assert "uniform bits (not judged)" in page.text
    assert set(judged(tmp_path)) == {"not judged"}


def test_few_tables_a_shard_and_two_runs(tmp_path: Path) -> None:
    few = [name for name in TABLES.paths if name in ("verdicts", "solvers", "timestep_aware")]
    page = parse(build_report([make_run(tmp_path / "few", but=few)], tmp_path / "few.html"))
    assert "AMPN (qat) and uniform bits were not judged." in page.text
    assert page.table("Trained networks of every candidate").rows
    page = parse(
        build_report([make_run(tmp_path / "shard", but=[*TABLES.paths])], tmp_path / "shard.html")
    )
    assert "without a verdict" in page.text
    for plan in ("a4", "baseline-a4"):
        make_run(tmp_path / "both", plan)
    page = parse(build_report([tmp_path / "both"], tmp_path / "both.html"))
    assert len(page.ids) == len(set(page.ids))
    assert sum(t.caption.startswith("Candidates beside uniform") for t in page.tables) == 2
