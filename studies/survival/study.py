"""What survives QAT? Error reduction by a design choice before training, against after it.

Most of what is published of a quantizer is shown before training, or by the error of a layer. Here
both arms of a choice (see `choices.py`) start from the same teacher and are trained with the plan's
losses from the same seeds, which draw batches, signs and calibration images, at each of several
budgets. The measure is the distillation loss of the averaged weights on fixed validation batches,
of held-out images where the workload has them, over the mean square of the teacher's output on
them: 0 is the teacher, 1 is predicting nothing. It is compared within a choice only, where
everything else is equal.

With g = log(loss without / loss with), for each seed, `RULE` compares g after N steps with g before
any. It is fixed before a run. A choice that acts in training alone (distillation) has g = 0 before
it and nothing that could survive; its gain after it stands in the table all the same.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout
from robuq_bench.errors import DivergedError
from robuq_bench.judging.evaluation import validation_energy, validation_losses
from robuq_bench.judging.sampling import shard
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.progress import Progress
from robuq_bench.qat import prepare_training
from robuq_bench.runs.run import Run
from robuq_bench.statistics import comparisons
from robuq_bench.survival_figure import survival_pictures
from robuq_bench.trials import adopt_shards, refuse_seed
from studies.survival.choices import (
    Arm,
    Choice,
    arm_name,
    arms_of,
    check_choices,
    chosen,
    overrides_of,
    plan_of,
)
from studies.survival.settings import Settings
from studies.survival.tables import KEPT, survival, verdicts_of

VERSION = "1"
SUMMARY = "What survives QAT? Gains of a dozen design choices before training against after it."
RULE = (
    "A choice's gain is the ratio of geometric means of the normalised distillation loss without "
    "it and with it, over paired training seeds. Before and after training it is judged by this: "
    f"{comparisons.RULE} All of a run's comparisons are one family. Where the gain before training "
    "is better or worse, and the gain after N steps is decided on the same side, the difference of "
    f"its logarithm and {KEPT:.0%} of that before is judged by its paired t interval over seeds, "
    "these tests being a second family with Holm's correction: the gain survives if the interval "
    "lies above 0, on the side of the gain, shrinks if below, and is undecided otherwise. It is "
    "washed out if the gain after them is equivalent to none, reversed if it is "
    "decided on the other side, and undecided otherwise. Survives is “holds”; shrinks, washed out "
    "and reversed are “does not hold”. Where nothing is decided before training there is nothing "
    "to survive: not judged."
)
TIMED_STEPS = 5


class Trial(NamedTuple):
    """One network: an arm, trained so many steps from a seed."""

    arm: Arm
    steps: int
    seed: int

    @property
    def key(self) -> str:
        return f"trial/{arm_name(self.arm)}/{self.steps}/{self.seed}"


def check(config: Config) -> None:
    """Refuse a plan with which a choice says nothing."""
    refuse_seed(config)
    check_choices(config.plan, choices_of(config), config.study)


def choices_of(config: Config) -> list[Choice]:
    """The choices that the settings name."""
    return chosen(config.settings_of(Settings).choices)


def trials_of(config: Config) -> list[Trial]:
    """Every network of the run, or of its shard; whole seeds come after one another."""
    options = config.settings_of(Settings)
    trials = [
        Trial(arm, steps, seed)
        for seed in range(options.seeds)
        for steps in options.budgets
        for arm in arms_of(choices_of(config))
    ]
    return trials if options.shard is None else list(shard(trials, options.shard))


def outlook(config: Config) -> str:
    """What a run would train, and the CPU time it takes by a few timed steps of the plan."""
    trials = trials_of(config)
    steps = sum(trial.steps for trial in trials)
    context = Context.create(device="cpu", progress=Progress(quiet=True))
    data = load_dataset(config.workload.data, name=config.workload.name)
    teacher, _ = load_teacher(config.workload, context.device)
    config = with_budget(config, Trial((), TIMED_STEPS + 1, 0))
    trainer, source, loss_function = prepare_training(config, context, teacher, data)
    training = trainer.train(source, loss_function, TIMED_STEPS + 1)
    next(training)  # the first step is slower
    start = time.process_time()
    for _ in training:
        pass
    seconds = (time.process_time() - start) / TIMED_STEPS
    return (
        f"{len(trials)} networks of {len({trial.arm for trial in trials})} arms, "
        f"{sum(trial.steps > 0 for trial in trials)} of them trained, {steps:,} steps in all: "
        f"about {seconds * steps / 3600:.1f} hours of one CPU core to train, at {seconds:.3f} s a "
        "step of the plan (measured now), and seconds a network to convert and judge it"
    )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Train and judge every network that is missing; compare, judge, draw."""
    options, choices = config.settings_of(Settings), choices_of(config)
    data = load_dataset(config.workload.data, name=config.workload.name)
    teacher, digest = load_teacher(config.workload, context.device)
    run.add_input_digest("teacher", digest)
    run.add_input_digest("data", data.sha256, source=data.source)
    heldout = load_heldout(config.workload.data, name=config.workload.name)
    if heldout is not None:
        run.add_input_digest("heldout", heldout.sha256, source=heldout.source)
    adopt_shards(run, config, "trial")
    train_all(config, run, context, teacher, data, heldout)
    trials = [record for record in run.results() if record["kind"] == "trial"]
    if options.shard is not None:
        return [{"shard": options.shard, "items": len(trials)}]
    run.write_table("trials", trials)
    run.write_table(
        "arms",
        [{"arm": arm_name(arm), "command": command_of(config, arm)} for arm in arms_of(choices)],
    )
    rows, gains, kept = survival(trials, choices, options.budgets)
    run.write_table("survival", rows)
    run.write_table("verdicts", verdicts_of(rows, gains, kept, RULE))
    for steps, picture in survival_pictures(pd.DataFrame(rows), "survival").items():
        picture.save(run.figure_path(f"survival-{steps}"))
    return rows


