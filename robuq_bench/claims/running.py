"""Making the runs of claims one after another: what is done is kept, what fails is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robuq_bench.claims.planning import Pace, wall_seconds
from robuq_bench.config import Config, training_steps
from robuq_bench.context import Context
from robuq_bench.errors import RobuqError
from robuq_bench.progress import format_seconds
from robuq_bench.runs.lock import is_locked
from robuq_bench.runs.run import run_folder
from robuq_bench.runs.run_files import DONE, read_manifest
from robuq_bench.runs.study import run_study

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A run to be made; `label` is what messages call it."""

    label: str
    config: Config


@dataclass
class Tally:
    """What became of tasks, by label; `failed` and `busy` say why."""

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    busy: dict[str, str] = field(default_factory=dict)


def shard(tasks: Sequence[Task], part: str | None) -> list[Task]:
    """Every n-th task from the i-th on, for "i/n"; all without a part."""
    if part is None:
        return list(tasks)
    index, _, count = part.partition("/")
    return list(tasks[int(index) - 1 :: int(count)])


def make_runs(tasks: Sequence[Task], root: Path, context: Context, pace: Pace) -> Tally:
    """Make, or continue, each run under `root`.

    A run that another process writes is passed over, and asked again at the end. An error of one
    run does not stop the others; Ctrl-C and SIGTERM do.

    Args:
        tasks: in their order.
        root: the folder of all runs.
        context: where and how to compute.
        pace: of finished runs, for the time left; those made here are counted in.
    """
    tally, left = Tally(), []
    for place, task in enumerate(tasks, start=1):
        ahead = [_expected(pace, other.config) for other in tasks[place - 1 :]]
        known = [seconds for seconds in ahead if seconds is not None]
        text = f", about {format_seconds(sum(known))} left" if len(known) == len(ahead) else ""
        if not _make(task, root, context, pace, tally, f"[{place}/{len(tasks)}{text}] "):
            left.append(task)
    for task in left:
        if not _make(task, root, context, pace, tally, ""):
            tally.busy[task.label] = "another process writes it"
    return tally


def _expected(pace: Pace, config: Config) -> float | None:
    return pace.seconds(config.workload.name, training_steps(config))


def _make(task: Task, root: Path, context: Context, pace: Pace, tally: Tally, start: str) -> bool:
    """Whether the run is settled, by success or failure; False while another process writes it."""
    path = run_folder(root, task.config)
    if (path / DONE).exists():
        tally.kept.append(task.label)
        return True
    if is_locked(path):
        return False
    context.progress.log(f"{start}{task.label}")
    try:
        run_study(task.config, root, context)
    except Exception as error:
        if is_locked(path):  # another process took it in between
            return False
        if not isinstance(error, RobuqError):
            _LOG.exception("%s crashed", task.label)
        tally.failed[task.label] = f"{type(error).__name__}: {error}".partition("\n")[0]
        context.progress.log(f"{task.label} failed: {error}")
        return True
    seconds = wall_seconds(read_manifest(path))
    pace.add(task.config.workload.name, training_steps(task.config), seconds)
    tally.done.append(task.label)
    return True
