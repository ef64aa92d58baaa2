"""Do the sensitivities of the post-training-quantized model mislead? Metrics against the truth.

RobuQ says that layers which look bad after post-training quantization recover in training, so that
sensitivities must be measured after about 1,000 steps of it. The truth is what training itself
says: for every layer and bit width, networks trained with that layer alone at those bits
(`studies/ground_truth.py`), three seeds each. A metric is good if it orders layers as the truth
does.

**Verdict rule, fixed before any number was seen.** At one bit width, with the increase of the
distillation loss as the truth, let G be Spearman's rho of the end-to-end epsilon-MSE after K steps
minus that of the same metric before training, with its 95 % interval from resampling layers.
*PTQ sensitivities mislead* holds if the interval lies above 0, does not hold if it lies below 0.05
(training improves the order by less than 0.05 at best), and is undecided otherwise. K is the
largest of `qat_steps`. The ceiling, how well one seed's truth orders layers as the mean of the
others, is reported beside every rho: no metric can be expected above it.

The allocator adds up sensitivities, so additivity is checked too: random pairs of layers, and whole
random allocations, predicted by the sum against measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from robuq_bench.allocation import mean_bits
from robuq_bench.checkpointing import CheckpointStore, load_tensors
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError
from robuq_bench.model_structure import dit_layer_macs
from robuq_bench.quantization.convert import (
    allocatable_layers,
    layer_type,
    quantized_layers,
    set_activation_bits,
)
from robuq_bench.runs import Run
from robuq_bench.sensitivity import (
    METRICS,
    MetricOptions,
    ModelInputs,
    agreement_gain,
    by_timestep,
    calibration_set,
    distillation_loss,
    rank_agreement,
    recovered_layers,
)
from robuq_bench.sensitivity.probing import evaluation_mode, predict
from studies.ground_truth import measure_truth, truth_differences
from studies.train_and_eval import prepare_training, train_with_checkpoints
from studies.trials import Judge, make_judge

VERSION = "1"
SUMMARY = "Do sensitivities of the post-training-quantized model mislead? Metrics against training."
MAIN_METRIC, MAIN_TARGET = "epsilon_mse", "distillation_loss"
#: What counts as no worthwhile gain in rank correlation.
NO_GAIN = 0.05

Table = dict[str, dict[int, float]]


def run(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Measure the truth (or this shard of it), the metrics, and how they agree."""
    options = config.sensitivity
    if options is None:
        raise UsageError("study sensitivity needs its settings; resolve the config for it")
    judge = make_judge(config, run, context, options.truth_samples, options.truth_sampling_steps)
    trainer, source, loss_function = prepare_training(config, context, judge.teacher, judge.data)
    layers = allocatable_layers(trainer.model, config.plan)
    measure_truth(config, run, context, judge, layers)
    if options.shard is not None:
        done = [record for record in run.results() if record["kind"] == "truth"]
        return [{"shard": options.shard, "items": len(done)}]

    batches = calibration(config, judge, context)
    store = CheckpointStore(run.checkpoint_folder / "training", keep=len(options.qat_steps) + 1)
    for steps in options.qat_steps:
        if steps in store.steps():
            trainer.load_state(steps, load_tensors(store.path(steps))[0], str(store.path(steps)))
        train_with_checkpoints(
            trainer, source, loss_function, steps, run, store, context, phase="metrics"
        )
        measure_metrics(config, run, context, judge, trainer.model, layers, batches, steps)
        measure_interactions(config, run, context, trainer.model, layers, batches, steps)
    return summarise(config, run, layers)


def calibration(config: Config, judge: Judge, context: Context) -> list[ModelInputs]:
    """The batches that every metric sees."""
    return list(
        calibration_set(
            judge.data.model_inputs(torch.arange(len(judge.data))).to(context.device),
            judge.data.labels,
            Diffusion.from_config(config.workload.diffusion),
            num_samples=config.workload.training.calibration_samples,
            batch_size=config.workload.evaluation.batch_size,
            seed=config.seed,
        )
    )


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
    options = config.sensitivity
    assert options is not None
    bound = MetricOptions(
        teacher=judge.teacher, loss=distillation_loss(judge.teacher), seed=config.seed
    )
    with context.progress.task(f"metrics after {steps} steps", len(METRICS) + 1) as task:
        for count, metric in enumerate(METRICS.values(), start=1):
            task.update(metric.label)
            key = f"metric/{steps}/{metric.name}"
            if not run.has(key):
                values = metric.bind(bound)(model, layers, options.bit_choices, batches)
                run.append(key, kind="metric", steps=steps, metric=metric.name, values=values)
            task.advance(count)
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
        task.advance(len(METRICS) + 1)


