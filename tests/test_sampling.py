"""Sampling: one seed per image whatever the batch, order or shard; guidance; schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.config import Workload, load_plan, load_workload
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError
from robuq_bench.judging.evaluation import batches_side_by_side
from robuq_bench.judging.sampling import (
    default_labels,
    sample_images,
    sample_values,
    shard,
)
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_

SEEDS = [3, 1000, 17, 4, 0, 2**40 + 1, 12, 255, 256, 31, 8, 90]


def make_workload(
    *, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **evaluation: Any
) -> Workload:
    digits = load_workload("digits")
    return digits.model_copy(
        update={
            "model": digits.model.model_copy(update=model or {}),
            "data": digits.data.model_copy(update=data or {}),
            "evaluation": digits.evaluation.model_copy(update={"sampling_steps": 5, **evaluation}),
        }
    )


class Recorder(nn.Module):
    """Stands in for a DiT: predicts epsilon 0 and notes what it is asked."""

    null_label = 10

    def __init__(self, variance: float | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scales: list[float] = []
        self.variance = variance

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((x.clone(), t.clone(), y.clone()))
        eps = torch.zeros_like(x)
        if self.variance is None:
            return eps
        return torch.cat([eps, torch.full_like(x, self.variance)], 1)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        self.scales.append(cfg_scale)
        return self(x, t, y)


class GaussianOracle(nn.Module):
    """The exact epsilon (and reverse variance) for pixels distributed as N(mean, std^2)."""

    mean, std = 0.3, 0.2

    def __init__(self, timesteps: list[int] | None = None) -> None:
        """With `timesteps`, ascending, also predict the variance of going one of them back."""
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        bars = Diffusion().alphas_cumprod
        bar = bars[int(t[0])]
        marginal = bar * self.std**2 + 1 - bar
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / marginal
        if self.timesteps is None:
            return eps.float()
        fraction = torch.tensor(0.0)
        if t[0] > 0:
            before = bars[self.timesteps[self.timesteps.index(int(t[0])) - 1]]
            beta = 1 - bar / before
            # Var(x_before | x_t) from the joint Gaussian of the two.
            variance = beta * (before * self.std**2 + 1 - before) / marginal
            small = beta * (1 - before) / (1 - bar)
            fraction = (variance / small).log() / (beta / small).log()
        return torch.cat([eps, (2 * fraction - 1).expand_as(x)], 1).float()


def random_dit(workload: Workload, seed: int = 0) -> DiT:
    model = DiT.from_config(workload.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_noise_and_labels_are_bit_equal_however_cut(sampler: str, learn_sigma: bool) -> None:
    """With a network of exact arithmetic the whole trajectory is a function of the noise."""
    workload = make_workload(
        model={"learn_sigma": learn_sigma}, sampler=sampler, cfg_scale=1.0, sampling_steps=5
    )

    def run(seeds: list[int], batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        model = Recorder(variance=0.3 if learn_sigma else None)
        values = sample_values(model, workload, seeds=seeds, batch_size=batch_size)
        first = [call for call in model.calls if int(call[1][0]) == int(model.calls[0][1][0])]
        return values, torch.cat([call[0] for call in first]), torch.cat([c[2] for c in first])

    values, noise, labels = run(SEEDS, len(SEEDS))
    for row, seed in enumerate(SEEDS):
        expected = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise[row], expected)
        assert labels[row] == seed % 10
    for batch_size in (1, 8):
        assert all(map(torch.equal, run(SEEDS, batch_size), (values, noise, labels)))
    backwards = run(SEEDS[::-1], 5)
    assert all(map(torch.equal, (part.flip(0) for part in backwards), (values, noise, labels)))
    shards = [run(list(shard(SEEDS, f"{i}/4")), 8) for i in (1, 2, 3, 4)]
    joined = (torch.cat(parts) for parts in zip(*shards, strict=True))
    assert all(map(torch.equal, joined, (values, noise, labels)))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_differ_by_at_most_one_level_however_cut(sampler: str) -> None:
    workload = make_workload(sampler=sampler, sampling_steps=10)
    teacher, _ = load_teacher(workload, "cpu")
    whole = sample_images(teacher, workload, seeds=SEEDS, batch_size=len(SEEDS))
    assert whole.dtype == torch.uint8
    assert whole.shape == (len(SEEDS), 1, 8, 8)
    assert whole.float().std() > 30
    single = sample_images(teacher, workload, seeds=SEEDS, batch_size=1)
    eights = sample_images(teacher, workload, seeds=SEEDS, batch_size=8)
    order = torch.randperm(len(SEEDS), generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(whole)
    shuffled[order] = sample_images(
        teacher, workload, seeds=[SEEDS[i] for i in order], batch_size=7
    )
    parts = [
        sample_images(teacher, workload, seeds=shard(SEEDS, f"{i}/4"), batch_size=8)
        for i in (1, 2, 3, 4)
    ]
    for other in (single, eights, shuffled, torch.cat(parts)):
        assert (other.int() - whole.int()).abs().max() <= 1


def test_shards_of_whole_batches_are_bit_equal_for_a_quantized_model() -> None:
    workload = make_workload()
    student, _ = load_teacher(workload, "cpu")
    quantize_(student, load_plan("a4"))
    whole = sample_images(student, workload, seeds=SEEDS, batch_size=3)
    parts = [
        sample_images(student, workload, seeds=shard(SEEDS, f"{i}/4"), batch_size=3)
        for i in (4, 3, 2, 1)
    ]
    assert torch.equal(torch.cat(parts[::-1]), whole)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batches_side_by_side_give_the_bits_of_one_thread(sampler: str) -> None:
    workload = make_workload(sampler=sampler)
    student, _ = load_teacher(workload, "cpu")
    quantize_(student, load_plan("a2"))
    seen: list[int] = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample_values(student, workload, seeds=SEEDS, batch_size=3)
        torch.set_num_threads(4)
        together = sample_values(
            student,
            workload,
            seeds=SEEDS,
            batch_size=3,
            workers=4,
            progress=lambda done, total: seen.append(done),
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (4 * 5, len(SEEDS))


def test_few_large_batches_are_held_at_a_time() -> None:
    """A batch of DiT-XL/2 with guidance takes gigabytes: on 64 cores, one with all threads."""
    assert batches_side_by_side(load_workload("digits"), 8) == 8
    large = load_workload("imagenet256")
    assert batches_side_by_side(large, 64) == 1
    small = {"batch_size": 8, "cfg_scale": 1.0}
    evaluation = large.evaluation.model_copy(update=small)
    # 8 images of 256 tokens of 20 * 1152 float32 values are 180 MiB.
    assert batches_side_by_side(large.model_copy(update={"evaluation": evaluation}), 64) == 11


def test_different_seeds_and_labels_give_different_images() -> None:
    workload = make_workload(sampling_steps=10)
    teacher, _ = load_teacher(workload, "cpu")
    seeds = [5, 5, 15, 5]
    images = sample_images(teacher, workload, seeds=seeds, labels=torch.tensor([5, 6, 5, 5]))
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("sampler", "steps", "spacing", "tolerance"),
    [
        ("ddim", 250, None, 0.04),
        ("ddim", 249, "fractional", 0.04),
        ("ddpm", 20, None, 0.02),
        ("ddpm", 20, "integer", 0.02),
    ],
)
def test_exact_predictions_recover_the_data_distribution(
    sampler: str, steps: int, spacing: str | None, tolerance: float
) -> None:
    """DDPM needs few steps, each exact here with the right learned variance; DDIM many."""
    learn_sigma = sampler == "ddpm"
    workload = make_workload(
        model={"learn_sigma": learn_sigma},
        sampler=sampler,
        sampling_steps=steps,
        timestep_spacing=spacing,
        cfg_scale=1.0,
    )
    stride = 50.0 if spacing == "integer" else 999 / (steps - 1)
    timesteps = [round(stride * i) for i in range(steps)] if learn_sigma else None
    oracle = GaussianOracle(timesteps)
    values = sample_values(oracle, workload, seeds=range(400), batch_size=400)
    standard_error = oracle.std / math.sqrt(values.numel())
    assert values.mean().item() == pytest.approx(oracle.mean, abs=4 * standard_error)
    assert values.std().item() == pytest.approx(oracle.std, rel=tolerance)


def test_ddpm_noise_is_drawn_step_by_step_from_the_image_generator() -> None:
    """An independent replay of one image with epsilon 0, learned variance at beta (+1)."""
    workload = make_workload(
        model={"learn_sigma": True}, sampler="ddpm", sampling_steps=4, cfg_scale=1.0
    )
    values = sample_values(Recorder(variance=1.0), workload, seeds=[7, 8], batch_size=2)
    generator = torch.Generator().manual_seed(8)
    bars = Diffusion().alphas_cumprod
    x = torch.randn(1, 8, 8, generator=generator).double()
    for t, before in ((999, 666), (666, 333), (333, 0)):
        beta = 1 - bars[t] / bars[before]
        x0 = x / bars[t].sqrt()
        x = (
            bars[before].sqrt() * beta / (1 - bars[t]) * x0
            + (1 - beta).sqrt() * (1 - bars[before]) / (1 - bars[t]) * x
            + beta.sqrt() * torch.randn(1, 8, 8, generator=generator)
        )
    torch.testing.assert_close(values[1].double(), x / bars[0].sqrt(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ddim_drops_the_variance_channels(learn_sigma: bool) -> None:
    workload = make_workload(model={"learn_sigma": learn_sigma}, cfg_scale=1.0)
    plain = sample_values(Recorder(), make_workload(cfg_scale=1.0), seeds=[1, 2])
    model = Recorder(variance=5.0 if learn_sigma else None)
    assert torch.equal(sample_values(model, workload, seeds=[1, 2]), plain)


def test_guidance_doubles_the_batch_with_the_null_label() -> None:
    model = Recorder()
    sample_values(model, make_workload(cfg_scale=1.5), seeds=[13, 24], batch_size=2)
    assert model.scales == [1.5] * 5
    for x, t, y in model.calls:
        assert y.tolist() == [3, 4, 10, 10]
        assert torch.equal(x[:2], x[2:])
        assert t.shape == (4,)
    assert [int(t[0]) for _, t, _ in model.calls] == [800, 600, 400, 200, 0]

    plain = Recorder()
    sample_values(plain, make_workload(cfg_scale=1.0), seeds=[13, 24], batch_size=2)
    assert plain.scales == []
    assert [y.tolist() for _, _, y in plain.calls] == [[3, 4]] * 5


def test_guided_sampling_equals_two_separate_passes() -> None:
    workload = make_workload(cfg_scale=2.0, sampling_steps=5)
    model = random_dit(workload)
    values = sample_values(model, workload, seeds=[4, 5])
    x = torch.stack(
        [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    )
    bars = Diffusion().alphas_cumprod.float()
    with torch.no_grad():
        for t in (800, 600, 400, 200, 0):
            steps = torch.full((2,), t)
            cond, null = (
                model(x, steps, torch.tensor([4, 5])),
                model(x, steps, torch.tensor([10, 10])),
            )
            eps = null + 2.0 * (cond - null)
            before = bars[t - 200] if t else torch.tensor(1.0)
            x0 = (x - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(values, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_modes_of_all_modules_are_restored_also_after_a_failure() -> None:
    workload = make_workload()
    model = random_dit(workload).train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    sample_images(model, workload, seeds=[1])
    assert {name: module.training for name, module in model.named_modules()} == before

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_images(model, workload, seeds=[1], progress=fail)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.train()
    x, t, y = torch.zeros(1, 1, 8, 8), torch.tensor([1]), torch.tensor([1])
    model(x, t, y).sum().backward()


def test_progress_counts_images_up_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    sample_images(
        Recorder(),
        make_workload(),
        seeds=range(7),
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [total for _, total in seen] == [7] * 15
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert [done[4], done[9], done[14]] == [3, 6, 7]


def test_latent_workloads_keep_their_floats() -> None:
    workload = make_workload(data={"source": "latents"}, cfg_scale=1.0)
    values = sample_images(Recorder(), workload, seeds=[1, 2])
    assert values.dtype == torch.float32
    assert torch.equal(
        values, sample_values(Recorder(), make_workload(cfg_scale=1.0), seeds=[1, 2])
    )


def test_no_seeds_give_no_images() -> None:
    images = sample_images(Recorder(), make_workload(), seeds=[])
    assert images.shape == (0, 1, 8, 8)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1]), r"shape \(2,\)"),
        (torch.tensor([1.0, 2.0]), "int64"),
        (torch.tensor([0, 10]), r"0\.\.9, got 0\.\.10"),
        (torch.tensor([-1, 3]), r"0\.\.9"),
    ],
)
def test_unfit_labels_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample_images(Recorder(), make_workload(), seeds=[1, 2], labels=labels)


def test_unfit_batch_size_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size"):
        sample_images(Recorder(), make_workload(), seeds=[1], batch_size=0)


def test_default_labels_are_balanced_over_consecutive_seeds() -> None:
    labels = default_labels(range(30, 130), 10)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [10] * 10
