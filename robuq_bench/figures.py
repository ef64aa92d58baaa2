"""How every figure looks, in reports and in runs: one size, one palette, light and dark.

seaborn and matplotlib draw at the width of a phone, so that no text is ever scaled down; a picture
of several panels is several pictures. A colour has one meaning (`MEANINGS`) in all of them. The SVG
stays as matplotlib wrote it: `style_sheet` maps its colours to those of a dark page by selectors.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

#: Width of a panel in inches: 336 CSS pixels, which a screen of 390 shows whole.
WIDTH = 3.5
#: Name -> colour on a light page, colour on a dark one. Each reaches the contrast of text on its
#: page; hues are chosen to stay apart for colour-blind readers (a test says by how much).
COLOURS = {
    "text": ("#1b1e23", "#e7e9ea"),
    "muted": ("#565e68", "#a3abb4"),
    "line": ("#d8dbdc", "#363c43"),
    "page": ("#fcfcfb", "#14171a"),
    "neutral": ("#5b6470", "#a9b1ba"),
    "blue": ("#3370cc", "#99adf5"),
    "brown": ("#663300", "#c27014"),
    "green": ("#298547", "#52eb7a"),
    "purple": ("#7000ff", "#ad5cff"),
    "gold": ("#8f7014", "#f5cc29"),
    "wine": ("#85003d", "#ff297a"),
}
#: What a hue stands for, in every figure of the project; a mark tells apart what shares one.
MEANINGS = {
    "rotated": "blue",
    "uniform bits": "green",
    "partly rotated": "purple",
    "not rotated": "brown",
    "reference": "neutral",
    "before training": "gold",
    "after training": "wine",
}
#: Of ordered values; equal steps of it look equal, to colour-blind readers too.
SEQUENTIAL = "cividis"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robuq-bench",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.edgecolor": COLOURS["muted"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.titlecolor": COLOURS["text"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "text.color": COLOURS["text"][0],
    "grid.color": COLOURS["line"][0],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "patch.edgecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# What no reader sees of matplotlib's SVG, half of it: a page may hold hundreds of curves.
_NO_USE = re.compile(
    r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"|<metadata>.*?</metadata>|(?<=\n) +',
    re.DOTALL,
)
_GEOMETRY = re.compile(r' (?:d|x|y)="[^"]*"')
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")  # 0.01 points are 0.013 pixels


def colour(meaning: str) -> str:
    """The colour of a meaning, or of a name in `COLOURS`; KeyError names what there is."""
    name = MEANINGS.get(meaning, meaning)
    if name not in COLOURS:
        raise KeyError(f"no colour means {meaning!r}; there are {sorted({*MEANINGS, *COLOURS})}")
    return COLOURS[name][0]


@dataclass(frozen=True)
class Picture:
    """A finished panel; `alt` says in words what it shows, `svg` is an element for a page."""

    svg: str
    alt: str

    def save(self, path: Path) -> Path:
        """Write it as a file of its own, with the dark colours in it; return `path`."""
        from robuq_bench.files import atomic_write_text

        head, _, rest = self.svg.partition(">")
        return atomic_write_text(path, f"{head}><style>{style_sheet()}</style>{rest}\n")


class Panel:
    """One panel while it is drawn: `axes` for seaborn, and `picture` when the block has ended."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure, self.axes = figure, axes
        self._picture: Picture | None = None

    @property
    def picture(self) -> Picture:
        if self._picture is None:
            raise RuntimeError("a panel is a picture after its `with` block has ended")
        return self._picture


@contextmanager
def panel(name: str, alt: str, *, height: float = 2.3, title: str = "") -> Iterator[Panel]:
    """Draw one panel: `with panel("loss", "Loss by step ...") as drawn: lineplot(ax=drawn.axes)`.

    Args:
        name: unique on its page; makes the ids of the SVG unique.
        alt: what the picture says, for those who do not see it.
        height: in inches; the width is always `WIDTH`.
        title: printed above the axes.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        sns.set_theme(style="ticks", rc=_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        drawn = Panel(figure, figure.subplots())
        yield drawn
        if title:
            drawn.axes.set_title(title)
        buffer = io.StringIO()
        # `savefig` would draw all of it twice, first for the layout.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawn._picture = Picture(_element(buffer.getvalue(), name, alt), alt)


def log_axis(axes: Axes, which: str) -> None:
    """Make "x" or "y" logarithmic, with plain numbers at 1, 2 and 5 (at decades, where many)."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low) if low > 0 else np.inf
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        most = 1.4 if which == "x" else 2  # labels beside each other touch sooner
        subs = (1.0, 2.0, 5.0) if decades < most else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_edges(low: float, high: float) -> list[float]:
    """Edges for `heat` at 1, 2 and 5, at decades where those are many; none without a range."""
    if not 0 < low < high:
        return []
    # One more at both ends: a logarithm may be rounded across a decade.
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1,)):
        edges = [float(f"{step}e{decade}") for decade in decades for step in steps]
        inner = [edge for edge in edges if low < edge < high]
        if len(inner) <= 5:
            break
    return [max(e for e in edges if e <= low), *inner, min(e for e in edges if e >= high)]


