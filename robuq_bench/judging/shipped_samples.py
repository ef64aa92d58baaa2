"""Samples of a packaged teacher that come with it, so that no first run has to draw them.

They are images, not metrics: what they are judged by, features and data included, is computed in
every run. They serve a workload only where everything that decides a pixel is equal; its digest
names the teacher's weights, and one with outliers, which rounds otherwise, has none. Other CPUs
than theirs round differently, which moves a pixel of a full-precision model by one level at most.

    python -m robuq_bench.judging.shipped_samples runs/teacher-eval/fp-digits-...

makes the file anew from a finished run with `--set evaluation.sample_teacher=true`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.config import Workload, asset_path
from robuq_bench.errors import UsageError
from robuq_bench.files import sha256_file
from robuq_bench.runs.run import open_existing

SAMPLING_VERSION = "1"
"""Raise it when equal protocols give other images, and make the files anew."""

SAMPLE_ANEW = "--set evaluation.sample_teacher=true"
_PROTOCOL = (
    *("sampler", "sampling_steps", "timestep_spacing", "cfg_scale"),
    *("num_samples", "seed_ranges", "batch_size"),
)


@dataclass(frozen=True)
class ShippedSamples:
    """Images of all seed ranges and where they come from.

    Attributes:
        images: uint8 [seed_ranges * num_samples, C, H, W], image i of seed i.
        source: the asset's name.
        sha256: of its file.
        origin: by which command, torch and processor it was made.
    """

    images: Tensor
    source: str
    sha256: str
    origin: str


def protocol(workload: Workload, teacher_sha256: str) -> str:
    """Everything that decides the pixels of a teacher's samples, as JSON."""
    evaluation = workload.evaluation.model_dump(mode="json", include=set(_PROTOCOL))
    values: dict[str, Any] = {
        "sampling_version": SAMPLING_VERSION,
        "teacher_sha256": teacher_sha256,
        "model": workload.model.model_dump(mode="json"),
        "diffusion": workload.diffusion.model_dump(mode="json"),
        "evaluation": evaluation,
    }
    return json.dumps(values, sort_keys=True)


def samples_asset(workload: Workload) -> str | None:
    """Name of the samples that would come with the workload's teacher.

    None for a teacher of a path, or one with outliers.
    """
    checkpoint = workload.teacher.checkpoint
    is_packaged = checkpoint.startswith("asset:") and checkpoint.endswith(".safetensors")
    is_packaged = is_packaged and workload.teacher.outliers is None
    return f"{checkpoint.removesuffix('.safetensors')}_samples.safetensors" if is_packaged else None


def shipped_samples(workload: Workload, teacher_sha256: str) -> ShippedSamples | None:
    """The samples that come with the teacher; None if there are none of exactly this protocol.

    Raises:
        CheckpointError: their file is damaged.
    """
    source = samples_asset(workload)
    if workload.evaluation.sample_teacher or source is None or not asset_path(source).exists():
        return None
    tensors, facts = load_tensors(asset_path(source))
    if facts["protocol"] != protocol(workload, teacher_sha256):
        return None
    origin = f"{facts['command']}, torch {facts['torch']}, {facts['threads']} thread(s), "
    origin += facts["cpu"]
    return ShippedSamples(tensors["images"], source, sha256_file(asset_path(source)), origin)


def ship_samples(run_path: Path) -> Path:
    """Write the samples of a finished teacher-eval run as the asset of its teacher.

    Raises:
        UsageError: not such a run, its teacher is no asset, or it drew no samples itself.
    """
    run = open_existing(run_path)
    workload, made_on = run.config.workload, run.manifest["sessions"][-1]["provenance"]
    source = samples_asset(workload)
    if run.config.study != "teacher-eval" or source is None or not run.is_done:
        raise UsageError(f"{run.id} is no finished teacher-eval run of a packaged teacher")
    if workload.evaluation.image_seeds == "own" and run.config.seed != 0:
        raise UsageError(f"{run.id} has the images of training seed {run.config.seed}; ship 0's")
    if not workload.evaluation.sample_teacher:
        raise UsageError(f"{run.id} may hold shipped samples; sample with {SAMPLE_ANEW}")
    parts = []
    for index in range(workload.evaluation.seed_ranges):
        with np.load(run.path / "samples" / f"teacher-{index}.npz") as file:
            parts.append(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))
    facts = {
        "licence": "Apache-2.0",
        "protocol": protocol(workload, workload.teacher.sha256),
        "command": f"python bench.py study teacher-eval --on {workload.name} "
        f"--threads {made_on['threads']} {SAMPLE_ANEW}",
        "torch": made_on["packages"]["torch"],
        "threads": str(made_on["threads"]),
        "cpu": made_on["cpu"]["model"],
    }
    path = asset_path(source)
    sha256 = save_tensors(path, {"images": torch.cat(parts)}, facts)
    card = {"sha256": sha256, **facts}
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(ship_samples(Path(sys.argv[1])))
