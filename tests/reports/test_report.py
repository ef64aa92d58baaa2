"""The HTML file of twelve plans: self-contained, small, and every number as measured."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from xml.etree import ElementTree

from robuq_bench.figures import COLOURS

DECIMALS = {"fid": 2, "sfid": 2, "is": 2, "precision": 3, "recall": 3}


def printed(metric, value):
    """How a number should read, written without the code under test."""
    decimals = DECIMALS.get(metric.split("_")[0])
    if decimals is not None:
        return f"{value:.{decimals}f}"
    # Three significant digits; Python's own rounding, then back to plain decimals.
    rounded = f"{value:.2e}"
    return f"{value:.{2 - int(rounded.split('e')[1])}f}" if value else "0"


def measured(runs, plan, subject):
    """metric -> values of all seeds and ranges, straight from results.jsonl."""
    found = {}
    for folder in sorted(runs.glob(f"train-and-eval/{plan}-digits-*")):
        for line in (folder / "results.jsonl").read_text().splitlines():
            record = json.loads(line)
            wanted = record.get("subject") == subject or record["kind"] == "validation"
            for name, value in record.items():
                if wanted and (name.endswith(("_digits", "_loss"))):
                    found.setdefault(name, []).append(value)
    return found


def test_twelve_plans_fit_in_two_megabytes_with_room(report):
    assert report.stat().st_size < 1_000_000


def test_nothing_is_fetched(report, page):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text.split("<body>")[0])
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "action", "poster", "data", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    assert "default-src 'none'" in text


def test_every_link_has_a_target_and_every_id_is_unique(page):
    assert len(page.ids) == len(set(page.ids))
    targets = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    assert targets <= set(page.ids)


def test_summary_numbers_are_those_of_results_jsonl(twelve_plans, page):
    checked = 0
    for caption, ending, columns in (
        ("Plans and metrics on", "_digits", 6),
        ("Losses on", "_loss", 2),
    ):
        table = page.table(caption)
        assert len(table.rows) == 12
        for row in table.rows:
            plan = row[0].text
            found = measured(twelve_plans, "fp" if plan == "teacher" else plan, "student")
            for metric, values in found.items():
                if metric.endswith(ending):
                    cell = table.cell(plan, metric)
                    assert cell.text == printed(metric, statistics.fmean(values)), (plan, metric)
                    if len(values) > 1:
                        low, high = printed(metric, min(values)), printed(metric, max(values))
                        assert cell.small == f"[{low}–{high}]"
                    assert cell.href.startswith("#row-")
                    checked += 1
        # plan, and the ratio of FIDs; details such as kid_digits_std stay out
        assert len(table.head) == 1 + columns + (ending == "_digits")
    assert checked == 12 * 8


def test_every_value_is_listed_and_links_to_its_run(twelve_plans, page):
    table = page.table("Every measured value on digits")
    fid = [cell.text for cell in table.head].index("fid_digits")
    for seed in (0, 1, 2):
        lines = [r for r in table.rows if r[0].text == "a2" and r[1].text == str(seed)]
        assert [line[2].text for line in lines] == ["0", "1", "2"]
        anchor = lines[0][1].href
        folder = twelve_plans / "train-and-eval" / anchor.removeprefix("#run-train-and-eval-")
        records = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        own = [r["fid_digits"] for r in records if r.get("subject") == "student"]
        assert [line[fid].text for line in lines] == [f"{value:.2f}" for value in own]
        assert {line[1].href for line in lines} == {anchor}
    losses = page.table("Every loss on validation batches on digits")
    assert len(losses.rows) == 1 + 11 + 4  # the teacher, plans, further seeds of two


def test_accounting_and_allocation_print_what_the_run_recorded(twelve_plans, page):
    folder = next(twelve_plans.glob("train-and-eval/a4-digits-*"))
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    record = next(r for r in records if r["kind"] == "accounting")
    table = page.table("What each plan costs")
    assert table.cell("a4", "smaller").text == f"{record['size_reduction']:.2f}×"
    assert table.cell("a4", "packed size").text == f"{record['packed_bytes'] / 2**10:.0f} KiB"
    assert table.cell("a4", "BitOPs").text == f"{record['bit_ops'] / 1e6:.0f} M"
    assert table.cell("a4", "BitOPs").href.endswith(folder.name)
    types = page.table("Mean activation bits per layer type: a2")
    assert [types.cell(name, "paper").text for name in ("proj", "qkv", "fc1", "fc2")] == [
        "2.75",
        "2.21",
        "2.00",
        "1.64",
    ]
    assert types.cell("proj", "here").text == "3.00"
    assert types.cell("proj", "difference").text == "+0.25"
    assert types.cell("fc2", "difference").text == "−0.64"


def test_provenance_of_every_run_is_on_the_page(twelve_plans, page):
    for folder in twelve_plans.glob("*/*/"):
        manifest = json.loads((folder / "manifest.json").read_text())
        provenance = manifest["sessions"][-1]["provenance"]
        assert f"run-train-and-eval-{folder.name}" in page.ids
        assert manifest["config_sha256"] in page.text
        assert (folder / "DONE").read_text().split()[0] in page.text
        for name, entry in manifest["outputs"].items():
            assert f"{entry['sha256'][:16]}  {name}" in page.text
        assert manifest["sessions"][0]["start"] in page.text
    assert provenance["cpu"]["model"] in page.text
    assert f"numpy=={provenance['packages']['numpy']}" in page.text


def test_pictures_and_charts_have_alternative_texts_and_tables_captions(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert charts
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert all(table.caption for table in page.tables)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_charts_are_sound_xml_of_a_phones_width_with_text_that_can_be_read(report):
    charts = re.findall(r"<svg.*?</svg>", report.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(charts) == 1 + 11 + 2 + 2 * 4  # FID, losses, bits and sensitivities of two plans
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("width") == "252pt"  # 336 CSS pixels
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", chart)]
        assert sizes
        assert min(sizes) >= 8.5  # points, as the viewBox is in points
    colours = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+)", charts[0]))
    assert colours <= {light for light, _ in COLOURS.values()}
