"""Shared set-up: one thread, no network, no display, the same random examples in every run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MNIST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")

TINY_WORKLOAD = """
extends = "digits"
[model]
hidden_size = 48
depth = 2
num_heads = 2
[teacher]
checkpoint = "{teacher}"
sha256 = ""
[training]
steps = 9
batch_size = 8
warmup_steps = 2
sensitivity_steps = 4
calibration_samples = 12
checkpoint_every_steps = 2
log_every_steps = 3
[evaluation]
sampling_steps = 2
num_samples = 130
batch_size = 70
seed_ranges = 2
grid_images = 10
"""

if not torch.cuda.is_available():
    # Before anything imports Triton: its interpreter is chosen when functions are decorated.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """Folder with MNIST's 10,000-image test set as IDX files; skips where there is none.

    Looked for in `$ROBUQ_TEST_MNIST`, in `data/mnist` of the checkout, and in `*/data/mnist`
    beside the checkout.
    """
    named = os.environ.get("ROBUQ_TEST_MNIST")
    places = [Path(named)] if named else [ROOT / "data" / "mnist"]
    places += sorted(ROOT.parent.glob("*/data/mnist"))
    for place in places:
        if all((place / name).is_file() for name in MNIST_FILES):
            return place
    pytest.skip("no MNIST test set here: set ROBUQ_TEST_MNIST to a folder with the IDX files")


@pytest.fixture(scope="session")
def tiny_workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of two blocks of width 48 with open gates, as a workload file with its teacher."""
    from robuq_bench.checkpointing import save_tensors
    from robuq_bench.config import load_workload
    from robuq_bench.models.dit import DiT

    folder = tmp_path_factory.mktemp("workload")
    torch.manual_seed(0)
    model_config = load_workload("digits").model.model_copy(
        update={"hidden_size": 48, "depth": 2, "num_heads": 2}
    )
    model = DiT.from_config(model_config)
    for block in model.blocks:  # adaLN-Zero would make every quantized layer invisible
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    save_tensors(folder / "teacher.safetensors", dict(model.state_dict()), {})
    path = folder / "tiny.toml"
    path.write_text(TINY_WORKLOAD.format(teacher=folder / "teacher.safetensors"))
    return path
