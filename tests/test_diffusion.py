"""Noise schedule, losses and schedulers against diffusers, torch.distributions and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from robuq_bench.config.workload import DiffusionConfig
from robuq_bench.diffusion import (
    Diffusion,
    discretized_gaussian_log_likelihood,
    make_scheduler,
    respaced_timesteps,
)
from robuq_bench.errors import UsageError

DIFFUSION = Diffusion()
TIMESTEPS = st.integers(0, 999)
SPACINGS = ("integer", "fractional")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full_ddpm(learn_sigma: bool = True) -> object:
    """diffusers' DDPM on all 1,000 timesteps."""
    return make_scheduler(DIFFUSION, "ddpm", 1000, learn_sigma)


def explicit_posterior(x0: Tensor, x_t: Tensor, t: int) -> Normal:
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}, from betas alone."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar_before = np.prod(1 - betas[:t])
    prior_precision = 1 / (1 - alpha_bar_before)
    likelihood_precision = (1 - betas[t]) / betas[t]
    precision = prior_precision + likelihood_precision
    mean = (
        prior_precision * math.sqrt(alpha_bar_before) * x0
        + likelihood_precision * x_t / math.sqrt(1 - betas[t])
    ) / precision
    return Normal(mean, torch.full_like(mean, precision**-0.5))


@pytest.mark.parametrize(("steps", "end"), [(1000, 0.02), (250, 0.08)])
def test_tables_equal_diffusers(steps: int, end: float) -> None:
    ours = Diffusion(steps, 1e-4, end)
    theirs = make_scheduler(ours, "ddpm", steps, learn_sigma=False)
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-7
    )


def test_q_sample_equals_diffusers_add_noise() -> None:
    x0, noise = torch.randn(2, 1000, 2, 3, 3, generator=generator(0)).unbind(0)
    t = torch.randperm(1000, generator=generator(1))
    theirs = full_ddpm().add_noise(x0, noise, t)
    ours = DIFFUSION.q_sample(x0, t, noise)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@settings(max_examples=25)
@given(t=TIMESTEPS, seed=st.integers(0, 2**32))
def test_predict_x0_inverts_q_sample(t: int, seed: int) -> None:
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator(seed)).unbind()
    steps = torch.full((3,), t)
    x_t = DIFFUSION.q_sample(x0, steps, noise)
    torch.testing.assert_close(DIFFUSION.predict_x0(x_t, steps, noise), x0, rtol=0, atol=1e-9)


@settings(max_examples=25)
@given(t=st.integers(1, 999))
def test_posterior_tables_equal_the_product_of_gaussians(t: int) -> None:
    x0, x_t = torch.randn(2, 5, dtype=torch.float64, generator=generator(t)).unbind()
    expected = explicit_posterior(x0, x_t, t)
    mean = DIFFUSION.posterior_mean_x0[t] * x0 + DIFFUSION.posterior_mean_xt[t] * x_t
    torch.testing.assert_close(mean, expected.mean, rtol=1e-9, atol=1e-12)
    variance = DIFFUSION.posterior_log_variance[t].exp()
    torch.testing.assert_close(variance.expand(5), expected.variance, rtol=1e-9, atol=0)


def test_log_variance_of_the_first_step_is_clipped_to_the_second() -> None:
    assert DIFFUSION.posterior_log_variance[0] == DIFFUSION.posterior_log_variance[1]
    assert torch.isfinite(DIFFUSION.posterior_log_variance).all()


@pytest.mark.parametrize("t", [1, 2, 10, 100, 500, 999])
def test_learned_range_equals_diffusers(t: int) -> None:
    values = torch.linspace(-1.5, 1.5, 13).reshape(1, 1, 1, 13)
    theirs = full_ddpm()._get_variance(torch.tensor(t), predicted_variance=values)
    ours = DIFFUSION.learned_range_log_variance(values, torch.tensor([t]))
    # diffusers derives beta from float32 products, which costs it digits at small t.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 if t < 50 else 1e-4)


