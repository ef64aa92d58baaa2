"""What quantizing a layer's input costs at its output, beside the energy that its output carries.

A layer multiplies tokens x by W. Quantized in the basis of an orthogonal transform T, they give an
error e = T^-1(Q(T x)) - x at the input and W e at the output. Pooled over the tokens of a layer,

    output error   = sum ||W e||^2 / sum ||W (x - m)||^2,     m = E x, the mean over those tokens,
    constant share = ||m||^2 / (sum ||x||^2 / tokens),
    centring gain  = sum ||W e||^2 / sum ||W e_c||^2,         e_c the error of x - c.

W m is the same for every token, so it tells the next layer nothing and could stand in the bias: it
is no part of the signal. The quantizer spends steps on m all the same. The rule of `study.py`,
error over each token's own variance, cannot see that, and so has this one beside it:

    output ratio = output error / that of normal tokens.

Normal tokens are white: N(0, s^2) in every entry, s^2 = sum ||x - m||^2 / (tokens n), the scale of
the layer's covariance. Their error, with v_b the quantizer's mean squared error on N(0, 1) tokens
of the same width, is v_b s^2 ||W||_F^2 / (sum ||W (x - m)||^2 / tokens). The signal cancels: what W
does to an uncentred or uneven error stays. 1 means as good as normal in the output.

Rule, fixed before any output was looked at: for a layer type, a transform and b bits, take the mean
of the output ratio over layers. "As good as normal in the output for b bits" holds if the upper end
of its 95 % interval over images lies below `VERDICT_LIMIT`, does not hold if the lower end is at or
above it, and is undecided in between; with fewer than `MIN_IMAGES` images nothing is judged. Under
random signs the mean also runs over draws, and the interval allows for their spread.

W is the full-precision weight: the teacher's, or of a quantized model the master weight and its
branch, brought back to the basis of the input (GPTQ has rounded its master weight already). c is
the mean of calibration tokens, of other images, as a static centring would have it, and m that of
the tokens under test; intervals keep m, at which the signal's energy is least, so that its own
error does not count in first order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.normality.capture import CapturedTokens
from robuq_bench.normality.consequence import (
    BITS,
    REFERENCE,
    Setting,
    gaussian_error,
    quantization_errors,
)
from robuq_bench.normality.controls import control_tokens
from robuq_bench.quantization.linear import QuantizedLinear

_NULL_ENTRIES = 3_000_000
_STATE = ("images", "counts", "sums", "squares", "output_sums", "output_squares")


class OutputSite(NamedTuple):
    """What the output error of a layer needs; each None where it is not known.

    `root` [min(out, n), n] float32: ||root e|| = ||W e|| for every e. `centre` [n] float32: c.
    """

    root: Tensor | None
    centre: Tensor | None

    @classmethod
    def of(cls, weight: Tensor | None, calibration: Tensor | None) -> OutputSite:
        """From W [out, n] and finite or other tokens [T, n], of which those not finite are left."""
        centre = None
        if calibration is not None:
            tokens = calibration.double()
            tokens = tokens[torch.isfinite(tokens).all(1)]
            centre = tokens.mean(0).float() if len(tokens) else None
        return cls(None if weight is None else norm_root(weight), centre)


def norm_root(weight: Tensor) -> Tensor:
    """The matrix R of `weight`'s QR decomposition: ||R e|| = ||W e||, with at most n rows.

    Args:
        weight: [out, n], any floating dtype.

    Returns:
        [min(out, n), n] float32 on the CPU; a weight of no more rows than columns itself.

    Raises:
        UsageError: it is no matrix, or not finite.
    """
    matrix = weight.detach().cpu().double()
    if matrix.ndim != 2 or not torch.isfinite(matrix).all():
        raise UsageError(f"a weight is a finite matrix [out, n], got {tuple(weight.shape)}")
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    return matrix.float()


@torch.no_grad()
def input_weight(layer: nn.Module) -> Tensor:
    """The full-precision weight [out, in] of a layer in the basis of its input.

    Of a `QuantizedLinear`: what scaling, rotation, master weight and branch compute together when
    nothing is rounded.

    Raises:
        UsageError: the layer is neither linear nor quantized.
    """
    if isinstance(layer, QuantizedLinear):
        x = torch.eye(layer.in_features).to(layer.master_weight)
        for module in (layer.scaling, layer.rotation):
            x = x if module is None else module(x)
        y = x @ layer.master_weight.T
        if layer.branch is not None:
            y = y + layer.branch(x)
        return y.T.contiguous()
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    raise UsageError(f"{type(layer).__name__} has no weight [out, in] that outputs can be had of")


class Energy(NamedTuple):
    """Sums over the finite tokens of a layer, image by image; float64 but for the first two.

    `images`, `counts` [I]; `sums` [I, n] of x and `squares` [I] of ||x||^2; `output_sums` [I, r]
    and `output_squares` [I], the same of root x, are empty [I, 0] and zero without a weight.
    """

    images: NDArray[np.int64]
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    output_sums: NDArray[np.float64]
    output_squares: NDArray[np.float64]

    @classmethod
    def of(cls, part: CapturedTokens, site: OutputSite) -> Energy:
        """Of tokens [T, n]; those that are not finite are left out."""
        finite = torch.isfinite(part.tokens).all(1)
        x = part.tokens[finite].double()
        images, index = np.unique(part.images[finite].numpy(), return_inverse=True)
        y = x[:, :0] if site.root is None else x @ site.root.double().T

        def by_image(values: Tensor) -> NDArray[np.float64]:
            total = np.zeros((len(images), *values.shape[1:]))
            np.add.at(total, index, values.numpy())
            return total

        return cls(
            images,
            np.bincount(index, minlength=len(images)),
            by_image(x),
            by_image(x.square().sum(1)),
            by_image(y),
            by_image(y.square().sum(1)),
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """As tensors of a file, named `prefix` and field."""
        return {f"{prefix}{name}": torch.from_numpy(getattr(self, name)) for name in _STATE}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], prefix: str) -> Energy:
        """What `tensors` wrote."""
        return cls(*(tensors[f"{prefix}{name}"].numpy() for name in _STATE))

    def about(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of ||x - mean||^2 by image [I]."""
        return _about(self.squares, self.sums, self.counts, mean)

    def output_about(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of ||root x - mean||^2 by image [I], mean [r]."""
        return _about(self.output_squares, self.output_sums, self.counts, mean)


def _about(
    squares: NDArray[np.float64],
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    mean: NDArray[np.float64],
) -> NDArray[np.float64]:
    return np.maximum(squares - 2 * sums @ mean + counts * (mean @ mean), 0.0)


@functools.cache
def normal_errors(n: int, dtype: torch.dtype, seed: int) -> NDArray[np.float64]:
    """v_b: mean squared error of the reference quantizer on N(0, 1) tokens [n] of `dtype`, [bits].

    Measured, because scale and overload of a token of few entries are not those of a wide one.
    """
    settings = tuple(Setting(REFERENCE, bits) for bits in BITS)
    tokens = control_tokens("gaussian", max(64, _NULL_ENTRIES // n), n, seed, dtype).float()
    ratios = quantization_errors(tokens, settings).ratios
    scales = np.array([gaussian_error(REFERENCE, bits) for bits in BITS])
    variance = tokens.double().var(1, correction=0).numpy()
    return np.asarray((ratios * variance[:, None]).mean(0) * scales)
