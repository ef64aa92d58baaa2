"""What the commands about claims share: configs, what is done, how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robuq_bench.cli import console
from robuq_bench.cli.flags import Flags
from robuq_bench.cli.job import Job, show_rows
from robuq_bench.errors import CheckError, UsageError

if TYPE_CHECKING:
    from reports.page import Section
    from robuq_bench.claims.planning import Cell, Pace, Planner
    from robuq_bench.claims.running import Task


def claims_section(folders: Sequence[Path], file: Path | None) -> Section | None:
    """What a report of these runs says of declared claims; None where they judge none."""
    from robuq_bench.claims.judged import STUDY

    if not any(folder.parent.name == STUDY for folder in folders):
        return None
    from reports.declared import declared_section
    from robuq_bench.claims.declared import CLAIMS_FILE
    from robuq_bench.claims.judging import Runs, judge
    from robuq_bench.claims.tables import claims_rows, steps_to_teacher, teacher_curves

    path = CLAIMS_FILE if file is None else file
    runs = Runs(planner_of(None, None, file), filter(_is_sound, folders))
    judged, curves = judge(runs, path), teacher_curves(runs)
    return declared_section(judged, claims_rows(judged, path), curves, steps_to_teacher(curves))


def _is_sound(folder: Path) -> bool:
    """Whether a run can be read; the report names those that it leaves out."""
    from robuq_bench.errors import RobuqError
    from robuq_bench.runs.run_files import DONE, check_done, read_manifest

    try:
        (check_done if (folder / DONE).exists() else read_manifest)(folder)
    except RobuqError:
        return False
    return True


def planner_of(only: list[str] | None, on: list[str] | None, file: Path | None) -> Planner:
    """Configs of the chosen claims, at the learning rates beside the file."""
    from robuq_bench.claims.declared import CLAIMS_FILE, load_claims

    declared = load_claims(file).chosen(only or (), on or ())
    from robuq_bench.claims.planning import Planner
    from robuq_bench.claims.tuning import RATES_FILE, read_rates

    path = (CLAIMS_FILE if file is None else file).with_name(RATES_FILE)
    return Planner(declared, read_rates(path, declared))


def tuned_arms(planner: Planner) -> set[str]:
    """Arms that have a learning rate of `claims tune`, as "arm on workload"."""
    return {f"{arm} on {workload}" for workload, arm in planner.rates}


def side_text(names: Sequence[str]) -> str:
    """One side of a contrast in words: an arm, or the ratio of two."""
    return names[0] if len(names) == 1 else f"({names[0]} ÷ {names[1]})"


def run_digest(planner: Planner, cell: Cell) -> str:
    """SHA-256 that names the run of a cell; cells of one digest share it."""
    from robuq_bench.config import config_hash

    return config_hash(planner.config(cell))


def needed_runs(
    planner: Planner, cells: Sequence[Cell], folders: dict[str, Path]
) -> list[tuple[Cell, bool]]:
    """Cells of different runs, each with whether its run is finished."""
    from robuq_bench.runs.run_files import DONE

    by_run: dict[str, Cell] = {}
    for cell in cells:
        by_run.setdefault(run_digest(planner, cell), cell)
    return [
        (cell, digest in folders and (folders[digest] / DONE).exists())
        for digest, cell in by_run.items()
    ]


def pace_of(planner: Planner, cells: Sequence[Cell], folders: dict[str, Path]) -> Pace:
    """How long the finished runs of claims took."""
    from robuq_bench.claims.planning import Pace, wall_seconds
    from robuq_bench.config import training_steps
    from robuq_bench.runs.run_files import read_manifest

    pace = Pace()
    for cell, is_done in needed_runs(planner, cells, folders):
        if is_done:
            manifest = read_manifest(folders[run_digest(planner, cell)])
            steps = training_steps(planner.config(cell))
            pace.add(planner.config(cell).workload.name, steps, wall_seconds(manifest))
    return pace


def hours_of(planner: Planner, cells: Sequence[Cell], pace: Pace) -> float | None:
    """CPU-hours that the runs of cells may take; None before any was measured."""
    from robuq_bench.config import training_steps

    configs = [planner.config(cell) for cell in cells]
    seconds = [pace.seconds(each.workload.name, training_steps(each)) for each in configs]
    known = [each for each in seconds if each is not None]
    return sum(known) / 3600 if len(known) == len(seconds) else None


def chosen_cells(cells: Sequence[Cell], seeds: str | None, budget: int | None) -> list[Cell]:
    """The cells of some seeds and of one budget.

    Raises:
        UsageError: no claim has them.
    """
    known = sorted({cell.seed for cell in cells})
    wanted = known if seeds is None else _numbers(seeds)
    if absent := [seed for seed in wanted if seed not in known]:
        raise UsageError(f"--seeds {seeds}: no claim has seed {absent[0]}; there are {known}")
    budgets = sorted({cell.steps for cell in cells if cell.steps is not None})
    if budget is not None and budget not in budgets:
        raise UsageError(f"--budget {budget}: no claim has it; there are {budgets}")
    return [c for c in cells if c.seed in wanted and budget in (None, c.steps)]


def _numbers(text: str) -> list[int]:
    """`0-3` and `0,2,5`, and both."""
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--seeds {text}: give a range such as 0-3, or a list such as 0,2")
        found += range(int(first), int(last or first) + 1)
    return found


def workload_name(workload: str) -> str:
    """Name of a workload that is given by name or file."""
    from robuq_bench.config import load_workload

    return load_workload(workload).name


def make_or_show(
    command: str,
    tasks: Sequence[Task],
    flags: Flags,
    part: str | None,
    pace: Pace,
    commands: dict[str, str],
    untuned: Sequence[str],
) -> None:
    """Make the runs, or say which there would be.

    Raises:
        CheckError: some failed, or are being written by another process; names them.
    """
    from robuq_bench.claims.judged import STUDY
    from robuq_bench.claims.running import make_runs, shard
    from robuq_bench.runs.provenance import code_version
    from robuq_bench.runs.run import run_folder
    from robuq_bench.runs.run_files import DONE
    from robuq_bench.runs.study import check_study
    from robuq_bench.sections import check_shard

    try:
        check_shard(part)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    mine = shard(tasks, part)
    if flags.dry_run:
        rows = []
        for task in mine:
            check_study(task.config)
            is_done = (run_folder(flags.output, task.config) / DONE).exists()
            state = "finished" if is_done else "to make"
            rows.append({"run": task.label, "state": state, "command": commands.get(task.label)})
        show_rows("runs", rows, flags.as_json)
        return
    context = Job.of_study(STUDY, "a2", flags).context()
    if command == "claims run" and code_version().get("dirty"):
        context.progress.log(
            "uncommitted changes: of these runs nobody can say whether claims stood before them; "
            "commit first, learning_rates.csv of `claims tune` too"
        )
    if untuned:
        context.progress.log(
            f"at the workload's learning rate, as `claims tune` chose none: {', '.join(untuned)}"
        )
    tally = make_runs(mine, flags.output, context, pace)
    if flags.as_json:
        facts: dict[str, Any] = {"done": tally.done, "kept": tally.kept}
        console.print_json(
            {"command": command, **facts, "failed": tally.failed, "busy": tally.busy}
        )
    else:
        print(f"{len(tally.done)} runs made, {len(tally.kept)} were finished", flush=True)
    lines = [f"{label}: {why}" for label, why in {**tally.failed, **tally.busy}.items()]
    if lines:
        raise CheckError(f"{len(lines)} of {len(mine)} runs are not there:\n" + "\n".join(lines))
