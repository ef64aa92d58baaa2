"""A layer on the kernels against the plain lines, on every combination that they claim to serve.

What else they refuse, and why, is in `tests/quantization/test_cuda_path.py`.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn

from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.methods.activations._token_grid import GridQuantizer, token_grid
from robuq_bench.quantization.cuda_path import forced
from robuq_bench.quantization.fast_paths import PATHS, PLAIN, path_for
from robuq_bench.quantization.linear import QuantizedLinear

WIDTH, OUT, RANK, TOKENS = 44, 6, 2, 2  # 44 = 1 x 44, a factor that is not symmetric
KERNELS = next(path for path in PATHS if path.name == "kernels")
UNIFORM = ("robust-midtread", "robust-midrise", "minmax", "bitnet")
SETTINGS = [(name, bits) for name in UNIFORM for bits in range(2 if name == "bitnet" else 1, 9)]
MARGIN = 1e-3
"""In steps: how far every rotated value lies from a threshold, so that rounding flips no code."""


def layer_of(bias: bool, device: torch.device, **slots: Any) -> QuantizedLinear:
    torch.manual_seed(1)
    return quantized(nn.Linear(WIDTH, OUT, bias=bias), **{"rank": RANK, **slots}).to(device)


@cache
def tokens(rotation: str, name: str, bits: int) -> Tensor:
    """The first random ones that keep `MARGIN` from all thresholds of a grid once rotated."""
    signs = random_signs(WIDTH, "layer", 0).double() if rotation.startswith("random") else None
    # The thresholds of mid-rise, and the one of one bit, are whole numbers, the others between two.
    shift = 0 if name == "robust-midrise" or (name, bits) == ("robust-midtread", 1) else 0.5
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, WIDTH, generator=generator) * 2 + 0.3
        exact = x.double() if rotation == "none" else rotate(x.double(), signs)
        t = token_grid(name).normalise(exact, bits).t + shift
        if float((t - t.round()).abs().min()) > MARGIN:
            return x
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


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
def test_the_kernels_are_the_plain_lines(rotation: str, rank: int, device: torch.device) -> None:
    """At every grid and all of its bits; weights and bias, which are other operations, in turn."""
    layers = [
        layer_of(bias, device, rotation=rotation, rank=rank, weight=weight)
        for weight in ("none", "ternary-twn", "ternary-absmean")
        for bias in (False, True)
    ]
    assert len(SETTINGS) >= len(layers)
    for layer, (name, bits) in zip(itertools.cycle(layers), SETTINGS, strict=False):
        layer.activation_quantizer = GridQuantizer(token_grid(name))
        layer.activation_bits = bits
        x = tokens(rotation, name, bits).to(device)
        found, expected = results(layer, x, kernels=True), results(layer, x, kernels=False)
        assert found.keys() == expected.keys()
        for part, truth in expected.items():
            # The gradient through the statistics of a token is kept to 7 bits.
            unit = 5e-3 if part == "x" and name.startswith("robust") else 1e-5
            assert relative(found[part], truth) < unit, (name, bits, part)


@torch.no_grad()
def test_levels_that_are_not_evenly_spaced_are_left_to_another_path(device: torch.device) -> None:
    layer = layer_of(True, device, activation=("lloyd-max", 3))
    x = tokens("randomized-hadamard", "minmax", 3).to(device)
    with forced():
        assert not KERNELS.supports(layer, x)
        found = layer(x)
    expected = PLAIN.product(layer, x, PLAIN.weight(layer))
    assert relative(found, expected) < 1e-5


class Reversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Sign(nn.Module):
    def forward(self, x: Tensor, bits: int) -> Tensor:
        return x.sign()


@pytest.mark.parametrize(
    ("slot", "module"),
    [("scaling", Reversal()), ("rotation", Reversal()), ("activation_quantizer", Sign())],
)
@torch.no_grad()
def test_what_the_kernels_do_not_know_takes_the_plain_lines(
    slot: str, module: nn.Module, device: torch.device
) -> None:
    layer = layer_of(True, device)
    x = tokens("randomized-hadamard", "minmax", 3).to(device)
    with forced():
        assert path_for(layer, x) is KERNELS
        known = layer(x)
        setattr(layer, slot, module)
        assert path_for(layer, x) is PLAIN
        found = layer(x)
    assert relative(found, known) > 1e-3, "the module in the slot must be heard"
    assert relative(found, PLAIN.product(layer, x, PLAIN.weight(layer))) < 1e-5
