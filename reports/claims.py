"""The claims of the paper, each with what the runs at hand say about it.

The rule is fixed here, before any run is read. A claim "A beats B" is about two rows of one
protocol, judged by the protocol's FID over all training seeds and seed ranges:

- *holds*: the worst value of A is better than the best value of B;
- *does not hold*: the other way round;
- *undecided*: the ranges overlap, so these runs cannot tell;
- *one seed: not judged*: a row was trained with one seed, whose images say nothing of another
  training (the teacher is not trained here and needs none);
- *not run*: a row that the claim needs is missing.

The two rows have had the same number of training steps and have weights of the same precision:
what QAT gains over PTQ, or 4-bit over ternary weights, is not the gain that a claim is about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.aggregate import TEACHER, Group, Row
from reports.settings import (
    AMPN,
    PARTIAL,
    UNIFORM,
    UNROTATED,
    comparable,
    differing,
    section,
    weight_precision,
)
from reports.text import Phrase, joined, listing, mean_and_spread, number, plural, significant

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
NOT_JUDGED = "one seed: not judged"
MIN_SEEDS = 2
LAYER_TYPES = ("proj", "qkv", "fc1", "fc2")

_BUDGET_TOLERANCE = 1e-9
_XL_WIDTH, _XL_DEPTH = 1152, 28


@dataclass(frozen=True)
class Claim:
    """One line of the checklist. `claim` is what the paper says, `evidence` what the runs say."""

    claim: str
    verdict: str
    evidence: Sequence[Phrase]


@dataclass(frozen=True)
class Comparison:
    """Two rows judged by one lower-is-better metric."""

    better: Row
    worse: Row
    metric: str
    verdict: str
    evidence: Sequence[Phrase]

    @property
    def ratio(self) -> float:
        """Mean of the row that should be worse over that of the other."""
        a, b = self.better.summary(self.metric), self.worse.summary(self.metric)
        return b.mean / a.mean if a and b and a.mean else math.nan


def compare(better: Row, worse: Row, metric: str) -> Comparison | None:
    """Apply the rule of this module; None when either row lacks the metric."""
    a, b = better.summary(metric), worse.summary(metric)
    if a is None or b is None:
        return None
    verdict = HOLDS if a.high < b.low else FAILS if a.low > b.high else UNDECIDED
    if not all(math.isfinite(x) for x in (a.low, a.high, b.low, b.high)):
        verdict = UNDECIDED
    trained = [row for row in (better, worse) if row.plan.get("name") != TEACHER]
    if any(len(row.seeds) < MIN_SEEDS for row in trained):
        verdict = NOT_JUDGED
    evidence = [
        Phrase(f"{metric} "),
        value_phrase(better, metric),
        Phrase(f" ({better.label}, {seeds_text(better, a.seeds)}) against "),
        value_phrase(worse, metric),
        Phrase(f" ({worse.label}, {seeds_text(worse, b.seeds)})"),
    ]
    return Comparison(better, worse, metric, verdict, evidence)


def seeds_text(row: Row, count: int) -> str:
    """How many seeds, and that they are of a training where there was one."""
    return plural(count, "seed" if row.is_ptq else "training seed")


def value_phrase(row: Row, metric: str) -> Phrase:
    """Mean and spread of a row, linked to the values behind it."""
    return Phrase(mean_and_spread(metric, row.summary(metric)), f"#{row.anchor}")


def hadamard_comparison(group: Group, bits: float) -> Comparison | None:
    """Rotated against unrotated plan at one uniform bit width, the two nearest in settings."""
    return _nearest(group, _rows(group, UNIFORM, bits), _rows(group, UNROTATED, bits))


def ampn_comparison(group: Group, bits: float) -> Comparison | None:
    """AMPN at a mean of `bits` against the nearest plan with `bits` everywhere."""
    return _nearest(group, _rows(group, AMPN, bits), _rows(group, UNIFORM, bits))


def bitnet_comparison(group: Group, bits: float) -> Comparison | None:
    """RobuQ with uniform bits against BitNet v2 (rotation of some layers only)."""
    ours, theirs = (_rows(group, kind, bits) for kind in (UNIFORM, PARTIAL))
    return _nearest(group, _w158(ours), _w158(theirs))


def group_claims(group: Group) -> list[Claim]:
    """The claims that runs of one protocol can support or refute."""
    claims = [
        _claim(
            f"With {bits} activation bits, the plan with Hadamard beats the plan without",
            hadamard_comparison(group, bits),
            f"needs a rotated and an unrotated plan at {bits} bits",
            list_differences=True,
        )
        for bits in (8, 4, 3, 2)
        if bits != 8 or hadamard_comparison(group, 8)
    ]
    claims.append(_gain_grows(group))
    claims += [
        _claim(
            f"At a mean of {bits} bits, AMPN beats the same {bits} bits in every layer",
            ampn_comparison(group, bits),
            f"needs an AMPN plan and a uniform plan at {bits} bits",
        )
        for bits in (3, 2)
    ]
    claims += [_budget_kept(group)]
    claims += [_type_order(group, bits) for bits in (3, 2)]
    claims += [
        _claim(
            f"At W1.58A{bits}, RobuQ beats BitNet v2",
            bitnet_comparison(group, bits),
            f"needs a RobuQ and a BitNet v2 plan at {bits} bits",
            list_differences=True,
        )
        for bits in (4, 3)
    ]
    claims += [_stable(group), _anomaly(group)]
    return claims


def open_claims(studies: Iterable[str]) -> list[Claim]:
    """Claims that need studies other than train-and-eval; a study's own section gives verdicts."""
    done = set(studies)
    wanted = (
        ("normality", "After the Hadamard transform, activations of every token are normal"),
        ("sensitivity", "Sensitivity measured after QAT allocates better than before it"),
        ("efficiency", "DiT-XL/2 becomes 13.2× smaller in theory, 15.2× as a checkpoint"),
        ("efficiency", "DiT-XL/2 takes 7.1× less GPU memory and runs 3.5× faster"),
        ("kernels", "W1.58 kernels are right, and faster than cuBLAS bf16"),
    )
    return [
        Claim(text, NOT_RUN, [Phrase(f"needs a run of the study “{study}”")])
        for study, text in wanted
        if study not in done
    ]


