"""The files of a data set on disk: which ones are read, and one digest for all of them.

Imports nothing heavy, because a run is named after the content of its data before torch is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import expand_user
from robuq_bench.runs.digests import NamedFile, files_digest, is_dangling, walk

EMBEDDED = ("digits", "fashion28", "synthetic")  # made by the code, which pins their content
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
)
IDX_FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
IDX_SUFFIXES = ("", ".gz", ".xz")
SPLITS = ("train", "t10k")
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
SILENT = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # file managers leave them anywhere
NO_CLASSES = frozenset({"__MACOSX", "lost+found"})  # unpacking and formatting leave them
NAMED = 5

#: Source -> what its path should be.
SOURCES = {
    "idx": "the folder with train-images-idx3-ubyte(.gz or .xz) and its labels",
    "mnist-torchvision": "the root folder of torchvision.datasets.MNIST",
    "imagefolder": "a folder with one subfolder of images per class",
    "latents": "a folder of *.safetensors latent shards",
}


@dataclass(frozen=True)
class ImageFiles:
    """Images with their labels, in the order of classes, then of names.

    Attributes:
        classes: names of the class folders in the order of their labels; none for a flat folder.
        items: (file, label).
        left_out: what lies there and is not read: hidden, or not an image by its name.
    """

    classes: list[str]
    items: list[tuple[Path, int]]
    left_out: list[Path] = field(default_factory=list)


def data_variable(name: str) -> str:
    """The environment variable that says where the data of a workload are."""
    return f"ROBUQ_DATA_{name.upper().replace('-', '_')}"


def data_path(source: str, text: str | None, name: str | None) -> Path:
    """Return the existing path of a data section, or of ROBUQ_DATA_<NAME> where it has none.

    Raises:
        MissingResourceError: neither is set, or nothing is there.
    """
    variable = data_variable(name or "<workload>")
    text = text or (os.environ.get(variable) if name else None)
    hint = f"set {variable}=PATH or pass --set data.path=PATH"
    if not text:
        raise MissingResourceError(f"data source {source!r} needs {SOURCES[source]}; {hint}")
    path = expand_user(text)
    if not os.path.exists(path):  # Path.exists raises where a folder above may not be entered
        raise MissingResourceError(
            f"data path {path} does not exist; it should be {SOURCES[source]}; {hint}"
        )
    return path


def data_digest(source: str, path: Path) -> str:
    """Return a digest of the files that make up a data set, by their names and contents.

    Only files that are read count, so that a file manager's traces make no other data set of it;
    held-out images are read too.
    The checksum beside a latent shard is not believed: the shard may have been replaced since.

    Raises:
        RobuqError: the data set is not complete; the reader says the same.
    """
    if source == "imagefolder":
        images = find_images(path)
        return files_digest((file.relative_to(path).as_posix(), file) for file, _ in images.items)
    if source == "latents":
        return files_digest(_named(find_shards(path)))
    folder = path if source == "idx" else mnist_folder(path)
    images_file, labels_file, _ = find_idx_pair(folder)
    return files_digest(_named((images_file, labels_file, *(find_heldout_pair(folder) or ()))))


def _named(files: Iterable[Path]) -> list[NamedFile]:
    return [(file.name, file) for file in files]


def find_images(root: Path) -> ImageFiles:
    """Find the images of an image folder: one class per subfolder, in the order of their names.

    Below a class folder, folders are searched and links followed. A folder without subfolders is
    one class.

    Raises:
        UsageError: not a folder, images beside class folders, or class folders without images.
        MissingResourceError: no images, or a link that leads nowhere.
    """
    if not root.is_dir():
        raise UsageError(
            f"data path {root} is a file; source 'imagefolder' reads {SOURCES['imagefolder']}"
        )
    left_out: list[Path] = []
    classes, flat = _class_folders(root, left_out)
    found: list[list[Path]] = []
    for folder in classes:
        found.append(_images_among(list(walk(folder, hidden=left_out)), left_out))
    if classes and flat:
        raise UsageError(
            f"{root} holds images beside class folders: {listing(flat)}; move them into a class"
        )
    empty = [folder for folder, images in zip(classes, found, strict=True) if not images]
    if classes and len(empty) < len(classes) and empty:
        raise UsageError(
            f"{root} has class folders without images: {listing(empty)}. Every folder counts as a "
            "class and takes a label, so fill them or move them away"
        )
    items = [(file, label) for label, images in enumerate(found or [flat]) for file in images]
    if not items:
        raise MissingResourceError(
            f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); point data.path at them"
        )
    left_out = [path for path in left_out if path.name not in SILENT or path.is_dir()]
    return ImageFiles([folder.name for folder in classes], items, left_out)


def _class_folders(root: Path, left_out: list[Path]) -> tuple[list[Path], list[Path]]:
    """Class folders of a root, and the images beside them."""
    classes, files = [], []
    try:
        entries = sorted(root.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"folder {root} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in NO_CLASSES:
            left_out.append(entry)
        elif is_dangling(entry):
            raise MissingResourceError(
                f"{entry} is a link to {os.readlink(entry)}, which does not exist; restore that, "
                "or remove the link"
            )
        elif entry.is_dir():
            classes.append(entry)
        else:
            files.append(entry)
    return classes, _images_among(files, left_out)


def _images_among(files: list[Path], left_out: list[Path]) -> list[Path]:
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    left_out += sorted(set(files) - set(images))
    return images


def listing(paths: list[Path]) -> str:
    """The names of the first few paths with their folder, and how many more there are."""
    names = [f"{path.parent.name}/{path.name}" for path in paths[:NAMED]]
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(names) + more


def find_shards(path: Path) -> list[Path]:
    """Return the latent shards in a folder in the order of their names, or the one file.

    Raises:
        MissingResourceError: there are none.
        UsageError: a file of another kind, or shards in subfolders, which are not read.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(
                f"data path {path} is no *.safetensors file; give {SOURCES['latents']}"
            )
        return [path]
    found = [file for file in walk(path) if file.suffix == ".safetensors"]
    nested = [file for file in found if file.parent != path]
    if nested:
        raise UsageError(
            f"{path} holds shards in subfolders: {listing(nested)}; put all shards into one folder"
        )
    if not found:
        raise MissingResourceError(f"{path} holds no *.safetensors latent shards")
    return found


