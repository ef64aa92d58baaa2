"""How fast each kernel is, how near to what the hardware allows, and whether it is right.

Shapes are the calls of one inference step of DiT-S, B, L and XL at several batches with and
without guidance (which doubles the images; equal shapes are measured once), and of a training step.

Correctness comes first: kernel and reference (plain PyTorch) get the same random inputs in this
run, memory filled with NaN beforehand; codes may differ by one in at most 2 % of places, products
by one step of their dtype. A kernel that fails has no time anywhere in the tables, and the study
exits with 3 after writing them. Peers are checked too, against the layer in float32.

Times (CUDA only): the call is captured in a CUDA graph once per copy of its weights (or of its
input, where there is no large weight), as many copies as twice the L2 cache holds, so that weights
come from memory as in a network of many layers. At least three rounds of at least 100 ms a piece,
kernel and peers interleaved; medians, p20 and p80 over all replays; "unstable" where the
interquartile range exceeds 10 % of the median. "faster" needs p < .002 (Mann-Whitney) and 5 %. The
peers compute a plain product with bias; ours includes GELU, gate and residual where its layer has
them, but not the quantization of its input, which has rows of its own; beside attention in integers
stands PyTorch's in bf16.

Achieved bandwidth and rate count the bytes that must move and the operations of the product; the
share of the ceiling is the least time at the copy bandwidth and matmul rate (int8 if measured, else
none) of this device in this session, over the median. A share above 1 says that the ceiling's own
measurement was not the best possible.

Without a GPU: the same checks in Triton's interpreter, in a process of their own (it must be
switched on before kernels are imported) at the true widths but few rows, in fp16, because the
interpreter truncates to bf16 where a GPU rounds; and a table of least times
by the peaks of data sheets, every row marked as a model. The CPU itself is timed: compiled kernels
with each instruction set, `torch._int_mm` and peers (`studies.kernels.cpu`), by the wall clock and
in processor time, on 1 and 2 threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, UsageError, suggest
from robuq_bench.measuring.ceilings import Ceilings, measure_ceilings
from robuq_bench.measuring.cpu import check_threads
from robuq_bench.measuring.timing import (
    GraphReplay,
    Stopwatch,
    cache_bytes,
    copies_beyond_cache,
    time_interleaved,
)
from robuq_bench.runs.provenance import cpu_label
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.kernels.cases import (
    COMPILED,
    KERNELS,
    OURS,
    Case,
    cases_of,
    kernel_function,
    make_inputs,
    weight_cases_of,
)
from studies.kernels.checks import Check
from studies.kernels.checks import check as check_case
from studies.kernels.cpu import is_failure, timed_on_cpu
from studies.kernels.cpu_tables import cpu_summary
from studies.kernels.cpu_verdicts import CPU_RULE, cpu_verdicts
from studies.kernels.peers import PeerUnavailableError, make_layer, make_peer, peers_of
from studies.kernels.settings import Settings, sizes_on_cpu
from studies.kernels.tables import (
    MODEL,
    roofline_rows,
    rows_of,
    settings_of,
    summary,
)
from studies.kernels.verdicts import verdicts

VERSION = "2"
SUMMARY = "Correctness, speed and share of the hardware's ceiling of every kernel."
USES_DATA = False
RULE = (
    "A kernel holds where every call agrees with plain PyTorch on the same inputs, each within the "
    "limits of its kernel. Targets are this project’s own, for DiT-XL/2 on an H100; the paper "
    "states none. A target is judged by the 95 % t intervals over rounds of the calls it names "
    "(of adaLN, at batches that the data sheet allows): it holds where the whole interval of every "
    "call meets it, does not hold where one call’s lies wholly beyond, and is undecided otherwise "
    "or where a time is unstable. Without a GPU, or where a call has no interval, it is not "
    "judged. " + CPU_RULE
)
LEGEND = (
    "max_error: in units of what is allowed, at most 1 is correct. median_ms: of one call. rate: "
    "operations (2 per multiply-add) of products, bytes moved of rotations; share_of_peak: of what "
    "this machine reached in a loop, with the same instructions. speedup: times as fast as the "
    "implementation under `over`, in turns with it. stability: unstable where the interquartile "
    "range of all samples exceeds 10 % of their median. h100_*: a model from data sheets, no "
    "measurement. not run: see status."
)
NEEDS_GPU = (
    "timings of the Triton kernels need a CUDA device; the roofline here is a model from peaks of "
    "data sheets"
)


def check(config: Config) -> None:
    """Refuse kernels that do not exist, and more threads than this CPU runs at once."""
    for name in config.settings_of(Settings).kernels:
        if name not in KERNELS:
            raise UsageError(f"kernels.kernels: unknown kernel {name!r}{suggest(name, KERNELS)}")
    options = config.settings_of(Settings)
    if options.cpu.models and options.hardware == cpu_label():
        check_threads("kernels.cpu.threads", options.cpu.threads)


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Check and, on a CUDA device, time every case; returns our kernels' rows."""
    options = config.settings_of(Settings)
    cases = list(all_cases(options))
    roofline = [row for case in cases for row in roofline_rows(case)]
    run.write_table("roofline", roofline)
    device = ""
    if context.device.startswith("cuda"):
        rows = timed(cases, options, config.seed, run, context)
        device = torch.cuda.get_device_name(context.device)
        shown = [summary(row) for row in rows if row["implementation"] == OURS]
        failed = [row for row in rows if row["implementation"] == OURS and row["status"] != "ok"]
    else:
        cases = [case for case in cases if case.model in sizes_on_cpu(options)]
        rows = interpreted(cases, options, config.seed, run, context)
        shown, failed = rows, [row for row in rows if row["correct"] is False]
        context.progress.log(
            f"checked in Triton's interpreter on {options.check_rows} rows; max_error is in units "
            "of what is allowed, so at most 1 is correct"
        )
        context.progress.log(NEEDS_GPU)
    on_cpu = [] if device else timed_on_cpu(options, config.seed, run, context)
    judged = [*verdicts(rows, roofline, device), *cpu_verdicts(on_cpu, cpu_label())]
    run.write_table("verdicts", verdict_rows(judged, RULE))
    failed += [row for row in on_cpu if is_failure(row)]
    if failed:
        names = ", ".join(f"{row['kernel']} {row['model']} {row['layer']}" for row in failed[:5])
        raise CheckError(
            f"{len(failed)} of {len(shown) + len(on_cpu)} kernel checks failed, and have no "
            f"timing: {names}; {failed[0]['status']}. Tables are in {run.path / 'tables'}"
        )
    ours = [row for row in on_cpu if row["implementation"].startswith(COMPILED)]
    return [cpu_summary(row) for row in ours] or shown


