"""The groups in which layers are calibrated, on our DiT and on one that is run from its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.blocks import blocks_in_order
from robuq_bench.quantization.watching import calls_of


def dit() -> DiT:
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    return DiT(**sizes, num_classes=3, learn_sigma=False)


def linears(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]


def test_layers_of_a_block_are_one_group() -> None:
    model = dit()
    names = linears(model)
    found = blocks_in_order(model, reversed(names))
    assert [name for group in found for name in group] == names
    assert [group[0].split(".")[:2] for group in found if len(group) > 1] == [
        ["blocks", "0"],
        ["blocks", "1"],
    ]
    inside = [name for name in names if name.startswith("blocks.1.")]
    assert inside in found
    outside = [name for name in names if not name.startswith("blocks.")]
    assert all([name] in found for name in outside)
    assert blocks_in_order(model, []) == []
    assert blocks_in_order(model, inside[:2]) == [inside[:2]]
    with pytest.raises(UsageError, match=r"no layer 'blocks\.7' to observe"):
        blocks_in_order(model, ["blocks.7"])


def test_of_a_model_without_blocks_every_layer_is_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    assert blocks_in_order(model, ["2", "0"]) == [["0"], ["2"]]


class Backwards(nn.Module):
    """A transformer whose list of blocks is run from its end, after a head defined before it."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.head = nn.Linear(16, 16)
        self.blocks = dit.blocks

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x, c)
        result: Tensor = self.head(x)
        return result


def test_groups_come_in_the_order_of_execution_if_it_is_known() -> None:
    model = Backwards(dit())
    names = linears(model)
    batch = (torch.randn(2, 4, 16), torch.randn(2, 16))
    found = blocks_in_order(model, names, calls_of(model, names, batch))
    assert [group[0].split(".")[:2] for group in found] == [
        ["blocks", "1"],
        ["blocks", "0"],
        ["head"],
    ]
    assert sorted(name for group in found for name in group) == sorted(names)
    # adaLN is the first to run in a block, and the last to be defined.
    assert "adaLN" in found[0][0]
    assert blocks_in_order(model, names)[0] == ["head"]
