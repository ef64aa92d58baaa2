"""From runs to rows: what may stand in one table, and its mean and spread.

A *protocol* is everything that must be equal before two FIDs can be compared (workload, teacher,
sampler, steps, guidance, number of samples, features, version of the study). A *row* is one plan
with one training budget; its runs differ in the training seed only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.loading import Record, RunData
from reports.settings import (
    FAMILIES,
    activation_bits,
    differences,
    family,
    is_full_precision,
    qat_steps,
    section,
)
from robuq_bench.errors import CheckpointError

STUDY = "train-and-eval"
TEACHER = "teacher"
KID_UNBIASED_SINCE = 2  # version of the study

_METRIC_ORDER = ("fid", "sfid", "is", "kid", "precision", "recall", "distillation", "denoising")
_HIGHER_IS_BETTER = frozenset({"is", "precision", "recall"})
_SHOWN = 16  # hexadecimal digits of a digest that tell protocols apart
_NOT_METRICS = frozenset({"key", "kind", "subject", "seed_range", "seed_start", "num_samples"})
# How a metric was computed, not how good the images are.
_DETAILS = (
    *("_std", "_splits", "_subset_size", "_torch_fidelity", "_is_stratified"),
    *("_is_rank_deficient", "_seconds", "_s"),
)


@dataclass(frozen=True)
class Value:
    """One measured number and where it comes from; `seed_range` is None for validation losses.

    `is_rank_deficient` marks a Fréchet distance of too few images for its number of features.
    """

    value: float
    run: RunData
    seed_range: int | None = None
    is_rank_deficient: bool = False


@dataclass(frozen=True)
class Summary:
    """Mean, least and greatest of `count` values from `seeds` training seeds."""

    mean: float
    low: float
    high: float
    count: int
    seeds: int


@dataclass
class Row:
    """One line of the summary table."""

    plan: Mapping[str, Any]
    runs: list[RunData]
    values: dict[str, list[Value]] = field(default_factory=dict)
    anchor: str = ""
    differs: str = ""

    @property
    def name(self) -> str:
        return str(self.plan.get("name", "unknown"))

    @property
    def label(self) -> str:
        """The plan's name, with its notes."""
        return f"{self.name} ({self.notes})" if self.notes else self.name

    @property
    def notes(self) -> str:
        """That it is PTQ, and the settings that tell it from others of its name."""
        return ", ".join(["PTQ"] * self.is_ptq + [self.differs] * bool(self.differs))

    @property
    def family(self) -> str:
        return family(self.plan)

    @property
    def bits(self) -> float | None:
        return activation_bits(self.plan)

    @property
    def qat_steps(self) -> int | None:
        """Steps of training; None where the runs do not say."""
        return qat_steps(self.plan, self.runs[0].workload) if self.runs else None

    @property
    def is_ptq(self) -> bool:
        """Whether the plan quantizes and does not train."""
        return not is_full_precision(self.plan) and self.qat_steps == 0

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def is_rank_deficient(self, metric: str) -> bool:
        """Whether any value of the metric is."""
        return any(value.is_rank_deficient for value in self.values.get(metric, []))

    def summary(self, metric: str) -> Summary | None:
        """Mean and range of a metric over training seeds and seed ranges, None if not run."""
        return summarize(self.values.get(metric, []))


@dataclass
class Group:
    """Rows that share a protocol and may be compared; `version` is the study's, 0 if unknown."""

    workload: Mapping[str, Any]
    num_samples: int
    seed_starts: list[int]
    rows: list[Row]
    teacher: Row
    version: int
    differs: str = ""

    @property
    def title(self) -> str:
        name = str(self.workload.get("name", "unknown"))
        return f"{name}, {self.differs}" if self.differs else name

    @property
    def evaluation(self) -> Mapping[str, Any]:
        return section(self.workload, "evaluation")

    @property
    def all_rows(self) -> list[Row]:
        return [self.teacher, *self.rows]

    @property
    def metrics(self) -> list[str]:
        """Columns of the summary table, in reading order."""
        names = {name for row in self.all_rows for name in row.values}
        return sorted(names, key=_metric_rank)

    @property
    def fid(self) -> str | None:
        """The metric that orders plans: the protocol's FID, under its full name."""
        return next((name for name in self.metrics if stem(name) == "fid"), None)

    @property
    def protocol(self) -> str:
        """How the numbers were measured, in one line."""
        evaluation = self.evaluation
        ranges = f"{len(self.seed_starts)} seed range" + "s" * (len(self.seed_starts) != 1)
        starts = ", ".join(map(str, self.seed_starts))
        spacing = evaluation.get("timestep_spacing", "none")
        return (
            f"{evaluation.get('sampler', 'sampler not recorded')}, "
            f"{evaluation.get('sampling_steps', '?')} steps"
            f"{'' if spacing == 'none' else f' of {spacing} spacing'}, "
            f"cfg {evaluation.get('cfg_scale', '?')}, "
            f"N = {self.num_samples} images per seed range, {ranges} (first seeds {starts}), "
            f"features: {evaluation.get('features', '?')}"
        )


