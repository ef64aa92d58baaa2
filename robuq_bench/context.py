"""What a study needs besides its config: device, threads, progress; and what it hands back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robuq_bench.errors import MissingResourceError, UsageError, suggest
from robuq_bench.progress import Progress

if TYPE_CHECKING:
    from robuq_bench.runs.run import Run

SUMMARY_KEY = "summary"


def check_device_name(device: str) -> str:
    """Return `device` if it reads auto, cpu, cuda or cuda:N; UsageError otherwise. No torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        hint = suggest(device, ["auto", "cpu", "cuda", "cuda:0"])
        raise UsageError(f"unknown device {device!r}{hint}")
    return device


@dataclass(frozen=True)
class Context:
    """How to run, which must not change what comes out (but for rounding; see provenance).

    `device` is 'cpu', 'cuda' or 'cuda:N', never 'auto'; `argv` is recorded in the manifest.
    """

    device: str
    threads: int
    progress: Progress
    argv: list[str]
    force: bool = False

    @classmethod
    def create(
        cls,
        *,
        device: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
        argv: Sequence[str] = (),
        force: bool = False,
    ) -> Context:
        """Import torch, set its CPU threads (None keeps torch's choice) and choose the device.

        Raises:
            UsageError: a device name that does not exist, or threads below 1.
            MissingResourceError: a CUDA device that this machine does not have.
        """
        check_device_name(device)
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        has_cuda = torch.cuda.is_available()
        if device == "auto":
            device = "cuda" if has_cuda else "cpu"
        if device.startswith("cuda"):
            if not has_cuda:
                built = "" if torch.version.cuda else f" (torch {torch.__version__} is CPU-only)"
                raise MissingResourceError(
                    f"device {device!r}: no CUDA device here{built}; use --device cpu"
                )
            index = int(device.partition(":")[2] or 0)
            if index >= torch.cuda.device_count():
                raise MissingResourceError(
                    f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA "
                    "device(s), numbered from 0"
                )
            torch.cuda.set_device(index)
        return cls(
            device=device,
            threads=torch.get_num_threads(),
            progress=Progress() if progress is None else progress,
            argv=list(argv),
            force=force,
        )


@dataclass(frozen=True)
class RunResult:
    """What a command shows: the run's headline table, more facts for `--json`, and its folder."""

    path: Path
    table: list[dict[str, Any]]
    json: dict[str, Any] = field(default_factory=dict)
    was_complete: bool = False

    @classmethod
    def store(
        cls, run: Run, table: list[dict[str, Any]], json: dict[str, Any] | None = None
    ) -> RunResult:
        """Record the result in the run, before `run.finish()`, for `from_run` to find."""
        run.append(SUMMARY_KEY, kind="summary", table=table, json=json or {})
        return cls(path=run.path, table=table, json=json or {})

    @classmethod
    def from_run(cls, run: Run) -> RunResult:
        """Return the stored result of a finished run without recomputing anything."""
        summary = run.get(SUMMARY_KEY) or {}
        return cls(
            path=run.path,
            table=summary.get("table", []),
            json=summary.get("json", {}),
            was_complete=True,
        )
