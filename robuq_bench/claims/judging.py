"""The verdicts on declared claims, from what finished runs measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from robuq_bench.claims.declared import Claim, Finding
from robuq_bench.claims.history import declared_before
from robuq_bench.claims.judged import Judged
from robuq_bench.claims.measured import Measured, read_measured, why_unfinished
from robuq_bench.claims.planning import Cell, Planner, is_one, is_trained, runs_by_config
from robuq_bench.config import Config, config_hash, load_workload, training_steps
from robuq_bench.errors import UsageError
from robuq_bench.runs.run_files import DONE, check_done
from robuq_bench.statistics.comparisons import contrast_text, judge_contrast, judge_family
from robuq_bench.statistics.metrics import find_metric, lower_is_better
from robuq_bench.statistics.verdicts import COLUMNS, Verdict, no_verdict, read_verdicts


class Runs:
    """Run folders, of which cells find theirs by its config; each is read once."""

    def __init__(self, planner: Planner, folders: Iterable[Path]) -> None:
        self.planner, self.folders = planner, list(folders)
        self._by_config = runs_by_config(self.folders)
        self._read: dict[Path, Measured] = {}

    def of(self, cell: Cell) -> Measured | None:
        """The finished run of a cell."""
        folder = self._folder(cell)
        if folder is None or not (folder / DONE).exists():
            return None
        if folder not in self._read:
            self._read[folder] = read_measured(folder)
        return self._read[folder]

    def failure(self, cell: Cell) -> str:
        """How the run of a cell failed; "" where it did not."""
        folder = self._folder(cell)
        return "" if folder is None else why_unfinished(folder)

    def _folder(self, cell: Cell) -> Path | None:
        return self._by_config.get(config_hash(self.planner.config(cell)))


def judge(runs: Runs, path: Path) -> list[Judged]:
    """Every claim on each of its workloads at each of its budgets, in the order of the file.

    Args:
        runs: what was measured, of the claims of their planner.
        path: the file of claims, whose history git is asked for.
    """
    declared = runs.planner.declared
    found = [
        _judge(runs, key, Cell(workload, "", steps, 0), path)
        for key, claim in declared.claims.items()
        for workload in claim.workloads
        for steps in claim.budgets or (None,)
    ]
    families: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(found):
        families.setdefault((one.family, one.workload), []).append(place)
    for places in families.values():
        corrected = judge_family([found[place].verdict for place in places], planned=True)
        for place, verdict in zip(places, corrected, strict=True):
            one, claim = found[place], declared.claims[found[place].key]
            word = _holds(verdict, claim)
            found[place] = dataclasses.replace(one, verdict=verdict, holds=word)
    return found + [
        _of_study(runs, key, finding, path) for key, finding in declared.studies.items()
    ]


def _judge(runs: Runs, key: str, place: Cell, path: Path) -> Judged:
    declared = runs.planner.declared
    claim = declared.claims[key]
    cells = [
        dataclasses.replace(place, arm=arm, seed=seed)
        for arm in claim.weights
        for seed in claim.seeds
    ]
    finished = {cell: run for cell in cells if (run := runs.of(cell)) is not None}
    measured = _paired(runs.planner, finished)
    failed = {cell: why for cell in cells if (why := runs.failure(cell))}
    recorded = next((run.metrics() for run in measured.values()), [])
    metric = find_metric(claim.metric, recorded) or claim.metric
    contrast = contrast_text(claim.weights, claim.difference_margin is None)
    configs = [runs.planner.config(cell) for cell in cells]
    problem = _half_tuned(runs.planner, cells) or _why_not(claim, metric, measured, failed)
    if problem:
        verdict = no_verdict(claim.text, contrast, metric, problem)
    else:
        verdict = _compared(claim, values_of(measured, metric), metric, shares_images(configs))
        if lacking := _lacking(cells, finished):
            verdict = _without_word(verdict, lacking)
    used = list({run.name: run for run in measured.values()}.values())
    hours = [run.cpu_hours for run in used]
    steps = place.steps or max(map(training_steps, configs))
    commits = sorted({run.commit for run in used})
    return Judged(
        key=key,
        text=claim.text,
        workload=configs[0].workload.name,
        steps=steps,
        family=claim.family,
        metric=metric,
        contrast=contrast,
        expect=claim.expect,
        verdict=verdict,
        holds="not judged",  # until its family is judged
        cpu_hours=None if None in hours else math.fsum(filter(None, hours)),
        runs=tuple(run.name for run in used),
        commits=tuple(filter(None, commits)),
        declared=declared_before(declared, key, commits, path, (place.workload, place.steps)),
    )


def _compared(claim: Claim, values: pd.DataFrame, metric: str, shared_ranges: bool) -> Verdict:
    """The verdict on the values of a claim's arms; not judged where they cannot be compared."""
    contrast = contrast_text(claim.weights, claim.difference_margin is None)
    try:
        verdict = judge_contrast(
            values,
            claim.weights,
            metric,
            lower_is_better=lower_is_better(metric),
            margin=claim.margin,
            difference_margin=claim.difference_margin,
            shared_ranges=shared_ranges,
        )
    except UsageError as error:
        return no_verdict(claim.text, contrast, metric, str(error))
    return dataclasses.replace(verdict, claim=claim.text, subject=contrast)


