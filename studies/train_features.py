"""Train the small classifier whose features a workload's distances are measured in.

`--export FILE` copies the weights with checksum and card: this is how the packaged digits features
were made. Training takes seconds to minutes, so a killed run starts again from the beginning.
"""

from __future__ import annotations

from pathlib import Path

from robuq_bench.config import Config
from robuq_bench.context import Context, RunResult
from robuq_bench.data.datasets import load_dataset
from robuq_bench.judging.features import save_features, train_digits_features
from robuq_bench.runs.run import Run

VERSION = "2"
SUMMARY = "Train a workload's feature network."


def run_train_features(config: Config, root: Path, context: Context) -> RunResult:
    """Train the features on the CPU; return the run with accuracies and the weights' SHA-256."""
    workload = config.workload
    data = load_dataset(workload.data, name=workload.name)
    with (
        Run.open(
            root, config, context.argv,
            force=context.force, device=context.device, threads=context.threads,
        ) as run,
        context.progress.task("features", 0) as task,
    ):  # fmt: skip
        if run.is_done:
            return RunResult.from_run(run)
        run.add_input_digest("data", data.sha256, source=data.source)

        def show_epoch(epoch: int, epochs: int, values: dict[str, float]) -> None:
            task.text = f"held-out accuracy {values['heldout_accuracy']:.4f}"
            task.reach(epoch, epochs)

        pixels = workload.data.image_size
        trained = train_digits_features(
            data, seed=config.seed, input_size=-(-pixels // 8) * 8, progress=show_epoch
        )
        weights = run.path / "checkpoints" / "features.safetensors"
        sha256 = save_features(
            weights,
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
        result = RunResult.store(run, [row])
        run.finish()
    return result
