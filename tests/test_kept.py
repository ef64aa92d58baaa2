"""What is kept in the cache folder is read back whole, or made anew: never another's, nor half."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from robuq_bench import figure_cache, kept
from robuq_bench.figure_cache import drawn_once
from robuq_bench.figures import Picture
from robuq_bench.kept import code_digest, installed, keep, read_kept, warn_once


def test_a_text_is_read_back_until_its_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    assert read_kept(path) is None
    keep(path, "ä\r\n\nb\n")
    assert read_kept(path) == "ä\r\n\nb\n"
    path.unlink()
    assert read_kept(path) is None


@pytest.mark.parametrize("change", [b"", b"x", b"\xff", None])
def test_a_damaged_text_is_reported_and_not_read(
    tmp_path: Path, change: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text"
    keep(path, "content")
    path.write_bytes(path.read_bytes()[:-2] if change is None else change)
    assert read_kept(path) is None
    assert f"{path} " in caplog.text


def test_the_longest_unused_texts_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_FILES", 3)
    for place in range(3):
        keep(tmp_path / str(place), "x")
        os.utime(tmp_path / str(place), (place, place))
    assert read_kept(tmp_path / "0") == "x"  # used now, so not the oldest any more
    keep(tmp_path / "3", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_a_folder_that_cannot_be_written_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for name in ("a", "b"):
        keep(tmp_path / "file" / name, "x")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"nothing is kept in {tmp_path / 'file'} (" in caplog.text
    assert "set ROBUQ_CACHE" in caplog.text


def test_code_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("drawing")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "drawing", package)
    found = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "part.py").write_text(text)
        code_digest.cache_clear()
        found.append(code_digest("drawing"))
    assert found[0] != found[1]
    assert found[0] == found[2]
    monkeypatch.setattr(kept, "installed", lambda: "another seaborn")
    code_digest.cache_clear()
    assert code_digest("drawing") != found[0]
    code_digest.cache_clear()


def test_the_code_of_a_script_is_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = types.ModuleType("script")
    script.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "script", script)
    found: list[str] = []
    for name in ("script.py", "beside.py", "script.py"):
        (tmp_path / name).write_text(f"a = {len(found)}")
        code_digest.cache_clear()
        found.append(code_digest("script"))
    code_digest.cache_clear()
    assert found[0] == found[1] != found[2]


def test_any_library_that_is_added_or_changed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no line here imports, such as what lays out a figure."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for version in ("", "1.4", "1.5", "1.4"):
        metadata = tmp_path / "layout_solver-1.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        if version:  # at first there is a folder without metadata, as a broken install leaves
            metadata.write_text(f"Metadata-Version: 2.1\nName: layout-solver\nVersion: {version}\n")
        installed.cache_clear()
        found.append(installed())
    installed.cache_clear()
    assert len(set(found)) == 3
    assert found[1] == found[3]


def test_a_picture_is_drawn_once_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path))
    drawn: list[tuple[str, float]] = []

    @drawn_once
    def draw(name: str, value: float = 0.0) -> Picture:
        drawn.append((name, value))
        return Picture(f"<svg>{len(drawn)}</svg>", name)

    first = draw("a", 1.0)
    assert draw("a", 1.0) == first == Picture("<svg>1</svg>", "a")
    assert draw("b", 1.0).svg == "<svg>2</svg>"
    assert draw("a", 1.0 + 1e-15).svg == "<svg>3</svg>"
    assert len(drawn) == 3
    for file in (tmp_path / "figures").iterdir():
        file.write_text("damaged")
    assert draw("a", 1.0).svg == "<svg>4</svg>"
    monkeypatch.setattr(figure_cache, "code_digest", lambda package: "newer code")
    assert draw("a", 1.0).svg == "<svg>5</svg>"
    monkeypatch.setattr(figure_cache, "cache_folder", lambda: None)
    assert draw("a", 1.0).svg == "<svg>6</svg>"


@drawn_once
def _draw(name: str) -> Picture:
    return Picture(f"<svg>{name}</svg>", "drawn")


@pytest.fixture
def kept_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the picture `_draw("a")`, the only one in its folder."""
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path))
    warn_once.cache_clear()
    _draw("a")
    (file,) = (tmp_path / "figures").iterdir()
    return file


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "3", "{", "[" * 100_000, '{"svg": "<svg/>"}'),
        *('{"svg": 1, "alt": "a"}', '{"svg": "<svg/>", "alt": "a", "title": "b"}'),
    ],
)
def test_what_holds_no_picture_is_drawn_anew(
    kept_picture: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = kept_picture.read_bytes()
    keep(kept_picture, text)
    assert _draw("a") == Picture("<svg>a</svg>", "drawn")
    assert f"{kept_picture} holds no picture" in caplog.text
    assert kept_picture.read_bytes() == whole


def test_a_folder_in_the_place_of_a_picture_is_said_and_left(
    kept_picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_picture.unlink()
    kept_picture.mkdir()
    assert _draw("a") == Picture("<svg>a</svg>", "drawn")
    assert f"{kept_picture} cannot be read" in caplog.text
    assert "nothing is kept in" in caplog.text
    assert list(kept_picture.parent.iterdir()) == [kept_picture]


def test_a_cache_folder_that_cannot_be_made_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "file"))
    warn_once.cache_clear()
    for name in "ab":
        assert _draw(name).svg == f"<svg>{name}</svg>"
    assert caplog.text.count("nothing is kept in") == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind no root")
def test_a_file_and_a_folder_that_are_another_users_are_said(
    kept_picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_picture.chmod(0)
    kept_picture.parent.chmod(0o555)
    try:
        assert _draw("a").svg == "<svg>a</svg>"
    finally:
        kept_picture.parent.chmod(0o755)
    assert f"{kept_picture} cannot be read" in caplog.text
    assert "nothing is kept in" in caplog.text


def test_code_that_cannot_be_identified_is_said_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = types.ModuleType("drawing")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "drawing", package)
    monkeypatch.setenv("ROBUQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / ".#part.py").symlink_to("user@host")  # as Emacs locks a file that is edited

    def draw() -> Picture:
        return Picture("<svg/>", "drawn")

    draw.__module__ = "drawing"
    assert drawn_once(draw)() == Picture("<svg/>", "drawn")
    assert "cannot be identified" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_processes_share_pictures_and_draw_the_same(tmp_path: Path) -> None:
    """Several at once, of which each may read what another has just written."""
    program = (
        "import pandas as pd; from robuq_bench.figure_cache import heat_panel\n"
        "frame = pd.DataFrame({'a': [1.0, 2.0], 'b': [3.0, 4.0]}, index=['x', 'y'])\n"
        "for name in 'pqr': print(heat_panel(name, 'alt', '', frame, [0, 2, 4], 'v', True).svg)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "ROBUQ_CACHE": str(tmp_path), "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    texts = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (text,) = texts
    assert text.count("</svg>") == 3
    assert len([*(tmp_path / "figures").iterdir()]) == 3