def command_of(config: Config, arm: Arm) -> str:
    """The command that trains an arm alone, for its samples and FID."""
    texts = "".join(f' --set "{text}"' for text in overrides_of(config.plan, arm))
    return f"train-and-eval --plan {config.plan.name} --on {config.workload.name}{texts}"


def with_budget(config: Config, trial: Trial) -> Config:
    """The config that trains one network."""
    training = config.workload.training.model_copy(update={"steps": trial.steps})
    workload = config.workload.model_copy(update={"training": training})
    plan = plan_of(config.plan, trial.arm, config.study)
    return config.model_copy(update={"seed": trial.seed, "workload": workload, "plan": plan})


def train_all(
    config: Config,
    run: Run,
    context: Context,
    teacher: nn.Module,
    data: ImageData,
    heldout: ImageData | None,
) -> None:
    """Train and judge every network that is not there yet."""
    trials = trials_of(config)
    missing = [trial for trial in trials if not run.has(trial.key)]
    if not missing:
        return
    teacher.requires_grad_(False).eval()
    unseen = data if heldout is None else heldout
    energy = validation_energy(teacher, unseen, config.workload, context.device)
    with context.progress.task("networks", len(trials), len(trials) - len(missing)) as task:
        for trial in missing:
            start = time.perf_counter()
            own = with_budget(config, trial)
            losses: dict[str, float | None] = {"loss": None}
            try:
                student = train(own, context, teacher, data)
            except DivergedError as error:
                context.progress.log(f"{trial.key}: {error}")
            else:
                found = validation_losses(
                    student, teacher, data, own.workload, context.device, heldout
                )
                losses = {"loss": found["distillation_loss"] / energy, **found}
            run.append(
                trial.key,
                kind="trial",
                arm=arm_name(trial.arm),
                steps=trial.steps,
                seed=trial.seed,
                **losses,
                seconds=time.perf_counter() - start,
            )
            task.advance()


def train(config: Config, context: Context, teacher: nn.Module, data: ImageData) -> nn.Module:
    """The averaged weights after all steps of `config`, in eval mode."""
    trainer, source, loss_function = prepare_training(config, context, teacher, data)
    for _ in trainer.train(source, loss_function, config.workload.training.steps):
        pass
    trainer.copy_ema_to(trainer.model)
    return trainer.model.eval()
