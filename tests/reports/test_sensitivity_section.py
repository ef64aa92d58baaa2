"""The section on `study sensitivity`: every number is made up, none was measured."""

from __future__ import annotations

import csv
import random
import re
from xml.etree import ElementTree

import pytest

from reports import build_report
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run

KINDS = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
LAYERS = [f"blocks.{b}.{part}.{kind}" for b in range(3) for kind, part in KINDS.items()]
METRICS = ("epsilon_mse", "epsilon_mse_teacher", "fisher")
STEPS, BITS, WIDTHS = (0, 40), (1, 2), (1, 2, "all")
VERDICTS = {1: "holds", 2: "does not hold", "all": "undecided"}


def made_up(seed=0):
    """The study's tables with the columns it writes."""
    rng = random.Random(seed)
    fields = {"top_k": 4, "resamples": 1000, "seed": 0}
    tables = {name: [] for name in ("truth", "metrics", "agreement", "ceiling", "timesteps")}
    for layer in LAYERS:
        kind = layer.rpartition(".")[2]
        for bits in (1, 2, 3):
            place = {"layer": layer, "layer_type": kind, "bits": bits}
            for steps in STEPS:
                for metric in METRICS:
                    fields_of = {"steps": steps, "metric": metric, **place}
                    tables["metrics"].append({**fields_of, "value": rng.uniform(-0.001, 0.03)})
                for bucket in (0, 1):
                    row = {"steps": steps, **place, "bucket": bucket}
                    tables["timesteps"].append({**row, "value": rng.uniform(1e-4, 1e-2)})
            if bits in BITS:
                for target in ("distillation_loss", "fid"):
                    row = {"target": target, **place, "increase": rng.uniform(-0.001, 0.01)}
                    tables["truth"].append({**row, "std": rng.uniform(0, 0.002), "seeds": 3})
    for steps in STEPS:
        for metric in METRICS:
            for target in ("distillation_loss", "fid"):
                for bits in WIDTHS:
                    rho = rng.uniform(-0.2, 0.9)
                    row = {"steps": steps, "metric": metric, "target": target, "bits": bits}
                    row |= {"items": 12, "spearman": rho, "spearman_low": rho - 0.3}
                    row |= {"spearman_high": rho + 0.1, "kendall": rho / 2}
                    row |= {"kendall_low": None, "kendall_high": None, **fields}
                    tables["agreement"].append({**row, "top_k_overlap": rng.choice((0.25, 0.5))})
    for target in ("distillation_loss", "fid"):
        for bits in WIDTHS:
            for seed in range(3):
                row = {"target": target, "bits": bits, "seed": seed}
                tables["ceiling"].append({**row, "spearman": 0.9 + 0.01 * seed, "kendall": 0.8})
    tables["verdicts"] = [
        {
            "bits": bits,
            "metric": "epsilon_mse",
            "target": "distillation_loss",
            "steps_before": 0,
            "steps_after": 40,
            "gain": 0.0123 * i - 0.01,
            "low": -0.2,
            "high": 0.0449,
            "ptq_sensitivities_mislead": VERDICTS[bits],
        }
        for i, bits in enumerate(WIDTHS)
    ]
    tables["recovered"] = [
        {"bits": 2, "top_k": 4, "metric": "epsilon_mse", "layer": "blocks.1.mlp.fc2"}
    ]
    tables["interactions"] = [
        {
            "kind": kind,
            "steps": 0,
            "layers": 2,
            "mean_bits": 3.1,
            "predicted": 0.01 * ratio,
            "actual": 0.01,
            "ratio": 1 / ratio,
        }
        for kind in ("pair", "whole")
        for ratio in (1.0, 0.8, 0.5)
    ]
    return tables