def mean_bits_by_type(group: Group, bits: float) -> tuple[Row, dict[str, list[float]]] | None:
    """Of the AMPN row at `bits`: mean activation bits per layer type, one value per run."""
    for row in _rows(group, AMPN, bits):
        by_type: dict[str, list[float]] = {}
        for run in row.runs:
            for name, value in section(run.first("allocation"), "by_type").items():
                by_type.setdefault(str(name), []).append(float(value))
        if by_type:
            return row, by_type
    return None


def _claim(
    text: str, comparison: Comparison | None, needs: str, *, list_differences: bool = False
) -> Claim:
    if comparison is None:
        return Claim(text, NOT_RUN, [Phrase(needs)])
    evidence = list(comparison.evidence)
    if math.isfinite(comparison.ratio):
        evidence.append(
            Phrase(f": the second is {significant(comparison.ratio, 3)} times the first")
        )
    others = confounds(comparison)
    if list_differences and others:
        evidence.append(Phrase(f". The two also differ in {listing(others)}"))
    return Claim(text, comparison.verdict, [*evidence, Phrase(".")])


def confounds(comparison: Comparison) -> list[str]:
    """Settings other than the rotation in which the two rows differ."""
    settings = _differing(comparison.better, comparison.worse)
    return [key for key in settings if ".rotation." not in f".{key}"]


def _gain_grows(group: Group) -> Claim:
    text = "The gain of the plan with Hadamard over the plan without is greatest at 2 bits"
    gains = {bits: hadamard_comparison(group, bits) for bits in (4, 3, 2)}
    pairs = {bits: pair for bits, pair in gains.items() if pair is not None}
    ratios = {bits: pair.ratio for bits, pair in pairs.items()}
    if len(ratios) < 2 or 2 not in ratios:
        return Claim(text, NOT_RUN, [Phrase("needs both plans at 2 bits and at 3 or 4 bits")])
    evidence = Phrase(
        f"ratio of mean {group.fid}, without over with: "
        + ", ".join(f"{significant(ratio, 3)} at {bits} bits" for bits, ratio in ratios.items())
        + "."
    )
    if not all(math.isfinite(ratio) for ratio in ratios.values()):
        return Claim(text, UNDECIDED, [evidence])
    if any(pair.verdict == NOT_JUDGED for pair in pairs.values()):
        return Claim(text, NOT_JUDGED, [evidence])
    verdict = HOLDS if max(ratios, key=lambda bits: ratios[bits]) == 2 else FAILS
    return Claim(text, verdict, [evidence])


def _budget_kept(group: Group) -> Claim:
    text = "AMPN keeps its budget of mean activation bits, weighted by MACs"
    found = [
        (row, run, float(run.first("allocation")["mean_bits"]))
        for row in _w158(group.rows)
        if row.family == AMPN and row.bits is not None and not row.is_ptq
        for run in row.runs
        if "mean_bits" in run.first("allocation")
    ]
    if not found:
        return Claim(text, NOT_RUN, [Phrase("needs a run of an AMPN plan")])
    kept = all(mean <= (row.bits or 0) + _BUDGET_TOLERANCE for row, _, mean in found)
    evidence = joined(
        Phrase(
            f"{row.label} seed {run.seed}: {significant(mean)} of {row.bits:g}", f"#{run.anchor}"
        )
        for row, run, mean in found
    )
    return Claim(text, HOLDS if kept else FAILS, evidence)


