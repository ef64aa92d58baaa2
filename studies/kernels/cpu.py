"""`study kernels` on a CPU: compiled kernels, `torch._int_mm` and peers, checked and timed.

Every implementation of a case runs on the same random inputs in float32 and takes turns with the
others. One whose result is not that of plain PyTorch has no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from kernels.ternary_matmul.layout import unpack_planes
from robuq_bench.context import Context
from robuq_bench.cpu_figures import throughput
from robuq_bench.measuring.cpu import (
    CpuPeaks,
    available_instructions,
    cache_bytes,
    instructions,
    machine,
    measure_peaks,
    threads,
    time_in_turns,
)
from robuq_bench.measuring.timing import copies_beyond_cache
from robuq_bench.runs.run import Run
from studies.kernels.cases import (
    COMPILED,
    CPU_PEERS,
    GROUPED,
    INT_MM,
    MATMUL,
    PLAIN,
    QUANTIZE,
    Case,
    cases_of,
    make_inputs,
)
from studies.kernels.checks import Check, judge, poisoned_memory
from studies.kernels.cpu_tables import answer, cpu_rows, medians
from studies.kernels.peers import PeerUnavailableError, make_cpu_peer, make_layer
from studies.kernels.settings import CpuSettings, Settings, sizes_on_cpu

ADALN, ADALN_INPUT = "adaLN of a block", "adaLN input of a block"
_NAMES = {"adaLN of all blocks": ADALN, "adaLN input": ADALN_INPUT}
NOT_BUILT = "not run: the CPU kernels are not built; see python -m kernels.build"
Work = list[Callable[[], Any]]
State = dict[str, Any]


def cpu_cases(options: Settings) -> Iterator[Case]:
    """The calls of one inference step on a CPU: adaLN block by block, and no residual in front."""
    for model in sizes_on_cpu(options) if options.cpu.models else ():
        for images in options.cpu.batches:
            every = cases_of(
                model, images, tokens=options.tokens_per_image, rank=options.rank, bits=options.bits
            )
            for case in every:
                if case.layer in _NAMES:
                    kernel = MATMUL if case.kernel == GROUPED else QUANTIZE
                    case = replace(case, kernel=kernel, layer=_NAMES[case.layer], groups=1)
                is_called = case.kernel in (MATMUL, QUANTIZE)
                is_called &= not case.prologue.startswith("residual")
                if is_called and (not options.kernels or case.kernel in options.kernels):
                    yield case


def timed_on_cpu(options: Settings, seed: int, run: Run, context: Context) -> list[dict[str, Any]]:
    """Rows of `cpu_kernels`; every case that this machine has no finished item of is timed."""
    cases = list(cpu_cases(options))
    if not cases:
        return []
    facts = machine()
    wanted = {
        f"cpu/{case.key}/threads{count}": (case, count)
        for count in options.cpu.threads
        for case in cases
    }

    def is_finished(key: str) -> bool:
        record = run.get(key)
        return (
            record is not None
            and record["device_name"] == facts["device_name"]
            and not any(is_failure(row) for row in record["rows"])
        )

    missing = [key for key in wanted if not is_finished(key)]
    session = len(run.manifest["sessions"])
    peaks: dict[int, CpuPeaks] = {}
    with context.progress.task("cpu kernels", len(wanted), len(wanted) - len(missing)) as task:
        for key in missing:
            case, count = wanted[key]
            with threads(count), torch.no_grad():
                if count not in peaks:
                    peaks[count] = measure_peaks(
                        available_instructions(), sample_s=options.cpu.sample_ms * 1e-3
                    )
                    run.append(
                        f"cpu-peaks/threads{count}/{session}",
                        kind="cpu-peaks",
                        device_name=facts["device_name"],
                        **peaks[count].row(),
                    )
                rows = measure_case(case, options.cpu, seed, peaks[count])
            run.append(key, kind="kernel-cpu", device_name=facts["device_name"], rows=rows)
            task.advance()
    found = [record for record in run.results() if record["kind"] == "cpu-peaks"]
    run.write_table("cpu_peaks", [{k: v for k, v in r.items() if k != "kind"} for r in found])
    table = []
    for key in wanted:
        record = run.get(key)
        assert record is not None
        table += [{"device_name": record["device_name"], **row} for row in record["rows"]]
    run.write_table("cpu_kernels", table)
    run.write_table("cpu_summary", medians(table))
    run.write_table("cpu_machine", [facts | {"answer": answer(table)}])
    picture = throughput(table)
    if picture is not None:
        picture.save(run.figure_path("cpu-kernels"))
    return table


def is_failure(row: dict[str, Any]) -> bool:
    """Whether an implementation of ours computed something else, or nothing."""
    return row["correct"] is False


def measure_case(
    case: Case, options: CpuSettings, seed: int, peaks: CpuPeaks
) -> list[dict[str, Any]]:
    """Rows of every implementation of a case, with torch's threads as they are set."""
    inputs = make_inputs(case, "cpu", seed, torch.float32)
    copies = copies_beyond_cache(case.copied_bytes, cache_bytes())
    work, states = checked(case, inputs, options, copies)
    if case.is_product:
        layer = make_layer(case, "cpu", copies, seed)
        for name in CPU_PEERS:
            try:
                work[name] = make_cpu_peer(name, layer)
                states[name] = _state("ok", True)
            except PeerUnavailableError as error:
                states[name] = _state(str(error), None)
    turns = {name: _in_turn(calls) for name, calls in work.items()}
    times = time_in_turns(turns, rounds=options.rounds, sample_s=options.sample_ms * 1e-3)
    return cpu_rows(case, states, times, peaks)


