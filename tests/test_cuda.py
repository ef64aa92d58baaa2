"""The CUDA path computes what the CPU path does; skipped without a device, run by `make gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from robuq_bench.config import load_plan, load_workload
from robuq_bench.diffusion import Diffusion
from robuq_bench.hadamard.transform import hadamard_transform
from robuq_bench.judging.sampling import sample_images
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_
from robuq_bench.training import BatchSource, Trainer, qat_loss

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
STEPS = 3


def relative_error(value: Tensor, truth: Tensor) -> float:
    """RMS of the difference over the RMS of the truth."""
    difference = value.detach().cpu().double() - truth.detach().double()
    return float(difference.norm() / truth.detach().double().norm())


def digits_model(seed: int = 0) -> DiT:
    """DiT of the digits workload with every weight random: a fresh one would output zeros."""
    torch.manual_seed(seed)
    model = DiT.from_config(load_workload("digits").model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def batches(model: DiT, device: str) -> BatchSource:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1
    return BatchSource(
        images,
        torch.arange(64) % 10,
        Diffusion(),
        model,
        batch_size=32,
        seed=0,
        stream="test",
        device=device,
    )


@pytest.mark.parametrize("n", [144, 384, 1024, 1152, 4608])
def test_hadamard(n: int) -> None:
    x = torch.randn(3, 5, n, dtype=torch.float64)
    assert relative_error(hadamard_transform(x.to(DEVICE)), hadamard_transform(x)) < 1e-12
    assert relative_error(hadamard_transform(x.float().to(DEVICE)), hadamard_transform(x)) < 1e-5


@pytest.mark.parametrize("plan", ["fp", "a4", "a2-uniform", "baseline-a2", "bitnetv2-a4"])
def test_forward_and_gradients(plan: str) -> None:
    # double precision, and t = 0 because its embedding is computed in single precision: no value
    # may round to another code on the other device
    model = digits_model()
    batch = batches(model, "cpu").batch(0)
    x, t, y = batch.x_t.double(), torch.zeros_like(batch.t), batch.y
    if plan != "fp":
        quantize_(model, load_plan(plan))
    results = []
    for device in ("cpu", DEVICE):
        here = copy.deepcopy(model).double().to(device)
        output = here(x.to(device), t.to(device), y.to(device))
        output.square().mean().backward()
        gradients = [p.grad.cpu() for p in here.parameters() if p.grad is not None]
        results.append((output, gradients))
    (expected, expected_gradients), (output, gradients) = results
    assert relative_error(output, expected) < 1e-9
    assert len(gradients) == len(expected_gradients) > 0
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, truth) < 1e-9


def test_batches_are_the_same_on_every_device() -> None:
    model = digits_model()
    here, there = batches(model, "cpu").batch(5), batches(model, DEVICE).batch(5)
    for name in ("x0", "noise", "x_t", "t", "y"):
        assert getattr(there, name).device.type == torch.device(DEVICE).type
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("bf16", 0.05)])
def test_qat_losses_follow_the_cpu(precision: str, tolerance: float) -> None:
    workload = load_workload("digits")
    recipe = workload.training.model_copy(
        update={"steps": STEPS, "warmup_steps": 0, "log_every_steps": 1, "batch_size": 32}
    )
    losses = []
    for device, numbers in (("cpu", "fp32"), (DEVICE, precision)):
        teacher = digits_model().to(device)
        student = quantize_(digits_model(), load_plan("a4")).to(device)
        trainer = Trainer(student, recipe.model_copy(update={"precision": numbers}), device)
        loss = qat_loss(Diffusion(), teacher, 1.0, 0.0)
        records = trainer.train(batches(teacher, device), loss, STEPS)
        losses.append([record["loss"] for record in records])
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_samples_are_the_same_to_one_grey_level() -> None:
    workload = load_workload("digits")
    few = workload.evaluation.model_copy(update={"sampling_steps": 5})
    workload = workload.model_copy(update={"evaluation": few})
    seeds = range(12)
    here = sample_images(digits_model(), workload, seeds=seeds)
    there = sample_images(digits_model(), workload, seeds=seeds, device=DEVICE, batch_size=5)
    assert (here.int() - there.cpu().int()).abs().max() <= 1
