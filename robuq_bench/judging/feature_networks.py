"""Where image features come from: our digit classifier or torch-fidelity's Inception v3."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import torch
from torch import Tensor

from robuq_bench._compat import import_torch_fidelity
from robuq_bench.checkpointing import load_untrusted_checkpoint, sidecar_path
from robuq_bench.config import asset_path
from robuq_bench.config.workload import feature_names
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import make_folder, read_checksums, sha256_file
from robuq_bench.judging.features import (
    ASSET,
    SPATIAL_CHANNELS,
    SPATIAL_SIDE,
    Features,
    features_asset,
    load_features,
)
from robuq_bench.runs.digests import refuse_change

logger = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class EvaluationSection(Protocol):
    """The fields of `Workload.evaluation` that choose the features."""

    @property
    def features(self) -> str: ...
    @property
    def inception_weights(self) -> str | None: ...
    @property
    def adapt_images(self) -> bool | None: ...
    @property
    def features_sha256(self) -> str | None: ...


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature extractor with its identity.

    Attributes:
        name: "digits", "inception", "mine-1a2b3c4d", ...; recorded with every metric.
        suffix: what metric names end in; "" for Inception.
        sha256: digest of the weight file.
        forward: uint8 [n, C, H, W] on `device` -> (pool, spatial, logits).
        channels, size: the images it is for; a size of None takes any.
        dimensions: of its pooled and of its spatial features.
        trained_on: `ImageData.sha256` of its training images; "" where that says nothing.
        heldout_accuracy: share of its own held-out images that it names; None where not known.
        adapts: whether other channels and sizes may be brought into its shape.
    """

    name: str
    suffix: str
    sha256: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    device: torch.device
    channels: tuple[int, ...] = (1, 3)
    size: int | None = None
    dimensions: tuple[int, int] | None = None
    trained_on: str = ""
    heldout_accuracy: float | None = None
    adapts: bool = False

    def fits(self, channels: int, height: int, width: int) -> bool:
        """Whether it was made for images of this shape."""
        sized = self.size is None or height == width == self.size
        return channels in self.channels and sized

    def check_fit(self, channels: int, height: int, width: int) -> None:
        """Refuse images of another shape than the network's, unless it may adapt them.

        Raises:
            UsageError: they do not fit; names the ways out.
        """
        if self.adapts or self.fits(channels, height, width):
            return
        size = f" of {self.size}x{self.size}" if self.size else ""
        raise UsageError(
            f"feature network {self.name!r} is for images with "
            f"{' or '.join(map(str, self.channels))} channel(s){size}; these have {channels} of "
            f"{height}x{width}. Train one for them (`train-features --on WORKLOAD --export "
            "FILE.safetensors`, then --set evaluation.features=FILE.safetensors), take --set "
            "evaluation.features=inception, or --set evaluation.adapt_images=true, which averages "
            f"or repeats channels, resizes, and calls the metrics fid_{self.name}_adapted etc."
        )

    @torch.no_grad()
    def extract(self, images: Tensor, batch_size: int = 256) -> Features:
        """Return the features of uint8 images [N, C, H, W]; the batch size does not change them.

        Raises:
            UsageError: no images, not uint8, or not of the network's shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise UsageError(
                f"{self.name} features take uint8 [N, C, H, W] images with N > 0, got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        self.check_fit(*images.shape[1:])
        parts = [self.forward(part.to(self.device)) for part in torch.split(images, batch_size)]
        pool, spatial, logits = (
            torch.cat([tensor.cpu() for tensor in column]) for column in zip(*parts, strict=True)
        )
        return Features(pool, spatial, logits)


def load_feature_network(
    evaluation: EvaluationSection, *, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Load the features that a workload's `evaluation` section names.

    `evaluation.features` is the name of a packaged network ("digits"), "inception", or a
    `.safetensors` file of `train-features`.
    With `evaluation.adapt_images` the network takes images of any shape, and its metrics another
    name ("_digits_adapted").

    Raises:
        CheckpointError: a weight file is damaged or not the one expected.
        MissingResourceError: Inception's weights are neither here nor downloadable.
        UsageError: unknown features, or Inception told to adapt images.
    """
    adapts = bool(evaluation.adapt_images)
    if evaluation.features == "inception":
        if adapts:
            raise UsageError(
                "inception takes images of any size; pass --set evaluation.adapt_images=false"
            )
        return load_inception(evaluation.inception_weights, device=device)
    names = feature_names()
    if evaluation.features in names or evaluation.features.endswith(".safetensors"):
        is_named = evaluation.features in names
        path = features_asset(evaluation.features) if is_named else asset_path(evaluation.features)
        network = load_classifier(path, device=device, adapts=adapts)
        if evaluation.features_sha256 is not None:
            refuse_change(network.sha256, evaluation.features_sha256, f"evaluation.features {path}")
        return network
    raise UsageError(
        f"unknown evaluation.features {evaluation.features!r}; known: {', '.join(names)}, FILE"
    )