def _type_order(group: Group, bits: float) -> Claim:
    published: Mapping[float, str] = {
        2: "2.75 / 2.21 / 2.00 / 1.64",
        3: "3.89 / 2.96 / 3.04 / 2.31",
    }
    text = (
        f"At a mean of {bits:g} bits, AMPN gives most bits to proj and fewest to fc2 "
        f"({' / '.join(LAYER_TYPES)}: {published[bits]})"
    )
    found = mean_bits_by_type(group, bits)
    if found is None or not set(LAYER_TYPES) <= set(found[1]):
        return Claim(text, NOT_RUN, [Phrase(f"needs a run of an AMPN plan at {bits:g} bits")])
    row, by_type = found
    runs = range(min(len(values) for values in by_type.values()))
    agrees = [
        by_type["proj"][i] == max(by_type[name][i] for name in LAYER_TYPES)
        and by_type["fc2"][i] == min(by_type[name][i] for name in LAYER_TYPES)
        for i in runs
    ]
    verdict = HOLDS if all(agrees) else UNDECIDED if any(agrees) else FAILS
    if len(row.seeds) < MIN_SEEDS:
        verdict = NOT_JUDGED
    means = " / ".join(
        significant(math.fsum(by_type[name]) / len(by_type[name]), 3) for name in LAYER_TYPES
    )
    evidence = [
        Phrase(f"{row.label}: "),
        Phrase(means, "#allocation"),
        Phrase(f"; so in {sum(agrees)} of {plural(len(agrees), 'training seed')}."),
    ]
    return Claim(text, verdict, evidence)


def _stable(group: Group) -> Claim:
    text = "W1.58A2 trains stably (every logged loss finite; the last tenth below the first)"
    rows = _w158(_rows(group, AMPN, 2) + _rows(group, UNIFORM, 2))
    found = []
    for row in rows:
        for run in row.runs:
            losses = [float(record["loss"]) for record in run.of_kind("train") if "loss" in record]
            if len(losses) >= 2:
                found.append((row, run, losses))
    if not found:
        return Claim(text, NOT_RUN, [Phrase("needs a RobuQ plan at 2 bits")])
    verdicts, evidence = [], []
    for row, run, losses in found:
        tenth = max(1, len(losses) // 10)
        first = math.fsum(losses[:tenth]) / tenth
        last = math.fsum(losses[-tenth:]) / tenth
        verdicts.append(all(map(math.isfinite, losses)) and last < first)
        evidence.append(
            Phrase(
                f"{row.label} seed {run.seed}: {number('loss', first)} → {number('loss', last)}",
                f"#{run.anchor}",
            )
        )
    verdict = HOLDS if all(verdicts) else FAILS
    # One training that diverges refutes the claim; one that does not supports it for no other.
    if verdict == HOLDS and len({run.seed for _, run, _ in found}) < MIN_SEEDS:
        verdict = NOT_JUDGED
    return Claim(text, verdict, joined(evidence))


def _anomaly(group: Group) -> Claim:
    text = "At cfg 4.0, quantized models get a lower FID than full precision (a metric anomaly)"
    scale = float(group.evaluation.get("cfg_scale", 0))
    metric = group.fid
    if scale < 4 or metric is None:
        return Claim(text, NOT_RUN, [Phrase(f"these runs were sampled at cfg {scale:g}")])
    rows = [row for row in group.rows if row.family == UNIFORM and not row.is_ptq]
    pairs = [compare(row, group.teacher, metric) for row in rows]
    found = [pair for pair in pairs if pair is not None]
    if not found:
        return Claim(text, NOT_RUN, [Phrase("needs quantized plans and their teacher")])
    verdicts = {pair.verdict for pair in found}
    verdict = verdicts.pop() if len(verdicts) == 1 else UNDECIDED
    evidence = [phrase for pair in found for phrase in (*pair.evidence, Phrase("; "))]
    return Claim(text, verdict, evidence[:-1])


def _rows(group: Group, family: str, bits: float) -> list[Row]:
    return [row for row in group.rows if row.family == family and row.bits == bits]


def _w158(rows: list[Row]) -> list[Row]:
    """Those with ternary weights."""
    return [row for row in rows if weight_precision(row.plan) == ("ternary",)]


def _nearest(group: Group, left: list[Row], right: list[Row]) -> Comparison | None:
    """Of the pairs that may be compared, trained ones first, the one with the fewest differences.

    Differences are settings of plans and budgets.
    """
    metric = group.fid
    if metric is None:
        return None

    def rank(pair: tuple[Row, Row]) -> tuple[bool, int, str, str]:
        a, b = pair
        return a.is_ptq, len(_differing(a, b)), a.label, b.label

    pairs = sorted(((a, b) for a in left for b in right if _may_compare(a, b)), key=rank)
    for a, b in pairs:
        comparison = compare(a, b, metric)
        if comparison is not None:
            return comparison
    return None


def _may_compare(a: Row, b: Row) -> bool:
    """Whether two rows have had equal training and have weights of one precision."""
    same_weights = weight_precision(a.plan) == weight_precision(b.plan)
    return a.qat_steps == b.qat_steps and same_weights


def _differing(a: Row, b: Row) -> list[str]:
    """Settings of plans and budgets in which two rows differ."""

    def settings(row: Row) -> dict[str, Any]:
        training = section(row.runs[0].workload, "training")
        plan = {k: v for k, v in row.plan.items() if k not in ("name", "description", "expected")}
        return {**plan, "training": training}

    return differing(comparable([settings(a), settings(b)]))
