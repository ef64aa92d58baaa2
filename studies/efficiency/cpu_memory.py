"""Peak memory of a step on a CPU, in a process of its own.

`python -m studies.efficiency.cpu_memory` reads what to measure as JSON and writes a row as JSON.
What the operating system counts is resident memory: parameters and buffers are known to the byte,
of the rest only what was there before a step and what the step added.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robuq_bench.config import Config, load_workload
from robuq_bench.errors import MissingResourceError
from robuq_bench.inference import prepare_for_inference
from robuq_bench.measuring.memory import weight_bytes
from studies.efficiency.cpu_variants import (
    CPU_VARIANTS,
    CpuVariant,
    Inputs,
    build_float,
    build_packed,
    full_precision,
    model_of,
)
from studies.efficiency.settings import Settings

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 2


def peak_memory(config: Config, size: str, variant: CpuVariant) -> dict[str, Any]:
    """The row of `cpu_memory` of a step of a variant; `status` says why there are no numbers."""
    options = config.settings_of(Settings)
    facts = {"model": size, "variant": variant.name, "batch": options.cpu.step_batches[0],
             "threads": options.cpu.threads[0]}  # fmt: skip
    request = facts | {
        "section": config.workload.model.model_dump(mode="json"),
        "rank": options.rank,
        "seed": config.seed,
    }
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "studies.efficiency.cpu_memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return facts | {"status": f"failed: {lines[-1]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts | found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Status and bytes of a request, in a process that did nothing before."""
    if not _RESET.exists():
        return {"status": "not run: peak memory is read from /proc, which this system lacks"}
    variant = CPU_VARIANTS[request["variant"]]
    kind = type(load_workload("digits").model)
    section = model_of(kind.model_validate(request["section"]), request["model"])
    torch.set_num_threads(request["threads"])
    small = section.model_copy(update={"depth": 1, "hidden_size": 64, "num_heads": 1})
    try:
        _Step(variant, small, request)()  # loads what torch loads when it is first used
        before = resident("VmRSS")
        step = _Step(variant, section, request)
    except MissingResourceError as error:
        return {"status": str(error)}
    step()  # compiles, and allocates what is kept
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    loaded = resident("VmRSS")
    _RESET.write_text("5")  # the peak counts from here
    for _ in range(STEPS):
        step()
    peak = resident("VmHWM")
    weights = weight_bytes(step.model) + int8_bytes(step.model)
    return {
        "status": "ok",
        "peak_bytes": peak - before,
        "weights_bytes": weights,
        "other_resident_bytes": loaded - before - weights,
        "activations_and_workspace_bytes": peak - loaded,
        "process_bytes": before,
    }


class _Step:
    """One step of a model, to be called."""

    def __init__(self, variant: CpuVariant, section: Any, request: dict[str, Any]) -> None:
        if variant.plan:
            packed = build_packed(variant, section, request["rank"], request["seed"])
            self.model = prepare_for_inference(packed, "cpu")
        else:
            self.model = full_precision(variant, build_float(section, request["seed"]))
        inputs = Inputs(section, request["batch"], request["seed"])
        self.predict = inputs.call(self.model, "step", variant.dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        self.predict()


def int8_bytes(model: nn.Module) -> int:
    """Bytes of the weights and biases of torch's int8 linears, which are no parameters."""
    modules: list[Any] = list(model.modules())
    linears = [m for m in modules if isinstance(getattr(m, "_packed_params", None), nn.Module)]
    parts = [linear._weight_bias() for linear in linears]
    return sum(weight.numel() + 4 * bias.numel() for weight, bias in parts)


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
