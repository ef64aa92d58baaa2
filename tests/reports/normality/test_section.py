"""The page and the files beside it: every printed number against the run's tables."""

from __future__ import annotations

import csv
import re
from xml.etree import ElementTree

import pytest

from reports import build_report


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def lines(table, *starts):
    """Rows whose first cells read as given."""
    return [r for r in table.rows if [cell.text for cell in r[: len(starts)]] == list(starts)]


def decimals(number, places=4):
    return f"{number:.{places}f}".replace("-", "−")


def test_verdict_table_prints_the_run(made_up, study, page):
    table = page.table("Verdicts by layer type")
    checked = 0
    for row in study.tables["verdicts"]:
        if row["transform"] not in ("identity", "hadamard", "randomized-hadamard"):
            continue
        words = {"identity": "before", "hadamard": "plain Hadamard"}.get(
            row["transform"], "random signs"
        )
        (line,) = lines(table, row["layer_type"], words, row["subject"])
        cell = line[3 + made_up.bits.index(row["bits"])]
        assert cell.text == printed_ratio(row["ratio"])
        assert cell.small.startswith(f"[≤ {printed_ratio(row['upper_95'])}] 3 of 4 cells; worst ")
        assert cell.small.endswith(f"{printed_ratio(row['worst_ratio'])} in block 1, t 750")
        assert cell.href.startswith("#run-normality-")
        checked += 1
    assert checked == 3 * 2 * 3 * 5
    nulls = [line for line in table.rows if line[0].text == "normal tokens"]
    assert [line[-1].text for line in nulls] == ["1.064", "1.000"]


def printed_ratio(number):
    """How a ratio should read, written without the code under test."""
    return f"{number:.3f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def printed_share(share):
    return f"{100 * share:.1f} %" if 0.001 <= share < 0.0995 else f"{100 * share:.0f} %"


def test_types_table_prints_the_run(made_up, study, page):
    table = page.table("Before and after")
    for row in study.rows("types", transform="randomized-hadamard"):
        (line,) = lines(table, row["layer_type"], "random signs", row["subject"])
        cells = {head.text: cell for head, cell in zip(table.head, line, strict=True)}
        assert cells["median W"].text == decimals(row["shapiro_w_median"])
        assert cells["median W"].small == "0.4321"
        assert cells["KL"].text == decimals(row["kl"])
        assert cells["KL"].small == f"[{decimals(row['kl_low'])} to {decimals(row['kl_high'])}]"
        assert cells["null’s KL"].text == "−0.0375 to 0.0396"
        assert cells["TV (plug-in)"].text == decimals(row["total_variation_plug_in"], 3)
        shares = [printed_share(row[f"shapiro_rejected{end}"]) for end in ("", "_bh", "_null")]
        assert cells["rejected"].text == " / ".join(shares)
        assert cells["kurtosis"].text == decimals(row["kurtosis_median"], 2)
        assert cells["tokens"].text == "128"
        assert cells["tokens"].small == f"n = {row['n']}, 3"
    dual = page.table("What a token looks like, other")
    (line,) = lines(dual, "qkv", "dual rotation", made_up.teacher)
    assert [cell.text for cell in line].count("undefined") == 2
    assert "7 undefined" in line[4].small


