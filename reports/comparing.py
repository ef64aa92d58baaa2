"""The claims of the paper about plans, each with what the runs of one protocol say about it.

Which rows may be compared is decided here, and how a word is earned in
`robuq_bench.statistics.comparisons`. Two rows have had the same number of training steps and have
weights of the same precision: what QAT gains over PTQ, or 4-bit over ternary weights, is not the
gain that a claim is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import binomtest

from reports.page import Claim
from reports.protocols import Group, Row, row_settings
from reports.settings import Family, comparable, differing, section, weight_precision
from reports.text import fixed, listing, number, significant
from robuq_bench.errors import UsageError
from robuq_bench.statistics import comparisons
from robuq_bench.statistics.comparisons import CONFIDENCE, MARGIN, MIN_SEEDS
from robuq_bench.statistics.verdicts import Verdict

LAYER_TYPES = ("proj", "qkv", "fc1", "fc2")
RULE = comparisons.RULE + (
    " A claim that one plan beats another holds where it is better, and does not hold where it is "
    "worse or equivalent; the comparisons of one protocol are a family. What is claimed of every "
    "training needs as many of them, holds where all show it, and does not hold where none does; "
    "one that diverges, or exceeds its budget, refutes its claim."
)

_BUDGET_TOLERANCE = 1e-9
_PUBLISHED_ORDER = {2: "2.75 / 2.21 / 2.00 / 1.64", 3: "3.89 / 2.96 / 3.04 / 2.31"}
_WORDS = {"better": "holds", "worse": "does not hold", "equivalent": "does not hold"}

Pair = tuple[Row, Row]  # of which a claim says that the first is better


class Finding(NamedTuple):
    """A claim with its verdict, or with what it needs where no run can tell."""

    claim: str
    verdict: Verdict | None
    needs: str = ""
    href: str = ""


class Judged(NamedTuple):
    """What is claimed of one protocol, and what no run of it can tell: claim -> what it needs."""

    claims: list[Claim]
    open: dict[str, str]


def judge(group: Group) -> Judged:
    """The claims that runs of one protocol can support or refute, in the order of the paper."""
    compared = [*_contests(group), *_anomaly(group), *_gains(group)]
    checked = [_budget(group), _order(group, 2), _order(group, 3), _stable(group)]
    family = comparisons.judge_family([found.verdict for found in compared if found.verdict])
    hrefs = [found.href for found in compared if found.verdict]
    claims = [
        Claim(_as_claim(verdict), group.title, href)
        for verdict, href in zip(family, hrefs, strict=True)
    ]
    claims += [Claim(found.verdict, group.title) for found in checked if found.verdict]
    return Judged(claims, {f.claim: f.needs for f in [*compared, *checked] if f.verdict is None})


def mean_bits_by_type(group: Group, bits: float) -> tuple[Row, pd.DataFrame] | None:
    """Of the AMPN row at `bits`: mean activation bits, layer types × training seeds."""
    for row in _rows(group, Family.AMPN, bits):
        by_seed = {run.seed: section(run.first("allocation"), "by_type") for run in row.runs}
        frame = pd.DataFrame({seed: dict(found) for seed, found in by_seed.items() if found})
        if not frame.empty:
            return row, frame.astype(float)
    return None


def _contests(group: Group) -> Iterable[Finding]:
    uniform = Family.UNIFORM
    for bits in (8, 4, 3, 2):
        pair = _nearest(group, uniform, Family.UNROTATED, bits)
        if pair or bits != 8:
            claim = f"With {bits} activation bits, the plan with Hadamard beats the plan without"
            yield _of_pair(group, claim, pair, f"a rotated and an unrotated plan at {bits} bits")
    for bits in (3, 2):
        pair = _nearest(group, Family.AMPN, uniform, bits)
        claim = f"At a mean of {bits} bits, AMPN beats the same {bits} bits in every layer"
        needs = f"an AMPN plan and a uniform plan at {bits} bits"
        yield _of_pair(group, claim, pair, needs, about=".bits")
    for bits in (4, 3):
        pair = _nearest(group, uniform, Family.PARTIAL, bits, only_ternary=True)
        claim = f"At W1.58A{bits}, RobuQ beats BitNet v2"
        yield _of_pair(group, claim, pair, f"a RobuQ and a BitNet v2 plan at {bits} bits")


def _anomaly(group: Group) -> Iterable[Finding]:
    """Every trained plan of uniform bits against its teacher, where guidance is strong."""
    claim = "At cfg 4.0, quantized models get a lower FID than full precision (a metric anomaly)"
    scale = float(group.evaluation.get("cfg_scale", 0))
    rows = [r for r in group.rows if r.family == Family.UNIFORM and not r.is_ptq and scale >= 4]
    if not rows:
        yield Finding(claim, None, f"these runs were sampled at cfg {scale:g}")
    for row in rows:
        is_measured = _measured(group, row) and _measured(group, group.teacher)
        pair = (row, group.teacher) if is_measured else None
        yield _of_pair(group, claim, pair, "quantized plans and their teacher")


def _of_pair(
    group: Group, claim: str, pair: Pair | None, needs: str, about: str = ".rotation."
) -> Finding:
    if pair is None:
        return Finding(claim, None, f"needs {needs}")
    return Finding(claim, _compared(group, claim, pair, about), "", f"#{pair[0].anchor}")


def _compared(group: Group, claim: str, pair: Pair, about: str) -> Verdict:
    """The verdict on a pair by the protocol's FID; its word is that of a comparison.

    Settings with `about` in their key are what is claimed; others that differ are noted.
    """
    a, b = pair
    values = _fids(group, pair)
    note = "; ".join(f"{row.label}: {group.text(row, group.fid or '')}" for row in pair)
    gains = [r.first("allocation").get("headroom") for r in a.runs if a.family == Family.AMPN]
    if known := [gain for gain in gains if gain is not None]:
        note += f"; headroom by the metric {significant(sum(known) / len(known))}"
    if b is group.teacher and values["seed"].isna().any():  # one model, whatever seed a plan has
        seeds = values.loc[values["plan"] == a.label, ["seed"]].drop_duplicates()
        is_teacher = values["plan"] == b.label
        teacher = values[is_teacher].drop(columns="seed").merge(seeds, how="cross")
        values = pd.concat([values[~is_teacher], teacher])
    elif others := [key for key in _differing(a, b) if about not in f".{key}"]:
        note += f"; the two also differ in {listing(others)}"
    return _verdict(values, claim, (a.label, b.label), group.fid or "", note)


def _fids(group: Group, pair: Pair) -> pd.DataFrame:
    """plan, seed, image_range, value of two rows: means, as a seed may have several runs."""
    values = group.values[group.values["metric"] == group.fid]
    values = values[values["plan"].isin([row.label for row in pair])]
    if group.evaluation.get("image_seeds") == "own":  # no two seeds share a range of images
        values = values.assign(seed_range=0)
    keys = ["plan", "seed", "seed_range"]
    means = values.groupby(keys, dropna=False)["value"].mean().reset_index()
    return means.rename(columns={"seed_range": "image_range"})


def _verdict(
    values: pd.DataFrame, claim: str, plans: tuple[str, str], metric: str, note: str
) -> Verdict:
    """Judge `plans[0]` beside `plans[1]`."""
    try:
        found = comparisons.compare_plans(values, *plans, metric)
    except UsageError as error:
        found = _plain_verdict(claim, "", "not judged", effect_name=metric, note=str(error))
    note = "; ".join(filter(None, [note, found.note]))
    return replace(found, claim=claim, subject=" against ".join(plans), note=note)


def _plain_verdict(claim: str, subject: str, word: str, **fields: Any) -> Verdict:
    """A verdict without effect, interval, units and test, but for what `fields` say."""
    absent = {"effect": None, "low": None, "high": None, "p_value": None, "test": "none"}
    nothing = {**absent, "n": 0, "n_of": "training seeds"}
    return Verdict(claim=claim, subject=subject, verdict=word, **{**nothing, **fields})


def _as_claim(verdict: Verdict) -> Verdict:
    """The word of a comparison as that of the claim that the first plan is better."""
    word, note = _WORDS.get(verdict.verdict, verdict.verdict), verdict.note
    if verdict.verdict == "equivalent":
        note = f"equivalent within ±{100 * (1 - MARGIN):.0f} %; {note}"
    return replace(verdict, verdict=word, note=note)


def _gains(group: Group) -> Iterable[Finding]:
    """Whether Hadamard gains most at 2 bits: its gain there against that at 3 and at 4 bits."""
    pairs = {n: _nearest(group, Family.UNIFORM, Family.UNROTATED, n) for n in (4, 3, 2)}
    for bits in (4, 3):
        claim = f"The gain by Hadamard is greater at 2 bits than at {bits}"
        two, other = pairs[2], pairs[bits]
        if two is None or other is None:
            needs = f"needs plans with and without Hadamard at 2 and at {bits} bits"
            yield Finding(claim, None, needs)
            continue
        gains = {"2 bits": _ratios(group, two), f"{bits} bits": _ratios(group, other)}
        values = pd.concat([gain.assign(plan=name) for name, gain in gains.items()])
        note = "ratio of FIDs, with Hadamard over without: " + listing(
            f"{number('ratio', gain['value'].mean())} at {name}" for name, gain in gains.items()
        )
        metric = f"{group.fid} with Hadamard over without"
        verdict = _verdict(values, claim, ("2 bits", f"{bits} bits"), metric, note)
        yield Finding(claim, verdict, "", f"#{two[0].anchor}")


def _ratios(group: Group, pair: Pair) -> pd.DataFrame:
    """FID of the first row over that of the second, by seed and range that both have."""
    table = _fids(group, pair).pivot(index=["seed", "image_range"], columns="plan", values="value")
    ratio = table[pair[0].label] / table[pair[1].label]
    return ratio.dropna().rename("value").reset_index()


def _budget(group: Group) -> Finding:
    """Whether AMPN keeps its budget in every run."""
    claim = "AMPN keeps its budget of mean activation bits, weighted by MACs"
    excess = {
        f"{row.label} seed {run.seed}": float(run.first("allocation")["mean_bits"]) - row.bits
        for row in _ternary(group.rows)
        if row.family == Family.AMPN and row.bits is not None and not row.is_ptq
        for run in row.runs
        if "mean_bits" in run.first("allocation")
    }
    if not excess:
        return Finding(claim, None, "needs a run of an AMPN plan")
    worst, most = max(excess.items(), key=lambda item: item[1])
    verdict = _plain_verdict(
        claim, "every run", "holds" if most <= _BUDGET_TOLERANCE else "does not hold",
        effect=most, effect_name="greatest mean bits above the budget", n=len(excess),
        n_of="runs", test="check of each run", note=f"greatest in {worst}",
    )  # fmt: skip
    return Finding(claim, verdict)


def _order(group: Group, bits: int) -> Finding:
    """Whether each training gives most bits to proj and fewest to fc2."""
    claim = f"At a mean of {bits} bits, AMPN gives most bits to proj and fewest to fc2"
    of_row = mean_bits_by_type(group, bits)
    if of_row is None or not set(LAYER_TYPES) <= set(of_row[1].index):
        return Finding(claim, None, f"needs a run of an AMPN plan at {bits} bits")
    frame = of_row[1].loc[list(LAYER_TYPES)]
    most, least = frame.eq(frame.max()).T, frame.eq(frame.min()).T
    agrees = (most["proj"] & least["fc2"]).tolist()
    means = " / ".join(fixed(mean, 2) for mean in frame.mean(axis=1))
    note = f"{' / '.join(LAYER_TYPES)}: {means}; in the paper {_PUBLISHED_ORDER[bits]}"
    effect = "share in that order"
    return Finding(claim, _of_seeds(claim, of_row[0].label, agrees, effect, note))


def _stable(group: Group) -> Finding:
    claim = "W1.58A2 trains stably (every logged loss finite; the last tenth below the first)"
    rows = _ternary([*_rows(group, Family.AMPN, 2), *_rows(group, Family.UNIFORM, 2)])
    stable: dict[tuple[str, int], bool] = {}
    for row in rows:
        for run in row.runs:
            losses = [record["loss"] for record in run.of_kind("train") if "loss" in record]
            if len(losses) >= 2:
                values = pd.Series(losses, dtype=float)
                tenth = max(1, len(losses) // 10)
                falls = values[-tenth:].mean() < values[:tenth].mean()
                stable[row.label, run.seed] = bool(values.notna().all() and falls)
    if not stable:
        return Finding(claim, None, "needs a RobuQ plan at 2 bits")
    labels, failed = listing(row.label for row in rows), [key for key in stable if not stable[key]]
    verdict = _of_seeds(claim, labels, list(stable.values()), "share of stable trainings", "")
    if failed:
        note = f"not stable: {listing(f'{label} seed {seed}' for label, seed in failed)}"
        verdict = replace(verdict, verdict="does not hold", note=note)
    elif len({seed for _, seed in stable}) < MIN_SEEDS:
        verdict = replace(verdict, verdict="not judged", note=f"{MIN_SEEDS} seeds are needed")
    return Finding(claim, verdict)


def _of_seeds(claim: str, subject: str, shows: Sequence[bool], effect: str, note: str) -> Verdict:
    """A verdict on what each training shows or not."""
    count, n = sum(shows), len(shows)
    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="exact")
    word = "holds" if count == n else "undecided" if count else "does not hold"
    if n < MIN_SEEDS:
        word, note = "not judged", "; ".join(filter(None, [note, f"{MIN_SEEDS} seeds are needed"]))
    return _plain_verdict(
        claim, subject, word, effect=count / n, effect_name=effect, low=float(interval.low),
        high=float(interval.high), confidence=CONFIDENCE, n=n, n_of="trainings",
        test="exact binomial interval", note=note,
    )  # fmt: skip


def _rows(group: Group, family: Family, bits: float) -> list[Row]:
    return [row for row in group.rows if row.family == family and row.bits == bits]


def _ternary(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if weight_precision(row.plan) == ("ternary",)]


def _measured(group: Group, row: Row) -> bool:
    return group.found(row, group.fid) is not None


def _nearest(
    group: Group, better: Family, worse: Family, bits: float, *, only_ternary: bool = False
) -> Pair | None:
    """Of the pairs that may be compared, trained ones first, the one with the fewest differences.

    Differences are settings of plans and budgets.
    """
    left, right = (
        [row for row in _rows(group, kind, bits) if _measured(group, row)]
        for kind in (better, worse)
    )
    if only_ternary:
        left, right = _ternary(left), _ternary(right)
    pairs = [
        (a, b)
        for a in left
        for b in right
        if a.qat_steps == b.qat_steps and weight_precision(a.plan) == weight_precision(b.plan)
    ]

    def rank(pair: Pair) -> tuple[bool, int, str, str]:
        a, b = pair
        return a.is_ptq, len(_differing(a, b)), a.label, b.label

    return min(pairs, key=rank, default=None)


def _differing(a: Row, b: Row) -> list[str]:
    """Settings of plans and budgets in which two rows differ."""
    settings = [row_settings(row.runs[0]) for row in (a, b) if row.runs]
    return differing(comparable([{**own, "name": ""} for own in settings]))
