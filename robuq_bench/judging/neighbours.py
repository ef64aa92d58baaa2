"""How near samples come to the training images of the workload's data, and which these are.

The number is the nearest-neighbour distance ratio (of the distances to the closest training image,
that of samples over that of real images; medians): well below 1, samples are nearer to training
images than real images are, which is what copying looks like. Real images are held-out ones, or
training images whose nearest *other* training image counts. Distances are Euclidean, between pixels
and between pooled features.

A teacher may have been trained on more: that of `fashion28` on 60,000 images, of which the data are
10,000. Copies of the others are not seen, so how many were searched stands beside the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robuq_bench.data.datasets import ImageData
from robuq_bench.judging.real_images import RealImages
from robuq_bench.judging.sampling import image_grid
from robuq_bench.judging.spaces import FeatureSpace

MOST_QUERIES = 1000  # samples of a range that are looked up, which bounds the time
PICTURED = 20
BLOCK_ELEMENTS = 2**23  # of the distance matrix at a time: 64 MiB


def nearest(queries: Tensor, images: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances float64 [n] to the nearest of `images` and its rows int64 [n], ties to the first.

    Args:
        queries, images: [n, d] and [m, d], any number type; computed in float64.
        own: int64 [n], the row of `images` that each query is, which does not count.
    """
    queries, images = queries.double(), images.double()
    norms = images.square().sum(1)
    found = []
    step = max(1, BLOCK_ELEMENTS // len(images))
    for start in range(0, len(queries), step):
        # Up to the query's own norm, which moves no minimum.
        squares = torch.addmm(norms, queries[start : start + step], images.T, alpha=-2)
        if own is not None:
            squares.scatter_(1, own[start : start + step, None], torch.inf)
        found.append(squares.argmin(1))
    rows = torch.cat(found)
    return (queries - images[rows]).square().sum(1).sqrt(), rows


@dataclass(frozen=True)
class TrainingImages:
    """The training images of a workload as what samples may be near to."""

    data: ImageData
    space: FeatureSpace
    real: RealImages

    @cached_property
    def _pixels(self) -> Tensor:
        return self.data.images.flatten(1).double()

    @cached_property
    def _features(self) -> Tensor:
        return self.space.training_features.pool.double()

    @cached_property
    def _real_medians(self) -> tuple[float, float]:
        rows = self.real.draws[0].rows[:MOST_QUERIES]
        pool = self.real.features(self.space).pool[rows]
        own = rows if self.real.images == "training" else None
        return self._medians(self.real.data.images[rows], pool, own)

    def _medians(
        self, images: Tensor, pool: Tensor, own: Tensor | None = None
    ) -> tuple[float, float]:
        """Median distance to the nearest training image, between pixels and between features."""
        by_pixels = nearest(images.flatten(1), self._pixels, own)[0]
        by_features = nearest(pool, self._features, own)[0]
        return by_pixels.quantile(0.5).item(), by_features.quantile(0.5).item()

    def ratios(self, images: Tensor, pool: Tensor) -> dict[str, float]:
        """`nn_ratio_pixels` and `nn_ratio_<features>` of samples uint8 [N, C, H, W], pool [N, d].

        One is absent where real images are at distance 0, being there twice. `images_searched` is
        the number of training images that both are of.
        """
        medians = self._medians(images[:MOST_QUERIES], pool[:MOST_QUERIES])
        names = ("nn_ratio_pixels", f"nn_ratio{self.space.network.suffix}")
        triples = zip(names, medians, self._real_medians, strict=True)
        ratios = {name: value / real for name, value, real in triples if real > 0}
        return ratios | {"images_searched": len(self.data)}

    def picture(self, images: Tensor, pool: Tensor, columns: int, scale: int) -> bytes:
        """PNG of samples in rows of `columns`, each over two rows: nearest by pixels, by features.

        Takes whole rows of the first `PICTURED` samples; fewer than a row make one.
        """
        columns = min(columns, len(images))
        shown = images[: max(columns, min(PICTURED, len(images)) // columns * columns)]
        by_pixels = nearest(shown.flatten(1), self._pixels)[1]
        by_features = nearest(pool[: len(shown)], self._features)[1]
        parts = (shown, self.data.images[by_pixels], self.data.images[by_features])
        rows = zip(*(part.split(columns) for part in parts), strict=True)
        return image_grid(torch.cat([image for row in rows for image in row]), columns, scale)
