"""What a kernels run says, in words and as claims; every sentence follows from its tables."""

from __future__ import annotations

from reports.claims import FAILS, HOLDS, NOT_RUN, Claim
from reports.kernels.data import (
    MEDIAN,
    SHARE,
    TARGETS,
    Outcome,
    checks,
    device,
    has_no_time,
    is_timed,
    is_unstable,
    models,
    ours,
    outcomes,
)
from reports.study_tables import StudyRun, two, value
from reports.text import Phrase, listing, plural, significant

MODEL_MARK = "a model from data-sheet peaks, not measured"
RULE = (
    "Targets are this project’s own, for an H100; the paper states none per kernel. A target is "
    "judged on the slowest call that it names (of adaLN, among the batches for which the data "
    "sheet allows it at all); it is undecided where a timing is unstable, and not run where a "
    "check failed or no GPU was there."
)


def answer(study: StudyRun) -> list[Phrase]:
    """Are all kernels right, on what, and are there times."""
    found = checks(study)
    wrong = [check for check in found if not check.correct]
    sizes = listing(f"DiT-{model}/2" for model in models(study))
    where = device(study) if is_timed(study) else "Triton’s interpreter on a CPU"
    count = Phrase(plural(len(found), "kernel call"), study.href)
    if wrong:
        start = [Phrase(f"{len(wrong)} of "), count, Phrase(f" of {sizes} fail their check on ")]
    else:
        start = [Phrase("All "), count, Phrase(f" of {sizes} agree with plain PyTorch on ")]
    if not is_timed(study):
        start[-1] = Phrase(start[-1].text.removesuffix("on ") + "in ")
        rest = ". Nothing was timed: that needs a CUDA device, and the roofline below is "
        return [*start, Phrase(where + rest + MODEL_MARK + ".")]
    return [*start, Phrase(where), *_times_words(study)]


def kernel_claims(study: StudyRun) -> list[Claim]:
    """Correctness where it was checked, and the project's targets."""
    found = checks(study)
    right = sum(check.correct for check in found)
    words = f"{right} of {plural(len(found), 'kernel call')} within their limits"
    rows = sorted({check.rows for check in found})
    verdict = HOLDS if right == len(found) else FAILS
    text = "Every kernel agrees with its plain PyTorch reference"
    claims = []
    if is_timed(study):
        evidence = [Phrase(words, study.href), Phrase(f" on {device(study)}.")]
        claims.append(Claim(f"{text}, on a GPU", verdict, evidence))
    else:
        at = f", at the true widths and {' or '.join(map(str, rows))} rows."
        evidence = [Phrase(words, study.href), Phrase(at)]
        claims.append(Claim(f"{text}, in Triton’s interpreter", verdict, evidence))
        needs = [Phrase("needs a CUDA device")]
        claims.append(Claim(f"{text}, on a GPU", NOT_RUN, needs))
        targets = Phrase(plural(len(TARGETS), "target"), "#kernels")
        return [
            *claims,
            Claim("Kernels reach the project’s targets", NOT_RUN, [*needs, Phrase(": "), targets]),
        ]
    return [*claims, *(_claim(study, outcome) for outcome in outcomes(study))]


def outcome_text(outcome: Outcome) -> str:
    """The measured value beside its target, or why there is none."""
    if outcome.row is None or outcome.value is None:
        return outcome.reason
    text = shown(outcome.target.column, outcome.value)
    place = f"{outcome.row['layer']}, {int(outcome.row['rows']):,} rows"
    return f"{text} ({place}{'; ' + outcome.reason if outcome.reason else ''})"


def shown(column: str, amount: float) -> str:
    """A value as every table of the section prints it."""
    if column == SHARE:
        return percent(amount)
    return microseconds(amount) if column == MEDIAN else f"{two(amount)}×"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def microseconds(amount: float) -> str:
    return f"{significant(amount, 3)} µs"


def ceiling_words(study: StudyRun) -> str:
    """What the device itself reached in the same run."""
    parts = []
    for row in study.tables.get("ceilings", []):
        copy, bf16, int8 = (value(row, n) for n in ("copy_gb_s", "bf16_tflop_s", "int8_top_s"))
        numbers = [
            f"copy {_three(copy)} GB/s",
            f"cuBLAS bf16 {_three(bf16)} TFLOP/s",
            f"int8 {_three(int8)} TOP/s" if int8 is not None else "int8 not run",
        ]
        parts.append(f"{row['device_name']}: {', '.join(numbers)}")
    return "; ".join(parts)


def caveats(study: StudyRun) -> list[str]:
    """What these numbers cannot say."""
    found = [
        "Each largest deviation is in units of what its check allows, so 1 is the limit; limits of "
        "different kernels are different quantities and do not compare.",
        "The roofline and its least times are a model: bytes that must move and operations, over "
        "the peaks of a data sheet. No kernel reaches it.",
    ]
    if is_timed(study):
        return [
            *found,
            "Peers compute a plain product with bias. Our time includes GELU, gate and residual "
            "where the layer has them, and leaves out the quantization of its input, which has "
            "rows of its own.",
            "The share of the ceiling uses the copy bandwidth and product rates of this device in "
            "this run; above 100 % says that the ceiling’s own measurement was not the best.",
        ]
    rows = " or ".join(str(n) for n in sorted({check.rows for check in checks(study)}))
    return [
        *found,
        f"The interpreter ran {rows} rows at the true widths in fp16. It shows that the arithmetic "
        "is right, not that a GPU’s machine code is, and nothing about speed.",
    ]


def _times_words(study: StudyRun) -> list[Phrase]:
    rows = ours(study)
    missing = sum(bool(has_no_time(row)) for row in rows)
    unstable = sum(is_unstable(row) for row in rows)
    judged = outcomes(study)
    met = sum(outcome.verdict == HOLDS for outcome in judged)
    run = sum(outcome.verdict != NOT_RUN for outcome in judged)
    phrases = [Phrase(", all with a time" if not missing else f"; {missing} have no time")]
    if unstable:
        phrases.append(Phrase(f", and {plural(unstable, 'time')} {_verb(unstable)} unstable"))
    judged_words = f". Of {len(TARGETS)} targets {run} could be judged and {met} {_verb(met)} met."
    return [*phrases, Phrase(judged_words)]


def _verb(count: int) -> str:
    return "is" if count == 1 else "are"


def _claim(study: StudyRun, outcome: Outcome) -> Claim:
    href = study.href if outcome.row is not None else ""
    return Claim(outcome.target.text, outcome.verdict, [Phrase(outcome_text(outcome), href)])


def _three(number: float | None) -> str:
    return "not run" if number is None else f"{number:,.0f}"
