"""Tables that test the tests: tokens whose distribution is known."""

from __future__ import annotations

from collections.abc import Sequence

from reports.normality.cells import four, number_cell, two
from reports.normality.data import (
    BEFORE,
    MAIN,
    NormalityRun,
    Row,
    percent,
    ratio_text,
    value,
    words,
)
from reports.tables import Column, Table, header_cell, text_cell

NULL = "gaussian"
_CONTROL_BITS = (2, 4)


def controls_words(study: NormalityRun) -> str:
    """Whether the tests see what they should: the null passes, the positive controls do not."""
    rows = study.of("controls", transform=BEFORE)
    nulls = [(row, _shares(row)) for row in rows if row["control"] == NULL and _shares(row)]
    positive = [(v, r) for r in rows if r["control"] != NULL for v in _shares(r)[:1]]
    if not nulls or not positive:
        return "Controls: not run."
    alpha = value(rows[0], "alpha") or 0.0
    least, row = min(positive, key=lambda pair: pair[0])
    shares = "; ".join(
        f"{percent(min(found))} to {percent(max(found))} of {null['tokens']} at width "
        f"{null['width']}"
        for null, found in nulls
    )
    return (
        f"Do the tests see what they should? Of normal tokens the four tests reject, at α = "
        f"{alpha:g}, {shares}. Of tokens that are not normal, Shapiro–Wilk rejects at least "
        f"{percent(least)} before any transform ({row['control']}, width {row['width']})."
    )


def controls_table(study: NormalityRun, widths: Sequence[int], caption: str) -> Table:
    """Tokens of known distribution: what is rejected, and what they cost."""
    columns = [
        Column("tokens drawn from", False),
        Column("transform", False),
        Column("median W"),
        Column("kurtosis", note="excess, median"),
        Column("SW", note="rejected"),
        Column("AD", note="rejected"),
        Column("Lilliefors", note="rejected"),
        Column("K²", note="rejected"),
        *(Column(f"ratio, {bits} bits") for bits in _CONTROL_BITS),
        Column("n"),
        Column("tokens"),
        Column("degenerate"),
    ]
    table = Table(caption, columns)
    for row in study.tables["controls"]:
        if int(row["width"]) not in widths or row["transform"] not in MAIN:
            continue
        cells = [
            header_cell(
                f"{row['control']} (the null)" if row["control"] == NULL else row["control"]
            ),
            text_cell(words(row["transform"])),
            number_cell(row, "shapiro_w_median", four),
            number_cell(row, "kurtosis_median", two),
        ]
        for test in ("shapiro", "anderson", "lilliefors", "dagostino"):
            cells.append(number_cell(row, f"{test}_rejected", percent))
        cells += [number_cell(row, f"ratio_{bits}", ratio_text) for bits in _CONTROL_BITS]
        cells += [text_cell(row["n"]), text_cell(row["tokens"]), text_cell(row["degenerate"])]
        table.rows.append(cells)
    table.note = (
        "Tests: Shapiro–Wilk, Anderson–Darling, Lilliefors, D’Agostino K². Only the first should "
        "reject as rarely as α; a test that does not reject the others before a transform is blind."
    )
    return table


def control_widths(study: NormalityRun) -> list[int]:
    return sorted({int(row["width"]) for row in study.tables["controls"]})


def _shares(row: Row) -> list[float]:
    names = ("shapiro", "anderson", "lilliefors", "dagostino")
    return [v for test in names if (v := value(row, f"{test}_rejected")) is not None]
