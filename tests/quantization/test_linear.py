"""`QuantizedLinear`: what it computes, its gradients, its cache and its state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.quantization.activations import activation_quantizer
from robuq_bench.quantization.linear import QuantizedLinear, low_rank_factors
from robuq_bench.quantization.weights import fake_quantize_weight

IN, OUT, TOKENS = 24, 10, 37
QUANTIZERS = ("robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet")


def original(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, bias=bias).double()


def tokens(features: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, features, generator=generator, dtype=torch.float64)


def plain_forward(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer written out: rotate, quantize, multiply, add the branch on unquantized input."""
    if layer.rotated:
        if layer.signs is not None:
            x = x * layer.signs
        x = x @ (hadamard_matrix(layer.in_features) / layer.in_features**0.5)
    quantizer = activation_quantizer(layer.activation_quantizer)
    bits = layer.activation_bits
    quantized = x if quantizer is None or bits is None else quantizer.fake_quantize(x, bits)
    y = F.linear(
        quantized, fake_quantize_weight(layer.master_weight, layer.weight_quantizer), layer.bias
    )
    if layer.low_rank_up is not None and layer.low_rank_down is not None:
        y = y + (x @ layer.low_rank_down.T) @ layer.low_rank_up.T
    return y


@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
@pytest.mark.parametrize("rank", [0, 3])
def test_without_quantizers_it_is_the_original_layer(rotation: str, rank: int) -> None:
    linear = original()
    layer = QuantizedLinear.from_linear(
        linear,
        name="a",
        rotation=rotation,
        rank=rank,
        weight_quantizer="none",
        activation_quantizer="none",
        activation_bits=None,
    )
    torch.testing.assert_close(layer(tokens()), linear(tokens()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_fused_path_equals_the_layer_written_out(
    rotation: str, rank: int, bias: bool, quantizer: str, bits: int
) -> None:
    layer = QuantizedLinear.from_linear(
        original(bias),
        name="a",
        rotation=rotation,
        rank=rank,
        activation_quantizer=quantizer,
        activation_bits=bits,
    ).train()
    plain = copy.deepcopy(layer)
    x, x_plain = tokens().requires_grad_(), tokens().requires_grad_()
    y, expected = layer(x), plain_forward(plain, x_plain)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    # Small, so that the weight's gradient clamp at 1 does not hide differences.
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double() * 1e-3
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-8, atol=1e-11)
    for (name, own), (_, other) in zip(
        layer.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_many_blocks_of_tokens_equal_one(quantizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear.from_linear(
        original(), name="a", rank=2, activation_quantizer=quantizer, activation_bits=3
    )
    whole = layer(tokens())
    monkeypatch.setattr("robuq_bench.quantization.fused.BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(layer(tokens()), whole, rtol=1e-12, atol=1e-12)


def test_low_rank_factors_are_the_best_approximation() -> None:
    weight = original().weight.detach()
    up, down = low_rank_factors(weight, 4)
    error = torch.linalg.norm(weight - up @ down)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(error, singular[4:].square().sum().sqrt())
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # each takes sqrt(S)


def test_the_main_weight_is_the_residual_in_the_rotated_basis() -> None:
    linear = original()
    layer = QuantizedLinear.from_linear(linear, name="a", rank=4)
    assert layer.signs is not None
    assert layer.low_rank_up is not None
    assert layer.low_rank_down is not None
    rotated = (linear.weight * layer.signs) @ (hadamard_matrix(IN) / IN**0.5)
    torch.testing.assert_close(
        layer.master_weight + layer.low_rank_up @ layer.low_rank_down,
        rotated,
        rtol=1e-10,
        atol=1e-10,
    )


def test_the_branch_reads_the_unquantized_activation() -> None:
    layer = QuantizedLinear.from_linear(original(), name="a", rank=3, activation_bits=1)
    with torch.no_grad():
        layer.master_weight.zero_()
    assert layer.low_rank_up is not None
    assert layer.low_rank_down is not None
    assert layer.signs is not None
    rotated = (tokens() * layer.signs) @ (hadamard_matrix(IN) / IN**0.5)
    expected = rotated @ layer.low_rank_down.T @ layer.low_rank_up.T + layer.bias
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", ["in-place", "load", "train"])
def test_eval_never_serves_a_stale_weight(change: str) -> None:
    layer = QuantizedLinear.from_linear(original(), name="a", rank=2).eval()
    other = QuantizedLinear.from_linear(original().requires_grad_(False), name="a", rank=2).eval()
    x = tokens()
    with torch.inference_mode():
        before = layer(x).clone()
    if change == "in-place":
        with torch.no_grad():
            layer.master_weight.mul_(-1)
    elif change == "load":
        state = other.state_dict()
        state["master_weight"] = -state["master_weight"]
        layer.load_state_dict(state)
    else:
        layer.train()
        with torch.no_grad():
            layer.master_weight.mul_(-1)
        layer.eval()
    with torch.inference_mode():
        after = layer(x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after.clone(), plain_forward(layer, x), rtol=1e-9, atol=1e-9)


def test_state_dict_keys() -> None:
    layer = QuantizedLinear.from_linear(original(), name="a", rank=2)
    assert set(layer.state_dict()) == {
        "master_weight",
        "bias",
        "low_rank_up",
        "low_rank_down",
        "signs",
        "activation_bits",
    }
    bare = QuantizedLinear.from_linear(original(bias=False), name="a", rank=0, rotation="hadamard")
    assert set(bare.state_dict()) == {"master_weight", "activation_bits"}


def test_signs_depend_on_name_and_seed_alone() -> None:
    def signs(name: str, seed: int) -> Tensor:
        layer = QuantizedLinear.from_linear(original(), name=name, rank=2, seed=seed)
        assert layer.signs is not None
        return layer.signs

    assert torch.equal(signs("a", 0), signs("a", 0))
    assert not torch.equal(signs("a", 0), signs("b", 0))
    assert not torch.equal(signs("a", 0), signs("a", 1))
    assert set(signs("a", 0).tolist()) == {-1.0, 1.0}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'a'.*rank 11"):
        QuantizedLinear.from_linear(original(), name="a", rank=11)
    with pytest.raises(ConfigError, match="rotation"):
        QuantizedLinear.from_linear(original(), name="a", rotation="fourier")
