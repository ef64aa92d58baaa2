"""A layer on the kernels against the plain lines, on every combination that they claim to serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn

from robuq_bench.hadamard.rotation import rotate
from robuq_bench.methods.activations._token_grid import GridQuantizer, token_grid
from robuq_bench.quantization.cuda_path import forced
from robuq_bench.quantization.fast_paths import PATHS, PLAIN, path_for
from robuq_bench.quantization.linear import QuantizedLinear

OUT, RANK, TOKENS = 6, 2, 3
KERNELS = next(path for path in PATHS if path.name == "kernels")
UNIFORM = ("robust-midtread", "robust-midrise", "minmax", "bitnet")
SETTINGS = [(name, bits) for name in UNIFORM for bits in range(2 if name == "bitnet" else 1, 9)]
MARGIN = 1e-3
"""In steps: how far every rotated value lies from a threshold, so that rounding flips no code."""


def layer_of(width: int, bias: bool, device: torch.device, **slots: Any) -> QuantizedLinear:
    torch.manual_seed(1)
    return quantized(nn.Linear(width, OUT, bias=bias), **slots).to(device)


def tokens(layer: QuantizedLinear, device: torch.device) -> Tensor:
    """The first random ones that keep `MARGIN` from all thresholds of the layer's grid."""
    rotation: Any = layer.rotation
    quantizer: Any = layer.activation_quantizer
    bits = layer.activation_bits
    assert bits is not None
    for seed in range(500):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, layer.in_features, generator=generator) * 2 + 0.3
        exact = x.double()
        if rotation is not None:
            signs = rotation.signs
            exact = rotate(exact, None if signs is None else signs.cpu().double())
        t = quantizer.grid.normalise(exact, bits).t
        # Those of mid-rise, and the zero of one bit, are whole numbers, the others between two.
        if min(float((2 * t - (2 * t).round()).abs().min()), 1.0) > MARGIN:
            return x.to(device)
    raise AssertionError("no such tokens")


def results(layer: QuantizedLinear, x: Tensor, *, kernels: bool) -> dict[str, Tensor]:
    """Output and every gradient, by the kernels or by the plain lines."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    if kernels:
        with forced():
            assert path_for(layer, x) is KERNELS
            y = layer(x)
    else:
        y = PLAIN.product(layer, x, PLAIN.weight(layer))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) * 2
    with forced():
        y.backward(upstream.to(y.device))
    found = {"output": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[return-value]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", ["none", "ternary-twn", "ternary-absmean"])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
def test_the_kernels_are_the_plain_lines(
    rotation: str, rank: int, weight: str, bias: bool, device: torch.device
) -> None:
    """At every grid and all of its bits; 44 = 1 x 44, a factor that is not symmetric."""
    layer = layer_of(44, bias, device, rotation=rotation, rank=rank, weight=weight)
    for name, bits in SETTINGS:
        layer.activation_quantizer = GridQuantizer(token_grid(name))
        layer.activation_bits = bits
        x = tokens(layer, device)
        found, expected = results(layer, x, kernels=True), results(layer, x, kernels=False)
        assert found.keys() == expected.keys()
        for part, truth in expected.items():
            # The gradient through the statistics of a token is kept to 7 bits.
            unit = 5e-3 if part == "x" and name.startswith("robust") else 1e-5
            assert relative(found[part], truth) < unit, (name, bits, part)
