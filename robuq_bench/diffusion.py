"""Gaussian diffusion: noise schedule, training losses and the samplers' schedulers.

Sources: Ho et al. 2020 (DDPM, simple loss), Nichol & Dhariwal 2021 (hybrid loss with learned
variance), Song et al. 2021 (DDIM). Sampling steps are diffusers' schedulers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from robuq_bench.errors import UsageError

# The hybrid loss adds the variational bound rescaled to this many timesteps' worth (T / 1000).
VB_WEIGHT_PER_TIMESTEP = 1.0 / 1000.0


class Diffusion:
    """Linear-beta diffusion over `num_train_timesteps` steps; tables are float64 [T] on CPU."""

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
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
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var)
        per_sample = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return per_sample / math.log(2.0)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability (nats) of 8-bit x in [-1, 1] under a Gaussian integrated over its bin."""
    # torch.special.ndtr loses the tails in float32; erfc keeps them.
    inverse_scale = torch.exp(-log_scale) * math.sqrt(0.5)
    distance = (x - mean).abs()
    # The outermost bins extend to infinity.
    below = torch.erfc((mean - x - 1 / 255) * inverse_scale)
    above = torch.erfc((x - mean - 1 / 255) * inverse_scale)
    # Seen from the nearer tail, where erfc is small, the difference of the edges is exact.
    inside = torch.erfc((distance - 1 / 255) * inverse_scale) - torch.erfc(
        (distance + 1 / 255) * inverse_scale
    )
    probability = 0.5 * torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))
    return torch.log(probability.clamp(min=1e-12))


def make_scheduler(diffusion: Diffusion, sampler: str, steps: int, learn_sigma: bool) -> Any:
    """Return a diffusers scheduler with `steps` respaced timesteps set, as DiT respaces them.

    "ddim" is deterministic (eta = 0) on 0, T/steps, 2T/steps, ...; "ddpm" is ancestral on
    `steps` evenly spaced timesteps from 0 to T - 1 (rounded), with the learned variance range
    when the model predicts sigma, else the fixed small variance.

    Raises UsageError for an unknown sampler, steps outside 1..T, or DDIM steps that do not
    divide T: the stride would then leave out the noisiest timesteps.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if not 1 <= steps <= diffusion.num_train_timesteps:
        raise UsageError(
            f"evaluation.sampling_steps must be in 1..{diffusion.num_train_timesteps}, got {steps}"
        )
    common: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "linear",
        "clip_sample": False,
    }
    if sampler == "ddim":
        if diffusion.num_train_timesteps % steps:
            below, above = _neighbouring_divisors(diffusion.num_train_timesteps, steps)
            raise UsageError(
                f"evaluation.sampling_steps must divide {diffusion.num_train_timesteps} for DDIM, "
                f"got {steps}; the nearest are {below} and {above}"
            )
        scheduler: Any = DDIMScheduler(**common, timestep_spacing="leading", set_alpha_to_one=True)
    elif sampler == "ddpm":
        variance = "learned_range" if learn_sigma else "fixed_small"
        scheduler = DDPMScheduler(**common, timestep_spacing="linspace", variance_type=variance)
    else:
        raise UsageError(f"evaluation.sampler must be 'ddim' or 'ddpm', got {sampler!r}")
    scheduler.set_timesteps(steps)
    return scheduler


def _neighbouring_divisors(number: int, value: int) -> tuple[int, int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return max(d for d in divisors if d < value), min(d for d in divisors if d > value)
