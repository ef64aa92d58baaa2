"""Do the sensitivities of the post-training-quantized model mislead? Metrics against the truth.

RobuQ says that layers which look bad after post-training quantization recover in training, so that
sensitivities must be measured after about 1,000 steps of it. The truth is what training itself
says: for every layer and bit width, networks trained with that layer alone at those bits
(`truth.py`), three seeds each. A metric is good if it orders layers as the truth does.
`RULE` was fixed before any number was seen, but for what version 3 added: Holm's correction; and
version 2, after a first run that judged a truth that was noise: seeds that agree, 20,000 resamples.
Metrics and truth compare a layer with itself unquantized; up to version 3 with its 4 bits, whose
zero decided allocations that may choose 4 bits.
It is for one metric; `gains.csv` has every metric, after the fact.

The allocator adds up sensitivities, so additivity is checked too: random pairs of layers, and whole
random allocations, predicted by the sum against measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from robuq_bench.accounting.structure import dit_layer_macs
from robuq_bench.allocation import mean_bits
from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import UsageError
from robuq_bench.judging.sampling import evaluation_mode
from robuq_bench.qat import metric_batches, prepare_training
from robuq_bench.quantization.convert import (
    allocatable_layers,
    quantized_layers,
    set_activation_bits,
)
from robuq_bench.resumable import resume, train_with_checkpoints
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity import (
    METRICS,
    MetricOptions,
    ModelInputs,
    by_timestep,
    distillation_loss,
)
from robuq_bench.sensitivity.epsilon import mean_squared_error
from robuq_bench.sensitivity.probing import predict
from robuq_bench.trials import Judge, check_choices, make_judge
from studies.sensitivity.settings import Settings
from studies.sensitivity.tables import (
    MAIN_METRIC,
    MIN_RELIABILITY,
    MIN_RESAMPLES,
    NO_GAIN,
    metric_table,
    summarise,
)
from studies.sensitivity.truth import measure_truth

VERSION = "5"
SUMMARY = "Do sensitivities of the post-training-quantized model mislead? Metrics against training."
RULE = (
    f"At each bit width of the truth, and over all, G is Spearman's ρ of {MAIN_METRIC} with the "
    "increase of the distillation loss after the last of qat_steps, minus the same before "
    f"training, with its 95 % interval from at least {MIN_RESAMPLES:,} resamples of layers. "
    "“Sensitivities measured before training mislead” holds if the interval lies above 0, else "
    f"does not hold if it lies below {NO_GAIN} (training improves the order by less than that), "
    "and is undecided otherwise. Not judged where one seed's truth agrees with the mean of the "
    f"others by a mean ρ below {MIN_RELIABILITY}, or has no others, or where nothing was measured "
    "after training. The verdicts of a run are one family: to hold or not must also survive Holm's "
    f"correction of the bootstrap's p-values, of a gain of 0 and of {NO_GAIN}."
)


def check(config: Config) -> None:
    """Refuse a plan with several activation widths, or with others than the settings ask for."""
    options = config.settings_of(Settings)
    check_choices(config, options.bit_choices, "sensitivity.bit_choices")
    own = config.plan.uniform_bits
    if own is None:
        raise UsageError(
            f"study sensitivity compares with one activation width, and the layers of plan "
            f"{config.plan.name!r} have several; name a plan with one, such as --plan a4"
        )
    if own in options.truth_bits:
        others = [bits for bits in options.truth_bits if bits != own]
        raise UsageError(
            f"plan {config.plan.name!r} has {own} bits already, so that the truth at {own} bits "
            f"comes with that of the others; --set sensitivity.truth_bits={others}"
        )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Measure the truth (or this shard of it), the metrics, and how they agree."""
    options = config.settings_of(Settings)
    judge = make_judge(config, run, context, options.truth_samples, options.truth_sampling_steps)
    trainer, source, loss_function = prepare_training(config, context, judge.teacher, judge.data)
    layers = allocatable_layers(trainer.model)
    measure_truth(config, run, context, judge, layers)
    if options.shard is not None:
        done = [record for record in run.results() if record["kind"] == "truth"]
        return [{"shard": options.shard, "items": len(done)}]

    batches = metric_batches(config, context, judge.data)
    store = CheckpointStore(run.checkpoint_folder / "training", keep=len(options.qat_steps) + 1)
    for steps in options.qat_steps:
        resume(trainer, store, at_most=steps)
        train_with_checkpoints(
            trainer, source, loss_function, steps, run, store, context, phase="metrics"
        )
        measure_metrics(config, run, context, judge, trainer.model, layers, batches, steps)
        measure_interactions(config, run, context, trainer.model, layers, batches, steps)
    return summarise(config, run, RULE)


