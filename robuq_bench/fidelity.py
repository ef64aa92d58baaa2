"""FID, sFID, KID, Inception Score, precision and recall, by torch-fidelity's own functions.

Only its metric functions and extractors are used: its cache is keyed by name alone, so another data
set under the same name would be answered with the first one's features, and its class-conditional
generators call the removed `np.int`. Statistics are accumulated in float64.
"""

from __future__ import annotations

import functools
import logging
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robuq_bench._compat import import_torch_fidelity
from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.data import ImageData
from robuq_bench.errors import CheckpointError, MissingResourceError, RobuqError, UsageError
from robuq_bench.feature_networks import FeatureNetwork, load_feature_network
from robuq_bench.features import Features
from robuq_bench.files import cache_folder, expand_user, sha256_bytes

__all__ = [
    "FeatureNetwork",
    "Features",
    "Reference",
    "Statistics",
    "compute_metrics",
    "feature_statistics",
    "frechet_distance",
    "load_adm_reference",
    "load_feature_network",
    "reference_features",
]

logger = logging.getLogger(__name__)

METRIC_SEED = 2020  # torch-fidelity's default rng_seed
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000
IMAGES_PER_SPLIT = 5000
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
    """

    pool: Statistics
    spatial: Statistics | None
    features: Features | None
    num_images: int | None


def compute_metrics(
    samples: Features, reference: Features | Reference, suffix: str = ""
) -> dict[str, float]:
    """Compare the features of N generated images with a reference.

    Keys for suffix "_digits" (or "digits"): fid_digits, sfid_digits, kid_digits, is_digits,
    precision_digits, recall_digits. Beside them: kid_std, kid_subset_size (at most 1,000 and N; 10
    subsets, seed 2020), is_std, is_splits (one per 5,000 images, so equal to both ADM's chunks and
    torch-fidelity's 10 splits at N = 50,000), and fid_is_rank_deficient, sfid_is_rank_deficient:
    1 when N <= d, where a covariance has no full rank and the distance is biased most.
    Precision and recall use 3 neighbours (Kynkaanniemi et al. 2019). What the reference cannot
    give (KID, precision and recall without its features) is absent, never 0.

    Raises:
        UsageError: fewer than 5 images, or features of different networks.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    known = as_reference(reference)
    sizes = [len(samples), *([len(known.features)] if known.features else [])]
    if min(sizes) < NEIGHBOURS + 2:
        raise UsageError(f"metrics need at least {NEIGHBOURS + 2} images a side, got {min(sizes)}")
    metrics = {"fid": frechet_distance(feature_statistics(samples.pool), known.pool)}
    smaller = min(len(samples), known.num_images or len(samples))
    metrics["fid_is_rank_deficient"] = _rank_flag("FID", smaller, samples.pool)
    if known.spatial is not None:
        metrics["sfid"] = frechet_distance(feature_statistics(samples.spatial), known.spatial)
        metrics["sfid_is_rank_deficient"] = _rank_flag("sFID", smaller, samples.spatial)

    splits = max(1, round(len(samples) / IMAGES_PER_SPLIT))
    score = isc_features_to_metric(samples.logits, splits, shuffle=True, rng_seed=METRIC_SEED)
    metrics["is"] = score["inception_score_mean"]
    metrics["is_std"], metrics["is_splits"] = score["inception_score_std"], splits
    if known.features is not None:
        pools = samples.pool.double(), known.features.pool.double()
        size = min(KID_SUBSET_SIZE, *sizes)
        kid = kid_features_to_metric(
            *pools,
            kid_subsets=KID_SUBSETS,
            kid_subset_size=size,
            rng_seed=METRIC_SEED,
            verbose=False,
        )
        metrics["kid"] = kid["kernel_inception_distance_mean"]
        metrics["kid_std"], metrics["kid_subset_size"] = kid["kernel_inception_distance_std"], size
        manifold = prc_features_to_metric(
            *pools,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=KID_SUBSET_SIZE,
            save_cpu_ram=True,  # distances in blocks: 50,000 squared would not fit
            verbose=False,
        )
        metrics["precision"], metrics["recall"] = manifold["precision"], manifold["recall"]
    return {_with_suffix(key, suffix): value for key, value in metrics.items()}


def _with_suffix(key: str, suffix: str) -> str:
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
    path: str | Path, network: FeatureNetwork | None = None, batch_size: int = 64
) -> Reference:
    """Read a reference of ADM's evaluator (`VIRTUAL_imagenet256_labeled.npz` and its kin).

    `mu`, `sigma` (and `mu_s`, `sigma_s`) describe the full data set and are cast to float64. The
    images `arr_0` (uint8 [n, H, W, 3]) are a subset; given a network they serve KID, precision and
    recall.

    Raises:
        MissingResourceError: no such file.
        CheckpointError: not a readable `.npz`, an array is missing or has the wrong shape.
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
            pool = _statistics(archive["mu"], archive["sigma"])
            known = "mu_s" in archive.files
            spatial = _statistics(archive["mu_s"], archive["sigma_s"]) if known else None
            wanted = network is not None and "arr_0" in archive.files
            images = archive["arr_0"] if wanted else None
    except KeyError as error:
        raise CheckpointError(f"{path} is no ADM reference: {error.args[0]}") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is not a readable ADM reference ({error})") from error
    features = None
    if network is not None and images is not None:
        features = network.extract(torch.from_numpy(images).permute(0, 3, 1, 2), batch_size)
    return Reference(pool, spatial, features, num_images=None)


def _statistics(mu: npt.NDArray[Any], sigma: npt.NDArray[Any]) -> Statistics:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} do not fit together")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64))


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
