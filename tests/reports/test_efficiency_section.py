"""The section on `study efficiency`: sizes are exact; times and memory made up, not measured."""

from __future__ import annotations

import csv
import re
from functools import cache
from xml.etree import ElementTree

import pytest

from reports import build_report
from reports.efficiency import efficiency_runs
from reports.efficiency.data import aims
from reports.efficiency.story import efficiency_claims
from reports.efficiency.tables import time_table
from reports.loading import read_run
from robuq_bench.accounting.account import packing_table
from robuq_bench.config import resolve
from robuq_bench.measuring.memory import split_peak
from robuq_bench.measuring.roofline import Transformer, end_to_end_rows
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.run import Run
from studies.efficiency.claims import claims
from studies.efficiency.study import columns, weight_rows
from studies.efficiency.variants import VARIANTS, packed_plan

GPU = "NVIDIA H100 80GB HBM3"
BATCHES = (1, 8)
#: Milliseconds of a step at batch 1, and GiB of its peak.
STEPS = {"fp32": 17.0, "tf32": 4.5, "bf16": 3.0, "bf16-compile": 2.4, "bf16-graph": 1.9}
PACKED = {"w1.58a8": 1.0, "w1.58a4": 1.01, "w1.58a2": 1.02}
FACTORS = "The paper’s factors beside ours"
CLAIMS = "Efficiency, judged with"


def configure(*overrides, workload="imagenet256"):
    given = ["efficiency.batches=[1,8]", "efficiency.sampling_batches=[1]", *overrides]
    return resolve("efficiency", "1", "a2", workload, 0, given)


@cache
def exact(workload):
    """Tables that need no GPU, by the study's own functions."""
    config = configure(workload=workload)
    section, plan = config.workload.model, packed_plan("a8", 16)
    variants = list(VARIANTS.values())
    facts = {"basis": "exact", "plan": "a8", "rank": 16}
    transformer = Transformer(section.hidden_size, section.depth)
    modelled = end_to_end_rows(transformer, [2 * batch for batch in BATCHES])
    return {
        "checkpoints": [facts | row for row in packing_table(section, plan)],
        "weights": weight_rows(config, plan, variants),
        "end_to_end_model": [r | {"batch": b} for r, b in zip(modelled, BATCHES, strict=True)],
    }


def item(kind, name, batch, status="ok", scale=1.0, wide=False):
    """What the study appends of one variant and batch."""
    found = {"device_name": GPU, "variant": name, "description": VARIANTS[name].label}
    found |= {"batch": batch, "measured": kind, "images": 2 * batch, "guidance": True}
    found |= {"steps": 1 if kind == "step" else 50, "weights": "random", "status": status}
    if status != "ok":
        return found
    seconds = (STEPS | PACKED)[name] * 1e-3 * batch * scale * (50 if kind == "sampling" else 1)
    spread = (0.8, 0.9, 1.0, 1.1, 1.2) if wide else (0.99, 0.995, 1.0, 1.005, 1.01)
    timing = Timing((tuple(seconds * factor for factor in spread),) * 3, "CUDA-graph replay")
    found |= timing.summary("ms") | {"rounds_s": [list(r) for r in timing.rounds_s]}
    if kind == "step":
        weights = next(r for r in exact("imagenet256")["weights"] if r["variant"] == name)
        parts = {"weights": weights["weight_bytes"], "workspace": 32 * 2**20}
        peak = parts["weights"] + parts["workspace"] + batch * 100 * 2**20
        found |= split_peak(**parts, resident_before=0, peak=peak, reserved=peak)
    return found


def items(**changes):
    """Everything measured, but for the peer that is not installed."""
    missing = {"torchao-int8": "not run: torchao is not installed"}
    return [
        item(kind, name, batch, missing.get(name, "ok"), **changes.get(name, {}))
        for name in VARIANTS
        for batch in BATCHES
        for kind in ("step", "sampling")
        if kind == "step" or batch == 1
    ]


