"""The section on `study kernels`: every number is made up, none was measured."""

from __future__ import annotations

import csv
import re
from xml.etree import ElementTree

import pytest

from reports import build_report
from reports.kernels import kernel_runs
from reports.kernels.data import outcomes
from reports.kernels.story import outcome_text
from reports.loading import read_run
from robuq_bench.config import resolve
from robuq_bench.measuring.ceilings import Ceilings
from robuq_bench.measuring.statistics import Timing
from robuq_bench.runs.run import Run
from studies.kernels.cases import GROUPED, MATMUL, QUANTIZE, cases_of, weight_cases_of
from studies.kernels.checks import Check
from studies.kernels.peers import BASELINE, peers_of
from studies.kernels.tables import MODEL, OURS, facts, roofline_rows, rows_of, settings_of

GPU = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(3.0e12, 700e12, 1300e12)
#: Share of the ceiling that a made-up kernel reaches, by layer.
SHARES = {"qkv and fc1 input": 0.83, "fc2 input": 0.71, "fc1": 0.88, "fc2": 0.9}
TARGETS = "The project’s targets for an H100"


def cases(models=("XL", "S"), images=(1, 2, 128)):
    return [
        case
        for model in models
        for case in [*weight_cases_of(model), *(c for n in images for c in cases_of(model, n))]
    ]


def checked(wrong=()):
    """The tables that the study writes without a GPU."""
    every = cases()
    largest = {(c.kernel, c.model, c.layer): c for c in every}
    rows = []
    for number, case in enumerate(largest.values()):
        is_right = (case.kernel, case.layer) not in wrong
        row = facts(case.reduced(16, 160))
        row |= {"correct": is_right, "max_error": 0.5 + number / 100 if is_right else 7.0}
        row["status"] = "ok" if is_right else "scale is 7 times what is allowed"
        row |= {"where": "Triton's interpreter, at 16 rows", "timing": None, "basis": MODEL}
        rows.append(row)
    return {"kernel_checks": rows, "roofline": [r for c in every for r in roofline_rows(c)]}


def scattered(median_s, wide=False):
    spread = (0.8, 0.9, 1.0, 1.1, 1.2) if wide else (0.99, 0.995, 1.0, 1.005, 1.01)
    return Timing((tuple(median_s * factor for factor in spread * 4),) * 3, "CUDA-graph replay")


def least_s(case):
    rate = CEILINGS.int8_ops_s
    return max(case.moved_bytes / CEILINGS.copy_bytes_s, case.operations / rate)


def timed(wrong=(), unstable=(), models=("XL", "S")):
    """The tables that the study writes on a CUDA device, by its own functions."""
    every = cases(models)
    options = resolve("kernels", "1", "a4", "digits", 0, []).kernels
    rows = []
    for case in every:
        is_right = (case.kernel, case.layer) not in wrong
        found = Check(is_right, 0.25 if is_right else 3.0, "" if is_right else "scale is 3 times")
        status = {OURS: found.failure or "ok"}
        share = SHARES.get(case.layer, 0.6)
        times = {}
        if is_right:
            times[OURS] = scattered(least_s(case) / share, (case.kernel, case.layer) in unstable)
        for name in peers_of(case):
            status[name] = "not installed" if name != BASELINE else "ok"
        if case.is_product:
            product = case.product
            dense = max(product.full_precision_bytes / 3.0e12, product.operations / 700e12) / 0.9
            times[BASELINE] = scattered(dense)
        extra = {"device_name": GPU, "settings": settings_of(case, options)}
        rows += [extra | row for row in rows_of(case, found, status, times, CEILINGS)]
    ceilings = [{"key": "ceilings/1", "device_name": GPU, **CEILINGS.row()}]
    roofline = [row for case in every for row in roofline_rows(case)]
    return {"kernels": rows, "ceilings": ceilings, "roofline": roofline}


