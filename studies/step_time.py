"""What a QAT step costs beside a full-precision step of the same model and batch.

Both are forward, backward, gradient clipping and AdamW on the same batch; the teacher's forward
pass, which distillation adds to any student, is left out. Steps of all models are interleaved, so
that a drift of the machine's speed hits all alike; the ratio is that of the medians, with the
ratio of the minima beside it as the quiet-machine figure.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from robuq_bench.config import Config, Plan, load_plan
from robuq_bench.context import Context
from robuq_bench.diffusion import Diffusion
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_
from robuq_bench.runs.run import Run
from robuq_bench.training import BatchSource, Trainer, denoising_loss

VERSION = "1"
SUMMARY = "Cost of a QAT step beside a full-precision step."
LEGEND = (
    "A step: forward, backward, clipping and AdamW on one batch, without the teacher's forward. "
    "ratio_of_medians, ratio_of_minima: over plan fp, whose steps took turns with the others."
)
USES_DATA = False
PLANS = ("a4", "a2-uniform", "baseline-a4", "bitnetv2-a4")
WARMUP_STEPS = 3
TIMED_STEPS = 20
# adaLN-Zero starts every block as the identity; a trained model's gates are open.
GATE_STD = 0.1


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Time the full-precision model, `config.plan` and the standard plans; one row each."""
    plans = [config.plan, *(load_plan(name) for name in PLANS if name != config.plan.name)]
    models: dict[str, Plan] = {"fp": load_plan("fp")}
    models |= {plan.name: plan for plan in plans if not plan.is_full_precision}
    steps = {name: make_step(config, plan, context) for name, plan in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with context.progress.task("step-time", WARMUP_STEPS + TIMED_STEPS) as task:
        for repetition in range(WARMUP_STEPS + TIMED_STEPS):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if context.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if repetition >= WARMUP_STEPS:
                    seconds[name].append(time.perf_counter() - start)
            task.advance()
    rows = [row(name, times, seconds["fp"], config, context) for name, times in seconds.items()]
    for item in rows:
        run.append(f"step-time/{item['plan']}", kind="step-time", **item)
    run.write_table("step_time", rows)
    return rows


def make_step(config: Config, plan: Plan, context: Context) -> Any:
    """Return a function that runs one training step of the model under `plan`."""
    workload = config.workload
    recipe = workload.training
    torch.manual_seed(config.seed)
    model = DiT.from_config(workload.model)
    for index in range(len(model.blocks)):
        weight = model.get_parameter(f"blocks.{index}.adaLN_modulation.1.weight")
        nn.init.normal_(weight, std=GATE_STD)
    nn.init.normal_(model.final_layer.linear.weight, std=GATE_STD)
    quantize_(model, plan, seed=config.seed)
    model.to(context.device)
    shape = (recipe.batch_size, workload.data.channels, *[workload.data.image_size] * 2)
    diffusion = Diffusion.from_config(workload.diffusion)
    source = BatchSource(
        torch.rand(shape) * 2 - 1,
        torch.arange(recipe.batch_size) % workload.data.num_classes,
        diffusion,
        model,
        batch_size=recipe.batch_size,
        seed=config.seed,
        stream="step-time",
        device=context.device,
    )
    trainer = Trainer(model, recipe, context.device)
    steps = trainer.train(source, denoising_loss(diffusion), WARMUP_STEPS + TIMED_STEPS)
    return lambda: next(steps)


def row(
    name: str, times: list[float], reference: list[float], config: Config, context: Context
) -> dict[str, Any]:
    """Medians in milliseconds and the ratios to full precision."""
    quartiles = statistics.quantiles(times, n=4)
    return {
        "plan": name,
        "batch_size": config.workload.training.batch_size,
        "device": context.device,
        "threads": context.threads,
        "median_ms": statistics.median(times) * 1e3,
        "p25_ms": quartiles[0] * 1e3,
        "p75_ms": quartiles[2] * 1e3,
        "min_ms": min(times) * 1e3,
        "ratio_of_medians": statistics.median(times) / statistics.median(reference),
        "ratio_of_minima": min(times) / min(reference),
    }