def _paired(planner: Planner, measured: Mapping[Cell, Measured]) -> dict[Cell, Measured]:
    """Without one run of a teacher, which stands for every seed, at seeds that no student has."""
    ones = {cell for cell in measured if is_one(planner.config(cell))}
    seeds = {cell.seed for cell in measured if cell not in ones}
    return {c: run for c, run in measured.items() if c not in ones or c.seed in seeds}


def _why_not(
    claim: Claim,
    metric: str,
    measured: Mapping[Cell, Measured],
    failed: Mapping[Cell, str],
) -> str:
    """Why a contrast cannot be computed; "" where it can."""
    if failed:
        said = "; ".join(f"{cell.arm} seed {cell.seed} {why}" for cell, why in failed.items())
        return f"a run failed: {said}"
    absent = [arm for arm in claim.weights if all(cell.arm != arm for cell in measured)]
    if absent:
        return f"no finished run of {', '.join(absent)}"
    for cell, run in measured.items():
        if metric not in run.metrics():
            return f"run {run.name} of {cell.arm} has no metric {metric}"
    return ""


def _half_tuned(planner: Planner, cells: Iterable[Cell]) -> str:
    """Which trained arms have a learning rate chosen for them where others have none; else ""."""
    arms: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for cell in cells:
        if is_trained(planner.config(cell)):
            arms[(cell.workload, cell.arm) in planner.rates][cell.arm] = None
    tuned, plain = ", ".join(arms[True]), ", ".join(arms[False])
    if not tuned or not plain:
        return ""
    return f"learning rate tuned of {tuned} but not of {plain}; run `claims tune`"


def _lacking(cells: Iterable[Cell], finished: Mapping[Cell, Measured]) -> str:
    """Which seeds of which arms have no finished run; "" where all have."""
    seeds: dict[str, list[str]] = {}
    for cell in cells:
        if cell not in finished:
            seeds.setdefault(cell.arm, []).append(str(cell.seed))
    return "; ".join(f"{arm} lacks seed {', '.join(own)}" for arm, own in seeds.items())


def _without_word(verdict: Verdict, lacking: str) -> Verdict:
    """The numbers alone: a word at the seeds so far would let one stop at lucky ones."""
    note = f"not all declared runs are finished: {lacking}"
    return dataclasses.replace(
        verdict, verdict="not judged", p_value=None, detectable=None, note=note
    )


def shares_images(configs: Iterable[Config]) -> bool:
    """Whether range r is of the same images whatever the training seed."""
    return all(config.workload.evaluation.image_seeds != "own" for config in configs)


