"""Tables of the normality section: verdicts first, then what is behind them."""

from __future__ import annotations

from collections.abc import Sequence

from reports.claims import UNDECIDED
from reports.normality.cells import (
    UNDEFINED,
    four,
    missing,
    number_cell,
    place_cell,
    shown,
    span,
    two,
)
from reports.normality.data import (
    BEFORE,
    LIMIT,
    MAIN,
    REFERENCE,
    WITHOUT_DC,
    NormalityRun,
    Place,
    Row,
    bits_text,
    block_of,
    percent,
    place_of,
    ratio_text,
    value,
    words,
)
from reports.tables import Cell, Column, Table, header_cell, text_cell
from reports.text import Phrase, listing, plural

_DC_NOTE = (
    " “Plain Hadamard without DC” leaves out the one coordinate that is √d times the token’s mean: "
    "no quantizer may do that, it shows what that coordinate costs."
)
_TESTS = (
    ("shapiro", "Shapiro–Wilk"),
    ("anderson", "Anderson–Darling"),
    ("lilliefors", "Lilliefors"),
    ("dagostino", "D’Agostino"),
)


def outcome_table(study: NormalityRun, transforms: Sequence[str], caption: str) -> Table:
    """Transform × subject × bits: the verdict over all layer types."""
    columns = [Column("transform", False), Column("model", False)]
    columns += [Column(bits_text([bits]), False) for bits in study.bits]
    table = Table(caption, columns)
    for transform in transforms:
        for subject in study.subjects:
            outcomes = [study.outcome(subject, transform, bits) for bits in study.bits]
            if not any(outcomes):
                continue
            cells = [header_cell(words(transform)), text_cell(subject)]
            for outcome in outcomes:
                if outcome is None:
                    cells.append(missing("not measured"))
                    continue
                short = [study.name(j.place) for j in outcome.falling_short]
                short += [study.name(place) for place in outcome.without_interval]
                absent = len(study.places) - len(outcome.judgements) - len(outcome.without_interval)
                note = f"not: {listing(short)}" if short else ""
                if absent > 0:
                    note += f"{'; ' if note else ''}{plural(absent, 'layer type')} not measured"
                cells.append(verdict_cell(outcome.verdict, note))
            table.rows.append(cells)
    table.note = "Below a verdict, the layer types that fall short, the farthest first." + (
        _DC_NOTE if WITHOUT_DC in transforms else _skipped(study)
    )
    return table


def verdict_table(study: NormalityRun, transforms: Sequence[str], caption: str) -> Table:
    """Layer type × transform × bits: mean ratio, upper bound, cells that pass, the worst cell."""
    several = len(study.subjects) > 1
    columns = [Column("layer type", False), Column("transform", False)]
    columns += [Column("model", False)] if several else []
    columns += [Column(bits_text([bits]), False) for bits in study.bits]
    table = Table(caption, columns)
    for place in study.places:
        for transform in transforms:
            for subject in study.subjects:
                found = [study.judgement(subject, place, transform, b) for b in study.bits]
                if not any(found):
                    continue
                cells = [place_cell(place), text_cell(words(transform))]
                cells += [text_cell(subject)] if several else []
                for judgement in found:
                    if judgement is None:
                        cells.append(missing("no interval"))
                        continue
                    sub = (
                        f"[≤ {ratio_text(judgement.high)}] {judgement.passing} of "
                        f"{judgement.cells} cells; worst {ratio_text(judgement.worst_ratio)} in "
                        f"{block_of(judgement.worst_layer)}, t {judgement.worst_timestep}"
                    )
                    if judgement.sign_draws:
                        sub += f"; {judgement.sign_draws}"
                    cells.append(
                        verdict_cell(
                            judgement.verdict, sub, ratio_text(judgement.ratio), study.href
                        )
                    )
                table.rows.append(cells)
    for width, nulls in _nulls(study).items():
        cells = [header_cell("normal tokens", sub=f"width {width}"), text_cell("the null")]
        cells += [text_cell("")] if several else []
        cells += [text_cell(ratio_text(n)) if n is not None else missing("–") for n in nulls]
        table.rows.append(cells)
    table.note = (
        f"Mean error ratio [upper end of its 95 % interval], green where that end is below "
        f"{LIMIT}, red where the whole interval is at or above {LIMIT}, {UNDECIDED} in between. "
        "Then the (layer, timestep) cells that pass alone, and the cell with the greatest ratio."
    )
    return table


