"""RobuQ's low-rank branch: the largest singular components of the rotated weight, trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import ConfigError
from robuq_bench.methods import BranchMethod
from robuq_bench.sections import OptionalInt

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
    """L = up down of low rank, which starts as the best approximation of the weight.

    A weight [out, in] gets rank max(1, round(rank min(out, in) / at_width)), so that the branch
    stays the same share of a layer in narrower models; without `at_width` it gets `rank` itself.
    0 is no branch, and leaves the slot empty.

    Source: RobuQ's public deployment fork, rank 16 at width 1152. Gradient: of a product of
    matrices.
    """

    rank: int = Field(default=16, ge=0)
    at_width: OptionalInt = Field(default=None, ge=1)

    @property
    def is_empty(self) -> bool:
        """Whether it is no branch at all."""
        return self.rank == 0

    def rank_of(self, out_features: int, in_features: int) -> int:
        """Rank of the branch of a weight [out, in]."""
        if self.at_width is None or self.rank == 0:
            return self.rank
        return max(1, round(self.rank * min(out_features, in_features) / self.at_width))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError for a rank above the smaller side."""
        rank = self.rank_of(out_features, in_features)
        if rank > min(out_features, in_features):
            scaled = f" at width {self.at_width}, here {rank}," if self.at_width else ""
            raise ConfigError(
                f"branch.rank {self.rank}{scaled} exceeds the smaller side of {out_features} x "
                f"{in_features}; lower it, or give the layer a rule of its own in [[layers]]"
            )

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """Decompose the weight."""
        out_features, in_features = weight.shape
        rank = self.rank_of(out_features, in_features)
        if site.is_blank:
            up = weight.new_zeros(out_features, rank)
            return LowRankBranch(up, weight.new_zeros(rank, in_features))
        return LowRankBranch(*low_rank_factors(weight, rank))

    def values(self, out_features: int, in_features: int) -> int:
        """Both factors."""
        return self.rank_of(out_features, in_features) * (out_features + in_features)
