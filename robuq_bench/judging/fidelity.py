"""FID, sFID, KID, Inception Score, precision and recall, by torch-fidelity's own functions.

KID is our own where labels are not random (`kernel_distance`). Only torch-fidelity's metric
functions and extractors are used: its cache is keyed by name alone, so another data set under the
same name would be answered with the first one's features, and its class-conditional generators call
the removed `np.int`. Statistics are accumulated in float64.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robuq_bench._compat import import_torch_fidelity
from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.data.datasets import ImageData
from robuq_bench.errors import CheckpointError, MissingResourceError, RobuqError, UsageError
from robuq_bench.files import cache_folder, expand_user, sha256_bytes
from robuq_bench.judging.feature_networks import FeatureNetwork, load_feature_network
from robuq_bench.judging.features import Features
from robuq_bench.judging.kernel_distance import stratified_kid

__all__ = [
    "FeatureNetwork",
    "Features",
    "Reference",
    "Statistics",
    "compute_fid",
    "compute_metrics",
    "feature_statistics",
    "frechet_distance",
    "load_adm_reference",
    "load_feature_network",
    "reference_features",
    "with_suffix",
]

logger = logging.getLogger(__name__)

METRIC_SEED = 2020  # torch-fidelity's default rng_seed
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000
IMAGES_PER_SPLIT = 5000
ASYMMETRY = 1e-3  # relative; float32 statistics are asymmetric by 1e-7
CACHE_FORMAT = "1"  # raise it when the meaning of stored features changes


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] of features, float64, as FID needs them."""

    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        pool, spatial: statistics for FID and sFID; an ADM reference may lack the latter.
        features: reference features for KID, precision and recall, where known.
        num_images: images behind the statistics; None when the file does not say.
        labels: int64 classes of `features`, where known; KID then takes their counts as fixed.
    """

    pool: Statistics
    spatial: Statistics | None
    features: Features | None
    num_images: int | None
    labels: Tensor | None = None


def compute_fid(
    samples: Features, reference: Features | Reference, suffix: str = ""
) -> dict[str, float]:
    """FID alone and whether it is rank-deficient, under the keys of `compute_metrics`.

    Raises:
        UsageError: fewer than 2 images, or features of different networks.
    """
    known = as_reference(reference)
    metrics = {"fid": frechet_distance(feature_statistics(samples.pool), known.pool)}
    smaller = min(len(samples), known.num_images or len(samples))
    metrics["fid_is_rank_deficient"] = _rank_flag("FID", smaller, samples.pool)
    return {with_suffix(key, suffix): value for key, value in metrics.items()}


def compute_metrics(
    samples: Features,
    reference: Features | Reference,
    suffix: str = "",
    labels: Tensor | None = None,
) -> dict[str, float]:
    """Compare the features of N generated images with a reference.

    `labels`, int64 [N], are the classes of the samples when their counts were fixed in advance, as
    `sampling.default_labels` fixes them; None says that every class was drawn at random.

    Keys for suffix "_digits" (or "digits"): fid_digits, sfid_digits, kid_digits, is_digits,
    precision_digits, recall_digits. Beside them: is_std, is_splits (one per 5,000 images, so equal
    to both ADM's chunks and torch-fidelity's 10 splits at N = 50,000), and fid_is_rank_deficient,
    sfid_is_rank_deficient: 1 when N <= d, where a covariance has no full rank and the distance is
    biased most. Precision and recall use 3 neighbours (Kynkaanniemi et al. 2019).

    Where the labels of a side are known (kid_is_stratified = 1), KID is `stratified_kid` of all
    images, which has no subsets and hence no kid_std; torch-fidelity's stands beside it as
    kid_torch_fidelity and kid_torch_fidelity_std. Elsewhere it is torch-fidelity's, with kid_std:
    the standard deviation over its 10 subsets (seed 2020) of kid_subset_size (at most 1,000 and N).

    What cannot be had is absent, never 0: KID, precision and recall without reference features, and
    KID where labels give a class a single image, which leaves it without an unbiased estimate.

    Raises:
        UsageError: fewer than 5 images, labels that do not fit, or features of different networks.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    known = as_reference(reference)
    sizes = [len(samples), *([len(known.features)] if known.features else [])]
    if min(sizes) < NEIGHBOURS + 2:
        raise UsageError(f"metrics need at least {NEIGHBOURS + 2} images a side, got {min(sizes)}")
    metrics = compute_fid(samples, known)
    if known.spatial is not None:
        smaller = min(len(samples), known.num_images or len(samples))
        metrics["sfid"] = frechet_distance(feature_statistics(samples.spatial), known.spatial)
        metrics["sfid_is_rank_deficient"] = _rank_flag("sFID", smaller, samples.spatial)

    splits = max(1, round(len(samples) / IMAGES_PER_SPLIT))
    score = isc_features_to_metric(samples.logits, splits, shuffle=True, rng_seed=METRIC_SEED)
    metrics["is"] = score["inception_score_mean"]
    metrics["is_std"], metrics["is_splits"] = score["inception_score_std"], splits
    if known.features is not None:
        pools = samples.pool.double(), known.features.pool.double()
        metrics |= _kid(*pools, labels, known.labels)
        manifold = prc_features_to_metric(
            *pools,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=KID_SUBSET_SIZE,
            save_cpu_ram=True,  # distances in blocks: 50,000 squared would not fit
            verbose=False,
        )
        metrics["precision"], metrics["recall"] = manifold["precision"], manifold["recall"]
    return {with_suffix(key, suffix): value for key, value in metrics.items()}


