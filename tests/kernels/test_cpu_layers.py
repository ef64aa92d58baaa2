"""Layers in training by the compiled CPU kernels: which take them, and what a checkpoint says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn

from kernels import cpu_library
from robuq_bench.checkpointing import CheckpointStore
from robuq_bench.config import load_workload
from robuq_bench.errors import CheckpointError
from robuq_bench.inference import pack_
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.fast_paths import PATHS, PLAIN, path_for
from robuq_bench.quantization.fast_paths import Path as LayerPath
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.resumable import kernels_of, resume
from robuq_bench.training import Trainer

COMPILED = next(path for path in PATHS if path.name == "compiled CPU")

pytestmark = pytest.mark.usefixtures("library")


def layer_of(width: int = 144, **slots: Any) -> QuantizedLinear:
    torch.manual_seed(1)
    return quantized(nn.Linear(width, 60), **{"rank": 8, **slots})


def tokens(rows: int = 50, width: int = 144) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2)) * 2 + 0.3


def results(path: LayerPath, layer: QuantizedLinear, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by one path."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = path.product(layer, x, path.weight(layer))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    found = {"output": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[return-value]


@pytest.mark.parametrize("weight", ["none", "ternary-twn", "ternary-absmean"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
@pytest.mark.parametrize(
    "activation",
    ["none", ("robust-midtread", 4), ("robust-midrise", 1), ("minmax", 8), ("bitnet", 4)],
)
def test_layers_are_the_plain_lines(activation: Any, rotation: str, rank: int, weight: str) -> None:
    """A code that falls to the other side moves one row of the results, by a step of its grid."""
    layer = layer_of(rotation=rotation, rank=rank, weight=weight, activation=activation)
    x = tokens()
    assert path_for(layer, x) is COMPILED
    found, expected = results(COMPILED, layer, x), results(PLAIN, layer, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 2e-3, name


def test_what_the_kernels_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def name_of(layer: QuantizedLinear, x: Tensor) -> str:
        return path_for(layer, x).name

    assert name_of(layer_of(), tokens()) == "compiled CPU"
    assert name_of(layer_of(activation=("lloyd-max", 3)), tokens()) == "fused CPU"
    # 20 x 52: two factors that are no powers of two.
    assert name_of(layer_of(1040), tokens(2, 1040)) == "fused CPU"
    assert name_of(layer_of().double(), tokens().double()) == "fused CPU"
    for word in ("OFF", "Off ", "off"):
        monkeypatch.setenv(cpu_library.PATH_VARIABLE, word)
        assert name_of(layer_of(), tokens()) == "fused CPU"
        assert not cpu_library.is_usable()
        assert cpu_library.why_not() is None
    with pytest.raises(cpu_library.MissingKernels, match="switched off by ROBUQ_CPU_KERNELS=off"):
        cpu_library.load()


@torch.no_grad()
def test_a_packed_layer_computes_what_was_trained() -> None:
    """Bit for bit, its codes being those of the kernel; copies are served like the originals."""
    model = nn.Sequential(layer_of(), nn.GELU(), layer_of(60, rotation="none", rank=0)).eval()
    packed = pack_(copy.deepcopy(model))
    assert torch.equal(packed(tokens()), model(tokens()))


def test_attention_operands_do_not_depend_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(8 * 16, 36).view(2, 4, 16, 36)
    found = matmul_quantizer(8)(x)
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    assert torch.equal(found, matmul_quantizer(8)(x))


def trainer_of(model: nn.Module) -> Trainer:
    return Trainer(model, load_workload("digits").training, "cpu")


def trained(trainer: Trainer, steps: int) -> Trainer:
    for step in range(steps):
        x = torch.randn(20, 144, generator=torch.Generator().manual_seed(trainer.step + step))
        trainer.model(x).square().mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    trainer.step += steps
    return trainer


@pytest.mark.parametrize("variable", ["", "off"])
def test_a_checkpoint_goes_on_with_its_own_kernels(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits; with others it is refused, and the message says what to do."""
    before = cpu_library.load()
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, variable or before._name)
    store = CheckpointStore(tmp_path)
    half = trained(trainer_of(layer_of()), 3)
    kernels = kernels_of(half.model)
    assert kernels == ("torch" if variable else "compiled")
    store.save(3, half.state(), {"kernels": kernels})
    expected = trained(half, 2).state()

    resumed = trainer_of(layer_of())
    resume(resumed, store)
    for key, value in trained(resumed, 2).state().items():
        assert torch.equal(value, expected[key]), key

    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "" if variable else "off")
    if variable:
        monkeypatch.setenv(cpu_library.PATH_VARIABLE, before._name)
    fix = "set ROBUQ_CPU_KERNELS=off" if variable else "run python -m kernels.build, or unset"
    with pytest.raises(CheckpointError, match=fix):
        resume(trainer_of(layer_of()), store)


def test_checkpoints_without_quantized_layers_or_of_older_code(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    teacher = trained(trainer_of(nn.Linear(144, 8)), 1)
    assert kernels_of(teacher.model) == "torch"
    store.save(1, teacher.state(), {})
    resume(trainer_of(nn.Linear(144, 8)), store)

    store = CheckpointStore(tmp_path / "student")
    store.save(1, trained(trainer_of(layer_of()), 1).state(), {})
    with pytest.raises(CheckpointError, match="without the compiled CPU kernels"):
        resume(trainer_of(layer_of()), store)
