"""`QuantizedLinear`: what it computes, its gradients, its cache and its state dict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder, hadamard_matrix
from robuq_bench.methods import ScalingMethod, WeightMethod
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights.ternary_twn import TernaryTWN
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.linear import QuantizedLinear

IN, OUT, TOKENS = 24, 10, 37
QUANTIZERS = ("robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet")


def original(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, bias=bias).double()


def layer_of(bias: bool = True, **slots: Any) -> QuantizedLinear:
    return quantized(original(bias), "a", **slots)


def tokens(features: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, features, generator=generator, dtype=torch.float64)


class Twn(torch.autograd.Function):
    """Dequantized ternary weight, from the rule; its gradient is clamped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        kept = weight.abs() >= 0.5 * weight.abs().mean(1, keepdim=True)
        scale = (weight.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return weight.sign() * kept * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


def plain_forward(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer written out: rotate, quantize, multiply, add the branch on unquantized input."""
    rotation: Any = layer.rotation
    if rotation is not None:
        if rotation.signs is not None:
            x = x * rotation.signs
        x = x @ (hadamard_matrix(layer.in_features) / layer.in_features**0.5)
    quantized, bits = x, layer.activation_bits
    if bits is not None:
        quantized = token_grid(layer.methods["activation"].method).fake_quantize(x, bits)
    weight = (
        layer.master_weight if layer.weight_quantizer is None else Twn.apply(layer.master_weight)
    )
    y = F.linear(quantized, weight, layer.bias)
    if layer.branch is not None:
        branch: Any = layer.branch
        y = y + (x @ branch.down.T) @ branch.up.T
    return y


@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
@pytest.mark.parametrize("rank", [0, 3])
def test_without_quantizers_it_is_the_original_layer(rotation: str, rank: int) -> None:
    linear = original()
    layer = layer_of(rotation=rotation, rank=rank, weight="none", activation="none")
    torch.testing.assert_close(layer(tokens()), linear(tokens()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized-hadamard"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_layer_computes_itself_written_out(
    rotation: str, rank: int, bias: bool, quantizer: str, bits: int
) -> None:
    layer = layer_of(bias, rotation=rotation, rank=rank, activation=(quantizer, bits)).train()
    assert fast_paths.path_for(layer, tokens()).name == "fused CPU"
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
    layer = layer_of(rank=2, activation=(quantizer, 3))
    whole = layer(tokens())
    monkeypatch.setattr("robuq_bench.quantization.fused.BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(layer(tokens()), whole, rtol=1e-12, atol=1e-12)


def test_the_main_weight_is_the_residual_in_the_rotated_basis() -> None:
    linear = original()
    layer: Any = layer_of(rank=4)
    rotated = (linear.weight * layer.rotation.signs) @ (hadamard_matrix(IN) / IN**0.5)
    product = layer.branch.up @ layer.branch.down
    torch.testing.assert_close(layer.master_weight + product, rotated, rtol=1e-10, atol=1e-10)


def test_the_branch_reads_the_unquantized_activation() -> None:
    layer: Any = layer_of(rank=3, activation=("robust-midtread", 1))
    with torch.no_grad():
        layer.master_weight.zero_()
    rotated = (tokens() * layer.rotation.signs) @ (hadamard_matrix(IN) / IN**0.5)
    expected = rotated @ layer.branch.down.T @ layer.branch.up.T + layer.bias
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-9, atol=1e-9)


class Halves(nn.Module):
    """Inputs divided by channel, weights multiplied."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale.to(x.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Scaled(ScalingMethod):
    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        return Halves(torch.linspace(1, 3, weight.shape[1], dtype=torch.float64))


def test_slots_are_fitted_one_on_the_other_in_their_order() -> None:
    """s, then R, then L, and Q_w gets what is left of the weight."""
    linear = original()
    layer: Any = layer_of(scaling=Scaled(method="scaled"), rank=2)
    scale = torch.linspace(1, 3, IN, dtype=torch.float64)
    rotation = torch.diag(layer.rotation.signs) @ hadamard_matrix(IN) / IN**0.5
    product = layer.branch.up @ layer.branch.down
    torch.testing.assert_close(
        layer.master_weight, linear.weight * scale @ rotation - product, rtol=1e-9, atol=1e-9
    )
    rotated = (tokens() / scale) @ rotation
    operand = token_grid("robust-midtread").fake_quantize(rotated, 4)
    expected = F.linear(operand, Twn.apply(layer.master_weight), layer.bias)
    torch.testing.assert_close(layer(tokens()), expected + rotated @ product.T)


def test_the_order_in_which_methods_are_given_is_not_heard() -> None:
    methods = layer_of(rank=2).methods
    backwards = dict(reversed(methods.items()))
    found = QuantizedLinear.from_linear(original(), backwards, Site("a", 0))
    for name, value in layer_of(rank=2).state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


class Tenfold(WeightMethod):
    """Q_w that is fitted to another weight than it was given, as GPTQ is."""

    def fit(self, weight: Tensor, site: Site) -> Any:
        return nn.Identity(), 10 * weight


def test_a_weight_method_may_return_another_weight() -> None:
    layer = layer_of(rotation="none", rank=0, activation="none", weight=Tenfold(method="tenfold"))
    assert torch.equal(layer.master_weight, 10 * original().weight)
    expected = F.linear(tokens(), 10 * original().weight, layer.bias)
    torch.testing.assert_close(layer(tokens()), expected)


@pytest.mark.parametrize("change", ["in-place", "load", "train"])
def test_eval_never_serves_a_stale_weight(change: str) -> None:
    layer = layer_of(rank=2).eval()
    other = quantized(original().requires_grad_(False), "a", rank=2).eval()
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
    assert set(layer_of(rank=2).state_dict()) == {
        "master_weight",
        "bias",
        "branch.up",
        "branch.down",
        "rotation.signs",
        "activation_bits",
    }
    bare = layer_of(bias=False, rank=0, rotation="hadamard")
    assert set(bare.state_dict()) == {"master_weight", "activation_bits"}


def test_a_state_with_the_names_of_before_slots_loads() -> None:
    layer, other = layer_of(rank=2), layer_of(rank=2)
    old_names = {"branch.up": "low_rank_up", "branch.down": "low_rank_down"}
    old_names |= {"rotation.signs": "signs", "master_weight": "weight"}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    state = {old_names.get(name, name): value for name, value in layer.state_dict().items()}
    other.load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_signs_depend_on_name_and_seed_alone() -> None:
    def signs(name: str, seed: int) -> Tensor:
        layer: Any = quantized(original(), name, seed=seed, rank=2)
        found: Tensor = layer.rotation.signs
        return found

    assert torch.equal(signs("a", 0), signs("a", 0))
    assert not torch.equal(signs("a", 0), signs("b", 0))
    assert not torch.equal(signs("a", 0), signs("a", 1))
    assert set(signs("a", 0).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_fitted_has_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    """Fitted in float64 from the weight as it is, and rounded once."""
    linear = original().to(dtype)
    layer = quantized(linear, "a", rank=2)
    exact = quantized(copy.deepcopy(linear).double(), "a", rank=2)
    for name, value in exact.state_dict().items():
        found = layer.state_dict()[name]
        assert torch.equal(found, value.to(found.dtype)), name
        # A rotation is kept in float32 at least, so that it goes on cancelling.
        expected = torch.promote_types(dtype, torch.float32) if "rotation" in name else dtype
        assert found.dtype == expected or not found.is_floating_point()
    x = tokens().to(dtype)
    assert layer(x).dtype == dtype


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 'a'.*branch\.rank 11"):
        layer_of(rank=11)
    with pytest.raises(UnsupportedHadamardOrder, match=r"layer 'a'.*92"):
        quantized(nn.Linear(92, 8), "a", rank=0)
    with pytest.raises(ConfigError, match="unknown rotation method 'fourier'"):
        layer_of(rotation="fourier")
    with pytest.raises(UsageError, match="layer 'a' takes 24 features"):
        layer_of(rank=2)(torch.randn(2, 5).double())
    layer = layer_of(rank=2, activation="none")
    with pytest.raises(ConfigError, match="layer 'a' has no activation quantizer"):
        layer.activation_bits = 4


def test_it_says_what_is_in_its_slots() -> None:
    text = repr(layer_of(rank=2))
    for part in (
        "in_features=24",
        "rotation=randomized-hadamard",
        "branch=svd",
        "rank 2",
        "4 bits",
    ):
        assert part in text
    assert layer_of(rank=2).methods["weight"] == TernaryTWN(method="ternary-twn")
