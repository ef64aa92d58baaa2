"""Quantized layers in PyTorch's data-parallel wrappers, in a group of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robuq_bench.config import load_plan
from robuq_bench.quantization.convert import quantize_

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8))
    return quantize_(layers, load_plan("a4"))


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)
    return module


def flattened(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.module, x, use_reentrant=False)
        return result


@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded, flattened, Checkpointed])
def test_a_wrapped_model_computes_and_trains_as_the_bare_one(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    bare, wrapped = model(), wrap(model())
    x = torch.randn(6, 32)
    results = []
    for run in (bare, wrapped):
        given = x.clone().requires_grad_()
        optimizer = torch.optim.SGD(run.parameters(), 0.1)
        y = run(given)
        y.square().mean().backward()
        optimizer.step()
        results.append([y.detach(), given.grad, run(x).detach()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
