"""The answer of a normality run in words, and its caveats; every sentence follows from tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reports.claims import FAILS, HOLDS, UNDECIDED
from reports.normality.data import (
    BEFORE,
    LIMIT,
    PLAIN,
    SIGNS,
    WITHOUT_DC,
    Judgement,
    NormalityRun,
    bits_text,
    block_of,
    percent,
    place_of,
    ratio_text,
    value,
    words,
)
from reports.text import Phrase, listing, plural

#: Below this change of the ratio, two subjects are alike.
_NOTABLE = 0.01
_XL_WIDTHS = (1152, 4608)


def answer(study: NormalityRun) -> tuple[list[Phrase], list[list[Phrase]]]:
    """The answer in a few sentences, and the points behind it."""
    subject = study.subjects[0]
    plain, signs = (verdict_words(study, subject, transform) for transform in (PLAIN, SIGNS))
    short = [
        j
        for j in study.judgements(subject)
        if (j.transform, j.bits, j.verdict) == (PLAIN, study.usual_bits, FAILS)
    ]
    headline = [
        Phrase(
            f"On the {subject} of {study.title}, the claim that a Hadamard transform makes every "
            f"token’s activations normal {plain or 'was not measured'} with the plain transform"
        )
    ]
    for index, judgement in enumerate(sorted(short, key=lambda j: -j.ratio)):
        lead = (
            f": at {bits_text([study.usual_bits])} the quantization error is "
            if not index
            else ", "
        )
        times = " times that of normal tokens" if index == 0 else " times"
        headline += [
            Phrase(lead),
            Phrase(ratio_text(judgement.ratio), study.href),
            Phrase(f"{times} in {study.name(judgement.place)}"),
        ]
    falling = {
        study.name(j.place)
        for j in study.judgements(subject)
        if j.transform == SIGNS and j.verdict != HOLDS
    }
    names = listing(study.name(p) for p in study.places if study.name(p) in falling)
    verb = "falls" if len(falling) == 1 else "fall"
    headline.append(
        Phrase(
            f". With random signs before it, the claim {signs or 'was not measured'}"
            + (f": {names} {verb} short." if falling else ".")
        )
    )
    if len(study.subjects) > 1:
        last = study.subjects[-1]
        trained = verdict_words(study, last, SIGNS) or "was not measured"
        headline.append(Phrase(f" In {last}, with random signs, it {trained}."))
    points = [
        _shortfalls(study, subject, PLAIN),
        _dc(study, subject),
        _shortfalls(study, subject, SIGNS),
        _cells(study, subject),
        _effect(study, subject),
        _others(study, subject),
        *(_compared(study, subject, other) for other in study.subjects[1:]),
    ]
    return headline, [point for point in points if point]


def verdict_words(study: NormalityRun, subject: str, transform: str) -> str:
    """`holds at 1 and 2 bits and is undecided at 4 bits`, worst news first."""
    by_verdict: dict[str, list[int]] = {}
    for bits in study.bits:
        outcome = study.outcome(subject, transform, bits)
        if outcome is not None:
            by_verdict.setdefault(outcome.verdict, []).append(bits)
    verbs = {FAILS: "does not hold", UNDECIDED: "is undecided", HOLDS: "holds"}
    parts = [f"{verbs[v]} at {bits_text(by_verdict[v])}" for v in verbs if v in by_verdict]
    return listing(parts)


def _signs(study: NormalityRun) -> str:
    draws = [row["sign_draws"] for row in study.tables["verdicts"] if row.get("sign_draws")]
    if draws:
        return (
            f"Verdicts with random signs average {draws[0]} draws of the signs and their intervals "
            "allow for the spread between draws; W, KL and the heat maps are those of the plan’s "
            f"own draw (seed {study.run.seed})."
        )
    return (
        "Verdicts with random signs hold for the one draw that each layer has (seed "
        f"{study.run.seed}); another --seed draws other signs."
    )


def caveats(study: NormalityRun) -> list[str]:
    """What the numbers cannot say, with the numbers of this run."""
    types = study.tables["types"]
    images = sorted({int(row["images"]) for row in types})
    sizes = sorted({int(row["n"]) for row in types if row["transform"] == BEFORE})
    alpha = value(types[0], "alpha") or 0.0
    found = [
        f"A p-value means nothing without n. Tests here see n = {_numbers(sizes)} values of a "
        f"token at α = {alpha:g}; the same small departure is rejected more often at a greater n. "
        "Read the effect sizes (W, KL, error ratio) first, and rejected shares beside the null’s.",
        "An error ratio below 1 is not “more normal”: light tails and two-valued tokens are "
        "easier to quantize than normal ones." + _one_hot(study),
        f"Intervals resample {_numbers(images)} images. {_signs(study)}",
        _widths(study) + _inputs(study),
        "Benjamini–Hochberg controls the false discovery rate within each layer over its tokens, "
        "not over layers; tokens of one image are not independent.",
        f"A single cell (one layer at one timestep) has few tokens{_cell_tokens(study)}, so its "
        "interval is wide: a cell that fails alone need not be far from normal.",
    ]
    nulls = _loud_nulls(study)
    if nulls:
        found.insert(
            1,
            f"Normal tokens themselves have a mean ratio of {listing(nulls)}. There the limit of "
            f"{LIMIT} is within sampling noise, so near misses at these bits say little.",
        )
    undefined = sum(int(row.get("kl_undefined") or 0) for row in types)
    if undefined:
        found.append(
            f"The KL estimate is undefined (infinite) for {plural(undefined, 'measured token')} "
            "with many equal entries; means leave them out."
        )
    return found


def _shortfalls(study: NormalityRun, subject: str, transform: str) -> list[Phrase]:
    """Layer types that fall short, the farthest first, each with its worst cell."""
    short: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in study.judgements(subject):
        if judgement.transform == transform and judgement.verdict != HOLDS:
            short.setdefault(judgement.place, []).append(judgement)
    name = "Plain Hadamard" if transform == PLAIN else f"Hadamard with {words(transform)}"
    if not short:
        measured = study.of("types", subject=subject, transform=transform)
        return [Phrase(f"{name} passes in every layer type. ")] if measured else []
    shown = [_at_usual_bits(study, judgements) for judgements in short.values()]
    phrases = [Phrase(f"{name} falls short in ")]
    ranked = sorted(shown, key=lambda j: -j.ratio)
    for index, worst in enumerate(ranked):
        verdicts = sorted({j.verdict for j in short[worst.place]})
        bits = bits_text(sorted(j.bits for j in short[worst.place]))
        mark = " (undecided)" if verdicts == [UNDECIDED] else ""
        phrases += [
            Phrase("; " if index else ""),
            Phrase(f"{worst.place[0]} (width {worst.place[1]}) at {bits}{mark}, with a ratio of "),
            Phrase(ratio_text(worst.ratio), study.href),
            Phrase(
                f" at {bits_text([worst.bits])} and {ratio_text(worst.worst_ratio)} in the worst "
                f"layer and timestep ({block_of(worst.worst_layer)}, {worst.worst_timestep})"
            ),
        ]
    passing = [study.name(place) for place in study.places if place not in short]
    if passing:
        phrases.append(Phrase(f"; {listing(passing)} {'pass' if len(passing) > 1 else 'passes'}"))
    return [*phrases, Phrase(". ")]


def _dc(study: NormalityRun, subject: str) -> list[Phrase]:
    """Whether the coordinate that collects a token's mean is what fails, per layer type."""
    cured: list[str] = []
    kept: list[str] = []
    for place in study.places:
        pair = [
            study.judgement(subject, place, transform, study.usual_bits)
            for transform in (PLAIN, WITHOUT_DC)
        ]
        plain, without = pair
        if plain is None or without is None or plain.verdict == HOLDS:
            continue
        text = f"{study.name(place)} ({ratio_text(plain.ratio)} → {ratio_text(without.ratio)})"
        (cured if without.verdict == HOLDS else kept).append(text)
    phrases = []
    if cured:
        phrases.append(
            Phrase(
                f"What fails in {listing(cured)} is the one coordinate that collects the token’s "
                f"mean (DC): without it the type passes at {bits_text([study.usual_bits])}. "
            )
        )
    if kept:
        phrases.append(Phrase(f"In {listing(kept)} leaving that coordinate out does not help. "))
    return phrases


