"""What the commands share: the uniform flags, and resolve -> look up or do -> show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robuq_bench.cli import console
from robuq_bench.errors import MissingResourceError, UsageError, suggest

if TYPE_CHECKING:
    from robuq_bench.config import Config
    from robuq_bench.context import Context, RunResult

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
        "--activations", metavar="FOLDER", help="normality: analyse these saved activations."
    ),
]
StudentFlag = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="RUN", help="normality, packed: this run's student."),
]
ShardFlag = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="sensitivity, allocation: do this part of the trainings."
    ),
]
NameArgument = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)]
RUNS = Path("runs")
SHARDED = ("sensitivity", "allocation")
TIMED = ("efficiency", "kernels")
OF_A_RUN = {"normality": "student", "packed": "run"}  # study -> the setting that names the run


@dataclass(frozen=True)
class Job:
    """What the uniform flags of one command say."""

    study: str
    version: str
    plan: str
    workload: str
    seed: int
    overrides: list[str] | None
    device: str
    threads: int | None
    output: Path
    dry_run: bool
    force: bool
    as_json: bool
    quiet: bool
    outputs: tuple[Path, ...] = ()  # files besides the run folder
    writes_run: bool = True  # below `output`, which otherwise is only read

    def resolve(self) -> Config:
        """The frozen config; everything that can be wrong in the flags is refused here."""
        from robuq_bench.config import resolve
        from robuq_bench.context import check_device_name

        check_device_name(self.device)
        return resolve(
            self.study, self.version, self.plan, self.workload, self.seed, self.overrides or ()
        )

    def context(self) -> Context:
        """Import torch and set up device, threads and progress."""
        from robuq_bench.context import Context
        from robuq_bench.progress import Progress

        written = [self.output] if self.writes_run else []
        for folder in (*written, *(path.parent for path in self.outputs)):
            console.check_writable(folder)
        console.set_up_logging(quiet=self.quiet)
        return Context.create(
            device=self.device,
            threads=self.threads,
            progress=Progress(quiet=self.quiet),
            argv=command_line(),
            force=self.force,
        )


def execute(job: Job, work: Callable[[Config, Context], RunResult]) -> RunResult | None:
    """Resolve, then show (`--dry-run`), look up (finished) or do the work; None after a dry run."""
    from robuq_bench.context import RunResult
    from robuq_bench.runs.run import open_existing, run_folder
    from robuq_bench.runs.run_files import DONE

    config = job.resolve()
    folder = run_folder(job.output, config)
    is_complete = (folder / DONE).exists()
    if job.dry_run:
        if job.study == "train-and-eval":
            from robuq_bench.accounting.layers import check_plan

            check_plan(config.plan, config.workload)
        show_dry_run(job, config, folder, is_complete)
        return None
    if is_complete and not job.force:
        if job.device.startswith("cuda"):
            # A device that is not here is an error, finished elsewhere or not.
            replace(job, writes_run=False).context()
        return replace(RunResult.from_run(open_existing(folder)), path=folder)
    context = job.context()
    verb = "continues" if folder.exists() and not job.force else "starts"
    if not job.quiet:
        context.progress.log(f"{job.study}: {verb} {folder} on {context.device}")
    return work(config, context)


def show_dry_run(job: Job, config: Config, folder: Path, is_complete: bool) -> None:
    """Print the resolved config and where its run would be."""
    from robuq_bench.config import config_hash, to_toml

    if job.as_json:
        facts = {"command": job.study, "dry_run": True, "path": folder, "complete": is_complete}
        values = config.model_dump(mode="json")
        console.print_json({**facts, "config_sha256": config_hash(config), "config": values})
        return
    state = "finished" if is_complete else "unfinished" if folder.exists() else "new"
    print(to_toml(config))
    print(f"# output: {folder} ({state}); --dry-run: nothing was written", flush=True)


def show(job: Job, result: RunResult | None) -> None:
    """Print a result as a table or as one JSON line; nothing after a dry run."""
    if result is None:
        return
    if job.as_json:
        facts = {
            "command": job.study,
            "run": f"{result.path.parent.name}/{result.path.name}",
            "path": result.path,
            "was_complete": result.was_complete,
        }
        console.print_json({**result.json, **facts, "table": result.table})
        return
    console.print_table(result.table)
    print(f"{'already complete' if result.was_complete else 'done'}: {result.path}", flush=True)


def show_rows(name: str, rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table, or as the JSON line {name: rows}."""
    if as_json:
        console.print_json({name: rows})
    else:
        console.print_table(rows)


def find_run(text: str, root: Path) -> Path:
    """Return the run folder that `text` means: a folder, or an id (or its end) below `root`.

    Raises:
        UsageError: none or several; names the nearest.
    """
    from robuq_bench.runs.run import list_runs

    for path in (Path(text), root / text):
        if (path / "manifest.json").is_file():
            return path
    known = {summary.id: summary.path for summary in list_runs(root)}
    found = [run_id for run_id in known if run_id.rpartition("/")[2] == text]
    if len(found) == 1:
        return known[found[0]]
    hint = suggest(text, known) or f"; there are no runs in {root}"
    raise UsageError(f"unknown run {text!r}{hint}")


def study_inputs(
    study: str, activations: Path | None, checkpoint: str | None, part: str | None, root: Path
) -> list[str]:
    """What `--activations`, `--checkpoint` and `--shard` mean, as overrides of study settings.

    Raises:
        UsageError: the study takes no such input, or the run does not exist.
    """
    from robuq_bench.config import quoted

    overrides = []
    if activations is not None and study != "normality":
        raise UsageError(f"study {study} takes no --activations; study normality does")
    if checkpoint is not None and study not in OF_A_RUN:
        takers = " and ".join(OF_A_RUN)
        raise UsageError(f"study {study} takes no --checkpoint; {takers} do")
    if part is not None:
        if study not in SHARDED:
            raise UsageError(f"study {study} takes no --shard; {' and '.join(SHARDED)} do")
        overrides.append(f"{study}.shard={quoted(part)}")
    if activations is not None:
        # A run that saved its activations stands for them.
        inside = activations / "activations"
        folder = inside if inside.is_dir() else activations
        if not folder.is_dir():
            raise MissingResourceError(
                f"{folder}: no such folder; save activations with "
                "`study normality --set normality.save_activations=true`"
            )
        overrides.append(f"normality.captured={quoted(str(folder))}")
    if checkpoint is not None:
        path = quoted(str(find_run(checkpoint, root)))
        overrides.append(f"{study}.{OF_A_RUN[study]}={path}")
    return overrides


def hardware_label(study: str, device: str) -> list[str]:
    """The override that makes a measurement on a GPU another run than one without.

    Settings decide which run a command means, so studies of speed name the device in theirs.
    """
    if study not in TIMED:
        return []
    from robuq_bench.context import check_device_name

    check_device_name(device)
    import torch

    from robuq_bench.config import quoted

    if device == "cpu" or not torch.cuda.is_available():
        return []
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        return []  # `Context` refuses it by name
    return [f"{study}.hardware={quoted(torch.cuda.get_device_name(index))}"]


def command_line() -> list[str]:
    """The command as typed, for the manifest."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
