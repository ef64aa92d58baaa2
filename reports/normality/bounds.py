"""Tables on what can be proved: the Berry–Esseen bound, several coordinates, decay with width."""

from __future__ import annotations

import statistics

from reports.normality.cells import (
    UNDEFINED,
    four,
    median_cell,
    number_cell,
    row_cell,
    span,
    three,
    two,
)
from reports.normality.data import NormalityRun, Row, percent, value
from reports.tables import Column, Table, header_cell, text_cell
from reports.text import plural

#: Rejected this many times as often as the null counts as clearly more often.
LOUD = 2


def lyapunov_table(study: NormalityRun) -> Table:
    """L3 and the Berry–Esseen bound of every measured token, by layer type."""
    columns = [
        Column("layer type", False),
        Column("model", False),
        Column("L₃", note="median [5 % to 95 %]"),
        Column("least possible", note="1/√d"),
        Column("bound 0.56·L₃", note="median"),
        Column("void", note="bound ≥ 1"),
        Column("tokens"),
    ]
    table = Table("L₃ of the untransformed tokens, and what it promises", columns)
    for subject, row in _ordered(study, "lyapunov"):
        sub = f"[{span(row, 'l3_q05', 'l3_q95', three)}]"
        table.rows.append(
            [
                row_cell(row),
                text_cell(subject),
                number_cell(row, "l3_median", three, sub=sub),
                number_cell(row, "l3_least_possible", three),
                number_cell(row, "bound_median", three),
                number_cell(row, "void_share", percent),
                text_cell(row["tokens"]),
            ]
        )
    table.note = (
        "L₃ = ‖x‖₃³ / ‖x‖₂³ is 1/√d for a flat token and 1 for a one-hot token. For a fixed token "
        "and random signs, the distribution of each coordinate is within 0.56·L₃ of the normal one "
        "(Berry–Esseen with the constant of Shevtsova 2010); from 1 on that says nothing."
    )
    return table


def bound_table(study: NormalityRun) -> Table:
    """The bound against the exact distance and against redrawn signs."""
    columns = [
        Column("layer type", False),
        Column("model", False),
        Column("violations", note="of tokens"),
        Column("bound", note="median"),
        Column("exact distance", note="median"),
        Column("exact distance", note="greatest"),
        Column("measured", note="median"),
        Column("slack", note="DKW"),
        Column("redraws"),
    ]
    table = Table("Check of the Berry–Esseen bound, token by token", columns)
    for place in study.places:
        for subject in study.subjects:
            rows = study.of("bound", subject=subject, place=place)
            if not rows:
                continue
            exact = [v for row in rows if (v := value(row, "exact_distance")) is not None]
            violated = sum(row["violated"] == "True" for row in rows)
            table.rows.append(
                [
                    row_cell(rows[0]),
                    text_cell(subject),
                    text_cell(f"{violated} of {len(rows)}", study.href),
                    median_cell(rows, "bound"),
                    text_cell(three(statistics.median(exact)) if exact else UNDEFINED),
                    text_cell(three(max(exact)) if exact else UNDEFINED),
                    median_cell(rows, "measured_distance"),
                    median_cell(rows, "dkw_slack"),
                    text_cell(rows[0]["draws"]),
                ]
            )
    table.note = (
        "Distance: greatest difference between the distribution functions of one coordinate under "
        "random signs and of the normal. Exact: by inversion of the characteristic function. "
        "Measured: from redrawn signs; a violation is a measured distance above bound + slack, "
        "which chance allows for a share α of tokens at most."
    )
    return table


def bound_words(study: NormalityRun) -> str:
    rows = study.tables["bound"]
    if not rows:
        return "Check of the Berry–Esseen bound: not run."
    violated = sum(row["violated"] == "True" for row in rows)
    pairs = [
        (exact, bound)
        for row in rows
        if (exact := value(row, "exact_distance")) and (bound := value(row, "bound"))
    ]
    text = (
        f"Berry–Esseen: the bound is violated for {violated} of {plural(len(rows), 'token')} "
        f"(α = {value(rows[0], 'alpha') or 0:g})"
    )
    if pairs:
        ratios = [bound / exact for exact, bound in pairs]
        text += (
            f"; it is safe but loose, {three(statistics.median(ratios))} times the exact distance "
            f"in the median, which itself is at most {three(max(e for e, _ in pairs))}"
        )
    return text + "."


def multivariate_table(study: NormalityRun) -> Table:
    """The bound for several coordinates at once, and the width it would need."""
    columns = [
        Column("layer type", False),
        Column("coordinates k"),
        Column("bound", note="median of tokens"),
        Column("bound of a flat token", note="the best case"),
        Column("width needed", note="flat token, bound < 1"),
        Column("informative up to k"),
    ]
    table = Table("Several coordinates at once", columns)
    for row in _by_place(study, "multivariate"):
        table.rows.append(
            [
                row_cell(row),
                text_cell(row["k"]),
                number_cell(row, "bound_median", three),
                number_cell(row, "bound_of_flat_token", three),
                text_cell(row["width_needed"]),
                text_cell(row["largest_informative_k"]),
            ]
        )
    table.note = "The bound is (42·k^¼ + 16)·Σⱼ E‖Σ^−½Xⱼ‖³ (Raič 2019), over convex sets."
    return table