def bound_of(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The variational part of the loss, by difference to the plain MSE."""
    loss = DIFFUSION.training_loss(output, x0, x_t, t, noise)
    return loss - (output[:, : x0.shape[1]] - noise).square().mean((1, 2, 3))


@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_variational_term_equals_torch_distributions(t: int) -> None:
    shape = (4, 2, 3, 3)
    x0, noise, eps, values = torch.randn(
        4, *shape, dtype=torch.float64, generator=generator(t)
    ).unbind()
    eps, steps = noise + 0.1 * eps, torch.full((4,), t)
    x_t = DIFFUSION.q_sample(x0, steps, noise)

    true = explicit_posterior(x0, x_t, t)
    guess = explicit_posterior(DIFFUSION.predict_x0(x_t, steps, eps), x_t, t)
    # LEARNED_RANGE: the log-variance moves from the posterior's (-1) to beta's (+1).
    fraction = (values + 1) / 2
    beta = np.linspace(1e-4, 0.02, 1000)[t]
    log_variance = fraction * math.log(beta) + (1 - fraction) * guess.variance.log()
    model = Normal(guess.mean, (0.5 * log_variance).exp())
    expected = kl_divergence(true, model).mean((1, 2, 3)) / math.log(2)

    actual = bound_of(torch.cat([eps, values], 1), x0, x_t, steps, noise)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_variational_term_of_the_first_step_is_the_decoder_likelihood() -> None:
    pixels = torch.randint(256, (3, 1, 4, 4), generator=generator(0))
    pixels[0, 0, 0] = torch.tensor([0, 255, 0, 255])
    x0 = pixels.double() / 127.5 - 1
    noise, eps = torch.randn(2, *x0.shape, dtype=torch.float64, generator=generator(1)).unbind()
    eps = noise + 0.3 * eps
    t = torch.zeros(3, dtype=torch.int64)
    x_t = DIFFUSION.q_sample(x0, t, noise)
    actual = bound_of(torch.cat([eps, torch.ones_like(x0)], 1), x0, x_t, t, noise)

    # values = +1 select beta_0, and the posterior mean at t = 0 is the predicted x0.
    mean, std = DIFFUSION.predict_x0(x_t, t, eps).numpy(), 1e-2
    upper = np.where(pixels.numpy() == 255, np.inf, x0.numpy() + 1 / 255)
    lower = np.where(pixels.numpy() == 0, -np.inf, x0.numpy() - 1 / 255)
    probability = norm.cdf(upper, mean, std) - norm.cdf(lower, mean, std)
    expected = -np.log2(probability).mean((1, 2, 3))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7)


@settings(max_examples=30)
@given(mean=st.floats(-1.5, 1.5), log_scale=st.floats(-3, 1))
def test_likelihoods_of_all_pixel_values_sum_to_one(mean: float, log_scale: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    likelihood = discretized_gaussian_log_likelihood(
        x, torch.full_like(x, mean), torch.full_like(x, log_scale)
    )
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_likelihood_keeps_its_digits_in_both_float32_tails() -> None:
    x = torch.arange(1, 255).float() / 127.5 - 1
    mean, std = torch.zeros_like(x), 0.1
    actual = discretized_gaussian_log_likelihood(x, mean, torch.full_like(x, math.log(std)))
    x64 = np.abs(x.double().numpy())
    expected = norm.logsf((x64 - 1 / 255) / std)
    expected += np.log1p(-np.exp(norm.logsf((x64 + 1 / 255) / std) - expected))
    # Inputs rounded to float32 limit the far tail; the floor of the clamp is 1e-12.
    inside = expected > math.log(1e-11)
    assert inside.sum() > 150
    np.testing.assert_allclose(actual.numpy()[inside], expected[inside], rtol=0, atol=2e-4)
    torch.testing.assert_close(actual, actual.flip(0), rtol=0, atol=2e-4)


def original_likelihood(x: np.ndarray, mean: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Improved diffusion's formula, from its description: tanh for P, bins of 2/255."""

    def cdf(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper = cdf(np.exp(-log_scale) * (x - mean + 1 / 255))
    lower = cdf(np.exp(-log_scale) * (x - mean - 1 / 255))
    probability = np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower))
    return np.log(np.maximum(probability, 1e-12))


