"""Write the packed model of a run, of a plan applied to a teacher, or of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from robuq_bench.accounting.structure import allocatable, dit_structure
from robuq_bench.config import Config, load_allocation_file
from robuq_bench.context import Context
from robuq_bench.errors import UsageError
from robuq_bench.inference import export_packed, pack_
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_
from robuq_bench.runs.run import open_existing
from robuq_bench.students import load_student


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
    elif plan.needs and not random_weights:
        raise UsageError(
            f"plan {plan.name!r} has methods that see calibration inputs, which `export` has not; "
            f"run `train-and-eval --plan {plan.name}` and export that run"
        )
    elif random_weights:
        context.progress.log("export: random weights; sizes and speeds are real, images are noise")
        model, source = pack_random_(DiT.from_config(workload.model), plan, config.seed), "random"
    else:
        model, digest = load_teacher(workload, context.device)
        source = f"teacher {digest}, not trained after quantization"
        context.progress.log(f"export: plan {plan.name} applied to the teacher, without training")
        convert(model, config, context)
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


def convert(model: nn.Module, config: Config, context: Context) -> None:
    """Quantize the teacher in place, at the bits of the plan's file or else of its rules."""
    plan, chosen = config.plan, config.plan.bits
    if chosen is None:
        quantize_(model, plan, seed=config.seed)
        return
    layers = allocatable(dit_structure(config.workload.model, plan), chosen.of)
    names = [layer.name for layer in layers]
    if chosen.path is not None:
        bits = load_allocation_file(chosen, names)
        by_layer: Any = {
            "bits_by_layer" if chosen.of == "activation" else "weight_bits_by_layer": bits
        }
        quantize_(model, plan, seed=config.seed, **by_layer)
        return
    quantize_(model, plan, seed=config.seed)
    own = sorted({getattr(layer.rule, chosen.of).bits for layer in layers})
    context.progress.log(
        f"export: warning: plan {plan.name} allocates bits of {chosen.of}s in a run, so every "
        f"layer has the {' or '.join(map(str, own))} bits it would start with; export a finished "
        f"run for {chosen.mean:g} bits on average"
    )
