"""Write the packed model of a run, of a plan applied to a teacher, or of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from robuq_bench.config import Config, load_allocation_file
from robuq_bench.context import Context
from robuq_bench.errors import UsageError
from robuq_bench.inference import export_packed, pack_
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, set_activation_bits
from robuq_bench.runs.run import open_existing
from studies.sample_images import load_student


def run_export(
    config: Config,
    context: Context,
    *,
    run: Path | None,
    random_weights: bool,
    storage: str,
    target: Path,
) -> list[dict[str, Any]]:
    """Export to `target` and return every byte of it by what it holds.

    Args:
        config: its plan and workload are used where no run is given.
        context: where to convert; logs what is done.
        run: folder of a finished train-and-eval run, whose averaged-weights student is packed.
        random_weights: pack random codes of the plan's shapes, with no teacher at all.
        storage: as `export_packed` takes it.
        target: the file.

    Raises:
        UsageError: the plan quantizes nothing, or needs a run to have bits.
        MissingResourceError: the workload's teacher is not here.
    """
    model: nn.Module
    plan, workload = config.plan, config.workload
    if run is not None:
        finished = open_existing(run)
        plan, workload = finished.config.plan, finished.config.workload
        model, source = load_student(finished.path, workload), finished.id
        context.progress.log(f"export: averaged weights of {source}")
    elif plan.is_full_precision:
        raise UsageError(f"plan {plan.name!r} is full precision; there is nothing to pack")
    elif random_weights:
        context.progress.log("export: random weights; sizes and speeds are real, images are noise")
        model, source = pack_random_(DiT.from_config(workload.model), plan, config.seed), "random"
    else:
        model, digest = load_teacher(workload, context.device)
        source = f"teacher {digest}, not trained after quantization"
        context.progress.log(f"export: plan {plan.name} applied to the teacher, without training")
        quantize_(model, plan, seed=config.seed)
        if plan.allocation.method == "ampn":
            context.progress.log(
                f"export: warning: plan {plan.name} allocates bits during training, so every layer "
                f"has the {plan.activations.bits} bits it would start with; export a finished run "
                f"for {plan.allocation.mean_bits:g} bits on average"
            )
        if plan.allocation.method == "file":
            bits = load_allocation_file(plan.allocation, allocatable_layers(model, plan))
            set_activation_bits(model, bits)
    if not random_weights:
        pack_(model.eval())
    return export_packed(
        model.cpu(),
        target,
        plan=plan,
        model_config=workload.model,
        storage=storage,
        source=source,
    )
