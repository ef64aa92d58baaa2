"""Tables of `study sensitivity`: the truth, its ceiling, agreement, verdicts, additivity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robuq_bench.accounting.structure import dit_layer_macs
from robuq_bench.allocation import optimal_bits
from robuq_bench.config import Config
from robuq_bench.quantization.convert import layer_type
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity import (
    METRICS,
    agreement_gain,
    rank_agreement,
    recovered_layers,
    seed_agreement,
)
from robuq_bench.statistics.comparisons import judge_family
from robuq_bench.statistics.verdicts import Verdict, verdict_rows
from robuq_bench.trials import UNTRAINED
from studies.sensitivity.settings import Settings
from studies.sensitivity.truth import truth_differences

MAIN_METRIC, MAIN_TARGET = "epsilon_mse", "distillation_loss"
#: What counts as no worthwhile gain in rank correlation.
NO_GAIN = 0.05
#: Agreement between seeds below which the truth is noise and nothing is judged.
MIN_RELIABILITY = 0.3
#: So that the bootstrap's own seed does not decide a verdict.
MIN_RESAMPLES = 20_000

Table = dict[str, dict[int, float]]
Rows = list[dict[str, Any]]
Differences = Mapping[str, Mapping[str, Mapping[int, list[float]]]]  # see `truth_differences`


def metric_table(run: Run, steps: int, metric: str) -> Table:
    """A recorded metric as {layer: {bits: value}}."""
    record = run.get(f"metric/{steps}/{metric}") or {}
    return {
        layer: {int(bits): value for bits, value in by_bits.items()}
        for layer, by_bits in record["values"].items()
    }


def summarise(config: Config, run: Run, rule: str) -> Rows:
    """Write the tables from the run's records, and return the headline.

    `rule` is what verdicts are given by, as text.
    """
    options = config.settings_of(Settings)
    differences = truth_differences(run)
    truth = mean_increases(differences, options.bit_choices)
    main = truth[MAIN_TARGET]
    untrained = mean_increases(truth_differences(run, [UNTRAINED]), options.bit_choices)
    agreement = [
        {
            "steps": steps,
            "metric": metric,
            "target": target,
            **agreement_fields(config, metric_table(run, steps, metric), by_layer, bits),
        }
        for steps in options.qat_steps
        for metric in METRICS
        for target, by_layer in truth.items()
        for bits in (*options.truth_bits, None)
    ]
    ceiling = ceiling_rows(differences, options.truth_bits)
    gains = gain_rows(config, run, main, ceiling)
    tables = {
        "truth": truth_rows(differences),
        "ceiling": ceiling,
        "metrics": metric_rows(config, run),
        "agreement": agreement,
        "gains": gains,
        "verdicts": verdict_rows(judge(gains, len(main)), rule),
        "regret": regret_rows(config, run, main),
        "recovered": recovered_rows(config, run, main),
        "recovery": recovery_rows(untrained[UNTRAINED], main),
        "timesteps": timestep_rows(run),
        "interactions": interaction_rows(run),
    }
    for name, rows in tables.items():
        if rows:
            run.write_table(name, rows)
    names = ("metric", "steps", "spearman", "spearman_low", "spearman_high", "kendall")
    return [
        {name: row[name] for name in names}
        for row in agreement
        if row["target"] == MAIN_TARGET and row["bits"] == "all"
    ]


def mean_increases(differences: Differences, choices: tuple[int, ...]) -> dict[str, Table]:
    """{target: {layer: {bits: mean over seeds}}} at bits among `choices`."""
    return {
        target: {
            layer: {b: float(np.mean(values)) for b, values in by_bits.items() if b in choices}
            for layer, by_bits in by_layer.items()
        }
        for target, by_layer in differences.items()
    }


def metric_rows(config: Config, run: Run) -> Rows:
    """One row per number of steps, metric, layer and bits."""
    return [
        {
            "steps": steps,
            "metric": metric,
            "layer": layer,
            "layer_type": layer_type(layer),
            "bits": bits,
            "value": value,
        }
        for steps in config.settings_of(Settings).qat_steps
        for metric in METRICS
        for layer, by_bits in metric_table(run, steps, metric).items()
        for bits, value in by_bits.items()
    ]


def agreement_fields(
    config: Config, table: Table, truth: Table, bits: int | None
) -> dict[str, Any]:
    """Rank agreement at one bit width, or over all pairs of layer and bits, as columns."""
    options = config.settings_of(Settings)
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


def judge(gains: Rows, layers: int) -> list[Verdict]:
    """Judge the main metric by the rule of `study.py`, over all bit widths first."""
    verdicts = []
    for row in sorted(gains, key=lambda row: row["bits"] != "all"):
        if row["metric"] != MAIN_METRIC:
            continue
        word, p_value, note = "undecided", None, ""
        agreement = row["seed_agreement"]
        if row["gain"] is None:
            word, note = "not judged", "Spearman's ρ is not defined"
        elif row["steps_after"] == row["steps_before"]:
            word, note = "not judged", "nothing was measured after training"
        elif agreement is None or agreement < MIN_RELIABILITY:
            known = "unknown" if agreement is None else f"ρ {agreement:.2f}"
            word, note = "not judged", f"agreement of training seeds: {known}"
        else:
            p_value = min(row["p_none"], row["p_small"])
            if row["low"] > 0:
                word, p_value = "holds", row["p_none"]
            elif row["high"] < NO_GAIN:
                word, p_value = "does not hold", row["p_small"]
        width = (
            "all bit widths"
            if row["bits"] == "all"
            else f"{row['bits']} bit{'s' if row['bits'] > 1 else ''}"
        )
        verdicts.append(
            Verdict(
                claim=f"Sensitivities measured before training mislead: {width}",
                subject=width,
                verdict=word,
                effect=row["gain"],
                effect_name="gain of Spearman’s ρ",
                low=row["low"],
                high=row["high"],
                n=layers,
                n_of="layers",
                test=f"bootstrap over layers, {row['resamples']:,} percentile draws",
                p_value=p_value,
                note=note,
            )
        )
    return judge_family(verdicts)


def gain_rows(config: Config, run: Run, truth: Table, ceiling: Rows) -> Rows:
    """What training adds to every metric's rank correlation with the truth.

    `p_none` and `p_small` are of gains of 0 and of `NO_GAIN`.
    """
    options = config.settings_of(Settings)
    last = options.qat_steps[-1]
    resamples = max(options.bootstrap_draws, MIN_RESAMPLES)
    rows = []
    for metric in METRICS:
        before, after = (metric_table(run, steps, metric) for steps in (0, last))
        for bits in (*options.truth_bits, None):
            gain = agreement_gain(
                after,
                before,
                truth,
                bits=bits,
                resamples=resamples,
                seed=config.seed,
                nulls=(0.0, NO_GAIN),
            )
            p_none, p_small = gain.p_values or (None, None)
            name = "all" if bits is None else bits
            seeds = [
                row["spearman"]
                for row in ceiling
                if row["target"] == MAIN_TARGET and row["bits"] == name
            ]
            known = [value for value in seeds if value is not None]
            rows.append(
                {
                    "bits": name,
                    "metric": metric,
                    "target": MAIN_TARGET,
                    "steps_before": 0,
                    "steps_after": last,
                    "gain": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                    "p_none": p_none,
                    "p_small": p_small,
                    "resamples": resamples,
                    "seed_agreement": float(np.mean(known)) if known else None,
                }
            )
    return rows


def truth_rows(
    differences: Differences,
) -> Rows:
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


def ceiling_rows(differences: Differences, truth_bits: tuple[int, ...]) -> Rows:
    """How well each seed's truth orders layers as the mean of the other seeds."""
    return [
        {
            "target": target,
            "bits": "all" if bits is None else bits,
            "seed": seed,
            "spearman": spearman,
            "kendall": kendall,
        }
        for target, by_layer in differences.items()
        for bits in (*truth_bits, None)
        for seed, (spearman, kendall) in enumerate(seed_agreement(by_layer, bits=bits))
    ]


