"""Running a study: check, open its run, measure what is missing, store the headline, finish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context, RunResult
from robuq_bench.errors import CheckpointError, RobuqError, UsageError
from robuq_bench.files import sha256_file
from robuq_bench.runs.run import Run
from robuq_bench.study_index import find_study, load_study

Measure = Callable[[Config, Run, Context], list[dict[str, Any]]]
"""What a study computes: the rows of its headline table."""


def run_study(
    config: Config,
    root: Path,
    context: Context,
    *,
    wait_s: float = 0.0,
    measure: Measure | None = None,
) -> RunResult:
    """Run the study that `config` is of, or continue it; a finished run answers at once.

    Args:
        config: resolved for the study.
        root: the folder of all runs.
        context: where and how to compute.
        wait_s: how long to wait, in seconds, for another process to let go of the run.
        measure: called in place of the study's own, by those who hold what that would load.

    Raises:
        UsageError: there is no such study, or another process writes the run.
        RobuqError: what the study refuses. A run that this call began and that holds no result yet
            is removed again.
    """
    check_study(config)
    info = find_study(config.study)
    with Run.open(
        root,
        config,
        context.argv,
        force=context.force,
        wait_s=wait_s,
        device=context.device,
        threads=context.threads,
    ) as run:
        if run.is_done:
            return stored_result(run, config.study)
        try:
            if not info.is_packaged:
                run.add_input(info.path, "study")
            table = (measure or load_study(info).measure)(config, run, context)
            if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
                raise UsageError(
                    f"measure of study {info.path} must return the rows of its headline table, a "
                    f"list of dicts; it returned {type(table).__name__}"
                )
        except RobuqError:
            run.remove_if_untouched()
            raise
        result = RunResult.store(run, table, {"run": run.id})
        run.finish()
    return result


def stored_result(run: Run, study: str) -> RunResult:
    """What the finished `run` of a study shows.

    Raises:
        CheckpointError: the study is a file from outside, and not the one that the run is of.
    """
    info, known = find_study(study), run.manifest["inputs"].get("study")
    if not info.is_packaged and known is not None:
        digest = sha256_file(info.path)
        if digest != known["sha256"]:
            raise CheckpointError(
                f"study {info.path} is not the file that run {run.id} is of (SHA-256 "
                f"{known['sha256']}, now {digest}); raise its VERSION to have a run of its own, or "
                "begin anew with --force"
            )
    return RunResult.from_run(run)


def check_study(config: Config) -> None:
    """Let the study that `config` is of refuse what it cannot do, by raising a `RobuqError`."""
    info = find_study(config.study)
    if info.has_check:
        load_study(info).check(config)


def outlook_of(config: Config) -> str:
    """How much there is to do, in the words of the study that `config` is of; "" of most."""
    info = find_study(config.study)
    return str(load_study(info).outlook(config)) if info.has_outlook else ""
