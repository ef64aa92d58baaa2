"""Real images judged in place of samples: what no generator can be expected to beat.

A FID of finitely many images is above 0 even between real ones, more so the fewer they are and the
less alike their class counts. So N real images take the place of the samples: as many, of the same
labels (i % classes). Which images, and what stands for the reference:

    held-out   images that no training saw, against the workload's own reference; where they allow
               two draws without a common image, of N or of at least `ENOUGH_HELDOUT` images each
    training   N of them against the rest, the same number of every class on both sides

N falls short of the number of samples where there are too few: half of each class is drawn at most.
A FID falls with N, so samples have a second one, `fid_at_floor`: of their first N against the very
references that real images were compared with. Their ratio is of like with like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.data.datasets import ImageData
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import (
    NEIGHBOURS,
    Reference,
    as_reference,
    feature_statistics,
    frechet_distance,
)
from robuq_bench.judging.spaces import FeatureSpace, accuracy

DRAWS = 8
ENOUGH_HELDOUT = 1000


@dataclass(frozen=True)
class Draw:
    """Rows of the data that stand for samples, int64 [N], row i of class i % classes.

    `rest`, int64 [M], are those that stand for the reference; None for the workload's own.
    """

    rows: Tensor
    rest: Tensor | None


@dataclass(frozen=True)
class RealImages:
    """Draws of real images, each to be judged as N samples are.

    Attributes:
        images: "held-out" or "training".
        data: what they are drawn from.
        draws: `DRAWS` of them, all of N rows.
        disjoint: so many consecutive draws, from the first, have no image in common.
        num_classes: of the labels.
    """

    images: str
    data: ImageData
    draws: tuple[Draw, ...]
    disjoint: int
    num_classes: int

    @property
    def count(self) -> int:
        """N, the images of each draw."""
        return len(self.draws[0].rows)

    @property
    def labels(self) -> Tensor:
        """int64 [N], the classes of every draw."""
        return torch.arange(self.count) % self.num_classes

    def features(self, space: FeatureSpace) -> Features:
        """Of all images that are drawn from."""
        return space.heldout_features if self.images == "held-out" else space.training_features

    def reference(self, space: FeatureSpace, draw: Draw) -> Reference:
        """What a draw is compared with."""
        if draw.rest is None:
            return space.reference
        rest = as_reference(space.training_features[draw.rest])
        return replace(rest, labels=space.data.labels[draw.rest])

    def record(self, draw: Draw, spaces: Sequence[FeatureSpace]) -> dict[str, Any]:
        """What is recorded of a draw: which images, how many on each side, and all metrics."""
        metrics: dict[str, float] = {}
        against = spaces[0].reference.num_images if draw.rest is None else len(draw.rest)
        for space in spaces:
            features, reference = self.features(space)[draw.rows], self.reference(space, draw)
            metrics |= space.measure(features, self.labels, self.num_classes, reference)
        return {
            "images": self.images,
            "num_images": self.count,
            "reference": "its own" if draw.rest is None else "the other training images",
            "num_reference": against,
            "disjoint_draws": self.disjoint,
            **metrics,
        }


@dataclass(frozen=True)
class Floor:
    """The references of a feature space that samples are compared with as real images are."""

    space: FeatureSpace
    real: RealImages

    @cached_property
    def references(self) -> list[Reference]:
        """Statistics for each draw; one where all have the workload's own."""
        if self.real.draws[0].rest is None:
            return [self.space.reference]
        # Without features, which are large for Inception; Fréchet distances need none.
        found = (self.real.reference(self.space, draw) for draw in self.real.draws)
        return [replace(reference, features=None, labels=None) for reference in found]

    def fid_of(self, samples: Features) -> float | None:
        """Mean FID of the first N samples over the references; None for fewer samples."""
        if len(samples) < self.real.count:
            return None
        own = feature_statistics(samples.pool[: self.real.count])
        fids = [frechet_distance(own, reference.pool) for reference in self.references]
        return sum(fids) / len(fids)


def draw_real_images(
    data: ImageData, heldout: ImageData | None, count: int, num_classes: int
) -> RealImages | None:
    """Choose real images to stand for `count` samples, the same in every run.

    Returns:
        The draws; None for latents, and where a class has too few images.
    """
    if data.is_latent:
        return None
    if heldout is not None:
        found = _drawn("held-out", heldout, count, num_classes)
        if found is not None and found.count >= min(count, ENOUGH_HELDOUT):
            return found
    return _drawn("training", data, count, num_classes)


def _drawn(images: str, data: ImageData, count: int, num_classes: int) -> RealImages | None:
    by_class = [(data.labels == label).nonzero()[:, 0] for label in range(num_classes)]
    available = min(map(len, by_class))
    size = min(count, available // 2 * num_classes)
    if size < NEIGHBOURS + 2:
        return None
    each = -(-size // num_classes)
    # Halves are alike the other way round, so each split of the training images is drawn anew.
    disjoint = available // each if images == "held-out" else 1
    generator = seeds.generator("real images", images)
    draws: list[Draw] = []
    while len(draws) < DRAWS:
        shuffled = torch.stack(
            [rows[torch.randperm(len(rows), generator=generator)[:available]] for rows in by_class]
        )
        for start in range(0, disjoint * each, each):
            rest = torch.cat([shuffled[:, :start], shuffled[:, start + each :]], 1)
            # Column by column, so that row i is of class i % num_classes, as samples are.
            rows = shuffled[:, start : start + each].T.flatten()[:size]
            draws.append(Draw(rows, rest.flatten() if images == "training" else None))
    return RealImages(images, data, tuple(draws[:DRAWS]), min(disjoint, DRAWS), num_classes)


def classifier_record(space: FeatureSpace, num_classes: int) -> dict[str, Any] | None:
    """How many real images it never saw a feature network names rightly; None if not known.

    On the workload's held-out images where there are some, else as its own file says of the images
    that were held out of its training.
    """
    name, heldout = space.network.name, space.heldout
    if heldout is not None and space.heldout_features.logits.shape[1] == num_classes:
        value = accuracy(space.heldout_features, heldout.labels)
        return {"features": name, "accuracy": value, "images": f"held-out ({heldout.source})"}
    if space.network.heldout_accuracy is None:
        return None
    images = "held out of the classifier's training"
    return {"features": name, "accuracy": space.network.heldout_accuracy, "images": images}
