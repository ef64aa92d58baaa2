"""What the commands share: resolve -> look up or do -> show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robuq_bench.cli import console
from robuq_bench.cli.flags import Flags
from robuq_bench.errors import UsageError, suggest

if TYPE_CHECKING:
    from robuq_bench.config import Config
    from robuq_bench.context import Context, RunResult
    from robuq_bench.study_index import StudyInfo


@dataclass(frozen=True)
class Job:
    """What one command is to do."""

    study: str
    version: str
    plan: str
    flags: Flags
    outputs: tuple[Path, ...] = ()  # files besides the run folder
    writes_run: bool = True  # below `flags.output`, which otherwise is only read

    @classmethod
    def of_study(cls, study: str, plan: str, flags: Flags, export: Path | None = None) -> Job:
        """The job of a study, of the version that its file says."""
        from robuq_bench.study_index import find_study

        outputs = () if export is None else (export,)
        return cls(study, find_study(study).version, plan, flags, outputs)

    def resolve(self) -> Config:
        """The frozen config; everything that can be wrong in the flags is refused here."""
        from robuq_bench.config import resolve
        from robuq_bench.context import check_device_name

        check_device_name(self.flags.device)
        return resolve(
            self.study,
            self.version,
            self.plan,
            self.flags.on,
            self.flags.seed,
            self.flags.overrides or (),
            uses_data=None if self.writes_run else False,
        )

    def context(self) -> Context:
        """Import torch and set up device, threads and progress."""
        from robuq_bench.context import Context
        from robuq_bench.memory import keep_freed_memory
        from robuq_bench.progress import Progress

        if not self.flags.device.startswith("cuda"):
            keep_freed_memory()
        written = [self.flags.output] if self.writes_run else []
        for folder in (*written, *(path.parent for path in self.outputs)):
            console.check_writable(folder)
        console.set_up_logging(quiet=self.flags.quiet)
        return Context.create(
            device=self.flags.device,
            threads=self.flags.threads,
            progress=Progress(quiet=self.flags.quiet),
            argv=command_line(),
            force=self.flags.force,
        )


def execute(job: Job) -> RunResult | None:
    """Resolve; show (`--dry-run`), look up (finished) or run the study; None after a dry run."""
    from robuq_bench.runs.run import open_existing, run_folder
    from robuq_bench.runs.run_files import DONE
    from robuq_bench.runs.study import check_study, outlook_of, run_study, stored_result

    config = job.resolve()
    folder = run_folder(job.flags.output, config)
    is_complete = (folder / DONE).exists()
    if job.flags.dry_run:
        check_study(config)
        show_dry_run(job, config, folder, is_complete, outlook_of(config))
        return None
    if is_complete and not job.flags.force:
        if job.flags.device.startswith("cuda"):
            # A device that is not here is an error, finished elsewhere or not.
            replace(job, writes_run=False).context()
        return replace(stored_result(open_existing(folder), job.study), path=folder)
    check_study(config)
    context = job.context()
    verb = "continues" if folder.exists() and not job.flags.force else "starts"
    if not job.flags.quiet:
        context.progress.log(f"{job.study}: {verb} {folder} on {context.device}")
    return run_study(config, job.flags.output, context)


def show_dry_run(
    job: Job, config: Config, folder: Path, is_complete: bool, outlook: str = ""
) -> None:
    """Print the resolved config, how much there is to do, and where its run would be."""
    from robuq_bench.config import config_hash, to_toml

    if job.flags.as_json:
        facts = {"command": job.study, "dry_run": True, "path": folder, "complete": is_complete}
        values = config.model_dump(mode="json")
        facts |= {"outlook": outlook} if outlook else {}
        console.print_json({**facts, "config_sha256": config_hash(config), "config": values})
        return
    state = "finished" if is_complete else "unfinished" if folder.exists() else "new"
    print(to_toml(config))
    if outlook:
        print(f"# {outlook}")
    print(f"# output: {folder} ({state}); --dry-run: nothing was written", flush=True)


def show(job: Job, result: RunResult | None) -> None:
    """Print a result as a table or as one JSON line; nothing after a dry run."""
    if result is None:
        return
    if job.flags.as_json:
        facts = {
            "command": job.study,
            "run": f"{result.path.parent.name}/{result.path.name}",
            "path": result.path,
            "was_complete": result.was_complete,
        }
        console.print_json({**result.json, **facts, "table": result.table})
        return
    from robuq_bench.study_index import find_study

    console.print_table(result.table)
    legend = find_study(job.study).legend
    if legend:
        print(f"\n{legend}\n")
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
    if Path(text).is_dir():
        raise UsageError(f"{text}: neither a run nor a folder with finished runs")
    hint = suggest(text, known) or f"; there are no runs in {root.resolve()}"
    raise UsageError(f"unknown run {text!r}{hint}")


def reported(folder: Path) -> list[Path]:
    """The finished runs of a folder of runs, and the damaged ones, which the report names."""
    from robuq_bench.runs.run import list_runs

    if not folder.is_dir() or (folder / "manifest.json").is_file():
        return []
    # The folder of one study among others is one of runs, too.
    known = [run for root in (folder, folder.parent) for run in list_runs(root)]
    return [
        summary.path
        for summary in known
        if summary.state in ("done", "damaged") and summary.path.is_relative_to(folder)
    ]


def plan_of(study: StudyInfo, plan: str | None, seed: int) -> str:
    """The plan that a study runs with.

    Raises:
        UsageError: a plan or a seed for a study that uses none.
    """
    if plan is not None and not study.uses_plan:
        raise UsageError(f"study {study.name} takes no --plan; it is of full precision")
    if seed and not study.uses_training:
        raise UsageError(f"study {study.name} takes no --seed; it trains nothing")
    return (plan or "a2") if study.uses_plan else "fp"


def study_inputs(
    study: str, activations: Path | None, checkpoint: str | None, part: str | None, root: Path
) -> list[str]:
    """What `--activations`, `--checkpoint` and `--shard` mean, as overrides of study settings.

    Raises:
        UsageError: the study takes no such input, or the run does not exist.
    """
    from robuq_bench.config import quoted

    given: dict[str, str] = {}
    if part is not None:
        given["--shard"] = part
    if activations is not None:
        # A run that saved its activations stands for them.
        inside = activations / "activations"
        given["--activations"] = str(inside if inside.is_dir() else activations)
    if checkpoint is not None:
        given["--checkpoint"] = checkpoint
    overrides = []
    for flag, value in given.items():
        field = _field_of(flag, study)
        if field is None:
            raise UsageError(f"study {study} takes no {flag}; {_takers(flag)}")
        text = str(find_run(value, root)) if flag == "--checkpoint" else value
        overrides.append(f"{study}.{field}={quoted(text)}")
    return overrides


def _field_of(flag: str, study: str) -> str | None:
    """The field of a study's settings that a flag fills, None if there is none."""
    from robuq_bench.study_index import settings_class

    settings = settings_class(study)
    fields = {} if settings is None else settings.model_fields
    if flag in ("--shard", "--device"):
        name = {"--shard": "shard", "--device": "hardware"}[flag]
        return name if name in fields else None
    return next((name for name, field in fields.items() if flag in field.metadata), None)


def _takers(flag: str) -> str:
    from robuq_bench.study_index import list_studies

    names = [study.name for study in list_studies() if _field_of(flag, study.name)]
    if len(names) == 1:
        return f"{names[0]} does"
    return f"{', '.join(names[:-1])} and {names[-1]} do"


def hardware_label(study: str, device: str) -> list[str]:
    """The override that makes measurements on several machines several runs.

    Settings decide which run a command means, so studies of speed name the device in theirs.
    """
    field = _field_of("--device", study)
    if field is None:
        return []
    from robuq_bench.context import check_device_name

    check_device_name(device)
    import torch

    from robuq_bench.config import quoted
    from robuq_bench.runs.provenance import cpu_label

    if device == "cpu" or not (device.startswith("cuda") or torch.cuda.is_available()):
        return [f"{study}.{field}={quoted(cpu_label())}"]
    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return []  # `Context` refuses it by name
    return [f"{study}.{field}={quoted(torch.cuda.get_device_name(index))}"]


def command_line() -> list[str]:
    """The command as typed, for the manifest."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
