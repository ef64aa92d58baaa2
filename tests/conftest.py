"""Shared set-up: one thread, no network, no display, the same random examples in every run."""

from __future__ import annotations

import gc
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

from kernels import build, cpu_library

if TYPE_CHECKING:
    from robuq_bench.context import Context
    from robuq_bench.runs.run import Run

ROOT = Path(__file__).resolve().parents[1]
KERNELS = os.environ.get(cpu_library.PATH_VARIABLE, "")
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
os.fsync = os.fstat  # no test cuts the power; tests of what is synced patch it themselves
gc.disable()  # until the tests are collected: what is imported for them stays
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spare every garbage collection of the tests a walk through a million imported objects."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """The last collection is for all, or Triton complains of leaks."""
    gc.unfreeze()
    gc.enable()


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


class Outcome(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON of its last line."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run a command in this process, in an empty folder."""
    from robuq_bench.cli.app import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A study called `toy-study` that remembers how often it ran, and does as it is told."""
    folder = tmp_path / "studies"
    folder.mkdir()
    source = (
        'VERSION: str = "7"\nSUMMARY = "Does it work?"\n'
        "def measure(config, run, context):\n    return []\n"
    )
    (folder / "toy_study.py").write_text(source)
    (folder / "helper.py").write_text("import torch\n")
    from robuq_bench import study_index

    monkeypatch.setattr(study_index, "studies_folder", lambda: folder)
    calls: list[str] = []
    module = types.ModuleType("studies.toy_study")

    def measure(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
        calls.append(run.id)
        for index in context.progress.track(range(3), "toy"):
            run.append(f"item/{index}", kind="toy", value=index)
        return [{"layer": "a", "mse": 0.125}, {"layer": "b", "mse": None}]

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "studies.toy_study", module)
    return calls


@pytest.fixture
def fail_with(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the toy study raise an error, with a secret among its local values."""

    def arrange(error: BaseException) -> None:
        def measure(config: Any, run: Run, context: Context) -> list[dict[str, Any]]:
            secret = "hunter" + "2"
            context.progress.update(secret)
            raise error

        monkeypatch.setattr(sys.modules["studies.toy_study"], "measure", measure)

    return arrange


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `ROBUQ_CPU_KERNELS` must be for the kernels to be used, whatever a test sets it to.

    As the session began, or a library built now, which takes ten seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu_library.PATH_VARIABLE, KERNELS)
        try:
            cpu_library.load()
        except cpu_library.MissingKernels as missing:
            if os.environ.get("ROBUQ_REQUIRE_CPU_KERNELS") == "1":
                raise
            if KERNELS or build.compiler() is None:
                pytest.skip(str(missing))
            return str(build.build(tmp_path_factory.mktemp("library") / "_cpu.so"))
    return KERNELS


@pytest.fixture
def library(library_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels, for one test."""
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, library_path)