def _kid(
    samples: Tensor,
    reference: Tensor,
    sample_labels: Tensor | None,
    reference_labels: Tensor | None,
) -> dict[str, float]:
    """KID and its details by pooled features [N, d] and [M, d]; empty where a class is too small.

    Raises:
        UsageError: labels that do not fit.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    is_stratified = sample_labels is not None or reference_labels is not None
    stratified = None
    if is_stratified:
        stratified = stratified_kid(samples, reference, sample_labels, reference_labels)
        if stratified is None:
            logger.warning(
                "KID is left out: a class with a single image has no unbiased KID; it takes "
                "num_samples of at least 2 x classes, and 2 reference images of every class"
            )
            return {}
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    subsets = kid_features_to_metric(
        samples,
        reference,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=METRIC_SEED,
        verbose=False,
    )
    mean = subsets["kernel_inception_distance_mean"]
    std = subsets["kernel_inception_distance_std"]
    details = {"kid_subset_size": size, "kid_is_stratified": int(is_stratified)}
    if stratified is None:
        return {"kid": mean, "kid_std": std, **details}
    return {
        "kid": stratified,
        "kid_torch_fidelity": mean,
        "kid_torch_fidelity_std": std,
        **details,
    }


def with_suffix(key: str, suffix: str) -> str:
    """ "fid_is_rank_deficient", "_digits" -> "fid_digits_is_rank_deficient"."""
    metric, _, detail = key.partition("_")
    parts = (metric, suffix.strip("_"), detail)
    return "_".join(part for part in parts if part)


def _rank_flag(metric: str, num_images: int, features: Tensor) -> int:
    deficient = num_images <= features.shape[1]
    if deficient:
        _warn_of_rank(metric, num_images, features.shape[1])
    return int(deficient)


@functools.cache
def _warn_of_rank(metric: str, num_images: int, dimensions: int) -> None:
    """Once per process: studies judge hundreds of sample sets alike."""
    logger.warning(
        "%s of %d images in %d dimensions: covariances are rank-deficient",
        metric,
        num_images,
        dimensions,
    )


def as_reference(reference: Features | Reference) -> Reference:
    """Return a `Reference`; features are reduced to their statistics and kept beside them."""
    if isinstance(reference, Reference):
        return reference
    pool, spatial = feature_statistics(reference.pool), feature_statistics(reference.spatial)
    return Reference(pool, spatial, reference, len(reference))


def feature_statistics(features: Tensor) -> Statistics:
    """Return mean and unbiased covariance of features [N, d], N >= 2, accumulated in float64.

    Raises:
        UsageError: fewer than 2 rows, which have no covariance.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}")
    return Statistics(**fid_features_to_statistics(features.double()))


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) by torch-fidelity (Heusel et al. 2017, eq. 6).

    Raises:
        UsageError: the two have different dimensions (features of different networks).
    """
    import_torch_fidelity()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if samples.mu.shape != reference.mu.shape:
        raise UsageError(
            f"cannot compare {len(samples.mu)}-dimensional features with a "
            f"{len(reference.mu)}-dimensional reference; use the same feature network"
        )
    result = fid_statistics_to_metric(vars(samples), vars(reference), verbose=False)
    return float(result[KEY_METRIC_FID])


def load_adm_reference(
    path: str | Path,
    network: FeatureNetwork | None = None,
    batch_size: int = 64,
    *,
    image_size: int | None = None,
) -> Reference:
    """Read a reference of ADM's evaluator (`VIRTUAL_imagenet256_labeled.npz` and its kin).

    `mu`, `sigma` (and `mu_s`, `sigma_s`) describe the full data set and are cast to float64. The
    images `arr_0` (uint8 [n, H, W, 1 or 3]) are a subset; given a network they serve KID, precision
    and recall. Given `image_size`, H and W must be that.

    Raises:
        MissingResourceError: no such file.
        CheckpointError: not a readable `.npz`; an array is missing, of the wrong shape or not
            finite; or it was made with other features or for other images.
    """
    path = expand_user(path)
    if not path.is_file():
        raise MissingResourceError(
            f"reference statistics {path} do not exist; ADM's are listed in "
            "https://github.com/openai/guided-diffusion/tree/main/evaluations"
        )
    try:
        with path.open("rb") as stream:  # np.load by name leaks its handle when it fails
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            dimensions = (network.dimensions if network else None) or (None, None)
            pool = _statistics(archive, "mu", "sigma", dimensions[0])
            known = "mu_s" in archive.files
            spatial = _statistics(archive, "mu_s", "sigma_s", dimensions[1]) if known else None
            wanted = network is not None and "arr_0" in archive.files
            images = _reference_images(archive["arr_0"], image_size) if wanted else None
    except KeyError as error:
        raise CheckpointError(f"{path} is no ADM reference: {error.args[0]}") from error
    except Exception as error:  # a damaged or foreign archive can make NumPy raise anything
        raise CheckpointError(f"{path} is not a readable ADM reference ({error})") from error
    features = None
    if network is not None and images is not None:
        if network.channels == (1,) and (images == images[..., :1]).all():
            images = images[..., :1]  # grey, in a format that knows only RGB
        try:
            features = network.extract(torch.from_numpy(images).permute(0, 3, 1, 2), batch_size)
        except UsageError as error:
            raise CheckpointError(f"{path}: its images cannot be judged: {error}") from error
    return Reference(pool, spatial, features, num_images=None)


def _statistics(
    archive: Mapping[str, npt.NDArray[Any]], mean: str, covariance: str, dimension: int | None
) -> Statistics:
    mu, sigma = archive[mean], archive[covariance]
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{mean} {mu.shape} and {covariance} {sigma.shape} do not fit together")
    if any(array.dtype.kind not in "fiu" for array in (mu, sigma)):
        raise ValueError(f"{mean} ({mu.dtype}) and {covariance} ({sigma.dtype}) must be real")
    if dimension is not None and len(mu) != dimension:
        raise ValueError(
            f"{mean} has {len(mu)} values, but the feature network gives {dimension}: it was made "
            "with other features"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{mean} or {covariance} is not finite")
    scale = float(np.abs(sigma).max())
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * scale or sigma.diagonal().min() < 0:
        raise ValueError(
            f"{covariance} is no covariance: it must be symmetric, with variances >= 0"
        )
    return Statistics(mu, sigma)


def _reference_images(images: npt.NDArray[Any], size: int | None) -> npt.NDArray[np.uint8]:
    shaped = images.ndim == 4 and images.shape[3] in (1, 3) and len(images) >= NEIGHBOURS + 2
    if images.dtype != np.uint8 or not shaped:
        raise ValueError(
            f"arr_0 must be uint8 [n, H, W, 1 or 3] with n >= {NEIGHBOURS + 2}, got "
            f"{images.dtype} {images.shape}"
        )
    if size is not None and images.shape[1:3] != (size, size):
        raise ValueError(
            f"its images are {images.shape[1]}x{images.shape[2]}, those to judge {size}x{size}"
        )
    return images


def reference_features(
    network: FeatureNetwork, data: ImageData, batch_size: int = 256, *, cache: Path | None = None
) -> Features:
    """Return the features of a whole data set, cached under the hash of data and network.

    A damaged or foreign cache file is reported by a warning and replaced; a cache that cannot be
    read or written, or has no place, is reported and done without.

    Args:
        cache: folder; `cache_folder()` / "features" when None.

    Raises:
        UsageError: latents, which have no pixels to look at.
    """
    if data.is_latent:
        raise UsageError(
            f"{data.source} has no images to take reference features from; use an ADM reference"
        )
    identity = {"network": network.sha256, "data": data.sha256, "format": CACHE_FORMAT}
    key = sha256_bytes("/".join(identity.values()).encode())
    if cache is None:
        root = cache_folder()
        if root is None:
            logger.warning("this user has no home folder: features are not cached; set ROBUQ_CACHE")
            return network.extract(data.images, batch_size)
        cache = root / "features"
    path = cache / f"{network.name}-{key[:32]}.safetensors"
    if os.path.exists(path):  # False, where Path.exists raises, in a folder that is not ours
        try:
            tensors, metadata = load_tensors(path)
            if metadata == identity:
                return Features(**tensors)
            logger.warning("cached features %s belong to something else; computing anew", path)
        except (CheckpointError, TypeError) as error:
            logger.warning("cached features are unusable (%s); computing anew", error)
    features = network.extract(data.images, batch_size)
    try:
        save_tensors(path, vars(features), identity)
    except RobuqError as error:
        logger.warning("reference features are not cached (%s)", error)
    return features
