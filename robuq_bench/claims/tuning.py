"""The learning rate of each arm, chosen on seeds that no claim uses.

`learning_rates.csv` beside the file of claims holds every rate that was tried, with the mean of the
metric; `chosen` marks the one that `claims run` takes. An arm that is not in it trains at the
workload's rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from robuq_bench.claims.declared import Declared
from robuq_bench.claims.measured import TEACHER, read_measured, why_unfinished
from robuq_bench.claims.planning import is_trained, resolve_main
from robuq_bench.config import Config, config_hash, training_recipe, training_steps
from robuq_bench.errors import ConfigError, RobuqError, UsageError
from robuq_bench.files import atomic_write_text, sha256_bytes
from robuq_bench.runs.run_files import DONE
from robuq_bench.statistics.metrics import find_metric, lower_is_better

RATES_FILE = "learning_rates.csv"
COLUMNS = (
    *("workload", "arm", "learning_rate", "chosen", "metric", "mean", "seeds", "steps"),
    *("note", "runs", "settings_sha256"),
)


@dataclass(frozen=True)
class Trial:
    """A training of an arm at one learning rate, from one of the seeds for choosing."""

    workload: str
    arm: str
    rate: float
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.arm} on {self.workload}, rate {self.rate:g}, seed {self.seed}"


def trials_of(declared: Declared) -> list[Trial]:
    """The trainings that choose the rates of all arms that claims train.

    Raises:
        ConfigError: what an arm asks for does not exist; names the arm.
    """
    tuning, found = declared.tuning, []
    arms = {
        (workload, arm): None
        for claim in declared.claims.values()
        for workload in claim.workloads
        for arm in claim.weights
    }
    for workload, arm in arms:
        try:
            base = _base(declared, workload, arm)
            if not is_trained(base):
                continue
            for factor in tuning.factors:
                # rounded, so that the text of a rate is the rate
                rate = float(f"{factor * training_recipe(base).learning_rate:.6g}")
                config = _base(declared, workload, arm, [f"training.learning_rate={rate!r}"])
                found += [
                    Trial(workload, arm, rate, seed, config.model_copy(update={"seed": seed}))
                    for seed in tuning.seeds
                ]
        except RobuqError as error:
            raise ConfigError(f"arm {arm!r} on {workload}: {error}") from None
    return sorted(found, key=lambda trial: trial.seed)


def _base(declared: Declared, workload: str, arm: str, more: Sequence[str] = ()) -> Config:
    """What is trained for choosing, at the rate that plan and workload say."""
    own, tuning = declared.arms[arm], declared.tuning
    steps = [f"training.steps={tuning.steps}"] if tuning.steps else []
    return resolve_main(own.plan, workload, 0, [*own.set, *tuning.set, *steps, *more])


def _settings_digest(declared: Declared, workload: str, arm: str) -> str:
    """SHA-256 of what decides an arm's rate: its config, and how rates are chosen."""
    tuning = declared.tuning.model_dump_json(exclude={"set", "steps"})  # they are in the config
    return sha256_bytes(f"{config_hash(_base(declared, workload, arm))} {tuning}".encode())


def rates_rows(
    declared: Declared, trials: Sequence[Trial], folders: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """A row for each rate of the arms whose trials are all settled, one of them chosen per arm.

    A rate at which a training failed is not chosen. Arms with trials to come have no row.
    """
    groups: dict[tuple[str, str], dict[float, list[Trial]]] = {}
    for trial in trials:
        rates = groups.setdefault((trial.workload, trial.arm), {})
        rates.setdefault(trial.rate, []).append(trial)
    rows: list[dict[str, Any]] = []
    for (workload, arm), rates in groups.items():
        own = [_row(declared, rate, same, folders) for rate, same in sorted(rates.items())]
        if any(row is None for row in own):
            continue
        table = [row for row in own if row is not None]
        scored = [row for row in table if row["mean"] is not None]
        if not scored:
            raise RobuqError(f"arm {arm!r} on {workload}: training failed at every learning rate")
        sign = 1 if lower_is_better(scored[0]["metric"]) else -1
        best = min(scored, key=lambda row: sign * row["mean"])
        best["chosen"] = 1
        if best in (table[0], table[-1]) and len(table) > 1:
            best["note"] = "at the edge of what was tried; more factors could find a better one"
        rows += table
    return rows


def _row(
    declared: Declared, rate: float, trials: Sequence[Trial], folders: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The row of one rate; None while a trial is neither finished nor failed."""
    values, names, metric, failed = [], [], declared.tuning.metric, False
    for trial in trials:
        folder = folders.get(config_hash(trial.config))
        if folder is None:
            return None
        names.append(folder.name)
        if not (folder / DONE).exists():
            if not why_unfinished(folder):
                return None
            failed = True
            continue
        run = read_measured(folder)
        name = find_metric(metric, run.metrics())
        if name is None:
            raise UsageError(f"run {folder} has no metric {metric}, which tuning.metric asks for")
        metric = name
        own = [v for who, _, what, v in run.lines if who != TEACHER and what == name]
        values.append(sum(own) / len(own))
    first = trials[0]
    return {
        "workload": first.workload,
        "arm": first.arm,
        "learning_rate": rate,
        "chosen": 0,
        "metric": metric,
        "mean": None if failed else sum(values) / len(values),
        "seeds": " ".join(str(trial.seed) for trial in trials),
        "steps": training_steps(first.config),
        "note": "a training failed" if failed else "",
        "runs": " ".join(names),
        "settings_sha256": _settings_digest(declared, first.workload, first.arm),
    }


def read_rates(path: Path, declared: Declared) -> dict[tuple[str, str], float]:
    """(workload, arm) -> the chosen rate, of the arms that claims use; {} without a file.

    Raises:
        ConfigError: the file is none of `claims tune`, or an arm, its plan or workload, or how
            rates are chosen, is no longer what it was.
    """
    rates = {}
    used = {
        (workload, arm)
        for claim in declared.claims.values()
        for workload in claim.workloads
        for arm in claim.weights
    }
    for row in _read(path).to_dict("records"):
        key = (str(row["workload"]), str(row["arm"]))
        if key not in used or not row["chosen"]:
            continue
        try:
            settings = _settings_digest(declared, *key)
        except RobuqError as error:
            raise ConfigError(f"arm {key[1]!r} on {key[0]}: {error}") from None
        if row["settings_sha256"] != settings:
            raise ConfigError(
                f"{path}: the learning rate of arm {key[1]!r} was chosen for other settings of it, "
                f"its plan, its workload or [tuning]; choose anew by `claims tune --on {key[0]}`, "
                "or delete its rows"
            )
        rates[key] = float(row["learning_rate"])
    return rates


def write_rates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rates, those of other arms as they were."""
    old = _read(path)
    new = pd.DataFrame(rows, columns=list(COLUMNS))
    fresh = set(zip(new["workload"], new["arm"], strict=True))
    kept = old[[pair not in fresh for pair in zip(old["workload"], old["arm"], strict=True)]]
    whole = pd.concat([frame for frame in (kept, new) if len(frame)])
    whole = whole.sort_values(["workload", "arm", "learning_rate"])
    atomic_write_text(path, whole.to_csv(index=False, lineterminator="\n"))


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values={"mean": ""})
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if list(frame.columns) != list(COLUMNS):
        raise ConfigError(f"{path}: is no table of `claims tune`; its columns are others")
    return frame
