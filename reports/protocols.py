"""From runs to rows: what may stand in one table, and every value of it in one tidy frame.

A *protocol* is everything that must be equal before two FIDs can be compared (workload, teacher,
sampler, steps, guidance, number of samples, features, version of the study). A *row* is one plan
with one training budget; its runs differ in the training seed only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from reports.loading import RunData
from reports.settings import Family, activation_bits, differences, family, section
from reports.text import NOT_RUN, number, plural, spread, stem
from robuq_bench.errors import CheckpointError

STUDY = "train-and-eval"
TEACHER = "teacher"
KID_UNBIASED_SINCE = 2  # version of the study
STEMS = (
    *("fid", "sfid", "is", "kid", "precision", "recall", "accuracy", "nn"),
    *("distillation", "denoising"),
)
AT_FLOOR = "_at_floor"  # ends the FID of samples that are judged as real images were
VALUES = ("plan", "subject", "seed", "seed_range", "metric", "value", "is_rank_deficient", "run")
"""Columns of `Group.values`: one line per plan, training seed, seed range, metric and run.

`seed` is absent for the teacher, which is not trained here, unless each training seed has images of
its own; `seed_range` is absent for validation losses.
`is_rank_deficient` marks a Fréchet distance of too few images for its number of features.
"""

# How a metric was computed, not how good the images are.
_DETAILS = (
    *("_std", "_splits", "_subset_size", "_torch_fidelity", "_is_stratified"),
    *("_is_rank_deficient", "_seconds", "_s"),
)
_SHOWN = 16  # hexadecimal digits of a digest that tell protocols apart


class Summary(NamedTuple):
    """What a table prints of one plan and metric."""

    mean: float
    low: float
    high: float
    is_rank_deficient: bool


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the summary: a plan and its runs, one per training seed, in order of seeds."""

    plan: Mapping[str, Any]
    runs: tuple[RunData, ...]
    anchor: str
    differs: str = ""

    @property
    def name(self) -> str:
        return str(self.plan.get("name", "unknown"))

    @cached_property
    def label(self) -> str:
        """The plan's name with its notes; no other row of a protocol has it."""
        return f"{self.name} ({self.notes})" if self.notes else self.name

    @property
    def notes(self) -> str:
        """That it is PTQ, and the settings that tell it from others of its name."""
        is_namesake = self.name == TEACHER and bool(self.plan.get("layers"))
        said = ["a plan" * is_namesake, "PTQ" * self.is_ptq, self.differs]
        return ", ".join(filter(None, said))

    @cached_property
    def family(self) -> Family:
        return family(self.plan)

    @cached_property
    def bits(self) -> float | None:
        return activation_bits(self.plan)

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def qat_steps(self) -> int | None:
        """Steps of training, the plan's or the workload's; None where the runs do not say."""
        workload = self.runs[0].workload if self.runs else {}
        steps = section(self.plan, "train").get("steps", section(workload, "training").get("steps"))
        return None if steps is None or not self.runs else int(steps)

    @property
    def warmup_text(self) -> str:
        """What follows the steps at the final bits: those of a warm-up before them, "" without."""
        steps = max((run.first("timing").get("warmup_steps", 0) for run in self.runs), default=0)
        return f" after {steps:,} of warm-up" if steps else ""

    @property
    def is_ptq(self) -> bool:
        """Whether the plan quantizes and does not train."""
        return self.family != Family.FULL_PRECISION and self.qat_steps == 0


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that share a protocol and may be compared; `version` is the study's, 0 if unknown."""

    workload: Mapping[str, Any]
    num_samples: int
    seed_starts: Sequence[int]
    rows: Sequence[Row]
    teacher: Row
    version: int
    values: pd.DataFrame
    differs: str = ""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [str(self.workload.get("name", "unknown")), self.differs]))

    @property
    def evaluation(self) -> Mapping[str, Any]:
        return section(self.workload, "evaluation")

    @property
    def all_rows(self) -> list[Row]:
        return [self.teacher, *self.rows]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics in reading order, under their full names; of several spaces, as measured."""
        found = map(str, dict.fromkeys(self.values["metric"]))
        return sorted(found, key=lambda name: STEMS.index(stem(name)))

    @property
    def fid(self) -> str | None:
        """The metric that orders plans: the protocol's FID, under its full name."""
        return next((name for name in self.metrics if stem(name) == "fid"), None)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """mean, min, max, values, training_seeds and is_rank_deficient by (plan, metric).

        Plans stand as in the table, metrics in reading order; what was not run is not there.
        """
        found = self.values.groupby(["plan", "metric"]).agg(
            mean=("value", "mean"),
            min=("value", "min"),
            max=("value", "max"),
            values=("value", "size"),
            training_seeds=("seed", "nunique"),
            is_rank_deficient=("is_rank_deficient", "any"),
        )
        places = pd.MultiIndex.from_product(
            [[row.label for row in self.all_rows], self.metrics], names=["plan", "metric"]
        )
        return found.reindex(places[places.isin(found.index)])

    @cached_property
    def _found(self) -> dict[tuple[str, str], Summary]:
        lines = self.summary[["mean", "min", "max", "is_rank_deficient"]].itertuples(name=None)
        return {place: Summary(*values) for place, *values in lines}

    def found(self, row: Row, metric: str | None) -> Summary | None:
        """Mean and range over training seeds and seed ranges, None if not run."""
        return self._found.get((row.label, metric or ""))

    def text(self, row: Row, metric: str) -> str:
        """`mean [min–max]` as printed, "not run" where it is absent."""
        found = self.found(row, metric)
        if found is None:
            return NOT_RUN
        return f"{number(metric, found.mean)} {spread(metric, found.low, found.high)}".strip()

    @property
    def protocol(self) -> str:
        """How the numbers were measured, in one line."""
        get, spacing = self.evaluation.get, self.evaluation.get("timestep_spacing", "none")
        return (
            f"{get('sampler', 'sampler not recorded')}, {get('sampling_steps', '?')} steps"
            f"{'' if spacing == 'none' else f' of {spacing} spacing'}, "
            f"cfg {get('cfg_scale', '?')}, N = {self.num_samples} images per seed range, "
            f"{plural(len(self.seed_starts), 'seed range')} (first seeds "
            f"{', '.join(map(str, self.seed_starts))}), features: {get('features', '?')}"
        )


