"""The command line: plan + workload -> run -> report. Heavy imports wait inside the commands.

Exit codes: 0 done or already complete, 1 crash or failed write, 2 usage, plan or workload error,
3 finished but a check failed, 4 missing hardware, or missing or unreadable data, 130 interrupted
(Ctrl-C), 143 ended by SIGTERM and 129 by SIGHUP. After the last three the same command continues.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kernels.cpu_library import MissingKernels
from robuq_bench import __version__
from robuq_bench.cli import console
from robuq_bench.cli.claims import ClaimsFlag, claims_app
from robuq_bench.cli.claims_job import claims_section
from robuq_bench.cli.flags import (
    RUNS,
    ActivationsFlag,
    DryRunFlag,
    ExportFlag,
    Flags,
    JsonFlag,
    NameArgument,
    OutputFlag,
    PlanFlag,
    QuietFlag,
    ShardFlag,
    StudentFlag,
    with_flags,
)
from robuq_bench.cli.inspect import inspect_app, runs_app
from robuq_bench.cli.job import (
    Job,
    execute,
    find_run,
    hardware_label,
    plan_of,
    reported,
    show,
    show_dry_run,
    show_rows,
    study_inputs,
)
from robuq_bench.cli.methods import methods_app
from robuq_bench.cli.packed import packed_app
from robuq_bench.errors import MissingResourceError, RobuqError, UsageError
from robuq_bench.runs import interrupts

_INTERRUPTED = 130

app = typer.Typer(
    name="robuq-bench",
    help=(
        "Quantize a Diffusion Transformer by a plan, judge it on a workload, keep the run: "
        "plan + workload -> run -> report. The same command again continues after a kill, and "
        "answers at once when the run is finished."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"robuq-bench {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command("train-and-eval")
@with_flags()
def train_and_eval(flags: Flags, plan: PlanFlag = "a2") -> None:
    """The main job: quantize a teacher by a plan, train it, allocate its bits, and judge it."""
    job = Job.of_study("train-and-eval", plan, flags)
    show(job, execute(job))


@app.command("train-teacher")
@with_flags()
def train_teacher(flags: Flags, export: ExportFlag = None) -> None:
    """Train a workload's full-precision teacher from scratch."""
    job = Job.of_study("train-teacher", "fp", flags, export)
    result = execute(job)
    if result is not None and export is not None:
        _export(result.path / "checkpoints" / "teacher.safetensors", export)
    show(job, result)


@app.command("train-features")
@with_flags("device")
def train_features(flags: Flags, export: ExportFlag = None) -> None:
    """Train the digit classifier whose features `fid_digits` is measured in (on the CPU)."""
    job = Job.of_study("train-features", "fp", replace(flags, device="cpu"), export)
    result = execute(job)
    if result is not None and export is not None:
        _export(result.path / "checkpoints" / "features.safetensors", export)
    show(job, result)


def _export(source: Path, target: Path) -> None:
    """Copy trained weights out of their run with checksum and card, verified on the way."""
    from robuq_bench.checkpointing import sidecar_path, verify_tensors
    from robuq_bench.files import atomic_write_bytes

    console.check_writable(target.parent)
    verify_tensors(source)
    digest = sidecar_path(source).read_text("utf-8").split()[0]
    atomic_write_bytes(target, source.read_bytes())
    atomic_write_bytes(sidecar_path(target), f"{digest}  {target.name}\n".encode())
    card = source.with_suffix(".json")
    if card.is_file():
        atomic_write_bytes(target.with_suffix(".json"), card.read_bytes())