def test_other_tables_print_the_run(made_up, study, page):
    errors = page.table("What non-normality costs")
    three = ("identity", "hadamard", "randomized-hadamard")
    for row in study.rows("errors", transform="randomized-hadamard"):
        (line,) = lines(errors, row["layer_type"], row["quantizer"], row["subject"])
        cell = line[3 + made_up.bits.index(row["bits"])]
        key = {k: row[k] for k in ("subject", "layer_type", "quantizer", "bits")}
        values = [study.rows("errors", transform=t, **key)[0]["ratio"] for t in three]
        assert cell.text == " / ".join(printed_ratio(v) for v in values)
    (line,) = lines(errors, "qkv", "absmax", made_up.late)
    assert line[3].text == "no such grid"
    l3 = page.table("L₃ of the untransformed tokens")
    for row in study.tables["lyapunov"]:
        (line,) = lines(l3, row["layer_type"], row["subject"])
        assert float(line[2].text) == pytest.approx(row["l3_median"], rel=6e-3)
        assert line[5].text == "1.6 %"
    bound = page.table("Check of the Berry–Esseen bound")
    assert {line[2].text for line in bound.rows} == {"1 of 6"}
    greatest = max(row["exact_distance"] for row in study.tables["bound"])
    assert {float(line[5].text) for line in bound.rows} == {float(f"{greatest:.3g}")}
    assert "violated for 6 of 36 tokens" in page.text
    assert page.table("Several coordinates").rows[1][2].text == "undefined"
    assert "void (at least 1) for every token here" in page.text
    assert "34792 for k = 2" in page.text
    assert "fc2 (k = 2) 25 % against 4.9 %" in page.text
    names = [made_up.teacher, made_up.early, made_up.late]
    side_by_side = page.table("Does normality survive training?")
    assert [head.text for head in side_by_side.head[2:]] == names
    controls = page.table("Controls: tokens whose distribution is known, width 16")
    assert {r[4].text for r in controls.rows if r[0].text == "one-hot"} == {"97 %"}
    assert "rejects at least 97 % before any transform (one-hot, width 16)" in page.text


def test_the_page_leads_with_the_answer_and_fetches_nothing(html, page):
    text = html.read_text(encoding="utf-8")
    assert "://" not in text
    assert "Does a Hadamard transform make" in text.split("</h1>")[0]
    assert len(page.ids) == len(set(page.ids))
    targets = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    assert targets <= set(page.ids)
    assert html.stat().st_size < 1_000_000


def test_charts_are_sound_and_follow_the_theme(made_up, html):
    charts = re.findall(r"<svg.*?</svg>", html.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(charts) == 4 + 3 + 2  # ratios, bound, decay, n; examples; heat maps
    for chart in charts:
        ElementTree.fromstring(chart)
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", chart))
        assert all(colour.startswith("var(--") or colour == "none" for colour in colours)
    labels = [re.search(r'aria-label="([^"]*)"', chart)[1] for chart in charts]
    assert any("fc2 1600 to 0.990" in label and "qkv 2.200 to 0.990" in label for label in labels)
    # The palest cells: compacting coordinates leaves opacities alone.
    assert sum("fill-opacity: 0.06" in chart for chart in charts) == 2
    heat = next(label for label in labels if label.startswith("Error ratio at 2 bits of every"))
    assert f"{made_up.teacher}, plain Hadamard: {1.0491 * 1.05:.2f} to {1.2744 * 1.15:.2f}" in heat


def test_the_same_run_gives_the_same_bytes(study, html, tmp_path):
    again = build_report([study.root], tmp_path / "report.html")
    for path in sorted(html.parent.glob("report*")):
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name


def test_tables_beside_the_report_are_those_of_the_run(study, html):
    for name in ("types", "verdicts"):
        beside = rows_of(html.with_name(f"report-normality-{name}.csv"))
        own = rows_of(study.folder / f"tables/{name}.csv")
        assert [{k: v for k, v in row.items() if k != "run"} for row in beside] == own
        assert {row["run"] for row in beside} == {f"normality/{study.folder.name}"}
    latex = html.with_name("report-normality.tex").read_text(encoding="utf-8")
    assert latex.count(r"\toprule") == 3
    assert "1.274 [1.300]" in latex
    claims = rows_of(html.with_name("report-claims.csv"))
    assert sum("normal" in row["claim"] for row in claims) == 10


def test_two_runs_stand_apart(made_up, study, tmp_path, parse_page):
    made_up.run(tmp_path / "runs", made_up.tables([made_up.teacher], seed=1), seed=1)
    output = build_report([study.root, tmp_path / "runs"], tmp_path / "report.html")
    page = parse_page(output)
    assert len(page.ids) == len(set(page.ids))
    assert sum(t.caption.startswith("Verdicts by layer type") for t in page.tables) == 2