def group_runs(runs: Iterable[RunData]) -> list[Group]:
    """Sort finished train-and-eval runs into protocols and rows.

    Protocols of the newest version of the study come first, then those of the most rows. Of other
    studies, only the runs that measured a teacher are used: the teacher row cites them.

    Raises:
        CheckpointError: a metric is no number, or a run mixes numbers of samples.
    """
    by_id = {run.id: run for run in runs if run.finished}
    alike = _alike([run for run in by_id.values() if run.study == STUDY], _protocol)
    texts = differences([_protocol(members[0]) for members in alike])
    groups = [
        _group(members, by_id, text.replace("evaluation.", ""))
        for members, text in zip(alike, texts, strict=True)
    ]
    return sorted(groups, key=lambda group: (-group.version, -len(group.rows), group.title))


def row_settings(run: RunData) -> dict[str, Any]:
    """Settings of plan and training; equal in the runs of one row."""
    plan = {k: v for k, v in run.plan.items() if k not in ("description", "expected")}
    skipped = ("checkpoint_every_steps", "log_every_steps")
    training = {k: v for k, v in section(run.workload, "training").items() if k not in skipped}
    return {**plan, "training": training}


def _alike(
    runs: Iterable[RunData], settings: Callable[[RunData], Mapping[str, Any]]
) -> list[list[RunData]]:
    """The runs that have equal settings, sorted by what these are."""
    found: dict[str, list[RunData]] = {}
    for run in runs:
        found.setdefault(json.dumps(settings(run), sort_keys=True, default=dict), []).append(run)
    return [found[key] for key in sorted(found)]


def _protocol(run: RunData) -> dict[str, Any]:
    workload = run.workload
    evaluation = _set_fields(section(workload, "evaluation"))
    for irrelevant in ("batch_size", "grid_images", "inception_weights", "sample_teacher"):
        evaluation.pop(irrelevant, None)
    for name in ("features", "reference", "second_features", "second_reference", "vae"):
        # Known by content where possible: the same path may have held something else.
        digest = evaluation.pop(f"{name}_sha256", None) or _input(run, name.replace("_", " "))
        if digest:
            evaluation[name] = digest[:_SHOWN]
    teacher = section(workload, "teacher")
    data = _set_fields(section(workload, "data"))
    stated, _ = data.pop("sha256", ""), data.pop("path", "")
    return {
        "name": run.workload_name,
        "model": section(workload, "model"),
        "data": {**data, "content": (_input(run, "data") or str(stated))[:_SHOWN]},
        "diffusion": _set_fields(section(workload, "diffusion")),
        "teacher": teacher.get("sha256") or teacher.get("checkpoint", ""),
        "evaluation": evaluation | {"num_samples": _num_samples(run)},
        # Raised where numbers change, as KID's did from 1 to 2.
        "study_version": _version(run),
    }


