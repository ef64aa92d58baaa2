"""What an efficiency run says, in words and as claims; every sentence follows from its tables."""

from __future__ import annotations

from collections.abc import Sequence

from reports.claims import FAILS, HOLDS, NOT_RUN, Claim
from reports.efficiency.data import (
    CHECKPOINT,
    KINDS,
    MEMORY,
    PEAK,
    PEER,
    SPEED,
    WEIGHTS,
    Factor,
    device,
    factors,
    files,
    is_measured,
    is_xl,
    judge,
    model_name,
    of_kind,
    span,
    times,
)
from reports.study_tables import StudyRun, value
from reports.text import Phrase, listing

MODEL_MARK = "a model, not measured"
RULE = (
    "The paper names no baseline, so its factors for memory and speed hold when ours reach them "
    "against every full-precision baseline, packed variant and batch, do not hold when they reach "
    "them against none, and are undecided otherwise; a time counts where it is stable and "
    "significantly faster. Its checkpoint factor holds when one file with every part counted "
    "reaches it."
)


def answer(study: StudyRun) -> list[Phrase]:
    """The three factors in one breath: what is exact, what was measured, what was not run."""
    rows, href = files(study), study.href
    phrases = [Phrase(f"Packed to W1.58, {model_name(study)} is a file ")]
    if rows:
        # int8 rounds what the plan keeps in full precision: a mode, not the headline.
        best = next((row for row in rows if "int8" not in row["packing"]), rows[0])
        phrases += [
            Phrase(times(_amount(value(best, "size_reduction"))), href),
            Phrase(
                f" smaller than FP32 ({best['packing']}; the paper: {_paper(study, CHECKPOINT)}"
            ),
            Phrase("), and its weights take "),
        ]
    else:
        phrases = [Phrase(f"Packed to W1.58, the weights of {model_name(study)} take ")]
    weights = [f for f in of_kind(study, MEMORY, WEIGHTS) if f.amount is not None]
    for index, factor in enumerate(weights):
        lead = " and " if index else ""
        phrases += [
            Phrase(lead),
            Phrase(times(_amount(factor.amount)), href),
            Phrase(f" less memory than in {factor.baseline}" if not index else ""),
            Phrase(f" less than in {factor.baseline}" if index else ""),
        ]
    if not weights:
        phrases.append(Phrase("memory that was not counted"))
    phrases.append(Phrase(". "))
    if not is_measured(study):
        return [
            *phrases,
            Phrase(
                f"Peak GPU memory (the paper: {_paper(study, MEMORY)}) and speed (the paper: "
                f"{_paper(study, SPEED)}) are not run: they need a CUDA device."
            ),
        ]
    return [*phrases, *_measured_words(study)]


def points(study: StudyRun) -> list[list[Phrase]]:
    """What the model expects, where there is one."""
    found = []
    for baseline in ("bf16-graph", "tf32"):
        modelled = [
            f.modelled
            for f in of_kind(study, SPEED, "step")
            if f.baseline == baseline and f.modelled is not None
        ]
        if modelled:
            found.append(f"{span(modelled)} over {baseline}")
    if not found:
        return []
    text = f"For a step on an H100, {MODEL_MARK}, good kernels would give {listing(found)}."
    return [[Phrase(text)]]


def efficiency_claims(study: StudyRun) -> list[Claim]:
    """The paper's factors; all are about DiT-XL/2."""
    return [
        _theory(study),
        _checkpoint(study),
        _ranged(study, MEMORY, (PEAK,), "takes {} less GPU memory"),
        _ranged(study, SPEED, KINDS, "runs {} faster"),
    ]


def reached_words(found: Sequence[Factor]) -> str:
    """Beside the paper's factor, in words."""
    judged = [f for f in found if f.amount is not None]
    if not judged:
        return NOT_RUN
    reached = [f.is_reached for f in judged]
    if all(reached):
        text = "reaches the paper’s"
    elif not any(reached):
        text = "below the paper’s"
    else:
        text = f"reaches the paper’s in {sum(reached)} of {len(reached)}"
    unstable = sum(f.is_unstable for f in judged)
    return f"{text}; {unstable} unstable" if unstable else text


def caveats(study: StudyRun) -> list[str]:
    """What these numbers cannot say."""
    found = [
        "Sizes count the codes, scales, low-rank branch, signs and everything kept in full "
        "precision. Rows named “reading” and “bound” are what the paper may have counted; no file "
        "has them.",
        "The paper does not say against which baseline or batch it measured memory and speed, and "
        "its speed is of an RTX 4090.",
        f"The end-to-end model is {MODEL_MARK}: it adds up layers at rates that good kernels reach "
        "on an H100, and knows no launch overhead. It does not tell activation bits apart.",
    ]
    if is_measured(study):
        found += [
            "Weights are random; that changes neither bytes nor times.",
            "Variants were timed one after the other, each with its own model in memory: a drift "
            "of the device between them is not averaged out.",
            "Eager and compiled variants pay for their launches; CUDA graphs do not. The fair "
            "baseline of a packed model in a graph is bf16-graph.",
        ]
    return found


