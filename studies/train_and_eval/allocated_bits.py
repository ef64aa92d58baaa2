"""Who gets how many bits: a plan's `[bits]`, measured, solved and recorded in a run."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from robuq_bench import sensitivity
from robuq_bench.accounting.structure import dit_layer_inputs, dit_layer_macs, dit_layer_weights
from robuq_bench.allocation import Allocation, headroom, mean_bits, mean_bits_by_type
from robuq_bench.allocation.costs import Cost, activation_bytes_cost, mac_cost
from robuq_bench.allocation.problem import allocation_problem
from robuq_bench.allocation.solvers import solve
from robuq_bench.config import Config, Workload, load_allocation_file
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData
from robuq_bench.qat import convert_teacher, metric_batches
from robuq_bench.quantization.convert import allocatable_layers, quantize_, quantized_layers
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity import MetricOptions
from robuq_bench.sensitivity.weights import weight_epsilon_mse
from robuq_bench.stopwatch import Stopwatch


def activation_bits(
    config: Config,
    run: Run,
    context: Context,
    student: nn.Module,
    teacher: nn.Module,
    data: ImageData,
) -> dict[str, int]:
    """Activation bits of every layer that has some to choose: as the rules say, from a file, or
    by the plan's metric (measured on the student as it is, resumable) and solver."""
    plan = config.plan
    if not run.has("allocation"):
        layers = allocatable_layers(student)
        present = {
            name: layer.activation_bits or 0 for name, layer in quantized_layers(student).items()
        }
        bits, found, gain = {name: present[name] for name in layers}, None, None
        if plan.bits is not None and plan.bits.path is not None:
            bits = load_allocation_file(plan.bits, layers)
        elif plan.bits is not None:
            choices = plan.bits.choices
            batches = metric_batches(config, context, data)
            options = MetricOptions(
                teacher=teacher, loss=sensitivity.distillation_loss(teacher), seed=config.seed
            )
            metric = sensitivity.metric_named(plan.bits.metric).bind(options)

            def measure(done: Any, on_item: Any) -> Any:
                return metric(student, layers, choices, batches, done=done, on_item=on_item)

            found, gain = solved(config, run, context, layers, measure)
            bits = found.bits_by_layer
        if bits:  # of a plan that quantizes weights alone there are none
            record_allocation(run, config.workload, bits, found, gain)
    return dict((run.get("allocation") or {}).get("bits_by_layer", {}))


def allocated_weight_bits(
    config: Config, run: Run, context: Context, teacher: nn.Module, data: ImageData
) -> dict[str, int]:
    """Weight bits of every layer that has some to choose, from a file or by metric and solver."""
    bits_config = config.plan.bits
    assert bits_config is not None
    if not run.has("allocation"):
        found = gain = None
        blank = copy.deepcopy(teacher)
        quantize_(blank, config.plan, seed=config.seed, blank=True)
        layers = allocatable_layers(blank, of="weight")
        if bits_config.path is not None:
            bits = load_allocation_file(bits_config, layers)
        else:
            folder = run.path / "checkpoints" / "calibration"
            # Each layer is measured alone, so none may be fitted to coarser ones before it.
            alone = config.plan.calibration.model_copy(update={"quantized_predecessors": False})
            plan = config.plan.model_copy(update={"calibration": alone})
            own = config.model_copy(update={"plan": plan})
            watch = Stopwatch()
            variants = {
                choice: convert_teacher(
                    own,
                    context,
                    teacher,
                    data,
                    folder / f"{choice}-bits",
                    dict.fromkeys(layers, choice),
                ).eval()
                for choice in bits_config.choices
            }
            if plan.needs and not run.has("calibration/choices"):
                run.append("calibration/choices", kind="calibration", **watch.lap())
            batches = metric_batches(config, context, data)
            reference = teacher if bits_config.metric == "epsilon_mse_teacher" else None

            def measure(done: Any, on_item: Any) -> Any:
                return weight_epsilon_mse(
                    variants, layers, batches, reference=reference, done=done, on_item=on_item
                )

            found, gain = solved(config, run, context, layers, measure)
            bits = found.bits_by_layer
        record_allocation(run, config.workload, bits, found, gain, of="weight")
    return dict((run.get("allocation") or {}).get("bits_by_layer", {}))


def solved(
    config: Config, run: Run, context: Context, layers: list[str], measure: Any
) -> tuple[Allocation, float | None]:
    """Measure s_l(b) (resumable), solve for the plan's mean; the bits and their `headroom`."""
    bits_config = config.plan.bits
    assert bits_config is not None
    done: dict[str, dict[int, float]] = {}
    for record in run.results():
        if record["kind"] == "sensitivity":
            done.setdefault(record["layer"], {})[record["bits"]] = record["mse"]
    total = len(layers) * len(bits_config.choices)
    with context.progress.task("sensitivity", total, sum(map(len, done.values()))) as task:
        watch = Stopwatch()

        def on_item(layer: str, bits: int, value: float) -> None:
            run.append(
                f"sensitivity/{layer}/{bits}",
                kind="sensitivity",
                layer=layer,
                bits=bits,
                mse=value,
                **watch.lap(),
            )
            task.advance()

        table = measure(done, on_item)
    cost, macs = cost_of(config, layers)
    problem = allocation_problem(table, macs, [cost], bits_config.choices)
    found = solve(problem, bits_config.solver, seed=config.seed)
    return found, headroom(table, found, bits_config.mean or 0)


def cost_of(config: Config, layers: list[str]) -> tuple[Cost, dict[str, int]]:
    """What the allocation may spend, and MACs by layer."""
    bits, model = config.plan.bits, config.workload.model
    assert bits is not None
    assert bits.mean is not None
    macs = {name: dit_layer_macs(model)[name] for name in layers}
    if bits.cost == "inputs":
        inputs = {name: dit_layer_inputs(model)[name] for name in layers}
        return activation_bytes_cost(inputs, bits.mean * sum(inputs.values()) / 8), macs
    if bits.cost == "weights":
        return mac_cost({name: dit_layer_weights(model)[name] for name in layers}, bits.mean), macs
    return mac_cost(macs, bits.mean), macs


def record_allocation(
    run: Run,
    workload: Workload,
    bits: dict[str, int],
    found: Allocation | None,
    gain: float | None,
    of: str = "activation",
) -> None:
    """Append the allocation: MACs, means per layer type and, if `found`, solver and headroom."""
    all_macs = dit_layer_macs(workload.model)
    macs = {name: all_macs[name] for name in bits}
    run.append(
        "allocation",
        kind="allocation",
        of=of,
        bits_by_layer=bits,
        macs=macs,
        mean_bits=mean_bits(bits, macs),
        objective=found and found.objective,
        solver=found and found.solver,
        headroom=gain,
        by_type=mean_bits_by_type(bits),
    )
