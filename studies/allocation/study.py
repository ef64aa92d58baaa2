"""What is mixed precision worth? Networks trained at the bits that metrics and solvers choose.

At each budget (mean activation bits over MACs) every candidate names bits per layer: uniform;
random; the exact optimum for sensitivities measured before training (`ptq`, `output-mse`,
`fisher`), or after `warmup_steps` of it (`qat`: change of the noise prediction; `qat-teacher`:
increase of its error against the teacher); and `resolved`, which solves again during its own
training. Every network then trains the same number of steps at its own bits from the same start, so
that the comparison is of allocations and not of schedules (train-and-eval's AMPN plans begin at the
weights of their warm-up). `RULE` is fixed before a run; that of versions 1 and 2, worst seed
against best, decided too often by chance.

Beside every candidate stand its headroom, what its sensitivities predict of uniform bits over what
they predict of its own, and its regret, its trained loss over the least of any candidate. Up to
version 3 sensitivities were taken against the layer at 4 bits, whose zero decided allocations.

Solvers are compared on the same sensitivities without training, and so are allocations per timestep
bucket, whose mean over the sampling steps meets the same budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from robuq_bench.accounting.structure import dit_layer_macs
from robuq_bench.allocation import (
    Allocation,
    allocation_problem,
    headroom,
    mac_cost,
    mean_bits,
    solve,
)
from robuq_bench.allocation.solvers import SOLVERS
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import CheckError
from robuq_bench.judging.sampling import shard
from robuq_bench.qat import metric_batches, prepare_training
from robuq_bench.quantization.convert import allocatable_layers, set_activation_bits
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity import METRICS, MetricOptions, by_timestep, distillation_loss
from robuq_bench.statistics import comparisons
from robuq_bench.trials import (
    Judge,
    adopt_shards,
    check_choices,
    judge_student,
    make_judge,
    train_trial,
)
from studies.allocation.settings import Settings
from studies.allocation.tables import (
    SOURCES,
    Table,
    bucket_rows,
    front_rows,
    solver_rows,
    write_allocations,
    write_comparison,
)

VERSION = "5"
SUMMARY = "What is mixed precision worth? Networks trained at the bits of metrics and solvers."
RULE = (
    "Every candidate is compared with uniform at the same budget, and qat (AMPN) with ptq, on the "
    "distillation loss and on FID, lower being better. "
    + comparisons.RULE
    + " Nor are comparisons "
    "with a network whose metric is not a number above 0. All comparisons of a run are one family."
)


def check(config: Config) -> None:
    """Refuse a plan whose layers do not take the bits to choose from."""
    check_choices(config, config.settings_of(Settings).choices, "allocation.choices")


class Trial(NamedTuple):
    """One network: the bits of a candidate at a budget, trained with a seed."""

    candidate: str
    budget: float
    seed: int

    @property
    def key(self) -> str:
        return f"trial/{self.candidate}/{self.budget:g}/{self.seed}"


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Measure, solve, train every trial (or this shard of them), summarise."""
    options = config.settings_of(Settings)
    judge = make_judge(config, run, context, options.samples, options.sampling_steps)
    layers, tables, buckets = measure_sensitivities(config, run, context, judge)
    all_macs = dit_layer_macs(config.workload.model)
    macs = {layer: all_macs[layer] for layer in layers}
    chosen = allocations(config, tables, macs)
    train_all(config, run, context, judge, layers, macs, chosen)
    trials = [record for record in run.results() if record["kind"] == "trial"]
    if options.shard is not None:
        return [{"shard": options.shard, "items": len(trials)}]
    write_allocations(run, chosen, tables, trials)
    run.write_table("solvers", solver_rows(config, tables, macs))
    run.write_table("front", front_rows(config, tables, macs))
    run.write_table("timestep_aware", bucket_rows(config, buckets, macs))
    gains = {
        (name, budget): headroom(tables[name], found, budget)
        for (name, budget), found in chosen.items()
        if name in tables
    }
    return write_comparison(run, trials, gains, RULE)


def measure_sensitivities(
    config: Config, run: Run, context: Context, judge: Judge
) -> tuple[list[str], dict[str, Table], dict[str, Table]]:
    """Layers, sensitivities of every source, and those of `qat` by timestep bucket."""
    options = config.settings_of(Settings)
    trainer, source, loss_function = prepare_training(config, context, judge.teacher, judge.data)
    model = trainer.model
    layers = allocatable_layers(model)
    batches = metric_batches(config, context, judge.data)
    bound = MetricOptions(
        teacher=judge.teacher, loss=distillation_loss(judge.teacher), seed=config.seed
    )

    def measure_once(key: str, values: Callable[[], Any]) -> None:
        if not run.has(key):
            run.append(key, kind="sensitivity-table", values=values())

    def measure_all(after_training: bool) -> None:
        for name, (metric, after) in SOURCES.items():
            if after == after_training:
                function = METRICS[metric].bind(bound)
                measured = partial(function, model, layers, options.choices, batches)
                measure_once(f"source/{name}", measured)

    measure_all(after_training=False)
    wanted = [f"source/{name}" for name, (_, after) in SOURCES.items() if after]
    if not all(run.has(key) for key in (*wanted, "buckets")):
        with context.progress.task("warm-up", options.warmup_steps) as task:
            for _ in trainer.train(source, loss_function, options.warmup_steps):
                task.reach(trainer.step)
        measure_all(after_training=True)
        measure_once(
            "buckets",
            lambda: by_timestep(
                METRICS["epsilon_mse"].bind(bound),
                model,
                layers,
                options.choices,
                batches,
                buckets=options.timestep_buckets,
                num_train_timesteps=config.workload.diffusion.num_train_timesteps,
            ),
        )
    tables = {name: _table(run, f"source/{name}") for name in SOURCES}
    by_bucket = _table(run, "buckets")
    buckets = {
        str(index): {
            layer: {bits: values[index] for bits, values in by_bits.items()}
            for layer, by_bits in by_bucket.items()
        }
        for index in range(options.timestep_buckets)
    }
    return layers, tables, buckets


