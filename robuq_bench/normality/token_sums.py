"""The passes over the entries: sorted tokens in, a few sums per token out, all of it in float64.

`compiled_sums` runs the compiled kernel and `block_sums` is the same with numpy and torch, for a
machine without it: they agree to 1e-10. `tensor_sums` is the same in torch alone, for CUDA; its
elementwise functions keep the dtype of the tokens.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.normality_sums.cpu import normality_sums
from robuq_bench.normality.p_values import Floats, shapiro_weights

Block = NDArray[np.float32] | NDArray[np.float64]

SQRT2 = math.sqrt(2.0)
_ERFC_LIMIT = 26.0  # |z| / sqrt(2) from which erfc leaves the normal range of float64


class NormalGrid(NamedTuple):
    """What the standard normal gives per order statistic; half-open intervals ((i-1)/n, i/n]."""

    middle: Floats  # [n] (i - 1/2)/n - 1/2
    quantile: Floats  # [n + 1] Phi^-1(i/n), i = 0..n
    density: Floats  # [n + 1] phi(Phi^-1(i/n))

    @property
    def edge_density(self) -> Floats:
        """Sum of the densities at both ends of each interval, [n]."""
        return self.density[:-1] + self.density[1:]

    @property
    def mean(self) -> Floats:
        """Mean of Phi^-1 over each interval, [n]."""
        return len(self.middle) * -np.diff(self.density)


class Workspace:
    """Six float64 buffers [B, n] of `block_sums`, reused: fresh ones cost more than arithmetic."""

    def __init__(self, rows: int, n: int):
        self.deviations, self.square, self.h = np.empty((3, rows, n))
        self.tail, self.log_upper, self.gap = np.empty((3, rows, n))


class RawMoments(NamedTuple):
    """Central sums of a block after scaling each token by a power of two; each [B] float64."""

    scale: Floats
    mean: Floats
    sum2: Floats
    shapiro: Floats  # sum a_i x_(i)

    @property
    def w(self) -> Floats:
        """Shapiro-Wilk's W."""
        return np.minimum(self.shapiro**2 / self.sum2, 1.0)


class Sums(NamedTuple):
    """What `token_statistics` needs of each token; each [T] float64, `valid` bool."""

    valid: NDArray[np.bool_]
    mean: Floats
    std: Floats  # sample standard deviation, n - 1
    shapiro_w: Floats
    skewness: Floats
    kurtosis: Floats  # excess
    anderson_a2: Floats
    ks_distance: Floats
    wasserstein: Floats
    entropy: Floats  # Vasicek, of the standardized token
    l3: Floats


@functools.cache
def normal_grid(n: int) -> NormalGrid:
    """Quantiles, densities and interval means for n order statistics; cached."""
    from scipy.special import ndtri

    quantile = np.asarray(ndtri(np.arange(n + 1) / n))
    density = np.exp(-0.5 * quantile**2) / math.sqrt(2 * math.pi)
    return NormalGrid((np.arange(n) + 0.5) / n - 0.5, quantile, density)


def window_length(n: int) -> int:
    """Half width m of the spacings: 0.8 n^(1/3), at least 2.

    The usual sqrt(n) smooths heavy tails away: with it the divergence of t(5) from a normal comes
    out 94 % too small at n = 144 and 34 % at 4608; with this rule 29 % and 4 %, at a spread that is
    hardly larger. A much smaller window is infinite for half-precision tokens, which repeat.
    """
    return max(2, round(0.8 * n ** (1 / 3)))


def centre_sorted(x: Block, deviations: Floats) -> tuple[NDArray[np.bool_], RawMoments]:
    """Flag unusable rows and centre the rest.

    Args:
        x: [B, n] float32 or float64, rows sorted (NaN last); unusable rows are overwritten.
        deviations: [B, n], receives the deviations from the mean of the tokens, scaled by a power
            of two that brings their largest magnitude into [1/2, 1) where a block needs it.

    Returns:
        valid [B], and the sums of the scaled tokens.
    """
    n = x.shape[1]
    finite = np.isfinite(x[:, 0]) & np.isfinite(x[:, -1])
    valid = finite & (x[:, 0] < x[:, -1])
    if not valid.all():
        # Any harmless row will do: its results are replaced by NaN, and no warning is raised.
        x[~valid] = np.arange(n)
    largest = np.maximum(-x[:, 0], x[:, -1]).astype(np.float64)
    scale = np.ldexp(1.0, np.clip(-np.frexp(largest)[1], -1000, 1000))
    if scale.max() > 2.0**40 or scale.min() < 2.0**-40:
        np.multiply(x, scale[:, None], out=deviations, dtype=np.float64)
    else:
        scale.fill(1.0)  # no product of 15 spacings overflows: a plain copy gives the same digits
        np.copyto(deviations, x)
    mean = deviations.mean(axis=1)
    deviations -= mean[:, None]
    sum2 = np.vecdot(deviations, deviations)
    # Only a token that the capped scale left below 1e-160 can vanish here.
    valid &= np.sqrt(sum2 / (n - 1)) / scale > 0
    sum2[~valid] = 1.0
    return valid, RawMoments(scale, mean, sum2, deviations @ shapiro_weights(n))