def test_likelihood_by_tanh_equals_the_original_and_is_near_the_exact_one() -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = x + 0.05 * torch.randn(256, dtype=torch.float64, generator=generator(0))
    log_scale = torch.linspace(-4, 0, 256, dtype=torch.float64)
    expected = original_likelihood(x.numpy(), mean.numpy(), log_scale.numpy())
    actual = discretized_gaussian_log_likelihood(x, mean, log_scale, "tanh")
    exact = discretized_gaussian_log_likelihood(x, mean, log_scale)
    inside = expected > math.log(1e-6)  # in the tail the formula's 1 - tanh has no digits left
    assert inside.sum() > 200
    np.testing.assert_allclose(actual.numpy()[inside], expected[inside], rtol=1e-8, atol=1e-12)
    apart = (actual.exp() - exact.exp()).abs()
    assert 1e-4 < apart.max() < 2 * 3e-4
    with pytest.raises(UsageError, match="must be none or 'tanh', got 'erf'"):
        discretized_gaussian_log_likelihood(x, mean, log_scale, "erf")


def test_the_approximation_changes_the_loss_at_the_first_step_alone() -> None:
    section = DiffusionConfig(cdf_approximation="tanh")
    approximate = Diffusion.from_config(section)
    x0, noise = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator(7)).unbind()
    t = torch.tensor([0, 1, 500])
    x_t = DIFFUSION.q_sample(x0, t, noise)
    output = torch.cat([noise + 0.2, torch.full_like(x0, 0.3)], 1)
    exact = DIFFUSION.training_loss(output, x0, x_t, t, noise)
    loss = approximate.training_loss(output, x0, x_t, t, noise)
    assert torch.equal(loss[1:], exact[1:])
    mean = DIFFUSION.predict_x0(x_t[:1], t[:1], noise[:1] + 0.2)
    values = torch.full_like(x0[:1], 0.3)
    scale = 0.5 * DIFFUSION.learned_range_log_variance(values, t[:1])
    nll = -original_likelihood(x0[:1].numpy(), mean.numpy(), scale.numpy()).mean()
    mse = (output[:1, :1] - noise[:1]).square().mean()
    assert float(loss[0]) == pytest.approx(float(mse) + nll / math.log(2), rel=1e-9)
    assert float(loss[0]) != pytest.approx(float(exact[0]), rel=1e-6)


def test_loss_is_the_mse_without_learned_sigma() -> None:
    x0, noise, output = torch.randn(3, 5, 1, 4, 4, generator=generator(3)).unbind()
    t = torch.tensor([0, 1, 10, 500, 999])
    loss = DIFFUSION.training_loss(output, x0, DIFFUSION.q_sample(x0, t, noise), t, noise)
    expected = ((output - noise) ** 2).sum((1, 2, 3)) / 16
    torch.testing.assert_close(loss, expected)


def test_perfect_prediction_costs_nothing_but_the_decoder() -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator(4)).unbind()
    t = torch.tensor([1, 300, 999])
    output = torch.cat([noise, -torch.ones_like(x0)], 1)
    loss = DIFFUSION.training_loss(output, x0, DIFFUSION.q_sample(x0, t, noise), t, noise)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-9)


def test_variance_path_trains_the_variance_alone() -> None:
    x0, noise = torch.rand(2, 4, 1, 4, 4, generator=generator(5)).unbind()
    t = torch.tensor([0, 1, 400, 999])
    x_t = DIFFUSION.q_sample(x0, t, noise)
    output = torch.randn(4, 2, 4, 4, generator=generator(6), requires_grad=True)
    (gradient,) = torch.autograd.grad(
        DIFFUSION.training_loss(output, x0, x_t, t, noise).sum(), output
    )
    eps = output[:, :1].detach().requires_grad_()
    (mse_gradient,) = torch.autograd.grad((eps - noise).square().mean((1, 2, 3)).sum(), eps)
    assert torch.equal(gradient[:, :1], mse_gradient)
    assert (gradient[:, 1:].abs().amax((1, 2, 3)) > 0).all()
    assert torch.isfinite(gradient).all()


