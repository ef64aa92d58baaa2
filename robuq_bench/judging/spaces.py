"""A feature space to judge images in: a network, what samples are compared with, the real images.

A workload has one, and a second where `evaluation.second_features` names another network: what
orders plans alike in both is less likely to be a whim of one network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import UsageError
from robuq_bench.judging.feature_networks import FeatureNetwork
from robuq_bench.judging.features import Features
from robuq_bench.judging.fidelity import (
    Reference,
    compute_metrics,
    reference_features,
    with_suffix,
)

if TYPE_CHECKING:
    from robuq_bench.config import Workload


@dataclass(frozen=True)
class FeatureSpace:
    """A feature network and the reference of samples in its space.

    Attributes:
        network, reference: as loaded for the workload.
        data: the training images.
        heldout: images that no training saw, where the workload has them.
        batch_size: images that go through the network at a time.
    """

    network: FeatureNetwork
    reference: Reference
    data: ImageData
    heldout: ImageData | None
    batch_size: int

    def named(self, metric: str) -> str:
        """The name of a metric in this space: "fid" -> "fid_digits"."""
        return with_suffix(metric, self.network.suffix)

    @cached_property
    def training_features(self) -> Features:
        """Features of the training images, from the cache where they are kept."""
        return reference_features(self.network, self.data, self.batch_size)

    @cached_property
    def heldout_features(self) -> Features:
        """Features of the held-out images, likewise.

        Raises:
            UsageError: the workload has none.
        """
        if self.heldout is None:
            raise UsageError(f"{self.data.source} has no held-out images")
        return reference_features(self.network, self.heldout, self.batch_size)

    def measure(
        self, features: Features, labels: Tensor, num_classes: int, reference: Reference
    ) -> dict[str, float]:
        """All metrics of N images of classes `labels` (int64 [N], counts fixed in advance).

        Beside those of `compute_metrics`: `accuracy`, the share of images that the network takes
        for the class they are of, where it tells `num_classes` apart. That of real images says how
        far it can be believed.
        """
        metrics = compute_metrics(features, reference, self.network.suffix, labels)
        if features.logits.shape[1] == num_classes:
            metrics[self.named("accuracy")] = accuracy(features, labels)
        return metrics


def accuracy(features: Features, labels: Tensor) -> float:
    """Share in [0, 1] of N images whose largest logit is that of their label, int64 [N]."""
    return (features.logits.argmax(1) == labels).double().mean().item()


def evaluations(workload: Workload) -> list[Workload]:
    """The workload, and where it has second features, one that is judged by them alone."""
    evaluation = workload.evaluation
    if evaluation.second_features is None:
        return [workload]
    second = {
        "features": evaluation.second_features,
        "features_sha256": evaluation.second_features_sha256,
        "reference": evaluation.second_reference,
        "reference_sha256": evaluation.second_reference_sha256,
        "adapt_images": None,
    }
    judged = evaluation.model_copy(update=second)
    return [workload, workload.model_copy(update={"evaluation": judged})]