def _cells(study: NormalityRun, subject: str) -> list[Phrase]:
    """Shares of (layer, timestep) cells that pass alone, and how they vary with the timestep."""
    bits = study.usual_bits
    shares = []
    for transform in (BEFORE, PLAIN, SIGNS):
        own = passing_by_timestep(study, subject, transform, bits)
        if own:
            passing, cells = (sum(pair[i] for pair in own.values()) for i in (0, 1))
            shares.append(f"{passing} of {cells} ({words(transform)})")
    if not shares:
        return []
    text = (
        f"Of single cells (one layer at one timestep), these pass alone at {bits_text([bits])}: "
        f"{listing(shares)}"
    )
    for transform in (PLAIN, SIGNS):
        own = passing_by_timestep(study, subject, transform, bits)
        rates = {t: passing / cells for t, (passing, cells) in own.items()}
        if len(set(rates.values())) > 1:
            least, most = (pick(rates, key=lambda t: rates[t]) for pick in (min, max))
            text += (
                f"; {words(transform)}: fewest at timestep {least} ({percent(rates[least])}), "
                f"most at {most} ({percent(rates[most])})"
            )
    return [Phrase(text + ". ")]


def passing_by_timestep(
    study: NormalityRun, subject: str, transform: str, bits: int
) -> dict[int, tuple[int, int]]:
    """timestep -> (cells that pass alone, cells with an interval)."""
    found: dict[int, tuple[int, int]] = {}
    for row in study.of("cells", subject=subject, transform=transform):
        high = value(row, f"ratio_{bits}_high")
        if high is not None:
            passing, cells = found.get(int(row["timestep"]), (0, 0))
            found[int(row["timestep"])] = (passing + (high < LIMIT), cells + 1)
    return dict(sorted(found.items()))


