"""The look of every figure: contrast, one meaning per colour, labels that do not collide."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.figures import (
    COLOURS,
    MEANINGS,
    colour,
    heat,
    legend_below,
    log_axis,
    log_edges,
    panel,
    points,
    style_sheet,
)

LEAST_CONTRAST = 4.5  # WCAG 2.1, level AA


def contrast(one: str, other: str) -> float:
    """Contrast of two colours #rrggbb after WCAG 2.1, written apart from the code under test."""

    def luminance(text: str) -> float:
        srgb = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", sorted(COLOURS.keys() - {"page", "line"}))
def test_every_colour_of_text_can_be_read_on_both_pages(name: str) -> None:
    for side in (0, 1):
        assert contrast(COLOURS[name][side], COLOURS["page"][side]) >= LEAST_CONTRAST


def test_a_colour_has_one_meaning_and_an_unknown_one_is_named() -> None:
    assert len(set(MEANINGS.values())) == len(MEANINGS)
    assert colour("rotated") == colour("blue") == COLOURS["blue"][0]
    with pytest.raises(KeyError, match="no colour means 'roated'"):
        colour("roated")


def test_what_is_drawn_has_only_colours_that_a_dark_page_changes() -> None:
    with panel("lines", "two lines", title="Lines") as drawn:
        for meaning in MEANINGS:
            sns.lineplot(x=[1, 2], y=[1, 3], ax=drawn.axes, color=colour(meaning), marker="o")
        drawn.axes.set(xlabel="step", ylabel="loss")
    used = set(re.findall(r"#[0-9a-f]{6}", drawn.picture.svg))
    known = {light for light, _ in COLOURS.values()} | {"#ffffff"}  # seaborn's edge of marks
    assert {colour(meaning) for meaning in MEANINGS} <= used <= known
    for light, dark in COLOURS.values():
        assert re.search(rf'fill: {light}"\]{{fill:{dark}!important}}', style_sheet())


def test_pictures_of_one_page_share_no_identifier(tmp_path: Path) -> None:
    found = []
    for name in ("loss a", "loss b"):
        with panel(name, 'says "a" & <b>') as drawn:
            sns.lineplot(x=[1, 2], y=[1, 3], ax=drawn.axes)
        tree = ElementTree.fromstring(drawn.picture.svg)
        assert tree.attrib["aria-label"] == 'says "a" & <b>'
        ids = [node.attrib["id"] for node in tree.iter() if "id" in node.attrib]
        assert len(ids) == len(set(ids))
        wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn.picture.svg))
        assert wanted <= set(ids)
        found.append(set(ids))
        saved = drawn.picture.save(tmp_path / "figure.svg")
        assert ElementTree.parse(saved).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert not found[0] & found[1]


def test_the_same_data_give_the_same_bytes() -> None:
    def once() -> str:
        with panel("same", "the same") as drawn:
            sns.scatterplot(x=[1, 2, 3], y=[1, 3, 2], ax=drawn.axes, color=colour("reference"))
        return drawn.picture.svg

    assert once() == once()


def test_a_panel_is_no_picture_while_it_is_drawn() -> None:
    with panel("early", "too early") as drawn, pytest.raises(RuntimeError, match="has ended"):
        _ = drawn.picture


def test_a_legend_below_keeps_its_labels_and_leaves_the_axes() -> None:
    frame = pd.DataFrame({"x": [1, 2, 1, 2], "y": [1, 2, 2, 1], "kind": [*"aabb"]})
    with panel("legend", "two lines") as drawn:
        with pytest.raises(ValueError, match="no legend"):
            legend_below(drawn)
        sns.lineplot(frame, x="x", y="y", style="kind", ax=drawn.axes)
        legend_below(drawn)
        drawn.figure.draw_without_rendering()
        (moved,) = drawn.figure.legends
        assert [text.get_text() for text in moved.get_texts()] == ["a", "b"]
        assert moved.get_window_extent().y1 < drawn.axes.get_window_extent().y0


