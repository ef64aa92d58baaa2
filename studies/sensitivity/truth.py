"""The ground truth of sensitivity: train with one layer at b bits, and look at what comes out.

Compared is, per seed, with the same layer unquantized in training; every other layer has the plan's
bits. The plan's own bits are thus a width like any other, of the training that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.judging.sampling import shard
from robuq_bench.runs.run import Run
from robuq_bench.trials import TARGETS, Judge, adopt_shards, metric_key, train_trial
from studies.sensitivity.settings import Settings

BASELINE = "none"


class Item(NamedTuple):
    """One training: `layer` (or "none") at `bits`, everything else at the plan's bits.

    Bits of None are a layer with unquantized activations.
    """

    layer: str
    bits: int | None
    seed: int

    @property
    def key(self) -> str:
        """Its key in the run's records."""
        return f"truth/{self.layer}/{self.bits or 'unquantized'}/{self.seed}"


def truth_items(layers: list[str], bits: tuple[int, ...], seeds: int, plan_bits: int) -> list[Item]:
    """Every item, seed by seed, so that a stopped study has whole seeds."""
    items = []
    for seed in range(seeds):
        items.append(Item(BASELINE, plan_bits, seed))
        items += [Item(layer, b, seed) for b in (None, *bits) for layer in layers]
    return items


def measure_truth(
    config: Config, run: Run, context: Context, judge: Judge, layers: list[str]
) -> None:
    """Train and judge every item of this shard that neither this run nor another shard has."""
    options = config.settings_of(Settings)
    plan_bits = config.plan.uniform_bits
    assert plan_bits is not None  # see the study's check
    items = truth_items(layers, options.truth_bits, options.truth_seeds, plan_bits)
    if options.shard is not None:
        items = list(shard(items, options.shard))
    else:
        adopt_shards(run, config, "truth")
    missing = [item for item in items if not run.has(item.key)]
    with context.progress.task("ground truth", len(items), len(items) - len(missing)) as task:
        for item in missing:
            bits = {} if item.layer == BASELINE else {item.layer: item.bits}
            measured = train_trial(
                config,
                context,
                judge,
                bits,
                seed=item.seed,
                steps=options.truth_steps,
                with_untrained=True,
            )
            run.append(item.key, kind="truth", **item._asdict(), **measured)
            task.advance()


def truth_differences(
    run: Run, targets: Iterable[str] = TARGETS
) -> dict[str, dict[str, dict[int, list[float]]]]:
    """{target: {layer: {bits: [increase of each seed]}}} over the layer unquantized, in order.

    Bits are the truth's and the plan's own. The target "fid" is the workload's FID in whatever
    feature space it names.
    """
    records = [record for record in run.results() if record["kind"] == "truth"]
    records.sort(key=lambda record: record["seed"])
    unquantized = {(r["layer"], r["seed"]): r for r in records if r["bits"] is None}
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        if record["bits"] is None:
            continue
        own = [layer for layer, seed in unquantized if seed == record["seed"]]
        layers = own if record["layer"] == BASELINE else [record["layer"]]
        for layer in layers:
            least = unquantized[layer, record["seed"]]
            for target in targets:
                name = metric_key(record, target)
                if name is not None:
                    by_layer = found.setdefault(target, {}).setdefault(layer, {})
                    change = record[name] - least[name]
                    by_layer.setdefault(record["bits"], []).append(change)
    return found
