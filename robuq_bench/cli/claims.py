"""Commands about declared claims: list them, tune and make their runs, judge and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robuq_bench.cli import console
from robuq_bench.cli.flags import RUNS, Flags, JsonFlag, OutputFlag, with_flags
from robuq_bench.cli.job import Job, show_rows
from robuq_bench.errors import CheckError, UsageError

if TYPE_CHECKING:
    from reports.page import Section
    from robuq_bench.claims.planning import Cell, Pace, Planner
    from robuq_bench.claims.running import Task

claims_app = typer.Typer(
    no_args_is_help=True,
    help="Claims declared before their runs: what they need, their runs, their verdicts.",
)

FileFlag = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="The claims (the packaged ones if not given)."),
]
ClaimsFlag = Annotated[
    Path | None,
    typer.Option("--claims", metavar="FILE", help="Declared claims (the packaged if not given)."),
]
OnlyFlag = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="ID", help="This claim alone; may be repeated."),
]
OnFlag = Annotated[
    list[str] | None,
    typer.Option("--on", "--workload", metavar="NAME|FILE", help="This workload; may be repeated."),
]
ShardFlag = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Make this part of the runs.")
]


@claims_app.command("list")
def claims_list(
    only: OnlyFlag = None,
    on: OnFlag = None,
    file: FileFlag = None,
    output: OutputFlag = RUNS,
    as_json: JsonFlag = False,
) -> None:
    """List the claims: their runs, how many of them are done, and the hours of the others."""
    from robuq_bench.claims.planning import cells_of, runs_by_config
    from robuq_bench.runs.run_files import run_folders

    planner = _planner(only, on, file)
    folders = runs_by_config(run_folders(output))
    pace = _pace(planner, cells_of(planner.declared), folders)
    rows = []
    for key, claim in planner.declared.claims.items():
        for workload in claim.workloads:
            for steps in claim.budgets or (None,):
                update = {"workloads": (workload,), "budgets": () if steps is None else (steps,)}
                one = planner.declared.model_copy(
                    update={"claims": {key: claim.model_copy(update=update)}}
                )
                needed = _needed(planner, cells_of(one), folders)
                left = [cell for cell, is_done in needed if not is_done]
                rows.append(
                    {
                        "claim": key,
                        "workload": workload,
                        "steps": "workload's" if steps is None else steps,
                        "contrast": f"{_side(claim.candidate)} against {_side(claim.baseline)}",
                        "expected": claim.expect,
                        "family": claim.family,
                        "runs": len(needed),
                        "done": len(needed) - len(left),
                        "hours left": _hours(planner, left, pace),
                    }
                )
    for key, finding in planner.declared.studies.items():
        rows.append(
            {"claim": key, "workload": finding.workload, "contrast": f"study {finding.study}",
             "expected": finding.expect}
        )  # fmt: skip
    if as_json:
        console.print_json({"claims": rows})
        return
    console.print_table(rows, missing="")
    every = _needed(planner, cells_of(planner.declared), folders)
    left = [cell for cell, is_done in every if not is_done]
    hours = _hours(planner, left, pace)
    takes = "time unknown before a first run" if hours is None else f"about {hours:.3g} hours"
    print(f"{len(every)} runs in all, each made once; {len(left)} to make: {takes}", flush=True)


@claims_app.command("run")
@with_flags("on", "seed", "overrides", "force")
def claims_run(
    flags: Flags,
    only: OnlyFlag = None,
    on: OnFlag = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="A-B|A,B", help="Of the claims' training seeds, these."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", metavar="STEPS", min=0, help="Of the claims' budgets, this."),
    ] = None,
    part: ShardFlag = None,
    file: FileFlag = None,
) -> None:
    """Make the runs that claims need, as `train-and-eval` would; what is finished is kept."""
    from robuq_bench.claims.planning import cells_of, runs_by_config
    from robuq_bench.claims.running import Task
    from robuq_bench.runs.run_files import run_folders

    planner = _planner(only, on, file)
    cells = _chosen(cells_of(planner.declared), seeds, budget)
    folders = runs_by_config(run_folders(flags.output))
    once = [cell for cell, _ in _needed(planner, cells, folders)]
    tasks = [Task(str(cell), planner.config(cell)) for cell in once]
    commands = {str(cell): planner.command(cell) for cell in once}
    untuned = sorted({f"{c.arm} on {c.workload}" for c in cells} - _tuned(planner))
    pace = _pace(planner, cells_of(planner.declared), folders)
    _make("claims run", tasks, flags, part, pace, commands, untuned)


@claims_app.command("tune")
@with_flags("on", "seed", "overrides", "force")
def claims_tune(
    flags: Flags,
    only: OnlyFlag = None,
    on: OnFlag = None,
    part: ShardFlag = None,
    file: FileFlag = None,
) -> None:
    """Choose each arm's learning rate on seeds that no claim uses; writes learning_rates.csv."""
    from robuq_bench.claims.declared import CLAIMS_FILE, load_claims
    from robuq_bench.claims.planning import Pace, runs_by_config
    from robuq_bench.claims.running import Task
    from robuq_bench.claims.tuning import RATES_FILE, rates_rows, trials_of, write_rates
    from robuq_bench.runs.run_files import run_folders

    declared = load_claims(file).chosen(only or (), on or ())
    trials = trials_of(declared)
    tasks = [Task(str(trial), trial.config) for trial in trials]
    target = (CLAIMS_FILE if file is None else file).with_name(RATES_FILE)
    failed: CheckError | None = None
    try:
        _make("claims tune", tasks, flags, part, Pace(), {}, [])
    except CheckError as error:  # a rate at which training fails is a result here
        failed = error
    if flags.dry_run:
        return
    rows = rates_rows(declared, trials, runs_by_config(run_folders(flags.output)))
    console.check_writable(target.parent)
    write_rates(target, rows)
    if not flags.as_json:
        chosen = [row for row in rows if row["chosen"]]
        names = ("workload", "arm", "learning_rate", "metric", "mean", "note")
        console.print_table([{name: row[name] for name in names} for row in chosen])
        arms = {(trial.workload, trial.arm) for trial in trials}
        print(f"{target}: {len(chosen)} of {len(arms)} arms have a learning rate", flush=True)
    if failed is not None:
        raise failed


