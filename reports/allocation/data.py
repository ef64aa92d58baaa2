"""What an allocation run measured, by candidate, budget and target; and the rule that judges it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reports.claims import FAILS, HOLDS, MIN_SEEDS, NOT_JUDGED, UNDECIDED
from reports.study_tables import Row, StudyRun, three, value
from reports.text import number, signed

TARGETS = ("distillation_loss", "denoising_loss", "sample_mse", "fid")


@dataclass(frozen=True)
class Measured:
    """One target of one candidate at one budget: {training seed: value}, lower is better."""

    candidate: str
    by_seed: dict[str, float]

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def low(self) -> float:
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        return max(self.by_seed.values())


def budgets(study: StudyRun) -> list[str]:
    return study.distinct("trials", "budget")


def candidates(study: StudyRun) -> list[str]:
    return study.distinct("trials", "candidate")


def targets(study: StudyRun) -> list[str]:
    return [target for target in TARGETS if column(study, target)]


def column(study: StudyRun, target: str) -> str:
    """The trials' column of a target, FID with the name of its feature space; "" without one."""
    names = study.tables["trials"][0]
    if target != "fid":
        return target if target in names else ""
    return next((n for n in names if n.startswith("fid") and "deficient" not in n), "")


def measured(study: StudyRun, candidate: str, budget: str, target: str) -> Measured | None:
    """The trained networks of a candidate; None without any."""
    name = column(study, target)
    rows = study.of("trials", candidate=candidate, budget=budget)
    found = {row["seed"]: v for row in rows if (v := value(row, name)) is not None}
    return Measured(candidate, found) if found else None


def judge(better: Measured, worse: Measured) -> str:
    """The rule: worst of one against best of the other, over all training seeds, at least two."""
    if min(len(better.by_seed), len(worse.by_seed)) < MIN_SEEDS:
        return NOT_JUDGED
    if better.high < worse.low:
        return HOLDS
    return FAILS if better.low > worse.high else UNDECIDED


def against_uniform(row: Row) -> str:
    """The verdict in a line of a run's verdicts; version 1 of the study judged one seed, too."""
    seeds = value(row, "seeds")
    return NOT_JUDGED if seeds is not None and seeds < MIN_SEEDS else row["beats_uniform"]


def shown(target: str, found: Measured) -> str:
    """Mean and [least–greatest] as the report prints this target."""
    spread = f" [{printed(target, found.low)}–{printed(target, found.high)}]"
    return printed(target, found.mean) + (spread if len(found.by_seed) > 1 else "")


def printed(target: str, amount: float) -> str:
    return number(target, amount)


def difference(target: str, amount: float) -> str:
    """A signed difference at the target's precision."""
    if target == "fid":
        return signed(amount)
    return three(amount) if amount < 0 else f"+{three(amount)}"


def bits_of(study: StudyRun, candidate: str, budget: str = "") -> dict[str, dict[str, float]]:
    """{seed or "all": {layer: bits}} of a candidate, at one budget or at any."""
    wanted = {"candidate": candidate, **({"budget": budget} if budget else {})}
    found: dict[str, dict[str, float]] = {}
    for row in study.of("allocations", **wanted):
        bits = value(row, "bits")
        if bits is not None:
            found.setdefault(row["seed"], {})[row["layer"]] = bits
    return found


def same_bits(study: StudyRun, one: str, other: str, budget: str) -> bool:
    """Whether two candidates named the same bits for every layer."""
    first = bits_of(study, one, budget)
    return bool(first) and first == bits_of(study, other, budget)


def type_means(study: StudyRun, candidate: str, budget: str) -> dict[str, float]:
    """Mean bits per layer type, over layers and (where each seed chose its own) seeds."""
    by_type: dict[str, list[float]] = {}
    for row in study.of("allocations", candidate=candidate, budget=budget):
        bits = value(row, "bits")
        if bits is not None:
            by_type.setdefault(row["layer_type"], []).append(bits)
    return {kind: math.fsum(bits) / len(bits) for kind, bits in by_type.items()}