def make_run(root, found=(), workload="imagenet256"):
    config, tables = configure(workload=workload), dict(exact(workload))
    options = config.settings
    if found:
        tables["end_to_end"] = [columns(row) for row in found]
    given = (tables["checkpoints"], tables["weights"], tables["end_to_end_model"])
    tables["claims"] = claims(options, *given, list(found))
    with Run.open(root, config, ["bench.py", "study", "efficiency"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.finish()
    return run.path


def rows_in(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("efficiency") / "runs"
    make_run(root, items())
    return root


@pytest.fixture(scope="module")
def html(tmp_path_factory, root):
    return build_report([root], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(html, parse_page):
    return parse_page(html)


@pytest.fixture(scope="module")
def cpu_page(tmp_path_factory, parse_page):
    folder = tmp_path_factory.mktemp("cpu")
    make_run(folder / "runs")
    return parse_page(build_report([folder / "runs"], folder / "report.html"))


def test_without_a_gpu_sizes_are_exact_and_the_rest_is_not_run(cpu_page):
    lead = cpu_page.text.split("Claims of the paper")[0]
    assert "DiT-XL/2 is a file 15.79× smaller than FP32 (base3/fp16/fp16; the paper: 15.2×" in lead
    assert "its weights take 12.99× less memory than in fp32 and 6.50× less than in bf16" in lead
    assert "(the paper: 7.1×) and speed (the paper: 3.5×) are not run" in lead
    verdicts = [row[1].text for row in cpu_page.table(CLAIMS).rows]
    assert verdicts == ["holds", "holds", "not run", "not run"]
    table = cpu_page.table(FACTORS)
    exact_rows = [row for row in table.rows if row[1].small == "exact"]
    assert [row[1].text for row in exact_rows] == [
        *("12.96×", "15.79×", "11.17×", "13.21×", "12.99×", "6.50×")
    ]
    assert [row[4].text for row in exact_rows].count("reaches the paper’s") == 2
    others = [row for row in table.rows if row[1].small != "exact"]
    assert {(row[1].text, row[4].text) for row in others} == {("not run", "not run")}
    assert [row[3].text for row in others] == [
        "every baseline, peak of a step",
        *("fp32, step", "tf32, step", "bf16-graph, step"),
        *("every other baseline, step", "every baseline, sampling"),
    ]
    assert not any(table.caption.startswith(("One step", "Sampling")) for table in cpu_page.tables)


def test_the_model_is_marked_and_prints_the_run(cpu_page):
    table = cpu_page.table("A step of DiT-XL/2 on an H100, a model, not measured")
    for row, line in zip(exact("imagenet256")["end_to_end_model"], table.rows[1::2], strict=True):
        assert [cell.text for cell in line[-3:]] == [
            f"{row[f'ratio_to_{name}']:.2f}×" for name in ("bf16", "tf32", "fp32")
        ]
        assert float(line[6].text) == pytest.approx(row["w1.58a8_total_ms"], rel=6e-3)
    assert table.rows[0][0].text == "batch 1"


def test_sizes_print_the_run(cpu_page):
    table = cpu_page.table("Bytes of a checkpoint by part, rank 16")
    for row, line in zip(exact("imagenet256")["checkpoints"], table.rows, strict=True):
        assert line[0].text == row["packing"]
        parts = ("codes", "scales", "low_rank", "signs", "rest", "total")
        assert [cell.text for cell in line[1:7]] == [
            f"{row[f'{part}_bytes'] / 2**20:.2f}" for part in parts
        ]
        assert line[7].text == f"{row['size_reduction']:.2f}×"
        assert line[8].text == (f"{row['published']:g}×" if row["published"] else "–")
    table = cpu_page.table("Weights in memory")
    assert table.cell("w1.58a4", "weights in memory").text == "198 MiB"
    assert table.cell("torchao-int8", "weights in memory").text == "not run"


def test_measured_factors_print_the_run(page, root):
    (path,) = root.glob("efficiency/*/tables/claims.csv")
    rows = [row for row in rows_in(path) if row["basis"] == "measured"]
    captions = {"peak of a step": "Peak memory of a step", "step": "Speed of a step"}
    for row in rows:
        baseline, _, kind = row["against"].partition(", ")
        table = page.table(captions.get(kind, "Sampling, ours against"))
        line = next(x for x in table.rows if (x[0].text, x[1].text) == (row["ours"], baseline))
        index = [head.text for head in table.head].index(f"batch {row['batch']}")
        assert line[index].text == f"{float(row['factor']):.2f}×"
        assert line[index].small == row["verdict"]
    step = [float(r["factor"]) for r in rows if r["against"] == "bf16-graph, step"]
    line = next(x for x in page.table(FACTORS).rows if x[3].text == "bf16-graph, step")
    assert line[1].text == f"{min(step):.2f}× to {max(step):.2f}×"
    assert line[1].small == "measured"
    assert line[4].text == "below the paper’s"
    assert line[5].text.startswith("1.6")  # the model's, beside it


def test_times_and_memory_print_the_run(page):
    steps = page.table(f"One step on {GPU}")
    assert steps.cell("bf16-graph", "batch 8").text == "15.2"
    assert steps.cell("bf16-graph", "batch 8").small == "[15.1 to 15.3]"
    peer = steps.cell("torchao-int8", "batch 1")
    assert (peer.text, peer.small) == ("not run", "torchao is not installed")
    assert steps.cell("model: W1.58A8", "batch 1").small == "model"
    assert page.table("Sampling of 50 steps").cell("w1.58a8", "batch 1").text == "50"
    memory = page.table(f"GPU memory of a step on {GPU}")
    line = next(x for x in memory.rows if (x[0].text, x[1].text) == ("bf16", "8"))
    assert [cell.text for cell in line[2:]] == ["1.26 GiB", "800 MiB", "32 MiB", "2.07 GiB"]


def test_claims_depend_on_the_baseline(page):
    rows = {row[0].text: row for row in page.table(CLAIMS).rows}
    speed = rows["DiT-XL/2 runs 3.5× faster"]
    assert speed[1].text == "undecided"
    assert "16.67× to 17.00× over fp32" in speed[2].text
    assert "1.86× to 1.90× over bf16-graph" in speed[2].text
    assert rows["DiT-XL/2 takes 7.1× less GPU memory"][1].text == "undecided"
    targets = {row[0].text: row for row in page.table("The project’s targets").rows}
    graph = targets["a step at least 1.5 times as fast as bf16 compiled + CUDA graph, batch ≥ 8"]
    assert (graph[1].text, graph[2].text) == ("met", "least: 1.86×, greatest: 1.90×")
    assert targets["a packing past 18 times"][1].text == "met"


def test_unstable_and_failed_items_decide_nothing(tmp_path, parse_page):
    def speed(path):
        (study,) = efficiency_runs([read_run(path)])
        return efficiency_claims(study)[3].verdict, study

    changes = {name: {"scale": 0.1} for name in PACKED}
    assert speed(make_run(tmp_path / "fast", items(**changes)))[0] == "holds"
    changes = {name: {"scale": 4.0} for name in PACKED}
    assert speed(make_run(tmp_path / "slow", items(**changes)))[0] == "undecided"  # fp32 alone
    changes = {name: {"scale": 20.0} for name in PACKED}
    assert speed(make_run(tmp_path / "slowest", items(**changes)))[0] == "does not hold"
    changes = {name: {"scale": 0.1, "wide": True} for name in PACKED}
    verdict, study = speed(make_run(tmp_path / "wide", items(**changes)))
    assert verdict == "undecided"
    assert {aim.verdict for aim in aims(study)[3:]} == {"undecided"}
    table = time_table(study, "step")
    line = next(row for row in table.rows if row[0].parts[0].text == "w1.58a8")
    assert line[1].sub.endswith("unstable")
    wrong = "check failed: the prediction differs from the integer backend's by 0.9 of its size"
    found = [
        item(x["measured"], x["variant"], x["batch"], wrong) if x["variant"] in PACKED else x
        for x in items()
    ]
    make_run(tmp_path / "wrong", found)
    page = parse_page(build_report([tmp_path / "wrong"], tmp_path / "wrong.html"))
    assert page.table(CLAIMS).rows[3][1].text == "not run"
    cell = page.table(f"One step on {GPU}").cell("w1.58a8", "batch 1")
    assert cell.text == "no time: check failed"


def test_another_model_judges_no_claim_about_xl(tmp_path, parse_page):
    make_run(tmp_path / "runs", workload="digits")
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert {row[1].text for row in page.table(CLAIMS).rows} == {"not run"}
    assert {row[1].text for row in page.table("The project’s targets").rows} == {"not run"}
    assert "the DiT of digits" in page.text


def test_page_is_sound_and_the_same_twice(html, page, root, tmp_path):
    text = html.read_text(encoding="utf-8")
    assert "://" not in text
    assert len(text) < 2_000_000
    assert len(page.ids) == len(set(page.ids))
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 2  # checkpoints and memory
    for chart in charts:
        ElementTree.fromstring(chart)
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", chart))
        assert all(colour.startswith("var(--") or colour == "none" for colour in colours)
    again = build_report([root], tmp_path / "report.html")
    for path in sorted(html.parent.glob("report*")):
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name
    (path,) = root.glob("efficiency/*/tables/claims.csv")
    beside = rows_in(html.with_name("report-efficiency-claims.csv"))
    assert [{k: v for k, v in row.items() if k != "run"} for row in beside] == rows_in(path)
    assert "15.79×" in html.with_name("report-efficiency.tex").read_text(encoding="utf-8")
