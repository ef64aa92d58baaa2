"""What a folder of images, latents or IDX files holds: nothing dropped, shifted or believed."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robuq_bench.checkpointing import save_tensors
from robuq_bench.config import load_workload
from robuq_bench.data.datasets import ImageData, load_dataset
from robuq_bench.data.files import find_images
from robuq_bench.errors import CheckpointError, MissingResourceError, RobuqError, UsageError
from robuq_bench.files import sha256_file

SECTION = load_workload("digits").data


def load(source: str, path: Path, **fields: Any) -> ImageData:
    section = {"source": source, "path": str(path), "num_classes": 2} | fields
    return load_dataset(SECTION.model_copy(update=section))


def picture(path: Path, value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the classes cat (grey 1) and dog (grey 2)."""
    for value, name in enumerate(("cat", "dog"), 1):
        picture(tmp_path / "d" / name / "a.png", value)
    return tmp_path / "d"


# image folders


def test_a_path_one_level_too_high_is_told(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    load("imagefolder", two)
    assert "level too high" not in caplog.text
    load("imagefolder", two.parent, num_classes=1)
    assert (
        "(d), each of which becomes part of that class; is data.path one level too" in caplog.text
    )


def test_linked_images_folders_and_classes_count(two: Path, tmp_path: Path) -> None:
    (two / "cat" / "linked").symlink_to(picture(tmp_path / "store" / "x" / "b.png", 3).parent)
    (two / "cat" / "c.png").symlink_to(tmp_path / "store" / "x" / "b.png")
    (two / "eel").symlink_to(tmp_path / "store")
    data = load("imagefolder", two, num_classes=3)
    assert data.images[:, 0, 0, 0].tolist() == [1, 3, 3, 2, 3]
    assert data.labels.tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("place", ["cat/b.png", "cat/more", "dog/deep/b.png", "eel"])
def test_a_link_to_nothing_is_refused_wherever_it_is(two: Path, place: str) -> None:
    (two / place).parent.mkdir(exist_ok=True)
    (two / place).symlink_to("/nowhere/b.png")
    with pytest.raises(MissingResourceError, match=rf"{place} is a link to /nowhere/b\.png"):
        load("imagefolder", two)


def test_a_circle_of_links_is_refused(two: Path) -> None:
    (two / "cat" / "up").symlink_to(two)
    with pytest.raises(UsageError, match=r"cat/up/cat.*remove the link"):
        load("imagefolder", two)


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_an_empty_class_folder_is_refused(two: Path, content: str | None) -> None:
    (two / "bat").mkdir()
    if content:
        (two / "bat" / content).write_text("")
    with pytest.raises(UsageError, match=r"without images: d/bat\. .*takes a label"):
        load("imagefolder", two, num_classes=3)


def test_what_is_not_read_is_told_and_takes_no_label(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("__MACOSX/cat/._a.png", ".git/b.png", "lost+found/x"):
        (two / name).parent.mkdir(parents=True)
        (two / name).write_text("")
    (two / "cat" / "list.csv").write_text("")
    (two / "cat" / ".c.png").write_text("")
    for name in ("cat/.DS_Store", "dog/Thumbs.db", ".DS_Store"):
        (two / name).write_text("")
    with caplog.at_level(logging.WARNING):
        assert load("imagefolder", two).labels.tolist() == [0, 1]
    (message,) = caplog.messages
    assert "5 file(s) not read" in message
    assert all(
        name in message for name in (".git", "__MACOSX", "lost+found", "cat/list.csv", ".c.png")
    )


def test_nothing_is_told_of_a_clean_folder(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    (two / ".DS_Store").write_text("")
    with caplog.at_level(logging.INFO):
        load("imagefolder", two)
    assert caplog.messages == []


def test_images_beside_class_folders_are_refused(two: Path) -> None:
    picture(two / "loose.JPG")
    with pytest.raises(UsageError, match=r"beside class folders: d/loose\.JPG"):
        load("imagefolder", two)


def test_long_lists_are_cut(two: Path) -> None:
    for number in range(8):
        picture(two / f"{number}.png")
    with pytest.raises(UsageError, match=r"d/4\.png and 3 more"):
        load("imagefolder", two)


def test_suffixes_in_any_case_are_images(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.Png", "c.tIFF"):
        picture(tmp_path / name)
    assert len(load("imagefolder", tmp_path, num_classes=1)) == 3


def test_remarks_name_the_first_files(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        Image.new("RGBA", (8, 8), (9, 9, 9, 100)).save(two / "cat" / f"t{number}.png")
    with caplog.at_level(logging.WARNING):
        load("imagefolder", two)
    assert caplog.messages == [
        f"{two}: 3 file(s) with transparency, laid over white: cat/t0.png, cat/t1.png, cat/t2.png"
    ]


def test_absent_classes_are_told(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load("imagefolder", two, num_classes=5)
    assert "2 of data.num_classes=5 classes (the first without is 2)" in caplog.text
    with pytest.raises(UsageError, match=r"data\.num_classes=2"):
        load("imagefolder", two, num_classes=1)


@pytest.mark.parametrize("source", ["imagefolder", "latents", "idx", "mnist-torchvision"])
def test_a_path_of_another_kind_is_refused_in_one_sentence(tmp_path: Path, source: str) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    for path in (tmp_path / "samples.npz", tmp_path / "samples.npz" / "deeper"):
        with pytest.raises((UsageError, MissingResourceError), match=r"samples\.npz"):
            load(source, path)
    with pytest.raises(MissingResourceError, match="does not exist"):
        load(source, Path("~nobody-here/data"))


def test_a_folder_that_may_not_be_read_is_named(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(CheckpointError, match=r"cat cannot be read: Permission denied"):
        load("imagefolder", two)


def test_classes_are_in_the_order_of_their_names(two: Path) -> None:
    picture(two / "Zebra" / "b" / "a.png")
    found = find_images(two)
    assert found.classes == ["Zebra", "cat", "dog"]
    assert [label for _, label in found.items] == [0, 1, 2]


names = st.sampled_from(["a", "b.png", "c.JPEG", "n.txt", ".h.png", "__MACOSX", ".DS_Store"])


@settings(max_examples=300)
@given(st.lists(st.lists(names, min_size=1, max_size=3), min_size=1, max_size=8))
def test_every_file_is_read_or_told_or_the_folder_refused(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts in files:
        path = root.joinpath(*parts)
        if not path.exists() and not any(above.is_file() for above in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    everything = {path for path in root.rglob("*") if path.is_file() and path.name != ".DS_Store"}
    try:
        found = find_images(root)
    except (UsageError, MissingResourceError):
        return
    read = {file for file, _ in found.items}
    told = {path for left in found.left_out for path in (left, *left.rglob("*"))}
    assert everything == read | (told & everything)
    assert not read & told
    assert {file.suffix for file in read} <= {".png", ".JPEG"}
    classes = [file.relative_to(root).parts[0] for file, _ in found.items]
    labels = [label for _, label in found.items]
    if found.classes:
        assert [found.classes[label] for label in labels] == classes
        assert sorted(set(labels)) == list(range(len(found.classes)))


# latents


def shard(folder: Path, latents: torch.Tensor, labels: torch.Tensor, name: str = "a") -> Path:
    path = folder / f"{name}.safetensors"
    save_tensors(path, {"latents": latents, "labels": labels}, {})
    return path


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def load_latents(path: Path) -> ImageData:
    return load("latents", path, channels=4)


X, Y = noise(6, 4, 8, 8), torch.arange(6) % 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_that_are_not_finite_are_named(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    bad = X.clone().to(dtype)
    bad[3, 1, 2, 5] = value
    shard(tmp_path, X, Y, "a")
    shard(tmp_path, bad, Y, "b")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: 1 of 6 .*first is number 3"):
        load_latents(tmp_path)


def test_latents_beyond_float32_are_not_finite(tmp_path: Path) -> None:
    shard(tmp_path, X.double() * 1e300, Y)
    with pytest.raises(CheckpointError, match="not finite"):
        load_latents(tmp_path)


@pytest.mark.parametrize(
    "labels", [Y + 0.5, Y.float(), Y[:, None], Y[:5], Y.bool(), Y - 1, torch.tensor(1)]
)
def test_labels_must_be_whole_numbers_one_per_latent(tmp_path: Path, labels: torch.Tensor) -> None:
    shard(tmp_path, X, labels)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: labels must be whole"):
        load_latents(tmp_path)


@pytest.mark.parametrize("latents", [X[:0], X[0], X.flatten(1), (X * 9).to(torch.int32)])
def test_latents_must_be_a_batch_of_maps(tmp_path: Path, latents: torch.Tensor) -> None:
    shard(tmp_path, latents, Y[: len(latents)])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: latents must be floating-point"):
        load_latents(tmp_path)


def test_latents_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path, X[:, :, :4, :4], Y)
    with pytest.raises(UsageError, match=r"4x4 images, but data\.image_size is 8"):
        load_latents(tmp_path)
    shard(tmp_path, X, Y, "b")
    with pytest.raises(CheckpointError, match="different shapes"):
        load_latents(tmp_path)
    path.unlink()
    assert len(load_latents(tmp_path)) == 6
    with pytest.raises(UsageError, match="4 channel"):
        load("latents", tmp_path, channels=8)
    shard(tmp_path / "sub", X, Y)
    with pytest.raises(UsageError, match=r"subfolders: sub/a\.safetensors"):
        load_latents(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_labels_and_halves_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    shard(tmp_path, X.half(), Y.to(dtype))
    data = load_latents(tmp_path)
    assert torch.equal(data.images, X.half().float())
    assert torch.equal(data.labels, Y)


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, None), (0.6, None), (1 / 0.18215, "not multiplied by 0.18215"),
     (0.18215, "multiplied by 0.18215 twice"), (40.0, "about 1. Encode"), (0.0, "deviation of 0 ")],
)  # fmt: skip
def test_the_scale_of_latents_is_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float, said: str | None
) -> None:
    offset = 3 * torch.arange(4.0)[:, None, None]  # a mean per channel is not spread
    shard(tmp_path, X * factor + offset, Y)
    with caplog.at_level(logging.WARNING):
        load_latents(tmp_path)
    assert bool(caplog.messages) == (said is not None)
    assert said is None or said in caplog.text
    if factor > 2:
        assert f"deviation of {float(X.std()) * factor:.2g}" in caplog.text[:200]


# any bytes


def complaint(call: Callable[[], object]) -> str | None:
    """The message of the refusal; None without one."""
    try:
        call()
    except RobuqError as error:
        return str(error)
    return None


def sound_files() -> dict[str, bytes]:
    images, labels = b"\0\0\x08\x03\0\0\0\2\0\0\0\x08\0\0\0\x08", b"\0\0\x08\x01\0\0\0\2"
    plain = {
        "train-images-idx3-ubyte": images + bytes(128),
        "train-labels-idx1-ubyte": labels + b"\0\1",
    }
    return {name + ".gz": gzip.compress(content) for name, content in plain.items()} | plain


@settings(max_examples=60)
@given(st.data())
def test_any_idx_bytes_are_data_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("idx")
    suffix = data.draw(st.sampled_from(["", ".gz"]))
    sound = {k: v for k, v in sound_files().items() if k.endswith("ubyte" + suffix)}
    victim = data.draw(st.sampled_from(sorted(sound)))
    for name, content in sound.items():
        (folder / name).write_bytes(content)
    content = bytearray(sound[victim])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(0, 255))
    (folder / victim).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = complaint(lambda: load("idx", folder))
    assert said is None or any(part in said for part in (victim, "labels", "cannot pad"))


@settings(max_examples=60)
@given(st.data())
def test_any_shard_bytes_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With a right checksum, as of a file that was damaged before it was listed."""
    folder = tmp_path_factory.mktemp("latents")
    path = folder / "victim.safetensors"
    safetensors.torch.save_file({"latents": X, "labels": Y}, path)
    content = bytearray(path.read_bytes()[: data.draw(st.integers(0, 260))])
    if content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    (folder / "victim.safetensors.sha256").write_text(f"{sha256_file(path)}  {path.name}\n")
    with pytest.raises(RobuqError, match=r"victim\.safetensors"):
        load_latents(folder)
