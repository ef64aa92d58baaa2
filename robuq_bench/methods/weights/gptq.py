"""GPTQ: columns are rounded one after another, and the later ones make up for the error."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._codes import Codes
from robuq_bench.methods.weights._grid import Rule, UniformGrid, UniformMethod, levels

ROW_BLOCK = 128
"""Columns whose updates to the rest are applied as one product. Costs only; changes no result."""

UNCORRELATED = 1e-9
"""Correlation of two inputs that counts as none: rounding errors of a rotation are below it."""


class Gptq(UniformMethod):
    """Weights whose codes minimise the layer's output error greedily, on a fixed uniform grid.

    Frantar et al., "GPTQ" (arXiv 2210.17323). See `gptq` for the formulas. QuaRot:
    symmetric, shrink = 80. Q-DiT: symmetric = false, group = 128.

    `fit` returns the grid together with the dequantized weight [out, in] float64, which the grid
    maps to itself; the layer's weight has to become that one. Where ranges hold 0, it has the same
    codes in half precision, bfloat16 with 8 bits and a zero point apart. Gradient: `UniformGrid`'s.

    Attributes:
        damping: share of the mean diagonal of H that is added to it.
        act_order: columns by descending diag H instead of left to right. With groups each keeps
            its own inputs ("static groups"), so nothing is reordered in the result.
    """

    needs = frozenset({"gram"})

    damping: float = Field(default=0.01, ge=0, le=1)
    act_order: bool = False

    def fit(self, weight: Tensor, site: Site) -> tuple[nn.Module, Tensor]:
        """`UniformGrid` and the weight it stands for; reads `site.gram` and `site.count`.

        Raises:
            ConfigError: `group` does not divide the width.
            UsageError: the site has no Gram matrix, or it has no Cholesky factor.
        """
        self.check(*weight.shape)
        gram = site.need("gram")
        rule = self.rule()
        if site.is_blank:  # a clip search takes most of the time, and its result is overwritten
            rule = replace(rule, shrink=0)
        try:
            codes = gptq(
                weight.detach(),
                gram,
                site.count,
                rule,
                group=self.group,
                damping=self.damping,
                act_order=self.act_order,
            )
        except UsageError as error:
            raise UsageError(
                f"layer {site.name!r}, weight method {self.method!r} with damping = "
                f"{self.damping}: {error}"
            ) from None
        grid = UniformGrid(codes.scale, codes.zero, self.group, rule.low, rule.high)
        return grid.to(weight.device), codes.dequantize()


def gptq(
    weight: Tensor,
    gram: Tensor,
    count: int,
    rule: Rule,
    *,
    group: int = 0,
    damping: float = 0.01,
    act_order: bool = False,
    block: int = ROW_BLOCK,
) -> Codes:
    """Codes of `weight` [out, in] for inputs with `gram` = Σxxᵀ [in, in] over `count` of them.

    H = 2/count·gram + damping·mean(diag)·I, U the upper Cholesky factor of H⁻¹. Column by column,

        q_i = nearest code of w_i,    e = (w_i − ŵ_i)/U_ii,    w_j ← w_j − e·U_ij for all j > i,

    in float64 throughout; later updates are applied per block of columns. An input that was never
    anything but 0 gets weight 0 and diagonal 1, as in GPTQ's code; here before grids are fitted, so
    that a weight without effect widens none.

    Grids: a row's is fitted to the weight as given; a group's at its first column, to the weight
    as updated by *all* columns before it. For that a block is one group. GPTQ's code and Q-DiT keep
    blocks of 128, so that their groups below 128 miss what the current block did; at 128 and
    without groups it is the same. With `act_order` all group grids are fitted to the weight as
    given, since columns of one group are not neighbours in the order (static groups).

    Inputs without any correlation above `UNCORRELATED` leave round-to-nearest, without the loop.
    The factor 2/count scales H and e alike and matters only beside the 1 of unused inputs.

    Raises:
        UsageError: H is not positive definite, or not finite.
    """
    weight = weight.double().clone()
    hessian = gram.to(weight) * (2 / max(count, 1))
    if not bool(hessian.isfinite().all()):
        raise UsageError("the Gram matrix of the inputs is not finite; look at what calibrates")
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1
    weight[:, unused] = 0

    scale, zero = _grids(weight, rule, group)
    sizes = diagonal.sqrt()
    if bool(((hessian - diagonal.diag()).abs() <= UNCORRELATED * sizes * sizes[:, None]).all()):
        # Nothing to make up for. Rotated blank sites are like this; large layers take seconds.
        codes = levels(weight, scale, zero, group, rule.low, rule.high)
        return Codes(codes, scale, None if rule.symmetric else zero, group).as_int8()
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    diagonal += damping * diagonal.mean()
    upper = _inverse_factor(hessian[order][:, order])

    cell = order // group if group else torch.zeros_like(order)
    moving = bool(group) and not act_order
    step = group if moving else block
    work = weight.T[order]  # [in, out]: what was a column is contiguous
    codes = torch.empty_like(work)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        if moving:
            at = slice(start // group, start // group + 1)
            scale[:, at], zero[:, at] = _grids(work[start:end].T, rule, 0)
        errors = torch.empty_like(work[start:end])
        for i in range(start, end):
            s, z = scale[:, cell[i]], zero[:, cell[i]]
            codes[order[i]] = code = ((work[i] / s).round_() + z).clamp_(rule.low, rule.high)
            errors[i - start] = error = (work[i] - (code - z) * s) / upper[i, i]
            work[i + 1 : end] -= upper[i, i + 1 : end, None] * error
        work[end:] -= upper[start:end, end:].T @ errors
    return Codes(codes.T.contiguous(), scale, None if rule.symmetric else zero, group).as_int8()


def _grids(weight: Tensor, rule: Rule, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] of a weight [out, in]."""
    cells = weight.reshape(-1, group or weight.shape[1])
    scale, zero = rule.fit(cells, rule.ratio(cells))
    zero = torch.zeros_like(scale) if zero is None else zero
    return scale.reshape(len(weight), -1), zero.reshape(len(weight), -1)


def _inverse_factor(matrix: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = matrix⁻¹, without forming the inverse.

    With both axes reversed, the Cholesky factor is an upper R with RRᵀ = matrix, and U = R⁻¹.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if bool(failed):
        raise UsageError(
            "the Gram matrix of the inputs is singular; raise damping, or calibrate on more inputs"
        )
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True)
