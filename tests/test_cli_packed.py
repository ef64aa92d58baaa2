"""`export` and `sample --packed`: from a run, a plan or nothing to one file and its images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

Bench = Any


def rows_of(output: str) -> dict[str, Any]:
    return {row["part"]: row for row in json.loads(output.splitlines()[-1])["table"]}


def test_a_plan_is_exported_and_sampled_on_every_backend(bench: Bench, tiny_workload: Path) -> None:
    on = ("--on", str(tiny_workload))
    code, out, err = bench("export", "a4", *on, "-o", "m.safetensors", "--json")
    assert code == 0, err
    rows = rows_of(out)
    assert rows["total"]["bytes"] == Path("m.safetensors").stat().st_size
    assert "without training" in err
    code, out, err = bench("packed", "m.safetensors", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["plan"], facts["storage"]) == ("a4", "base3/fp32/fp32")
    assert facts["mean_activation_bits"]["fc1"] == 4
    assert facts["table"][-1]["bytes"] == rows["total"]["bytes"]
    for backend in ("reference", "integer", "cpu", None):
        chosen = () if backend is None else ("--backend", backend)
        code, _, err = bench(
            "sample", *on, "--packed", "m.safetensors", *chosen,
            "--num", "4", "--png", f"{backend}.png",
        )  # fmt: skip
        assert code == 0, err
        assert "m.safetensors: plan a4 of " in err
        assert f"MB; backend {backend or 'cpu'}" in err
        assert Path(f"{backend}.png").read_bytes().startswith(b"\x89PNG")
    assert Path("None.png").read_bytes() == Path("cpu.png").read_bytes()


def test_a_finished_run_is_exported_with_its_allocation(
    bench: Bench, tiny_workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robuq_bench.inference import load_packed

    code, out, err = bench(
        "train-and-eval", "--plan", "a2", "--on", str(tiny_workload), "--json", "--quiet"
    )
    assert code == 0, err
    run = json.loads(out.splitlines()[-1])["run"]
    code, out, err = bench("export", run, "-o", "m.safetensors", "--storage", "2bit/fp16/fp16")
    assert code == 0, err
    assert "low-rank branch" in out
    assert "size_reduction" in out
    _, facts = load_packed(Path("m.safetensors"))
    assert facts["source"] == run
    records = [
        json.loads(line) for line in (Path("runs") / run / "results.jsonl").read_text().splitlines()
    ]
    bits = next(r["bits_by_layer"] for r in records if r["kind"] == "allocation")
    assert {name: facts["bits_by_layer"][name] for name in bits} == bits
    assert len(set(bits.values())) > 1, "AMPN must have chosen different bits"

    # Results that may only be read: what is written elsewhere needs no more.
    access = os.access

    def read_only(path: Any, mode: int, **options: Any) -> bool:
        writes = bool(mode & os.W_OK) and Path(path).name == "runs"
        return not writes and access(path, mode, **options)

    monkeypatch.setattr(os, "access", read_only)
    before = sorted(Path("runs").rglob("*"))
    sampling = ["sample", "--checkpoint", run, "--on", str(tiny_workload), "--num", "2"]
    assert bench(*sampling, "--png", "out/a.png")[0] == 0
    assert Path("out/a.png").is_file()
    assert bench("export", run, "-o", "out/m.safetensors", "--quiet")[0] == 0
    assert Path("out/m.safetensors").is_file()
    assert sorted(Path("runs").rglob("*")) == before
    code, out, err = bench(*sampling)  # into the results
    assert code == 2
    assert "cannot write to folder" in err


def test_random_weights_need_no_teacher(bench: Bench) -> None:
    arguments = (
        "export", "a2", "--on", "imagenet256", "--random-weights", "--quiet", "--json",
        "--set", "model.depth=1", "--set", "layers.block.branch.rank=16",
        "--storage", "base3/fp16/fp16",
    )  # fmt: skip
    code, out, err = bench(*arguments, "-o", "m.safetensors")
    assert code == 0, err
    assert rows_of(out)["ternary codes"]["bytes"] == 4777575 + 2  # 1.6 bits of 23,887,872 codes
    code, _, err = bench(*arguments, "-o", "m.safetensors")
    assert code == 2
    assert "m.safetensors exists; choose another -o, or --force" in err
    assert bench(*arguments, "-o", "m.safetensors", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["export", "a22"], 2, "'a22' is neither a run nor a plan; did you mean 'a2'?"),
        (["export", "fp"], 2, "plan 'fp' is full precision; there is nothing to pack"),
        (["export", "quarot-w4a4"], 2, "run `train-and-eval --plan quarot-w4a4` and export that"),
        (["export", "a2", "--on", "imagenet256"], 4, "has no teacher checkpoint"),
        (["export", "a2", "-o", "."], 2, ". is a folder; -o names the file to write"),
        (["export", "a2", "--storage", "base3"], 2, "'base3' is not CODES/LOW_RANK/REST"),
        (["sample", "--packed", "x", "--checkpoint", "a"], 2, "unknown run 'a'"),
        (["sample", "--backend", "integer"], 2, "--backend integer goes with --packed FILE"),
        (["sample", "--packed", "none.safetensors"], 4, "none.safetensors"),
    ],
)
def test_errors_say_what_to_do(
    bench: Bench, arguments: list[str], exit_code: int, message: str
) -> None:
    code, _, err = bench(*arguments)
    assert (code, message in err) == (exit_code, True), err
    assert not Path("model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!doctype html><html>", "a web page (HTML), not the weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (None, "is a folder; name the file"),
    ],
)
@pytest.mark.parametrize("command", [["packed"], ["sample", "--packed"]])
def test_what_is_no_packed_file_is_named(
    bench: Bench, tmp_path: Path, command: list[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "m.safetensors"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    code, _, err = bench(*command, str(path))
    assert (code, message in err.replace("\n", " ")) == (4, True), err


def test_a_plan_that_allocates_bits_says_that_it_has_none_yet(
    bench: Bench, tiny_workload: Path
) -> None:
    code, _, err = bench("export", "a2", "--on", str(tiny_workload))
    assert code == 0, err
    assert "every layer has the 4 bits it would start with" in " ".join(err.split())
    code, out, _ = bench("packed", "model.safetensors")
    assert code == 0
    assert "'qkv': 4.0" in out


@pytest.mark.parametrize("of", ["activation", "weight"])
def test_a_plan_whose_bits_are_in_a_file_is_converted_at_these(
    tiny_workload: Path, tmp_path: Path, of: str
) -> None:
    from robuq_bench.config import load_plan, resolve
    from robuq_bench.context import Context
    from robuq_bench.inference.exporting import convert
    from robuq_bench.models.checkpoints import load_teacher
    from robuq_bench.progress import Progress
    from robuq_bench.quantization.convert import quantized_layers

    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = [f"blocks.{i}.{kind}" for i in range(2) for kind in kinds]
    bits = {name: 3 + index % 4 for index, name in enumerate(names)}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    (tmp_path / "plan.toml").write_text(
        f'extends = "rtn-w4a4"\n[bits]\nof = "{of}"\npath = "{tmp_path / "bits.json"}"\n'
    )
    config = resolve("export", "1", load_plan(tmp_path / "plan.toml"), tiny_workload)
    model, _ = load_teacher(config.workload, "cpu")
    context = Context(device="cpu", threads=1, progress=Progress(quiet=True), argv=[])
    convert(model, config, context)
    layers = quantized_layers(model)
    found = {name: (layers[name].methods["weight"].bits, layers[name].activation_bits)
             for name in names}  # fmt: skip
    expected = {name: (4, b) if of == "activation" else (b, 4) for name, b in bits.items()}
    assert found == expected


def test_triton_without_its_interpreter_is_missing_hardware(
    bench: Bench, tiny_workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robuq_bench.inference.prepare.INTERPRETED", False)
    on = ("--on", str(tiny_workload))
    assert bench("export", "a4", *on, "-o", "m.safetensors")[0] == 0
    code, _, err = bench(
        "sample", *on, "--packed", "m.safetensors", "--backend", "triton", "--device", "cpu"
    )
    assert code == 4
    assert "set TRITON_INTERPRET=1 before Python starts" in err


def test_a_packed_model_of_another_workload_is_refused(bench: Bench, tiny_workload: Path) -> None:
    assert bench("export", "a4", "--on", str(tiny_workload), "-o", "m.safetensors")[0] == 0
    code, _, err = bench("sample", "--on", "mnist32", "--packed", "m.safetensors")
    assert code == 2
    assert "input_size 8, but workload 'mnist32' has 32; name its workload with --on" in err


def test_a_dry_run_writes_nothing(bench: Bench, tiny_workload: Path) -> None:
    code, out, _ = bench("export", "a4", "--on", str(tiny_workload), "--dry-run")
    assert code == 0
    assert "model.safetensors (new); --dry-run: nothing was written" in out
    assert list(Path().iterdir()) == []
