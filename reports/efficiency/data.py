"""What an efficiency run counted, measured and modelled, and the rules that judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.claims import FAILS, HOLDS, NOT_RUN, UNDECIDED
from reports.settings import section
from reports.study_tables import Row, StudyRun, value

#: Claims as `study efficiency` names them.
CHECKPOINT, MEMORY, SPEED = "checkpoint size", "GPU memory", "speed"
PEAK, WEIGHTS = "peak of a step", "weights alone"
KINDS = ("step", "sampling")
PEER = "torchao-int8"
EXACT, MEASURED, UNSTABLE = "exact", "measured", "unstable"
PARTS = ("codes", "scales", "low_rank", "signs", "rest")
MEMORY_PARTS = ("weights", "activations", "workspace")
#: Packings that a file can have, with every part counted; the others are bounds or readings.
FILES = ("base3/", "2bit/")
_XL = (1152, 28)
_LEAST_BATCH = 8  # of the targets for speed


@dataclass(frozen=True)
class EfficiencyRun(StudyRun):
    """A run of `study efficiency`, which times all its variants whatever the plan."""

    @property
    def title(self) -> str:
        """Its model and where it ran."""
        return f"{self.run.workload_name}, {device(self) or 'without a GPU'}"


@dataclass(frozen=True)
class Factor:
    """One published factor beside ours: a packed variant (or packing) against one baseline."""

    claim: str
    paper: float
    ours: str
    baseline: str
    kind: str
    batch: str
    amount: float | None
    basis: str
    verdict: str
    modelled: float | None

    @property
    def is_unstable(self) -> bool:
        return UNSTABLE in self.verdict

    @property
    def is_reached(self) -> bool:
        """At least the paper's factor, and of times a significant difference."""
        if self.amount is None or self.amount < self.paper:
            return False
        return self.claim != SPEED or self.verdict.startswith("faster")


@dataclass(frozen=True)
class Aim:
    """A figure that the project set itself."""

    text: str
    verdict: str
    measured: str


def factors(study: StudyRun) -> list[Factor]:
    """The rows of the run's table of claims."""
    found = []
    for row in study.tables["claims"]:
        baseline, comma, kind = row["against"].partition(", ")
        paper = value(row, "paper")
        assert paper is not None
        found.append(
            Factor(
                claim=row["claim"],
                paper=paper,
                ours=row["ours"],
                baseline=baseline,
                kind=kind if comma else "file",
                batch=row["batch"],
                amount=value(row, "factor"),
                basis=row["basis"],
                verdict=row["verdict"],
                modelled=value(row, "modelled_factor"),
            )
        )
    return found


def of_kind(study: StudyRun, claim: str, kind: str) -> list[Factor]:
    return [f for f in factors(study) if (f.claim, f.kind) == (claim, kind)]


def is_measured(study: StudyRun) -> bool:
    """Whether the run was on a device that it could time."""
    return bool(study.tables.get("end_to_end"))


def device(study: StudyRun) -> str:
    rows = study.tables.get("end_to_end", [])
    return rows[0]["device_name"] if rows else ""


def is_xl(study: StudyRun) -> bool:
    """Whether the model has the sizes of DiT-XL/2, of which the paper speaks."""
    model = section(study.run.workload, "model")
    return (model.get("hidden_size"), model.get("depth")) == _XL


def model_name(study: StudyRun) -> str:
    if is_xl(study):
        return "DiT-XL/2"
    model = section(study.run.workload, "model")
    return f"the DiT of {study.run.workload_name} (width {model.get('hidden_size', '?')})"


def items(study: StudyRun, kind: str) -> list[Row]:
    """Rows of what was measured, one per variant and batch: "step" or "sampling"."""
    return study.of("end_to_end", measured=kind)


def variants(study: StudyRun) -> dict[str, str]:
    """{name: description} of every variant, in the order of the run."""
    return {row["variant"]: row["description"] for row in study.tables["weights"]}


def batches(rows: Sequence[Row]) -> list[int]:
    return sorted({int(row["batch"]) for row in rows})


def files(study: StudyRun) -> list[Row]:
    """The packings that a file can have, the smallest file first."""
    rows = [r for r in study.tables["checkpoints"] if r["packing"].startswith(FILES)]
    return sorted(rows, key=lambda row: -(value(row, "size_reduction") or 0))


def judge(found: Sequence[Factor]) -> str:
    """Holds if every measured factor reaches the paper's, not if none does, else undecided.

    Unstable times decide nothing. A peer that the paper could not mean is left out.
    """
    judged = [f for f in found if f.amount is not None and f.baseline != PEER]
    if not judged:
        return NOT_RUN
    reached = {f.is_reached for f in judged if not f.is_unstable}
    if len(reached) != 1:
        return UNDECIDED
    return HOLDS if reached.pop() else FAILS


def aims(study: StudyRun) -> list[Aim]:
    """The project's own targets: weights, checkpoint, and steps against two baselines."""
    best = files(study)
    size = None if not best else value(best[0], "size_reduction")
    weights = [f for f in of_kind(study, MEMORY, WEIGHTS) if f.baseline == "fp32"]
    steps = [f for f in of_kind(study, SPEED, "step") if int(f.batch) >= _LEAST_BATCH]
    graph = [f for f in steps if f.baseline == "bf16-graph"]
    tf32 = [f for f in steps if f.baseline == "tf32"]
    fast = "a step at least {} times as fast as {}, batch ≥ 8"
    found = [
        _aim("a checkpoint at least 15.2 times below FP32, every part counted", size, 15.2, best),
        _aim("a packing past 18 times", size, 18.0, best),
        _least("weights in memory at least 7.1 times below FP32", weights, 7.1),
        _least(fast.format("1.5", "bf16 compiled + CUDA graph"), graph, 1.5),
        _least(fast.format("3.5", "TF32 eager"), tf32, 3.5),
    ]
    if is_xl(study):
        return found
    return [Aim(aim.text, NOT_RUN, "this run is of another model") for aim in found]


def _aim(text: str, amount: float | None, bound: float, rows: Sequence[Row]) -> Aim:
    if amount is None:
        return Aim(text, NOT_RUN, "no packing of a file in this run")
    verdict = HOLDS if amount >= bound else FAILS
    return Aim(text, verdict, f"best: {times(amount)} ({rows[0]['packing']})")


def _least(text: str, found: Sequence[Factor], bound: float) -> Aim:
    """Judged on the least factor of all packed variants and batches."""
    amounts = [f.amount for f in found if f.amount is not None]
    if not amounts or len(amounts) < len(found):
        why = "needs a CUDA device" if not amounts else "some variants or batches have no number"
        return Aim(text, NOT_RUN, why)
    is_fast = all(f.claim != SPEED or f.verdict.startswith("faster") for f in found)
    verdict = HOLDS if min(amounts) >= bound and is_fast else FAILS
    if any(f.is_unstable for f in found):
        verdict = UNDECIDED
    return Aim(text, verdict, f"least: {times(min(amounts))}, greatest: {times(max(amounts))}")


def times(amount: float) -> str:
    """A factor as every table and sentence of the section prints it."""
    return f"{amount:.2f}×" if amount < 100 else f"{amount:.0f}×"


def span(amounts: Sequence[float]) -> str:
    """`least to greatest`, one number where they print alike."""
    low, high = times(min(amounts)), times(max(amounts))
    return low if low == high else f"{low} to {high}"
