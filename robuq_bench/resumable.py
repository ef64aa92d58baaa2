"""Training that keeps its state in a run's checkpoints, so that the same command goes on."""

from __future__ import annotations

import json

from torch import nn

from kernels import cpu_library
from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.context import Context
from robuq_bench.errors import CheckpointError
from robuq_bench.quantization.fast_paths import is_compiled
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.runs.interrupts import at_step_boundary
from robuq_bench.runs.run import Run
from robuq_bench.stopwatch import Stopwatch
from robuq_bench.training import BatchSource, LossFunction, Trainer


def resume(trainer: Trainer, store: CheckpointStore, at_most: int | None = None) -> None:
    """Take up the newest checkpoint (no later than step `at_most`) that is ahead of the trainer.

    Raises:
        CheckpointError: none can be loaded, or it was trained by other kernels, see `kernels_of`.
    """
    found = store.load_latest(at_most)
    if found is not None and found[0] > trainer.step:
        step, tensors, metadata = found
        _check_kernels(trainer, metadata.get("kernels", "torch"), str(store.path(step)))
        trainer.load_state(step, tensors, str(store.path(step)))
        trainer.window = json.loads(metadata.get("window", "[]"))
        trainer.unlogged_cost = json.loads(metadata.get("cost", "{}"))


def kernels_of(model: nn.Module) -> str:
    """What computes the quantized layers of a model in training on a CPU: "compiled" or "torch".

    They round differently. The compiled kernels give the same bits on every instruction set.
    """
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return "compiled" if any(is_compiled(layer) for layer in layers) else "torch"


def _check_kernels(trainer: Trainer, recorded: str, origin: str) -> None:
    """Refuse to go on with other kernels: the course of training would be neither's."""
    present = kernels_of(trainer.model)
    if present == recorded:
        return
    variable = cpu_library.PATH_VARIABLE
    if recorded == "compiled":
        reason = f"by the compiled CPU kernels; run python -m kernels.build, or unset {variable}"
    else:
        reason = f"without the compiled CPU kernels; set {variable}=off in the environment"
    raise CheckpointError(
        f"{origin}: trained {reason}, to go on as it began, or start this run afresh with --force"
    )


def train_with_checkpoints(
    trainer: Trainer,
    source: BatchSource,
    loss_function: LossFunction,
    until: int,
    run: Run,
    store: CheckpointStore,
    context: Context,
    *,
    phase: str,
    label: str = "QAT",
    begins_at: int = 0,
) -> None:
    """Train to step `until`, logging window means and saving atomically every N steps.

    Progress is of "`label` `phase`"; records are of `phase`, and count steps from `begins_at`,
    which lies below 0 for what comes before the training proper. They hold the seconds and CPU
    seconds since the record before, of sessions before this one too; what a kill throws away is
    not counted.

    The logging window restarts at each checkpoint, so a resumed run logs the same numbers. When the
    process is asked to end, the step under way is finished and saved, with its window.
    """
    recipe = trainer.recipe
    if trainer.step >= until:
        return
    kernels = kernels_of(trainer.model)
    with (
        at_step_boundary() as asked_to_end,
        context.progress.task(f"{label} {phase}", until, trainer.step) as task,
    ):
        watch = Stopwatch(**trainer.unlogged_cost)
        for values in trainer.train(source, loss_function, until):
            step, window = trainer.step, trainer.window
            window.append(values)
            task.update(f"loss {values['loss']:.4f}")
            task.reach(step)
            if step % recipe.log_every_steps == 0 or step == until:
                counted, cost = begins_at + step, watch.lap()
                key = f"train/{counted:08d}"
                if not run.has(key):
                    means = {k: sum(v[k] for v in window) / len(window) for k in window[0]}
                    run.append(key, kind="train", step=counted, phase=phase, **means, **cost)
                window.clear()
            is_regular = step % recipe.checkpoint_every_steps == 0 or step == until
            if is_regular:
                window.clear()
            ending = asked_to_end()
            if is_regular or ending:
                facts = {
                    "run": run.id,
                    "phase": phase,
                    "window": json.dumps(window),
                    "cost": json.dumps(watch.pause()),
                    "kernels": kernels,
                }
                store.save(step, trainer.state(), facts)
            if ending:
                break
