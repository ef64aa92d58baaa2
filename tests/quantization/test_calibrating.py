"""`quantize_` with methods that need to see their layers' inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.config import Plan
from robuq_bench.errors import UsageError
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, quantized_layers
from robuq_bench.quantization.fitting import Calibration
from robuq_bench.quantization.linear import QuantizedLinear

GPTQ = {
    "scaling": {"method": "smooth"},
    "rotation": {"method": "randomized-hadamard"},
    "branch": {"method": "svd", "rank": 2},
    "weight": {"method": "gptq", "bits": 3, "group": 12},
    "activation": {"method": "percentile", "bits": 4},
}


def plan_of(**slots: Any) -> Plan:
    return Plan.model_validate({"name": "test", "layers": [{"kind": ["block", "adaLN"], **slots}]})


def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=24, depth=3, num_heads=2,
        num_classes=3,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # DiT starts with gates of 0, which hide its blocks
    return model.eval()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 1, 4, 4, generator=generator),
            torch.randint(0, 1000, (8,), generator=generator),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Store(MutableMapping[str, dict[str, Tensor]]):
    """Keeps the states of blocks, and stops the calibration after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.states: dict[str, dict[str, Tensor]] = {}
        self.stop_after = stop_after

    def __setitem__(self, key: str, value: dict[str, Tensor]) -> None:
        self.states[key] = {name: tensor.clone() for name, tensor in value.items()}
        if self.stop_after is not None and len(self.states) == self.stop_after:
            raise KeyboardInterrupt

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        return self.states[key]

    def __delitem__(self, key: str) -> None:
        del self.states[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def test_the_same_inputs_give_the_same_model() -> None:
    first = quantize_(dit(), plan_of(**GPTQ), calibration=batches())
    again = quantize_(dit(), plan_of(**GPTQ), calibration=batches())
    assert len(quantized_layers(first)) == 15
    assert states_equal(first, again)
    other = quantize_(dit(), plan_of(**GPTQ), calibration=batches(2))
    assert not states_equal(first, other)


@pytest.mark.parametrize("predecessors", [True, False])
def test_an_interrupted_calibration_goes_on_to_the_same_model(predecessors: bool) -> None:
    def calibration(done: Store | None) -> Calibration:
        return Calibration(batches(), quantized_predecessors=predecessors, done=done)

    whole = quantize_(dit(), plan_of(**GPTQ), calibration=calibration(None))
    store = Store(stop_after=2)
    model = dit()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, plan_of(**GPTQ), calibration=calibration(store))
    assert not quantized_layers(model)
    assert states_equal(model, before)
    assert len(store) == 2
    store.stop_after = None
    seen: list[tuple[int, int]] = []
    resumed = calibration(store)
    resumed.on_block = lambda done, total: seen.append((done, total))
    assert states_equal(quantize_(model, plan_of(**GPTQ), calibration=resumed), whole)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_predecessors_are_quantized_or_not_as_asked() -> None:
    plan = plan_of(weight={"method": "gptq", "bits": 2})
    inside = [layer for layer in dit().state_dict() if layer.startswith("blocks.0.")]
    quantized = quantize_(dit(), plan, calibration=Calibration(batches())).state_dict()
    alone = quantize_(
        dit(), plan, calibration=Calibration(batches(), quantized_predecessors=False)
    ).state_dict()
    # Nothing precedes the first block.
    first = [key for key in quantized if key.startswith("blocks.0.")]
    assert len(first) >= len(inside)
    assert all(torch.equal(quantized[key], alone[key]) for key in first)
    last = "blocks.2.mlp.fc1.master_weight"
    assert not torch.equal(quantized[last], alone[last])


