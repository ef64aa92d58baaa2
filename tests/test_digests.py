"""Digests of files and folders: every byte counts, and what is remembered is never stale."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.runs import digests
from robuq_bench.runs.digests import files_digest, path_digest, refuse_change, require_digest, walk


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every digest is remembered at once; returns the files that are read."""
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(digests, "SETTLED_S", -60.0)
    read: list[Path] = []
    sha256 = digests.sha256_file

    def counting(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(digests, "sha256_file", counting)
    return read


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_file_has_the_digest_of_sha256sum_and_a_folder_that_of_its_listing(
    tmp_path: Path,
) -> None:
    folder = make(tmp_path / "d", b="2", a="1")
    sha = {text: hashlib.sha256(text.encode()).hexdigest() for text in "12"}
    assert path_digest(folder / "a") == sha["1"]
    listing = f"{sha['1']}  a\n{sha['2']}  b\n"
    assert path_digest(folder) == hashlib.sha256(listing.encode()).hexdigest()


@given(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=4), min_size=1), st.data())
def test_names_and_bytes_decide_and_order_and_place_do_not(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    def write(contents: dict[str, bytes]) -> list[tuple[str, Path]]:
        folder = tmp_path_factory.mktemp("d")
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return [(name, folder / name) for name in contents]

    digest = files_digest(write(files))
    assert files_digest(reversed(write(files))) == digest
    name = data.draw(st.sampled_from(sorted(files)))
    assert files_digest(write({**files, name: files[name] + b"x"})) != digest
    renamed = {("g" if key == name else key): value for key, value in files.items()}
    assert files_digest(write(renamed)) != digest


def test_a_large_input_is_read_once(tmp_path: Path, remembering: list[Path]) -> None:
    folder = make(tmp_path / "d", a="1", b="2")
    first = path_digest(folder)
    assert len(remembering) == 2
    assert path_digest(folder) == first
    assert len(remembering) == 2
    assert path_digest(make(tmp_path / "e", a="1", b="2")) == first
    assert len(remembering) == 4


@pytest.mark.parametrize("how", ["in place", "replaced", "linked", "renamed"])
def test_a_change_that_keeps_size_and_time_is_seen(
    tmp_path: Path, remembering: list[Path], how: str
) -> None:
    folder = make(tmp_path / "d", a="1", b="2")
    other = make(tmp_path / "e", a="3", b="2")
    before, stat = path_digest(folder), (folder / "a").stat()
    if how == "in place":
        (folder / "a").write_text("3")
    elif how == "replaced":
        os.replace(other / "a", folder / "a")
    elif how == "linked":
        (folder / "a").unlink()
        (folder / "a").symlink_to(other / "a")
    else:
        (folder / "a").rename(folder / "c")
        stat = None
    if stat is not None:
        os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path_digest(folder) != before


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, remembering: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 10.0)
    folder = make(tmp_path / "d", a="1")
    assert path_digest(folder) == path_digest(folder)
    assert len(remembering) == 2


@pytest.mark.parametrize("damage", ["", "nonsense", "0" * 64, f"{'0' * 64}  {'1' * 64}"])
def test_a_damaged_memory_is_not_believed(
    tmp_path: Path, remembering: list[Path], damage: str
) -> None:
    folder = make(tmp_path / "d", a="1")
    digest = path_digest(folder)
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    entry.write_text(damage)
    assert path_digest(folder) == digest


def test_without_a_cache_it_is_read_again(
    tmp_path: Path,
    remembering: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make(tmp_path / "d", a="1")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert path_digest(folder) == path_digest(folder)
    assert "not remembered" in caplog.text
    monkeypatch.delenv("ROBUQ_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home
    assert path_digest(folder)
    assert len(remembering) == 3


def test_links_are_followed_and_what_is_hidden_is_told(tmp_path: Path) -> None:
    store = make(tmp_path / "store", b="2")
    folder = make(tmp_path / "d", a="1")
    (folder / "more").symlink_to(store)
    (folder / ".hidden").write_text("")
    os.mkfifo(folder / "pipe")
    hidden: list[Path] = []
    names = [file.relative_to(folder).as_posix() for file in walk(folder, hidden=hidden)]
    assert names == ["a", "more/b"]
    assert [path.name for path in hidden] == [".hidden", "pipe"]


def test_cycles_and_dead_links_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", a="1")
    (folder / "again").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"d/again/d.*remove the link"):
        list(walk(folder))
    (folder / "again").unlink()
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingResourceError, match=r"d/gone is a link to .*nowhere"):
        path_digest(folder)
    (folder / "gone").unlink()
    (folder / "self").symlink_to(folder / "self")
    with pytest.raises(MissingResourceError, match="d/self is a link"):
        path_digest(folder)
    with pytest.raises(CheckpointError, match="nowhere cannot be read"):
        path_digest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere cannot be read"):
        list(walk(tmp_path / "nowhere"))


def test_an_input_is_checked_against_what_was_planned(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", a="1")
    require_digest(folder, None, "data")
    require_digest(folder, path_digest(folder), "data")
    for expected, reason in (("0" * 64, "had SHA-256 0000"), ("", "was not readable")):
        with pytest.raises(CheckpointError, match=f"data .*changed.*{reason}"):
            require_digest(folder, expected, "data")
        with pytest.raises(CheckpointError, match="Start the run again"):
            refuse_change("1" * 64, expected, "data")
