"""Forward passes that begin where a changed layer can first be felt.

A model is often a list of blocks, each called once, on the output of the block before it. What
comes before a changed layer is then the same in every pass. Whether a model is of this kind is
observed in one pass over the batches; any other runs in full. Values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.sensitivity.calibration import ModelInputs
from robuq_bench.sensitivity.probing import run_model


class Prefix:
    """A model's blocks, and for every batch the input of one of them.

    Make it where the model is in evaluation mode without gradients, as it is to be measured.

    Attributes:
        blocks: one after the other; none where the model must run in full.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[ModelInputs]
    ) -> None:
        self.blocks: list[nn.Module] = []
        self._first: dict[str, int] = {}
        blocks = _candidate(model)
        if not blocks:
            return
        observed = _Observed(blocks, layers)
        random_state = torch.get_rng_state()
        with observed.hooked():
            passes = [(run_model(model, batch), observed.finish()) for batch in batches]
        if not observed.is_chain or not torch.equal(random_state, torch.get_rng_state()):
            return
        self._start = [inputs for _, (inputs, _) in passes]
        self._first = observed.first
        self._at, self._inputs = 0, self._start
        output, (_, last_input) = passes[0]
        # Another input in between shows what a block leaves behind for a later one to read.
        x_t, t, y = (
            part.to(output.device) for part in (batches[0].x_t, batches[0].t, batches[0].y)
        )
        model(-x_t, t, y)
        with _starting_at(blocks, len(blocks) - 1, [last_input]):
            is_same = torch.equal(run_model(model, batches[0]), output)
        self.blocks = blocks if is_same else []

    @contextmanager
    def reused(self, layer: str) -> Iterator[None]:
        """Within, one pass over the batches, in their order, skips the blocks before `layer`.

        `layer` may differ from what it was when the prefix was made; every other may not.
        """
        index = self._first.get(layer, 0) if self.blocks else 0
        if index == 0:
            yield
            return
        if index < self._at:
            self._at, self._inputs = 0, self._start
        for block in self.blocks[self._at : index]:
            self._inputs = [
                ((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in self._inputs
            ]
        self._at = index
        with _starting_at(self.blocks, index, [args[0] for args, _ in self._inputs]):
            yield


Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Observed:
    """What hooks see of blocks that may be a chain, and where layers are first called."""

    def __init__(self, blocks: Sequence[nn.Module], layers: Mapping[str, nn.Module]) -> None:
        self.is_chain = True
        self.first: dict[str, int] = {}
        self._blocks, self._layers = blocks, layers
        self._finished = 0
        self._inputs: Call = ((), {})
        self._last_input: Any = None
        self._kept: list[tuple[Tensor, int]] = []
        self._between: list[tuple[Tensor, int]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                before, after = self._before(index), self._after
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_pre_hook(self._called(name)).remove)
            yield

    def finish(self) -> tuple[Call, Any]:
        """End one pass: the call of the first block, and the input of the last."""
        self.is_chain &= self._finished == len(self._blocks)
        self.is_chain &= _unchanged([*self._kept, *self._between])
        self._finished = 0
        return self._inputs, self._last_input

    def _before(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.is_chain &= index == 0 or bool(self._between)
            if (
                not self.is_chain
                or index != self._finished
                or not args
                or not isinstance(args[0], Tensor)
            ):
                self.is_chain = False
                return
            if index == 0:
                self._inputs = args, kwargs
                self._kept = self._versions([*args, *kwargs.values()])
                self._between = self._versions([args[0]])
            first, named = self._inputs
            self.is_chain &= args[0] is self._between[0][0] and _unchanged(self._between)
            self.is_chain &= _same(args[1:], first[1:]) and kwargs.keys() == named.keys()
            self.is_chain &= _same(kwargs.values(), named.values())
            self._last_input = args[0]

        return hook

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        self._finished += 1
        self.is_chain &= isinstance(output, Tensor) and _unchanged(self._between)
        self._between = self._versions([output])

    def _versions(self, values: Iterable[Any]) -> list[tuple[Tensor, int]]:
        """Tensors with their counts of changes in place, which tensors of inference lack."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        self.is_chain &= not any(tensor.is_inference() for tensor in tensors)
        return [(tensor, tensor._version) for tensor in tensors] if self.is_chain else []

    def _called(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            self.first[name] = min(self._finished, self.first.get(name, self._finished))

        return hook


def _candidate(model: nn.Module) -> list[nn.Module]:
    """The children of the list with the most modules below it; none if hooks see their calls."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    longest = max(lists, key=lambda found: len(list(found.modules())), default=None)
    blocks = [] if longest is None else list(longest)
    inside = [module for block in blocks for module in block.modules()]
    is_seen = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in inside
    )
    is_repeated = len(set(blocks)) < len(blocks)
    return [] if is_seen or is_repeated or len(blocks) < 2 else blocks


def _unchanged(versions: Iterable[tuple[Tensor, int]]) -> bool:
    return all(tensor._version == version for tensor, version in versions)


def _same(values: Iterable[Any], others: Iterable[Any]) -> bool:
    pairs = list(zip(values, others, strict=False))
    return all(value is other for value, other in pairs)


@contextmanager
def _starting_at(
    blocks: Sequence[nn.Module], index: int, inputs: Sequence[Tensor]
) -> Iterator[None]:
    """Blocks before `index` (at least 1) do nothing; it gets the inputs, one a pass."""
    remaining = iter(inputs)

    def skip(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    skipped = blocks[:index]
    for block in skipped:
        block.forward = skip
    skipped[0].forward = lambda *args, **kwargs: next(remaining)
    try:
        yield
    finally:
        for block in skipped:
            del block.forward
