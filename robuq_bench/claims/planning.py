"""From claims to runs: which trainings they need, what each is called, and what it will take."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from robuq_bench.claims.declared import Declared
from robuq_bench.claims.judged import STUDY
from robuq_bench.config import Config, resolve, training_steps
from robuq_bench.errors import ConfigError, RobuqError
from robuq_bench.runs.run_files import DONE, read_manifest
from robuq_bench.study_index import find_study

Rates = Mapping[tuple[str, str], float]
"""(workload, arm) -> learning rate; absent: the workload's."""


@dataclass(frozen=True)
class Cell:
    """One training that a claim needs; `steps` None is the workload's budget."""

    workload: str
    arm: str
    steps: int | None
    seed: int

    def __str__(self) -> str:
        steps = "" if self.steps is None else f", {self.steps:,} steps"
        return f"{self.arm} on {self.workload}{steps}, seed {self.seed}"


def cells_of(declared: Declared) -> list[Cell]:
    """The trainings of all claims, each once.

    First seeds come first, so that verdicts ripen together; of one seed, short budgets do.
    """
    found = [
        Cell(workload, arm, steps, seed)
        for claim in declared.claims.values()
        for workload in claim.workloads
        for steps in claim.budgets or (None,)
        for arm in claim.weights
        for seed in claim.seeds
    ]
    return sorted(dict.fromkeys(found), key=lambda cell: (cell.seed, cell.steps or 0))


class Planner:
    """Configs of cells, as `train-and-eval` resolves them."""

    def __init__(self, declared: Declared, rates: Rates | None = None) -> None:
        self.declared, self.rates = declared, rates or {}
        self._resolved: dict[tuple[str, str, int | None], tuple[Config, list[str]]] = {}

    def config(self, cell: Cell) -> Config:
        """The config of a cell's run; that of `is_one` is the same for all seeds and budgets.

        Raises:
            ConfigError: what the arm asks for does not exist; names the arm.
        """
        config, _ = self._resolve(cell)
        return config if is_one(config) else config.model_copy(update={"seed": cell.seed})

    def command(self, cell: Cell) -> str:
        """The `train-and-eval` that makes the same run."""
        _, given = self._resolve(cell)
        words = ["train-and-eval", "--plan", self.declared.arms[cell.arm].plan]
        words += ["--on", cell.workload, "--seed", str(self.config(cell).seed)]
        for text in given:
            words += ["--set", text]
        return f"python bench.py {shlex.join(words)}"

    def _resolve(self, cell: Cell) -> tuple[Config, list[str]]:
        """The config of seed 0, and what `--set` gave."""
        key = (cell.workload, cell.arm, cell.steps)
        if key not in self._resolved:
            arm = self.declared.arms[cell.arm]
            rate = self.rates.get((cell.workload, cell.arm))
            tuned = [] if rate is None else [f"training.learning_rate={rate!r}"]
            try:
                steps = cell.steps
                if steps is None and arm.extra_steps:
                    steps = training_steps(resolve_main(arm.plan, cell.workload, 0, arm.set))
                budget = [] if steps is None else [f"training.steps={steps + arm.extra_steps}"]
                given = [*arm.set, *budget, *tuned]
                config = resolve_main(arm.plan, cell.workload, 0, given)
                if config.plan.is_full_precision:
                    given = list(arm.set)
                    config = resolve_main(arm.plan, cell.workload, 0, given)
            except RobuqError as error:
                raise ConfigError(f"arm {cell.arm!r} on {cell.workload}: {error}") from None
            if budget and config.plan.train.steps:
                raise ConfigError(
                    f"arm {cell.arm!r}: its plan says train.steps = {config.plan.train.steps}, so "
                    f"no claim can give it a budget of {steps}; leave one of them out"
                )
            self._resolved[key] = config, given
        return self._resolved[key]


def is_one(config: Config) -> bool:
    """Whether one run serves every seed: nothing is trained, and all seeds share their images."""
    own_images = config.workload.evaluation.image_seeds == "own"
    return config.plan.is_full_precision and not own_images


def is_trained(config: Config) -> bool:
    """Whether it has a learning rate: neither a teacher nor post-training quantization."""
    return not config.plan.is_full_precision and training_steps(config) > 0


def resolve_main(plan: str, workload: str, seed: int, overrides: Sequence[str]) -> Config:
    """The config of one `train-and-eval`."""
    return resolve(STUDY, find_study(STUDY).version, plan, workload, seed, overrides)


def runs_by_config(folders: Iterable[Path]) -> dict[str, Path]:
    """SHA-256 of the config -> folder, of the main job's runs among run folders.

    Finished ones go before others. A folder whose manifest cannot be read is no run here.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.parent.name != STUDY:
            continue
        try:
            digest = str(read_manifest(folder)["config_sha256"])
        except RobuqError:
            continue
        if digest not in found or (folder / DONE).exists():
            found[digest] = folder
    return found


class Pace:
    """Seconds that trainings take, from those that finished."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[int, float]]] = {}

    def add(self, workload: str, steps: int, seconds: float) -> None:
        """Count a finished run in."""
        self._seen.setdefault(workload, []).append((steps, seconds))

    def seconds(self, workload: str, steps: int) -> float | None:
        """Mean of runs of equal length; else by steps; None before any run of the workload."""
        seen = self._seen.get(workload, [])
        same = [seconds for length, seconds in seen if length == steps]
        if same:
            return sum(same) / len(same)
        trained = [(length, seconds) for length, seconds in seen if length]
        if not trained:
            return None
        return steps * sum(s for _, s in trained) / sum(length for length, _ in trained)


def wall_seconds(manifest: Mapping[str, Any]) -> float:
    """Seconds of a run's sessions, each from start to end; one that was killed has no end."""
    return sum(
        (datetime.fromisoformat(s["end"]) - datetime.fromisoformat(s["start"])).total_seconds()
        for s in manifest["sessions"]
        if s["end"]
    )
