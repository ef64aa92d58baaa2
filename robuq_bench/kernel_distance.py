"""KID for samples with fixed class counts: the correction of its unbiased estimator.

KID is MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) with k(a, b) = (a.b / d + 1)^3. The usual
estimator takes each of the first two means over the pairs i != j of N samples. That is unbiased
for independent draws, labels included. When the labels are fixed in advance, n_c of class c, the
samples are not independent: a pair shares a class with probability
sum_c n_c (n_c - 1) / (N (N - 1)), where two independent draws of the same mixture p_c = n_c / N do
with sum_c p_c^2, which is more. Pairs of one class are the more alike, so the estimator is too low.

Let k_cd be the mean over pairs of one image of class c and another of class d. Each is unbiased,
whatever the counts, and so is their mixture

    T = sum_cd p_c p_d k_cd = (1 - 1/N) S + (1/N) sum_c p_c k_cc,

with S the usual mean over i != j: the N missing pairs i = i are filled with what two images of that
class have in common. `class_correction` is T - S. (Stratified sampling: Cochran 1977, chapter 5;
KID: Binkowski et al. 2018.)
"""

from __future__ import annotations

from torch import Tensor

from robuq_bench.errors import UsageError

__all__ = ["class_correction"]

BLOCK_ELEMENTS = 2**23  # of the kernel matrix at a time: 64 MiB


def class_correction(features: Tensor, labels: Tensor) -> float | None:
    """What to add to KID for one side whose class counts are fixed: T - S of the module docstring.

    Args:
        features: [N, d], any float; computed in float64.
        labels: int64 [N], the class of each row; the mixture is that of these labels.

    Returns:
        The correction, at least 0 in expectation; None where a class has a single image, whose
        likeness to another image of its class nothing can tell.

    Raises:
        UsageError: another number of labels than of rows.
    """
    if labels.shape != (len(features),):
        raise UsageError(
            f"labels of {len(features)} images must have shape ({len(features)},), "
            f"got {tuple(labels.shape)}"
        )
    features, count = features.double(), len(features)
    within = 0.0
    for label in labels.unique():
        members = features[labels == label]
        if len(members) < 2:
            return None
        within += len(members) / count * _mean_kernel_of_pairs(members)
    return (within - _mean_kernel_of_pairs(features)) / count


def _mean_kernel_of_pairs(features: Tensor) -> float:
    """Mean of k over the pairs i != j of rows [n, d], n >= 2; every pair is computed once."""
    count, dimensions = features.shape
    rows = max(1, BLOCK_ELEMENTS // count)
    total = 0.0
    for start in range(0, count, rows):
        block = features[start : start + rows]
        kernel = (block @ features[start:].T).div_(dimensions).add_(1).pow_(3)
        # Pairs within the block are there twice, those with later rows once.
        total += 2 * float(kernel.sum()) - float(kernel[:, : len(block)].sum())
    own = float((features.square().sum(1) / dimensions + 1).pow_(3).sum())
    return (total - own) / (count * (count - 1))
