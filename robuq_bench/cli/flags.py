"""The options of the commands, and those that all commands share that compute."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

PlanFlag = Annotated[
    str, typer.Option("--plan", metavar="NAME|FILE", help="How to quantize; see `plans`.")
]
WorkloadFlag = Annotated[
    str,
    typer.Option(
        "--on", "--workload", metavar="NAME|FILE", help="What to quantize and judge; `workloads`."
    ),
]
SeedFlag = Annotated[int, typer.Option("--seed", min=0, help="Seed of the run.")]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field; may be repeated."),
]
DeviceFlag = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
]
ThreadsFlag = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; torch decides if not given.", metavar="N"),
]
OutputFlag = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Root of the run folders.")
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")
]
ForceFlag = Annotated[
    bool, typer.Option("--force", help="Set an existing run aside and begin anew.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON line instead of tables.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress and no log, but warnings.")]
ExportFlag = Annotated[
    Path | None,
    typer.Option("--export", metavar="FILE", help="Also write the trained weights here."),
]
ActivationsFlag = Annotated[
    Path | None,
    typer.Option(
        "--activations", metavar="FOLDER", help="Analyse these saved activations (normality)."
    ),
]
StudentFlag = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="RUN", help="Of this run's student (normality, packed)."),
]
ShardFlag = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do this part of the trainings (sensitivity, allocation, survival).",
    ),
]
NameArgument = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)]
RUNS = Path("runs")


@dataclass(frozen=True)
class Flags:
    """What the uniform options of one command say."""

    on: WorkloadFlag = "digits"
    seed: SeedFlag = 0
    overrides: SetFlag = None
    device: DeviceFlag = "auto"
    threads: ThreadsFlag = None
    output: OutputFlag = RUNS
    dry_run: DryRunFlag = False
    force: ForceFlag = False
    as_json: JsonFlag = False
    quiet: QuietFlag = False


def with_flags(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Flags`, less those called `without`, as its `flags`."""
    shared = inspect.signature(Flags).parameters.values()
    shared_here = [parameter for parameter in shared if parameter.name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        hints |= get_type_hints(Flags, include_extras=True)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]

        @functools.wraps(command)
        def call(**given: Any) -> None:
            flags = Flags(**{p.name: given.pop(p.name) for p in shared_here})
            command(**given, flags=flags)

        # What Typer reads.
        parameters = [p.replace(annotation=hints[p.name]) for p in (*own, *shared_here)]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        return call

    return decorate
