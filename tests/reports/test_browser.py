"""Reports as a browser shows them: wide and narrow, light and dark, read and clicked through."""

from __future__ import annotations

import io
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import seaborn as sns
from PIL import Image

from reports import build_report
from robuq_bench.figures import COLOURS, MEANINGS, colour, panel, style_sheet

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHECKS = Path(__file__).with_name("browser_checks.js")
RECORDED = Path(__file__).resolve().parents[2] / "reports" / "recorded"
BROWSERS = ("google-chrome", "chromium", "chromium-browser")
QUIET = (  # a browser that asks nobody anything
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
HEIGHT = 800
# Checks of browser_checks.js and what each finds: before and after every <details> is opened.
FITTING = {"sidewaysScroll": "sideways scroll", "cutPictures": "pictures that do not fit"}
AS_LOADED = FITTING | {"deadEnds": "table of contents"}
OPENED = FITTING | {
    "brokenLinks": "links without a target",
    "duplicateIds": "ids used twice",
    "unreachableByKeyboard": "not reachable by keyboard",
    "chartsWithoutText": "charts without text",
    "smallFigureText": "small text in figures",
    "lowContrast": "low contrast",
}
Faults = dict[str, list[str]]


def missing(what: str) -> NoReturn:
    if os.environ.get("ROBUQ_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what}, and ROBUQ_REQUIRE_BROWSER=1 demands the browser tests")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium without a window; skips where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install -e '.[test]'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing(f"no Chromium here: none of {', '.join(BROWSERS)} is in PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Page:
    tab = browser.new_page()
    tab.add_init_script(path=CHECKS)
    tab.set_default_timeout(10_000)
    return tab


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of all recorded runs, by the code as it is."""
    runs = sorted(RECORDED.glob("*/runs"))
    return build_report(runs, tmp_path_factory.mktemp("built") / "report.html")


def examine(tab: Page, path: Path, width: int, scheme: str) -> Faults:
    """Open `path` as a reader would; what is wrong with it, by kind."""
    faults: Faults = defaultdict(list)

    def run(checks: dict[str, str]) -> None:
        for check, kind in checks.items():
            found = tab.evaluate(f"checks.{check}()")
            faults[kind] = list(dict.fromkeys(faults[kind] + found))

    listeners = {
        "console": lambda message: (
            message.type in ("error", "warning") and faults["console messages"].append(message.text)
        ),
        "pageerror": lambda error: faults["script errors"].append(str(error)),
        "request": lambda request: (
            request.url.startswith(("data:", path.as_uri()))
            or faults["network requests"].append(request.url)
        ),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.set_viewport_size({"width": width, "height": HEIGHT})
    tab.emulate_media(color_scheme=scheme)
    tab.goto(path.as_uri())
    run(AS_LOADED)
    tab.evaluate("checks.openDetails()")
    run(OPENED)
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    return {kind: found for kind, found in faults.items() if found}


def listed(faults: Faults) -> str:
    lines = []
    for kind, found in faults.items():
        lines += [f"{kind}: {len(found)}", *(f"    {fault}" for fault in found[:5])]
    return "\n".join(lines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "name", [*sorted(p.parent.name for p in RECORDED.glob("*/report.html")), "built"]
)
def test_report_is_legible_and_navigable(
    tab: Page, built: Path, name: str, width: int, scheme: str
) -> None:
    path = built if name == "built" else RECORDED / name / "report.html"
    faults = examine(tab, path, width, scheme)
    assert not faults, f"report {name}, {width} px wide, {scheme}\n{listed(faults)}"


GOOD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>good</title>
<meta name="color-scheme" content="light dark">
<nav><a href="#end">End</a></nav>
<main><p>Text</p><p style="height: 3000px">a long way</p>
<p style="font: bold 19px sans-serif; color: #777">large</p>
<p style="background: #eee"><span style="background: rgb(0 0 0 / .1); color: #111">layers</span></p>
<figure><svg width="200" height="40" viewBox="0 0 100 20">
<defs><path id="half" d="M0 0H50V20H0z"/></defs>
<rect width="50" height="20" fill="#eee"/><use href="#half" x="50" fill="#eee"/>
<path d="M0 11.5H100V20H0z" fill="none" stroke="#000" stroke-width="2"/>
<path d="M0 12H100" stroke="#000"/>
<text x="5" y="14" font-size="5.5" fill="#111">11 px</text>
<text x="60" y="14" font-size="6" fill="#111"><tspan>10</tspan><tspan x="62">3</tspan></text>
<rect y="11" width="100" height="2" fill="#111" fill-opacity=".9"/>
</svg></figure>
<div style="overflow-x: auto"><table><tr><td style="min-width: 2000px">wide</table></div>
<details><summary>More</summary><p>less</p></details>
{}<h2 id="end" style="color: #777">End</h2></main></html>"""


def svg(content: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="40">{content}</svg>'


def words(fill: str, size: int = 14) -> str:
    return f'<text y="30" font-size="{size}" fill="{fill}">words</text>'


WIDE = '<div style="width: 400px">x</div>'
GRADIENT = '<linearGradient id="g"><stop stop-color="#fff"/></linearGradient>'
#: What is wrong with it -> kind of fault, part of the complaint, what to put into GOOD.
BAD = {
    "wide": ("sideways scroll", "is 408 px wide", WIDE),
    "wide when opened": (
        "sideways scroll",
        "is 408 px wide",
        f"<details><summary>x</summary>{WIDE}</details>",
    ),
    "scrolled picture": (
        "pictures that do not fit",
        "8 to 508 px of 8 to 382 px",
        '<div style="overflow-x: auto"><img alt="" style="width: 500px; height: 9px"></div>',
    ),
    "picture wider than its box": (
        "pictures that do not fit",
        "8 to 348 px of 8 to 308 px",
        '<div style="overflow-x: auto; width: 300px">'
        '<img alt="" style="width: 340px; height: 9px"></div>',
    ),
    "picture cut on the left": (
        "pictures that do not fit",
        "-32 to 68 px",
        '<img alt="" style="margin-left: -40px; width: 100px; height: 9px">',
    ),
    "text of 10 px": (
        "small text in figures",
        '"words" has 10.0 px',
        '<svg width="200" height="40" viewBox="0 0 400 80">' + words("CanvasText", 20) + "</svg>",
    ),
    "text in an image": (
        "charts without text",
        "img",
        f"<img alt='' src='data:image/svg+xml,{svg(words('CanvasText'))}'>",
    ),
    "outlined letters": ("charts without text", "svg", svg('<path d="M0 0H9V9"/>')),
    "grey on the page": ("low contrast", "#777777 on #121212", '<p style="color: #777">x</p>'),
    "translucent": ("low contrast", "#595959 on #121212", '<p style="opacity: .3">x</p>'),
    "grey in a figure": ("low contrast", "#777777 on #121212", svg(words("#777"))),
    "white on a white shape": (
        "low contrast",
        "#ffffff on #ffffff",
        svg('<rect width="200" height="40" fill="#fff"/>' + words("#fff")),
    ),
    "text over a gradient": (
        "low contrast",
        "lies over an image, gradient",
        svg(GRADIENT + '<rect width="200" height="40" fill="url(#g)"/>' + words("#000")),
    ),
    "no target": ("links without a target", "#nowhere", '<nav><a href="#nowhere">x</a></nav>'),
    "twice": ("ids used twice", "twice", '<p id="twice">x</p><p id="twice">x</p>'),
    "no tab stop": (
        "not reachable by keyboard",
        'summary "x"',
        '<details><summary tabindex="-1">x</summary></details>',
    ),
    "target out of sight": (
        "table of contents",
        "leads to -99 px",
        '<nav><a href="#up">x</a></nav><div id="up" style="position: fixed; top: -99px">x</div>',
    ),
    "covered link": (
        "table of contents",
        'a "End" is covered',
        '<p style="position: absolute; top: 0; left: 0; width: 300px; height: 60px">x</p>',
    ),
    "empty contents": ("table of contents", "there is no", "<style>nav { display: none }</style>"),
    "warning": ("console messages", "careful", "<script>console.warn('careful')</script>"),
    "exception": ("script errors", "broken", "<script>throw new Error('broken')</script>"),
    "foreign image": (
        "network requests",
        "http://127.0.0.1:9/logo.png",
        '<img alt="" src="http://127.0.0.1:9/logo.png">',
    ),
}


def test_a_good_page_has_no_faults(tab: Page, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(GOOD.format(""), encoding="utf-8")
    assert examine(tab, page, 390, "dark") == {}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_page_is_found_out(tab: Page, tmp_path: Path, name: str) -> None:
    kind, complaint, text = BAD[name]
    page = tmp_path / "page.html"
    page.write_text(GOOD.format(text), encoding="utf-8")
    faults = examine(tab, page, 390, "dark")
    assert complaint in faults[kind][0]
    # what cannot be fetched is also an error in the console
    assert faults.keys() - {kind} == ({"console messages"} if kind == "network requests" else set())


def test_what_makes_a_page_wide_is_named(tab: Page, tmp_path: Path) -> None:
    """The innermost of it, and no table that scrolls in its own box."""
    page = tmp_path / "page.html"
    page.write_text(GOOD.format(f'<section style="width: 390px">{WIDE}</section>'), "utf-8")
    found = examine(tab, page, 390, "light")["sideways scroll"]
    assert found == ["the page is 408 px wide, the window 390 px", 'div "x"']


@pytest.mark.parametrize(
    ("colour", "ratio"),
    [((0, 0, 0), 21.0), ((118, 118, 118), 4.54), ((119, 119, 119), 4.48), ((255, 0, 0), 4.0)],
)
def test_contrast_is_that_of_wcag(tab: Page, colour: tuple[int, int, int], ratio: float) -> None:
    """Ratios to white as WebAIM's contrast checker prints them."""
    found = tab.evaluate("colour => checks.contrastOf(colour, [255, 255, 255])", colour)
    assert found == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail), ("", pytest.skip)])
def test_without_a_browser_ci_fails_and_others_skip(
    monkeypatch: pytest.MonkeyPatch, required: str, outcome: Any
) -> None:
    monkeypatch.setenv("ROBUQ_REQUIRE_BROWSER", required)
    with pytest.raises(outcome.Exception, match="no Chromium"):
        missing("no Chromium here")


@pytest.mark.parametrize("side", [0, 1])
def test_marks_have_the_colours_of_their_key(tab: Page, tmp_path: Path, side: int) -> None:
    """By the pixels: of a mark that <use> clones, the computed style does not say what is drawn."""
    with panel("marks", "a mark of every meaning") as drawn:
        for place, meaning in enumerate(MEANINGS):
            sns.scatterplot(x=[place], y=[0], s=400, color=colour(meaning), ax=drawn.axes)
            sns.pointplot(
                x=[place], y=[1], color=colour(meaning), marker="X", markersize=16, ax=drawn.axes
            )
    path = tmp_path / "marks.html"
    head = f'<!doctype html><meta name="color-scheme" content="light dark"><style>{style_sheet()}'
    path.write_text(f"{head}</style>{drawn.picture.svg}", "utf-8")
    tab.emulate_media(color_scheme=("light", "dark")[side])
    tab.goto(path.as_uri())
    with Image.open(io.BytesIO(tab.screenshot())) as shot:
        pixels = np.unique(np.asarray(shot.convert("RGB")).reshape(-1, 3), axis=0)
    painted = {"#" + bytes(pixel).hex() for pixel in pixels.tolist()}
    for name in MEANINGS.values():
        shown, hidden = COLOURS[name][side], COLOURS[name][1 - side]
        assert shown in painted, name
        assert hidden not in painted, name