def measure_interactions(
    config: Config,
    run: Run,
    context: Context,
    model: nn.Module,
    layers: list[str],
    batches: list[ModelInputs],
    steps: int,
) -> None:
    """Change of the prediction when several layers drop at once, beside the sum of each alone."""
    options = config.sensitivity
    assert options is not None
    alone = metric_table(run, steps, MAIN_METRIC)
    before = {name: layer.activation_bits for name, layer in quantized_layers(model).items()}
    present = config.plan.activations.bits
    lower = [bits for bits in options.bit_choices if bits < present]
    if not lower or len(layers) < 2:
        return
    draw = np.random.default_rng([config.seed, steps])
    macs = dit_layer_macs(config.workload.model)
    wanted: list[tuple[str, dict[str, int]]] = []
    for index in range(options.pairs):
        pair = draw.choice(len(layers), 2, replace=False)
        bits = {layers[i]: int(draw.choice(lower)) for i in pair}
        wanted.append((f"pair/{steps}/{index}", bits))
    for index in range(options.allocations):
        bits = {layer: int(draw.choice(options.bit_choices)) for layer in layers}
        wanted.append((f"whole/{steps}/{index}", bits))
    missing = [(key, bits) for key, bits in wanted if not run.has(key)]
    label = f"additivity after {steps} steps"
    with evaluation_mode(model), torch.no_grad(), context.progress.task(label, len(missing)) as t:
        reference = [predict(model, batch) for batch in batches]
        for done, (key, bits) in enumerate(missing, start=1):
            set_activation_bits(model, {**before, **bits})
            actual = _mean_squared_change(model, batches, reference)
            set_activation_bits(model, before)
            predicted = sum(alone[layer][b] for layer, b in bits.items())
            run.append(
                key,
                kind="interaction",
                steps=steps,
                layers=len(bits),
                bits_by_layer=bits,
                mean_bits=mean_bits({**dict.fromkeys(layers, present), **bits}, macs),
                predicted=predicted,
                actual=actual,
            )
            t.advance(done)


def _mean_squared_change(
    model: nn.Module, batches: list[ModelInputs], reference: list[torch.Tensor]
) -> float:
    total = sum(
        float((predict(model, batch) - eps).double().square().sum())
        for batch, eps in zip(batches, reference, strict=True)
    )
    return total / sum(eps.numel() for eps in reference)


def metric_table(run: Run, steps: int, metric: str) -> Table:
    """A recorded metric as {layer: {bits: value}}."""
    record = run.get(f"metric/{steps}/{metric}") or {}
    return {
        layer: {int(bits): value for bits, value in by_bits.items()}
        for layer, by_bits in record["values"].items()
    }


def summarise(config: Config, run: Run, layers: list[str]) -> list[dict[str, Any]]:
    """Write the tables from the run's records, and return the headline."""
    options = config.sensitivity
    assert options is not None
    differences = truth_differences(run)
    truth = {
        target: {
            layer: {bits: float(np.mean(values)) for bits, values in by_bits.items()}
            for layer, by_bits in by_layer.items()
        }
        for target, by_layer in differences.items()
    }
    run.write_table("truth", truth_rows(differences))
    run.write_table("ceiling", ceiling_rows(differences, options.truth_bits))
    metric_rows, agreement_rows = [], []
    for steps in options.qat_steps:
        for metric in METRICS:
            table = metric_table(run, steps, metric)
            for layer, by_bits in table.items():
                for bits, value in by_bits.items():
                    fields = {"steps": steps, "metric": metric, "layer": layer}
                    kind = layer_type(layer)
                    metric_rows.append({**fields, "layer_type": kind, "bits": bits, "value": value})
            for target, by_layer in truth.items():
                for width in (*options.truth_bits, None):
                    agreement_rows.append(
                        {
                            "steps": steps,
                            "metric": metric,
                            "target": target,
                            **agreement_fields(config, table, by_layer, width),
                        }
                    )
    run.write_table("metrics", metric_rows)
    run.write_table("agreement", agreement_rows)
    run.write_table("verdicts", verdict_rows(config, run, truth[MAIN_TARGET]))
    recovered = recovered_rows(config, run, truth[MAIN_TARGET])
    if recovered:
        run.write_table("recovered", recovered)
    run.write_table("timesteps", timestep_rows(run))
    interactions = interaction_rows(run)
    if interactions:
        run.write_table("interactions", interactions)
    headline = []
    for row in agreement_rows:
        if row["target"] == MAIN_TARGET and row["bits"] == "all":
            names = ("metric", "steps", "spearman", "spearman_low", "spearman_high", "kendall")
            headline.append({name: row[name] for name in names})
    return headline


