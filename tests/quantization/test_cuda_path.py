"""Layers and training steps with kernels against the same without; here in the interpreter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from making import quantized
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

if not torch.cuda.is_available():
    # Before the first import of a kernel: Triton reads it when it decorates one.
    os.environ["TRITON_INTERPRET"] = "1"

from robuq_bench.config import load_plan, load_workload
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.weights._ternary import TernaryWeight
from robuq_bench.methods.weights.ternary_twn import TernaryTWN
from robuq_bench.models.dit import DiT
from robuq_bench.quantization import cuda_path
from robuq_bench.quantization.convert import quantize_, quantized_layers
from robuq_bench.quantization.cuda_path import forced, kernel_support
from robuq_bench.quantization.fast_paths import quantized_weight
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.training import BatchSource, Trainer, qat_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OFF = "from robuq_bench.quantization.cuda_path import SWITCHED_OFF; print(SWITCHED_OFF)"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    from kernels.fake_quantize import triton as fake
    from kernels.ternary_weight import triton as ternary

    calls: list[str] = []
    for module in (fake, ternary):
        for name in (module.OP, f"{module.OP}_backward"):
            original = getattr(module, name)

            def launched(*args, original=original, name=name, **kwargs):  # type: ignore[no-untyped-def]
                calls.append(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, launched)
    return calls


def layer_of(width: int = 48, out: int = 24, *, seed: int = 0, **settings: Any) -> QuantizedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(width, out)
    return quantized(linear, **{"rank": 4, **settings}).to(DEVICE)


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*shape, generator=generator) * 2 + 0.5).to(DEVICE)


def run(layer: nn.Module, x: Tensor, *, kernels: bool) -> dict[str, Tensor]:
    """Output and every gradient; the loss is a random projection."""
    layer = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    with forced() if kernels else nullcontext():
        y = layer(x)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) / y.numel()
        (y.float() * upstream.to(DEVICE)).sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "x": x.grad}
    return found | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("rotation", ["randomized-hadamard", "hadamard", "none"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("quantizer", ["robust-midtread", "minmax", "bitnet"])
def test_layer_with_kernels_is_the_layer(
    rotation: str, rank: int, quantizer: str, used: list[str]
) -> None:
    layer = layer_of(rotation=rotation, rank=rank, activation=(quantizer, 4))
    x = tokens(3, 5, 48)
    expected = run(layer, x, kernels=False)
    if DEVICE.type == "cpu":
        assert not used
    found = run(layer, x, kernels=True)
    assert sorted(set(used)) == [
        "fake_quantize", "fake_quantize_backward", "ternary_weight", "ternary_weight_backward",
    ]  # fmt: skip
    assert found.keys() == expected.keys()
    assert ("branch.down" in found) == (rank > 0)
    for name, truth in expected.items():
        assert found[name].dtype == truth.dtype
        assert found[name].shape == truth.shape
        assert relative(found[name], truth) < (2e-3 if name == "x" else 1e-5), name


@pytest.mark.parametrize("weights", ["ternary-twn", "ternary-absmean", "none"])
@pytest.mark.parametrize("width", [44, 100])
def test_widths_and_weight_rules(weights: str, width: int) -> None:
    """44 has a factor that is not symmetric; 100 = 100 x 1 is beyond the kernel's factors."""
    layer = layer_of(width, weight=weights)
    x = tokens(6, width)
    expected = run(layer, x, kernels=False)
    found = run(layer, x, kernels=True)
    for name, truth in expected.items():
        assert relative(found[name], truth) < (2e-3 if name == "x" else 1e-5), name
    with forced():
        assert (kernel_support(layer) is None) == (width == 44)


def test_unsupported_layers_give_their_reason() -> None:
    layer = layer_of()
    if DEVICE.type == "cpu":
        assert kernel_support(layer) == "it is on cpu, kernels run on CUDA"
    with forced():
        assert kernel_support(layer) is None
        assert "evenly spaced" in str(kernel_support(layer_of(activation="lloyd-max")))
        assert "order 100" in str(kernel_support(layer_of(100)))
        assert "float64" in str(kernel_support(layer_of().double()))
        assert "float32" in str(kernel_support(layer_of().bfloat16()))
        layer.activation_bits = None
        assert "not quantized" in str(kernel_support(layer))
        wide = layer_of(16384, 2, rotation="none", rank=0)
        assert "16384 values in registers" in str(kernel_support(wide))


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "lloyd-max"},
        {"activation": ("robust-midtread", None)},
        {"activation": "none"},
        {"weight": "none"},
    ],
)
def test_what_kernels_do_not_take_still_runs(settings: dict[str, Any]) -> None:
    layer = layer_of(**settings)
    x = tokens(6, 48)
    expected, found = run(layer, x, kernels=False), run(layer, x, kernels=True)
    for name, truth in expected.items():
        assert relative(found[name], truth) < 2e-3, name


def test_double_precision_keeps_the_composition(used: list[str]) -> None:
    layer = layer_of().double()
    x = tokens(6, 48).double()
    expected, found = run(layer, x, kernels=False), run(layer, x, kernels=True)
    assert not used
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, used: list[str]) -> None:
    """Activations of either dtype; results as without kernels up to bfloat16's own rounding."""
    layer = layer_of(144, 64, activation=("robust-midtread", 8))
    x = tokens(2, 9, 144).to(dtype)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        expected = run(layer, x, kernels=False)
        used.clear()
        found = run(layer, x, kernels=True)
    assert set(used) >= {"fake_quantize", "ternary_weight"}
    assert found["output"].dtype == expected["output"].dtype == torch.bfloat16
    for name, truth in expected.items():
        assert found[name].dtype == truth.dtype
        assert relative(found[name], truth) < 0.03, name