def test_what_gptq_sees_is_scaled_and_rotated() -> None:
    """The layer's own inputs, taken by a hook and mapped by its slots, give the same codes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    inputs = [torch.randn(64, 24) * torch.linspace(0.1, 4, 24) for _ in range(4)]
    slots = {
        "scaling": {"method": "smooth"},
        "rotation": {"method": "hadamard"},
        "weight": {"method": "gptq", "bits": 3},
    }
    quantize_(model, plan_of(**slots), calibration=inputs)
    layer: Any = model[0]
    tokens = layer.rotate_input(torch.cat(inputs)).double()
    from robuq_bench.methods import method_class
    from robuq_bench.methods.site import Site

    torch.manual_seed(0)
    weight = nn.Linear(24, 16).weight.detach().double()
    weight = layer.rotation.weight(layer.scaling.weight(weight))
    gptq: Any = method_class("weight", "gptq")(method="gptq", bits=3)
    site = Site("0", gram=tokens.T @ tokens, count=len(tokens))
    grid, expected = gptq.fit(weight, site)
    got = layer.weight_quantizer.codes(layer.master_weight)
    assert torch.equal(got.codes, grid.codes(expected.float()).codes)


def test_gptq_beats_rounding_to_nearest_in_a_model() -> None:
    test = batches(5)[-1]
    model = dit()
    exact = model(*test)

    def error(**slots: Any) -> float:
        quantized = quantize_(dit(), plan_of(**slots), calibration=batches(4)).eval()
        return float((quantized(*test) - exact).square().mean())

    with torch.no_grad():
        assert error(weight={"method": "gptq", "bits": 3}) < 0.9 * error(
            weight={"method": "rtn", "bits": 3}
        )


def test_without_inputs_the_method_is_named() -> None:
    with pytest.raises(UsageError, match=r"'gptq'.*needs to see inputs.*calibration"):
        quantize_(dit(), plan_of(weight={"method": "gptq", "bits": 4}))
    with pytest.raises(UsageError, match="calibration"):
        quantize_(dit(), plan_of(weight={"method": "gptq", "bits": 4}), calibration=[])


def test_a_blank_model_takes_the_state_of_a_fitted_one() -> None:
    fitted = quantize_(dit(), plan_of(**GPTQ), calibration=batches()).eval()
    blank = quantize_(dit(), plan_of(**GPTQ), blank=True).eval()
    blank.load_state_dict(fitted.state_dict())
    x = batches(1)[0]
    assert torch.equal(blank(*x), fitted(*x))


def test_it_works_on_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 4))
    out = quantize_(model, plan_of(**{**GPTQ, "branch": "none"}), calibration=[torch.randn(32, 12)])
    assert isinstance(out[0], QuantizedLinear)
    assert out(torch.randn(3, 12)).isfinite().all()


def test_weight_bits_by_layer_reach_the_method() -> None:
    plan = plan_of(weight={"method": "rtn", "bits": 4})
    name = "blocks.1.mlp.fc2"
    every = dict.fromkeys(allocatable_layers(quantize_(dit(), plan), of="weight"), 4)
    assert len(every) == 15
    model = quantize_(dit(), plan, weight_bits_by_layer={**every, name: 2})
    for each, layer in quantized_layers(model).items():
        quantizer: Any = layer.weight_quantizer
        limit = 1 if each == name else 7
        assert int(quantizer.codes(layer.master_weight).codes.abs().max()) == limit
    with pytest.raises(UsageError, match="has bits to choose; did you mean"):
        quantize_(dit(), plan, weight_bits_by_layer={"blocks.1.mlp.fc3": 2})
    with pytest.raises(UsageError, match="lacks 14 layers"):
        quantize_(dit(), plan, weight_bits_by_layer={name: 2})
    fixed = plan_of(weight={"method": "rtn", "bits": 4}, fixed_bits=True)
    with pytest.raises(UsageError, match="no layer whose weight has bits to choose"):
        quantize_(dit(), fixed, weight_bits_by_layer={name: 2})


@pytest.mark.parametrize("change", ["plan", "seed", "model", "inputs", "tokens"])
def test_what_was_kept_for_something_else_is_not_taken(change: str) -> None:
    store = Store()

    def fit(done: Store | None, change: str = "") -> nn.Module:
        slots = {
            **GPTQ,
            "activation": {"method": "percentile", "bits": 8 if change == "plan" else 4},
        }
        model = dit()
        if change == "model":
            with torch.no_grad():
                model.x_embedder.proj.weight.mul_(1.1)
        given = Calibration(
            batches(2 if change == "inputs" else 3),
            done=done,
            tokens=64 if change == "tokens" else 4096,
        )
        seed = int(change == "seed")
        return quantize_(model, plan_of(**slots), calibration=given, seed=seed)

    fit(store)
    assert len(store) == 3
    assert states_equal(fit(store, change), fit(None, change))
    assert len(store) == 6


def test_learned_steps_keep_their_bits() -> None:
    slots = {"activation": {"method": "lsq", "bits": 4}}
    model = dit()
    with pytest.raises(UsageError, match="no such layer"):
        quantize_(model, plan_of(**slots), {"blocks.0.mlp.fc1": 8}, calibration=batches())
    assert not quantized_layers(model)
    assert allocatable_layers(quantize_(model, plan_of(**slots), calibration=batches())) == []
    with pytest.raises(ValueError, match="bits to choose"):
        Plan.model_validate(
            {"name": "a", "layers": [slots], "bits": {"mean": 3, "choices": [2, 4]}}
        )


def test_attention_is_quantized_while_what_follows_is_observed() -> None:
    seen: list[bool] = []
    model = dit()
    attention = model.blocks[0].attn
    attention.proj.register_forward_pre_hook(
        lambda *_: seen.append(attention.matmul_quantizer is not None)
    )
    plan = Plan.model_validate(
        {"name": "a", "layers": [{"weight": {"method": "gptq", "bits": 4}}],
         "attention": {"matmul_bits": 8}}
    )  # fmt: skip
    quantize_(model, plan, calibration=iter(batches()))
    assert seen[-1]
    failing = dit()
    with pytest.raises(TypeError, match="must be Tensor"):
        quantize_(failing, plan, calibration=[(torch.randn(2, 1, 4, 4), torch.zeros(3), 0)])
    assert failing.blocks[0].attn.matmul_quantizer is None


def test_passes_that_differ_are_all_seen() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = torch.tanh(self.layer(x))
            return x

    inputs = [(torch.randn(4, 8), 1), (torch.randn(4, 8), 3)]
    seen: list[Tensor] = []
    plain = Loop()
    plain.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for each in inputs:
        plain(*each)
    peak = torch.cat(seen).abs().amax(0)
    slots = {"scaling": {"method": "smooth", "alpha": 1.0}}
    layer = quantize_(Loop(), plan_of(**slots), calibration=inputs).layer
    torch.testing.assert_close(layer.scaling.scale, peak)
