"""Train the small classifier whose features a workload's distances are measured in.

`--export FILE` copies the weights with checksum and card: this is how the packaged features were
made, with the command on their card. Training takes seconds to minutes, so a killed run starts
again from the beginning.

All training images are trained on where the workload has held-out ones; elsewhere a share of each
class is kept back.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import load_dataset, load_heldout
from robuq_bench.data.files import SOURCES
from robuq_bench.errors import UsageError
from robuq_bench.judging.feature_recipe import FeatureRecipe
from robuq_bench.judging.features import save_features, train_feature_network
from robuq_bench.runs.run import Run
from studies.train_features.settings import Settings

VERSION = "3"
SUMMARY = "Train a workload's feature network."
USES_TEACHER = False
USES_PLAN = False


def check(config: Config) -> None:
    """Refuse a share to keep back where nothing is kept back."""
    workload, settings = config.workload, config.settings_of(Settings)
    if settings.heldout_fraction == FeatureRecipe().heldout_fraction:
        return
    if load_heldout(workload.data, name=workload.name) is not None:
        raise UsageError(
            f"workload {workload.name!r} has held-out images, so that no share of the others is "
            "kept back; leave out train-features.heldout_fraction"
        )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Train the features on the CPU; a row of accuracies and the weights' SHA-256."""
    workload, settings = config.workload, config.settings_of(Settings)
    data = load_dataset(workload.data, name=workload.name)
    run.add_input_digest("data", data.sha256, source=data.source)
    heldout = load_heldout(workload.data, name=workload.name)
    if heldout is not None:
        run.add_input_digest("heldout", heldout.sha256, source=heldout.source)
    with context.progress.task("features", 0) as task:

        def show_epoch(epoch: int, epochs: int, values: dict[str, float]) -> None:
            task.text = f"held-out accuracy {values['heldout_accuracy']:.4f}"
            task.reach(epoch, epochs)

        trained = train_feature_network(
            data, settings, heldout=heldout, seed=config.seed, progress=show_epoch
        )
    sha256 = save_features(
        run.path / "checkpoints" / "features.safetensors",
        trained,
        name=settings.name or workload.name,
        command=command_of(config, settings, context.threads),
    )
    row = {
        "heldout_accuracy": trained.heldout_accuracy,
        "training_accuracy": trained.training_accuracy,
        "heldout_images": trained.heldout_images,
        "sha256": sha256,
    }
    run.write_table("accuracy", [row])
    return [row]


def command_of(config: Config, settings: Settings, threads: int) -> str:
    """The command that makes the same weights; it states the threads their last bits depend on."""
    changed = settings.model_dump(mode="json", exclude_defaults=True)
    items = [f"train-features.{key}={_toml(value)}" for key, value in changed.items()]
    if config.workload.data.source in SOURCES:
        items = [f"data.source={config.workload.data.source}", "data.path=DIR", *items]
    words = ["python", "bench.py", "train-features", "--on", config.workload.name]
    words += ["--seed", str(config.seed), "--threads", str(threads)]
    return shlex.join([*words, *(word for item in items for word in ("--set", item))])


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
