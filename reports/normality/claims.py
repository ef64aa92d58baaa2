"""The claim that activations are normal after a Hadamard transform, judged per transform and bits.

Strictly, as the paper says it: every layer type of every subject of the run must pass. The words
are those of `reports.normality.data`.
"""

from __future__ import annotations

from reports.claims import FAILS, HOLDS, UNDECIDED, Claim
from reports.normality.data import (
    LIMIT,
    PLAIN,
    SIGNS,
    NormalityRun,
    Outcome,
    bits_text,
    judged_phrase,
    ratio_text,
    words,
)
from reports.text import Phrase, joined, listing

CLAIM = "After the Hadamard transform, activations of every token are normal"
RULE = (
    f"Normality holds when, for every layer type of every model of the run, the upper end of the "
    f"95 % interval of the mean error ratio is below {LIMIT}: the token’s error under the uniform "
    f"mid-rise quantizer with RobuQ’s steps, over that of a normal token. It does not hold when "
    f"the whole interval of one layer type is at or above {LIMIT}, and is undecided otherwise."
)


def normality_claims(study: NormalityRun) -> list[Claim]:
    """One claim per transform and bit width."""
    return [
        _claim(study, transform, bits)
        for transform in (PLAIN, SIGNS)
        for bits in study.bits
        if any(study.outcome(subject, transform, bits) for subject in study.subjects)
    ]


def _claim(study: NormalityRun, transform: str, bits: int) -> Claim:
    outcomes = {s: study.outcome(s, transform, bits) for s in study.subjects}
    found = {s: outcome for s, outcome in outcomes.items() if outcome is not None}
    verdicts = {outcome.verdict for outcome in found.values()}
    verdict = next(v for v in (FAILS, UNDECIDED, HOLDS) if v in verdicts)
    kind = "plain Hadamard" if transform == PLAIN else f"Hadamard with {words(transform)}"
    evidence: list[Phrase] = []
    for subject, outcome in found.items():
        evidence += [Phrase(" ")] if evidence else []
        phrases = outcome_phrases(study, outcome, 1 if len(found) > 1 else 9)
        evidence += [Phrase(f"{subject}: "), *phrases, Phrase(".")]
    nulls = [j.null_ratio for o in found.values() for j in o.judgements if j.null_ratio >= LIMIT]
    if nulls:
        evidence.append(
            Phrase(
                f" At {bits_text([bits])} normal tokens themselves reach {ratio_text(max(nulls))}."
            )
        )
    return Claim(f"{CLAIM}: {kind}, {bits_text([bits])}", verdict, evidence)


def outcome_phrases(study: NormalityRun, outcome: Outcome, shown: int) -> list[Phrase]:
    """The `shown` farthest of the layer types that fall short, or the one nearest to the limit."""
    parts: list[Phrase] = []
    for verdict, label in ((FAILS, "above the limit "), (UNDECIDED, "undecided ")):
        short = [j for j in outcome.falling_short if j.verdict == verdict]
        if short:
            parts += [Phrase("; ")] if parts else []
            parts.append(Phrase(label))
            parts += joined((judged_phrase(study, j) for j in short[:shown]), ", ")
            others = [study.name(j.place) for j in short[shown:]]
            parts += [Phrase(f" and also {listing(others)}")] if others else []
    if outcome.without_interval:
        names = listing(study.name(place) for place in outcome.without_interval)
        parts += [Phrase("; ")] if parts else []
        parts.append(Phrase(f"no interval for {names} (fewer than 16 images)"))
    if not parts and outcome.highest is not None:
        parts = [
            Phrase("all layer types pass; nearest to the limit "),
            judged_phrase(study, outcome.highest),
        ]
    return parts