def make_run(root, tables, plan="a4", *overrides):
    config = resolve("sensitivity", "1", plan, "digits", 0, list(overrides))
    with Run.open(root, config, ["bench.py", "study", "sensitivity"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.append("truth/none/4/0", kind="truth", layer="none", bits=4, seed=0)
        run.finish()
    return run.path


@pytest.fixture(scope="module")
def tables():
    return made_up()


@pytest.fixture(scope="module")
def root(tmp_path_factory, tables):
    root = tmp_path_factory.mktemp("sensitivity") / "runs"
    make_run(root, tables)
    return root


@pytest.fixture(scope="module")
def html(tmp_path_factory, root):
    return build_report([root], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(html, parse_page):
    return parse_page(html)


def two(number):
    return f"{number:.2f}".replace("-0.00", "0.00").replace("-", "−")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_agreement_prints_the_run(page, tables):
    checked = 0
    for row in tables["agreement"]:
        table = page.table(f"Rank agreement with the increase of {row['target']}")
        measured = "after 40 steps" if row["steps"] else "before training"
        (line,) = [r for r in table.rows if [c.text for c in r[:2]] == [row["metric"], measured]]
        cell = line[2 + WIDTHS.index(row["bits"])]
        assert cell.text == two(row["spearman"])
        interval = f"[{two(row['spearman_low'])} to {two(row['spearman_high'])}]"
        assert cell.small == f"{interval} · τ {two(row['kendall'])} · {row['top_k_overlap']:.2f}"
        assert cell.href.startswith("#run-sensitivity-")
        checked += 1
    assert checked == 2 * 3 * 2 * 3
    ceiling = page.table("Rank agreement with the increase of fid").cell("ceiling", "1 bit")
    assert (ceiling.text, ceiling.small) == ("0.91", "[0.90 to 0.92] · τ 0.80")


def test_verdicts_and_claims_are_those_of_the_run(page, html, tables):
    table = page.table("Do sensitivities measured before training mislead?")
    claims = page.table("Sensitivity, judged with a4 on digits")
    for line, claim, row in zip(table.rows, claims.rows, tables["verdicts"], strict=True):
        verdict = row["ptq_sensitivities_mislead"]
        assert [c.text for c in line[:3]] == [str(row["bits"]), verdict, two(row["gain"])]
        assert line[2].small == "[−0.20 to 0.04]"
        assert claim[1].text == verdict
        assert f"{two(row['gain'])} [−0.20 to 0.04]" in claim[2].text
    everything = [row["claim"] for row in rows_of(html.with_name("report-claims.csv"))]
    assert sum("misrank layers" in text for text in everything) == 3
    assert not any("Sensitivity measured after QAT" in text for text in everything)


def test_the_answer_follows_from_the_tables(page, tables):
    best = max(
        (r for r in tables["agreement"] if r["target"] != "fid" and r["bits"] == "all"),
        key=lambda r: r["spearman"],
    )
    lead = page.text.split("Claims of the paper")[0]
    assert "misrank layers at 1 bit, and rank layers about as well as those after it at 2" in lead
    assert "; over all bit widths they may or may not misrank layers" in lead
    assert "not the worth of the bits chosen by it" in page.text
    measured = "after 40 steps" if best["steps"] else "before training"
    assert f"nearest to the truth is {best['metric']} {measured}, ρ {two(best['spearman'])}" in lead
    assert "agrees with that of the others to 0.91 (the ceiling)" in lead
    assert "1.25 for 3 pairs before training (1.00 to 2.00)" in page.text


def test_recovered_layers_have_their_ranks(page, tables):
    (line,) = page.table("Layers that PTQ calls bad").rows
    found = []
    for name, column, wanted in (
        ("metrics", "value", {"metric": "epsilon_mse", "steps": 0, "bits": 2}),
        ("metrics", "value", {"metric": "epsilon_mse", "steps": 40, "bits": 2}),
        ("truth", "increase", {"target": "distillation_loss", "bits": 2}),
    ):
        own = [r for r in tables[name] if all(r[k] == v for k, v in wanted.items())]
        (value,) = [r[column] for r in own if r["layer"] == "blocks.1.mlp.fc2"]
        found.append(str(1 + sum(r[column] > value for r in own)))
    assert [cell.text for cell in line] == ["b1 fc2", "2", *found, "12"]


def test_page_is_sound_and_the_same_twice(html, page, root, tmp_path):
    text = html.read_text(encoding="utf-8")
    assert "://" not in text
    assert len(page.ids) == len(set(page.ids))
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring(chart)
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", chart))
        assert all(colour.startswith("var(--") or colour == "none" for colour in colours)
    again = build_report([root], tmp_path / "report.html")
    for path in sorted(html.parent.glob("report*")):
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name


def test_agreement_beside_the_report_is_that_of_the_run(html, root):
    beside = rows_of(html.with_name("report-sensitivity-agreement.csv"))
    (path,) = root.glob("*/*/tables/agreement.csv")
    assert [{k: v for k, v in row.items() if k != "run"} for row in beside] == rows_of(path)


def test_missing_tables_and_empty_values(tables, tmp_path, parse_page):
    few = {k: v for k, v in tables.items() if k not in ("recovered", "interactions", "timesteps")}
    few["ceiling"] = [{**row, "spearman": None, "kendall": None} for row in few["ceiling"]]
    empty = ("spearman", "spearman_low", "spearman_high", "kendall", "top_k_overlap")
    few["agreement"] = [row | dict.fromkeys(empty) for row in few["agreement"]]
    few["verdicts"] = [row | dict.fromkeys(("gain", "low", "high")) for row in few["verdicts"]]
    few["truth"] = [{**row, "increase": -1e-4, "std": None} for row in few["truth"]]
    make_run(tmp_path / "runs", few)
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert "training recovers: none." in page.text
    assert "Additivity: not run." in page.text
    table = page.table("Do sensitivities measured before training mislead?")
    assert {line[2].text for line in table.rows} == {"not run"}


def test_a_shard_answers_nothing_and_two_runs_stand_apart(tables, tmp_path, parse_page):
    make_run(tmp_path / "shard", {}, "a4", "sensitivity.shard=1/2")
    page = parse_page(build_report([tmp_path / "shard"], tmp_path / "shard.html"))
    open_claims = page.table("Claims that need other studies")
    assert open_claims.cell(
        "Sensitivity measured after QAT allocates better than before it", "here"
    )
    for index, plan in enumerate(("a4", "baseline-a4")):
        make_run(tmp_path / "both", made_up(index), plan)
    page = parse_page(build_report([tmp_path / "both"], tmp_path / "both.html"))
    assert len(page.ids) == len(set(page.ids))
    titles = [t.caption for t in page.tables if t.caption.startswith("Sensitivity, judged")]
    assert [title.split(" with ")[1] for title in titles] == [
        "a4 on digits, seed 0",
        "baseline-a4 on digits, seed 0",
    ]