def legend_below(drawn: Panel, columns: int = 2) -> None:
    """Move the legend that seaborn made out of the axes, to where it covers nothing.

    Raises:
        ValueError: there is no legend.
    """
    legend = drawn.axes.get_legend()
    if legend is None:
        raise ValueError("the panel has no legend to move")
    handles = [handle for handle in legend.legend_handles if handle is not None]
    labels = [text.get_text() for text in legend.get_texts()]
    legend.remove()
    drawn.figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def points(frame: pd.DataFrame, axes: Axes, y: str, limits: Sequence[str], **options: Any) -> None:
    """Horizontal points with their intervals, one for each row of a table.

    Args:
        frame: a row per point.
        axes: where to draw.
        y: the column of labels.
        limits: the columns of the lower limit, the point and the upper limit, in any order.
        options: seaborn's, such as `hue`, `markers` and `dodge`.
    """
    # The median of the three is the point, their whole range the interval.
    look = {"estimator": "median", "errorbar": ("pi", 100), "linestyle": "none", "legend": False}
    long = frame.melt([name for name in frame if name not in limits], limits)
    sns.pointplot(long, x="value", y=y, ax=axes, **look | options)
    axes.set_ylabel("")


def heat(
    frame: pd.DataFrame,
    axes: Axes,
    edges: Sequence[float],
    label: str,
    *,
    texts: pd.DataFrame | bool | None = None,
    limit: float | None = None,
) -> None:
    """A heat map of few colours, so that a colour can be read off its bar.

    Args:
        frame: values; rows and columns label the axes, NaN is left blank.
        axes: where to draw.
        edges: ascending limits of the colours; values beyond the ends take the outer ones.
        label: what the colour says.
        texts: what is printed in the cells; True prints the values.
        limit: an edge that is marked on the bar, such as that of a rule.
    """
    steps = len(edges) - 1
    colours = ListedColormap(sns.color_palette(SEQUENTIAL, steps + 2)[1:-1])
    norm = BoundaryNorm(list(edges), steps)
    shown = frame.clip(edges[0], np.nextafter(edges[-1], -np.inf))
    is_frame = isinstance(texts, pd.DataFrame)
    sns.heatmap(
        shown,
        ax=axes,
        cmap=colours,
        norm=norm,
        annot=texts if is_frame else bool(texts),
        fmt="" if is_frame else ".3g",
        annot_kws={"fontsize": 8.5},
        linewidths=0.6 if frame.size <= 400 else 0,
        linecolor=COLOURS["page"][0],
        cbar_kws={"orientation": "horizontal", "label": label, "aspect": 40, "pad": 0.02},
    )
    for text in axes.texts:  # seaborn's choice of black or white is too faint on middle tones
        x, y = text.get_position()
        cell = colours(norm(shown.to_numpy(float)[int(y), int(x)]))
        text.set_color("#ffffff" if _luminance(cell) < 0.179 else "#010101")
    axes.grid(visible=False)
    axes.tick_params(length=0, rotation=0)
    bar = axes.collections[0].colorbar
    assert bar is not None  # cbar is on
    bar.set_ticks(list(edges), labels=[f"{edge:g}" for edge in edges])
    bar.outline.set_visible(False)
    bar.ax.grid(visible=False)
    if limit is not None:
        bar.ax.axvline(limit, color=COLOURS["text"][0], linewidth=1.6)


def style_sheet() -> str:
    """CSS that colours figures and their keys (`.key .blue`) as the page is: light or dark."""
    # Without an ancestor: a mark is cloned by <use>, where no selector sees past the clone.
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{other}!important}}'
        for light, other in COLOURS.values()
        for part in ("fill", "stroke")
    )
    texts, keys = (
        [
            f".chart text{{fill:{COLOURS['text'][side]}}}",
            "".join(f".key .{name}{{color:{pair[side]}}}" for name, pair in COLOURS.items()),
        ]
        for side in (0, 1)
    )
    return (
        f".chart text{{font-family:inherit!important}}{''.join(texts)}"
        f"@media screen and (prefers-color-scheme:dark){{{''.join(keys)}{dark}}}"
    )


def _luminance(rgba: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour as WCAG defines it; both inks reach 4.6 at 0.179."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _element(svg: str, name: str, alt: str) -> str:
    """The `<svg>` of a file, shorter, with ids that no other picture of the page has."""
    prefix = f"p{zlib.crc32(name.encode()):08x}-"
    svg = svg[svg.index("<svg") :].strip()
    svg = _GEOMETRY.sub(lambda found: _LONG_NUMBER.sub(_rounded, found[0]), _NO_USE.sub("", svg))
    for before in (' id="', '="#', "url(#"):
        svg = svg.replace(before, before + prefix)
    head = f'<svg class="chart" role="img" aria-label="{escape(alt)}"'
    return head + svg.removeprefix("<svg")


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
