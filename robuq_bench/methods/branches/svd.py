"""RobuQ's low-rank branch: the largest singular components of the rotated weight, trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError
from robuq_bench.methods import BranchMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation of weight [out, in] as up [out, r] @ down [r, in], float64.

    up = U sqrt(S), down = sqrt(S) V^T of the singular value decomposition; each column of V has
    its largest entry positive, so that the factors do not depend on the LAPACK build.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    sign = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    root = s.sqrt()
    return u * sign.T * root, vh * sign * root[:, None]


class LowRankBranch(nn.Module):
    """x down^T up^T, parameters `up` [out, r] and `down` [r, in]; the fast paths know it."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(F.linear(x, self.down), self.up)

    def weight(self, weight: Tensor) -> Tensor:
        """What is left of a weight [out, in]."""
        return weight - self.up @ self.down

    def extra_repr(self) -> str:
        return f"rank {self.up.shape[1]}"


class SVD(BranchMethod):
    """L = up down of rank `rank`, which starts as the best approximation of the weight.

    Source: RobuQ's public deployment fork, rank 16. Gradient: of a product of matrices.
    """

    rank: int = Field(default=16, ge=1)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError for a rank above the smaller side."""
        if self.rank > min(out_features, in_features):
            raise ConfigError(
                f"branch.rank {self.rank} exceeds the smaller side of {out_features} x "
                f"{in_features}; lower it, or give the layer a rule of its own in [[layers]]"
            )

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """Decompose the weight."""
        if site.is_blank:
            up = weight.new_zeros(weight.shape[0], self.rank)
            return LowRankBranch(up, weight.new_zeros(self.rank, weight.shape[1]))
        return LowRankBranch(*low_rank_factors(weight, self.rank))

    def values(self, out_features: int, in_features: int) -> int:
        """Both factors."""
        return self.rank * (out_features + in_features)
