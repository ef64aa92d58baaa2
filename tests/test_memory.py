"""Freed memory is kept, on glibc alone, unless the environment says otherwise."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from robuq_bench import memory
from robuq_bench.cli.flags import Flags
from robuq_bench.cli.job import Job
from robuq_bench.context import Context
from robuq_bench.runs import provenance

ROOT = Path(__file__).resolve().parents[1]
IS_GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
# 6 x 8 MiB at once: more than glibc keeps by itself once it has seen such sizes.
PROGRAM = """
import json, resource
import numpy as np
from robuq_bench import memory
settings = memory.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return float(sum(np.full(2**20, 1.5) for _ in [np.ones(2**20) for _ in range(5)])[0])
work()
before = faults()
results = [work() for _ in range(5)]
print(json.dumps([settings, faults() - before, results]))
"""


def run(**environment: str) -> tuple[dict[str, int] | None, int, list[float]]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    settings, faults, results = json.loads(done.stdout)
    return settings, faults, results


@pytest.mark.skipif(not IS_GLIBC, reason="glibc alone has these settings")
def test_page_faults_go_and_numbers_stay() -> None:
    settings, few, results = run()
    assert settings is not None
    assert settings["mmap_threshold"] >= 2**25
    nothing, many, expected = run(ROBUQ_MALLOC="off")
    assert nothing is None
    assert few * 10 < many
    assert results == expected == [7.5] * 5


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
        {memory.VARIABLE: "off"},
    ],
)
def test_the_environment_wins(environment: dict[str, str]) -> None:
    assert run(**environment)[0] is None


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_state", None)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("asked the C library"))
    assert memory.keep_freed_memory() is None


def test_provenance_says_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"mmap_threshold": 1, "trim_threshold": 2}
    monkeypatch.setattr(memory, "_state", settings)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    found = provenance.collect("cpu", 1)
    assert found["malloc"] == settings
    assert found["environment"]["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_commands_that_compute_on_a_cpu_ask_for_it(
    device: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(Context, "create", lambda **_: None)
    Job("sample", "1", "fp", Flags(device=device, quiet=True), writes_run=False).context()
    assert len(asked) == times