def stem(metric: str) -> str:
    """`fid_digits` -> `fid`: the metric without the name of its feature space."""
    return metric.split("_", 1)[0]


def higher_is_better(metric: str) -> bool:
    return stem(metric) in _HIGHER_IS_BETTER


def summarize(values: Sequence[Value]) -> Summary | None:
    """Mean (of all values, equally weighted) and range; None without values."""
    if not values:
        return None
    numbers = [value.value for value in values]
    return Summary(
        mean=math.fsum(numbers) / len(numbers),
        low=min(numbers),
        high=max(numbers),
        count=len(numbers),
        seeds=len({value.run.seed for value in values}),
    )


def group_runs(runs: Iterable[RunData]) -> list[Group]:
    """Sort finished train-and-eval runs into protocols and rows.

    Protocols of the newest version of the study come first, then those of the most rows. Of other
    studies, only the runs that measured a teacher are used: the teacher row cites them.
    """
    by_id = {run.id: run for run in runs if run.finished}
    by_protocol: dict[str, list[RunData]] = {}
    for run in by_id.values():
        if run.study == STUDY:
            by_protocol.setdefault(_canonical(_protocol(run)), []).append(run)
    groups = [_group(members, by_id) for _, members in sorted(by_protocol.items())]
    for index, differs in enumerate(differences([_protocol_view(group) for group in groups])):
        groups[index].differs = differs.replace("evaluation.", "")
    return sorted(groups, key=lambda group: (-group.version, -len(group.rows), group.title))


def metric_records(run: RunData, subject: str) -> list[Record]:
    return [record for record in run.of_kind("metrics") if record.get("subject") == subject]