@claims_app.command("judge")
def claims_judge(
    only: OnlyFlag = None,
    on: OnFlag = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write all columns here.")
    ] = None,
    file: FileFlag = None,
    output: OutputFlag = RUNS,
    as_json: JsonFlag = False,
) -> None:
    """Judge the claims by the runs that are finished."""
    from robuq_bench.claims.declared import CLAIMS_FILE
    from robuq_bench.claims.judging import Runs, judge
    from robuq_bench.claims.tables import claims_rows
    from robuq_bench.files import atomic_write_text
    from robuq_bench.runs.run_files import run_folders, to_csv
    from robuq_bench.statistics.verdicts import interval_text

    planner = _planner(None, None, file)
    path = CLAIMS_FILE if file is None else file
    judged = judge(Runs(planner, run_folders(output)), path)
    # A family is corrected as a whole, whatever of it is shown.
    shown = planner.declared.chosen(only or (), on or ())
    names = {_name_of(name) for name in on or ()}
    judged = [
        one
        for one in judged
        if (one.key in shown.claims or one.key in shown.studies)
        and (not names or one.workload in names)
    ]
    rows = claims_rows(judged, path)
    if csv is not None:
        console.check_writable(csv.parent)
        atomic_write_text(csv, to_csv(rows))
    if as_json:
        console.print_json({"command": "claims judge", "csv": csv, "claims": rows})
        return
    table = []
    for one in judged:
        low, high = one.verdict.low, one.verdict.high
        table.append(
            {
                "claim": one.key,
                "workload": one.workload,
                "steps": one.steps or None,
                "effect": one.verdict.effect,
                "interval": None if low is None or high is None else interval_text(low, high),
                "n": one.verdict.n,
                "verdict": one.verdict.verdict,
                "expected": one.expect,
                "holds": one.holds,
                "p adjusted": one.verdict.p_adjusted,
                "CPU-hours": one.cpu_hours,
                "declared": one.declared or None,
                "note": one.verdict.note[:60] or None,
            }
        )
    console.print_table(table, missing="")
    counts = {word: sum(one.holds == word for one in judged) for word in
              ("holds", "does not hold", "undecided", "not judged")}  # fmt: skip
    print(", ".join(f"{count} {word}" for word, count in counts.items() if count), flush=True)


