"""Every width of DiT and of diffusers' transformers through the path that training takes."""

from __future__ import annotations

import pytest
import torch
from making import changed
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_, quantized_layers
from robuq_bench.quantization.fused import fused_linear

# DiT-S, B, L, XL: hidden and MLP width; then those of diffusers' transformers and their MLPs.
WIDTHS = (384, 1536, 768, 3072, 1024, 4096, 1152, 4608)
WIDTHS += (1920, 2240, 2304, 3840, 5120, 6144, 8960, 10240, 12288, 13824, 15360, 20480)
OUT, RANK, BITS = 5, 2, 2


def operands(width: int, tokens: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    return {
        "x": normal(tokens, width),
        "weight": normal(OUT, width + RANK),
        "bias": normal(OUT),
        "down": normal(RANK, width),
    }


def plain(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, signs: Tensor) -> Tensor:
    """The definition, by the transform of the last axis."""
    tokens = rotate(x, signs)
    quantized = token_grid("robust-midtread").fake_quantize(tokens, BITS)
    operand = torch.cat([quantized, F.linear(tokens, down)], -1)
    return F.linear(operand, weight, bias)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_fused_path_computes_the_definition_forward_and_backward(width: int) -> None:
    quantizer = token_grid("robust-midtread")
    given = operands(width)
    signs = random_signs(width, "a", 0).double()
    y = fused_linear(*given.values(), signs, True, quantizer, BITS)
    expected = plain(*given.values(), signs)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = torch.autograd.grad(y, list(given.values()), upstream)
    wanted = torch.autograd.grad(expected, list(given.values()), upstream)
    for name, a, b in zip(given, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 2304])
def test_the_transform_is_the_dense_product(width: int) -> None:
    x = operands(width)["x"].detach()
    dense = x @ (hadamard_matrix(width) / width**0.5)
    torch.testing.assert_close(rotate(x, None), dense, rtol=1e-11, atol=1e-11)


def test_three_factors_and_no_tokens() -> None:
    assert len(hadamard_factors(1536)) == 3
    given = operands(1536, tokens=0)
    y = fused_linear(*given.values(), None, True, token_grid("minmax"), BITS)
    assert y.shape == (0, OUT)
    assert torch.autograd.grad(y.sum(), given["x"])[0].shape == (0, 1536)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1152, 16)])
def test_a_block_of_dit_s_b_and_xl_trains_on_the_cpu(width: int, heads: int) -> None:
    torch.manual_seed(0)
    model = DiT(
        input_size=4, in_channels=1, hidden_size=width, depth=1, num_heads=heads, num_classes=3
    )
    for name in ("blocks.0.adaLN_modulation.1", "final_layer.linear"):
        nn.init.normal_(model.get_submodule(name).weight, std=0.05)
    # Without the branch, whose SVD takes 20 s at this width; the fused path has it above.
    quantize_(model, changed("a2-uniform", rank=0))
    x = torch.randn(2, 1, 4, 4)
    model(x, torch.tensor([3, 700]), torch.tensor([0, 1])).square().mean().backward()
    gradients = [layer.master_weight.grad for layer in quantized_layers(model).values()]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