def agreement_fields(
    config: Config, table: Table, truth: Table, bits: int | None
) -> dict[str, Any]:
    """Rank agreement at one bit width, or over all pairs of layer and bits, as columns."""
    options = config.sensitivity
    assert options is not None
    found = rank_agreement(
        table,
        truth,
        bits=bits,
        top=(options.top_k,),
        resamples=options.bootstrap_draws,
        seed=config.seed,
    )
    return {
        "bits": "all" if bits is None else bits,
        "items": found.items,
        "spearman": found.spearman.value,
        "spearman_low": found.spearman.low,
        "spearman_high": found.spearman.high,
        "kendall": found.kendall.value,
        "kendall_low": found.kendall.low,
        "kendall_high": found.kendall.high,
        "top_k": options.top_k,
        "top_k_overlap": found.overlap.get(options.top_k),
        "resamples": options.bootstrap_draws,
        "seed": config.seed,
    }


def verdict_rows(config: Config, run: Run, truth: Table) -> list[dict[str, Any]]:
    """Apply the rule of this module at every bit width of the truth, and over all of them."""
    options = config.sensitivity
    assert options is not None
    last = options.qat_steps[-1]
    before, after = (metric_table(run, steps, MAIN_METRIC) for steps in (0, last))
    rows = []
    for bits in (*options.truth_bits, None):
        gain = agreement_gain(
            after, before, truth, bits=bits, resamples=options.bootstrap_draws, seed=config.seed
        )
        if gain.value is None or gain.low is None or gain.high is None:
            verdict = "undecided"
        elif gain.low > 0:
            verdict = "holds"
        else:
            verdict = "does not hold" if gain.high < NO_GAIN else "undecided"
        rows.append(
            {
                "bits": "all" if bits is None else bits,
                "metric": MAIN_METRIC,
                "target": MAIN_TARGET,
                "steps_before": 0,
                "steps_after": last,
                "gain": gain.value,
                "low": gain.low,
                "high": gain.high,
                "ptq_sensitivities_mislead": verdict,
            }
        )
    return rows


def truth_rows(
    differences: Mapping[str, Mapping[str, Mapping[int, list[float]]]],
) -> list[dict[str, Any]]:
    """One row per target, layer and bits: mean and spread over seeds of the paired increase."""
    return [
        {
            "target": target,
            "layer": layer,
            "layer_type": layer_type(layer),
            "bits": bits,
            "increase": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "seeds": len(values),
        }
        for target, by_layer in differences.items()
        for layer, by_bits in by_layer.items()
        for bits, values in by_bits.items()
    ]


def ceiling_rows(
    differences: Mapping[str, Mapping[str, Mapping[int, list[float]]]], truth_bits: tuple[int, ...]
) -> list[dict[str, Any]]:
    """How well each seed's truth orders layers as the mean of the other seeds."""
    rows = []
    for target, by_layer in differences.items():
        seeds = min(len(values) for by_bits in by_layer.values() for values in by_bits.values())
        for left_out in range(seeds if seeds > 1 else 0):
            one: Table = {}
            rest: Table = {}
            for layer, by_bits in by_layer.items():
                one[layer] = {bits: values[left_out] for bits, values in by_bits.items()}
                rest[layer] = {
                    bits: float(np.mean([v for i, v in enumerate(values) if i != left_out]))
                    for bits, values in by_bits.items()
                }
            for bits in (*truth_bits, None):
                found = rank_agreement(one, rest, bits=bits, resamples=1)
                rows.append(
                    {
                        "target": target,
                        "bits": "all" if bits is None else bits,
                        "seed": left_out,
                        "spearman": found.spearman.value,
                        "kendall": found.kendall.value,
                    }
                )
    return rows


def recovered_rows(config: Config, run: Run, truth: Table) -> list[dict[str, Any]]:
    """Layers that the metric before training puts among the worst and the truth does not."""
    options = config.sensitivity
    assert options is not None
    before = metric_table(run, 0, MAIN_METRIC)
    return [
        {"bits": bits, "top_k": options.top_k, "metric": MAIN_METRIC, "layer": layer}
        for bits in options.truth_bits
        for layer in recovered_layers(before, truth, min(options.top_k, len(truth)), bits=bits)
    ]


def timestep_rows(run: Run) -> list[dict[str, Any]]:
    """The main metric by timestep bucket, low t (little noise) first."""
    return [
        {
            "steps": record["steps"],
            "layer": layer,
            "layer_type": layer_type(layer),
            "bits": int(bits),
            "bucket": bucket,
            "value": value,
        }
        for record in run.results()
        if record["kind"] == "timesteps"
        for layer, by_bits in record["values"].items()
        for bits, values in by_bits.items()
        for bucket, value in enumerate(values)
    ]


def interaction_rows(run: Run) -> list[dict[str, Any]]:
    """Predicted and actual change of every pair and whole allocation."""
    names = ("steps", "layers", "mean_bits", "predicted", "actual")
    return [
        {
            "kind": record["key"].partition("/")[0],
            **{name: record[name] for name in names},
            "ratio": record["actual"] / record["predicted"] if record["predicted"] > 0 else None,
        }
        for record in run.results()
        if record["kind"] == "interaction"
    ]
