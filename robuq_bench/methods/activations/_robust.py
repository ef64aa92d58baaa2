"""What the Gaussian-optimal grids share: per-token mean and scale, and their gradients."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from robuq_bench.methods.activations._token_grid import Normalised, TokenGrid, reciprocal

#: Steps Δ_b of the RobustQuantizer in units of σ̂ for bits 2 to 8: the optimal uniform mid-rise
#: steps of N(0, 1) (Max 1960), as in the public RobuQ deployment fork.
ROBUST_STEPS = (0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)
#: E|x| of N(0, 1), the optimal level of one bit in units of σ̂: the levels are μ ± mean|x - μ|.
ONE_BIT_LEVEL = math.sqrt(2 / math.pi)
#: σ of a Gaussian is its mean absolute deviation times this.
MAD_TO_SIGMA = math.sqrt(math.pi / 2)


class RobustGrid(TokenGrid):
    """RobuQ's quantizer: per-token mean μ and σ̂ = sqrt(pi/2) mean|x - μ|, fixed Gaussian grid.

    Source: RobuQ (arXiv 2509.23582) as coded in its public deployment fork. Straight-through
    rounding sits inside the normalisation, so with y = (x - μ)/σ̂, q its level and m = 1 inside
    the clip: d x̂ = (1 - m) dμ + m dx + (q - m y) dσ̂.
    """

    needs_state = True

    def step(self, bits: int) -> float:
        """Grid step in units of σ̂."""
        return 2 * ONE_BIT_LEVEL if bits == 1 else ROBUST_STEPS[bits - 2]

    @abstractmethod
    def clip_range(self, bits: int) -> tuple[float, float]:
        """Range of t outside of which no gradient passes directly."""

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Value of code 0."""
        return mean

    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        mean = x.mean(dim, keepdim=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        t = torch.sub(x, mean, out=out)
        magnitude = torch.abs(t, out=scratch)
        scale = magnitude.mean(dim, keepdim=True).mul_(self.step(bits) * MAD_TO_SIGMA)
        dead = scale == math.inf
        scale = scale.nan_to_num_(nan=1.0, posinf=1.0)
        inverse = reciprocal(scale)
        t.mul_(inverse)
        return Normalised(t, scale, inverse, self.offset(mean, scale, bits), mean, dead)

    def input_gradient(
        self,
        grad: Tensor,
        values: Tensor,
        state: Normalised,
        bits: int,
        dim: int = -1,
        scratch: Tensor | None = None,
    ) -> Tensor:
        t, _, inverse, _, mean, dead = state
        low, high = self.clip_range(bits)
        # One vectorised pass; boolean masks are several times slower on CPU.
        passed = torch.ops.aten.hardtanh_backward(grad, t, low, high)
        grad_sum = grad.sum(dim, keepdim=True)
        grad_mean = grad_sum - passed.sum(dim, keepdim=True)
        work = torch.mul(grad, values, out=scratch)
        grad_scale = work.sum(dim, keepdim=True).sub_(mean * grad_sum).mul_(inverse)
        work = torch.mul(passed, t, out=work)
        grad_scale.sub_(work.sum(dim, keepdim=True)).masked_fill_(dead, 0.0)
        grad_mean.masked_fill_(dead, 0.0)
        # d scale / d x_j = step sqrt(pi/2) / n (sign_j - mean sign); d mean / d x_j = 1 / n.
        n = t.shape[dim]
        slope = grad_scale.mul_(self.step(bits) * MAD_TO_SIGMA / n)
        sign = torch.sign(t, out=work)
        constant = grad_mean.mul_(1 / n).sub_(sign.mean(dim, keepdim=True).mul_(slope))
        return passed.addcmul_(sign, slope).add_(constant)
