"""Train the small classifier whose features a workload's distances are measured in.

`--export FILE` copies the weights with checksum and card: this is how the packaged digits features
were made. Training takes seconds to minutes, so a killed run starts again from the beginning.
"""

from __future__ import annotations

from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import load_dataset
from robuq_bench.judging.features import save_features, train_digits_features
from robuq_bench.runs.run import Run

VERSION = "2"
SUMMARY = "Train a workload's feature network."
USES_TEACHER = False
USES_PLAN = False


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Train the features on the CPU; a row of accuracies and the weights' SHA-256."""
    workload = config.workload
    data = load_dataset(workload.data, name=workload.name)
    run.add_input_digest("data", data.sha256, source=data.source)
    pixels = workload.data.image_size
    with context.progress.task("features", 0) as task:

        def show_epoch(epoch: int, epochs: int, values: dict[str, float]) -> None:
            task.text = f"held-out accuracy {values['heldout_accuracy']:.4f}"
            task.reach(epoch, epochs)

        trained = train_digits_features(
            data, seed=config.seed, input_size=-(-pixels // 8) * 8, progress=show_epoch
        )
    sha256 = save_features(
        run.path / "checkpoints" / "features.safetensors",
        trained,
        name=workload.name,
        # stated with its threads, which the weights' last bits depend on
        command=f"python bench.py train-features --on {workload.name} --seed {config.seed} "
        f"--threads {context.threads}",
    )
    row = {
        "heldout_accuracy": trained.heldout_accuracy,
        "training_accuracy": trained.training_accuracy,
        "heldout_images": trained.heldout_images,
        "sha256": sha256,
    }
    run.write_table("accuracy", [row])
    return [row]