def all_cases(options: Any) -> Iterator[Case]:
    """Every case of the chosen models, batches and kernels; equal shapes once."""
    factors = {"off": 1, "on": 2}
    images = sorted({b * factors[g] for b in options.batches for g in options.guidance})
    for model in options.models:
        cases = weight_cases_of(model, options.rank, options.bits)
        for count in images:
            cases += cases_of(
                model,
                count,
                tokens=options.tokens_per_image,
                rank=options.rank,
                bits=options.bits,
            )
        yield from (c for c in cases if not options.kernels or c.kernel in options.kernels)


def interpreted(
    cases: list[Case], options: Any, seed: int, run: Run, context: Context
) -> list[dict[str, Any]]:
    """Check every (kernel, model, layer) once in the interpreter; failed ones are tried anew."""
    largest = {(case.kernel, case.model, case.layer): case for case in cases}
    wanted = {
        f"check/{kernel}/{model}/{layer}": case for (kernel, model, layer), case in largest.items()
    }
    reduced = {
        key: case.reduced(options.check_rows, options.check_outputs) for key, case in wanted.items()
    }
    missing = [key for key in wanted if not (run.get(key) or {}).get("correct")]
    with context.progress.task("kernels", len(wanted), len(wanted) - len(missing)) as task:
        answers = interpreter([reduced[key] for key in missing], seed)
        for key, found in zip(missing, answers, strict=True):
            case = reduced[key]
            row = {
                **case.facts,
                "correct": found.correct,
                "max_error": found.max_error,
                "status": found.failure or "ok",
                "where": f"Triton's interpreter, at {case.rows} rows",
            }
            run.append(key, kind="kernel-check", **row)
            task.advance()
    rows = []
    for key, case in wanted.items():
        record = run.get(key)
        assert record is not None
        model = roofline_rows(case)[0]
        row = {name: value for name, value in record.items() if name not in ("key", "kind")}
        rows.append(row)
        row |= {"timing": None, "basis": MODEL, "modelled_images": case.images}
        row |= {f"h100_{name}": model[name] for name in ("least_us", "limit", "bf16_over_ternary")}
    run.write_table("kernel_checks", rows)
    columns = ("kernel", "model", "layer", "correct", "max_error", "timing", "modelled_images",
               "h100_least_us", "h100_bf16_over_ternary", "basis", "status")  # fmt: skip
    return [{name: row[name] for name in columns} for row in rows]