def subjects_table(study: NormalityRun) -> Table | None:
    """Layer type × transform, one column per model: what training does to normality."""
    if len(study.subjects) < 2:
        return None
    bits = study.usual_bits
    columns = [Column("layer type", False), Column("transform", False)]
    columns += [Column(subject) for subject in study.subjects]
    table = Table("Does normality survive training? The models side by side", columns)
    for place in study.places:
        for transform in MAIN:
            cells = [place_cell(place), text_cell(words(transform))]
            for subject in study.subjects:
                judgement = study.judgement(subject, place, transform, bits)
                rows = study.of("types", subject=subject, transform=transform, place=place)
                w = value(rows[0], "shapiro_w_median") if rows else None
                kl = value(rows[0], "kl") if rows else None
                if judgement is None or w is None:
                    cells.append(missing("not measured"))
                    continue
                sub = f"W {w:.4f}, KL {UNDEFINED if kl is None else four(kl)}"
                cells.append(text_cell(ratio_text(judgement.ratio), study.href, sub=sub))
            table.rows.append(cells)
    table.note = (
        f"Mean error ratio at {bits_text([bits])}; below it the median Shapiro–Wilk W and the mean "
        "KL to the fitted normal, above that of normal tokens."
    )
    return table


def types_table(study: NormalityRun, transforms: Sequence[str], caption: str) -> Table:
    """Effect sizes before and after, and what Shapiro–Wilk rejects beside the null."""
    columns = [
        Column("layer type", False),
        Column("transform", False),
        *([Column("model", False)] if len(study.subjects) > 1 else []),
        Column("median W", note="5 % quantile"),
        Column("KL", note="above null [95 %]"),
        Column("null’s KL", note="95 % of tokens"),
        Column("TV (plug-in)", note="from KL"),
        Column("rejected", note="raw / after BH / null"),
        Column("|skew|"),
        Column("kurtosis", note="excess"),
        Column("tokens", note="n, degenerate"),
        Column("images"),
    ]
    table = Table(caption, columns)
    for place, transform, subject, row in _type_rows(study, transforms):
        cells = [place_cell(place), text_cell(words(transform))]
        cells += [text_cell(subject)] if len(study.subjects) > 1 else []
        kl = value(row, "kl")
        undefined = int(row.get("kl_undefined") or 0)
        note = "" if kl is None else f"[{span(row, 'kl_low', 'kl_high', four)}]"
        if undefined:
            note += f" {undefined} undefined"
        cells += [
            number_cell(
                row, "shapiro_w_median", four, study.href, sub=shown(row, "shapiro_w_q05", four)
            ),
            text_cell(four(kl), sub=note) if kl is not None else missing(UNDEFINED, note),
            text_cell(span(row, "kl_null_token_low", "kl_null_token_high", four)),
            number_cell(row, "total_variation_plug_in", lambda v: f"{v:.3f}"),
            text_cell(_rejected(row, "shapiro")),
            number_cell(row, "abs_skewness_median", two),
            number_cell(row, "kurtosis_median", two),
            text_cell(row["tokens"], sub=f"n = {row['n']}, {row['degenerate']}"),
            text_cell(row["images"]),
        ]
        table.rows.append(cells)
    alphas = sorted({row["alpha"] for row in study.tables["types"]})
    table.note = (
        "W is 1 for a perfectly straight Q–Q plot; W, |skew| and kurtosis are medians. Rejected: "
        f"share of tokens with a Shapiro–Wilk p-value at most α = {listing(alphas)}, raw and after "
        "Benjamini–Hochberg over the tokens of each layer; the null is the same test on normal "
        "tokens of the same n and dtype. KL is the Vasicek negentropy minus its mean on the null; "
        "the bound on total variation is the lesser of √(KL/2) and √(1 − exp(−KL))."
    )
    return table


