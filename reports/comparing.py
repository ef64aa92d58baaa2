"""The claims of the paper about plans, each with what the runs of one protocol say about it.

Which rows may be compared is decided here, and how a word is earned in
`robuq_bench.statistics.comparisons`. Two rows have had the same number of training steps and have
weights of the same precision: what QAT gains over PTQ, or 4-bit over ternary weights, is not the
gain that a claim is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from scipy.stats import binomtest

from reports.page import Claim
from reports.protocols import TEACHER, Group, Row, row_settings
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
from reports.text import fixed, listing, number
from robuq_bench.errors import UsageError
from robuq_bench.statistics.comparisons import (
    CONFIDENCE,
    MARGIN,
    MIN_SEEDS,
    compare_plans,
    judge_family,
)
from robuq_bench.statistics.comparisons import RULE as RULE_OF_PAIRS
from robuq_bench.statistics.verdicts import Verdict

LAYER_TYPES = ("proj", "qkv", "fc1", "fc2")
RULE = (
    f"{RULE_OF_PAIRS} A claim that one plan beats another holds where it is better, and does not "
    "hold where it is worse or equivalent; the comparisons of one protocol are a family. What is "
    "claimed of every training needs as many of them, holds where all show it, and does not hold "
    "where none does; one that diverges, or exceeds its budget, refutes its claim."
)

_BUDGET_TOLERANCE = 1e-9
_WORDS = {"better": "holds", "worse": "does not hold", "equivalent": "does not hold"}


class Pair(NamedTuple):
    """Two rows, of which a claim says that the first is better."""

    better: Row
    worse: Row


class Judged(NamedTuple):
    """What is claimed of one protocol, and what no run of it can tell: claim -> what it needs."""

    claims: list[Claim]
    open: dict[str, str]


def judge(group: Group) -> Judged:
    """The claims that runs of one protocol can support or refute, in the order of the paper."""
    needs: dict[str, str] = {}
    found: list[tuple[Verdict | None, Row | None]] = []

    def add(claim: str, pair: Pair | None, what: str, about: str = ".rotation.") -> None:
        if pair is None:
            needs[claim] = what
        else:
            found.append((_compared(group, claim, pair, about), pair.better))

    for bits in (8, 4, 3, 2):
        pair = _nearest(group, UNIFORM, UNROTATED, bits)
        if pair or bits != 8:
            add(f"With {bits} activation bits, the plan with Hadamard beats the plan without",
                pair, f"needs a rotated and an unrotated plan at {bits} bits")  # fmt: skip
    for bits in (3, 2):
        add(f"At a mean of {bits} bits, AMPN beats the same {bits} bits in every layer",
            _nearest(group, AMPN, UNIFORM, bits),
            f"needs an AMPN plan and a uniform plan at {bits} bits", about=".bits")  # fmt: skip
    for bits in (4, 3):
        add(f"At W1.58A{bits}, RobuQ beats BitNet v2",
            _nearest(group, UNIFORM, PARTIAL, bits, only_ternary=True),
            f"needs a RobuQ and a BitNet v2 plan at {bits} bits")  # fmt: skip
    claim = "At cfg 4.0, quantized models get a lower FID than full precision (a metric anomaly)"
    scale = float(group.evaluation.get("cfg_scale", 0))
    anomalous = [r for r in group.rows if r.family == UNIFORM and not r.is_ptq and scale >= 4]
    for row in anomalous:
        add(claim, Pair(row, group.teacher) if _measured(group, row, group.teacher) else None,
            "needs quantized plans and their teacher")  # fmt: skip
    if not anomalous:
        needs[claim] = f"these runs were sampled at cfg {scale:g}"
    found += _gains(group, needs)
    family = judge_family([verdict for verdict, _ in found if verdict is not None])
    claims = [
        Claim(_as_claim(verdict), group.title, f"#{row.anchor}" if row else "")
        for verdict, (_, row) in zip(family, found, strict=True)
    ]
    for claim, of_runs, what in (*_of_allocations(group), _stable(group)):
        if of_runs is None:
            needs[claim] = what
        else:
            claims.append(Claim(of_runs, group.title))
    return Judged(claims, needs)


def mean_bits_by_type(group: Group, bits: float) -> tuple[Row, pd.DataFrame] | None:
    """Of the AMPN row at `bits`: mean activation bits, layer types × training seeds."""
    for row in _rows(group, AMPN, bits):
        by_seed = {run.seed: section(run.first("allocation"), "by_type") for run in row.runs}
        frame = pd.DataFrame({seed: dict(found) for seed, found in by_seed.items() if found})
        if not frame.empty:
            return row, frame.astype(float)
    return None


def _compared(group: Group, claim: str, pair: Pair, about: str) -> Verdict:
    """The verdict on a pair by the protocol's FID; its word is that of a comparison.

    Settings with `about` in their key are what is claimed; others that differ are noted.
    """
    a, b = pair
    metric = group.fid or ""
    values = group.values[(group.values["metric"] == metric) & group.values["seed_range"].notna()]
    values = values[values["plan"].isin([a.label, b.label])]
    if b.name == TEACHER and b is group.teacher:  # it is one model, whatever seed a plan has
        seeds = values.loc[values["plan"] == a.label, ["seed"]].drop_duplicates()
        teacher = values[values["plan"] == TEACHER].drop(columns="seed").merge(seeds, how="cross")
        values = pd.concat([values[values["plan"] == a.label], teacher])
    note = f"{a.label}: {group.text(a, metric)}; {b.label}: {group.text(b, metric)}"
    others = [key for key in _differing(a, b) if about not in f".{key}"]
    if others and b is not group.teacher:
        note += f"; the two also differ in {listing(others)}"
    return _verdict(values, claim, (a.label, b.label), metric, note)


def _verdict(
    values: pd.DataFrame, claim: str, plans: tuple[str, str], metric: str, note: str
) -> Verdict:
    """Judge `plans[0]` beside `plans[1]`, whose values may be of several runs of one seed."""
    values = values.rename(columns={"seed_range": "image_range"})
    means = values.groupby(["plan", "seed", "image_range"])["value"].mean().reset_index()
    try:
        found = compare_plans(means, *plans, metric)
    except UsageError as error:
        found = Verdict(claim=claim, subject="", verdict="not judged", effect=None,
                        effect_name=metric, low=None, high=None, n=0, n_of="training seeds",
                        test="none", p_value=None, note=str(error))  # fmt: skip
    note = "; ".join(filter(None, [note, found.note]))
    return replace(found, claim=claim, subject=" against ".join(plans), note=note)


def _as_claim(verdict: Verdict) -> Verdict:
    """The word of a comparison as that of the claim that the first plan is better."""
    word, note = _WORDS.get(verdict.verdict, verdict.verdict), verdict.note
    if verdict.verdict == "equivalent":
        note = f"equivalent within ±{100 * (1 - MARGIN):.0f} %; {note}"
    return replace(verdict, verdict=word, note=note)


def _gains(group: Group, needs: dict[str, str]) -> list[tuple[Verdict, Row | None]]:
    """Whether Hadamard gains most at 2 bits: its gain there against that at 3 and at 4 bits."""
    pairs = {bits: _nearest(group, UNIFORM, UNROTATED, bits) for bits in (4, 3, 2)}
    found: list[tuple[Verdict, Row | None]] = []
    for bits in (4, 3):
        claim = f"The gain by Hadamard is greater at 2 bits than at {bits}"
        two, other = pairs[2], pairs[bits]
        if two is None or other is None:
            needs[claim] = f"needs plans with and without Hadamard at 2 and at {bits} bits"
            continue
        gains = {f"{width} bits": _ratios(group, pair) for width, pair in ((2, two), (bits, other))}
        values = pd.concat([gain.assign(plan=name) for name, gain in gains.items()])
        note = "ratio of FIDs, with Hadamard over without: " + listing(
            f"{number('ratio', gain['value'].mean())} at {name}" for name, gain in gains.items()
        )
        metric = f"{group.fid} with Hadamard over without"
        plans = ("2 bits", f"{bits} bits")
        found.append((_verdict(values, claim, plans, metric, note), two.better))
    return found


def _ratios(group: Group, pair: Pair) -> pd.DataFrame:
    """FID of the first row over that of the second, by seed and range that both have."""
    values = group.values[group.values["metric"] == group.fid].dropna(subset=["seed"])
    table = values.pivot_table(
        index=["seed", "seed_range"], columns="plan", values="value", aggfunc="mean"
    )
    ratio = table[pair.better.label] / table[pair.worse.label]
    return ratio.dropna().rename("value").reset_index()


_OfRuns = tuple[str, Verdict | None, str]


def _of_allocations(group: Group) -> Iterable[_OfRuns]:
    """Whether AMPN keeps its budget, and gives most bits to proj and fewest to fc2."""
    claim = "AMPN keeps its budget of mean activation bits, weighted by MACs"
    excess = {
        f"{row.label} seed {run.seed}": float(run.first("allocation")["mean_bits"]) - row.bits
        for row in _ternary(group.rows)
        if row.family == AMPN and row.bits is not None and not row.is_ptq
        for run in row.runs
        if "mean_bits" in run.first("allocation")
    }
    verdict = None
    if excess:
        worst = max(excess, key=lambda name: excess[name])
        verdict = Verdict(
            claim=claim, subject="every run",
            verdict="holds" if excess[worst] <= _BUDGET_TOLERANCE else "does not hold",
            effect=excess[worst], effect_name="greatest mean bits above the budget",
            low=None, high=None, n=len(excess), n_of="runs", test="check of each run",
            p_value=None, note=f"greatest in {worst}",
        )  # fmt: skip
    yield claim, verdict, "needs a run of an AMPN plan"
    published = {2: "2.75 / 2.21 / 2.00 / 1.64", 3: "3.89 / 2.96 / 3.04 / 2.31"}
    for bits, paper in published.items():
        claim = f"At a mean of {bits} bits, AMPN gives most bits to proj and fewest to fc2"
        of_row = mean_bits_by_type(group, bits)
        verdict = None
        if of_row and set(LAYER_TYPES) <= set(of_row[1].index):
            frame = of_row[1].loc[list(LAYER_TYPES)]
            most, least = frame.eq(frame.max()), frame.eq(frame.min())
            agrees = (most.T["proj"] & least.T["fc2"]).tolist()
            means = " / ".join(fixed(mean, 2) for mean in frame.mean(axis=1))
            note = f"{' / '.join(LAYER_TYPES)}: {means}; in the paper {paper}"
            verdict = _of_seeds(claim, of_row[0].label, agrees, "share in that order", note)
        yield claim, verdict, f"needs a run of an AMPN plan at {bits} bits"


def _stable(group: Group) -> _OfRuns:
    claim = "W1.58A2 trains stably (every logged loss finite; the last tenth below the first)"
    rows = _ternary([*_rows(group, AMPN, 2), *_rows(group, UNIFORM, 2)])
    stable: dict[str, bool] = {}
    seeds = set()
    for row in rows:
        for run in row.runs:
            losses = pd.Series(
                [r["loss"] for r in run.of_kind("train") if "loss" in r], dtype=float
            )
            if len(losses) >= 2:
                tenth = max(1, len(losses) // 10)
                falls = losses[-tenth:].mean() < losses[:tenth].mean()
                stable[f"{row.label} seed {run.seed}"] = bool(losses.notna().all() and falls)
                seeds.add(run.seed)
    if not stable:
        return claim, None, "needs a RobuQ plan at 2 bits"
    failed = [name for name, is_stable in stable.items() if not is_stable]
    labels = listing(row.label for row in rows)
    verdict = _of_seeds(claim, labels, list(stable.values()), "share of stable trainings", "")
    if failed:
        verdict = replace(verdict, verdict="does not hold", note=f"not stable: {listing(failed)}")
    elif len(seeds) < MIN_SEEDS:
        verdict = replace(verdict, verdict="not judged", note=f"{MIN_SEEDS} seeds are needed")
    return claim, verdict, ""


def _of_seeds(claim: str, subject: str, shows: Sequence[bool], effect: str, note: str) -> Verdict:
    """A verdict on what each training shows or not."""
    count, n = sum(shows), len(shows)
    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="exact")
    word = "holds" if count == n else "undecided" if count else "does not hold"
    if n < MIN_SEEDS:
        word, note = "not judged", "; ".join(filter(None, [note, f"{MIN_SEEDS} seeds are needed"]))
    return Verdict(
        claim=claim, subject=subject, verdict=word, effect=count / n, effect_name=effect,
        low=float(interval.low), high=float(interval.high), confidence=CONFIDENCE, n=n,
        n_of="trainings", test="exact binomial interval", p_value=None, note=note,
    )  # fmt: skip


def _rows(group: Group, family: str, bits: float) -> list[Row]:
    return [row for row in group.rows if row.family == family and row.bits == bits]


def _ternary(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if weight_precision(row.plan) == ("ternary",)]


def _measured(group: Group, *rows: Row) -> bool:
    return all(group.found(row, group.fid) is not None for row in rows)


def _nearest(
    group: Group, family: str, other: str, bits: float, *, only_ternary: bool = False
) -> Pair | None:
    """Of the pairs that may be compared, trained ones first, the one with the fewest differences.

    Differences are settings of plans and budgets.
    """
    left, right = (
        [row for row in _rows(group, kind, bits) if _measured(group, row)]
        for kind in (family, other)
    )
    if only_ternary:
        left, right = _ternary(left), _ternary(right)
    pairs = [Pair(a, b) for a in left for b in right if _kind_of(a) == _kind_of(b)]

    def rank(pair: Pair) -> tuple[bool, int, str, str]:
        a, b = pair
        return a.is_ptq, len(_differing(a, b)), a.label, b.label

    return min(pairs, key=rank, default=None)


def _kind_of(row: Row) -> tuple[int | None, tuple[str, ...]]:
    """What two rows must have in common."""
    return row.qat_steps, weight_precision(row.plan)


def _differing(a: Row, b: Row) -> list[str]:
    """Settings of plans and budgets in which two rows differ."""
    settings = [row_settings(row.runs[0]) for row in (a, b) if row.runs]
    bare: list[Mapping[str, object]] = [
        {k: v for k, v in own.items() if k != "name"} for own in settings
    ]
    return differing(comparable(bare))