def measure_metrics(
    config: Config,
    run: Run,
    context: Context,
    judge: Judge,
    model: nn.Module,
    layers: list[str],
    batches: list[ModelInputs],
    steps: int,
) -> None:
    """Every metric of the model after `steps` steps; the main one also by timestep."""
    options = config.settings_of(Settings)
    bound = MetricOptions(
        teacher=judge.teacher, loss=distillation_loss(judge.teacher), seed=config.seed
    )
    with context.progress.task(f"metrics after {steps} steps", len(METRICS) + 1) as task:
        for metric in METRICS.values():
            task.update(metric.label)
            key = f"metric/{steps}/{metric.name}"
            if not run.has(key):
                values = metric.bind(bound)(model, layers, options.bit_choices, batches)
                run.append(key, kind="metric", steps=steps, metric=metric.name, values=values)
            task.advance()
        key = f"timesteps/{steps}"
        if not run.has(key):
            by_bucket = by_timestep(
                METRICS[MAIN_METRIC].bind(bound),
                model,
                layers,
                options.bit_choices,
                batches,
                buckets=options.timestep_buckets,
                num_train_timesteps=config.workload.diffusion.num_train_timesteps,
            )
            run.append(key, kind="timesteps", steps=steps, values=by_bucket)
        task.advance()


def measure_interactions(
    config: Config,
    run: Run,
    context: Context,
    model: nn.Module,
    layers: list[str],
    batches: list[ModelInputs],
    steps: int,
) -> None:
    """Change of the prediction when several layers are quantized, beside the sum of each alone."""
    options = config.settings_of(Settings)
    alone = metric_table(run, steps, MAIN_METRIC)
    before = {name: layer.activation_bits for name, layer in quantized_layers(model).items()}
    present = {layer: before[layer] or 0 for layer in layers}
    if len(layers) < 2:
        return
    draw = np.random.default_rng([config.seed, steps])
    macs = dit_layer_macs(config.workload.model)
    wanted: list[tuple[str, dict[str, int]]] = []
    for index in range(options.pairs):
        pair = draw.choice(len(layers), 2, replace=False)
        bits = {layers[i]: int(draw.choice(options.bit_choices)) for i in pair}
        wanted.append((f"pair/{steps}/{index}", bits))
    for index in range(options.allocations):
        bits = {layer: int(draw.choice(options.bit_choices)) for layer in layers}
        wanted.append((f"whole/{steps}/{index}", bits))
    missing = [(key, bits) for key, bits in wanted if not run.has(key)]
    label = f"additivity after {steps} steps"
    with evaluation_mode(model), torch.no_grad(), context.progress.task(label, len(missing)) as t:
        for key, bits in missing:
            set_activation_bits(model, {**before, **dict.fromkeys(bits)})
            reference = [predict(model, batch) for batch in batches]
            set_activation_bits(model, {**before, **bits})
            actual = mean_squared_error(model, batches, reference)
            set_activation_bits(model, before)
            predicted = sum(alone[layer][b] for layer, b in bits.items())
            run.append(
                key,
                kind="interaction",
                steps=steps,
                layers=len(bits),
                bits_by_layer=bits,
                mean_bits=mean_bits({**present, **bits}, macs),
                predicted=predicted,
                actual=actual,
            )
            t.advance()
