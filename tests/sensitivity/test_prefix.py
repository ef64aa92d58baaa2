"""Passes that begin late give what whole passes give, to the bit, and only where they may."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from making import quantized
from torch import Tensor, nn

from robuq_bench.config import load_plan, load_workload
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, quantized_layers
from robuq_bench.sensitivity import CalibrationBatch, epsilon_mse, higgs, linearity
from robuq_bench.sensitivity.higgs import unquantized_inputs
from robuq_bench.sensitivity.prefix import Prefix
from robuq_bench.sensitivity.weights import weight_epsilon_mse

WIDTH = 8


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        linear = nn.Linear(WIDTH, WIDTH)
        self.layer = quantized(
            linear, f"blocks.{index}.layer", rotation="none", rank=0, activation=("minmax", 4)
        )

    def forward(self, x: Tensor, c: Tensor, *, gain: float = 1.0) -> Tensor:
        return x + gain * torch.tanh(self.layer(x) + c)


class Chain(nn.Module):
    """Four blocks on the rows of an image; subclasses break the chain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(index) for index in range(4))
        self.ran = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.ran += 1
        return self.through(x, (t + y).float()[:, None, None, None])

    def through(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class Skips(Chain):
    """The last block takes the mean of the first two outputs too, as a U-Net's."""

    def through(self, x: Tensor, c: Tensor) -> Tensor:
        first = self.blocks[0](x, c)
        second = self.blocks[1](first, c)
        return self.blocks[3](self.blocks[2](second, c) + first, c)


class Backwards(Chain):
    def through(self, x: Tensor, c: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x, c)
        return x


class Twice(Chain):
    def through(self, x: Tensor, c: Tensor) -> Tensor:
        return super().through(super().through(x, c), c)


class OwnConditions(Chain):
    def through(self, x: Tensor, c: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, c + index)
        return x


class InPlace(Chain):
    def through(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
            x += 1
        return x


class Single(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]


class Random(Chain):
    def through(self, x: Tensor, c: Tensor) -> Tensor:
        return super().through(x, c) + 0 * torch.rand(1)


class Leaving(Chain):
    """A block leaves behind what the model reads after it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.zeros(1)
        first = self.blocks[0]
        plain = type(first).forward

        def keep(self_: Block, x: Tensor, c: Tensor) -> Tensor:
            self.left = plain(self_, x, c)
            return self.left

        first.__class__ = type("Keeping", (Block,), {"forward": keep})

    def through(self, x: Tensor, c: Tensor) -> Tensor:
        return super().through(x, c) + self.left


BROKEN = [Skips, Backwards, Twice, OwnConditions, InPlace, Single, Random, Leaving]


def blocks_of(model: Chain) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def batches(count: int = 2) -> list[CalibrationBatch]:
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(3)
    return [
        CalibrationBatch(torch.randn(3, 1, 4, WIDTH, generator=generator), index, index)
        for _ in range(count)
    ]


def whole_passes(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[[], dict[str, dict[int, float]]]
) -> dict[str, dict[int, float]]:
    """What `measured` gives when nothing is skipped."""
    with monkeypatch.context() as patch:
        patch.setattr("robuq_bench.sensitivity.prefix._candidate", lambda model: [])
        return measured()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", BROKEN)
@torch.no_grad()
def test_other_structures_run_in_full(
    kind: type[Chain], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind().eval()
    layers = quantized_layers(model)
    assert not Prefix(model, layers, batches(count)).blocks

    def measured() -> dict[str, dict[int, float]]:
        return epsilon_mse(model, list(layers), [1, 2, 4], batches(count))

    assert measured() == whole_passes(monkeypatch, measured)


@torch.no_grad()
def test_a_chain_skips_what_comes_before() -> None:
    model = Chain().eval()
    layers = quantized_layers(model)
    prefix = Prefix(model, layers, batches())
    assert prefix.blocks == list(model.blocks)
    calls: list[int] = []
    for index, block in enumerate(blocks_of(model)):
        block.layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    expected = [model(*batch) for batch in batches()]
    for index in (2, 3, 1, 0):  # forward, and back
        name = f"blocks.{index}.layer"
        with prefix.reused(name):
            calls.clear()
            found = [model(*batch) for batch in batches()]
        assert all(map(torch.equal, found, expected))
        assert calls == [*range(index, 4)] * 2
    assert not any("forward" in vars(block) for block in model.blocks)


def test_noise_on_a_layer_is_felt_from_its_block_on() -> None:
    model = Chain().eval()
    name, levels = "blocks.2.layer", (0.1, 0.2, 0.4)
    with unquantized_inputs(model):
        prefix = Prefix(model, quantized_layers(model), batches())
    calls: list[int] = []
    for index, block in enumerate(blocks_of(model)):
        block.layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    fit = linearity(model, name, batches(), noise_levels=levels, prefix=prefix)
    assert calls == [0, 0, 1, 1] + [2, 3] * 2 * (1 + len(levels))
    assert fit == linearity(model, name, batches(), noise_levels=levels)


@torch.no_grad()
def test_hooks_of_others_are_not_skipped() -> None:
    model = Chain().eval()
    layers = quantized_layers(model)
    handle = blocks_of(model)[1].layer.register_forward_hook(lambda *_: None)
    assert not Prefix(model, layers, batches()).blocks
    handle.remove()
    assert Prefix(model, layers, batches()).blocks


@torch.no_grad()
def test_a_layer_that_is_used_earlier_too_is_felt_there() -> None:
    model = Chain().eval()
    blocks_of(model)[1].layer = blocks_of(model)[3].layer
    prefix = Prefix(model, {"last": blocks_of(model)[3].layer}, batches())
    assert prefix.blocks
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, args, output: seen.append(output))
    with prefix.reused("last"):
        model(*batches()[0])
    assert len(seen) == 1


def test_an_error_puts_the_blocks_back() -> None:
    model = Chain().eval()
    with torch.no_grad():
        prefix = Prefix(model, quantized_layers(model), batches())
    with pytest.raises(KeyboardInterrupt), prefix.reused("blocks.3.layer"):
        raise KeyboardInterrupt
    assert not any("forward" in vars(block) for block in model.blocks)


def test_the_digits_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation bits with and without a reference, and weight bits, to the last bit."""
    workload = load_workload("digits")
    teacher, _ = load_teacher(workload, "cpu")
    assert isinstance(teacher, DiT)
    model = copy.deepcopy(teacher)
    quantize_(model, load_plan("a4"))
    layers = allocatable_layers(model)
    size, index = workload.model.input_size, torch.arange(4)
    generator = torch.Generator().manual_seed(2)
    inputs = [
        CalibrationBatch(
            torch.randn(n, 1, size, size, generator=generator), 100 * index[:n], index[:n]
        )
        for n in (2, 1)
    ]
    with torch.no_grad():
        model.eval()
        assert len(Prefix(model, quantized_layers(model), inputs).blocks) == workload.model.depth

    for reference in (None, teacher):

        def measured(reference: nn.Module | None = reference) -> dict[str, dict[int, float]]:
            return epsilon_mse(model, layers, [1], inputs, reference=reference)

        assert measured() == whole_passes(monkeypatch, measured)
    for name in (layers[0], layers[-1]):

        def of_noise(name: str = name) -> dict[str, dict[int, float]]:
            return higgs(model, [name], [1, 4], inputs, noise_levels=(0.1, 0.4))

        assert of_noise() == whole_passes(monkeypatch, of_noise)
    coarse = copy.deepcopy(teacher)
    quantize_(coarse, load_plan("a3"))

    def of_weights() -> dict[str, dict[int, float]]:
        return weight_epsilon_mse({4: model, 3: coarse}, layers, inputs)

    assert of_weights() == whole_passes(monkeypatch, of_weights)
