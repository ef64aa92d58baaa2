"""Train a workload's full-precision teacher, resumable to the bit, and export it.

`--export FILE` copies the averaged weights (safetensors under facebookresearch/DiT's keys) with
their checksum and card: this is how the packaged teacher was made.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from robuq_bench.checkpointing import CheckpointStore, save_tensors
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import load_dataset
from robuq_bench.diffusion import Diffusion
from robuq_bench.loss_figure import plot_losses
from robuq_bench.models.dit import DiT
from robuq_bench.resumable import resume, train_with_checkpoints
from robuq_bench.runs.run import Run
from robuq_bench.training import BatchSource, Trainer, denoising_loss

VERSION = "1"
SUMMARY = "Train a workload's full-precision teacher."
USES_TEACHER = False
USES_PLAN = False


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Train (or continue) the teacher; a row of its final loss and its weights' SHA-256."""
    workload = config.workload
    recipe = workload.teacher.training
    data = load_dataset(workload.data, name=workload.name)
    torch.manual_seed(config.seed)
    model = DiT.from_config(workload.model).to(context.device)
    diffusion = Diffusion.from_config(workload.diffusion)
    run.add_input_digest("data", data.sha256, source=data.source)
    weights = run.path / "checkpoints" / "teacher.safetensors"
    store = CheckpointStore(run.path / "checkpoints" / "training")
    trainer = Trainer(model, recipe, context.device)
    resume(trainer, store)
    source = BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        diffusion,
        model,
        batch_size=recipe.batch_size,
        seed=config.seed,
        stream="teacher",
        device=context.device,
    )
    train_with_checkpoints(
        trainer,
        source,
        denoising_loss(diffusion),
        recipe.steps,
        run,
        store,
        context,
        phase="teacher",
        label="training",
    )
    trainer.copy_ema_to(model)
    metadata = {
        "licence": "Apache-2.0",
        "format": "DiT state dict (facebookresearch/DiT keys), averaged weights",
        "workload": workload.name,
        "model": workload.model.model_dump_json(),
        "training": recipe.model_dump_json(),
        "seed": str(config.seed),
        "data": f"{data.source} sha256 {data.sha256}",
        # stated with its threads, which the weights' last bits depend on
        "command": f"python bench.py train-teacher --on {workload.name} --seed {config.seed} "
        f"--threads {context.threads}",
        "torch": torch.__version__,
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    sha256 = save_tensors(weights, tensors, metadata)
    card = json.dumps({"sha256": sha256, **metadata}, indent=2) + "\n"
    run.write_text("checkpoints/teacher.json", card)
    losses = [record for record in run.results() if record["kind"] == "train"]
    plot_losses(losses).save(run.figure_path("losses"))
    return [
        {
            "steps": recipe.steps,
            "denoising_loss": losses[-1]["denoising_loss"],
            "sha256": sha256,
            "weights": str(weights),
        }
    ]
