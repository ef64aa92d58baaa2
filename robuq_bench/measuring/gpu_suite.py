"""`make gpu`: everything that needs a CUDA device, as pieces that each fit in ten minutes.

A piece is one command of the suite in a process of its own. Finished pieces are remembered in
`runs/gpu/state.json` and skipped; a training piece that reaches the time limit is interrupted and
started again, and continues from its checkpoint. Only the standard library is imported here, so
that a borrowed machine can at least list the pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from robuq_bench.errors import (
    CheckpointError,
    MissingResourceError,
    RobuqError,
    UsageError,
    suggest,
)
from robuq_bench.files import atomic_write_bytes
from robuq_bench.runs.interrupts import Terminated, handled

TIME_LIMIT_S = 540.0  # with the grace period, safely under ten minutes
GRACE_S = 20.0  # from SIGINT to SIGKILL, enough to finish writing a checkpoint
MAX_CHUNKS = 20  # restarts of one training piece per call: three hours
MNIST_PLANS = ("fp", "a4", "a2-uniform", "a2", "baseline-a2")
MNIST_TEACHER = "runs/gpu/mnist32_teacher.safetensors"

_PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Piece:
    """One step of the GPU suite.

    `command` is what follows the Python interpreter, `needs` names pieces that must be done first,
    `resumable` says that the same command continues where a killed one stopped.
    """

    name: str
    description: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    resumable: bool = False


def pieces() -> tuple[Piece, ...]:
    """Return the pieces of `make gpu` in the order in which they run.

    Those on mnist32 read the IDX files that `ROBUQ_DATA_MNIST32` names.
    """
    # Other versions than the pinned ones may warn; most of the time goes into compiling.
    pytest = ("-m", "pytest", "-n", "8", "-W", "default", "--timeout", "300")
    on_mnist = ("--on", "mnist32", "--device", "cuda")
    kernels = ("bench.py", "study", "kernels", "--device", "cuda", "--set")
    settings = (
        'training.precision="bf16"',
        "training.batch_size=512",
        "model.hidden_size=768",
        "model.num_heads=12",
        "model.depth=6",
    )
    wide = tuple(word for setting in settings for word in ("--set", setting))
    teacher = ("--set", f"teacher.checkpoint={MNIST_TEACHER}")
    return (
        Piece(
            "tests",
            "tests marked gpu",
            (*pytest, "-m", "gpu"),
        ),
        Piece(
            "kernel-tests",
            "every kernel test, on the device in place of the interpreter",
            (*pytest, "tests/kernels", "--ignore", "tests/kernels/test_offline.py"),
        ),
        Piece(
            "kernels",
            "every kernel at the shapes of DiT-XL/2: right, how fast, how near to the ceiling",
            (*kernels, 'kernels.models=["XL"]'),
            resumable=True,
        ),
        Piece(
            "efficiency",
            "DiT-XL/2 end to end against five baselines",
            ("bench.py", "study", "efficiency", "--on", "imagenet256", "--device", "cuda"),
            resumable=True,
        ),
        Piece(
            "step-time",
            "QAT step against bf16 step, at the width of DiT-B: a small model times its launches",
            ("bench.py", "study", "step-time", "--device", "cuda", *wide),
        ),
        Piece(
            "kernels-small",
            "every kernel at the shapes of DiT-L, B and S",
            (*kernels, 'kernels.models=["L","B","S"]'),
            resumable=True,
        ),
        Piece(
            "record",
            "timings as JSON below reports/recorded",
            ("-m", "robuq_bench.measuring.record"),
            needs=("kernels", "efficiency", "step-time"),
        ),
        Piece(
            "mnist32-teacher",
            "teacher of the mnist32 workload",
            ("bench.py", "train-teacher", *on_mnist, "--export", MNIST_TEACHER),
            resumable=True,
        ),
        *(
            Piece(
                f"mnist32-{plan}",
                f"plan {plan} on mnist32",
                ("bench.py", "train-and-eval", "--plan", plan, *on_mnist, *teacher),
                needs=("mnist32-teacher",),
                resumable=True,
            )
            for plan in MNIST_PLANS
        ),
    )


def cuda_device_name() -> str:
    """Return the name of the current CUDA device.

    Raises:
        MissingResourceError: torch is missing, or sees no device.
    """
    # asked in another process: a CUDA context here would hold memory beside every piece
    answer = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if answer.returncode != 0:
        reason = answer.stderr.strip().rsplit("\n", 1)[-1]
        raise MissingResourceError(f"{sys.executable} cannot load torch ({reason})")
    name = answer.stdout.strip()
    if not name:
        raise MissingResourceError(
            "no CUDA device here: `make gpu` runs only what needs one. "
            "`make test` covers everything else on a CPU."
        )
    return name


def load_state(path: Path) -> dict[str, dict[str, object]]:
    """Return `{piece name: record of its last run}`; empty when nothing has run yet.

    Raises:
        CheckpointError: the file is not the JSON object that `run_piece` writes.
    """
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start over") from error
    if not isinstance(state, dict) or not all(isinstance(r, dict) for r in state.values()):
        raise CheckpointError(f"{path} does not hold GPU pieces; delete it to start over")
    return state


def is_finished(piece: Piece, state: dict[str, dict[str, object]], device: str) -> bool:
    """Tell whether `piece` has succeeded with this very command on this kind of device."""
    record = state.get(piece.name, {})
    return (
        record.get("status") == "done"
        and record.get("command") == list(piece.command)
        and record.get("device") == device
    )


def run_piece(
    piece: Piece, *, device: str, root: Path, state_path: Path, time_limit_s: float = TIME_LIMIT_S
) -> str:
    """Run one piece once, record the outcome in `state_path` and return its status.

    Returns:
        "done", "time limit" (it was still running after `time_limit_s` seconds), "missing" (it
        exited 4: data or hardware is not here) or "failed".
    """
    started = time.monotonic()
    code = _run_limited([sys.executable, *piece.command], root, time_limit_s)
    if code is None:
        status = "time limit"
    else:
        status = {0: "done", MissingResourceError.exit_code: "missing"}.get(code, "failed")
    state = load_state(state_path)
    state[piece.name] = {
        "status": status,
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "ended_at_unix_s": int(time.time()),
        "device": device,
        "command": list(piece.command),
    }
    state_path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(state_path, (json.dumps(state, indent=1) + "\n").encode())
    return status


def _run_limited(command: Sequence[str], cwd: Path, time_limit_s: float) -> int | None:
    """Return the exit code, or None when the process had to be stopped at the limit.

    When the suite itself is asked to end, the process is stopped as at the limit: it saves.
    """
    # a session of its own, so that workers of the piece are stopped along with it
    with subprocess.Popen(command, cwd=cwd, start_new_session=True) as process:
        try:
            return process.wait(timeout=time_limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated) as reason:
            _signal_group(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            return None
        finally:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _chosen(names: Sequence[str], offered: Sequence[Piece]) -> list[Piece]:
    by_name = {piece.name: piece for piece in offered}
    for name in names:
        if name not in by_name:
            raise UsageError(f"unknown piece {name!r}{suggest(name, by_name)}")
    return [by_name[name] for name in names] if names else list(offered)


def _outcomes(
    chosen: Sequence[Piece],
    *,
    device: str,
    root: Path,
    state_path: Path,
    force: bool,
    chunks: int,
    time_limit_s: float,
) -> Iterator[str]:
    """Run the chosen pieces in order, say what happens, and yield the status of each."""
    for piece in chosen:
        state = load_state(state_path)
        lacking = [name for name in piece.needs if state.get(name, {}).get("status") != "done"]
        if is_finished(piece, state, device) and not force:
            print(f"{piece.name}: done before, skipped", flush=True)
            continue
        if lacking:
            print(f"{piece.name}: not run, needs {', '.join(lacking)}", flush=True)
            yield "failed"
            continue
        print(f"{piece.name}: {piece.description} on {device}", flush=True)
        for _ in range(chunks if piece.resumable else 1):
            status = run_piece(
                piece,
                device=device,
                root=root,
                state_path=state_path,
                time_limit_s=time_limit_s,
            )
            print(f"{piece.name}: {status}", flush=True)
            if status != "time limit":
                break
        yield status


def main(
    argv: Sequence[str] | None = None,
    *,
    offered: Sequence[Piece] | None = None,
    root: Path | None = None,
) -> int:
    """Run the GPU suite and return its exit code.

    0 everything chosen is done · 1 a piece failed or is unfinished (the same command continues) ·
    2 unknown piece or flag · 4 no CUDA device, or the data of a piece is missing · 130 interrupted,
    143 ended by SIGTERM.
    """
    with handled(until_exit=argv is None):
        return _main(argv, offered=offered, root=root)


def _main(argv: Sequence[str] | None, *, offered: Sequence[Piece] | None, root: Path | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m robuq_bench.measuring.gpu_suite", description=__doc__
    )
    parser.add_argument("--list", action="store_true", help="show the pieces and stop")
    parser.add_argument(
        "--piece",
        action="append",
        default=[],
        metavar="NAME",
        help="run this piece only, at most once (repeatable)",
    )
    parser.add_argument("--force", action="store_true", help="run finished pieces again")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, metavar="S")
    options = parser.parse_args(argv)
    offered = pieces() if offered is None else offered
    root = Path(__file__).resolve().parents[2] if root is None else root
    state_path = root / "runs" / "gpu" / "state.json"
    try:
        chosen = _chosen(options.piece, offered)
        if options.list:
            state = load_state(state_path)
            for piece in chosen:
                print(
                    f"{piece.name:20} {state.get(piece.name, {}).get('status', '-'):10} "
                    f"{piece.description}"
                )
            return 0
        statuses = list(
            _outcomes(
                chosen,
                device=cuda_device_name(),
                root=root,
                state_path=state_path,
                force=options.force,
                chunks=1 if options.piece else MAX_CHUNKS,
                time_limit_s=options.time_limit_s,
            )
        )
    except RobuqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated as error:
        return error.exit_code
    unfinished = [status for status in statuses if status != "done"]
    if not unfinished:
        return 0
    print("not everything is done: the same command continues", file=sys.stderr)
    return MissingResourceError.exit_code if set(unfinished) == {"missing"} else 1


if __name__ == "__main__":
    sys.exit(main())