def tests_table(study: NormalityRun) -> Table:
    """Rejected shares of all four tests, raw / after BH / null."""
    columns = [Column("layer type", False), Column("transform", False)]
    columns += [Column("model", False)] if len(study.subjects) > 1 else []
    columns += [Column(name, note="raw / after BH / null") for _, name in _TESTS]
    table = Table("Share of tokens that each test rejects", columns)
    for place, transform, subject, row in _type_rows(study, MAIN):
        cells = [place_cell(place), text_cell(words(transform))]
        cells += [text_cell(subject)] if len(study.subjects) > 1 else []
        cells += [text_cell(_rejected(row, test)) for test, _ in _TESTS]
        table.rows.append(cells)
    return table


def errors_table(study: NormalityRun) -> Table:
    """Error ratios of every quantizer with random signs, and before and with plain Hadamard."""
    errors = study.tables["errors"]
    quantizers = list(dict.fromkeys(row["quantizer"] for row in errors))
    columns = [Column("layer type", False), Column("quantizer", False)]
    columns += [Column("model", False)] if len(study.subjects) > 1 else []
    columns += [Column(bits_text([bits]), note="before / plain / signs") for bits in study.bits]
    found = {
        (row["subject"], place_of(row), row["transform"], row["quantizer"], row["bits"]): row
        for row in errors
    }
    table = Table("What non-normality costs each quantizer: mean error ratio", columns)
    for place in study.places:
        for quantizer in quantizers:
            for subject in study.subjects:
                cells = [place_cell(place), text_cell(quantizer)]
                cells += [text_cell(subject)] if len(study.subjects) > 1 else []
                for bits in study.bits:
                    rows = [found.get((subject, place, t, quantizer, str(bits))) for t in MAIN]
                    parts = ["–" if r is None else shown(r, "ratio", ratio_text) for r in rows]
                    last = rows[-1]
                    sub = "" if last is None else f"[{span(last, 'low', 'high', ratio_text)}]"
                    if any(rows):
                        cells.append(text_cell(" / ".join(parts), sub=sub))
                    else:
                        cells.append(missing("no such grid" if bits == 1 else "not measured"))
                table.rows.append(cells)
    table.note = (
        "Before any transform / plain Hadamard / random signs [95 % interval of the last]. Ratios "
        "are to the quantizer’s own error on N(0, 1); min–max and absmax, whose error there "
        f"depends on n, are divided by that of {REFERENCE}, so theirs also say how far they are "
        "from a grid made for normal values."
    )
    return table


def verdict_cell(verdict: str, sub: str = "", text: str = "", href: str = "") -> Cell:
    """A coloured chip: the verdict, or a number that has it."""
    return Cell([Phrase(text or verdict, href)], sub, f"verdict {verdict.replace(' ', '-')}")


def _type_rows(study: NormalityRun, transforms: Sequence[str]) -> list[tuple[Place, str, str, Row]]:
    return [
        (place, transform, subject, row)
        for place in study.places
        for transform in transforms
        for subject in study.subjects
        for row in study.of("types", subject=subject, transform=transform, place=place)
    ]


def _rejected(row: Row, test: str) -> str:
    """Shares `raw / after BH / null`."""
    return " / ".join(shown(row, f"{test}_rejected{end}", percent) for end in ("", "_bh", "_null"))


def _nulls(study: NormalityRun) -> dict[int, list[float | None]]:
    """width -> null ratio per bits, of the untransformed n."""
    found: dict[int, list[float | None]] = {}
    for width in sorted({width for _, width in study.places}):
        rows = study.of("verdicts", width=width, transform=BEFORE)
        by_bits = {int(row["bits"]): value(row, "null_ratio") for row in rows}
        found[width] = [by_bits.get(bits) for bits in study.bits]
    return found


def _skipped(study: NormalityRun) -> str:
    reasons = dict.fromkeys(row["reason"] for row in study.tables["skipped"])
    return f" Left out: {'; '.join(reasons)}." if reasons else ""