def _set_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is absent: an optional field comes without a new version of the study."""
    return {key: value for key, value in values.items() if value != "none"}


def _input(run: RunData, name: str) -> str:
    """SHA-256 under which a run recorded an input, "" if it did not."""
    return str(section(section(run.manifest, "inputs"), name).get("sha256", ""))


def _num_samples(run: RunData) -> int:
    configured = section(run.workload, "evaluation").get("num_samples", 0)
    counts = {record.get("num_samples") for record in run.of_kind("metrics")} or {configured}
    if len(counts) > 1:
        raise CheckpointError(
            f"{run.path / 'results.jsonl'} mixes metrics of different num_samples: "
            f"{sorted(map(str, counts))}; delete the folder and run it again"
        )
    (recorded,) = counts
    return int(configured if recorded is None else recorded)


def _version(run: RunData) -> int:
    text = str(run.config.get("study_version", ""))
    return int(text) if text.isdecimal() else 0


def _group(members: Sequence[RunData], by_id: Mapping[str, RunData], differs: str) -> Group:
    alike = [sorted(runs, key=lambda run: run.seed) for runs in _alike(members, row_settings)]
    texts = differences([row_settings(runs[0]) for runs in alike])
    rows = [
        Row(runs[0].plan, tuple(runs), f"row-{runs[0].anchor}", text)
        for runs, text in zip(alike, texts, strict=True)
    ]
    labels = {run.id: row.label for row in rows for run in row.runs}
    lines = [line for run in members for line in _lines(run)]
    values = pd.DataFrame(lines, columns=[*VALUES, "start", "source"])
    values = values.astype({"seed": "Int64", "seed_range": "Int64"})
    is_teacher = values["subject"] == TEACHER
    values["plan"] = values["run"].map(labels).where(~is_teacher, TEACHER)
    known = set(zip(values["metric"][is_teacher], values["value"][is_teacher], strict=True))
    for row in [row for row in rows if row.family == Family.FULL_PRECISION]:
        own = values[values["plan"] == row.label]
        sampled = own[own["seed_range"].notna()]
        if set(zip(sampled["metric"], sampled["value"], strict=True)) <= known:
            # The plan without quantization: its metrics are the teacher's, its losses are new.
            values.loc[own.index, ["plan", "subject"]] = TEACHER
            values = values.drop(sampled.index)
            rows.remove(row)
    is_teacher = values["subject"] == TEACHER
    if section(members[0].workload, "evaluation").get("image_seeds") != "own":
        values["seed"] = values["seed"].mask(is_teacher)
    values["run"] = values["source"].where(is_teacher & values["source"].isin(by_id), values["run"])
    # A teacher's metrics are copied into every run, so equal ones count once.
    is_copy = values.duplicated(["subject", "seed_range", "start", "metric", "value"])
    values = values[~(is_copy & is_teacher & values["seed_range"].notna())]
    is_teacher = values["subject"] == TEACHER
    values = pd.concat([values[is_teacher], values[~is_teacher]], ignore_index=True)
    sources = dict.fromkeys(values["run"][values["subject"] == TEACHER])
    # The runs of a protocol are in no other, so the first of them makes a unique anchor.
    anchor = f"row-teacher-of-{members[0].anchor}"
    starts = {int(r.get("seed_start", 0)) for run in members for r in run.of_kind("metrics")}
    return Group(
        workload=members[0].workload,
        num_samples=_num_samples(members[0]),
        seed_starts=sorted(starts),
        rows=sorted(rows, key=_row_rank),
        teacher=Row({"name": TEACHER}, tuple(map(by_id.__getitem__, sources)), anchor),
        version=_version(members[0]),
        values=values[list(VALUES)],
        differs=differs,
    )


def _lines(run: RunData) -> Iterable[dict[str, Any]]:
    """One line per metric that a run holds of its student and its teacher, and per loss."""
    losses = {k: v for k, v in run.first("validation").items() if k.endswith("_loss")}
    for record in [*run.of_kind("metrics"), {"subject": "student", **losses}]:
        for name, value in record.items():
            if stem(name) not in STEMS or name.endswith(_DETAILS):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{record.get('key')} has {name} of another kind: {value!r}")
            yield {
                "subject": record.get("subject"),
                "seed": run.seed,
                "seed_range": record.get("seed_range"),
                "metric": name,
                "value": float(value),
                "is_rank_deficient": bool(record.get(f"{name}_is_rank_deficient", False)),
                "run": run.id,
                "start": record.get("seed_start"),
                "source": record.get("source_run"),
            }


def _row_rank(row: Row) -> tuple[Any, ...]:
    has_bits = any("activation" in rule for rule in row.plan.get("layers", []))
    bits = (row.bits or 0) if has_bits else math.inf
    return (-bits, list(Family).index(row.family), row.is_ptq, row.label)