def test_half_precision_output_is_judged_in_single_precision() -> None:
    x0, noise = torch.rand(2, 4, 1, 4, 4, generator=generator(5)).unbind()
    t = torch.tensor([0, 1, 400, 999])
    x_t = DIFFUSION.q_sample(x0, t, noise)
    output = torch.randn(4, 2, 4, 4, generator=generator(6)).bfloat16()
    loss = DIFFUSION.training_loss(output, x0, x_t, t, noise)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DIFFUSION.training_loss(output.float(), x0, x_t, t, noise))


def test_output_with_wrong_channels_is_refused() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(UsageError, match="6 channels; expected 4, or 8"):
        DIFFUSION.training_loss(torch.zeros(1, 6, 2, 2), x, x, torch.zeros(1).long(), x)


def test_ddim_timesteps_have_an_integer_stride_from_zero() -> None:
    timesteps = make_scheduler(DIFFUSION, "ddim", 25, learn_sigma=True).timesteps
    assert timesteps.tolist() == list(range(960, -1, -40))


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 250, 500, 1000])
def test_ddpm_timesteps_are_respaced_as_in_dit(steps: int) -> None:
    """DiT's respacing walks from 0 by (T - 1) / (steps - 1) and rounds."""
    timesteps = make_scheduler(DIFFUSION, "ddpm", steps, learn_sigma=True).timesteps.tolist()
    stride = 999 / (steps - 1) if steps > 1 else 1.0
    walked, position = [], 0.0
    for _ in range(steps):
        walked.append(round(position))
        position += stride
    assert timesteps == walked[::-1]
    assert len(set(timesteps)) == steps


@pytest.mark.parametrize(
    ("total", "steps", "spacing", "expected"),
    [
        # Derived by hand: multiples of 9 / 3 = 3, of 9 / 4 = 2.25 and of 9 / 6 = 1.5.
        (10, 4, "fractional", [0, 3, 6, 9]),
        (10, 5, "fractional", [0, 2, 4, 7, 9]),
        (10, 7, "fractional", [0, 2, 3, 4, 6, 8, 9]),
        (10, 1, "fractional", [0]),
        (10, 10, "fractional", list(range(10))),
        (10, 5, "integer", [0, 2, 4, 6, 8]),
        (10, 4, "integer", [0, 3, 6, 9]),
        (1000, 50, "integer", list(range(0, 1000, 20))),
        (1000, 30, "integer", list(range(0, 1000, 34))),
    ],
)
def test_respaced_timesteps_by_hand(
    total: int, steps: int, spacing: str, expected: list[int]
) -> None:
    assert respaced_timesteps(total, steps, spacing) == expected


def test_fifty_fractional_steps_are_the_originals() -> None:
    found = respaced_timesteps(1000, 50, "fractional")
    # 999 / 49 = 20.3878: 0, 20.39, 40.78, 61.16, ..., 978.61, 999
    assert found[:6] == [0, 20, 41, 61, 82, 102]
    assert found[-3:] == [958, 979, 999]
    assert len(set(found)) == 50


