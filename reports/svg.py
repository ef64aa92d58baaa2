"""matplotlib figures as inline SVG that follows the page: theme colours, no fonts, unique ids.

matplotlib draws with stand-in colours, which are replaced by CSS variables afterwards; text stays
text. The result depends on the data and the matplotlib version alone.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Stand-ins, replaced by the CSS variable of the same name.
COLOURS = {
    "text": "#000101",
    "muted": "#000102",
    "line": "#000103",
    "page": "#000104",
    "neutral": "#000105",
    "blue": "#000106",
    "green": "#000107",
    "orange": "#000108",
    "purple": "#000109",
    "heat": "#00010a",
    "bits1": "#000111",
    "bits2": "#000112",
    "bits3": "#000113",
    "bits4": "#000114",
    "on1": "#000121",
    "on2": "#000122",
    "on3": "#000123",
    "on4": "#000124",
}
_PIXELS_PER_POINT = 1.33
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robuq-bench",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["text"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "text.color": COLOURS["text"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "axes.grid": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def render(draw: Callable[[], Figure], name: str, alt: str) -> str:
    """Run `draw` under the fixed style and return the SVG element, ready for the page."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return clean_svg(buffer.getvalue(), name, alt)


def clean_svg(svg: str, name: str, alt: str) -> str:
    """Make matplotlib's SVG file a small inline element that follows the page's theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    for colour, sentinel in COLOURS.items():
        svg = svg.replace(sentinel, f"var(--{colour})")
    svg = re.sub(r"font-family: [^;\"]*(?:; )?", "", svg)
    svg = re.sub(r"font: (\d+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace("xlink:href", "href").replace("<defs>\n  \n </defs>", "")
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d+", _shorter, tag[0]), svg)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", svg))
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", svg)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    if view is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    width = round(float(view[1]) * _PIXELS_PER_POINT)
    label = html.escape(alt, quote=True)
    head = f'<svg class="chart" role="img" aria-label="{label}" style="width: {width}px" {view[0]}>'
    svg = head + svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def compact(svg: str) -> str:
    """The same picture in half the bytes, to a tenth of a point, for figures of many panels."""
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r"; stroke-linejoin: miter|; stroke-linecap: round", "", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda attribute: _coordinates(attribute[0]), svg)
    for _ in range(3):
        svg = re.sub(r"<g/>\n?|<g>\s*</g>\n?", "", svg)
        svg = re.sub(r"<g>\s*(<text[^>]*>[^<]*</text>)\s*</g>", r"\1", svg)
    return svg


def _coordinates(attribute: str) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), attribute)
    # After M or L further pairs are lines anyway; a rectangle needs its corners only once.
    text = re.sub(r"\n(?:L )?", " ", text).replace("M ", "M").replace(' "', '"')
    return re.sub(r"M(\S+) (\S+) (\S+) \2 \3 (\S+) \1 \4 z ?", r"M\1 \2H\3V\4H\1z", text)


def _shorter(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