def find_idx_pair(path: Path) -> tuple[Path, Path, str]:
    """Return images file, labels file and split ("train", "t10k") of MNIST-style IDX files.

    Raises:
        UsageError: a file whose name does not say its split, or a root of several data sets.
        MissingResourceError: there are none, or the labels are missing.
    """
    if path.is_file():
        split = path.name.split("-images")[0]
        if "-images" not in path.name:
            raise UsageError(
                f"{path}: an IDX images file is named <split>-images-idx3-ubyte, with .gz or .xz "
                "if it is compressed"
            )
        return path, _idx_file(path.parent, split, LABELS), split
    folder = _idx_folder(path)
    split = next(split for split in SPLITS if _find_idx(folder, split, IMAGES))
    return *_idx_pair_of(folder, split), split


def find_heldout_pair(path: Path) -> tuple[Path, Path] | None:
    """Images and labels of the test set in the folder that holds the training set too; or None.

    Raises:
        As `find_idx_pair`.
    """
    if path.is_file():
        return None
    folder = _idx_folder(path)
    if not all(_find_idx(folder, split, IMAGES) for split in SPLITS):
        return None
    return _idx_pair_of(folder, "t10k")


def _idx_folder(root: Path) -> Path:
    """The one folder at or below `root` where images of either split lie."""
    folders = [root / below for below in IDX_FOLDERS]
    found = [f for f in folders if any(_find_idx(f, split, IMAGES) for split in SPLITS)]
    if not found:
        raise MissingResourceError(
            f"no train-images-idx3-ubyte or t10k-images-idx3-ubyte (.gz, .xz or neither) in {root};"
            " put MNIST-style IDX files there or point data.path at their folder"
        )
    if len(found) > 1:
        raise UsageError(
            f"{root} holds IDX images in {len(found)} folders ({', '.join(map(str, found))}), "
            "which may be different data sets; point data.path at one of them"
        )
    return found[0]


def _idx_pair_of(folder: Path, split: str) -> tuple[Path, Path]:
    return _idx_file(folder, split, IMAGES), _idx_file(folder, split, LABELS)


def _find_idx(folder: Path, split: str, kind: str) -> Path | None:
    candidates = (folder / f"{split}-{kind}{suffix}" for suffix in IDX_SUFFIXES)
    return next((file for file in candidates if os.path.isfile(file)), None)


def _idx_file(folder: Path, split: str, kind: str) -> Path:
    found = _find_idx(folder, split, kind)
    if found is None:
        raise MissingResourceError(
            f"{folder / f'{split}-{kind}'}(.gz, .xz) is missing beside its images"
        )
    return found


def mnist_folder(root: Path) -> Path:
    """Return where torchvision.datasets.MNIST keeps its files below `root`.

    Raises:
        MissingResourceError: the training set is not there.
    """
    folder = root / "MNIST" / "raw"
    if not os.path.isfile(folder / "train-images-idx3-ubyte"):
        raise MissingResourceError(
            f"{root} holds no training set of torchvision's MNIST (MNIST/raw/train-images-idx3-"
            f"ubyte); run torchvision.datasets.MNIST({str(root)!r}, download=True) once, or use "
            "data.source=idx with your own IDX files"
        )
    return folder