@app.command()
@with_flags("seed", "force")
def sample(
    flags: Flags,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", metavar="RUN", help="Take this run's student, not the teacher."
        ),
    ] = None,
    packed: Annotated[
        Path | None, typer.Option("--packed", metavar="FILE", help="Take this packed model.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="--packed: reference (bit for bit as trained), integer, cpu or triton; if not "
            "given, cpu for models that can on a CPU, else reference.",
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Number of images.")] = 40,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="The grid (FOLDER/samples.png if not given)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first image.")] = 0,
) -> None:
    """Draw images, one seed each, into one PNG grid."""
    target = flags.output / "samples.png" if png is None else png
    job = Job("sample", "1", "fp", replace(flags, seed=seed), (target,), writes_run=False)
    config = job.resolve()
    run_path = None if checkpoint is None else find_run(checkpoint, flags.output)
    if packed is not None and checkpoint is not None:
        raise UsageError("--checkpoint and --packed are two models; give one of them")
    if packed is None and backend is not None:
        raise UsageError(f"--backend {backend} goes with --packed FILE; make one with `export`")
    if flags.dry_run:
        show_dry_run(job, config, target, target.exists())
        return
    context = job.context()
    from robuq_bench.judging.sample_grid import run_sample

    run_sample(
        config,
        context,
        checkpoint=run_path,
        packed=packed,
        backend=backend,
        num=num,
        output=target,
    )
    if flags.as_json:
        console.print_json({"command": "sample", "path": target, "num": num, "seed": seed})
    else:
        print(f"done: {target}", flush=True)


@app.command()
@with_flags()
def study(
    flags: Flags,
    name: NameArgument = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="NAME|FILE", help="How to quantize (a2 if not given)."),
    ] = None,
    activations: ActivationsFlag = None,
    checkpoint: StudentFlag = None,
    part: ShardFlag = None,
) -> None:
    """Answer one question about the method: NAME is a study, the .py file of one, or a
    module.path; without it, list the studies that exist."""
    from robuq_bench.study_index import find_study, list_studies

    if name is None:
        rows = [{"study": item.name, "about": item.summary} for item in list_studies()]
        show_rows("studies", rows, flags.as_json)
        return
    info = find_study(name)
    plan = plan_of(info, plan, flags.seed)
    settings = study_inputs(info.name, activations, checkpoint, part, flags.output)
    settings += [*hardware_label(info.name, flags.device), *(flags.overrides or [])]
    job = Job.of_study(info.name, plan, replace(flags, overrides=settings))
    show(job, execute(job))


@app.command()
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Ids, run folders, or folders of runs; without any, all finished runs.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="The report (FOLDER/report.html if not given)."
        ),
    ] = None,
    claims: ClaimsFlag = None,
    output: OutputFlag = RUNS,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build one self-contained HTML file from runs alone."""
    target = output / "report.html" if html is None else html
    if runs:
        paths = [path for text in runs for path in reported(Path(text)) or [find_run(text, output)]]
    else:
        paths = reported(output)
    if not paths:
        raise MissingResourceError(
            f"no finished runs in {output}; make one with `python bench.py train-and-eval`"
        )
    if not dry_run:
        console.check_writable(target.parent)
        console.set_up_logging(quiet=quiet)
        from reports import build_report

        declared = claims_section(paths, claims)
        build_report(paths, target, first=[declared] if declared else [])
    if as_json:
        console.print_json({"command": "report", "dry_run": dry_run, "path": target, "runs": paths})
    else:
        verb = "would be written for" if dry_run else "written for"
        print(f"{target} {verb} {len(paths)} run folder(s)", flush=True)


app.add_typer(packed_app)
app.add_typer(inspect_app)
app.add_typer(methods_app)
app.add_typer(runs_app, name="runs")
app.add_typer(claims_app, name="claims")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one clear message on stderr."""
    with interrupts.handled(until_exit=argv is None):
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if os.getcwd() not in sys.path:  # methods of one's own lie there; last, so as to hide nothing
        sys.path.append(os.getcwd())
    as_json = "--json" in arguments
    try:
        _check_text(arguments)
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of our output left; nothing more can be said, not even by the interpreter.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RobuqError as error:
        return console.print_error(str(error), error.exit_code, as_json=as_json)
    except KeyboardInterrupt:
        return _interrupted(as_json)
    except interrupts.Terminated as error:
        message = f"ended by {error}; the same command continues"
        return console.print_error(message, error.exit_code, as_json=as_json)
    except OSError as error:
        # Failed writes are RobuqErrors that name the folder; what comes here was to be read.
        sentence = console.unreadable(error)
        if sentence is not None:
            return console.print_error(sentence, MissingResourceError.exit_code, as_json=as_json)
        if not console.is_disk_error(error):
            traceback.print_exc()
        return console.print_error(str(error), 1, as_json=as_json)
    except MissingKernels as error:
        return console.print_error(str(error), MissingResourceError.exit_code, as_json=as_json)
    except Exception as error:
        sentence = console.out_of_memory(error)
        if sentence is not None:
            return console.print_error(sentence, MissingResourceError.exit_code, as_json=as_json)
        return _fail(error, as_json)


def _check_text(arguments: Sequence[str]) -> None:
    """UsageError for an argument that no manifest and no terminal could hold."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"argument {word!r} is not UTF-8 text; rename the file or folder it names"
            ) from None


def _interrupted(as_json: bool) -> int:
    message = "interrupted; the same command continues"
    return console.print_error(message, _INTERRUPTED, as_json=as_json)


def _fail(error: Exception, as_json: bool) -> int:
    """Typer's own errors (its module for them differs between versions), and crashes."""
    if type(error).__name__ == "Abort":
        return _interrupted(as_json)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "")
        hint = f" (see `{path} --help`)" if path else ""
        message = error.format_message().rstrip(".")
        return console.print_error(f"{message}{hint}", error.exit_code, as_json=as_json)
    traceback.print_exc()
    return console.print_error(f"crash: {type(error).__name__}: {error}", 1, as_json=as_json)