def load_classifier(
    path: Path = ASSET, *, device: str | torch.device = "cpu", adapts: bool = False
) -> FeatureNetwork:
    """Load a classifier made by `train-features`; see `features.load_features`.

    Only the packaged ones are called by their bare names: training with other images or another
    seed makes another feature space, whose metrics carry the start of its SHA-256 too.
    """
    network, metadata, digest = load_features(path)
    network.to(device)
    packaged = sidecar_path(features_asset(metadata["name"]))
    is_packaged = packaged.exists() and digest in read_checksums(packaged)
    name = metadata["name"] if is_packaged else f"{metadata['name']}-{digest[:8]}"
    return FeatureNetwork(
        name,
        f"_{name}_adapted" if adapts else f"_{name}",
        digest,
        network,
        torch.device(device),
        channels=(network.channels,),
        size=int(metadata.get("image_size", network.input_size)),
        dimensions=(network.classifier.in_features, SPATIAL_CHANNELS * SPATIAL_SIDE**2),
        trained_on=metadata.get("dataset_sha256", ""),
        heldout_accuracy=float(known) if (known := metadata.get("heldout_accuracy")) else None,
        adapts=adapts,
    )


def load_inception(
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    expected_sha256: str | None = INCEPTION_SHA256,
) -> FeatureNetwork:
    """Load torch-fidelity's TF-compatible Inception v3 (2015-12-05): pool 2048, spatial 2023.

    Spatial features are ADM's: `mixed_6/conv`, first 7 channels of 17x17, channel last (here the
    output of `Mixed_6d.branch1x1`). Logits omit the bias. Grey images are repeated to three
    channels. Without `weights`, torch.hub's cache is used, filled by one download if need be.

    Raises:
        MissingResourceError: no file at `weights`, or none cached and no network.
        CheckpointError: the file is not the expected one, or holds more than tensors.
    """
    path = asset_path(str(weights)) if weights else _inception_from_hub()
    if not path.is_file():
        raise MissingResourceError(
            f"Inception weights {path} do not exist; download {INCEPTION_URL} and point "
            "evaluation.inception_weights at the file"
        )
    digest = sha256_file(path)
    if expected_sha256 is not None and digest != expected_sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {digest}, expected {expected_sha256}; download it anew from "
            f"{INCEPTION_URL}"
        )
    # torch-fidelity unpickles without restrictions, so refuse first what is not plain tensors.
    load_untrusted_checkpoint(path)
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    extractor.eval().to(device)
    captured: list[Tensor] = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda *call: captured.append(call[2]))

    def forward(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pool, logits = extractor(images.expand(-1, 3, -1, -1))
        spatial = captured.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, logits

    return FeatureNetwork(
        "inception", "", digest, forward, torch.device(device), dimensions=(2048, 2023)
    )


def _inception_from_hub() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.parts[0] == "~":  # torch would make a folder of that name
        raise MissingResourceError(
            "this user has no home folder to keep Inception weights in; set TORCH_HOME, or "
            "evaluation.inception_weights=FILE"
        )
    if not path.is_file():
        make_folder(path.parent)
        logger.warning("downloading Inception weights (91 MiB) to %s", path)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, False)
        except (URLError, OSError, RuntimeError) as error:
            raise MissingResourceError(
                f"Inception weights are not at {path} and cannot be downloaded ({error}); fetch "
                f"{INCEPTION_URL} elsewhere and set evaluation.inception_weights=FILE"
            ) from error
    return path