@given(
    total=st.integers(1, 300), data=st.data(), spacing=st.sampled_from(["integer", "fractional"])
)
def test_respaced_timesteps_ascend_from_zero(total: int, data: st.DataObject, spacing: str) -> None:
    steps = data.draw(st.integers(1, total))
    strides = [len(range(0, total, k)) for k in range(1, total + 1)]
    if spacing == "integer" and steps not in strides:
        with pytest.raises(UsageError, match="no integer stride"):
            respaced_timesteps(total, steps, spacing)
        return
    found = respaced_timesteps(total, steps, spacing)
    assert len(found) == steps
    assert found[0] == 0
    assert found[-1] < total
    gaps = np.diff(found)
    assert (gaps > 0).all()
    if spacing == "integer":
        assert set(gaps.tolist()) <= {strides.index(steps) + 1}, "the least stride that fits"
    else:
        assert steps == 1 or (found[-1] == total - 1 and np.ptp(gaps) <= 1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_schedulers_take_either_spacing(sampler: str, spacing: str) -> None:
    timesteps = make_scheduler(DIFFUSION, sampler, 50, True, spacing).timesteps.tolist()
    assert timesteps == respaced_timesteps(1000, 50, spacing)[::-1]


def test_own_ddim_step_equals_diffusers_on_an_integer_stride() -> None:
    theirs = make_scheduler(DIFFUSION, "ddim", 50, learn_sigma=False)
    ours = make_scheduler(DIFFUSION, "ddim", 50, False, "integer")
    x, eps = torch.randn(2, 3, 1, 4, 4, generator=generator(8)).unbind()
    for t in ours.timesteps:
        expected = theirs.step(eps, t, x).prev_sample
        torch.testing.assert_close(ours.step(eps, t, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_own_ddim_goes_to_the_timestep_that_is_next() -> None:
    """With the true noise, every step lands on the same x0 and noise, one timestep on."""
    scheduler = make_scheduler(DIFFUSION, "ddim", 7, False, "fractional")
    x0, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, generator=generator(8)).unbind()
    timesteps = scheduler.timesteps
    x = DIFFUSION.q_sample(x0, timesteps[:1], noise)
    for t, before in itertools.pairwise([*timesteps, None]):
        (x,) = scheduler.step(noise, t, x)
        expected = x0 if before is None else DIFFUSION.q_sample(x0, before[None], noise)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)


def test_ddim_step_follows_its_formula() -> None:
    scheduler = make_scheduler(DIFFUSION, "ddim", 50, learn_sigma=False)
    x, eps = torch.randn(2, 3, 1, 4, 4, generator=generator(8)).unbind()
    for t in (980, 500, 20, 0):
        bar = float(DIFFUSION.alphas_cumprod[t])
        before = float(DIFFUSION.alphas_cumprod[t - 20]) if t else 1.0
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
        actual = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_ddpm_step_draws_from_the_respaced_posterior() -> None:
    scheduler = make_scheduler(DIFFUSION, "ddpm", 10, learn_sigma=True)
    timesteps = scheduler.timesteps
    x, eps, values = torch.randn(3, 1, 1, 4, 4, generator=generator(9)).unbind()
    values = values.clamp(-1, 1)
    for t, before in itertools.pairwise(timesteps):
        bar, bar_before = DIFFUSION.alphas_cumprod[t], DIFFUSION.alphas_cumprod[before]
        beta = 1 - bar / bar_before
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        precision = 1 / (1 - bar_before) + (1 - beta) / beta
        mean = (
            bar_before.sqrt() * x0 / (1 - bar_before) + (1 - beta).sqrt() / beta * x
        ) / precision
        fraction = (values + 1) / 2
        log_variance = fraction * beta.log() + (1 - fraction) * -precision.log()
        noise = torch.randn(x.shape, generator=generator(3))
        expected = mean + (0.5 * log_variance).exp() * noise
        actual = scheduler.step(torch.cat([eps, values], 1), t, x, generator=generator(3))
        torch.testing.assert_close(
            actual.prev_sample.double(), expected.double(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddim", 0, "1..1000"),
        ("ddpm", 1001, "1..1000"),
        ("ddim", 30, "nearest are 25 and 40, or set evaluation.timestep_spacing"),
        ("ddim", 600, "nearest are 500 and 1000"),
        ("euler", 10, "'ddim' or 'ddpm'"),
    ],
)
def test_impossible_protocols_are_refused(sampler: str, steps: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_scheduler(DIFFUSION, sampler, steps, learn_sigma=False)


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (600, "integer", "no integer stride takes 600 .* evaluation.sampling_steps=500"),
        (1001, "fractional", "1..1000"),
        (50, "leading", "'integer' or 'fractional', got 'leading'"),
    ],
)
def test_impossible_spacings_are_refused(steps: int, spacing: str, message: str) -> None:
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(UsageError, match=message):
            make_scheduler(DIFFUSION, sampler, steps, False, spacing)
