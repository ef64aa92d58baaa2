"""`study efficiency` on a CPU: a block and a whole step of every variant, taking turns.

All variants of a model are in memory together, so that a ratio comes from one process and from
rounds in which all take turns; peak memory is measured in a process for each. A packed model is
the plan as it is evaluated (branches, attention in integers), on backend "cpu". Its prediction is
compared with backend "integer" first, those of the others with fp32 eager; without agreement a
variant has no time. A step is one prediction of the network, without guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.cpu_figures import step_speeds
from robuq_bench.errors import MissingResourceError
from robuq_bench.measuring.cpu import (
    CpuTiming,
    available_instructions,
    instructions,
    machine,
    threads,
    time_in_turns,
)
from robuq_bench.runs.run import Run
from studies.efficiency.cpu_memory import peak_memory
from studies.efficiency.cpu_tables import answer, factors_of, speeds, times_of
from studies.efficiency.cpu_variants import (
    CPU_VARIANTS,
    CpuVariant,
    Inputs,
    arithmetic_of,
    bound_of,
    build_float,
    build_packed,
    difference,
    full_precision,
    model_of,
    packed_pair,
)
from studies.efficiency.settings import CpuSettings, Settings

Row = dict[str, Any]
BLOCK, STEP = "block", "step"


@dataclass(frozen=True)
class Place:
    """What one item times: a scope of a model at a batch, with a number of threads."""

    scope: str
    model: str
    batch: int
    threads: int

    @property
    def key(self) -> str:
        return f"cpu-{self.scope}/{self.model}/batch{self.batch}/threads{self.threads}"


def places_of(options: CpuSettings) -> list[Place]:
    """Every item, models in their order, blocks before steps."""
    return [
        Place(scope, model, batch, count)
        for model in options.models
        for scope, batches in ((BLOCK, options.batches), (STEP, options.step_batches))
        for batch in batches
        for count in options.threads
    ]


@dataclass(frozen=True)
class OnCpu:
    """Rows of the tables `cpu_times`, `cpu_factors` and `cpu_memory`."""

    times: Sequence[Row] = ()
    factors: Sequence[Row] = ()
    memory: Sequence[Row] = ()

    @property
    def wrong(self) -> list[Row]:
        """Packed models that computed something else, or failed."""
        rows = (*self.times, *self.memory)
        return [
            row for row in rows if CPU_VARIANTS[row["variant"]].plan and is_wrong(row["status"])
        ]


def is_wrong(status: str) -> bool:
    """Whether a status is of something to be measured again."""
    return status.startswith(("check failed", "failed"))


def measure_on_cpu(config: Config, run: Run, context: Context) -> OnCpu:
    """Measure what this machine has no finished item of, and write the tables."""
    options = config.settings_of(Settings)
    places = places_of(options.cpu)
    if not places:
        return OnCpu()
    facts = machine()
    memory = {
        f"cpu-memory/{model}/{name}": (model, name)
        for model in options.cpu.models
        for name in options.cpu.variants
        if options.cpu.memory
    }

    def is_finished(key: str) -> bool:
        record = run.get(key)
        return (
            record is not None
            and record["device_name"] == facts["device_name"]
            and not any(is_wrong(row["status"]) for row in record["rows"])
        )

    missing = [place for place in places if not is_finished(place.key)]
    unknown = {key: of for key, of in memory.items() if not is_finished(key)}
    total = len(places) + len(memory)
    with context.progress.task("cpu", total, total - len(missing) - len(unknown)) as task:
        bench: Bench | None = None
        for place in missing:
            if bench is None or not bench.is_of(place):
                bench = None  # before the next models come
                torch._dynamo.reset()
                bench = Bench(config, place)
            rows, factors = bench.measure(place)
            run.append(
                place.key,
                kind=f"efficiency-cpu-{place.scope}",
                device_name=facts["device_name"],
                rows=rows,
                factors=factors,
            )
            task.advance()
        bench = None  # its memory is not that of the processes below
        for key, (model, name) in unknown.items():
            row = peak_memory(config, model, CPU_VARIANTS[name])
            run.append(
                key, kind="efficiency-cpu-memory", device_name=facts["device_name"], rows=[row]
            )
            task.advance()
    found = {key: run.get(key) or {} for key in [place.key for place in places] + [*memory]}
    device = {"device_name": facts["device_name"]}
    times = [device | row for place in places for row in found[place.key]["rows"]]
    factors = [device | row for place in places for row in found[place.key]["factors"]]
    peaks = [device | row for key in memory for row in found[key]["rows"]]
    told = [facts | {"answer": answer(factors)}]
    tables = {"times": times, "factors": factors, "summary": speeds(factors), "memory": peaks}
    for table, rows in (tables | {"machine": told}).items():
        if rows:
            run.write_table(f"cpu_{table}", rows)
    picture = step_speeds(factors)
    if picture is not None:
        picture.save(run.figure_path("cpu-speed"))
    return OnCpu(times, factors, peaks)


class Bench:
    """All variants of one model, as deep as its scope needs."""

    def __init__(self, config: Config, place: Place) -> None:
        self.config, self.options = config, config.settings_of(Settings)
        self.scope, self.size = place.scope, place.model
        depth = 1 if place.scope == BLOCK else None
        self.section = model_of(config.workload.model, place.model, depth)
        self.status: dict[str, str] = {}
        self.models: dict[str, nn.Module] = {}
        self.exact: dict[str, nn.Module] = {}
        base = build_float(self.section, config.seed)
        self.base = base
        for name in self.options.cpu.variants:
            variant = CPU_VARIANTS[name]
            try:
                if variant.plan:
                    packed = build_packed(variant, self.section, self.options.rank, config.seed)
                    self.exact[name], self.models[name] = packed_pair(packed)
                else:
                    self.models[name] = full_precision(variant, base)
            except MissingResourceError as error:
                self.status[name] = str(error)

    def is_of(self, place: Place) -> bool:
        """Whether these are the models of a place."""
        return (self.scope, self.size) == (place.scope, place.model)

    @torch.no_grad()
    def measure(self, place: Place) -> tuple[list[Row], list[Row]]:
        """Rows of `cpu_times` and `cpu_factors` of an item."""
        inputs = Inputs(self.section, place.batch, self.config.seed)
        facts = {"model": place.model, "scope": place.scope, "batch": place.batch,
                 "threads": place.threads}  # fmt: skip
        with threads(place.threads):
            expected = inputs.call(self.base, self.scope, torch.float32)()
            rows: list[Row] = []
            calls: dict[str, Callable[[], Tensor]] = {}
            for name in self.options.cpu.variants:
                for row, call in self._variant(CPU_VARIANTS[name], inputs, expected):
                    rows.append(facts | row)
                    if call is not None:
                        calls[row["implementation"]] = call
            times: dict[str, CpuTiming] = time_in_turns(
                calls,
                rounds=self.options.cpu.rounds,
                sample_s=self.options.cpu.sample_ms * 1e-3,
            )
        return times_of(rows, times), factors_of(facts, rows, times)

    def _variant(
        self, variant: CpuVariant, inputs: Inputs, expected: Tensor
    ) -> list[tuple[Row, Callable[[], Tensor] | None]]:
        """What is known of a variant before it is timed, and its call where it may be."""
        facts: Row = {"variant": variant.name, "implementation": variant.name,
                      "description": variant.label, "arithmetic": "", "instructions": "",
                      "status": "ok", "difference": None}  # fmt: skip
        if variant.name in self.status:
            return [(facts | {"status": self.status[variant.name]}, None)]
        model = self.models[variant.name]
        call = inputs.call(model, self.scope, variant.dtype)
        if not variant.plan:
            return [self._checked(variant, facts, call, expected)]
        arithmetic = arithmetic_of(model)
        expected = inputs.call(self.exact[variant.name], self.scope, variant.dtype)()
        if arithmetic != "compiled":
            return [self._checked(variant, facts | {"arithmetic": arithmetic}, call, expected)]
        available = available_instructions()
        sets = [name for name in self.options.cpu.instructions if name in available]
        found: list[tuple[Row, Callable[[], Tensor] | None]] = []
        for name in self.options.cpu.instructions:
            label = {"implementation": f"{variant.name}, {name}", "arithmetic": arithmetic,
                     "instructions": name}  # fmt: skip
            if name not in available:
                label |= {"status": f"not run: this CPU has no {name}"}
                found.append((facts | label, None))
            elif self.scope == BLOCK or name == sets[0]:
                found.append(self._checked(variant, facts | label, forced(name, call), expected))
        return found

    def _checked(
        self, variant: CpuVariant, facts: Row, call: Callable[[], Tensor], expected: Tensor
    ) -> tuple[Row, Callable[[], Tensor] | None]:
        """The row of a call with its difference from what is expected, and the call if right."""
        try:
            amount = difference(call(), expected)
        except Exception as error:  # one variant that fails must not take the others along
            lines = str(error).strip().splitlines() or [""]
            return facts | {"status": f"failed: {type(error).__name__}: {lines[0]}"}, None
        row = facts | {"difference": amount}
        if amount <= bound_of(variant, self.scope):
            return row, call
        return row | {"status": f"check failed: differs by {amount:.2g} of its size"}, None


def forced(name: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` with the compiled kernels on an instruction set."""

    def run() -> Tensor:
        with instructions(name):
            return call()

    return run
