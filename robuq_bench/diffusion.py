"""Gaussian diffusion: noise schedule, training losses and the samplers' schedulers.

Sources: Ho et al. 2020 (DDPM, simple loss), Nichol & Dhariwal 2021 (hybrid loss with learned
variance, respaced timesteps), Song et al. 2021 (DDIM), Page 1977 (tanh for the Gaussian's
distribution function). Sampling steps are diffusers' schedulers.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from robuq_bench.errors import UsageError

# The hybrid loss adds the variational bound rescaled to this many timesteps' worth (T / 1000).
VB_WEIGHT_PER_TIMESTEP = 1.0 / 1000.0


class Diffusion:
    """Linear-beta diffusion over `num_train_timesteps` steps; tables are float64 [T] on CPU.

    `cdf_approximation` None or "tanh": see `discretized_gaussian_log_likelihood`.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        cdf_approximation: str | None = None,
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.cdf_approximation = cdf_approximation
        self.beta_start, self.beta_end = beta_start, beta_end
        self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        one_minus = 1 - self.alphas_cumprod
        posterior_variance = self.betas * (1 - previous) / one_minus
        # The posterior variance is 0 at t = 0; its log takes the value of t = 1 there.
        self.posterior_log_variance = torch.log(
            torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        )
        self.log_betas = torch.log(self.betas)
        self.posterior_mean_x0 = self.betas * previous.sqrt() / one_minus
        self.posterior_mean_xt = (1 - previous) * (1 - self.betas).sqrt() / one_minus

    @classmethod
    def from_config(cls, diffusion_config: Any) -> Diffusion:
        """Build from a workload's `diffusion` section."""
        return cls(
            diffusion_config.num_train_timesteps,
            diffusion_config.beta_start,
            diffusion_config.beta_end,
            diffusion_config.cdf_approximation,
        )

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        return table.to(like.device, like.dtype)[t].view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse x0 [B, C, H, W] to timestep t [B]: sqrt(abar) x0 + sqrt(1 - abar) noise."""
        signal = self._at(self.alphas_cumprod.sqrt(), t, x0)
        return signal * x0 + self._at((1 - self.alphas_cumprod).sqrt(), t, x0) * noise

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Invert `q_sample` for the predicted noise."""
        reciprocal = self._at(self.alphas_cumprod.rsqrt(), t, x_t)
        return reciprocal * x_t - self._at((1 / self.alphas_cumprod - 1).sqrt(), t, x_t) * eps

    def learned_range_log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        """Interpolate log-variance between the posterior's and beta's by values in [-1, 1]."""
        low = self._at(self.posterior_log_variance, t, values)
        high = self._at(self.log_betas, t, values)
        fraction = (values + 1) / 2
        return fraction * high + (1 - fraction) * low

    def training_loss(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Per-sample loss [B]: epsilon MSE, plus the variational bound if sigma is predicted.

        output is [B, C, H, W] (epsilon only) or [B, 2C, H, W] (epsilon and variance values);
        the bound sees a detached epsilon, so that it trains the variance alone.
        """
        channels = x0.shape[1]
        # Half-precision output would round the log-variance tables to its own precision.
        output = output.to(x0.dtype)
        eps = output[:, :channels]
        mse = (eps - noise).square().flatten(1).mean(1)
        if output.shape[1] == channels:
            return mse
        if output.shape[1] != 2 * channels:
            raise UsageError(
                f"model output has {output.shape[1]} channels; expected {channels}, or "
                f"{2 * channels} with learned sigma"
            )
        bound = self._variational_bound(eps.detach(), output[:, channels:], x0, x_t, t)
        return mse + bound * self.num_train_timesteps * VB_WEIGHT_PER_TIMESTEP

    def _variational_bound(
        self, eps: Tensor, variance_values: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """KL(q(x_{t-1}|x_t,x_0) || p) in bits per dimension [B]; decoder likelihood at t = 0."""

        def posterior_mean(start: Tensor) -> Tensor:
            from_x0 = self._at(self.posterior_mean_x0, t, start) * start
            return from_x0 + self._at(self.posterior_mean_xt, t, start) * x_t

        true_mean = posterior_mean(x0)
        true_log_var = self._at(self.posterior_log_variance, t, x0)
        mean = posterior_mean(self.predict_x0(x_t, t, eps))
        log_var = self.learned_range_log_variance(variance_values, t)
        kl = 0.5 * (
            log_var
            - true_log_var
            - 1
            + torch.exp(true_log_var - log_var)
            + (true_mean - mean).square() * torch.exp(-log_var)
        )
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var, self.cdf_approximation)
        per_sample = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return per_sample / math.log(2.0)


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_scale: Tensor, cdf_approximation: str | None = None
) -> Tensor:
    """Log-probability (nats) of 8-bit x in [-1, 1] under a Gaussian integrated over its bin.

    Probabilities below 1e-12 count as 1e-12. The integral is exact for `cdf_approximation` None;
    "tanh" takes P(z) = (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2 (Page 1977), which is up to
    3e-4 off, as improved diffusion and DiT do.

    Raises:
        UsageError: another approximation.
    """
    if cdf_approximation not in (None, "tanh"):
        raise UsageError(
            f"diffusion.cdf_approximation must be none or 'tanh', got {cdf_approximation!r}"
        )
    tail = _tail if cdf_approximation is None else _tanh_tail
    inverse_scale = torch.exp(-log_scale) * math.sqrt(0.5)
    distance = (x - mean).abs()
    # The outermost bins extend to infinity.
    below = tail((mean - x - 1 / 255) * inverse_scale)
    above = tail((x - mean - 1 / 255) * inverse_scale)
    # Seen from the nearer tail, where it is small, the difference of the edges is exact.
    inside = tail((distance - 1 / 255) * inverse_scale) - tail((distance + 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))
    return torch.log(probability.clamp(min=1e-12))


def _tail(v: Tensor) -> Tensor:
    """Probability that a standard normal exceeds v sqrt(2)."""
    # torch.special.ndtr loses the tails in float32; erfc keeps them.
    return 0.5 * torch.erfc(v)


def _tanh_tail(v: Tensor) -> Tensor:
    """The same by Page's tanh, as a sigmoid, which keeps the tail in float32."""
    z = v * math.sqrt(2)
    return torch.sigmoid(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def respaced_timesteps(num_train_timesteps: int, steps: int, spacing: str) -> list[int]:
    """The `steps` timesteps that are sampled, ascending from 0, by improved diffusion's rules.

    "fractional" ("50" there) adds up strides of (T - 1) / (steps - 1) and rounds; the sum's own
    rounding decides what becomes of a half. "integer" ("ddim50" there) takes every k-th, with the
    least k that gives `steps` of them.

    Raises:
        UsageError: steps outside 1..T, no k for "integer", or another spacing.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise UsageError(
            f"evaluation.sampling_steps must be in 1..{num_train_timesteps}, got {steps}"
        )
    if spacing == "fractional":
        strides = [(num_train_timesteps - 1) / max(steps - 1, 1)] * (steps - 1)
        return [round(position) for position in itertools.accumulate(strides, initial=0.0)]
    if spacing != "integer":
        raise UsageError(
            f"evaluation.timestep_spacing must be 'integer' or 'fractional', got {spacing!r}"
        )
    stride = -(-num_train_timesteps // steps)
    timesteps = list(range(0, num_train_timesteps, stride))
    if len(timesteps) != steps:
        raise UsageError(
            f"no integer stride takes {steps} of {num_train_timesteps} timesteps; "
            f"set evaluation.sampling_steps={len(timesteps)}, or evaluation.timestep_spacing="
            "fractional"
        )
    return timesteps


class _DDIM:
    """Deterministic DDIM (eta = 0) on given timesteps, in the terms of diffusers' schedulers.

    diffusers' own takes the timestep T / steps below the present one as the next, whatever it
    really is.
    """

    def __init__(self, diffusion: Diffusion, timesteps: list[int]) -> None:
        bars = diffusion.alphas_cumprod[timesteps]
        self.timesteps = torch.tensor(timesteps).flip(0)
        self._bars = dict(zip(timesteps, bars.tolist(), strict=True))
        self._bars_before = dict(zip(timesteps, [1.0, *bars[:-1].tolist()], strict=True))

    def step(self, eps: Tensor, t: Tensor, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """x at the next lower timestep, from x at t and the noise predicted there."""
        bar, before = self._bars[int(t)], self._bars_before[int(t)]
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        return (math.sqrt(before) * x0 + math.sqrt(1 - before) * eps,)


def make_scheduler(
    diffusion: Diffusion, sampler: str, steps: int, learn_sigma: bool, spacing: str | None = None
) -> Any:
    """Return a diffusers scheduler (or one like it) with `steps` respaced timesteps set.

    "ddim" is deterministic (eta = 0); "ddpm" is ancestral, with the learned variance range when
    the model predicts sigma, else the fixed small variance. For `spacing` see
    `respaced_timesteps`. None is diffusers' own: for ddim "integer" with steps that divide T
    (another stride would leave out the noisiest timesteps), for ddpm "fractional" with exact halves
    rounded to even: DiT's at 10, 20, 25, 50, 100, 250 steps, one timestep off at some others.

    Raises:
        UsageError: an unknown sampler or spacing, or steps that it cannot have.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if sampler not in ("ddim", "ddpm"):
        raise UsageError(f"evaluation.sampler must be 'ddim' or 'ddpm', got {sampler!r}")
    timesteps = respaced_timesteps(diffusion.num_train_timesteps, steps, spacing or "fractional")
    if spacing is None and sampler == "ddim":
        _check_divides(steps, diffusion.num_train_timesteps)
    common: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "linear",
        "clip_sample": False,
    }
    if sampler == "ddim" and spacing is not None:
        return _DDIM(diffusion, timesteps)
    if sampler == "ddim":
        scheduler: Any = DDIMScheduler(**common, timestep_spacing="leading", set_alpha_to_one=True)
    else:
        variance = "learned_range" if learn_sigma else "fixed_small"
        scheduler = DDPMScheduler(**common, timestep_spacing="linspace", variance_type=variance)
    if spacing is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps[::-1])
    return scheduler


def _check_divides(steps: int, number: int) -> None:
    if number % steps:
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        below = max(d for d in divisors if d < steps)
        above = min(d for d in divisors if d > steps)
        raise UsageError(
            f"evaluation.sampling_steps must divide {number} for DDIM, got {steps}; the nearest "
            f"are {below} and {above}, or set evaluation.timestep_spacing"
        )
