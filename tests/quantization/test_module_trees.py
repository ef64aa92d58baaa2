"""`quantize_` on what models are really like: shared, tied, hooked, frozen, wrapped, half, root."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from making import changed, rule
from torch import Tensor, nn

from robuq_bench.config import load_plan
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.quantization.convert import quantize_, quantized_layers, set_activation_bits
from robuq_bench.quantization.linear import QuantizedLinear

WIDTH = 32


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, **options)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()
        self.nested = nn.ModuleDict({"b": self.a})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.nested["b"](self.a(x))
        return result


def test_a_shared_layer_stays_one_layer_under_all_its_names() -> None:
    model = quantize_(Shared(), load_plan("a4"))
    assert isinstance(model.a, QuantizedLinear)
    assert model.a is model.nested["b"]
    assert list(quantized_layers(model)) == ["a"]


def test_a_shared_layer_with_two_answers_is_refused() -> None:
    plan = changed("a4", first=[rule("kept", match=["*.b"])])
    model = Shared()
    with pytest.raises(
        UsageError,
        match=r"'a' and 'nested\.b' are one layer.*it is kept by rule 'kept'.*\[\[layers",
    ):
        quantize_(model, plan)
    assert type(model.a) is nn.Linear


def tie_parameter(a: nn.Linear, b: nn.Linear) -> None:
    b.weight = a.weight


def tie_memory(a: nn.Linear, b: nn.Linear) -> None:
    b.weight.data = a.weight.data


@pytest.mark.parametrize("tie", [tie_parameter, tie_memory])
def test_tied_weights_are_refused_by_name(tie: Any) -> None:
    model = nn.Sequential(linear(), nn.GELU(), linear())
    tie(model[0], model[2])
    with pytest.raises(UsageError, match=r"'0\.weight' and '2\.weight' are one tied"):
        quantize_(model, load_plan("a4"))
    assert type(model[0]) is nn.Linear


def test_a_weight_tied_to_an_embedding_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(WIDTH, WIDTH), "out": linear()})
    model["out"].weight = model["table"].weight
    with pytest.raises(UsageError, match=r"'table\.weight' and 'out\.weight'"):
        quantize_(model, load_plan("a4"))


def test_a_model_that_is_a_linear_layer_comes_back_quantized() -> None:
    layer = linear()
    found = quantize_(layer, load_plan("a4"))
    assert isinstance(found, QuantizedLinear)
    assert list(quantized_layers(found)) == [""]


def test_hooks_move_and_their_handles_still_remove_them() -> None:
    model = nn.Sequential(linear(), linear())
    seen: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *_: seen.append("forward")),
        model[0].register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
        model[0].register_state_dict_post_hook(lambda *_: seen.append("state")),
    ]
    quantize_(model, load_plan("a4"))
    model(tokens().requires_grad_()).sum().backward()
    model.state_dict()
    assert seen == ["pre", "forward", "backward", "state"]
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model(tokens().requires_grad_()).sum().backward()
    assert len(seen) == 4


def test_hooks_that_run_always_or_ask_for_their_module_do_so() -> None:
    model = nn.Sequential(linear())
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    model[0].register_load_state_dict_pre_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    quantize_(model, load_plan("a4"))
    with pytest.raises(UsageError, match="takes 32 features"):
        model(torch.randn(2, 5))
    model.load_state_dict(model.state_dict())
    assert seen == ["always", "QuantizedLinear"]


def test_frozen_stays_frozen_and_modes_are_kept() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    model[1].weight.requires_grad_(False)
    model[2].requires_grad_(False).eval()
    quantize_(model, load_plan("a4"))
    trained = {name for name, p in model[1].named_parameters() if p.requires_grad}
    assert trained == {"bias"}
    assert not any(p.requires_grad for p in model[2].parameters())
    assert all(p.requires_grad for p in model[0].parameters())
    assert [m.training for m in model] == [True, True, False]


def compiled_alone() -> nn.Module:
    return nn.Sequential(torch.compile(linear(), backend="eager"), linear())


def in_a_list() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model.steps = [model[0]]
    return model


def in_a_partial() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model.first = functools.partial(nn.Module.__call__, model[0])
    return model


def as_a_bound_method() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model.run = {"first": model[0].forward}
    return model


@pytest.mark.parametrize("make", [compiled_alone, in_a_list, in_a_partial, as_a_bound_method])
def test_a_layer_that_would_still_be_called_is_refused(make: Any) -> None:
    model = make()
    with pytest.raises(UsageError, match="besides registering it"):
        quantize_(model, load_plan("a4"))
    assert quantized_layers(model) == {}


def test_memory_that_overlaps_is_a_tie_and_parts_of_one_are_not() -> None:
    flat = torch.randn(2 * WIDTH * WIDTH)
    apart = nn.Sequential(linear(), linear())
    for position, layer in enumerate(apart):
        part = flat[position * WIDTH * WIDTH : (position + 1) * WIDTH * WIDTH]
        layer.weight.data = part.view(WIDTH, WIDTH)
    quantize_(apart, load_plan("a4"))
    transposed = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
    transposed[2].weight.data = transposed[0].weight.data.t()
    table = nn.ModuleDict({"table": nn.Embedding(64, WIDTH), "out": linear()})
    table["out"].weight.data = table["table"].weight.data[:WIDTH]
    buffer = nn.Sequential(linear())
    buffer.register_buffer("copy", buffer[0].weight.data)
    for model in (transposed, table, buffer):
        with pytest.raises(UsageError, match="one tied parameter"):
            quantize_(model, load_plan("a4"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m[1].weight.data[0].fill_(float("nan")), "'1' has 32 values in its weight"),
        (lambda m: m[1].bias.data[:2].fill_(float("inf")), "'1' has 2 values in its bias"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[1]), None),
        (lambda m: nn.utils.spectral_norm(m[1]), "'1' is reparametrised"),
        (lambda m: setattr(m[1], "forward", lambda x: x), "'1' has a forward of its own"),
        (lambda m: m[1].to("meta"), "'1' is on the meta device"),
        (lambda m: m[1].register_buffer("mask", torch.ones(2)), r"'1' holds more.*\(mask\)"),
        (lambda m: m[1].add_module("adapter", linear()), r"'1' holds more.*\(adapter\)"),
        (lambda m: m[1].requires_grad_(False).to(torch.complex64), "'1' has a weight of torch.c"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_anything_changes(
    spoil: Any, message: str | None
) -> None:
    model = nn.Sequential(linear(), linear())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoil(model)
    if message is None:  # a subclass now: kept, and the other layer is converted
        assert list(quantized_layers(quantize_(model, load_plan("a4")))) == ["0"]
        return
    with pytest.raises(UsageError, match=message):
        quantize_(model, load_plan("a4"))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("bits", [True, 0, 9, 2.5, "4", -1])
def test_bits_are_whole_numbers_in_range(bits: Any) -> None:
    model = nn.Sequential(linear(), linear())
    with pytest.raises(ConfigError, match="layer '1'"):
        quantize_(model, load_plan("a4"), {"0": 4, "1": bits})
    assert type(model[0]) is nn.Linear
    quantize_(model, load_plan("a4"))
    with pytest.raises(ConfigError, match="layer '1'"):
        set_activation_bits(model, {"0": 2, "1": bits})
    with pytest.raises(ConfigError, match="layer '1'"):
        model[1].activation_bits = bits
    assert [layer.activation_bits for layer in model] == [4, 4]


def test_allocated_bits_are_in_the_state() -> None:
    model = quantize_(nn.Sequential(linear(), linear()), load_plan("a4"), {"0": 1, "1": 3})
    other = quantize_(nn.Sequential(linear(), linear()), load_plan("a4"))
    other.load_state_dict(model.state_dict())
    assert [layer.activation_bits for layer in other] == [1, 3]
    assert torch.equal(other(tokens()), model(tokens()))
    # An average of states, as EMA makes it, holds floats.
    averaged = {
        k: 0.9995 * v + (1 - 0.9995) * v if k.endswith("activation_bits") else v
        for k, v in model.state_dict().items()
    }
    other.load_state_dict(averaged)
    assert [layer.activation_bits for layer in other] == [1, 3]
    for value, message in ((99.0, "99"), (2.5, "2.5, not a number of bits")):
        damaged = model.state_dict() | {"0.activation_bits": torch.tensor(value)}
        with pytest.raises(ConfigError, match=rf"layer '0'.*{message}"):
            other.load_state_dict(damaged)


def test_a_state_of_before_bits_were_kept_loads_and_says_so() -> None:
    model = quantize_(nn.Sequential(linear(), linear()), load_plan("a4"), {"0": 1, "1": 3})
    old = {
        name.replace("master_weight", "weight"): value
        for name, value in model.state_dict().items()
        if not name.endswith("activation_bits")
    }
    other = quantize_(nn.Sequential(linear(), linear()), load_plan("a4"))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.activation_bits"'):
        other.load_state_dict(old)
    missing, unexpected = other.load_state_dict(old, strict=False)
    assert (missing, unexpected) == (["0.activation_bits", "1.activation_bits"], [])
    set_activation_bits(other, {"0": 1, "1": 3})
    assert torch.equal(other(tokens()), model(tokens()))


def test_half_precision_that_rotation_overflows_is_refused() -> None:
    plan = changed("a4", rank=0, rotation="hadamard")
    model = nn.Sequential(linear().half())
    model[0].weight.data.fill_(6e4)
    with pytest.raises(
        UsageError,
        match=r"'master_weight' of layer '0' overflows torch\.float16 once it is converted",
    ):
        quantize_(model, plan)
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_reading_a_weight_past_forward_is_refused_by_name() -> None:
    layer = quantize_(nn.Sequential(linear()), load_plan("a4"))[0]
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == (
        (WIDTH, WIDTH),
        torch.float32,
        "cpu",
    )
    assert (weight.numel(), weight.ndim, len(weight)) == (WIDTH * WIDTH, 2, WIDTH)
    assert weight.is_floating_point()
    assert "GuardedWeight" in repr(weight)
    assert weight.requires_grad
    assert not layer.requires_grad_(False).weight.requires_grad
    for misuse in (
        lambda: nn.functional.linear(tokens(), weight),
        lambda: weight @ weight,
        lambda: weight.data,
        lambda: weight.float(),
        lambda: weight.mul_(2),
        lambda: torch.linalg.svd(weight),
        lambda: weight.grad,
        lambda: torch.add(tokens(), 1, out=weight),
        lambda: torch.stack([weight, weight]),
        lambda: torch.tensor(weight),
        lambda: weight.tolist(),
        lambda: weight.numpy(),
        lambda: np.asarray(weight),
        lambda: {weight},
        lambda: nn.Linear(WIDTH, WIDTH).weight.data.copy_(weight),
        lambda: nn.init.zeros_(weight),
    ):
        with pytest.raises(UsageError, match=r"layer '0' is quantized.*\[\[layers\]\]"):
            misuse()


def test_pytorchs_fast_path_does_not_bypass_a_quantized_layer() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0, batch_first=True)
    quantize_(layer, load_plan("a4")).eval()
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        fast = layer(x)
    # Attention itself, in full precision, takes its own fast path and rounds differently.
    torch.testing.assert_close(fast, layer(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_quantized_model_can_be_copied() -> None:
    model = quantize_(nn.Sequential(linear()), load_plan("a4"), {"0": 3})
    twin = copy.deepcopy(model)
    twin[0].activation_bits = 2
    assert model[0].activation_bits == 3
