"""The passes over the elements: a block of tokens in, a few sums per token out.

`block_sums` is the CPU path. Sorting, erfc and log cost about all of it, so these run in the
input's dtype with whichever of numpy and torch vectorises the function; everything linear and every
sum is float64. `tensor_sums` is the same in torch alone, for CUDA.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench.normality.p_values import Floats, shapiro_weights

Block = NDArray[np.float32] | NDArray[np.float64]

SQRT2 = math.sqrt(2.0)
# |z| / sqrt(2) from which erfc leaves the normal range of the dtype.
_ERFC_LIMIT_FLOAT32, _ERFC_LIMIT_FLOAT64 = 9.0, 26.0


class NormalGrid(NamedTuple):
    """What the standard normal gives per order statistic; half-open intervals ((i-1)/n, i/n]."""

    middle: Floats  # [n] (i - 1/2)/n - 1/2
    quantile: Floats  # [n + 1] Phi^-1(i/n), i = 0..n
    edge_density: Floats  # [n] sum of phi(Phi^-1(u)) over both ends of interval i
    mean: Floats  # [n] mean of Phi^-1 over interval i


class Workspace:
    """Buffers and constants of one block, reused: fresh ones cost more than the arithmetic.

    Five [B, n] arrays of the input's dtype and two of float64; the constants of the normal grid in
    units of z / sqrt(2), as erfc takes it.
    """

    def __init__(self, rows: int, n: int, dtype: np.dtype[np.float32] | np.dtype[np.float64]):
        self.sorted, self.h, self.tail = np.empty((3, rows, n), dtype=dtype)
        self.log_upper, self.gap = np.empty((2, rows, n), dtype=dtype)
        self.deviations, self.square = np.empty((2, rows, n))
        grid = normal_grid(n)
        self.middle = grid.middle.astype(dtype)
        self.mean = (grid.mean / SQRT2).astype(dtype)
        quantile = (grid.quantile / SQRT2).astype(dtype)
        self.lower, self.upper = quantile[:-1], quantile[1:]
        self.anderson_weights = 2 * grid.middle
        self.erfc_limit = _ERFC_LIMIT_FLOAT64 if dtype == np.float64 else _ERFC_LIMIT_FLOAT32

    def sort(self, block: Block) -> Block:
        """Return a sorted copy of at most B rows, in `sorted`."""
        x = self.sorted[: len(block)]
        np.copyto(x, block)
        x.sort(axis=1)
        return x


class RawMoments(NamedTuple):
    """Central sums of a block after scaling each token by a power of two; each [B] float64."""

    scale: Floats
    mean: Floats
    sum2: Floats
    shapiro: Floats  # sum a_i x_(i)


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
    middle = (np.arange(n) + 0.5) / n - 0.5
    return NormalGrid(middle, quantile, density[:-1] + density[1:], n * -np.diff(density))


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
    if scale.max() > 2.0**100 or scale.min() < 2.0**-100:
        np.multiply(x, scale[:, None], out=deviations, dtype=np.float64)
    else:
        scale.fill(1.0)  # no fourth power overflows: a plain copy gives the same digits
        np.copyto(deviations, x)
    mean = deviations.mean(axis=1)
    deviations -= mean[:, None]
    sum2 = np.vecdot(deviations, deviations)
    # Only a token that the capped scale left below 1e-160 can vanish here.
    valid &= np.sqrt(sum2 / (n - 1)) / scale > 0
    sum2[~valid] = 1.0
    return valid, RawMoments(scale, mean, sum2, deviations @ shapiro_weights(n))


def block_sums(tokens: Block, workspace: Workspace) -> Sums:
    """All sums of a block of tokens [B, n] on the CPU."""
    rows, n = tokens.shape
    x = workspace.sort(tokens)
    h, d, square = workspace.h[:rows], workspace.deviations[:rows], workspace.square[:rows]
    valid, raw = centre_sorted(x, d)
    std = np.sqrt(raw.sum2 / (n - 1))
    np.multiply(d, d, out=square)
    sum3 = np.vecdot(square, d)
    sum4 = np.vecdot(square, square)

    np.multiply(d, (1 / (SQRT2 * std))[:, None], out=h, casting="same_kind")
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
        shapiro_w=np.minimum(raw.shapiro**2 / raw.sum2, 1.0),
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
    h, tail, log_tail = workspace.h[:rows], workspace.tail[:rows], workspace.sorted[:rows]
    log_upper, gap = workspace.log_upper[:rows], workspace.gap[:rows]
    work = workspace.deviations[:rows]
    n = h.shape[1]
    np.abs(h, out=tail)
    limit = workspace.erfc_limit
    far = tail > limit if h[:, 0].min() < -limit or h[:, -1].max() > limit else None
    torch.from_numpy(tail).erfc_()
    tail *= 0.5  # Phi(-|z|)

    # The rounding of 1 - tail, at most 1/2, is an absolute error like that of tail itself.
    np.subtract(1, tail, out=log_upper)
    np.log(log_upper, out=log_upper)
    with np.errstate(divide="ignore"):
        np.log(tail, out=log_tail)
    if far is not None:
        from scipy.special import log_ndtr

        log_tail[far] = log_ndtr(-SQRT2 * np.abs(h[far].astype(np.float64)))
    # ln Phi(z) + ln Phi(-z) and ln Phi(z) - ln Phi(-z) need no case distinction but a sign.
    np.subtract(log_upper, log_tail, out=gap)
    log_upper += log_tail
    total = log_upper.sum(axis=1, dtype=np.float64)
    sign = np.sign(h, out=log_upper)
    gap *= sign  # ln Phi(z) - ln Phi(-z)
    np.copyto(work, gap)
    anderson = -n - total - work @ workspace.anderson_weights

    cdf = np.subtract(0.5, tail, out=tail)
    cdf *= sign  # Phi(z) - 1/2
    np.subtract(cdf, workspace.middle, out=gap)
    np.abs(gap, out=gap)
    distance = gap.max(axis=1).astype(np.float64) + 0.5 / n

    np.subtract(h, workspace.mean, out=gap)
    np.abs(gap, out=gap)
    wasserstein = SQRT2 / n * gap.sum(axis=1, dtype=np.float64)
    crossing = np.flatnonzero((h > workspace.lower) & (h < workspace.upper))
    owner, column = np.divmod(crossing, n)
    z = SQRT2 * h.take(crossing).astype(np.float64)
    excess = _crossing_excess(z, cdf.take(crossing).astype(np.float64), column, n)
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