def test_cached_weight_follows_autocast() -> None:
    layer = layer_of().eval()
    x = tokens(3, 48)
    with forced(), torch.no_grad():
        outside = copy.deepcopy(layer)(x)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert outside.dtype == torch.float32
        assert torch.equal(layer(x), outside)


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.fake_quantize import triton

    saved: list[bool] = []
    original = triton.fake_quantize

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        saved.append(kwargs["save"])
        return original(*args, **kwargs)

    monkeypatch.setattr(triton, "fake_quantize", spy)
    layer, x = layer_of(), tokens(3, 48)
    with forced():
        layer(x)
        layer(x.requires_grad_())
        with torch.no_grad():
            layer(x)
    assert saved == [False, True, False]


def test_memory_kept_for_the_backward_pass() -> None:
    """One byte per entry beside what the product keeps: values, rotated tokens."""
    x = tokens(6, 48).bfloat16().requires_grad_()
    quantizer = token_grid("robust-midtread")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with forced(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values, _ = cuda_path.fake_quantize(x, None, True, quantizer, 4, torch.bfloat16, True)
    assert [(t.dtype, t.numel()) for t in kept if t.numel() > 1] == [(torch.int8, x.numel())]
    (gradient,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_compiled_layer() -> None:
    layer = layer_of()
    x = tokens(6, 48)
    expected = run(layer, x, kernels=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    with forced():
        y = compiled(leaf)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) / y.numel()
        (y * upstream.to(DEVICE)).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(y.detach(), expected["output"])
    torch.testing.assert_close(leaf.grad, expected["x"])
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_new_allocation_is_no_new_graph() -> None:
    layer = layer_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with forced():
        outputs = []
        for bits in range(1, 9):
            layer.activation_bits = bits
            outputs.append(compiled(tokens(6, 48).requires_grad_()).detach())
            torch.testing.assert_close(outputs[-1], layer(tokens(6, 48)).detach())
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


def test_operators_are_well_formed() -> None:
    """Schema, fake tensors and autograd registration, as torch itself checks them."""
    x = tokens(4, 48).requires_grad_()
    signs = torch.ones(48, device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in (
        (x, signs, True, "robust-midtread", torch.tensor(4), torch.float32, True, True),
        (x, None, True, "robust-midtread", torch.tensor(4), torch.bfloat16, False, True),
        (x, None, False, "minmax", torch.tensor(4), torch.bfloat16, True, False),
    ):
        found = torch.library.opcheck(
            torch.ops.robuq_bench.fake_quantize.default, arguments, test_utils=tests
        )
        assert found == dict.fromkeys(tests, "SUCCESS")
    weight = tokens(4, 48).requires_grad_()
    found = torch.library.opcheck(
        torch.ops.robuq_bench.ternary_weight.default,
        (weight, "ternary-twn", torch.bfloat16),
        test_utils=tests,
    )
    assert found == dict.fromkeys(tests, "SUCCESS")


def test_training_steps_follow_those_without_kernels() -> None:
    workload = load_workload("digits")
    config = workload.model.model_copy(update={"hidden_size": 48, "depth": 1, "num_heads": 2})
    recipe = workload.training.model_copy(
        update={"steps": 6, "warmup_steps": 0, "batch_size": 4, "learning_rate": 3e-4}
    )
    losses: dict[bool, list[float]] = {}
    for kernels in (False, True):
        torch.manual_seed(0)
        teacher = DiT.from_config(config)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.15)
        student = quantize_(copy.deepcopy(teacher), load_plan("a8"))
        teacher, student = teacher.to(DEVICE).eval(), student.to(DEVICE)
        images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
        source = BatchSource(
            images, torch.arange(8), Diffusion(), teacher,
            batch_size=4, seed=0, stream="test", device=DEVICE,
        )  # fmt: skip
        batch = source.batch(0)
        source.batch = lambda step, batch=batch: batch  # type: ignore[method-assign]
        with forced() if kernels else nullcontext():
            if kernels:
                reasons = {kernel_support(layer) for layer in quantized_layers(student).values()}
                assert reasons == {None}
            trainer = Trainer(student, recipe, DEVICE)
            steps = trainer.train(source, qat_loss(Diffusion(), teacher, 1.0, 0.0), 6)
            losses[kernels] = [step["loss"] for step in steps]
    # At 8 bits, where a code that flips at an edge moves a trajectory least.
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True][-1] < 0.9 * losses[True][0]


@pytest.mark.parametrize(("value", "off"), [("off", True), ("", False)])
def test_switched_off_by_the_environment(value: str, off: bool) -> None:
    environment = {**os.environ, "ROBUQ_KERNELS": value}
    done = subprocess.run(
        [sys.executable, "-c", OFF], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(off)


@pytest.mark.gpu
def test_cuda_uses_the_kernels_unasked(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), tokens(3, 48)
    assert kernel_support(layer) is None
    layer(x)
    assert used == ["ternary_weight", "fake_quantize"]
    monkeypatch.setattr(cuda_path, "SWITCHED_OFF", True)
    assert kernel_support(layer) == "ROBUQ_KERNELS=off"
    layer(x)
    assert len(used) == 2


def test_forced_needs_the_interpreter_or_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1"), forced():
        pass


def test_weight_in_the_dtype_of_the_product() -> None:
    weight = tokens(6, 48)
    rule = TernaryWeight(TernaryTWN, "ternary-twn")
    plain = quantized_weight(weight, rule)
    with forced():
        found = quantized_weight(weight, rule, torch.float16)
    torch.testing.assert_close(found, plain.half())
    assert quantized_weight(weight, None, torch.float16).dtype == torch.float16
    assert quantized_weight(weight, None) is weight
