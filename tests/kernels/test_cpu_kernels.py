"""The compiled CPU kernels against their references, on every instruction set of this machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import build, cpu_library
from kernels.hadamard_quantize import cpu as quantizing
from kernels.hadamard_quantize import reference as quantizing_reference
from kernels.hadamard_quantize.reference import (
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
)
from kernels.launch import KernelInputError
from kernels.ternary_matmul import cpu as product
from kernels.ternary_matmul import reference as product_reference
from kernels.ternary_matmul.layout import pack_planes
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix

ROOT = Path(__file__).resolve().parents[2]
SETS = cpu_library.INSTRUCTION_SETS
WIDTHS = (144, 384, 576, 768, 1152, 3456, 4608)
MISMATCH = 1e-3
"""Share of codes that may differ, by one: those nearer to the next code than sums are accurate."""

GRIDS = {
    "mid-tread": Grid("mean-mad", 0.42, -8, 7),
    "mid-rise": Grid("mean-mad", 1.25, -2, 1, floor=True),
    "one bit": Grid("mean-mad", 2.0, -1, 0, floor=True),
    "min-max": Grid("min-max", 1 / 255, -128, 127),
    "absmax": Grid("absmax", 1 / 127, -128, 127, epsilon=1e-5),
    "absmean": Grid("absmean", 1 / math.sqrt(7), -8, 7, epsilon=1e-5),
}


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The checkout's library or one built now, which takes ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            cpu_library.load()
        except cpu_library.MissingKernels as missing:
            if os.environ.get(cpu_library.PATH_VARIABLE) or build.compiler() is None:
                pytest.skip(str(missing))
            target = build.build(tmp_path_factory.mktemp("library") / "_cpu.so")
            patch.setenv(cpu_library.PATH_VARIABLE, str(target))
        yield


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(request.param, monkeypatch)
    return str(request.param)


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in available():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv(cpu_library.SET_VARIABLE, name)


def available() -> tuple[str, ...]:
    return SETS[: cpu_library.best_instruction_set() + 1]


def operands(
    rows: int, outputs: int, width: int, *, seed: int = 0, **epilogue: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Codes over the whole int8 range; `epilogue` says what to add: rank, gelu, per_image."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    codes = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    codes[: rows // 2] = -128  # sums as large as they get
    weight = torch.randint(-1, 2, (outputs, width), generator=generator, dtype=torch.int8)
    weight[: outputs // 2] = 1
    rest: dict[str, Any] = {
        "token_scale": normal(rows).abs() / width**0.5 / 64,
        "token_offset": normal(rows) / width**0.5,
        "code_sums": codes.sum(-1, dtype=torch.int32),
        "channel_scale": normal(outputs).abs() + 0.1,
        "weight_sums": weight.sum(-1, dtype=torch.int32),
        "out_dtype": torch.float32,
    }
    if rank := epilogue.get("rank", 0):
        rest |= {"branch": normal(rows, rank), "up": normal(outputs, rank) / 4}
    if epilogue.get("bias"):
        rest["bias"] = normal(outputs)
    if per_image := epilogue.get("per_image", 0):
        rest |= {
            "gate": normal(rows // per_image, outputs),
            "residual": normal(rows, outputs),
            "tokens_per_image": per_image,
        }
    rest["gelu"] = epilogue.get("gelu", False)
    return codes, pack_planes(weight), rest


def test_the_whole_machine_is_tested() -> None:
    """Where /proc says what the CPU has, the kernels see it too."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo")
    flags = cpuinfo.read_text("utf-8").split()
    assert ("avx2" in available()) == ({"avx2", "fma"} <= set(flags))
    assert ("avx512-vnni" in available()) == ({"avx512_vnni", "avx512bw", "avx512vl"} <= set(flags))


# --- ternary_matmul


@pytest.mark.parametrize("width", [1, 3, 127, 129, 577, *WIDTHS])
def test_product_is_exact(width: int, instructions: str) -> None:
    codes, planes, rest = operands(37, 75, width, bias=True, per_image=37)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    assert torch.equal(product.ternary_matmul(codes, planes, **rest), want)


@pytest.mark.parametrize("rows", [0, 1, 11, 12, 13, 31, 32, 33, 64, 100, 500])
def test_product_of_any_rows(rows: int, instructions: str) -> None:
    codes, planes, rest = operands(rows, 33, 130, seed=rows)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    assert torch.equal(product.ternary_matmul(codes, planes, **rest), want)


@pytest.mark.parametrize(
    "epilogue",
    [
        {"rank": 16, "bias": True},
        {"rank": 5},
        {"gelu": True},
        {"rank": 32, "bias": True, "gelu": True, "per_image": 8},
    ],
)
def test_epilogue(epilogue: dict[str, Any], instructions: str) -> None:
    codes, planes, rest = operands(40, 75, 384, **epilogue)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    got = product.ternary_matmul(codes, planes, **rest)
    size = float(want.square().mean().sqrt())
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * size)