@functools.cache
def _kernel_constants(n: int) -> tuple[Tensor, Tensor]:
    """Weights [n] of Shapiro and Wilk and densities [n + 1] of the normal grid."""
    return torch.from_numpy(shapiro_weights(n).copy()), torch.from_numpy(normal_grid(n).density)


def compiled_sums(x: Block) -> Sums:
    """All sums of a block of sorted tokens [B, n] by the compiled kernel.

    Raises:
        MissingKernels: the library is not built, see `kernels.cpu_library`.
    """
    n = x.shape[1]
    window = window_length(n)
    sums = normality_sums(torch.from_numpy(x), *_kernel_constants(n), window).numpy()
    valid = ~np.isnan(sums[:, 0])
    sums[~valid] = 1.0  # harmless, as in centre_sorted
    found = Sums(valid, *sums.T)
    return found._replace(entropy=found.entropy + math.log(n / (2 * window)))


def block_sums(x: Block, workspace: Workspace) -> Sums:
    """All sums of a block of sorted tokens [B, n] with numpy; unusable rows are overwritten."""
    rows, n = x.shape
    h, d, square = workspace.h[:rows], workspace.deviations[:rows], workspace.square[:rows]
    valid, raw = centre_sorted(x, d)
    std = np.sqrt(raw.sum2 / (n - 1))
    np.multiply(d, d, out=square)
    sum3 = np.vecdot(square, d)
    sum4 = np.vecdot(square, square)

    np.multiply(d, (1 / (SQRT2 * std))[:, None], out=h)
    entropy = _vasicek(d, square) - np.log(std)

    d += raw.mean[:, None]
    np.multiply(d, d, out=square)
    np.abs(d, out=d)
    total2, total3 = raw.sum2 + n * raw.mean**2, np.vecdot(square, d)

    anderson, distance, wasserstein = _distribution_sums(workspace, rows)
    return Sums(
        valid=valid,
        mean=raw.mean / raw.scale,
        std=std / raw.scale,
        shapiro_w=raw.w,
        skewness=math.sqrt(n) * sum3 / raw.sum2**1.5,
        kurtosis=n * sum4 / raw.sum2**2 - 3.0,
        anderson_a2=anderson,
        ks_distance=distance,
        wasserstein=wasserstein,
        entropy=entropy,
        l3=total3 / total2**1.5,
    )


def _vasicek(d: Floats, spacings: Floats) -> Floats:
    """Mean of ln(n / 2m * (x_(i+m) - x_(i-m))), indices clamped; `spacings` is overwritten."""
    n = d.shape[1]
    m = window_length(n)
    np.subtract(d[:, m : 2 * m], d[:, :1], out=spacings[:, :m])
    np.subtract(d[:, 2 * m :], d[:, : n - 2 * m], out=spacings[:, m : n - m])
    np.subtract(d[:, n - 1 :], d[:, n - 2 * m : n - m], out=spacings[:, n - m :])
    # The logarithm of a product of eight costs an eighth; a float64 has the range for it.
    products = spacings
    for _ in range(3):
        half = products.shape[1] // 2
        if products.shape[1] % 2:
            products[:, 0] *= products[:, -1]
        np.multiply(products[:, :half], products[:, half : 2 * half], out=products[:, :half])
        products = products[:, :half]
    with np.errstate(divide="ignore"):
        np.log(products, out=products)
    return products.sum(axis=1) / n + math.log(n / (2 * m))


def _distribution_sums(workspace: Workspace, rows: int) -> tuple[Floats, Floats, Floats]:
    """A^2, sup |F_n - Phi| and W1 of `workspace.h` = z / sqrt(2), standardized sorted tokens."""
    h, tail, log_tail = workspace.h[:rows], workspace.tail[:rows], workspace.square[:rows]
    log_upper, gap = workspace.log_upper[:rows], workspace.gap[:rows]
    n = h.shape[1]
    grid = normal_grid(n)
    np.abs(h, out=tail)
    far = tail > _ERFC_LIMIT if max(-h[:, 0].min(), h[:, -1].max()) > _ERFC_LIMIT else None
    torch.from_numpy(tail).erfc_()
    tail *= 0.5  # Phi(-|z|)

    # The rounding of 1 - tail, at most 1/2, is an absolute error like that of tail itself.
    np.subtract(1, tail, out=log_upper)
    np.log(log_upper, out=log_upper)
    with np.errstate(divide="ignore"):
        np.log(tail, out=log_tail)
    if far is not None:
        from scipy.special import log_ndtr

        log_tail[far] = log_ndtr(-SQRT2 * np.abs(h[far]))
    # ln Phi(z) + ln Phi(-z) and ln Phi(z) - ln Phi(-z) need no case distinction but a sign.
    np.subtract(log_upper, log_tail, out=gap)
    log_upper += log_tail
    total = log_upper.sum(axis=1)
    sign = np.sign(h, out=log_upper)
    gap *= sign  # ln Phi(z) - ln Phi(-z)
    anderson = -n - total - gap @ (2 * grid.middle)

    cdf = np.subtract(0.5, tail, out=tail)
    cdf *= sign  # Phi(z) - 1/2
    np.subtract(cdf, grid.middle, out=gap)
    np.abs(gap, out=gap)
    distance = gap.max(axis=1) + 0.5 / n
    # Less than half an interval from its middle, the quantile function crosses z inside.
    crossing = np.flatnonzero(gap < 0.5 / n)

    np.subtract(h, grid.mean / SQRT2, out=gap)
    np.abs(gap, out=gap)
    wasserstein = SQRT2 / n * gap.sum(axis=1)
    owner, column = np.divmod(crossing, n)
    excess = _crossing_excess(SQRT2 * h.take(crossing), cdf.take(crossing), column, n)
    wasserstein += np.bincount(owner, weights=excess, minlength=rows)
    return anderson, distance, wasserstein


