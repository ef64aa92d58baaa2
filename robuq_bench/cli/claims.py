"""Commands about declared claims: list them, tune and make their runs, judge and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robuq_bench.cli import console
from robuq_bench.cli.claims_job import (
    chosen_cells,
    hours_of,
    make_or_show,
    needed_runs,
    pace_of,
    planner_of,
    run_digest,
    side_text,
    tuned_arms,
    workload_name,
)
from robuq_bench.cli.flags import RUNS, Flags, JsonFlag, OutputFlag, with_flags
from robuq_bench.errors import CheckError, UsageError

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

    planner = planner_of(only, on, file)
    folders = runs_by_config(run_folders(output))
    pace = pace_of(planner, cells_of(planner.declared), folders)
    rows = []
    for key, claim in planner.declared.claims.items():
        for workload in claim.workloads:
            for steps in claim.budgets or (None,):
                update = {"workloads": (workload,), "budgets": () if steps is None else (steps,)}
                one = planner.declared.model_copy(
                    update={"claims": {key: claim.model_copy(update=update)}}
                )
                needed = needed_runs(planner, cells_of(one), folders)
                left = [cell for cell, is_done in needed if not is_done]
                rows.append(
                    {
                        "claim": key,
                        "workload": workload,
                        "steps": "workload's" if steps is None else steps,
                        "contrast": " against ".join(
                            map(side_text, (claim.candidate, claim.baseline))
                        ),
                        "expected": claim.expect,
                        "family": claim.family,
                        "runs": len(needed),
                        "done": len(needed) - len(left),
                        "hours left": hours_of(planner, left, pace),
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
    every = needed_runs(planner, cells_of(planner.declared), folders)
    left = [cell for cell, is_done in every if not is_done]
    hours = hours_of(planner, left, pace)
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

    planner = planner_of(only, on, file)
    cells = chosen_cells(cells_of(planner.declared), seeds, budget)
    folders = runs_by_config(run_folders(flags.output))
    once = [cell for cell, _ in needed_runs(planner, cells, folders)]
    tasks = [Task(str(cell), planner.config(cell)) for cell in once]
    commands = {str(cell): planner.command(cell) for cell in once}
    untuned = sorted({f"{c.arm} on {c.workload}" for c in cells} - tuned_arms(planner))
    pace = pace_of(planner, cells_of(planner.declared), folders)
    make_or_show("claims run", tasks, flags, part, pace, commands, untuned)


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
        make_or_show("claims tune", tasks, flags, part, Pace(), {}, [])
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
        print(
            f"{target}: {len(chosen)} of {len(arms)} arms have a learning rate; commit it",
            flush=True,
        )
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

    planner = planner_of(None, None, file)
    path = CLAIMS_FILE if file is None else file
    judged = judge(Runs(planner, run_folders(output)), path)
    # A family is corrected as a whole, whatever of it is shown.
    shown = planner.declared.chosen(only or (), on or ())
    names = {workload_name(name) for name in on or ()}
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
    planner = planner_of(only, on, file)
    folders = runs_by_config(run_folders(output))
    needed = needed_runs(planner, cells_of(planner.declared), folders)
    console.check_writable(folder)
    done = {run_digest(planner, cell): None for cell, is_done in needed if is_done}
    written = export_runs((folders[digest] for digest in done), folder)
    if as_json:
        console.print_json({"command": "claims export", "path": folder, "runs": len(written)})
    else:
        print(f"{folder}: {len(written)} runs; `report {folder}` shows them", flush=True)
