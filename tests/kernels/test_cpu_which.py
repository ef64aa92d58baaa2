"""Which layers the compiled CPU kernels compute, and what they leave unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from making import quantized
from torch import nn

from kernels import cpu_library
from robuq_bench.errors import UsageError
from robuq_bench.methods.weights._ternary import TernaryWeight
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.fast_paths import quantized_weight
from robuq_bench.resumable import kernels_of

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize(
    ("slots", "dtype", "expected"),
    [
        ({}, torch.float32, "compiled"),
        ({}, torch.float64, "torch"),
        ({}, torch.bfloat16, "compiled"),  # its weight
        ({"weight": "rtn"}, torch.float32, "compiled"),  # its tokens
        ({"weight": "rtn"}, torch.bfloat16, "torch"),
        ({"activation": ("lloyd-max", 4)}, torch.float32, "compiled"),  # its weight
        ({"activation": ("lloyd-max", 4), "weight": "rtn"}, torch.float32, "torch"),
    ],
)
def test_the_kernels_recorded_are_those_that_compute(
    slots: dict[str, Any], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of "torch" has the same bits without the library; one of "compiled" was called."""
    layer = quantized(nn.Linear(24, 10), rank=3, **slots).to(dtype)
    assert kernels_of(layer) == expected
    calls: list[str] = []
    call = cpu_library.call
    for module in ("fake_quantize", "ternary_weight"):
        monkeypatch.setattr(
            f"kernels.{module}.cpu.call", lambda name, q: (calls.append(name), call(name, q))[1]
        )
    layer(torch.randn(5, 24, dtype=dtype))
    assert bool(calls) == (expected == "compiled")


@pytest.mark.parametrize("variable", ["", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_up_stands_beside_every_weight(
    variable: str, dtype: torch.dtype, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(cpu_library.PATH_VARIABLE, variable)
    layer = quantized(nn.Linear(24, 10), rank=3)
    assert isinstance(layer.weight_quantizer, TernaryWeight)
    weight, up = layer.master_weight.detach().to(dtype), torch.randn(10, 3)
    weight = weight.t().contiguous().t() if strided else weight
    for quantizer in (layer.weight_quantizer, None):
        wide = quantized_weight(weight, quantizer, None, up)
        assert torch.equal(wide[:, :24], quantized_weight(weight, quantizer))
        assert torch.equal(wide[:, 24:], up.to(dtype))


def test_a_refusal_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = quantized(nn.Linear(24, 10), rank=0), torch.randn(5, 24)

    def refuse(name: str, bits: int) -> None:
        raise UsageError("not registered yet")

    fast_paths._kernel_terms.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fast_paths, "grid_of", refuse)
        assert fast_paths.path_for(layer, x).name == "fused CPU"
    assert fast_paths.path_for(layer, x).name == "compiled CPU"
