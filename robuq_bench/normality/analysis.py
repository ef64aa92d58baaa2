"""Every statistic of every token of one layer under one transform, as one matrix.

A `TokenTable` keeps a row per token, so that any summary (by layer, by timestep, by image) can be
made afterwards without the tokens. Tokens stream through in blocks: memory is the table's, 8 bytes
x columns per token, plus one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.normality.consequence import (
    BITS,
    REFERENCE,
    SETTINGS,
    Errors,
    Setting,
    quantization_errors,
)
from robuq_bench.normality.controls import control_tokens
from robuq_bench.normality.output import OutputSite
from robuq_bench.normality.statistics import token_statistics
from robuq_bench.normality.transforms import Transform

#: Above this many coordinates Shapiro-Wilk p-values err toward "normal"; a subsample is tested.
MAX_TESTED = 5000
BLOCK_TOKENS = 4096
STATISTICS = (
    *("shapiro_w", "shapiro_p", "anderson_a2", "anderson_p", "ks_distance", "lilliefors_p"),
    *("dagostino_k2", "dagostino_p", "skewness", "excess_kurtosis", "wasserstein", "negentropy"),
    *("l3", "dc_share"),
)
REFERENCE_SETTINGS = tuple(Setting(REFERENCE, bits) for bits in BITS)
TESTS = {
    "shapiro": "shapiro_p",
    "anderson": "anderson_p",
    "lilliefors": "lilliefors_p",
    "dagostino": "dagostino_p",
}


class TokenTable(NamedTuple):
    """`values` [T, columns] float64, NaN rows for degenerate tokens; `images` [T]; n tested.

    `outputs` and `centred` [T, bits]: squared errors at the layer's output, of tokens as they are
    and less the site's centre; None where weight or centre are not known.
    """

    columns: tuple[str, ...]
    values: NDArray[np.float64]
    images: NDArray[np.int64]
    n: int
    outputs: NDArray[np.float64] | None = None
    centred: NDArray[np.float64] | None = None

    def column(self, name: str) -> NDArray[np.float64]:
        """One column [T]."""
        return self.values[:, self.columns.index(name)]

    @property
    def reference_ratios(self) -> NDArray[np.float64]:
        """The columns of the reference quantizer, [T, bits]."""
        return np.column_stack([self.column(f"{REFERENCE}/{bits}") for bits in BITS])

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which tokens are not degenerate, [T]."""
        return np.isfinite(self.column("shapiro_w"))

    @property
    def usable_images(self) -> int:
        """How many images have a token that is not degenerate."""
        return len(np.unique(self.images[self.valid]))


def column_names(settings: Sequence[Setting] = SETTINGS) -> tuple[str, ...]:
    """Columns of a `TokenTable`: the statistics, then quantizer/bits."""
    return (*STATISTICS, *(f"{s.quantizer}/{s.bits}" for s in settings))


def analyse(
    tokens: Tensor,
    images: Tensor,
    transform: Transform,
    seed: int = 0,
    settings: tuple[Setting, ...] = SETTINGS,
    site: OutputSite | None = None,
) -> TokenTable:
    """Transform tokens [T, width] (any float dtype, CPU or CUDA) and measure each of them.

    Computed in float32 whatever the tokens' dtype (float64 stays). `dc_share` is the share of the
    squared norm in the first coordinate; it is removed from no statistic. Above `MAX_TESTED`
    coordinates the tests see a subsample drawn from `seed`; the quantizers see every coordinate.
    `site` says what the layer multiplies the tokens by.
    """
    site = site or OutputSite(None, None)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    weight = None if site.root is None else transform(site.root.to(dtype))
    parts: list[NDArray[np.float64]] = []
    outputs: list[NDArray[np.float64]] = []
    centred: list[NDArray[np.float64]] = []
    n = 0
    for block in tokens.split(BLOCK_TOKENS):
        x = block.to(dtype)
        y = transform(x)
        tested = y if y.shape[-1] <= MAX_TESTED else y[:, _subsample(y.shape[-1], seed)]
        n = tested.shape[-1]
        statistics = token_statistics(tested)
        squares = y.double().square()
        share = (squares[:, 0] / squares.sum(-1)).cpu().numpy()
        columns = [
            share if name == "dc_share" else getattr(statistics, name) for name in STATISTICS
        ]
        ratios, errors = quantization_errors(y, settings, weight)
        values = np.column_stack([*columns, ratios])
        dead = statistics.degenerate | ~np.isfinite(values[:, len(STATISTICS) :]).all(1)
        values[dead] = np.nan
        parts.append(values)
        if errors is not None:
            outputs.append(errors)
        if weight is not None and site.centre is not None:
            y = transform(x - site.centre.to(x))
            (_, errors) = quantization_errors(y, REFERENCE_SETTINGS, weight)
            if errors is not None:
                centred.append(errors)
    return TokenTable(
        column_names(settings),
        np.concatenate(parts),
        images.numpy(),
        n,
        np.concatenate(outputs) if outputs else None,
        np.concatenate(centred) if centred else None,
    )


def draw_errors(
    tokens: Tensor, transforms: Sequence[Transform], site: OutputSite | None = None
) -> Errors:
    """Mid-rise errors of tokens [T, width] at every bit width under several transforms.

    Returns:
        `ratios` and, where the site's weight is known, `outputs`: each [T, transforms, bits].
    """
    if not transforms:
        empty = np.empty((len(tokens), 0, len(BITS)))
        return Errors(empty, None)
    root = None if site is None or site.root is None else site.root.float()
    found = []
    for transform in transforms:
        weight = None if root is None else transform(root)
        found.append(
            [
                quantization_errors(transform(block.float()), REFERENCE_SETTINGS, weight)
                for block in tokens.split(BLOCK_TOKENS)
            ]
        )
    ratios = np.stack([np.concatenate([e.ratios for e in own]) for own in found], axis=1)
    if root is None:
        return Errors(ratios, None)
    outputs = [np.concatenate([e.outputs for e in own if e.outputs is not None]) for own in found]
    return Errors(ratios, np.stack(outputs, axis=1))


def null_table(width: int, count: int, dtype: torch.dtype, seed: int) -> TokenTable:
    """The Gaussian null: `count` tokens of N(0, 1) rounded to `dtype`, each its own "image"."""
    tokens = control_tokens("gaussian", count, width, seed, dtype)
    return analyse(tokens, torch.arange(count), lambda x: x, seed)


def _subsample(width: int, seed: int) -> Tensor:
    generator = seeds.generator("normality/subsample", seed)
    return torch.randperm(width, generator=generator)[:MAX_TESTED].sort().values
