"""What an allocation run says, in words and as claims; every sentence follows from its tables."""

from __future__ import annotations

from reports.allocation.data import (
    Measured,
    against_uniform,
    budgets,
    candidates,
    column,
    judge,
    measured,
    printed,
    same_bits,
    shown,
)
from reports.claims import FAILS, HOLDS, NOT_JUDGED, NOT_RUN, UNDECIDED, Claim
from reports.study_tables import StudyRun, two, value
from reports.text import Phrase, joined, listing, plural

#: The candidate that is AMPN with this suite's metric (RobuQ's is not published), measured after
#: some training as RobuQ does; the same before training; and what it must beat.
AMPN, BEFORE, UNIFORM = "qat", "ptq", "uniform"
JUDGED = ("distillation_loss", "fid")
RULE = (
    "“A beats B” holds when the worst training seed of A is better than the best of B, does not "
    "hold when the best of A is worse than the worst of B, and is undecided otherwise; on the "
    "distillation loss and on FID. The rule was fixed before any network was trained, but for one "
    "addition: one training seed is not judged."
)
_VERBS = {
    HOLDS: "beats",
    FAILS: "loses to",
    UNDECIDED: "cannot be told from",
    NOT_JUDGED: "is not judged, with one training seed, against",
}


def answer(study: StudyRun) -> list[Phrase]:
    """Is AMPN worth it, by how much, against which runner-up: at each budget, on each target."""
    phrases: list[Phrase] = []
    for budget in budgets(study):
        parts: list[Phrase] = []
        for target in JUDGED:
            own, base = (measured(study, c, budget, target) for c in (AMPN, UNIFORM))
            if own is None or base is None:
                continue
            verb = _VERBS[judge(own, base)]
            parts += [
                Phrase(f"{'; it ' if parts else ''}{verb} uniform on {_named(study, target)} ("),
                Phrase(printed(target, own.mean), study.href),
                Phrase(" against "),
                Phrase(printed(target, base.mean), study.href),
                Phrase(f"{_times(own, base)})"),
                *_runner_up(study, budget, target, own),
            ]
        if parts:
            lead = f"With {study.title}, at" if not phrases else " At"
            mean = f"{lead} a mean of {float(budget):g} bits AMPN ({AMPN}) "
            phrases += [Phrase(mean), *parts, Phrase(".")]
    if not phrases:
        phrases = [Phrase(f"With {study.title}, {AMPN} and {UNIFORM} were not both trained.")]
    return [*phrases, *_same_words(study)]


def allocation_claims(study: StudyRun) -> list[Claim]:
    """AMPN against uniform as the run judged it, and sensitivities after against before."""
    found = []
    for budget in budgets(study):
        for target in JUDGED:
            end = f"at a mean of {float(budget):g} bits, on {_named(study, target)}"
            rows = study.of("verdicts", budget=budget, candidate=AMPN, target=target)
            verdict = against_uniform(rows[0]) if rows else NOT_RUN
            found.append(
                Claim(
                    f"AMPN (candidate {AMPN}) beats uniform {end}",
                    verdict,
                    _evidence(study, AMPN, UNIFORM, budget, target),
                )
            )
    for budget in budgets(study):
        for target in JUDGED:
            end = f"at a mean of {float(budget):g} bits, on {_named(study, target)}"
            own, other = (measured(study, c, budget, target) for c in (AMPN, BEFORE))
            verdict = judge(own, other) if own and other else NOT_RUN
            evidence = _evidence(study, AMPN, BEFORE, budget, target)
            if own and other and same_bits(study, AMPN, BEFORE, budget):
                verdict = UNDECIDED
                evidence = [Phrase("Identical allocations: both name the same bits. "), *evidence]
            text = f"AMPN with sensitivities after training beats AMPN with those before {end}"
            found.append(Claim(text, verdict, evidence))
    return found


def timestep_words(study: StudyRun) -> str:
    """What bits per timestep bucket promise."""
    parts = []
    for row in study.tables.get("timestep_aware", []):
        ratio = value(row, "ratio")
        if ratio is not None:
            parts.append(f"{two(ratio)} times at a mean of {float(row['budget']):g} bits")
    if not parts:
        return "Bits per timestep bucket: not run."
    return (
        "Bits that may differ by timestep bucket at the same mean cost would bring the predicted "
        f"objective to {listing(parts)} what one allocation for all timesteps reaches. This is "
        "predicted from sensitivities only; no network was trained that way."
    )


def caveats(study: StudyRun) -> list[str]:
    """What these numbers cannot say."""
    options = study.options
    seeds = len(study.distinct("trials", "seed"))
    layers = len(study.distinct("allocations", "layer"))
    found = [
        f"One model of {layers} layers that can be allocated, on {study.run.workload_name}: gains "
        "in a large model may differ.",
        "Every network trains the same steps, all at its own bits: "
        f"{options.get('train_steps', 'not recorded')}. Longer training may close gaps. Steps "
        f"before sensitivities after training: {options.get('warmup_steps', 'not recorded')}.",
        f"{plural(seeds, 'training seed')} per candidate and budget: ranges that do not overlap "
        "by chance alone are not rare with so few.",
        "Verdicts on several candidates, budgets and targets are not corrected for their number, "
        "and the best other candidate is named after looking.",
        "Allocations come from one measurement of the sensitivities (seed "
        f"{study.run.seed}); only training differs between seeds. “random” is one drawing.",
    ]
    if column(study, "fid"):
        amounts = (options.get(name, "not recorded") for name in ("samples", "sampling_steps"))
        found.append(
            "{} is of few samples ({}) and sampling steps ({}): compare it within this section "
            "only.".format(column(study, "fid"), *amounts)
        )
    return found


def _evidence(study: StudyRun, one: str, other: str, budget: str, target: str) -> list[Phrase]:
    own, base = (measured(study, c, budget, target) for c in (one, other))
    missing = [c for c, found in ((one, own), (other, base)) if found is None]
    if own is None or base is None:
        return [Phrase(f"{_named(study, target)}: none of {listing(missing)} at this budget.")]
    text = f"{one} against {other}: {_against(target, own, base)}"
    return [Phrase(text, study.href), Phrase(".")]


def _against(target: str, own: Measured, base: Measured) -> str:
    return f"{shown(target, own)} against {shown(target, base)}{_times(own, base)}"


def _times(own: Measured, base: Measured) -> str:
    return f", ×{two(own.mean / base.mean)}" if base.mean else ""


def _runner_up(study: StudyRun, budget: str, target: str, own: Measured) -> list[Phrase]:
    """The best of the other mixed candidates, judged by the same rule."""
    others = [
        found
        for candidate in candidates(study)
        if candidate not in (AMPN, UNIFORM)
        and not same_bits(study, AMPN, candidate, budget)
        and (found := measured(study, candidate, budget, target))
    ]
    if not others:
        return []
    best = min(others, key=lambda found: found.mean)
    return [
        Phrase(f", and {_VERBS[judge(own, best)]} the best other candidate, {best.candidate} ("),
        Phrase(printed(target, best.mean), study.href),
        Phrase(")"),
    ]


def _same_words(study: StudyRun) -> list[Phrase]:
    same = [float(b) for b in budgets(study) if same_bits(study, AMPN, BEFORE, b)]
    if not same:
        return []
    means = joined((Phrase(f"{budget:g}") for budget in same), " and ")
    return [
        Phrase(" Sensitivities before and after training choose the same bits at a mean of "),
        *means,
        Phrase("."),
    ]


def _named(study: StudyRun, target: str) -> str:
    if target != "fid":
        return "the " + target.replace("_", " ")
    return column(study, target) or "FID"