def _crossing_excess(z: Floats, centred_cdf: Floats, column: NDArray[np.intp], n: int) -> Floats:
    """What |z - mean of Phi^-1| / n lacks where Phi^-1 crosses z inside the interval.

    Exact: the integral of |z - Phi^-1(u)| over [u0, u1] is
    z (2 Phi(z) - u0 - u1) + 2 phi(z) - phi(Phi^-1(u0)) - phi(Phi^-1(u1)).
    """
    grid = normal_grid(n)
    inside = 2 * z * (centred_cdf - grid.middle.take(column))
    inside += math.sqrt(2 / math.pi) * np.exp(-0.5 * z * z)
    inside -= grid.edge_density.take(column)
    return inside - np.abs(z - grid.mean.take(column)) / n


def tensor_sums(x: Tensor) -> Sums:
    """All sums of a block of sorted tokens with torch operations, for any device.

    Args:
        x: [B, n] float32 or float64, rows sorted.
    """
    n = x.shape[1]
    double = torch.float64
    grid = normal_grid(n)

    def constant(values: Floats, dtype: torch.dtype = double) -> Tensor:
        return torch.from_numpy(values.copy()).to(x.device, dtype)

    valid = x[:, 0].isfinite() & x[:, -1].isfinite() & (x[:, 0] < x[:, -1])
    filler = torch.arange(n, device=x.device, dtype=x.dtype)
    x = torch.where(valid[:, None], x, filler)
    largest = torch.maximum(-x[:, 0], x[:, -1]).to(double)
    exponent = (-torch.frexp(largest).exponent).clamp(-1000, 1000)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    y = x.to(double) * scale[:, None]
    mean = y.mean(dim=1)
    d = y - mean[:, None]
    square = d * d
    sum2 = square.sum(dim=1)
    valid &= (sum2 / (n - 1)).sqrt() / scale > 0
    sum2 = torch.where(valid, sum2, 1.0)
    std = (sum2 / (n - 1)).sqrt()
    w = ((d @ constant(shapiro_weights(n))) ** 2 / sum2).clamp(max=1.0)

    m = window_length(n)
    index = torch.arange(n, device=x.device)
    spacings = d[:, (index + m).clamp(max=n - 1)] - d[:, (index - m).clamp(min=0)]
    entropy = spacings.to(x.dtype).log().sum(dim=1, dtype=double) / n + math.log(n / (2 * m))

    z = (d / std[:, None]).to(x.dtype)
    lower, upper = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)
    total = lower.sum(dim=1, dtype=double) + upper.sum(dim=1, dtype=double)
    anderson = -n - total - (lower - upper).to(double) @ constant(2 * grid.middle)
    cdf = torch.copysign(0.5 - 0.5 * torch.special.erfc(z.abs() / SQRT2), z)
    distance = (cdf - constant(grid.middle, x.dtype)).abs().amax(dim=1).to(double) + 0.5 / n

    # Clamping z into its interval covers the crossing and both plain cases with one formula.
    quantile = constant(grid.quantile)
    zd = z.to(double)
    inner = torch.minimum(torch.maximum(zd, quantile[:-1]), quantile[1:])
    pieces = 2 * zd * (torch.special.ndtr(inner) - 0.5 - constant(grid.middle))
    pieces += math.sqrt(2 / math.pi) * torch.exp(-0.5 * inner * inner)
    wasserstein = (pieces - constant(grid.edge_density)).sum(dim=1)

    total2 = (y * y).sum(dim=1)
    columns = [
        mean / scale,
        std / scale,
        w,
        math.sqrt(n) * (square * d).sum(dim=1) / sum2**1.5,
        n * (square * square).sum(dim=1) / sum2**2 - 3.0,
        anderson,
        distance,
        wasserstein,
        entropy - std.log(),
        (y * y * y.abs()).sum(dim=1) / total2**1.5,
    ]
    return Sums(valid.cpu().numpy(), *torch.stack(columns).cpu().numpy())