def make_run(root, tables, *overrides):
    config = resolve("kernels", "1", "a4", "digits", 0, list(overrides))
    with Run.open(root, config, ["bench.py", "study", "kernels"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.finish()
    return run.path


def rows_in(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def device_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kernels") / "runs"
    make_run(root, timed(wrong=[(QUANTIZE, "proj input")], unstable=[(MATMUL, "proj")]))
    return root


@pytest.fixture(scope="module")
def device_html(tmp_path_factory, device_root):
    return build_report([device_root], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def device_page(device_html, parse_page):
    return parse_page(device_html)


@pytest.fixture(scope="module")
def cpu_page(tmp_path_factory, parse_page):
    folder = tmp_path_factory.mktemp("cpu")
    make_run(folder / "runs", checked())
    return parse_page(build_report([folder / "runs"], folder / "report.html"))


def test_without_a_gpu_checks_are_shown_and_nothing_is_timed(cpu_page):
    lead = cpu_page.text.split("Claims of the paper")[0]
    assert "All 32 kernel calls of DiT-XL/2 and DiT-S/2 agree with plain PyTorch in Triton" in lead
    assert "Nothing was timed" in lead
    assert "a model from data-sheet peaks, not measured" in lead
    verdicts = {row[0].text: row[1].text for row in cpu_page.table(TARGETS).rows}
    assert set(verdicts.values()) == {"not run"}
    assert len(verdicts) == 5
    claims = {row[0].text: row[1].text for row in cpu_page.table("Kernels, judged with").rows}
    assert [claims[text] for text in claims] == ["holds", "not run", "not run"]
    assert "Times, GB/s, TOP/s" in cpu_page.text
    assert not any("times of our kernels" in table.caption for table in cpu_page.tables)


def test_every_check_prints_the_run(cpu_page):
    table = cpu_page.table("Largest deviation over what is allowed")
    assert [head.text for head in table.head][2:4] == ["DiT-XL", "DiT-S"]
    printed = {(row[1].text, row[0].text): row for row in table.rows}
    for row in checked()["kernel_checks"]:
        line = printed[row["kernel"], row["layer"]]
        cell = line[2 if row["model"] == "XL" else 3]
        assert cell.text == f"{row['max_error']:.2f}"
        assert cell.small == f"width {row['width']}"
        assert line[4].text == "Triton’s interpreter"
        assert line[4].small == f"{row['rows']} rows"


def test_the_model_is_marked_and_prints_the_run(cpu_page):
    table = cpu_page.table("DiT-XL/2 on H100 SXM: least bf16 time over least ternary time, a model")
    for row in checked()["roofline"]:
        if row["model"] == "XL" and row["device"] == "H100 SXM" and row["bf16_over_ternary"]:
            count = row["images"]
            cell = table.cell(row["layer"], "1 image" if count == 1 else f"{count} images")
            assert cell.text == f"{row['bf16_over_ternary']:.2f}×"
            assert cell.small.endswith(row["limit"])
    assert "H100 SXM (NVIDIA H100 data sheet, SXM5, dense): a model from" in cpu_page.text


def test_a_failed_check_fails_the_claim(tmp_path, parse_page):
    make_run(tmp_path / "runs", checked(wrong=[(MATMUL, "fc2")]))
    page = parse_page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert "2 of 32 kernel calls of DiT-XL/2 and DiT-S/2 fail their check" in page.text
    claims = page.table("Kernels, judged with")
    assert claims.rows[0][1].text == "does not hold"
    table = page.table("Largest deviation")
    line = next(row for row in table.rows if row[0].text == "fc2")
    assert [cell.text for cell in line[2:4]] == ["fails", "fails"]
    assert line[2].small == "width 4608"
    failed = "Failed: ternary_matmul, fc2, DiT-XL: scale is 7 times what is allowed; ternary_matmul"
    assert failed in page.text


def test_times_print_the_run(device_page, device_root):
    (path,) = device_root.glob("kernels/*/tables/kernels.csv")
    ours = [row for row in rows_in(path) if row["implementation"] == OURS and row["model"] == "XL"]
    table = device_page.table(f"DiT-XL/2 on {GPU}: times of our kernels")
    assert len(table.rows) == len(ours)
    for row, line in zip(ours, table.rows, strict=True):
        assert line[0].text == row["layer"]
        assert line[1].text == f"{int(row['rows']):,}"
        if row["correct"] != "True":
            assert line[2].text == "no time: check failed"
            assert {cell.text for cell in line[3:]} == {"–"}
            continue
        assert line[2].href.startswith("#run-kernels-")
        number = float(line[2].text.removesuffix(" µs"))
        assert number == pytest.approx(float(row["median_us"]), rel=6e-3)
        assert line[2].small.startswith("[")
        assert line[2].small.endswith("unstable") == (row["layer"] == "proj")
        assert line[3].text == f"{float(row['gb_s']):,.0f}"
        assert line[5].text == f"{100 * float(row['share_of_ceiling']):.1f} %"
        assert line[5].small == row["limit"]
        if row["speedup_over_cublas_bf16"]:
            assert line[6].text == f"{float(row['speedup_over_cublas_bf16']):.2f}×"
            assert line[6].small == row["verdict"]


def test_targets_are_judged_on_the_slowest_call(device_page):
    cells = {row[0].text: row for row in device_page.table(TARGETS).rows}
    found = {text.split(":")[0]: row for text, row in cells.items()}
    met = found["LayerNorm + modulate + Hadamard(1152) + quantize"]
    assert (met[1].text, met[2].text) == ("met", "83.0 % (qkv and fc1 input, 32,768 rows)")
    missed = found["Hadamard(4608) + quantize"]
    assert (missed[1].text, missed[2].text) == ("not met", "71.0 % (fc2 input, 32,768 rows)")
    fast = found["fc1 and fc2 at 32,768 tokens"]
    # 1300 x .88 TOP/s of ours over 700 x .9 of cuBLAS; fc2, at .9, is faster.
    assert fast[2].text == f"{1300 * 0.88 / 630:.2f}× (fc1, 32,768 rows)"
    assert fast[1].text == "met"
    slow = found["adaLN of all blocks in one call"]
    assert slow[1].text == "not met"
    assert slow[2].text.endswith("(adaLN of all blocks, 2 rows)")
    claims = {row[0].text: row[1].text for row in device_page.table("Kernels, judged with").rows}
    assert claims["Every kernel agrees with its plain PyTorch reference, on a GPU"] == (
        "does not hold"
    )
    assert sum(text in claims for text in cells) == 5


def judged(root, tables):
    (study,) = kernel_runs([read_run(make_run(root, tables))])
    return [(outcome.verdict, outcome_text(outcome)) for outcome in outcomes(study)]


def test_unstable_or_failed_calls_decide_no_target(tmp_path):
    wrong = [(QUANTIZE, "fc2 input")]
    unstable = [(MATMUL, "fc2"), (QUANTIZE, "qkv and fc1 input")]
    found = judged(tmp_path, timed(wrong, unstable, models=("XL",)))
    verdicts = [verdict for verdict, _ in found]
    assert verdicts[:4] == ["undecided", "not run", "undecided", "undecided"]
    assert found[1][1] == "fc2 input: no time: check failed"
    assert found[0][1].endswith("; unstable timing)")


def test_targets_need_their_model_tokens_and_gpu(tmp_path):
    found = judged(tmp_path / "small", timed(models=("S",)))
    assert {verdict for verdict, _ in found} == {"not run"}
    assert found[0][1] == "DiT-XL/2 at 32,768 tokens was not timed"
    tables = timed(models=("XL",))
    for row in tables["kernels"]:
        row["device_name"] = "NVIDIA A100"
    found = judged(tmp_path / "other", tables)
    assert found[4] == ("not run", "set for an H100; this is NVIDIA A100")


def test_peers_that_were_not_installed_are_said_so(device_page):
    table = device_page.table(f"DiT-XL/2 on {GPU}: ours beside peers")
    assert [head.text for head in table.head] == ["layer", "rows", "ours", BASELINE]
    assert {row[0].small for row in table.rows} == {MATMUL, GROUPED}
    assert (
        "Peers that were not installed, so not run: fast-hadamard-transform, torch._int_mm, "
        "torchao int8 and gemlite A8W158."
    ) in device_page.text


def test_page_is_sound_and_the_same_twice(device_html, device_page, device_root, tmp_path):
    text = device_html.read_text(encoding="utf-8")
    assert "://" not in text
    assert len(text) < 2_000_000
    assert len(device_page.ids) == len(set(device_page.ids))
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 1 + 2  # the roofline, and shares of two models
    for chart in charts:
        ElementTree.fromstring(chart)
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", chart))
        assert all(colour.startswith("var(--") or colour == "none" for colour in colours)
    again = build_report([device_root], tmp_path / "report.html")
    for path in sorted(device_html.parent.glob("report*")):
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name
    beside = rows_in(device_html.with_name("report-kernels-kernels.csv"))
    (path,) = device_root.glob("kernels/*/tables/kernels.csv")
    assert [{k: v for k, v in row.items() if k != "run"} for row in beside] == rows_in(path)
    latex = device_html.with_name("report-kernels.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex
    assert r"83.0 \% (qkv and fc1 input, 32,768 rows)" in latex
