"""`cuda_graph`: a call captured once and replayed, for models whose launches cost more than work.

A step of a DiT is some 280 launches; of a few images they, not the arithmetic, take most time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.errors import MissingResourceError, UsageError

WARMUP = 3
"""Calls before the capture, in which kernels are compiled."""

Output = Tensor | tuple[Tensor, ...]


class CudaGraph:
    """A captured call; `cuda_graph` makes it.

    Calling it with inputs of the captured shapes, dtypes and device copies them into the graph's
    own, replays it and returns copies of its results. All else must equal what was captured. It
    keeps the captured function alive. Not for several threads at once: they would share these
    inputs.
    """

    def __init__(
        self, function: Callable[..., Output], inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self._function = function  # a replay reads its weights, which must not be freed
        inputs = tuple(_own(value) for value in inputs)
        named = {name: _own(value) for name, value in named.items()}
        called = function.forward if isinstance(function, nn.Module) else function
        self._signature = inspect.signature(called)
        self._inputs = self._by_name(inputs, named)
        _check_inputs(self._inputs)
        self._replay, self._output = _capture(lambda: function(*inputs, **named))
        if not all(isinstance(part, Tensor) for part in _parts(self._output)):
            raise UsageError(
                f"cuda_graph: {_name(function)} returns {type(self._output).__name__}; a tensor or "
                "a tuple of tensors can be captured (of diffusers' models: return_dict=False)"
            )

    def __call__(self, *inputs: Any, **named: Any) -> Output:
        given = self._by_name(inputs, named)
        if given.keys() != self._inputs.keys():
            raise UsageError(
                f"cuda_graph: captured with the inputs {', '.join(self._inputs) or 'none'}, called "
                f"with {', '.join(given) or 'none'}"
            )
        for name, held in self._inputs.items():
            _check_alike(name, held, given[name])
        with torch.no_grad():
            for name, held in self._inputs.items():
                if isinstance(held, Tensor):
                    held.copy_(given[name])
            self._replay()
            if isinstance(self._output, Tensor):
                return self._output.clone()
            return tuple(part.clone() for part in self._output)

    def _by_name(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by the names of their parameters."""
        try:
            arguments = self._signature.bind(*inputs, **named).arguments
        except TypeError as error:
            raise UsageError(f"cuda_graph: {error}") from None
        found: dict[str, Any] = {}
        for name, value in arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found |= {f"{name}[{index}]": part for index, part in enumerate(value)}
            else:
                found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return found


def cuda_graph(function: Callable[..., Output], *inputs: Any, **named: Any) -> CudaGraph:
    """Capture a call of a model in a CUDA graph.

        step = cuda_graph(model, x, t, y)
        epsilon = step(x, t, y)          # any values of these shapes

    A model made by `prepare_for_inference` is captured with its fused blocks, and a compiled model
    with its compiled code. Products take the tiles known by then: time them first, by a call inside
    `kernels.ternary_matmul.triton.tuning()`. Weights are read where they were at the capture, so
    capture again after moving or exchanging them.

    Args:
        function: a module, or anything callable, that returns a tensor or a tuple of tensors and
            does not read values of tensors on the host.
        inputs, named: an example call; tensors must be on one CUDA device. Their values are those
            of the first calls, all `WARMUP` of which run.

    Returns:
        What is called in its place.

    Raises:
        MissingResourceError: no CUDA device.
        UsageError: a tensor on another device, or a result that is no tensor; and, when the graph
            is called, an input unlike the captured one.
    """
    if not torch.cuda.is_available():
        raise MissingResourceError(
            "cuda_graph needs a CUDA device; without one call the model itself"
        )
    tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
    device = tensors[0].device if tensors and tensors[0].is_cuda else None
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        return CudaGraph(function, inputs, named)


def _capture(call: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
    """A graph's replay and the results that it writes, after calls outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _parts(output: Output) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_inputs(inputs: dict[str, Any]) -> None:
    """UsageError unless tensors are arguments of their own, on one CUDA device."""
    devices = {name: value.device for name, value in inputs.items() if isinstance(value, Tensor)}
    for name, device in devices.items():
        if device.type != "cuda" or device != next(iter(devices.values())):
            raise UsageError(
                f"cuda_graph: {name} is on {device}; inputs must be on one CUDA device"
            )
    for name, value in inputs.items():
        members = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list | tuple) and any(isinstance(v, Tensor) for v in members):
            raise UsageError(
                f"cuda_graph: {name} holds tensors in a {type(value).__name__}, which a graph "
                "would not see change; wrap the model in a function that takes them one by one"
            )


def _check_alike(name: str, held: Any, given: Any) -> None:
    """UsageError unless an input is like the captured one."""
    if not isinstance(held, Tensor) or not isinstance(given, Tensor):
        if isinstance(held, Tensor) or isinstance(given, Tensor) or held != given:
            raise UsageError(f"cuda_graph: {name} is {given!r:.60}, captured was {held!r:.60}")
        return
    if (held.shape, held.dtype, held.device) != (given.shape, given.dtype, given.device):
        raise UsageError(
            f"cuda_graph: {name} is {_described(given)}, captured was {_described(held)}; capture "
            "a graph for each shape"
        )


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
