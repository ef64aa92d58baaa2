"""The weight of a quantized layer: cached where its owner says so, and its gradient's clamp."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.config import load_plan
from robuq_bench.errors import UsageError
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.convert import quantize_
from robuq_bench.quantization.gradient_clamp import clamp_gradients_, defer_gradient_clamp
from robuq_bench.quantization.linear import cached_weights

WIDTH = 32


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


class TestCache:
    """In a `cached_weights` block, and nowhere else."""

    def model(self) -> nn.Sequential:
        model = nn.Sequential(linear(), linear()).requires_grad_(False)
        return quantize_(model, load_plan("a4")).eval()  # type: ignore[return-value]

    def test_writing_through_data_is_seen(self) -> None:
        model = self.model()
        before = model(tokens())
        model[0].master_weight.data.mul_(-1)
        assert not torch.equal(model(tokens()), before)

    def test_functional_call_gives_each_weight_its_own_result(self) -> None:
        model = self.model()
        with cached_weights(model):
            results = {
                tuple(
                    torch.func.functional_call(
                        model, {"0.master_weight": torch.randn(WIDTH, WIDTH)}, (tokens(),)
                    )[0].tolist()
                )
                for _ in range(100)
            }
        assert len(results) == 100

    def test_in_the_block_changes_in_place_are_seen(self) -> None:
        model = self.model()
        with cached_weights(model):
            before = model(tokens())
            assert torch.equal(model(tokens()), before)
            model[0].master_weight.mul_(-1)
            after = model(tokens())
        assert not torch.equal(after, before)
        assert torch.equal(model(tokens()), after)

    def test_a_copy_made_inside_has_no_cache(self) -> None:
        model = self.model()
        with cached_weights(model):
            before = model(tokens())
            twin = copy.deepcopy(model)
        twin[0].master_weight.data.mul_(-1)
        assert not torch.equal(twin(tokens()), before)

    def test_the_weight_is_computed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        count = 0
        original = fast_paths.quantized_weight

        def counted(*arguments: Any) -> Tensor:
            nonlocal count
            count += 1
            return original(*arguments)

        monkeypatch.setattr(fast_paths, "quantized_weight", counted)
        with cached_weights(model), torch.inference_mode():
            for _ in range(3):
                model(tokens())
        assert count == 2


class TestGradientClamp:
    """The clamp of ternary-twn gradients to [-1, 1] where losses are scaled or accumulated."""

    def gradient(self, scale: float, parts: int, deferred: bool) -> Tensor:
        torch.manual_seed(0)
        model = quantize_(nn.Sequential(linear()), load_plan("a4"))
        if deferred:
            defer_gradient_clamp(model)
        x = torch.randn(8, WIDTH)
        for part in x.chunk(parts):
            (model(part).square().sum() * scale / 8).backward()
        weight = model[0].master_weight
        assert weight.grad is not None
        weight.grad /= scale
        if deferred:
            clamp_gradients_(model)
        return weight.grad

    def test_deferred_it_neither_feels_a_loss_scale_nor_micro_batches(self) -> None:
        plain = self.gradient(1, 1, deferred=False)
        assert float(plain.abs().max()) == 1.0  # the clamp acts in this example
        for scale, parts in ((1, 1), (65536, 1), (1, 4), (65536, 4)):
            found = self.gradient(scale, parts, deferred=True)
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        assert float(self.gradient(65536, 1, deferred=False).abs().max()) < 1e-4

    def test_training_under_float16_autocast_is_refused_unless_deferred(self) -> None:
        model = quantize_(nn.Sequential(linear()), load_plan("a4"))
        with torch.autocast("cpu", dtype=torch.float16):
            for mode in (True, False):
                with pytest.raises(UsageError, match=r"layer '0'.*clamp_gradients_"):
                    model.train(mode)(tokens())
            with torch.no_grad():
                model(tokens())
            model.requires_grad_(False)(tokens())
            model.requires_grad_(True)
            defer_gradient_clamp(model)
            model(tokens()).sum().backward()

    def test_training_in_float16_is_refused_unless_deferred(self) -> None:
        model = quantize_(nn.Sequential(linear()).half(), load_plan("a4"))
        x = tokens().half()
        with pytest.raises(UsageError, match=r"layer '0': training in float16 scales"):
            model(x).sum().backward()
        model.zero_grad()
        defer_gradient_clamp(model)
        model(x).sum().backward()

    def test_many_clamped_gradients_are_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        for scale, count in ((1e-4, 0), (65536.0, 1)):
            caplog.clear()
            model = quantize_(nn.Sequential(linear()), load_plan("a4"))
            for _ in range(3):
                model.zero_grad()
                (model(tokens()).sum() * scale).backward()
            told = [r.getMessage() for r in caplog.records if "GradScaler" in r.getMessage()]
            assert len(told) == count

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_accumulation_is_refused_unless_deferred(self, set_to_none: bool) -> None:
        model = copy.deepcopy(quantize_(nn.Sequential(linear()), load_plan("a4")))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):  # steps of one pass each
            optimizer.zero_grad(set_to_none=set_to_none)
            model(tokens()).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        torch.autograd.grad(model(tokens()).sum(), [model[0].master_weight])
        optimizer.zero_grad(set_to_none=set_to_none)
        model(tokens()).sum().backward()
        with pytest.raises(UsageError, match=r"layer '0': gradients are accumulated"):
            model(tokens()).sum().backward()
        defer_gradient_clamp(model)
        model(tokens()).sum().backward()