def _table(run: Run, key: str) -> dict[str, dict[int, Any]]:
    values = (run.get(key) or {})["values"]
    return {layer: {int(b): v for b, v in by_bits.items()} for layer, by_bits in values.items()}


def allocations(
    config: Config, tables: dict[str, Table], macs: dict[str, int]
) -> dict[tuple[str, float], Allocation]:
    """Bits of every candidate at every budget; `resolved` chooses its own while training."""
    options = config.settings_of(Settings)
    chosen = {}
    for budget in options.budgets:
        for candidate in options.candidates:
            if candidate == "resolved":
                continue
            table = tables.get(candidate, tables["qat"])
            problem = allocation_problem(table, macs, [mac_cost(macs, budget)])
            solver = candidate if candidate in SOLVERS else "exact"
            chosen[candidate, budget] = solve(problem, solver, seed=config.seed)
    return chosen


def train_all(
    config: Config,
    run: Run,
    context: Context,
    judge: Judge,
    layers: list[str],
    macs: dict[str, int],
    chosen: dict[tuple[str, float], Allocation],
) -> None:
    """Train and judge every trial of this shard that is not there yet."""
    options = config.settings_of(Settings)
    trials = [
        Trial(candidate, budget, seed)
        for seed in range(options.seeds)
        for budget in options.budgets
        for candidate in options.candidates
    ]
    if options.shard is not None:
        trials = list(shard(trials, options.shard))
    else:
        adopt_shards(run, config, "trial")
    check_bits(run, chosen)
    missing = [trial for trial in trials if not run.has(trial.key)]
    with context.progress.task("networks", len(trials), len(trials) - len(missing)) as task:
        for trial in missing:
            if trial.candidate == "resolved":
                bits, measured = train_resolved(config, context, judge, layers, macs, trial)
            else:
                bits = chosen[trial.candidate, trial.budget].bits_by_layer
                measured = train_trial(
                    config, context, judge, bits, seed=trial.seed, steps=options.train_steps
                )
            run.append(
                trial.key,
                kind="trial",
                **trial._asdict(),
                bits_by_layer=bits,
                mean_bits=mean_bits(bits, macs),
                **measured,
            )
            task.advance()


def check_bits(run: Run, chosen: dict[tuple[str, float], Allocation]) -> None:
    """Refuse to mix networks of one candidate with different bits, as two machines may choose.

    Raises:
        CheckError: names the candidate and the run that the network comes from.
    """
    for record in run.results():
        own = chosen.get((record.get("candidate", ""), record.get("budget", 0.0)))
        if record["kind"] == "trial" and own and record["bits_by_layer"] != own.bits_by_layer:
            raise CheckError(
                f"{record['key']} of {record.get('source_run', run.id)} was trained at other bits "
                "than this machine chooses for it: run all shards on one kind of machine, or begin "
                "anew with --force"
            )


def train_resolved(
    config: Config,
    context: Context,
    judge: Judge,
    layers: list[str],
    macs: dict[str, int],
    trial: Trial,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Train with the allocation solved anew at each of `resolve_steps`; return its last bits."""
    options = config.settings_of(Settings)
    recipe = config.workload.training.model_copy(update={"steps": options.train_steps})
    workload = config.workload.model_copy(update={"training": recipe})
    own = config.model_copy(update={"seed": trial.seed, "workload": workload})
    trainer, source, loss_function = prepare_training(own, context, judge.teacher, judge.data)
    student = trainer.model
    batches = metric_batches(config, context, judge.data)
    bits: dict[str, int] = {}
    for until in (*options.resolve_steps, options.train_steps):
        for _ in trainer.train(source, loss_function, until):
            pass
        if until < options.train_steps:
            bits = solve_now(student, layers, macs, options.choices, trial.budget, batches)
            set_activation_bits(student, bits)
    trainer.copy_ema_to(student)
    return bits, judge_student(student, judge, context, seed=trial.seed)


def solve_now(
    model: nn.Module,
    layers: list[str],
    macs: dict[str, int],
    choices: tuple[int, ...],
    budget: float,
    batches: list[Any],
) -> dict[str, int]:
    """The exact optimum for the model as it is, each layer measured beside the widest bits."""
    set_activation_bits(model, dict.fromkeys(layers, choices[-1]))
    table = METRICS["epsilon_mse"].bind(MetricOptions())(model, layers, choices, batches)
    problem = allocation_problem(table, macs, [mac_cost(macs, budget)])
    return solve(problem, "exact").bits_by_layer