def _theory(study: StudyRun) -> Claim:
    text = "DiT-XL/2 becomes 13.2× smaller in theory"
    if not is_xl(study):
        return _other_model(study, text)
    readings = [r for r in study.tables["checkpoints"] if r["packing"].startswith("reading")]
    near = [r for r in readings if value(r, "published") == 13.2]
    if not near:
        return Claim(text, NOT_RUN, [Phrase("the run has no such reading")])
    amount = _amount(value(near[0], "size_reduction"))
    everything = _factor_of(study, "ideal/fp32/fp32")
    words = f"{times(amount)} with {near[0]['reading']}"
    if everything is not None:
        words += f"; {times(everything)} with every part counted at the entropy bound"
    verdict = HOLDS if round(amount, 1) >= 13.2 else FAILS
    return Claim(text, verdict, [Phrase(words, study.href), Phrase(".")])


def _checkpoint(study: StudyRun) -> Claim:
    text = f"DiT-XL/2 becomes {_paper(study, CHECKPOINT)} smaller as a checkpoint"
    if not is_xl(study):
        return _other_model(study, text)
    found = sorted(of_kind(study, CHECKPOINT, "file"), key=lambda f: -_amount(f.amount))
    if not found:
        return Claim(text, NOT_RUN, [Phrase("the run has no packing of a file")])
    verdict = HOLDS if any(f.is_reached for f in found) else FAILS
    words = "; ".join(f"{times(_amount(f.amount))} as {f.ours}" for f in found)
    return Claim(text, verdict, [Phrase(words, study.href), Phrase(".")])


def _ranged(study: StudyRun, claim: str, kinds: Sequence[str], text: str) -> Claim:
    text = "DiT-XL/2 " + text.format(_paper(study, claim))
    if not is_xl(study):
        return _other_model(study, text)
    found = [f for kind in kinds for f in of_kind(study, claim, kind)]
    if not any(f.amount is not None for f in found):
        words = "needs a run of “efficiency” on a CUDA device"
        if claim == MEMORY:
            exact = [f for f in of_kind(study, MEMORY, WEIGHTS) if f.amount is not None]
            parts = [f"{times(_amount(f.amount))} below {f.baseline}" for f in exact]
            words += f"; weights alone are {listing(parts)}, exactly" if parts else ""
        return Claim(text, NOT_RUN, [Phrase(words + ".")])
    parts = []
    for baseline in dict.fromkeys(f.baseline for f in found if f.baseline != PEER):
        amounts = [f.amount for f in found if f.baseline == baseline and f.amount is not None]
        if amounts:
            parts.append(f"{span(amounts)} over {baseline}")
    words = "; ".join(parts) + f", on {device(study)}, all packed variants and batches"
    return Claim(text, judge(found), [Phrase(words, study.href), Phrase(".")])


def _other_model(study: StudyRun, text: str) -> Claim:
    return Claim(text, NOT_RUN, [Phrase(f"this run is of {model_name(study)}.")])


def _measured_words(study: StudyRun) -> list[Phrase]:
    """Peak memory and speed against the strongest and the weakest of the baselines."""
    phrases = [Phrase(f"On {device(study)}, ")]
    for claim, kind, lead, relation in (
        (MEMORY, PEAK, "the peak memory of a step is ", "below"),
        (SPEED, "step", "; a step is ", "as fast as"),
    ):
        phrases.append(Phrase(lead))
        found = of_kind(study, claim, kind)
        parts: list[Phrase] = []
        for baseline in ("bf16-graph", "tf32", "fp32"):
            amounts = [f.amount for f in found if f.baseline == baseline and f.amount is not None]
            if amounts:
                end = Phrase(f" {relation} {baseline}")
                parts += [
                    *([Phrase(", ")] if parts else []),
                    Phrase(span(amounts), study.href),
                    end,
                ]
        phrases += parts or [Phrase(NOT_RUN)]
        phrases.append(Phrase(f" (the paper: {_paper(study, claim)})"))
    return [*phrases, Phrase(".")]


def _paper(study: StudyRun, claim: str) -> str:
    found = [f.paper for f in factors(study) if f.claim == claim]
    return f"{found[0]:g}×" if found else NOT_RUN


def _factor_of(study: StudyRun, packing: str) -> float | None:
    rows = study.of("checkpoints", packing=packing)
    return value(rows[0], "size_reduction") if rows else None


def _amount(number: float | None) -> float:
    assert number is not None
    return number