def values_of(measured: Mapping[Cell, Measured], metric: str) -> pd.DataFrame:
    """plan (the arm), seed, image_range, value of the students of runs."""
    lines = [
        (cell.arm, cell.seed, image_range, value)
        for cell, run in measured.items()
        for who, image_range, name, value in run.lines
        if who == "student" and name == metric
    ]
    return pd.DataFrame(lines, columns=["plan", "seed", "image_range", "value"])


def _holds(verdict: Verdict, claim: Claim) -> str:
    """What the word of a comparison makes of the word that was expected."""
    if verdict.verdict in ("undecided", "not judged"):
        return verdict.verdict
    if verdict.verdict == claim.expect:
        return "holds"
    if claim.expect != "equivalent":
        return "does not hold"
    assert verdict.low is not None  # a decided word has an interval
    assert verdict.high is not None
    if claim.difference_margin is None:
        low, high, margin = (
            math.log(verdict.low),
            math.log(verdict.high),
            -math.log1p(-claim.margin),
        )
    else:
        low, high, margin = verdict.low, verdict.high, claim.difference_margin
    return "does not hold" if low > margin or high < -margin else "undecided"


def _of_study(runs: Runs, key: str, finding: Finding, path: Path) -> Judged:
    """The verdict of a study's newest version, which must be one row of one finished run."""
    name = load_workload(finding.workload).name
    rows = [
        (folder, commit, verdict)
        for folder, commit, verdicts in _verdicts_of(finding.study, name, runs.folders)
        for verdict in verdicts
        if fnmatchcase(verdict.claim, finding.claim)
        and fnmatchcase(verdict.subject, finding.subject)
    ]
    used: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    word = "not judged"
    if len(rows) == 1:
        (folder, commit, verdict) = rows[0]
        used, commits, word = (folder.name,), (commit,), verdict.verdict
        if word not in ("undecided", "not judged"):
            word = "holds" if word == finding.expect else "does not hold"
    else:
        said = "; ".join(f"{v.claim} ({v.subject}) of {folder.name}" for folder, _, v in rows[:3])
        problem = f"no finished run of study {finding.study} has this verdict"
        if rows:
            problem = f"{len(rows)} verdicts fit, where one must: {said}"
        verdict = no_verdict(finding.text, finding.subject, "", problem)
    return Judged(
        key=key,
        text=finding.text,
        workload=name,
        steps=0,
        family=f"study {finding.study}",
        metric=verdict.effect_name,
        contrast=verdict.subject,
        expect=finding.expect,
        verdict=verdict,
        holds=word,
        cpu_hours=None,
        runs=used,
        commits=tuple(filter(None, commits)),
        declared=declared_before(runs.planner.declared, key, commits, path),
    )


def _verdicts_of(
    study: str, workload: str, folders: Iterable[Path]
) -> list[tuple[Path, str, list[Verdict]]]:
    """Folder, commit and verdicts of the finished runs of a study's newest version there is."""
    found: dict[str, list[tuple[Path, str, list[Verdict]]]] = {}
    for folder in folders:
        table = folder / "tables" / "verdicts.csv"
        if folder.parent.name != study or not (folder / DONE).exists() or not table.is_file():
            continue
        manifest = check_done(folder)
        if manifest.get("workload") != workload:
            continue
        frame = pd.read_csv(table, keep_default_na=False, na_values=[""])
        if not set(COLUMNS) <= set(frame.columns):
            continue  # of a version from before verdicts had one form
        code: Mapping[str, Any] = manifest["sessions"][-1]["provenance"].get("code", {})
        commit = "" if code.get("dirty") else str(code.get("git_sha") or "")
        version = str(manifest.get("study_version", ""))
        found.setdefault(version, []).append((folder, commit, read_verdicts(frame)))
    if not found:
        return []
    return found[max(found, key=lambda version: (len(version), version))]
