"""The embedded part of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017; MIT licence, Zalando SE).

Of the 60,000 training images the first 1,000 of every class, of the 10,000 test images the first
200 of every class, each in the order of its file: the files are in random order already.

    python -m robuq_bench.data.fashion28 DIR

makes the asset anew from a folder of IDX files, such as that of Debian's package
dataset-fashion-mnist or the root folder of torchvision.datasets.FashionMNIST.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robuq_bench.data.content import content_sha256
from robuq_bench.data.files import find_heldout_pair, find_idx_pair
from robuq_bench.data.idx import read_idx_pair, write_idx
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import sha256_file

FOLDER = Path(__file__).parents[1] / "assets" / "fashion28"
SIZE = 28
PER_CLASS = {"train": 1000, "t10k": 200}
SHA256 = {
    "train": "ed5d14bd4424253cf3b8d8c32819c218e6cedbeb2cd6495bfe4793339cc4929e",
    "t10k": "0b616182a1739a5fe65e9a0c6f2688902a1ddd7e315ff417499f86cbb32f364e",
}
"""`content_sha256` of what is embedded."""

WHOLE_SHA256 = "961cc284146a1b019ad2afc90d7fdd028ce1f44c62598185f2aba2ed446364fd"
"""The same of all 60,000 training images, in `ImageData.part_of` of those embedded."""

WHOLE_TEST_SHA256 = "380569de6c02abd04625217fed1afc81c746202231576566d9e9de486368eaef"


def read(split: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """The embedded images, uint8 [N, 1, 28, 28], and labels, int64 [N], of "train" or "t10k".

    Raises:
        MissingResourceError: they are not installed.
        CheckpointError: they are damaged or not those pinned here.
    """
    images, labels = read_idx_pair(*_pair(folder, split), SIZE)
    if content_sha256(images, labels) != SHA256[split]:
        raise CheckpointError(
            f"the {split} images in {folder} are not those of the `fashion28` workload; install "
            "the package anew"
        )
    return images, labels


def first_of_every_class(labels: Tensor, count: int) -> Tensor:
    """Rows (int64, ascending) of the first `count` of every class among labels int64 [N].

    Raises:
        UsageError: a class has fewer.
    """
    rows = [(labels == label).nonzero()[:count, 0] for label in labels.unique()]
    few = min(map(len, rows))
    if few < count:
        raise UsageError(f"a class has {few} images, and {count} of every class are wanted")
    return torch.cat(rows).sort().values


def write(source: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Choose the images from the IDX files in `source`, write them and their card; return it.

    Raises:
        MissingResourceError: the training or the test set is not there.
        CheckpointError: they are damaged, or not Fashion-MNIST as it was published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {
        "licence": "MIT, Copyright 2017 Zalando SE; see LICENSE",
        "source": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "command": "python -m robuq_bench.data.fashion28 DIR",
        "rule": "the first images of every class, in the order of their file",
        "files": {},
    }
    for split, whole in (("train", WHOLE_SHA256), ("t10k", WHOLE_TEST_SHA256)):
        images, labels = read_idx_pair(*_pair(source, split), SIZE)
        if content_sha256(images, labels) != whole:
            raise CheckpointError(f"the {split} images in {source} are not those of Fashion-MNIST")
        rows = first_of_every_class(labels, PER_CLASS[split])
        images, labels = images[rows], labels[rows]
        card[split] = {
            "images": len(rows),
            "per_class": PER_CLASS[split],
            "content_sha256": content_sha256(images, labels),
            "chosen_from": whole,
        }
        arrays = {"images-idx3-ubyte": images[:, 0], "labels-idx1-ubyte": labels.byte()}
        for kind, array in arrays.items():
            path = folder / f"{split}-{kind}.xz"
            write_idx(path, array.numpy())
            card["files"][path.name] = sha256_file(path)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _pair(folder: Path, split: str) -> tuple[Path, Path]:
    if split == "train":
        images, labels, found = find_idx_pair(folder)
        pair = (images, labels) if found == "train" else None
    else:
        pair = find_heldout_pair(folder)
    if pair is None:
        raise MissingResourceError(
            f"{folder} lacks {split}-images-idx3-ubyte (.gz, .xz or neither); name a folder with "
            "the training and the test set of Fashion-MNIST"
        )
    return pair


if __name__ == "__main__":
    print(json.dumps(write(Path(sys.argv[1])), indent=2))
