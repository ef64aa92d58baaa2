"""`export`, `packed` and `sample` of a calibrated run without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Bench = Any


def test_a_calibrated_run_is_exported_and_sampled(bench: Bench, tiny_workload: Path) -> None:
    on = ("--on", str(tiny_workload))
    code, out, err = bench("train-and-eval", "--plan", "quarot-w4a4", *on, "--json", "--quiet")
    assert code == 0, err
    run = json.loads(out.splitlines()[-1])["run"]
    code, out, err = bench("export", run, "-o", "m.safetensors", "--json", "--quiet")
    assert code == 0, err
    rows = {row["part"]: row for row in json.loads(out.splitlines()[-1])["table"]}
    assert rows["uniform codes"]["bytes"] > rows["scales"]["bytes"] > 0
    code, out, err = bench("packed", "m.safetensors", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["plan"], facts["source"]) == ("quarot-w4a4", run)
    assert facts["mean_weight_bits"]["fc1"] == facts["mean_activation_bits"]["fc1"] == 4
    for name, model in (("run", ("--checkpoint", run)), ("file", ("--packed", "m.safetensors"))):
        code, _, err = bench("sample", *on, *model, "--num", "4", "--png", f"{name}.png", "--quiet")
        assert code == 0, err
    assert Path("run.png").read_bytes() == Path("file.png").read_bytes()
    code, _, err = bench(
        "sample", *on, "--packed", "m.safetensors", "--backend", "integer", "--quiet",
        "--png", "integer.png",
    )  # fmt: skip
    assert code == 2
    assert "activation method 'rtn'" in err
