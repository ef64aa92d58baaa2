"""What a kernels run checked and timed, and the project's targets that judge it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from reports.claims import FAILS, HOLDS, NOT_RUN, UNDECIDED
from reports.study_tables import Row, StudyRun, value

#: Names as `study kernels` writes them.
OURS, BASELINE = "robuq-bench", "cuBLAS bf16"
QUANTIZE, MATMUL, GROUPED = "hadamard_quantize", "ternary_matmul", "grouped_ternary_matmul"
SHARE, SPEEDUP, MEDIAN = "share_of_ceiling", "speedup_over_cublas_bf16", "median_us"
NO_TIME = "no time: check failed"
UNSTABLE = "unstable"


@dataclass(frozen=True)
class KernelRun(StudyRun):
    """A run of `study kernels`, which no plan or workload changes."""

    @property
    def title(self) -> str:
        """Its sizes and where it ran."""
        sizes = "/".join(models(self))
        return f"DiT-{sizes}, {device(self) or 'without a GPU'}"


@dataclass(frozen=True)
class Check:
    """One kernel call against its reference. `error` is in units of its limit: at most 1 passes."""

    kernel: str
    layer: str
    model: str
    width: str
    correct: bool
    error: float | None
    status: str
    rows: int


@dataclass(frozen=True)
class Peaks:
    """Data-sheet peaks of a device as a run prints them, in TB/s and TOP/s."""

    device: str
    source: str
    tb_s: float
    bf16: float
    int8: float


@dataclass(frozen=True)
class Target:
    """A figure that the project set itself; all of DiT-XL/2.

    `tokens`: exactly so many rows, or any number where None. Judged on the worst of what was timed.
    """

    text: str
    kernel: str
    layers: Sequence[str]
    width: int
    column: str
    bound: float
    tokens: int | None = None

    @property
    def is_upper(self) -> bool:
        """Whether the value must not exceed the bound."""
        return self.column == MEDIAN


@dataclass(frozen=True)
class Outcome:
    """A target's verdict, the row it was judged on, and why there is none."""

    target: Target
    verdict: str
    row: Row | None = None
    reason: str = ""

    @property
    def value(self) -> float | None:
        return None if self.row is None else value(self.row, self.target.column)


_FC = ("fc1", "fc2")
TARGETS = (
    Target(
        "LayerNorm + modulate + Hadamard(1152) + quantize: at least 80 % of copy bandwidth",
        QUANTIZE, ("qkv and fc1 input",), 1152, SHARE, 0.80, 32768,
    ),
    Target(
        "Hadamard(4608) + quantize: at least 75 % of copy bandwidth",
        QUANTIZE, ("fc2 input",), 4608, SHARE, 0.75, 32768,
    ),
    Target(
        "fc1 and fc2 at 32,768 tokens: at least 1.7 times as fast as cuBLAS bf16",
        MATMUL, _FC, 0, SPEEDUP, 1.7, 32768,
    ),
    Target(
        "fc1 and fc2 at 512 tokens: at least 1.5 times as fast as cuBLAS bf16",
        MATMUL, _FC, 0, SPEEDUP, 1.5, 512,
    ),
    Target(
        "adaLN of all blocks in one call: at most 25 µs",
        GROUPED, ("adaLN of all blocks",), 1152, MEDIAN, 25.0,
    ),
)  # fmt: skip


def is_timed(study: StudyRun) -> bool:
    """Whether the run was on a device that it could time."""
    return bool(study.tables.get("kernels"))


def device(study: StudyRun) -> str:
    """The device of the timings, "" without any."""
    rows = study.tables.get("kernels", [])
    return rows[0]["device_name"] if rows else ""


def ours(study: StudyRun) -> list[Row]:
    """Rows of our kernels on the device."""
    return study.of("kernels", implementation=OURS)