def _effect(study: NormalityRun, subject: str) -> list[Phrase]:
    """Median W before and after, beside that of normal tokens of the same n."""
    parts = []
    for transform in (BEFORE, PLAIN, SIGNS):
        rows = study.of("types", subject=subject, transform=transform)
        found = [w for row in rows if (w := value(row, "shapiro_w_median")) is not None]
        if found:
            parts.append(f"{words(transform)} {min(found):.3f} to {max(found):.3f}")
    sizes = {row["width"] for row in study.of("types", subject=subject, transform=BEFORE)}
    rows = study.of("controls", control="gaussian", transform=BEFORE)
    null = [
        w
        for row in rows
        if row["width"] in sizes and (w := value(row, "shapiro_w_median")) is not None
    ]
    if null:
        parts.append(f"normal tokens {min(null):.3f} to {max(null):.3f}")
    return [Phrase(f"Median Shapiro–Wilk W of a layer type: {'; '.join(parts)}. ")] if parts else []


def _others(study: NormalityRun, subject: str) -> list[Phrase]:
    """The other rotations in one sentence, where they exist for every layer type."""
    parts = []
    for transform in study.transforms:
        if transform not in (BEFORE, PLAIN, SIGNS, WITHOUT_DC):
            measured = {
                place_of(r) for r in study.of("types", subject=subject, transform=transform)
            }
            if measured == set(study.places):
                verdicts = verdict_words(study, subject, transform)
                parts.append(f"with a {words(transform)} transform it {verdicts}")
    return [Phrase(f"For comparison, {'; '.join(parts)}. ")] if parts else []