def test_points_stand_between_their_own_limits() -> None:
    """Not at the mean of the three numbers, which lies elsewhere in a lopsided interval."""
    frame = pd.DataFrame(
        {"of": ["a", "b"], "low": [1.0, 2.0], "at": [2.0, 3.0], "high": [9.0, 4.0]}
    )
    with panel("points", "two") as drawn:
        points(frame, drawn.axes, "of", ["low", "at", "high"], color=colour("rotated"))
        lines = [np.asarray(line.get_xdata()).tolist() for line in drawn.axes.lines]
    assert [line for line in lines if len(set(line)) > 1] == [[2, 3], [1, 9], [2, 4]]


def test_numbers_in_a_heat_map_can_be_read_and_stand_in_their_cells() -> None:
    edges = [0, 1, 2, 3, 4, 5, 6]
    values = pd.DataFrame(np.arange(6.0).reshape(2, 3) + 0.5, columns=list("abc"))
    values.iloc[1, 1] = np.nan
    with panel("heat", "a heat map") as drawn:
        heat(values, drawn.axes, edges, "value", texts=True, limit=3)
    texts = {text.get_text(): text for text in drawn.axes.texts}
    assert sorted(texts) == ["0.5", "1.5", "2.5", "3.5", "5.5"]  # an absent value is blank
    mesh = drawn.axes.collections[0]
    shown = np.ravel(values.to_numpy())
    faces = dict(
        zip(shown[~np.isnan(shown)], mesh.cmap(mesh.norm(shown))[~np.isnan(shown)], strict=True)
    )
    assert len({tuple(face) for face in faces.values()}) == 5
    for value, text in texts.items():
        face = "#" + "".join(f"{round(255 * part):02x}" for part in faces[float(value)][:3])
        assert contrast(face, str(text.get_color())) >= LEAST_CONTRAST


@settings(max_examples=25, deadline=None)
@given(st.floats(-6, 5), st.floats(0.02, 9))
def test_labels_of_a_logarithmic_axis_do_not_collide(start: float, decades: float) -> None:
    with panel("log", "logarithmic") as drawn:
        sns.lineplot(x=[10**start, 10 ** (start + decades)], y=[0, 1], ax=drawn.axes)
        log_axis(drawn.axes, "x")
        drawn.figure.canvas.draw()
        low, high = drawn.axes.get_xlim()
        boxes = [
            label.get_window_extent()
            for place, label in zip(
                drawn.axes.get_xticks(), drawn.axes.get_xticklabels(), strict=True
            )
            if low <= place <= high
        ]
    assert len(boxes) >= 2
    assert all(left.x1 <= right.x0 for left, right in pairwise(sorted(boxes, key=lambda b: b.x0)))


@given(st.floats(1e-8, 1e6), st.floats(1.01, 1e6))
def test_edges_of_a_logarithmic_heat_map_hold_all_values(low: float, factor: float) -> None:
    edges = log_edges(low, low * factor)
    assert edges[0] <= low < low * factor <= edges[-1]
    assert all(first < second for first, second in pairwise(edges))
    assert len(edges) <= 9
    assert log_edges(low, low) == log_edges(-1.0, low) == []


def test_hues_differ_for_those_who_see_no_red_or_green() -> None:
    """Machado et al. (2009), severity 1, on linear RGB; CIE 1976 difference of at least 20."""
    protan = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]])  # fmt: skip
    deutan = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                       [-0.011820, 0.042940, 0.968881]])  # fmt: skip
    for side in (0, 1):
        hues = [COLOURS[name][side] for name in MEANINGS.values()]
        srgb = np.array([[int(hue[i : i + 2], 16) for i in (1, 3, 5)] for hue in hues]) / 255
        rgb = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        for seen in (rgb, rgb @ protan.T, rgb @ deutan.T):
            lab = _lab(np.clip(seen, 0, 1))
            apart = [float(np.linalg.norm(a - b)) for a, b in combinations(lab, 2)]
            assert min(apart) > 20


def _lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    x, y, z = np.moveaxis(np.cbrt(rgb @ to_xyz.T / (0.95047, 1, 1.08883)), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