def checks(study: StudyRun) -> list[Check]:
    """Every correctness check: on the device where there was one, else in the interpreter."""
    rows = ours(study) if is_timed(study) else study.tables.get("kernel_checks", [])
    return [
        Check(
            kernel=row["kernel"],
            layer=row["layer"],
            model=row["model"],
            width=row["width"],
            correct=row["correct"] == "True",
            error=value(row, "max_error"),
            status=row["status"],
            rows=int(row["rows"]),
        )
        for row in rows
    ]


def models(study: StudyRun) -> list[str]:
    """The DiT sizes of the run, in its order."""
    return study.distinct("roofline", "model")


def timed_models(study: StudyRun) -> list[str]:
    return study.distinct("kernels", "model")


def peaks(study: StudyRun) -> list[Peaks]:
    """The devices of the roofline model, as the run's table describes them."""
    found: dict[str, Peaks] = {}
    for row in study.tables["roofline"]:
        text = re.fullmatch(r"([\d.]+) TB/s, bf16 ([\d.]+), int8 ([\d.]+) TOPS", row["peaks"])
        if text and row["device"] not in found:
            numbers = [float(part) for part in text.groups()]
            found[row["device"]] = Peaks(row["device"], row["source"], *numbers)
    return list(found.values())


def products(study: StudyRun, device_name: str, model: str) -> list[Row]:
    """Rows of the roofline model that multiply: those have a time in bf16 beside them."""
    rows = study.of("roofline", device=device_name, model=model)
    return [row for row in rows if value(row, "bf16_over_ternary") is not None]


def has_no_time(row: Row) -> str:
    """Why a row of ours has no time, "" where it has one."""
    if row["correct"] != "True":
        return NO_TIME
    return "" if value(row, MEDIAN) is not None else f"no time: {row['status']}"


def is_unstable(row: Row) -> bool:
    return row.get("stability") == UNSTABLE


def judge(study: StudyRun, target: Target) -> Outcome:
    """Met by the worst of the calls that the target names, every one of them timed and stable."""
    rows = [
        row
        for row in ours(study)
        if row["kernel"] == target.kernel
        and row["model"] == "XL"
        and row["layer"] in target.layers
        and target.tokens in (None, int(row["rows"]))
        and target.width in (0, int(row["width"]))
        and (not target.is_upper or _is_possible(study, row, target.bound))
    ]
    if {row["layer"] for row in rows} != set(target.layers):
        where = "DiT-XL/2" + (f" at {target.tokens:,} tokens" if target.tokens else "")
        needs = f"{where} was not timed" if is_timed(study) else "needs a CUDA device"
        return Outcome(target, NOT_RUN, reason=needs)
    for row in rows:
        if why := has_no_time(row):
            return Outcome(target, NOT_RUN, reason=f"{row['layer']}: {why}")
    if target.is_upper and "H100" not in device(study):
        return Outcome(target, NOT_RUN, reason=f"set for an H100; this is {device(study)}")
    found = [(v, row) for row in rows if (v := value(row, target.column)) is not None]
    if len(found) < len(rows):
        return Outcome(target, NOT_RUN, reason="its baseline or ceiling was not timed")
    pick = max if target.is_upper else min
    worst, row = pick(found, key=lambda pair: pair[0])
    is_met = worst <= target.bound if target.is_upper else worst >= target.bound
    if any(is_unstable(row) for row in rows):
        return Outcome(target, UNDECIDED, row, "unstable timing")
    if is_met and target.column == SPEEDUP and any(r["verdict"] != "faster" for r in rows):
        return Outcome(target, UNDECIDED, row, "not shown to be faster")
    return Outcome(target, HOLDS if is_met else FAILS, row)


def _is_possible(study: StudyRun, row: Row, bound: float) -> bool:
    """Whether the peaks of an H100 allow a call within `bound` microseconds."""
    same = {name: row[name] for name in ("kernel", "model", "layer", "images")}
    found = [
        least
        for sheet in study.of("roofline", **same)
        if sheet["device"].startswith("H100") and (least := value(sheet, "least_us")) is not None
    ]
    return all(least <= bound for least in found)


def outcomes(study: StudyRun) -> list[Outcome]:
    return [judge(study, target) for target in TARGETS]