def checked(
    case: Case, inputs: dict[str, Any], options: CpuSettings, copies: int
) -> tuple[dict[str, Work], dict[str, State]]:
    """Calls of our implementations that are right, and what is known of each of them."""
    functions, states = implementations(case, inputs, options)
    reference, given = functions[PLAIN]
    expected = reference(**given)
    work: dict[str, Work] = {}
    for name, (function, arguments) in functions.items():
        try:
            with poisoned_memory():
                found = expected if name == PLAIN else function(**arguments)
            check = judge(case, found, expected)
        except Exception as error:  # one that fails must not take the others along
            lines = str(error).strip().splitlines() or [""]
            check = Check(False, None, f"failed: {type(error).__name__}: {lines[0]}")
        states[name] = _state(check.failure or "ok", check.correct, check.max_error)
        if check.correct:
            work[name] = _copied(function, arguments, copies)
    return work, states


def _state(status: str, correct: bool | None, max_error: float | None = None) -> State:
    return {"status": status, "correct": correct, "max_error": max_error}


def implementations(
    case: Case, inputs: dict[str, Any], options: CpuSettings
) -> tuple[dict[str, tuple[Callable[..., Any], dict[str, Any]]], dict[str, State]]:
    """Function and arguments of each of ours, and the state of what this machine does not have."""
    folder = f"kernels.{case.kernel}"
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    states: dict[str, State] = {}
    available = available_instructions()
    for name in options.instructions or available or ("any",):
        label = f"{COMPILED}{name}"
        if name in available:
            found[label] = (
                partial(_forced, name, getattr(import_module(f"{folder}.cpu"), case.kernel)),
                inputs,
            )
        else:
            why = f"not run: this CPU has no {name}" if available else NOT_BUILT
            states[label] = _state(why, None)
    if case.is_product:
        unpacked = inputs | {"planes": unpack_planes(inputs["planes"], case.width)}
        found[INT_MM] = (getattr(import_module(f"{folder}.int_mm"), case.kernel), unpacked)
    found[PLAIN] = (getattr(import_module(f"{folder}.reference"), case.kernel), inputs)
    return found, states


def _forced(name: str, function: Callable[..., Any], **arguments: Any) -> Any:
    with instructions(name):
        return function(**arguments)


def _copied(function: Callable[..., Any], arguments: dict[str, Any], copies: int) -> Work:
    """A call per copy of the weight or the input, of the same distribution as what was checked."""
    varied = "planes" if "planes" in arguments else "x"
    first = arguments[varied]
    values = [first, *(first.roll(index, 0).clone() for index in range(1, copies))]
    return [partial(function, **arguments | {varied: value}) for value in values]


def _in_turn(calls: Work) -> Callable[[], Any]:
    order = itertools.cycle(calls)
    return lambda: next(order)()
