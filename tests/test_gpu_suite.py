"""The GPU suite without a GPU: pieces are small commands, the device is a name."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from robuq_bench.errors import CheckpointError
from robuq_bench.measuring import gpu_suite
from robuq_bench.measuring.gpu_suite import Piece, load_state, main, pieces

COUNT = "from pathlib import Path; p = Path('n'); n = int(p.read_text()) + 1 if p.exists() else 1; "


def counting(then: str = "") -> tuple[str, str]:
    """Command that adds one to the file `n` in its folder, then does `then`."""
    return ("-c", COUNT + f"p.write_text(str(n)); {then}")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "cuda_device_name", lambda: "Test GPU")


def state_of(root: Path, name: str) -> dict[str, object]:
    return load_state(root / "runs" / "gpu" / "state.json")[name]


def test_pieces_are_well_formed() -> None:
    names = [piece.name for piece in pieces()]
    assert len(set(names)) == len(names)
    for index, piece in enumerate(pieces()):
        assert set(piece.needs) <= set(names[:index]), "a piece must come after what it needs"
    assert gpu_suite.TIME_LIMIT_S + gpu_suite.GRACE_S < 600


def test_without_cuda_it_exits_4_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([], offered=[Piece("a", "a", counting())], root=tmp_path) == 4
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing may run or be written"


def test_list_needs_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"], root=tmp_path) == 0
    out = capsys.readouterr().out
    assert all(piece.name in out for piece in pieces())


def test_unknown_piece_exits_2_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--piece", "step-tim"]) == 2
    assert "did you mean 'step-time'?" in capsys.readouterr().err


@pytest.mark.usefixtures("on_gpu")
def test_finished_pieces_are_skipped(tmp_path: Path) -> None:
    offered = [Piece("a", "a", counting())]
    assert main([], offered=offered, root=tmp_path) == 0
    assert main([], offered=offered, root=tmp_path) == 0
    assert (tmp_path / "n").read_text() == "1"
    assert main(["--force"], offered=offered, root=tmp_path) == 0
    assert (tmp_path / "n").read_text() == "2"


@pytest.mark.usefixtures("on_gpu")
def test_another_command_or_device_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([], offered=[Piece("a", "a", counting())], root=tmp_path) == 0
    assert main([], offered=[Piece("a", "a", counting("pass"))], root=tmp_path) == 0
    assert (tmp_path / "n").read_text() == "2"
    monkeypatch.setattr(gpu_suite, "cuda_device_name", lambda: "Other GPU")
    assert main([], offered=[Piece("a", "a", counting("pass"))], root=tmp_path) == 0
    assert (tmp_path / "n").read_text() == "3"
    assert state_of(tmp_path, "a")["device"] == "Other GPU"


@pytest.mark.usefixtures("on_gpu")
def test_time_limit_interrupts_and_a_resumable_piece_goes_on(tmp_path: Path) -> None:
    slow_once = counting("import time; time.sleep(60 if n == 1 else 0)")
    started = time.monotonic()
    offered = [Piece("train", "t", slow_once, resumable=True)]
    assert main(["--time-limit-s", "1"], offered=offered, root=tmp_path) == 0
    assert time.monotonic() - started < 50  # of the 60 that it would sleep
    assert (tmp_path / "n").read_text() == "2"
    assert state_of(tmp_path, "train")["status"] == "done"


@pytest.mark.usefixtures("on_gpu")
def test_named_piece_runs_one_chunk_and_reports_it_unfinished(tmp_path: Path) -> None:
    slow = Piece("train", "t", ("-c", "import time; time.sleep(60)"), resumable=True)
    argv = ["--piece", "train", "--time-limit-s", "0.5"]
    assert main(argv, offered=[slow], root=tmp_path) == 1
    record = state_of(tmp_path, "train")
    assert (record["status"], record["exit_code"]) == ("time limit", None)


@pytest.mark.usefixtures("on_gpu")
def test_a_failure_stops_what_needs_it_but_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offered = [
        Piece("teacher", "t", ("-c", "raise SystemExit(1)")),
        Piece("plan", "p", counting(), needs=("teacher",)),
        Piece("other", "o", counting()),
    ]
    assert main([], offered=offered, root=tmp_path) == 1
    assert "plan: not run, needs teacher" in capsys.readouterr().out
    assert (tmp_path / "n").read_text() == "1"


@pytest.mark.usefixtures("on_gpu")
def test_missing_data_exits_4(tmp_path: Path) -> None:
    offered = [Piece("a", "a", ("-c", "raise SystemExit(4)"))]
    assert main([], offered=offered, root=tmp_path) == 4


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_state(path)


@pytest.mark.usefixtures("on_gpu")
def test_state_is_json_with_command_and_duration(tmp_path: Path) -> None:
    piece = Piece("a", "a", counting())
    assert main([], offered=[piece], root=tmp_path) == 0
    record = json.loads((tmp_path / "runs" / "gpu" / "state.json").read_text())["a"]
    assert record["command"] == list(piece.command)
    assert 0 <= record["seconds"] < 30


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_suite_that_is_asked_to_end_lets_its_piece_save(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    save = (
        "import time, pathlib\ntry:\n    pathlib.Path('begun').touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path('saved').touch()\n"
    )

    def ask() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    assert main([], offered=[Piece("train", "t", ("-c", save))], root=tmp_path) == code
    asking.join()
    assert (tmp_path / "saved").exists()
