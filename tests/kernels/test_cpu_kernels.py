"""The compiled CPU kernels together: instruction sets, threads, tracing, misuse, the library."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import GRIDS, available, force, operands, rotation_of, signs_of, tokens
from torch import Tensor

from kernels import build, cpu_library
from kernels.hadamard_quantize import cpu as quantizing
from kernels.hadamard_quantize.reference import Modulation, Rotation
from kernels.launch import KernelInputError
from kernels.peak import integer_operations
from kernels.ternary_matmul import cpu as product

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("library")


def test_the_whole_machine_is_tested() -> None:
    """Where /proc says what the CPU has, the kernels see it too."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo")
    flags = cpuinfo.read_text("utf-8").split()
    assert ("avx2" in available()) == ({"avx2", "fma"} <= set(flags))
    assert ("avx512-vnni" in available()) == ({"avx512_vnni", "avx512bw", "avx512vl"} <= set(flags))


def both_kernels(threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quantized = quantizing.hadamard_quantize(
            tokens(100, 144),
            GRIDS["mid-tread"],
            rotation=rotation_of(144),
            down=torch.ones(3, 144),
        )
        codes, planes, rest = operands(300, 200, 144, rank=3, bias=True, gelu=True)
        y = product.ternary_matmul(codes, planes, **rest)
    finally:
        torch.set_num_threads(before)
    return [y, *(tensor for tensor in quantized if tensor is not None)]


def test_openmp_is_torch_s() -> None:
    """Another OpenMP in the process would have threads of its own, that wait on the same cores."""
    if not cpu_library.load().robuq_has_openmp():
        pytest.skip("built without OpenMP")
    address = [
        ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p).value
        for library in (cpu_library.load(), ctypes.CDLL(torch._C.__file__))
    ]
    assert address[0] == address[1]


def test_any_number_of_threads_gives_the_same_bits(instructions: str) -> None:
    alone = both_kernels(1)
    for threads in (2, 3):
        for have, want in zip(both_kernels(threads), alone, strict=True):
            assert torch.equal(have, want)


def test_instruction_sets_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, modulation = tokens(33, 1152), Modulation(torch.randn(3, 1152), torch.randn(3, 1152), 11)
    results = []
    for name in available():
        force(name, monkeypatch)
        quantized = quantizing.hadamard_quantize(
            x, GRIDS["mid-tread"], rotation=rotation_of(1152), modulation=modulation
        )
        codes, planes, rest = operands(33, 70, 1152, bias=True, gelu=True, per_image=11)
        y = product.ternary_matmul(codes, planes, **rest)
        results.append([y, *quantized[:4]])
    for result in results[1:]:
        for have, want in zip(result, results[0], strict=True):
            assert torch.equal(have, want)


@pytest.mark.unsanitized
def test_compiles_into_one_graph() -> None:
    _, planes, rest = operands(8, 40, 144, bias=True)
    rotation, grid = rotation_of(144), GRIDS["mid-tread"]

    def layer(x: Tensor) -> Tensor:
        tokens = quantizing.hadamard_quantize(x, grid, rotation=rotation)
        vectors = {
            "token_scale": tokens.scale,
            "token_offset": tokens.offset,
            "code_sums": tokens.code_sums,
        }
        return product.ternary_matmul(tokens.codes, planes, **rest | vectors) * 2

    x = tokens(8, 144)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_operators_are_what_torch_takes_them_for() -> None:
    codes, planes, rest = operands(8, 40, 144, rank=2)
    names = ("token_scale", "token_offset", "code_sums", "channel_scale", "weight_sums")
    vectors = [rest[name] for name in names]
    arguments = (codes, planes, *vectors, None, rest["branch"], rest["up"], True, None, None, 1)
    checks = ("test_schema", "test_faketensor")
    passed = dict.fromkeys(checks, "SUCCESS")
    assert torch.library.opcheck(product._operator, arguments, test_utils=checks) == passed
    x = tokens(4, 36)
    tail = (None, torch.ones(2, 36), 1, 0.0, 0, 0.4, 0.0, -8, 7, False)
    found = torch.library.opcheck(
        quantizing._operator, (x, None, None, signs_of(36), *tail), test_utils=checks
    )
    assert found == passed


def test_misuse_is_refused() -> None:
    codes, planes, rest = operands(4, 40, 144)
    with pytest.raises(KernelInputError, match=r"planes must be \[any, 64\], got \[40, 32\]"):
        product.ternary_matmul(codes, planes[:, :32].contiguous(), **rest)
    with pytest.raises(KernelInputError, match="codes must be contiguous"):
        product.ternary_matmul(codes.T.contiguous().T, planes, **rest)
    with pytest.raises(KernelInputError, match="codes is on meta"):
        product.ternary_matmul(codes.to("meta"), planes, **rest)
    x, grid = tokens(4, 144), GRIDS["mid-tread"]
    with pytest.raises(KernelInputError, match="x must not be float64"):
        quantizing.hadamard_quantize(x.double(), grid, rotation=None)
    with pytest.raises(KernelInputError, match="x is on meta"):
        quantizing.hadamard_quantize(x.to("meta"), grid, rotation=None)
    with pytest.raises(KernelInputError, match="of order K = 144"):
        quantizing.hadamard_quantize(x, grid, rotation=rotation_of(72))
    with pytest.raises(KernelInputError, match="must hold 1 and -1 only"):
        quantizing.hadamard_quantize(x, grid, rotation=Rotation(torch.zeros(36, 36), 4))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.SET_VARIABLE, "sse9")
    with pytest.raises(cpu_library.MissingKernels, match=r"ROBUQ_CPU_INSTRUCTIONS=sse9: this CPU"):
        cpu_library.instruction_set()


def test_no_library_and_a_library_that_is_none(tmp_path: Path) -> None:
    code = "from kernels import cpu_library; cpu_library.load()"
    result = run(code, ROBUQ_CPU_KERNELS=str(tmp_path / "absent.so"))
    assert "MissingKernels" in result.stderr
    assert "absent.so" in result.stderr
    assert "run python -m kernels.build" in result.stderr
    code = (
        "from robuq_bench.runs.provenance import environment_report\n"
        "print(environment_report()['can_run']['CPU kernels'])\n"
    )
    result = run(code, ROBUQ_CPU_KERNELS=str(tmp_path / "absent.so"))
    assert result.stdout.startswith("{'available': False, 'why': 'the CPU kernels in ")
    assert "'available': True" in run(code).stdout


@pytest.mark.unsanitized
def test_build_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: install g\+\+"):
        build.build(tmp_path / "_cpu.so")
    monkeypatch.setenv("CXX", "nothing")
    with pytest.raises(build.BuildError, match="'nothing', named by CXX, is not on PATH"):
        build.build(tmp_path / "_cpu.so")


@pytest.mark.unsanitized
def test_build_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="it is broken"):
        build.build(tmp_path / "_cpu.so")
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@pytest.mark.parametrize("name", cpu_library.INSTRUCTION_SETS)
def test_the_peak_counts_the_operations_of_every_thread(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(name, monkeypatch)
    multiply_accumulates = {"portable": 12 * 8, "avx2": 12 * 32, "avx512-vnni": 12 * 64,
                            "amx-int8": 4 * 16 * 16 * 64}  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = integer_operations(1000)
    finally:
        torch.set_num_threads(before)
    threads = 2 if cpu_library.load().robuq_has_openmp() else 1
    assert found == threads * 1000 * 2 * multiply_accumulates[name]