def _compared(study: NormalityRun, first: str, other: str) -> list[Phrase]:
    """A further subject: its verdicts, and the layer type that changed most with random signs."""
    texts = []
    for transform in (PLAIN, SIGNS):
        found = verdict_words(study, other, transform)
        if found:
            texts.append(f"with {words(transform)} the claim {found}")
    text = f"In {other}, {'; '.join(texts)}"
    bits = study.usual_bits
    changes = []
    for place in study.places:
        a = study.judgement(first, place, SIGNS, bits)
        b = study.judgement(other, place, SIGNS, bits)
        if a is not None and b is not None:
            changes.append((abs(b.ratio - a.ratio), study.name(place), a.ratio, b.ratio))
    if changes:
        change, name, a_ratio, b_ratio = max(changes)
        text += f"; with random signs at {bits_text([bits])} " + (
            f"the ratio that changes most is that of {name}, {ratio_text(a_ratio)} in {first} "
            f"and {ratio_text(b_ratio)} here"
            if change >= _NOTABLE
            else f"no ratio is {_NOTABLE} away from that of {first}"
        )
    return [Phrase(text + ". ")] if texts else []


def _at_usual_bits(study: NormalityRun, judgements: Sequence[Judgement]) -> Judgement:
    usual = [j for j in judgements if j.bits == study.usual_bits]
    return usual[0] if usual else min(judgements, key=lambda j: j.bits)


def _loud_nulls(study: NormalityRun) -> list[str]:
    """`1.064 at 8 bits and n = 144`, for every null at or above the limit."""
    sizes = {(r["layer_type"], r["width"], r["transform"]): r["n"] for r in study.tables["types"]}
    found = {}
    for row in study.tables["verdicts"]:
        null, n = (
            value(row, "null_ratio"),
            sizes.get((row["layer_type"], row["width"], row["transform"])),
        )
        if null is not None and null >= LIMIT and n is not None:
            found[int(row["bits"]), int(n)] = null
    return [
        f"{ratio_text(null)} at {bits_text([bits])} and n = {n}"
        for (bits, n), null in sorted(found.items())
    ]


def _widths(study: NormalityRun) -> str:
    widths = sorted({width for _, width in study.places})
    if max(widths) >= _XL_WIDTHS[0]:
        return ""
    return (
        f"This is a small model: its layers have {'widths' if len(widths) > 1 else 'width'} "
        f"{_numbers(widths)}, where those of DiT-XL/2 have {_numbers(_XL_WIDTHS)}. Sums of more "
        "terms are closer to normal, which helps the claim there; outlier channels of large models "
        "may hurt it. "
    )


def _inputs(study: NormalityRun) -> str:
    if study.options.get("captured", "none") not in (None, "none"):
        return "Activations were captured before; this run cannot tell on which inputs."
    return (
        "Activations are captured on real images with noise added, not on the model’s own sampling "
        "trajectories."
    )


def _one_hot(study: NormalityRun) -> str:
    """The control that shows it: far from normal and cheap to quantize."""
    widths = [int(row["width"]) for row in study.of("controls", transform=SIGNS)]
    ratios = [
        (ratio, row)
        for row in study.of("controls", transform=SIGNS, width=min(widths, default=0))
        for bits in study.bits
        if (ratio := value(row, f"ratio_{bits}")) is not None
        and (value(row, "shapiro_rejected") or 0) > 0.5
    ]
    if not ratios:
        return ""
    ratio, row = min(ratios, key=lambda pair: pair[0])
    if ratio >= 1:
        return ""
    bits = next(b for b in study.bits if value(row, f"ratio_{b}") == ratio)
    return (
        f" The control “{row['control']}” with random signs has a ratio of {ratio_text(ratio)} at "
        f"{bits_text([bits])}, though Shapiro–Wilk rejects "
        f"{percent(value(row, 'shapiro_rejected') or 0)} of its tokens."
    )


def _cell_tokens(study: NormalityRun) -> str:
    counts = sorted({int(row["tokens"]) for row in study.tables["cells"]})
    return f" ({_numbers(counts)})" if counts else ""


def _numbers(values: Iterable[int]) -> str:
    found = list(values)
    if len(found) <= 4:
        return listing(str(v) for v in found)
    return f"{found[0]} to {found[-1]}"
