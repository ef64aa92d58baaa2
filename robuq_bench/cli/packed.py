"""The command that writes a packed model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from robuq_bench.cli import console
from robuq_bench.cli.flags import RUNS, Flags, JsonFlag, with_flags
from robuq_bench.cli.job import Job, find_run, show_dry_run
from robuq_bench.errors import UsageError, suggest

packed_app = typer.Typer()


@packed_app.command()
@with_flags("output")
def export(
    flags: Flags,
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|PLAN", help="A finished run, or a plan for the teacher."),
    ],
    file: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The packed model.")
    ] = Path("model.safetensors"),
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            metavar="CODES/LOW_RANK/REST",
            help="base3 or 2bit ternary codes; the others fp32 (lossless), fp16 or int8.",
        ),
    ] = "base3/fp32/fp32",
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="No teacher: real sizes and speeds, noise images."),
    ] = False,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="FOLDER", help="Root of the run folders.")
    ] = RUNS,
) -> None:
    """Write a packed model: one file of codes and scales (ternary, or 2 to 8 bits), with its
    configuration."""
    run, plan = _run_or_plan(what, runs)
    if run is not None and random_weights:
        raise UsageError(f"{what} is a run, which has weights; --random-weights goes with a plan")
    job = Job("export", "1", plan, replace(flags, output=runs), (file,), writes_run=False)
    config = job.resolve()
    if file.is_dir():
        raise UsageError(f"{file} is a folder; -o names the file to write")
    if flags.dry_run:
        show_dry_run(job, config, file, file.exists())
        return
    if file.exists() and not flags.force:
        raise UsageError(f"{file} exists; choose another -o, or --force to replace it")
    from robuq_bench.inference.packed_header import Storage

    Storage.parse(storage)
    context = job.context()
    from robuq_bench.inference.exporting import run_export

    rows = run_export(
        config, context, run=run, random_weights=random_weights, storage=storage, target=file
    )
    if flags.as_json:
        console.print_json({"command": "export", "path": file, "storage": storage, "table": rows})
        return
    console.print_table(rows, missing="")
    print(f"done: {file}", flush=True)


@packed_app.command()
def packed(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` wrote.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a packed model is: its plan, source, bits, and every byte of its file."""
    from robuq_bench.inference.packed_file import describe, size_table

    facts, rows = describe(file), size_table(file)
    if as_json:
        console.print_json({"command": "packed", "path": file, **facts, "table": rows})
        return
    for name, value in facts.items():
        print(f"{name:24} {value}")
    console.print_table(rows, missing="")


def _run_or_plan(what: str, root: Path) -> tuple[Path | None, str]:
    """The run folder that `what` means, or a plan; a plan's name wins.

    Raises:
        UsageError: neither; names the nearest of both.
    """
    from robuq_bench.config import plan_names

    if what in plan_names() or what.endswith(".toml"):
        return None, what
    try:
        return find_run(what, root), "fp"
    except UsageError:
        from robuq_bench.runs.run import list_runs

        known = [*plan_names(), *(summary.id for summary in list_runs(root))]
        raise UsageError(f"{what!r} is neither a run nor a plan{suggest(what, known)}") from None