def interpreter(cases: list[Case], seed: int) -> Iterator[Check]:
    """Checks of `cases` from a process with Triton's interpreter switched on, as they finish."""
    if not cases:
        return
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "studies.kernels.checks"]
    text = "".join(json.dumps({"case": asdict(case), "seed": seed}) + "\n" for case in cases)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(text)  # far below the size of a pipe's buffer
            process.stdin.close()
            count = 0
            for line in process.stdout:
                yield Check(**json.loads(line))
                count += 1
        finally:
            process.kill()
    if count < len(cases):
        raise CheckError(f"the interpreter stopped at {cases[count].key}; see its message above")


def timed(
    cases: list[Case], options: Any, seed: int, run: Run, context: Context
) -> list[dict[str, Any]]:
    """Check and time every case that this kind of device has no finished item of."""
    device = context.device
    name = torch.cuda.get_device_name(device)

    def is_finished(case: Case) -> bool:
        record = run.get(case.key)
        if record is None or record["device_name"] != name:
            return False
        ours = next(row for row in record["rows"] if row["implementation"] == OURS)
        return ours["correct"] is not False and not ours["status"].startswith("failed")

    missing = [case for case in cases if not is_finished(case)]
    # The most work of the largest model first: a borrowed GPU may be gone before the last case.
    missing.sort(key=lambda case: (options.models.index(case.model), -case.images))
    if missing:
        ceilings = measure_ceilings(device, rounds=options.rounds, round_s=options.round_ms * 1e-3)
        session = len(run.manifest["sessions"])
        run.append(f"ceilings/{session}", kind="ceilings", device_name=name, **ceilings.row())
    with context.progress.task("kernels", len(cases), len(cases) - len(missing)) as task:
        for case in missing:
            rows = measure_case(case, options, seed, device, ceilings)
            run.append(case.key, kind="kernel", device_name=name, rows=rows)
            task.advance()
            torch.cuda.empty_cache()
    table = []
    for case in cases:
        record = run.get(case.key)
        assert record is not None
        extra = {"device_name": name, "settings": settings_of(case, options)}
        table += [{**extra, **row} for row in record["rows"]]
    run.write_table("kernels", table)
    found = [record for record in run.results() if record["kind"] == "ceilings"]
    run.write_table("ceilings", [{k: v for k, v in r.items() if k != "kind"} for r in found])
    return table


def measure_case(
    case: Case, options: Any, seed: int, device: str, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Rows of our kernel and its peers at one case, timed in the same rounds."""
    watches: dict[str, Stopwatch] = {}
    status, variant = {OURS: "ok"}, None
    try:
        # Before the check, which then sees the tile that is timed.
        if case.is_product and options.autotune:
            variant = autotuned(case, seed, device)
    except Exception as error:
        status[OURS] = reason(error)
    found = guarded_check(case, device, seed)
    if not found.correct:
        status[OURS] = found.failure
    elif status[OURS] == "ok":
        try:
            watches[OURS] = GraphReplay(our_work(case, seed, device))
        except Exception as error:
            status[OURS] = reason(error)
    layer = None
    if case.is_product:
        int8_bytes = case.width * case.outputs * case.groups
        layer = make_layer(case, device, copies_beyond_cache(int8_bytes, cache_bytes(device)), seed)
    for name in peers_of(case):
        try:
            watches[name] = GraphReplay(make_peer(name, case, layer, device))
            status[name] = "ok"
        except PeerUnavailableError as error:
            status[name] = str(error)
        except Exception as error:
            status[name] = reason(error)
    times = time_interleaved(watches, rounds=options.rounds, round_s=options.round_ms * 1e-3)
    return rows_of(case, found, status, times, ceilings, variant)


def guarded_check(case: Case, device: str, seed: int) -> Check:
    """`check_case`; a shape whose reference does not fit the memory is not correct, nor timed."""
    try:
        return check_case(case, device, seed)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Check(False, None, "not checked: the reference does not fit the memory")


def autotuned(case: Case, seed: int, device: str) -> str:
    """Let later calls of a product take its fastest variant and tile, and name them."""
    from kernels.ternary_matmul import triton as product

    return str(product.autotune(**make_inputs(case, device, seed)))


def our_work(case: Case, seed: int, device: str) -> list[Any]:
    """Calls of our kernel, one per copy of its weights or input."""
    function = kernel_function(case, "triton")
    copies = copies_beyond_cache(case.copied_bytes, cache_bytes(device))
    inputs = make_inputs(case, device, seed)
    varied = next(name for name in ("planes", "grad", "weight", "qkv", "x") if name in inputs)
    work = []
    for index in range(copies):
        # Data of the same distribution: a permutation of what was checked.
        copy = inputs[varied] if index == 0 else inputs[varied].roll(index, 0).clone()
        arguments = {**inputs, varied: copy}
        work.append(lambda arguments=arguments: function(**arguments))
    return work


def reason(error: Exception) -> str:
    """A status line of an error."""
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
