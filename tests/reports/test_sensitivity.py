"""The section on `study sensitivity`, on recorded tables of an older format and on made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from copies import RecordedTables, judged

from reports import build_report
from robuq_bench.statistics.verdicts import Verdict, verdict_rows

from .conftest import parse

TABLES = RecordedTables("sensitivity")
make_run = TABLES.make_run


def two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def test_recorded_tables_are_shown_with_their_verdicts(tmp_path: Path) -> None:
    report = build_report([make_run(tmp_path / "runs")], tmp_path / "report.html")
    page = parse(report)
    table = page.table("Do sensitivities measured before training mislead?")
    old, agreement = TABLES["verdicts"], TABLES["agreement"]
    own = agreement.query("metric == 'epsilon_mse' and target == 'distillation_loss'")
    for row in old.to_dict("records"):
        width = {"1": "1 bit", "all": "all bit widths"}.get(row["bits"], f"{row['bits']} bits")
        assert table.cell(width, "verdict").text == row["ptq_sensitivities_mislead"]
        shown = float(table.cell(width, "gain").text.replace("−", "-"))
        assert shown == pytest.approx(row["gain"], rel=0.05)
        for steps, word in ((0, "before"), (200, "after")):
            found = own[(own["bits"] == row["bits"]) & (own["steps"] == steps)].iloc[0]
            assert table.cell(width, f"ρ {word}").text == two(found["spearman"])
            assert table.cell(width, f"τ {word}").text == two(found["kendall"])
        assert table.cell(width, "seeds").text == two(row["seed_agreement"])
    # The lower limit is -0.00087: rounding must not hide that it lies below 0.
    assert table.cell("all bit widths", "gain").small == "[−0.00087 to 0.05331]"
    assert "a gain of 0.025 [−0.00087 to 0.05331]; the truth’s noise caps ρ near 0.92" in page.text
    assert judged(tmp_path) == old["ptq_sensitivities_mislead"].tolist()
    beside = pd.read_csv(tmp_path / "report-sensitivity-agreement.csv")
    assert beside.columns[0] == "run"
    pd.testing.assert_frame_equal(beside.drop(columns="run"), agreement)


def test_figures_say_their_numbers(tmp_path: Path) -> None:
    page = parse(build_report([make_run(tmp_path / "runs")], tmp_path / "report.html"))
    labels = [found["aria-label"] for tag, found in page.tags if tag == "svg"]
    agreement = TABLES["agreement"].query("target == 'distillation_loss' and bits == 'all'")
    label = next(text for text in labels if "with the truth, all bit widths" in text)
    for row in agreement.query("steps == 0").to_dict("records"):
        assert f"{row['metric']} before training {two(row['spearman'])}" in label
    assert label.endswith("cap 0.92")
    truth = TABLES["truth"].query("target == 'distillation_loss'")
    assert any(f"{truth['increase'].max():.2g}" in text for text in labels if "trains at" in text)


def test_new_verdicts_and_regret_are_read(tmp_path: Path) -> None:
    verdicts = [
        Verdict(
            claim=f"Sensitivities measured before training mislead: {width}",
            subject=width,
            verdict=word,
            effect=0.2,
            effect_name="gain of Spearman’s ρ",
            low=0.1,
            high=0.3,
            n=16,
            n_of="layers",
            test="bootstrap over layers",
            p_value=0.001,
            p_adjusted=0.004,
        )
        for width, word in (("all bit widths", "holds"), ("1 bit", "not judged"))
    ]
    regret = pd.DataFrame(
        {
            "steps": [0, 200, 0, 200],
            "metric": ["epsilon_mse"] * 2 + ["fisher"] * 2,
            "target": "distillation_loss",
            "budget": 2,
            "regret": [0.0012, 0.0, 0.0034, 0.0021],
        }
    )
    rows = pd.DataFrame(verdict_rows(verdicts, "the rule of this study"))
    page = parse(
        build_report(
            [make_run(tmp_path / "runs", verdicts=rows, regret=regret)], tmp_path / "report.html"
        )
    )
    assert "Sensitivities measured before training mislead: over all bit widths" in page.text
    assert "the rule of this study" in page.text
    table = page.table("Do sensitivities measured before training mislead?")
    assert table.cell("1 bit", "verdict").text == "not judged"
    lost = page.table("Regret of the bits that a metric chooses")
    assert lost.cell("epsilon_mse", "2 bits, before training").text == "0.0012"
    assert lost.cell("fisher", "2 bits, after training").text == "0.0021"


def test_few_tables_a_shard_and_two_runs(tmp_path: Path) -> None:
    few = ("ceiling", "interactions", "timesteps", "recovered")
    one_seed = TABLES["gains"].assign(seed_agreement=np.nan)
    path = make_run(tmp_path / "few", but=few, gains=one_seed)
    page = parse(build_report([path], tmp_path / "few.html"))
    table = page.table("Do sensitivities measured before training mislead?")
    assert table.cell("1 bit", "cap of ρ").text == "not run"
    assert "caps ρ" not in page.text
    # With qat_steps = [0] there is no measurement after training.
    gains = TABLES["gains"].assign(steps_after=0, gain=0.0)
    old = TABLES["verdicts"].assign(steps_after=0, gain=0.0)
    path = make_run(tmp_path / "untrained", gains=gains, verdicts=old)
    page = parse(build_report([path], tmp_path / "untrained.html"))
    assert "with the trained truth is not defined" in page.text
    page = parse(
        build_report([make_run(tmp_path / "shard", but=[*TABLES.paths])], tmp_path / "shard.html")
    )
    assert "without a verdict" in page.text
    for plan in ("a4", "baseline-a4"):
        make_run(tmp_path / "both", plan)
    page = parse(build_report([tmp_path / "both"], tmp_path / "both.html"))
    assert len(page.ids) == len(set(page.ids))
    titles = [t.caption for t in page.tables if t.caption.startswith("Do sensitivities")]
    assert [title.split("? ")[1] for title in titles] == [
        "a4 on digits, seed 0",
        "baseline-a4 on digits, seed 0",
    ]