def test_gelu_is_the_one_of_torch(instructions: str) -> None:
    """Over all of its range, through a product whose results are the bias."""
    x = torch.linspace(-30, 30, 6001)
    codes, planes, rest = operands(1, len(x), 4)
    rest |= {"token_scale": torch.zeros(1), "token_offset": torch.zeros(1)}
    got = product.ternary_matmul(codes, planes, **rest | {"bias": x, "gelu": True})[0]
    want = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands(dtype: torch.dtype) -> None:
    codes, planes, rest = operands(24, 40, 144, rank=8, bias=True, per_image=6)
    for name in ("bias", "branch", "up", "gate", "residual"):
        rest[name] = rest[name].to(dtype)
    rest["out_dtype"] = dtype
    want = product_reference.ternary_matmul(codes, planes, **rest)
    got = product.ternary_matmul(codes, planes, **rest)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 70),
    width=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape_agree(
    rows: int, outputs: int, width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, planes, rest = operands(rows, outputs, width, seed=seed)
    want = product_reference.ternary_matmul(codes, planes, **rest)
    for name in available():
        force(name, monkeypatch)
        assert torch.equal(product.ternary_matmul(codes, planes, **rest), want), name


def test_grouped_product_is_layer_by_layer() -> None:
    layers = [operands(3, 40, 144, seed=seed, rank=4, bias=True) for seed in range(3)]
    names = [name for name in layers[0][2] if name not in ("out_dtype", "gelu")]
    stacked = {name: torch.stack([rest[name] for _, _, rest in layers]) for name in names}
    got = product.grouped_ternary_matmul(
        torch.stack([codes for codes, _, _ in layers]),
        torch.stack([planes for _, planes, _ in layers]),
        out_dtype=torch.float32,
        **stacked,
    )
    want = [product.ternary_matmul(codes, planes, **rest) for codes, planes, rest in layers]
    assert torch.equal(got, torch.stack(want))


# --- hadamard_quantize


def rotation_of(width: int) -> Rotation:
    m = hadamard_factors(width)[-1]
    m = min(width, 32) if m & (m - 1) == 0 else m
    return Rotation(hadamard_matrix(m).half(), width // m)


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of different mean and spread, with a few outlying channels."""
    generator = torch.Generator().manual_seed(rows * 10007 + width + seed)
    x = torch.randn(rows, width, generator=generator)
    x = x * (0.2 + torch.rand(rows, 1, generator=generator)) + 0.1
    x[:, :: max(1, width // 5)] *= 8
    return x


def signs_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2, shape, generator=generator).mul(2.0).sub(1.0)


def assert_quantized(got: Quantized, want: Quantized, grid: Grid) -> None:
    difference = (got.codes.int() - want.codes.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= max(1, MISMATCH * difference.numel())
    assert torch.equal(got.code_sums, got.codes.sum(-1, dtype=torch.int32))
    torch.testing.assert_close(got.scale, want.scale, rtol=5e-6, atol=0)
    # An offset near zero is measured against the token's statistic.
    slack = 5e-6 * (want.offset.abs() + want.scale / grid.factor)
    assert ((got.offset - want.offset).abs() <= slack).all()
    assert (got.branch is None) == (want.branch is None)
    if got.branch is not None and want.branch is not None:
        size = float(want.branch.square().mean().sqrt())
        torch.testing.assert_close(got.branch, want.branch, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("width", [12, 32, 36, 352, 1024, *WIDTHS])
def test_rotation(width: int, instructions: str) -> None:
    """352 has a factor that is not symmetric."""
    x, grid = tokens(19, width), GRIDS["mid-tread"]
    options: dict[str, Any] = {
        "rotation": rotation_of(width),
        "signs": signs_of(width),
        "down": torch.randn(5, width),
    }
    got = quantizing.hadamard_quantize(x, grid, **options)
    assert_quantized(got, quantizing_reference.hadamard_quantize(x, grid, **options), grid)


def test_factor_of_any_order(instructions: str) -> None:
    """A ±1 matrix whose order is no multiple of four, against the dense product."""
    inner, outer = signs_of(7, 7), 8
    x, down = tokens(5, 56), torch.eye(56)
    got = quantizing.hadamard_quantize(
        x, GRIDS["mid-tread"], rotation=Rotation(inner, outer), down=down
    )
    dense = torch.kron(hadamard_matrix(outer), inner.double()) / math.sqrt(56)
    assert got.branch is not None
    torch.testing.assert_close(got.branch.double(), x.double() @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rotated", [True, False])
def test_statistics(grid: str, rotated: bool, instructions: str) -> None:
    x = tokens(37, 144)
    rotation = rotation_of(144) if rotated else None
    got = quantizing.hadamard_quantize(x, GRIDS[grid], rotation=rotation)
    want = quantizing_reference.hadamard_quantize(x, GRIDS[grid], rotation=rotation)
    assert_quantized(got, want, GRIDS[grid])
    if not rotated and grid in ("min-max", "absmax"):  # nothing is summed
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.offset, want.offset)


@pytest.mark.parametrize("grid", GRIDS)
def test_infinite_nan_and_constant_tokens(grid: str, instructions: str) -> None:
    x = tokens(20, 40)
    x[1] = 0.0
    x[3] = 2.5
    x[5, 7], x[6, 39], x[17, 0] = math.inf, -math.inf, math.nan
    got = quantizing.hadamard_quantize(x, GRIDS[grid], rotation=None)
    want = quantizing_reference.hadamard_quantize(x, GRIDS[grid], rotation=None)
    odd = [1, 3, 5, 6, 17]
    assert torch.equal(got.codes[odd], want.codes[odd])
    assert torch.equal(got.scale[odd], want.scale[odd])
    assert torch.equal(got.offset[odd], want.offset[odd])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modulation_residual_and_half_precision(dtype: torch.dtype, instructions: str) -> None:
    """Six tokens per image: an image ends inside a block of lanes; rows are strided."""
    both = torch.randn(3, 2, 384, generator=torch.Generator().manual_seed(1)).mul(0.3).to(dtype)
    x = tokens(18, 400).to(dtype)[:, 16:]
    options: dict[str, Any] = {
        "rotation": rotation_of(384),
        "signs": signs_of(384),
        "modulation": Modulation(both[:, 0], both[:, 1], 6),
        "gated_residual": GatedResidual(tokens(18, 384).to(dtype), both[:, 0], 6),
        "down": torch.randn(16, 384, dtype=dtype) / 20,
    }
    got = quantizing.hadamard_quantize(x, GRIDS["mid-tread"], **options)
    want = quantizing_reference.hadamard_quantize(x, GRIDS["mid-tread"], **options)
    assert_quantized(got, want, GRIDS["mid-tread"])
    assert got.residual is not None
    assert want.residual is not None
    assert got.residual.dtype == dtype
    assert torch.equal(got.residual, want.residual)


def test_groups_are_layers_one_by_one() -> None:
    x, grid = tokens(5, 144), GRIDS["mid-rise"]
    options: dict[str, Any] = {
        "rotation": rotation_of(144),
        "signs": signs_of(3, 144),
        "silu": True,
        "down": torch.randn(3, 4, 144),
    }
    got = quantizing.hadamard_quantize(x, grid, **options)
    assert got.codes.shape == (3, 5, 144)
    assert_quantized(got, quantizing_reference.hadamard_quantize(x, grid, **options), grid)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    order=st.integers(1, 45),
    log_outer=st.integers(0, 4),
    rank=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_rotations_of_any_shape(
    rows: int, order: int, log_outer: int, rank: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, grid = order * 2**log_outer, Grid("min-max", 1 / 15, -8, 7)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, 2, (order, order), generator=generator).mul(2.0).sub(1.0)
    options: dict[str, Any] = {
        "rotation": Rotation(inner, 2**log_outer),
        "signs": signs_of(width),
        "down": torch.randn(rank, width, generator=generator) if rank else None,
    }
    x = tokens(rows, width, seed % 1000)
    # Exact ties of a random ±1 matrix round either way, so tokens are compared before rounding.
    want = quantizing_reference.hadamard_quantize(x.double(), grid, **options)
    for name in available():
        force(name, monkeypatch)
        got = quantizing.hadamard_quantize(x, grid, **options)
        assert (got.codes.int() - want.codes.int()).abs().max() <= 1, name
        assert torch.equal(got.code_sums, got.codes.sum(-1, dtype=torch.int32))
        size = float(x.abs().max()) * math.sqrt(width)
        torch.testing.assert_close(got.scale.double(), want.scale, rtol=1e-5, atol=1e-6 * size)
        if rank:
            assert got.branch is not None
            assert want.branch is not None
            error = (got.branch.double() - want.branch).abs().max()
            assert error <= 1e-5 * size * math.sqrt(width)


# --- both


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
    torch.library.opcheck(product._operator, arguments, test_utils=checks)
    x = tokens(4, 36)
    tail = (None, torch.ones(2, 36), 1, 0.0, 0, 0.4, 0.0, -8, 7, False)
    torch.library.opcheck(
        quantizing._operator, (x, None, None, signs_of(36), *tail), test_utils=checks
    )


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


# --- the library


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


def test_build_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: install g\+\+"):
        build.build(tmp_path / "_cpu.so")
    monkeypatch.setenv("CXX", "nothing")
    with pytest.raises(build.BuildError, match="'nothing', named by CXX, is not on PATH"):
        build.build(tmp_path / "_cpu.so")


def test_build_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="it is broken"):
        build.build(tmp_path / "_cpu.so")
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]
