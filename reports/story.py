"""The result in plain words, written from the data: one paragraph per protocol."""

from __future__ import annotations

import math

from reports.aggregate import Group, Row
from reports.claims import (
    FAILS,
    HOLDS,
    NOT_JUDGED,
    UNDECIDED,
    Comparison,
    ampn_comparison,
    bitnet_comparison,
    confounds,
    hadamard_comparison,
    value_phrase,
)
from reports.settings import is_full_precision
from reports.text import Phrase, listing, plural, significant

_MEANING = {
    HOLDS: "a clear gain",
    UNDECIDED: "no clear difference",
    FAILS: "clearly worse, against the claim",
    NOT_JUDGED: "not judged (one training seed)",
}


def plain_words(group: Group) -> list[Phrase]:
    """What a reader should take away: nearest plan, Hadamard, AMPN, BitNet v2, and the seeds."""
    metric = group.fid
    rows = [row for row in group.rows if not is_full_precision(row.plan)]
    if metric is None:
        return [Phrase(f"On {group.title}, no run has measured an FID yet: not run.")]
    measured = [row for row in rows if row.summary(metric)]
    untrained = sum(row.is_ptq for row in measured)
    note = f"; {untrained} of them without training (PTQ)" if untrained else ""
    phrases = [
        Phrase(
            f"On {group.title}, {plural(len(measured), 'quantized plan')} "
            f"{'was' if len(measured) == 1 else 'were'} "
            f"{'judged' if untrained else 'trained and judged'}{note}. "
        )
    ]
    phrases += _nearest(group, measured, metric)
    phrases += _hadamard(group)
    phrases += _pair(
        ampn_comparison(group, 2),
        "AMPN at a mean of 2 bits gives ",
        " where 2 bits in every layer give ",
        "AMPN against uniform bits at 2 bits: not run. ",
    )
    phrases += _pair(
        bitnet_comparison(group, 4),
        "At 4 activation bits RobuQ reaches ",
        " and BitNet v2 ",
        "RobuQ against BitNet v2 at 4 bits: not run. ",
    )
    phrases.append(Phrase(_seeds(rows)))
    return phrases


def _nearest(group: Group, rows: list[Row], metric: str) -> list[Phrase]:
    teacher = group.teacher.summary(metric)
    if teacher is None or not rows:
        return [Phrase("Which plan is nearest to the teacher: not run. ")]

    def distance(row: Row) -> float:
        summary = row.summary(metric)
        return abs(summary.mean - teacher.mean) if summary else math.inf

    ranked = sorted(rows, key=distance)
    phrases = [
        Phrase(f"Nearest to its teacher ({metric} "),
        value_phrase(group.teacher, metric),
        Phrase(f") is {ranked[0].label} with "),
        value_phrase(ranked[0], metric),
    ]
    if len(ranked) > 1:
        phrases += [
            Phrase(f"; farthest is {ranked[-1].label} with "),
            value_phrase(ranked[-1], metric),
        ]
    return [*phrases, Phrase(". ")]


def _hadamard(group: Group) -> list[Phrase]:
    pairs = {bits: hadamard_comparison(group, bits) for bits in (4, 3, 2)}
    found = {bits: pair for bits, pair in pairs.items() if pair is not None}
    missing = [str(bits) for bits, pair in pairs.items() if pair is None]
    if not found:
        return [Phrase("Hadamard against no Hadamard: not run. ")]
    notes = {
        HOLDS: "",
        UNDECIDED: " (no clear difference)",
        FAILS: " (clearly worse)",
        NOT_JUDGED: " (one seed: not judged)",
    }
    parts = []
    for bits, pair in found.items():
        note = notes[pair.verdict]
        parts.append(f"{significant(pair.ratio, 3)} times at {bits} bits{note}")
    phrases = [
        Phrase(
            f"The {group.fid} of the plan without Hadamard is {listing(parts)} that of the plan "
            "with it"
        )
    ]
    verdicts = [pair.verdict for pair in found.values()]
    if all(verdict == HOLDS for verdict in verdicts):
        phrases.append(Phrase(f", {_MEANING[HOLDS]} at each. "))
    elif HOLDS not in verdicts and NOT_JUDGED not in verdicts:
        phrases.append(Phrase(", so the claim is not supported here. "))
    else:
        phrases.append(Phrase(". "))
    others = sorted({key for pair in found.values() for key in confounds(pair)})
    if others:
        phrases.append(
            Phrase(
                f"They also differ in {listing(others)}: this is not the gain of Hadamard alone. "
            )
        )
    if missing:
        phrases.append(Phrase(f"At {listing(missing)} bits: not run. "))
    return phrases


def _pair(pair: Comparison | None, first: str, second: str, missing: str) -> list[Phrase]:
    if pair is None:
        return [Phrase(missing)]
    return [
        Phrase(first),
        value_phrase(pair.better, pair.metric),
        Phrase(second),
        value_phrase(pair.worse, pair.metric),
        Phrase(f", {_MEANING[pair.verdict]}. "),
    ]


def _seeds(rows: list[Row]) -> str:
    by_count: dict[int, list[str]] = {}
    for row in rows:
        by_count.setdefault(len(row.seeds), []).append(row.label)
    word = "Seeds" if any(row.is_ptq for row in rows) else "Training seeds"
    parts = [
        f"{count} for {listing(labels)}" for count, labels in sorted(by_count.items(), reverse=True)
    ]
    if not parts:
        return ""
    return (
        f"{word}: {'; '.join(parts)}. Brackets hold the least and the greatest value over "
        "training seeds and seed ranges; a difference is clear when they do not overlap and both "
        "plans have two training seeds."
    )