def metric_values(record: Record) -> dict[str, float]:
    """The numbers of one metrics record, without its bookkeeping fields.

    Raises:
        CheckpointError: a metric is no number.
    """
    for name, value in record.items():
        is_metric = stem(name) in _METRIC_ORDER and not name.endswith(_DETAILS)
        if is_metric and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{record.get('key')} has {name} of another kind: {value!r}")
    return {
        name: float(value)
        for name, value in record.items()
        if name not in _NOT_METRICS
        and not name.endswith(_DETAILS)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def _protocol(run: RunData) -> dict[str, Any]:
    workload = run.workload
    evaluation = _set_fields(section(workload, "evaluation"))
    for irrelevant in ("batch_size", "grid_images", "inception_weights"):
        evaluation.pop(irrelevant, None)
    for name in ("features", "reference", "vae"):
        # Known by content where possible: the same path may have held something else.
        digest = evaluation.pop(f"{name}_sha256", None) or _input(run, name)
        if digest:
            evaluation[name] = digest[:_SHOWN]
    evaluation["num_samples"] = _num_samples(run)
    teacher = section(workload, "teacher")
    identity = teacher.get("sha256") or teacher.get("checkpoint", "")
    data = _set_fields(section(workload, "data"))
    stated, _ = data.pop("sha256", ""), data.pop("path", "")
    content = _input(run, "data") or str(stated)
    return {
        "name": run.workload_name,
        "model": section(workload, "model"),
        "data": {**data, "content": content[:_SHOWN]},
        "diffusion": _set_fields(section(workload, "diffusion")),
        "teacher": identity,
        "evaluation": evaluation,
        "study_version": _version(run),
    }


def _version(run: RunData) -> int:
    """The study's version, 0 if unknown: raised where numbers change, as KID's did from 1 to 2."""
    text = str(run.config.get("study_version", ""))
    return int(text) if text.isdecimal() else 0


def _set_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is absent: an optional field comes without a new version of the study."""
    return {key: value for key, value in values.items() if value != "none"}


def _input(run: RunData, name: str) -> str:
    """SHA-256 under which a run recorded an input, "" if it did not."""
    return str(section(section(run.manifest, "inputs"), name).get("sha256", ""))


def _protocol_view(group: Group) -> dict[str, Any]:
    member = next((row.runs[0] for row in group.rows if row.runs), None)
    return _protocol(member or group.teacher.runs[0])


def _num_samples(run: RunData) -> int:
    counts = {record.get("num_samples") for record in run.of_kind("metrics")}
    if len(counts) > 1:
        raise CheckpointError(
            f"{run.path / 'results.jsonl'} mixes metrics of different num_samples: "
            f"{sorted(map(str, counts))}; delete the folder and run it again"
        )
    recorded = next(iter(counts), None)
    configured = section(run.workload, "evaluation").get("num_samples", 0)
    return int(configured if recorded is None else recorded)


def _group(members: list[RunData], by_id: Mapping[str, RunData]) -> Group:
    by_plan: dict[str, list[RunData]] = {}
    for run in members:
        by_plan.setdefault(_canonical(_row_config(run)), []).append(run)
    rows = [_row(runs) for _, runs in sorted(by_plan.items())]
    for row, text in zip(rows, differences([_row_config(r.runs[0]) for r in rows]), strict=True):
        row.differs = text
    teacher = _teacher_row(members, by_id)
    rows = [row for row in rows if not _is_teacher(row, teacher)]
    starts = {
        int(record.get("seed_start", 0))
        for run in members
        for record in run.of_kind("metrics")
        if record.get("subject") in ("student", TEACHER)
    }
    return Group(
        workload=members[0].workload,
        num_samples=_num_samples(members[0]),
        seed_starts=sorted(starts),
        rows=sorted(rows, key=_row_rank),
        teacher=teacher,
        version=_version(members[0]),
    )


def _row_config(run: RunData) -> dict[str, Any]:
    plan = {k: v for k, v in run.plan.items() if k not in ("description", "expected")}
    skipped = ("checkpoint_every_steps", "log_every_steps")
    training = {k: v for k, v in section(run.workload, "training").items() if k not in skipped}
    return {**plan, "training": training}


def _row(runs: list[RunData]) -> Row:
    runs = sorted(runs, key=lambda run: run.seed)
    row = Row(plan=runs[0].plan, runs=runs, anchor=f"row-{runs[0].anchor}")
    for run in row.runs:
        for record in metric_records(run, "student"):
            _add(row, run, record)
        for name, value in metric_values(run.first("validation")).items():
            if name.endswith("_loss"):
                row.values.setdefault(name, []).append(Value(value, run))
    return row


def _teacher_row(members: list[RunData], by_id: Mapping[str, RunData]) -> Row:
    """Teacher metrics are copied into every run, so equal ones count once."""
    seen: set[str] = set()
    # The runs of a protocol are in no other, so the first of them makes a unique anchor.
    anchor = f"row-teacher-of-{members[0].anchor}"
    row = Row(plan={"name": TEACHER}, runs=[], anchor=anchor)
    for run in members:
        for record in metric_records(run, TEACHER):
            values = metric_values(record)
            identity = _canonical([record.get("seed_range"), record.get("seed_start"), values])
            if identity in seen:
                continue
            seen.add(identity)
            source = by_id.get(str(record.get("source_run")), run)
            if source not in row.runs:
                row.runs.append(source)
            _add(row, source, record)
    return row


def _add(row: Row, run: RunData, record: Record) -> None:
    for name, value in metric_values(record).items():
        is_deficient = bool(record.get(f"{name}_is_rank_deficient", False))
        place = record.get("seed_range")
        row.values.setdefault(name, []).append(Value(value, run, place, is_deficient))


def _is_teacher(row: Row, teacher: Row) -> bool:
    """True for the full-precision plan once its values are in the teacher row.

    Its metrics are the teacher's; only its validation losses are new, and move over.
    """
    if not is_full_precision(row.plan):
        return False
    metrics = {name for name, values in row.values.items() if values[0].seed_range is not None}
    for name in metrics:
        known = {value.value for value in teacher.values.get(name, [])}
        if any(value.value not in known for value in row.values[name]):
            return False
    for name in row.values.keys() - metrics:
        teacher.values.setdefault(name, []).extend(row.values[name])
    teacher.runs += [run for run in row.runs if run not in teacher.runs]
    return True


def _row_rank(row: Row) -> tuple[Any, ...]:
    has_bits = any("activation" in rule for rule in row.plan.get("layers", []))
    bits = (row.bits or 0) if has_bits else math.inf
    return (-bits, FAMILIES.index(row.family), row.is_ptq, row.label)


def _metric_rank(name: str) -> tuple[int, str]:
    return ([*_METRIC_ORDER, stem(name)].index(stem(name)), name)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=dict)