@claims_app.command("export")
def claims_export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are copied to.")],
    only: OnlyFlag = None,
    on: OnFlag = None,
    file: FileFlag = None,
    output: OutputFlag = RUNS,
    as_json: JsonFlag = False,
) -> None:
    """Copy the finished runs of claims without samples and weights, small enough to commit."""
    from robuq_bench.claims.exporting import export_runs
    from robuq_bench.claims.planning import cells_of, runs_by_config
    from robuq_bench.runs.run_files import run_folders

    if folder.resolve() == output.resolve():
        raise UsageError(f"{folder} is the folder of the runs themselves; name another")
    planner = _planner(only, on, file)
    folders = runs_by_config(run_folders(output))
    needed = _needed(planner, cells_of(planner.declared), folders)
    console.check_writable(folder)
    done = {_digest(planner, cell): None for cell, is_done in needed if is_done}
    written = export_runs((folders[digest] for digest in done), folder)
    if as_json:
        console.print_json({"command": "claims export", "path": folder, "runs": len(written)})
    else:
        print(f"{folder}: {len(written)} runs; `report {folder}` shows them", flush=True)


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
    runs = Runs(_planner(None, None, file), filter(_is_sound, folders))
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


def _planner(only: list[str] | None, on: list[str] | None, file: Path | None) -> Planner:
    """Configs of the chosen claims, at the learning rates beside the file."""
    from robuq_bench.claims.declared import CLAIMS_FILE, load_claims

    declared = load_claims(file).chosen(only or (), on or ())
    from robuq_bench.claims.planning import Planner
    from robuq_bench.claims.tuning import RATES_FILE, read_rates

    path = (CLAIMS_FILE if file is None else file).with_name(RATES_FILE)
    return Planner(declared, read_rates(path, declared))


def _tuned(planner: Planner) -> set[str]:
    return {f"{arm} on {workload}" for workload, arm in planner.rates}


def _side(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({names[0]} ÷ {names[1]})"


def _digest(planner: Planner, cell: Cell) -> str:
    from robuq_bench.config import config_hash

    return config_hash(planner.config(cell))


def _needed(
    planner: Planner, cells: Sequence[Cell], folders: dict[str, Path]
) -> list[tuple[Cell, bool]]:
    """Cells of different runs, each with whether its run is finished."""
    from robuq_bench.runs.run_files import DONE

    by_run: dict[str, Cell] = {}
    for cell in cells:
        by_run.setdefault(_digest(planner, cell), cell)
    return [
        (cell, digest in folders and (folders[digest] / DONE).exists())
        for digest, cell in by_run.items()
    ]


def _pace(planner: Planner, cells: Sequence[Cell], folders: dict[str, Path]) -> Pace:
    """How long the finished runs of claims took."""
    from robuq_bench.claims.planning import Pace, wall_seconds
    from robuq_bench.config import training_steps
    from robuq_bench.runs.run_files import read_manifest

    pace = Pace()
    for cell, is_done in _needed(planner, cells, folders):
        if is_done:
            manifest = read_manifest(folders[_digest(planner, cell)])
            steps = training_steps(planner.config(cell))
            pace.add(planner.config(cell).workload.name, steps, wall_seconds(manifest))
    return pace


def _hours(planner: Planner, cells: Sequence[Cell], pace: Pace) -> float | None:
    from robuq_bench.config import training_steps

    configs = [planner.config(cell) for cell in cells]
    seconds = [pace.seconds(each.workload.name, training_steps(each)) for each in configs]
    known = [each for each in seconds if each is not None]
    return sum(known) / 3600 if len(known) == len(seconds) else None


def _chosen(cells: Sequence[Cell], seeds: str | None, budget: int | None) -> list[Cell]:
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


def _name_of(workload: str) -> str:
    from robuq_bench.config import load_workload

    return load_workload(workload).name


def _make(
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
    from robuq_bench.claims.running import make_runs, shard
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
    context = Job.of_study("train-and-eval", "a2", flags).context()
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
