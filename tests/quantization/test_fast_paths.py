"""Every fast path against the plain lines, on all that it claims to serve, and on nothing else.

The plain lines themselves are held against the layer written out in `test_linear.py`. Here the CPU
path in float64; the compiled kernels in `tests/kernels/test_cpu_layers.py`; Triton's, in its
interpreter, in `tests/kernels/test_layer_paths.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn

from kernels import cpu_library
from robuq_bench.errors import ConfigError
from robuq_bench.methods import method_class, method_names
from robuq_bench.methods.activations._token_grid import GridMethod, GridQuantizer, token_grid
from robuq_bench.methods.activations.minmax import MinMaxGrid
from robuq_bench.methods.branches.svd import LowRankBranch
from robuq_bench.methods.rotations._hadamard import HadamardMethod, HadamardRotation
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._ternary import TernaryMethod
from robuq_bench.quantization.fast_paths import PATHS, PLAIN, Path, path_for
from robuq_bench.quantization.linear import QuantizedLinear

IN, OUT, TOKENS = 24, 10, 7
ROTATIONS = ("none", "hadamard", "randomized-hadamard")
WEIGHTS = ("none", "ternary-twn", "ternary-absmean", "ternary-optimal")
GRIDS = ("robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet")
SETTINGS = [(name, b) for name in GRIDS for b in range(2 if name == "bitnet" else 1, 9)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU = next(path for path in PATHS if path.name == "fused CPU")


def layer_of(bias: bool = True, **slots: Any) -> QuantizedLinear:
    torch.manual_seed(1)
    return quantized(nn.Linear(IN, OUT, bias=bias).double(), **{"rank": 3, **slots})


def tokens(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, IN, generator=generator, dtype=torch.float64) * 2 + 0.3


def results(path: Path, layer: QuantizedLinear, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by one path."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = path.product(layer, x, path.weight(layer))
    # Some beyond 1, so that the clamp of the weight's gradient acts.
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    y.backward(upstream)
    found = {"output": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[return-value]


def assert_same(layer: QuantizedLinear, x: Tensor, context: object = "") -> None:
    found, expected = results(CPU, layer, x), results(PLAIN, layer, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{context} {n}: {m}"
        )


def test_what_the_paths_know_is_all_tried_here() -> None:
    """A method of their kinds that is added later has to be added to the lists above."""
    for slot, base, tried in (
        ("rotation", HadamardMethod, ROTATIONS[1:]),
        ("weight", TernaryMethod, WEIGHTS[1:]),
        ("activation", GridMethod, GRIDS),
    ):
        known = [n for n in method_names(slot) if issubclass(method_class(slot, n), base)]  # type: ignore[arg-type]
        assert sorted(known) == sorted(tried)
    for name in GRIDS:
        bits = [b for n, b in SETTINGS if n == name]
        assert bits == list(range(token_grid(name).min_bits, token_grid(name).max_bits + 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_cpu_path_is_the_plain_lines(rotation: str, rank: int, weight: str, bias: bool) -> None:
    """At every grid and all of its bits, with idle activations and with none."""
    layer = layer_of(bias, rotation=rotation, rank=rank, weight=weight)
    x = tokens(TOKENS)
    for name, bits in [*SETTINGS, ("minmax", None)]:
        layer.activation_quantizer = GridQuantizer(token_grid(name))
        layer.activation_bits = bits
        assert path_for(layer, x) is CPU
        assert_same(layer, x, (name, bits))
    bare = layer_of(bias, rotation=rotation, rank=rank, weight=weight, activation="none")
    assert path_for(bare, x) is CPU
    assert_same(bare, x)


@pytest.mark.parametrize("name", GRIDS)
def test_the_comparison_would_see_another_quantizer(name: str) -> None:
    """Bits, grid, signs, branch and bias each move the result by far more than is allowed."""
    layer = layer_of(activation=(name, 3))
    x = tokens(TOKENS)
    expected = results(PLAIN, layer, x)
    for change in ("bits", "rotation.signs", "branch.up", "bias"):
        other = copy.deepcopy(layer)
        if change == "bits":
            other.activation_bits = 4
        else:
            other.state_dict()[change].view(-1)[0].mul_(-1)
        found = results(CPU, other, x)["output"]
        assert float((found - expected["output"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 1, 4)])
def test_shapes_of_tokens(name: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(activation=(name, 3))
    x = tokens(*shape)
    assert path_for(layer, x) is CPU
    assert results(CPU, layer, x)["output"].shape == (*shape, OUT)
    assert_same(layer, x)


@pytest.mark.parametrize("name", GRIDS)
def test_tokens_that_are_not_contiguous_constant_or_zero(name: str) -> None:
    layer = layer_of(rotation="none", activation=(name, 3))
    with torch.no_grad():
        for x in (
            tokens(IN)[:, :5].t(),
            tokens(4)[::2],
            torch.full((3, IN), 1.7).double(),
            torch.zeros(3, IN).double(),
        ):
            found = CPU.product(layer, x, CPU.weight(layer))
            expected = PLAIN.product(layer, x, PLAIN.weight(layer))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Halving(nn.Module):
    """A scaling that a fast path would leave out."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def weight(self, weight: Tensor) -> Tensor:
        return weight * 2


class Reversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class ReversedHadamard(HadamardRotation):
    """A subclass computes something else, so it is not known."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class DoubledBranch(LowRankBranch):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ShiftedGrid(GridQuantizer):
    def forward(self, x: Tensor, bits: int | Tensor) -> Tensor:
        return super().forward(x, bits) + 1


class Sign(nn.Module):
    def forward(self, x: Tensor, bits: int) -> Tensor:
        return x.sign()


OTHERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a scaling": ("scaling", Halving),
    "another rotation": ("rotation", Reversal),
    "a subclass of the rotation": ("rotation", lambda: ReversedHadamard(None)),
    "a branch": ("branch", lambda: nn.Linear(IN, OUT).double()),
    "a subclass of the branch": (
        "branch",
        lambda: DoubledBranch(torch.ones(OUT, 1).double(), torch.ones(1, IN).double()),
    ),
    "another activation module": ("activation_quantizer", Sign),
    "a subclass of a grid's": ("activation_quantizer", lambda: ShiftedGrid(token_grid("minmax"))),
}


@pytest.mark.parametrize("which", OTHERS)
@torch.no_grad()
def test_what_the_paths_do_not_know_takes_the_plain_lines(which: str) -> None:
    slot, make = OTHERS[which]
    layer, x = layer_of(), tokens(TOKENS)
    known = layer(x)
    setattr(layer, slot, make())
    assert not any(path.supports(layer, x) for path in PATHS)
    assert path_for(layer, x) is PLAIN
    found = layer(x)
    assert torch.equal(found, PLAIN.product(layer, x, PLAIN.weight(layer)))
    assert float((found - known).abs().max()) > 1e-3, "the module in the slot must be heard"


def test_another_weight_module_goes_along_with_the_paths() -> None:
    """They multiply by whatever the slot made of the weight."""

    class Rounded(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + (weight.round(decimals=1) - weight).detach()

    layer, x = layer_of(), tokens(TOKENS)
    layer.weight_quantizer = Rounded()
    assert path_for(layer, x) is CPU
    assert_same(layer, x)
    expected = layer.master_weight.detach().round(decimals=1)
    torch.testing.assert_close(layer.quantized_weight(), expected)


@pytest.mark.parametrize("layer_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@torch.no_grad()
def test_dtypes_that_the_cpu_path_takes(
    layer_dtype: torch.dtype, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    torch.manual_seed(0)
    layer, x = quantized(nn.Linear(IN, OUT).to(layer_dtype), rank=2), tokens(3).to(x_dtype)
    takes = layer_dtype == x_dtype and x_dtype in (torch.float32, torch.float64)
    assert (path_for(layer, x) is CPU) == takes
    if layer_dtype != torch.float64:  # plain lines
        with torch.autocast("cpu", torch.bfloat16):
            assert path_for(layer, x) is PLAIN
    assert layer(x).dtype == layer_dtype


def test_a_grid_that_bears_anothers_name_is_refused() -> None:
    """By name the kernels and compiled graphs would find the other one."""

    class Coarse(MinMaxGrid):
        pass

    class Named(MinMaxGrid):
        name = "coarse-minmax"

    class Method(GridMethod):
        grid = Coarse()

    class NamedMethod(GridMethod):
        grid = Named()

    with pytest.raises(ConfigError, match=r"Coarse is called 'minmax', which is another method's"):
        Method(method="coarse").fit(torch.zeros(2, 2), Site("a"))
    assert NamedMethod(method="coarse").fit(torch.zeros(2, 2), Site("a")).grid is NamedMethod.grid
