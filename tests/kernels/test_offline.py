"""Every kernel compiles for sm_90 without a GPU, and the machine code is what was designed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.offline import OPERATIONS, Compiled, Specialisation, main, specialisations

ROOT = Path(__file__).resolve().parents[2]
#: Instructions of the main loop, per 128 x 128 x 128 products (the dense int8 loop has about 100).
TILE_LOOP = 160
BUDGET_FILE = Path(__file__).with_name("offline_budgets.json")
BUDGETS = json.loads(BUDGET_FILE.read_text())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def compiled(kept: Path) -> dict[str, list[dict[str, Any]]]:
    """What every specialisation became, by operation; one interpreter imports torch for all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.offline", "--json", "--keep", str(kept)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    return {
        operation: [row for row in rows if row["name"].startswith(f"{operation}/")]
        for operation in OPERATIONS
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_compile_for_hopper_without_spills(
    compiled: dict[str, list[dict[str, Any]]], operation: str
) -> None:
    rows = compiled[operation]
    assert len(rows) >= 3
    for row in rows:
        if row["name"] not in BUDGETS["spill_bytes"]:
            assert row["spill_bytes"] == 0, row["name"]
            assert not {"LDL", "STL"} & set(row["opcodes"]), row["name"]
        assert row["registers"] <= 255
        assert row["shared_bytes"] <= 227 * 1024, f"{row['name']} does not fit a multiprocessor"
        assert (row["tensor_core_instructions"] > 0) >= row["tensor_cores"], row["name"]
        assert row["instructions"] > 20


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_stay_within_their_budgets(
    compiled: dict[str, list[dict[str, Any]]], operation: str
) -> None:
    rows = compiled[operation]
    if not rows[0]["triton"].startswith(BUDGETS["triton"] + "."):
        pytest.skip(f"budgets are of Triton {BUDGETS['triton']}, this is {rows[0]['triton']}")
    over = []
    for row in rows:
        for budgets, value in (
            (BUDGETS["instructions_per_element"], row["instructions_per_element"]),
            (BUDGETS["spill_bytes"], row["spill_bytes"]),
        ):
            if value > budgets.get(row["name"], 0):
                over.append(f"{row['name']}: {value:.2f}, budget {budgets.get(row['name'], 0)}")
    assert not over, (
        "\n".join(["instructions per element, or bytes spilled, are above the budget:", *over])
        + "\nRead the machine code before and after: python -m kernels.offline --keep FOLDER NAME; "
        f"if it is worth it, raise the budget in {BUDGET_FILE.relative_to(ROOT)}"
    )


def test_every_specialisation_has_a_budget() -> None:
    assert {spec.name for spec in specialisations()} == set(BUDGETS["instructions_per_element"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_model_of_time_by_hand(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """Of the unpacking, whose machine code has no loop and whose work is plain."""
    (row,) = [row for row in compiled["ternary_matmul"] if row["name"].endswith("/unpack")]
    packed = 1152 * 4608 // 4
    assert row["bytes_moved"] == 5 * packed
    assert row["memory_us"] == pytest.approx(5 * packed / 3.35e6)
    warps = 4 * packed / 4096
    assert row["issue_us"] == pytest.approx(row["instructions"] * warps / (132 * 4 * 1700))
    assert row["instructions_per_element"] == pytest.approx(
        row["instructions"] * warps * 32 / (4 * packed)
    )
    assert (row["limit"], row["least_us"]) == ("memory", row["memory_us"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_low_rank_branch_is_cheap_to_project(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """What made the step slower than bf16: 204 and 935 us, by the same count."""
    least = {row["name"]: row["least_us"] for row in compiled["hadamard_quantize"]}
    assert least["hadamard_quantize/LN modulate 1152 rank 16"] <= 70
    assert least["hadamard_quantize/4608 rank 16"] <= 190


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_packed_weight_costs_few_instructions_in_the_loop(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """Register-A integer WGMMA, and a loop hardly longer than that of dense int8."""
    tiles = [
        row for row in compiled["ternary_matmul"] if row["name"].startswith("ternary_matmul/tile")
    ]
    assert tiles
    for row in tiles:
        assert row["opcodes"].get("IGMMA", 0) > 0, row["name"]
    large = [row for row in tiles if row["name"].endswith("128x128x128")]
    assert large
    assert max(row["loop_instructions"] for row in large) <= TILE_LOOP


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_attention_moves_no_probability_between_threads(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """Both products on the integer tensor core, and what feeds the second stays where it is."""
    rows = [r for r in compiled["quantized_attention"] if "/attention" in r["name"]]
    assert rows
    for row in rows:
        assert row["opcodes"].get("IGMMA", 0) >= 4, row["name"]
        # Maxima and sums over the four threads of a row; a shuffle a word would add 16 to 32.
        assert row["opcodes"].get("SHFL", 0) <= 28, row["name"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_machine_code_is_kept(compiled: dict[str, list[dict[str, Any]]], kept: Path) -> None:
    assert {path.name for path in kept.glob("ternary_matmul-unpack.*")} == {
        f"ternary_matmul-unpack.{kind}" for kind in ("ttgir", "ptx", "sass")
    }
    assert all(path.stat().st_size for path in kept.iterdir())
    assert len(list(kept.iterdir())) == 3 * sum(len(rows) for rows in compiled.values())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_names_choose_what_is_compiled_and_tabled(
    compiled: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {row["name"]: Compiled(**row) for rows in compiled.values() for row in rows}
    asked = []

    def compile_offline(spec: Specialisation, keep: Path | None) -> Compiled:
        asked.append((spec.name, keep))
        return rows[spec.name]

    monkeypatch.setattr("kernels.offline.INTERPRETED", False)
    monkeypatch.setattr("kernels.offline.compile_offline", compile_offline)
    assert main(["--keep", str(tmp_path), "ternary_matmul/unpack"]) == 0
    assert asked == [("ternary_matmul/unpack", tmp_path)]
    head, line = capsys.readouterr().out.splitlines()
    assert "modelled, not measured" in head
    assert line.startswith("ternary_matmul/unpack ")


def test_what_cannot_be_compiled_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.offline.INTERPRETED", True)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr("kernels.offline.INTERPRETED", False)
    with pytest.raises(SystemExit, match="2"):
        main(["ternary_matmull"])
    assert "operations: hadamard_quantize, ternary_matmul" in capsys.readouterr().err


@pytest.mark.parametrize("spec", specialisations(), ids=lambda spec: spec.name)
def test_a_specialisation_covers_its_arguments(spec: Specialisation) -> None:
    assert set(spec.kernel.arg_names) <= set(spec.signature) | set(spec.constants)
