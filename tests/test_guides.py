"""Python blocks of docs/your-own-model.md run as written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "your-own-model.md"
BLOCKS = re.findall(r"^ *```python\n(.*?)^ *```", GUIDE.read_text(encoding="utf-8"), re.S | re.M)


def test_the_guide_to_ones_own_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 2
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(textwrap.dedent(block), str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    shown = GUIDE.read_text(encoding="utf-8").splitlines()
    assert len(printed) == 7
    assert all(line.rstrip() in shown for line in printed[:3])
    assert names["model"]["blocks"][1].fc2.activation_bits == 4