def multivariate_words(study: NormalityRun) -> str:
    """Whether the bound says anything, and from which width on it could."""
    rows = study.tables["multivariate"]
    if not rows:
        return "Multivariate bound: not run."
    best = max(int(row["largest_informative_k"]) for row in rows)
    needed: dict[int, int] = {}
    for row in rows:
        needed[int(row["k"])] = int(row["width_needed"])
    widths = "; ".join(f"{width} for k = {k}" for k, width in sorted(needed.items()))
    found = (
        "is void (at least 1) for every token here, even for a single coordinate"
        if best == 0
        else f"says something for at most {plural(best, 'coordinate')} at once"
    )
    return (
        f"Many coordinates at once: the best known bound on joint normality {found}. Even a flat "
        f"token would need a width of {widths}. So joint normality of all coordinates is nowhere "
        "proved; projections test it instead."
    )


def projections_table(study: NormalityRun) -> Table:
    """Random projections of pairs and of eight coordinates."""
    columns = [
        Column("layer type", False),
        Column("coordinates k"),
        Column("rejected"),
        Column("null"),
        Column("median W"),
        Column("null", note="median W"),
        Column("n"),
        Column("tokens"),
    ]
    table = Table("Random projections of k coordinates with random signs", columns)
    for row in _by_place(study, "projections"):
        table.rows.append(
            [
                row_cell(row),
                text_cell(row["k"]),
                number_cell(row, "rejected", percent),
                number_cell(row, "rejected_null", percent),
                number_cell(row, "shapiro_w_median", four),
                number_cell(row, "shapiro_w_null", four),
                text_cell(row["n"]),
                text_cell(row["tokens"]),
            ]
        )
    table.note = (
        "By Cramér–Wold, coordinates are jointly normal when every projection is. One random "
        "direction per row; Shapiro–Wilk on its n values of each token."
    )
    return table


def slopes_table(study: NormalityRun) -> Table:
    """Measured decay of the exact distance with the width."""
    columns = [
        Column("tokens", False),
        Column("slope", note="[95 %]"),
        Column("−½", False, note="Berry–Esseen"),
        Column("−1", False, note="symmetric sums"),
        Column("slope of L₃"),
        Column("widths"),
    ]
    table = Table("How fast the distance to normal falls with the width (log–log slope)", columns)
    for row in study.tables["decay_slopes"]:
        sub = f"[{span(row, 'low', 'high', two)}]"
        agreement = [
            text_cell("agrees" if row[f"agrees_with_minus_{rate}"] == "True" else "differs")
            for rate in ("half", "one")
        ]
        table.rows.append(
            [
                header_cell(row["source"]),
                number_cell(row, "slope", two, sub=sub),
                *agreement,
                number_cell(row, "l3_slope", two),
                text_cell(row["widths"]),
            ]
        )
    table.note = (
        "Real tokens: random parts of captured tokens. A rate agrees when it is in the interval of "
        "the slope. The bound promises 1/√d; sums with symmetric signs can be as fast as 1/d."
    )
    return table


def channels_table(study: NormalityRun) -> Table | None:
    """What plain Hadamard would need: channels that do not depend on each other."""
    columns = [
        Column("layer type", False),
        Column("model", False),
        Column("dependence", note="0 when independent"),
        Column("channel Lyapunov ratio"),
        Column("L₃ of a token", note="median"),
        Column("layers"),
    ]
    table = Table("What plain Hadamard assumes: independent channels", columns)
    for place in study.places:
        for subject in study.subjects:
            rows = study.of("channels", subject=subject, place=place)
            if rows:
                dependence = [v for r in rows if (v := value(r, "dependence")) is not None]
                sub = f"{two(min(dependence))} to {two(max(dependence))}" if dependence else ""
                table.rows.append(
                    [
                        row_cell(rows[0]),
                        text_cell(subject),
                        median_cell(rows, "dependence", two, sub),
                        median_cell(rows, "channel_lyapunov"),
                        median_cell(rows, "token_l3_median"),
                        text_cell(str(len(rows))),
                    ]
                )
    table.note = (
        "Plain Hadamard has no randomness of its own: the central limit theorem then needs "
        "channels that are nearly independent over tokens. Dependence is the root-mean-square "
        "relative difference between the variances of its coordinates and those of independent "
        "channels: median over layers, and their range. Random signs need no such assumption."
    )
    return table if table.rows else None


def projections_words(study: NormalityRun) -> str:
    """Where projections are rejected clearly more often than those of normal tokens."""
    rows = [
        (rejected, null, row)
        for row in _by_place(study, "projections")
        if (rejected := value(row, "rejected")) is not None
        and (null := value(row, "rejected_null")) is not None
    ]
    if not rows:
        return "Projections: not run."
    loud = [
        f"{row['layer_type']} (k = {row['k']}) {percent(rejected)} against {percent(null)}"
        for rejected, null, row in rows
        if rejected > LOUD * null
    ]
    if not loud:
        return f"No projection is rejected more than {LOUD} times as often as of normal tokens."
    return (
        f"Of {plural(len(rows), 'projection')}, {len(loud)} "
        f"{'is' if len(loud) == 1 else 'are'} rejected more than {LOUD} times as often as those of "
        f"normal tokens, which speaks against joint normality there: {'; '.join(loud)}."
    )


def _by_place(study: NormalityRun, table: str) -> list[Row]:
    return [row for place in study.places for row in study.of(table, place=place)]


def _ordered(study: NormalityRun, table: str) -> list[tuple[str, Row]]:
    return [
        (subject, row)
        for place in study.places
        for subject in study.subjects
        for row in study.of(table, subject=subject, place=place)
    ]
