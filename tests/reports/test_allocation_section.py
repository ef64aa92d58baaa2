"""The section on `study allocation`: every number is made up, none was measured."""

from __future__ import annotations

import csv
import re
import statistics
from xml.etree import ElementTree

import pytest

from reports import build_report
from robuq_bench.config import resolve
from robuq_bench.runs.run import Run

KINDS = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
LAYERS = [f"blocks.{b}.{part}.{kind}" for b in range(2) for kind, part in KINDS.items()]
BUDGETS, SEEDS = (2.0, 3.0), (0, 1, 2)
#: Level of the distillation loss; seeds are 1 % apart.
LEVELS = {
    "uniform": {2.0: 0.0648, 3.0: 0.0331},
    "ptq": {2.0: 0.0577, 3.0: 0.0352},
    "qat": {2.0: 0.0573, 3.0: 0.0333},
    "fisher": {2.0: 0.0502, 3.0: 0.0441},
    "resolved": {2.0: 0.0600, 3.0: 0.0300},
}


def value(candidate, budget, seed):
    return LEVELS[candidate][budget] * (1 + 0.01 * seed)


def verdict(candidate, other, budget):
    own, base = ([value(c, budget, s) for s in SEEDS] for c in (candidate, other))
    if max(own) < min(base):
        return "holds"
    return "does not hold" if min(own) > max(base) else "undecided"


def made_up():
    """The study's tables with the columns it writes."""
    tables = {
        "trials": [
            {
                "candidate": c,
                "budget": b,
                "seed": s,
                "mean_bits": b - 0.004,
                "distillation_loss": value(c, b, s),
                "sample_mse": 10 * value(c, b, s),
                "fid_digits": 500 * value(c, b, s),
            }
            for s in SEEDS
            for b in BUDGETS
            for c in LEVELS
        ]
    }
    tables["candidates"], tables["verdicts"] = [], []
    scales = {"distillation_loss": 1, "sample_mse": 10, "fid": 500}
    for b in BUDGETS:
        for c in LEVELS:
            row = {"budget": b, "candidate": c, "seeds": len(SEEDS)}
            for target, scale in scales.items():
                own = [scale * value(c, b, s) for s in SEEDS]
                row[target] = statistics.fmean(own)
                row |= {f"{target}_min": min(own), f"{target}_max": max(own)}
                base = statistics.fmean(scale * value("uniform", b, s) for s in SEEDS)
                row[f"{target}_vs_uniform"] = None if c == "uniform" else row[target] - base
                if c != "uniform" and target != "sample_mse":
                    judged = {"budget": b, "candidate": c, "target": target}
                    judged["beats_uniform"] = verdict(c, "uniform", b)
                    judged["ratio_of_means"] = row[target] / base
                    tables["verdicts"].append({**judged, "seeds": 3})
            tables["candidates"].append(row)
    tables["allocations"] = [
        {
            "candidate": c,
            "budget": b,
            "seed": s,
            "layer": layer,
            "layer_type": layer.rpartition(".")[2],
            "block": int(layer.split(".")[1]),
            "bits": bits_of(c, b, layer),
        }
        for c in LEVELS
        for b in BUDGETS
        for s in (SEEDS if c == "resolved" else ("all",))
        for layer in LAYERS
    ]
    tables["solvers"] = [
        {
            "budget": b,
            "solver": solver,
            "objective": 0.01 * (1 + above),
            "layers": 8,
            "above_optimum": above,
            "mean_bits": b,
            "seconds": 0.0123,
        }
        for b in BUDGETS
        for solver, above in (("exact", 0.0), ("milp", -2e-16), ("greedy", 0.0123))
    ]
    tables["front"] = [
        {"source": c, "mean_bits": 1 + i / 100, "objective": 0.1 * (1 - i / 301)}
        for c in ("ptq", "qat")
        for i in range(301)
    ]
    tables["timestep_aware"] = [
        {
            "budget": b,
            "buckets": 4,
            "objective_single": 0.0086,
            "objective_by_bucket": 0.005,
            "ratio": 0.6112 if b == 2 else None,
            "mean_bits_by_bucket": b,
        }
        for b in BUDGETS
    ]
    return tables


def bits_of(candidate, budget, layer):
    """Sensitivities before and after training choose the same bits at a mean of 2, not of 3."""
    if candidate == "uniform":
        return int(budget)
    odd = (candidate == "ptq" and budget == 3) or candidate in ("fisher", "resolved")
    return int(budget) + (layer.endswith("proj")) - (layer.endswith("fc1" if odd else "fc2"))


