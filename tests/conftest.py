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