def regret_rows(config: Config, run: Run, truth: Table) -> Rows:
    """What the exact allocation for each metric loses by the truth, at every budget.

    Bits are those of the truth and the plan's own. `regret` is the summed truth at the bits that
    the metric chooses above the least sum at that mean, `regret_ratio` over it where that is above
    0. `headroom` is what the metric predicts of the same bits everywhere over what it predicts of
    its choice: where it is 1, the metric sees nothing to gain.
    """
    options = config.settings_of(Settings)
    own = config.plan.uniform_bits
    assert own is not None  # see the study's check
    widths = sorted({*options.truth_bits, own} & {*options.bit_choices})
    macs = dit_layer_macs(config.workload.model)
    macs = {layer: macs[layer] for layer in truth}

    def best(table: Table, budget: float) -> dict[str, int]:
        narrowed = {layer: {bits: table[layer][bits] for bits in widths} for layer in truth}
        return optimal_bits(narrowed, macs, budget)

    def total(table: Table, bits: Mapping[str, int]) -> float:
        return sum(table[layer][b] for layer, b in bits.items())

    rows = []
    for budget in widths[1:-1]:
        least = total(truth, best(truth, budget))
        for steps in options.qat_steps:
            for metric in METRICS:
                table = metric_table(run, steps, metric)
                bits = best(table, budget)
                found, predicted = total(truth, bits), total(table, bits)
                uniform = total(table, dict.fromkeys(truth, budget))
                rows.append(
                    {
                        "steps": steps,
                        "metric": metric,
                        "target": MAIN_TARGET,
                        "budget": budget,
                        "increase": found,
                        "least": least,
                        "regret": found - least,
                        "regret_ratio": found / least if least > 0 else None,
                        "headroom": uniform / predicted if predicted > 0 else None,
                    }
                )
    return rows


def recovery_rows(untrained: Table, truth: Table) -> Rows:
    """What training leaves of the increase of the distillation loss, by layer type and bits.

    `untrained` is the increase before training and `truth` the same after it, of the same networks,
    batches and seeds; both are summed over layers. Their ratio is 1 where training changes nothing,
    0 where it makes up for all; there is none where the increase before is not above 0.
    """
    rows = []
    for kind in dict.fromkeys(map(layer_type, truth)):
        layers = [layer for layer in truth if layer_type(layer) == kind]
        for bits in sorted(truth[layers[0]]):
            before, after = (sum(t[layer][bits] for layer in layers) for t in (untrained, truth))
            rows.append(
                {
                    "target": MAIN_TARGET,
                    "layer_type": kind,
                    "bits": bits,
                    "increase_before": before,
                    "increase_after": after,
                    "ratio": after / before if before > 0 else None,
                }
            )
    return rows


def recovered_rows(config: Config, run: Run, truth: Table) -> Rows:
    """Layers that the metric before training puts among the worst and the truth does not."""
    options = config.settings_of(Settings)
    before = metric_table(run, 0, MAIN_METRIC)
    return [
        {"bits": bits, "top_k": options.top_k, "metric": MAIN_METRIC, "layer": layer}
        for bits in options.truth_bits
        for layer in recovered_layers(before, truth, min(options.top_k, len(truth)), bits=bits)
    ]


def timestep_rows(run: Run) -> Rows:
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


def interaction_rows(run: Run) -> Rows:
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
