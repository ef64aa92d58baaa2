"""Means and covariances of a whole data set's features, for workloads that embed a part of it.

    python -m robuq_bench.judging.reference_statistics fashion28 DIR fashion28 fashion28b

computes those of all training images in the IDX files of DIR, in the features of the networks that
are named last, and writes them as the asset `fashion28_reference.safetensors`. They serve exactly
these networks and exactly that data set, or a part of it, and are refused with others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.config import asset_path, load_workload
from robuq_bench.data.datasets import ImageData, load_dataset
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import atomic_write_text
from robuq_bench.judging.feature_networks import FeatureNetwork, load_classifier
from robuq_bench.judging.features import features_asset
from robuq_bench.judging.fidelity import (
    Reference,
    Statistics,
    feature_statistics,
    reference_features,
)

FORMAT = "robuq-reference/1"
SPARE = "--set evaluation.reference=none compares with the workload's own images"


def save_statistics(
    path: Path, data: ImageData, networks: list[FeatureNetwork], *, command: str
) -> str:
    """Write the float64 statistics of `data` in the features of every network; return the SHA-256.

    Tensors are called `<SHA-256 of the network>.<pool or spatial>.<mu [d] or sigma [d, d]>`; a card
    `.json` and a checksum lie beside them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for network in networks:
        features = reference_features(network, data)
        for kind, values in (("pool", features.pool), ("spatial", features.spatial)):
            statistics = feature_statistics(values)
            tensors[f"{network.sha256}.{kind}.mu"] = torch.from_numpy(statistics.mu)
            tensors[f"{network.sha256}.{kind}.sigma"] = torch.from_numpy(statistics.sigma)
    facts = {
        "format": FORMAT,
        "data": data.source,
        "data_sha256": data.sha256,
        "num_images": str(len(data)),
        "networks": json.dumps({network.name: network.sha256 for network in networks}),
        "command": command,
        "torch": torch.__version__,
    }
    digest = save_tensors(path, tensors, facts)
    card = {"sha256": digest, "licence": "Apache-2.0", **facts}
    atomic_write_text(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    return digest


def load_statistics(
    path: Path, network: FeatureNetwork, data: ImageData, batch_size: int = 256
) -> Reference:
    """Read the statistics in the features of `network`; the features of `data` stand beside them.

    FID and sFID are then distances to the whole data set, KID, precision and recall those to
    `data`, which is that set or a part of it.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
        UsageError: it knows no such network, or is of other images.
    """
    tensors, facts = load_tensors(path)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no {FORMAT!r} reference statistics")
    try:
        known, images = json.loads(facts["networks"]), int(facts["num_images"])
        whole = facts["data_sha256"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no {FORMAT!r} reference: {error}") from error
    if network.sha256 not in known.values():
        raise UsageError(
            f"{path} has statistics in features of {', '.join(known)}, not in those of "
            f"{network.name!r} (SHA-256 {network.sha256:.12}); {SPARE}"
        )
    if whole not in (data.sha256, data.part_of):
        raise UsageError(
            f"{path} is of other images (SHA-256 {whole:.12}) than {data.source} "
            f"({data.sha256:.12}) or the set it is a part of; {SPARE}"
        )
    parts = {}
    for kind in ("pool", "spatial"):
        names = [f"{network.sha256}.{kind}.{name}" for name in ("mu", "sigma")]
        if not tensors.keys() >= set(names):
            raise CheckpointError(f"{path} lacks {' or '.join(names)}")
        mu, sigma = (tensors[name].numpy() for name in names)
        parts[kind] = Statistics(mu, sigma)
    features = reference_features(network, data, batch_size)
    return Reference(parts["pool"], parts["spatial"], features, images, labels=data.labels)


def main(name: str, folder: str, *networks: str) -> str:
    """Write the reference statistics of a packaged workload; return their SHA-256."""
    section = load_workload(name).data.model_copy(update={"source": "idx", "path": folder})
    return save_statistics(
        asset_path(f"asset:{name}_reference.safetensors"),
        load_dataset(section),
        [load_classifier(features_asset(network)) for network in networks],
        command="python -m robuq_bench.judging.reference_statistics "
        + " ".join([name, "DIR", *networks]),
    )


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
