"""What the files in assets/old compute, through the names of today's library."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robuq_bench.config import load_plan, load_workload
from robuq_bench.inference import load_packed
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.quantization.convert import quantize_
from robuq_bench.students import load_student

STUDENT = Path("finished") / "train-and-eval" / "a2-tiny-aa361f6c5cdf"
PLANS = ("standalone",)
REFUSED = ("extended", "allocated")
"""They override another plan in the older schema, which has no rules to override."""


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x [11, 1, 8, 8], t [11], y [11]."""
    x = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(11) * 90, torch.arange(11)


@torch.inference_mode()
def student_output(run: Path) -> Tensor:
    """Output [11, 1, 8, 8] of a run's student; works in assets/old."""
    return load_student(run, load_workload("tiny.toml")).eval()(*inputs())


@torch.inference_mode()
def outputs() -> dict[str, Tensor]:
    """Outputs [11, 1, 8, 8] of the student, the packed file and plans; works in assets/old."""
    workload = load_workload("tiny.toml")
    models = {"packed": load_packed(Path("packed.safetensors"))[0]}
    for name in PLANS:
        plan = load_plan(f"plans/{name}.toml")
        model = quantize_(load_teacher(workload, "cpu")[0], plan, seed=0)
        models[f"plans/{name}"] = model
    found = {name: model.eval()(*inputs()) for name, model in models.items()}
    return {"student": student_output(STUDENT), **found}