def make_run(root, tables, plan="a4", *overrides):
    config = resolve("allocation", "1", plan, "digits", 0, list(overrides))
    with Run.open(root, config, ["bench.py", "study", "allocation"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.append("trial/uniform/2/0", kind="trial", candidate="uniform", budget=2.0, seed=0)
        run.finish()
    return run.path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("allocation") / "runs"
    make_run(root, made_up())
    return root


@pytest.fixture(scope="module")
def html(tmp_path_factory, root):
    return build_report([root], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(html, parse_page):
    return parse_page(html)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def three(number):
    """Three significant digits of a number between 0.01 and 1."""
    return f"{number:.4f}" if abs(number) < 0.1 else f"{number:.3f}"


def test_candidates_print_the_run(page):
    for row in made_up()["candidates"]:
        table = page.table(f"Candidates at a mean of {row['budget']:g} bits")
        cells = next(line for line in table.rows if line[0].text == row["candidate"])
        loss, change, fid, fid_change = cells[2], cells[3], cells[6], cells[7]
        assert [head.text for head in table.head][6] == "fid_digits"
        assert loss.text == three(row["distillation_loss"])
        low, high = row["distillation_loss_min"], row["distillation_loss_max"]
        assert loss.small == f"[{three(low)}–{three(high)}]"
        assert loss.href.startswith("#run-allocation-")
        assert fid.text == f"{row['fid']:.2f}"
        if row["candidate"] == "uniform":
            assert change.text == "–"
            continue
        assert fid_change.text == f"{row['fid_vs_uniform']:+.2f}".replace("-", "−")
        printed = float(change.text.replace("−", "-"))
        assert printed == pytest.approx(row["distillation_loss_vs_uniform"], rel=6e-3)
        assert cells[1].text == f"{row['budget'] - 0.004:.2f}"
    head = page.table("Candidates at a mean of 2 bits").rows[2][0]
    assert head.text == "qat"
    assert head.small.endswith("the bits of ptq")


def test_verdicts_print_the_run(page):
    table = page.table("Which candidates beat uniform")
    for row in made_up()["verdicts"]:
        column = 1 + 2 * BUDGETS.index(row["budget"]) + (row["target"] == "fid")
        cell = next(line for line in table.rows if line[0].text == row["candidate"])[column]
        assert cell.text == row["beats_uniform"]
        assert cell.small == f"×{row['ratio_of_means']:.2f}"


def test_claims_are_judged_by_the_rule(page, html):
    claims = {row[0].text: row for row in page.table("Worth of AMPN, judged with").rows}
    assert len(claims) == 8
    for budget in BUDGETS:
        for on in ("the distillation loss", "fid_digits"):
            end = f"at a mean of {budget:g} bits, on {on}"
            beats = claims[f"AMPN (candidate qat) beats uniform {end}"]
            assert beats[1].text == verdict("qat", "uniform", budget)
            after = claims[
                f"AMPN with sensitivities after training beats AMPN with those before {end}"
            ]
            same = budget == 2
            assert after[1].text == ("undecided" if same else verdict("qat", "ptq", budget))
            assert after[2].text.startswith("Identical allocations") == same
    assert {row[1].text for row in claims.values()} == {"holds", "undecided"}
    assert "0.0573 [0.0573–0.0584]" not in page.text  # the mean, not the first seed
    assert "0.0579 [0.0573–0.0584] against 0.0654 [0.0648–0.0661], ×0.88" in page.text
    listed = [row["claim"] for row in rows_of(html.with_name("report-claims.csv"))]
    assert sum("AMPN (candidate qat)" in text for text in listed) == 4


def test_the_answer_names_gain_and_runner_up(page):
    lead = page.text.split("Claims of the paper")[0]
    first = (
        "With a4 on digits, seed 0, at a mean of 2 bits AMPN (qat) beats uniform on the "
        "distillation loss (0.0579 against 0.0654, ×0.88), and loses to the best other "
        "candidate, fisher (0.0507); it beats uniform on fid_digits (28.94 against 32.72, ×0.88)"
    )
    assert first in lead
    assert "At a mean of 3 bits AMPN (qat) cannot be told from uniform" in lead
    assert "choose the same bits at a mean of 2." in lead


def test_other_tables_print_the_run(page):
    types = page.table("Mean activation bits per layer type")
    papers = [line for line in types.rows if line[0].text == "the paper"]
    assert [cell.text for cell in papers[0]] == ["the paper", "2", "2.75", "2.21", "2.00", "1.64"]
    assert [cell.text for cell in papers[1]] == ["the paper", "3", "3.89", "2.96", "3.04", "2.31"]
    qat = next(line for line in types.rows if line[0].text == "qat")
    assert [cell.text for cell in qat] == ["qat", "2", "3.00", "2.00", "2.00", "1.00"]
    solvers = page.table("Solvers on the same sensitivities, 8 layers")
    assert solvers.cell("greedy", "above optimum").text == "1.23 %"
    assert solvers.cell("milp", "above optimum").text == "0 %"
    assert solvers.cell("exact", "time").text == "0.0123 s"
    aware = page.table("Bits per timestep bucket, predicted only")
    assert aware.cell("2 bits", "ratio").text == "0.61"
    assert aware.cell("3 bits", "ratio").text == "not run"
    assert "objective to 0.61 times at a mean of 2 bits what" in page.text
    assert "no network was trained that way" in page.text


def test_page_is_sound_and_the_same_twice(html, page, root, tmp_path):
    text = html.read_text(encoding="utf-8")
    assert "://" not in text
    assert len(page.ids) == len(set(page.ids))
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 2 + 2 * 4  # dots and front; four mixed candidates at two budgets
    for chart in charts:
        ElementTree.fromstring(chart)
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", chart))
        assert all(colour.startswith("var(--") or colour == "none" for colour in colours)
    again = build_report([root], tmp_path / "report.html")
    for path in sorted(html.parent.glob("report*")):
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name
    beside = rows_of(html.with_name("report-allocation-candidates.csv"))
    (path,) = root.glob("*/*/tables/candidates.csv")
    assert [{k: v for k, v in row.items() if k != "run"} for row in beside] == rows_of(path)


def test_one_training_seed_is_not_judged(tmp_path, parse_page):
    """Also where the run itself, of version 1, gave a verdict."""
    tables = {name: made_up()[name] for name in ("trials", "candidates", "verdicts")}
    tables["trials"] = [row for row in tables["trials"] if row["seed"] == SEEDS[0]]
    for row in tables["verdicts"]:
        row["seeds"] = 1
    make_run(tmp_path / "runs", tables)
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    claims = page.table("Worth of AMPN, judged with").rows
    assert {line[1].text for line in claims} <= {"one seed: not judged", "undecided"}
    assert sum(line[1].text == "one seed: not judged" for line in claims) >= 4
    cells = [cell for line in page.table("Which candidates beat uniform").rows for cell in line[1:]]
    assert {cell.text for cell in cells} == {"one seed: not judged"}
    assert "AMPN (qat) is not judged, with one training seed, against uniform" in page.text


def test_missing_tables_and_empty_values(tmp_path, parse_page):
    tables = {name: made_up()[name] for name in ("trials", "candidates")}
    for row in tables["trials"]:
        row["fid_digits"] = None
        if row["candidate"] == "uniform":
            row["distillation_loss"] = None
    for row in tables["candidates"]:
        row |= {"fid": None, "fid_min": None, "fid_max": None, "fid_vs_uniform": None}
    make_run(tmp_path / "runs", tables)
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    claims = page.table("Worth of AMPN, judged with")
    verdicts = [line[1].text for line in claims.rows]
    # qat against ptq on the distillation loss is all that is left.
    assert verdicts == ["not run"] * 4 + ["undecided", "not run", "holds", "not run"]
    assert "Bits per timestep bucket: not run." in page.text


def test_a_shard_shows_its_run_and_two_runs_stand_apart(tmp_path, parse_page):
    make_run(tmp_path / "shard", {}, "a4", "allocation.shard=1/2")
    page = parse_page(build_report([tmp_path / "shard"], tmp_path / "shard.html"))
    assert "These runs wrote no tables." in page.text
    for plan in ("a4", "baseline-a4"):
        make_run(tmp_path / "both", made_up(), plan)
    page = parse_page(build_report([tmp_path / "both"], tmp_path / "both.html"))
    assert len(page.ids) == len(set(page.ids))
    assert sum(t.caption.startswith("Which candidates beat") for t in page.tables) == 2


def test_the_same_bits_are_no_win_whatever_training_gave(tmp_path, parse_page):
    tables = made_up()
    for row in tables["trials"]:
        if row["candidate"] == "qat" and row["budget"] == 2:
            row["distillation_loss"] /= 100
    make_run(tmp_path / "runs", tables)
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    claims = {row[0].text: row[1].text for row in page.table("Worth of AMPN, judged").rows}
    text = "AMPN with sensitivities after training beats AMPN with those before at a mean of 2 bits"
    assert claims[f"{text}, on the distillation loss"] == "undecided"
